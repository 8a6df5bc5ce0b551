//! Asking the kernel by `netlink(7)`: messages, attributes, and who waits for the answer.
//!
//! For requests that are answered at once. Messages are in the byte order of the host, what they say of packets in
//! that of the network; an answer may grow from kernel to kernel, so what is not known is skipped.

use std::{
    io::{self, Read as _, Write as _},
    time::Duration,
};

use socket2::{Domain, Protocol, Socket, Type};

/// The kernel's answer should be there at once; a runtime thread must not wait longer for one that got lost.
const PATIENCE: Duration = Duration::from_secs(1);

/// The kernel puts a dump into pieces of at most this many bytes (`netlink_dump` in `net/netlink/af_netlink.c`).
const DATAGRAM: usize = 32 * 1024;

/// `struct nlmsghdr` and `struct nlattr` in bytes.
const HEADER: usize = 16;
const ATTRIBUTE: usize = 4;

/// The bits of an attribute's type that say how it is written, and those of its number (`NLA_TYPE_MASK`).
pub(crate) const NESTED: u16 = 0x8000;
const TYPE_MASK: u16 = 0x3fff;

/// What the flags of a request ask for (`NLM_F_*`).
pub(crate) const ACKNOWLEDGE: u16 = 4;
pub(crate) const DUMP: u16 = 0x300;
/// To make what must not be there yet.
pub(crate) const CREATE: u16 = 0x600;

/// An answer breaks off or contradicts itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a message of netlink(7) that is not whole")]
pub struct Malformed;

impl From<Malformed> for io::Error {
    fn from(malformed: Malformed) -> Self {
        Self::new(io::ErrorKind::InvalidData, malformed)
    }
}

/// A socket for one kind of requests, in the network namespace in which it was opened.
#[derive(Debug)]
pub(crate) struct Requests {
    socket: Socket,
    /// Of the last request: answers carry it.
    sequence: u32,
    buffer: Vec<u8>,
}

impl Requests {
    /// In the network namespace of the calling thread; `protocol` is a `NETLINK_*`.
    pub(crate) fn open(protocol: i32) -> io::Result<Self> {
        let socket = Socket::new(
            Domain::from(libc::AF_NETLINK),
            Type::RAW.cloexec(),
            Some(Protocol::from(protocol)),
        )?;
        socket.set_read_timeout(Some(PATIENCE))?;
        Ok(Self {
            socket,
            sequence: 0,
            buffer: vec![0; DATAGRAM],
        })
    }

    /// Sends a request; what [`Self::receive`] gives from now on answers it.
    pub(crate) fn send(&mut self, kind: u16, flags: u16, body: &[u8]) -> io::Result<()> {
        self.sequence = self.sequence.wrapping_add(1);
        // Without an address it goes to the kernel.
        self.socket
            .write_all(&request(kind, flags, self.sequence, body))
    }

    /// The next messages of the answer, at least one.
    pub(crate) fn receive(&mut self) -> io::Result<Vec<Answer<'_>>> {
        let mut read = 0;
        let mut answered = false;
        // An answer to an earlier request, which came too late, is skipped.
        while !answered {
            read = self.socket.read(&mut self.buffer)?;
            answered = !self.answers(read)?.is_empty();
        }
        Ok(self.answers(read)?)
    }

    fn answers(&self, length: usize) -> Result<Vec<Answer<'_>>, Malformed> {
        answers(self.buffer.get(..length).unwrap_or_default(), self.sequence)
    }
}

/// A message of the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Answer<'a> {
    /// What was asked for.
    Message { kind: u16, body: &'a [u8] },
    /// The last of a dump.
    Done,
    /// The request came to this `errno`; 0 acknowledges it.
    Error(i32),
}

fn request(kind: u16, flags: u16, sequence: u32, body: &[u8]) -> Vec<u8> {
    /// `NLM_F_REQUEST`
    const IS_REQUEST: u16 = 1;
    let length = u32::try_from(HEADER + body.len()).unwrap_or(u32::MAX);
    [
        &host32(length)[..],
        &host16(kind),
        &host16(IS_REQUEST | flags),
        &host32(sequence),
        &host32(0),
        body,
    ]
    .concat()
}

/// The messages of one datagram that answer request `sequence`.
pub(crate) fn answers(datagram: &[u8], sequence: u32) -> Result<Vec<Answer<'_>>, Malformed> {
    let mut rest = datagram;
    let mut found = Vec::new();
    while !rest.is_empty() {
        let mut header = Fields(rest);
        let length = usize::try_from(header.host32()?).unwrap_or(usize::MAX);
        let kind = header.host16()?;
        let _flags = header.host16()?;
        let answers_to = header.host32()?;
        let body = rest.get(HEADER..length).ok_or(Malformed)?;
        if answers_to == sequence {
            found.push(answer(kind, body)?);
        }
        rest = rest.get(aligned(length)..).unwrap_or_default();
    }
    Ok(found)
}

