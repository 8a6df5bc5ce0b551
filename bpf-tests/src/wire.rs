//! What goes over the wire between two nodes: recorded by tcpdump, taken apart here.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, ensure};
use rustix::process::Signal;

use crate::{
    lab::DEVICE,
    node::Node,
    program::{Program, Running},
    wait::{SOON, wait_for},
};

/// A tcpdump that records.
#[derive(Debug)]
pub struct Capture {
    tcpdump: Running,
    file: PathBuf,
}

impl Capture {
    /// Records what matches `filter` at the node's end of the wire, from now on.
    ///
    /// # Errors
    /// If tcpdump is missing.
    pub fn start(node: &Node, filter: &str) -> Result<Self> {
        let file = node.directory().join("wire.pcap");
        let log = node.directory().join("tcpdump.log");
        // What an earlier capture said is not about this one.
        fs::write(&log, "")?;
        let tcpdump = node
            .tool("tcpdump")?
            .args(["-n", "-U", "--immediate-mode", "-Z", "root", "-B", "16384"])
            .args(["-i", DEVICE, "-w"])
            .arg(&file)
            .arg(filter)
            .log(&log)
            .spawn()?;
        wait_for("tcpdump to listen", SOON, || {
            fs::read_to_string(&log).is_ok_and(|said| said.contains("listening on"))
        })?;
        Ok(Self { tcpdump, file })
    }

    /// Ends the recording once it has application data of TLS in it, and reads it.
    ///
    /// tcpdump takes packets from a queue: told to end at once, on a busy machine it ends before the queue does.
    ///
    /// # Errors
    /// If there is none, tcpdump does not end, or its file is none.
    pub fn stop(mut self) -> Result<Wire> {
        wait_for("tcpdump to record what was sent", SOON, || {
            let so_far = Wire::read(&self.file);
            so_far.is_ok_and(|wire| wire.tls_records().is_ok_and(|records| records > 1))
        })?;
        self.tcpdump.signal(Signal::INT)?;
        self.tcpdump.wait(SOON)?.context("tcpdump did not end")?;
        Wire::read(&self.file)
    }
}

/// A recording: the bytes that each TCP connection carried in each direction.
#[derive(Debug)]
pub struct Wire {
    file: PathBuf,
    /// By addresses and ports, as they stand in the packets; the bytes by sequence number.
    flows: BTreeMap<Vec<u8>, Flow>,
}

#[derive(Debug, Default)]
struct Flow {
    first: u32,
    segments: BTreeMap<u32, Vec<u8>>,
}

impl Flow {
    /// All bytes in order. Retransmitted ones replace what they repeat.
    fn bytes(&self) -> Vec<u8> {
        let mut bytes = vec![];
        for (offset, segment) in &self.segments {
            bytes.truncate(usize::try_from(*offset).unwrap_or(usize::MAX));
            bytes.extend_from_slice(segment);
        }
        bytes
    }
}

impl Wire {
    fn read(file: &Path) -> Result<Self> {
        let bytes = fs::read(file).with_context(|| format!("reading {}", file.display()))?;
        let mut wire = Self {
            file: file.to_owned(),
            flows: BTreeMap::new(),
        };
        // A header of 24 bytes, then for each packet 16 bytes, the captured length at 8, and the packet.
        let mut rest = bytes.get(24..).context("a capture without a header")?;
        while let Some(header) = rest.get(..16) {
            let length = header
                .get(8..12)
                .and_then(|length| length.try_into().ok())
                .map_or(0, u32::from_le_bytes);
            let end = 16 + usize::try_from(length)?;
            let packet = rest.get(16..end).context("a capture cut short")?;
            // What is no TCP segment with a payload has nothing to show.
            let _payload = wire.add_frame(packet);
            rest = rest.get(end..).unwrap_or_default();
        }
        Ok(wire)
    }

    /// Takes an Ethernet frame apart (IEEE 802.3, RFC 791, 8200 without extensions, 9293).
    fn add_frame(&mut self, frame: &[u8]) -> Option<()> {
        let packet = frame.get(14..)?;
        let (addresses, protocol, segment) = match frame.get(12..14)? {
            [0x08, 0x00] => {
                let header = usize::from(packet.first()? & 0x0f) * 4;
                let total = usize::from(u16::from_be_bytes(packet.get(2..4)?.try_into().ok()?));
                (
                    packet.get(12..20)?,
                    packet.get(9)?,
                    packet.get(header..total)?,
                )
            }
            [0x86, 0xdd] => (packet.get(8..40)?, packet.get(6)?, packet.get(40..)?),
            _ => return None,
        };
        if *protocol != 6 {
            return None;
        }
        let sequence = u32::from_be_bytes(segment.get(4..8)?.try_into().ok()?);
        let header = usize::from(segment.get(12)? >> 4) * 4;
        let syn = segment.get(13)? & 0x02 != 0;
        let payload = segment.get(header..)?;
        let key = [addresses, segment.get(..4)?].concat();
        let flow = self.flows.entry(key).or_insert_with(|| Flow {
            first: sequence,
            ..Flow::default()
        });
        if syn {
            // Of a port that is used again, only the last connection is kept.
            *flow = Flow {
                first: sequence.wrapping_add(1),
                ..Flow::default()
            };
        }
        if !payload.is_empty() {
            flow.segments
                .insert(sequence.wrapping_sub(flow.first), payload.to_vec());
        }
        Some(())
    }

    /// How many bytes were carried.
    pub fn len(&self) -> usize {
        self.streams().map(|bytes| bytes.len()).sum()
    }

    /// Whether nothing was carried.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Whether `text` went over the wire in the clear.
    pub fn contains(&self, text: &str) -> bool {
        self.streams().any(|bytes| {
            bytes
                .windows(text.len())
                .any(|part| part == text.as_bytes())
        })
    }

    /// How many TLS records with application data there are.
    ///
    /// # Errors
    /// If a byte belongs to no TLS record (RFC 8446 section 5.1).
    pub fn tls_records(&self) -> Result<usize> {
        let mut records = 0;
        for bytes in self.streams() {
            let mut rest = bytes.as_slice();
            while let Some((header, after)) = rest.split_first_chunk::<5>() {
                let [kind, major, _minor, high, low] = *header;
                ensure!(
                    (20..=23).contains(&kind) && major == 3,
                    "bytes on the wire that are no TLS record: {header:02x?}"
                );
                records += usize::from(kind == 23);
                let length = usize::from(u16::from_be_bytes([high, low]));
                rest = after.get(length..).unwrap_or_default();
            }
        }
        Ok(records)
    }

    /// What tcpdump shows of the first packets that carry something.
    ///
    /// # Errors
    /// If tcpdump fails.
    pub fn excerpt(&self, packets: u32) -> Result<String> {
        Program::new("tcpdump")
            .args(["-n", "-q", "-t", "-A", "-Z", "root", "-c"])
            .arg(packets.to_string())
            .arg("-r")
            .arg(&self.file)
            .arg("tcp[tcpflags] & tcp-push != 0")
            .run(SOON)
    }

    fn streams(&self) -> impl Iterator<Item = Vec<u8>> {
        self.flows
            .values()
            .map(Flow::bytes)
            .filter(|bytes| !bytes.is_empty())
    }
}