fn answer(kind: u16, body: &[u8]) -> Result<Answer<'_>, Malformed> {
    /// `NLMSG_ERROR` and `NLMSG_DONE`
    const ERROR: u16 = 2;
    const DONE: u16 = 3;
    Ok(match kind {
        // Both begin with a negative error number, or 0.
        ERROR | DONE => match (kind, Fields(body).host32()?.cast_signed().saturating_neg()) {
            (DONE, 0) => Answer::Done,
            (_, errno) => Answer::Error(errno),
        },
        kind => Answer::Message { kind, body },
    })
}

/// One attribute, with what pads it to where the next one begins.
pub(crate) fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
    let length = ATTRIBUTE + value.len();
    let mut bytes = [
        &host16(u16::try_from(length).unwrap_or(u16::MAX))[..],
        &host16(kind),
        value,
    ]
    .concat();
    bytes.resize(aligned(length), 0);
    bytes
}

/// The value of the first attribute of a kind.
pub(crate) fn find(attributes: &[u8], kind: u16) -> Result<Option<&[u8]>, Malformed> {
    let mut rest = attributes;
    while !rest.is_empty() {
        let mut header = Fields(rest);
        let (length, found) = (usize::from(header.host16()?), header.host16()?);
        let value = rest.get(ATTRIBUTE..length).ok_or(Malformed)?;
        if found & TYPE_MASK == kind {
            return Ok(Some(value));
        }
        rest = rest.get(aligned(length)..).unwrap_or_default();
    }
    Ok(None)
}

/// Messages and attributes begin at multiples of 4 (`NLMSG_ALIGN`, `NLA_ALIGN`).
fn aligned(length: usize) -> usize {
    length.next_multiple_of(4)
}

/// Reads from the beginning, and gets shorter.
pub(crate) struct Fields<'a>(pub(crate) &'a [u8]);

impl Fields<'_> {
    pub(crate) fn take<const N: usize>(&mut self) -> Result<[u8; N], Malformed> {
        let (taken, rest) = self.0.split_first_chunk().ok_or(Malformed)?;
        self.0 = rest;
        Ok(*taken)
    }

    pub(crate) fn network16(&mut self) -> Result<u16, Malformed> {
        self.take().map(u16::from_be_bytes)
    }

    pub(crate) fn host16(&mut self) -> Result<u16, Malformed> {
        self.take().map(u16::from_ne_bytes)
    }

    pub(crate) fn host32(&mut self) -> Result<u32, Malformed> {
        self.take().map(u32::from_ne_bytes)
    }

    pub(crate) fn host64(&mut self) -> Result<u64, Malformed> {
        self.take().map(u64::from_ne_bytes)
    }
}

#[expect(clippy::host_endian_bytes, reason = "netlink(7): host byte order")]
pub(crate) fn host16(value: u16) -> [u8; 2] {
    value.to_ne_bytes()
}

#[expect(clippy::host_endian_bytes, reason = "netlink(7): host byte order")]
pub(crate) fn host32(value: u32) -> [u8; 4] {
    value.to_ne_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_breaks_off_is_refused() {
        let whole = request(20, DUMP, 1, &[7; 8]);
        let message = Answer::Message {
            kind: 20,
            body: &[7; 8],
        };
        assert_eq!(answers(&whole, 1), Ok(vec![message]));
        assert_eq!(answers(&whole, 2), Ok(vec![]));
        assert_eq!(answers(&[], 1), Ok(vec![]));
        for length in 1..whole.len() {
            assert_eq!(answers(&whole[..length], 1), Err(Malformed));
        }
        // A length shorter than the header would be read forever.
        assert_eq!(answers(&[0; 64], 0), Err(Malformed));
        assert_eq!(find(&[0; 8], 1), Err(Malformed));
    }

    #[test]
    fn an_error_is_told_from_an_acknowledgement() {
        let said = |errno: i32| request(2, 0, 5, &host32(errno.cast_unsigned()));
        assert_eq!(answers(&said(0), 5), Ok(vec![Answer::Error(0)]));
        let refused = Answer::Error(libc::EEXIST);
        assert_eq!(answers(&said(-libc::EEXIST), 5), Ok(vec![refused]));
        assert_eq!(
            answers(&request(3, 0, 5, &[0; 4]), 5),
            Ok(vec![Answer::Done])
        );
    }

    #[test]
    fn attributes_are_found_behind_padding() {
        let attributes = [attribute(1, &[1]), attribute(2 | NESTED, &[2, 3])].concat();
        assert_eq!(find(&attributes, 2), Ok(Some(&[2, 3][..])));
        assert_eq!(find(&attributes, 3), Ok(None));
        // Nothing pads the last one.
        assert_eq!(find(&attributes[..14], 2), Ok(Some(&[2, 3][..])));
    }
}
