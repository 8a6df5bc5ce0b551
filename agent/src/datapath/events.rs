//! What the programs report through ring buffers: refused connects, and their log if they have one.

use std::{
    fmt, io,
    net::SocketAddr,
    os::fd::{AsRawFd, RawFd},
};

use aya::maps::{MapData, RingBuf};
use sidestep_abi::{Refusal, Verdict};
use tokio::io::unix::AsyncFd;

use super::{CgroupId, NetnsCookie, kernel_log::KernelLog, types::socket_address};

/// A connect that a program refused.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refused {
    /// Where the application wanted to go.
    pub destination: SocketAddr,
    /// Why it may not.
    pub reason: Verdict,
    /// Cgroup of the process.
    pub cgroup: CgroupId,
    /// Network namespace of its socket.
    pub netns: NetnsCookie,
    /// Its user id, in the initial user namespace.
    pub uid: u32,
    /// Its process id, in the initial pid namespace.
    pub process: u32,
    /// The task's name.
    pub command: String,
}

/// The stream of refused connects. When it is read too slowly, the programs count what they lose.
///
/// Who waits for it also passes the programs' log on.
#[derive(Debug)]
pub struct RefusedEvents {
    ring: AsyncFd<Ring>,
    log: Option<AsyncFd<KernelLog>>,
}

/// Both ring buffers, until somebody reads them.
#[derive(Debug)]
pub(super) struct Rings {
    pub(super) refusals: Ring,
    pub(super) log: Option<KernelLog>,
}

/// The ring buffer; a type of its own since aya's cannot be shown.
pub(super) struct Ring(pub(super) RingBuf<MapData>);

impl fmt::Debug for Ring {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Ring")
    }
}

impl AsRawFd for Ring {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

impl RefusedEvents {
    #[expect(
        deprecated,
        reason = "the ring buffers keep their descriptors as long as they live"
    )]
    pub(super) fn new(rings: Rings) -> io::Result<Self> {
        Ok(Self {
            ring: AsyncFd::new(rings.refusals)?,
            log: rings.log.map(AsyncFd::new).transpose()?,
        })
    }

    /// Waits for the next one. Cancel-safe.
    ///
    /// # Errors
    /// If the runtime cannot watch the ring buffer any more.
    pub async fn next(&mut self) -> io::Result<Refused> {
        loop {
            let mut ready = tokio::select! {
                ready = self.ring.readable_mut() => ready?,
                failed = pass_on(self.log.as_mut()) => return Err(failed),
            };
            if let Some(item) = ready.get_inner_mut().0.next() {
                if let Some(refused) = Refused::from_record(&item) {
                    return Ok(refused);
                }
                continue;
            }
            ready.clear_ready();
        }
    }
}

/// Passes on what the programs log, until the runtime cannot watch their ring buffer any more.
async fn pass_on(log: Option<&mut AsyncFd<KernelLog>>) -> io::Error {
    let Some(log) = log else {
        return std::future::pending().await;
    };
    loop {
        match log.readable_mut().await {
            Ok(mut ready) => {
                // Cleared first: what is written during the flush wakes us again.
                ready.clear_ready();
                ready.get_inner_mut().flush();
            }
            Err(error) => return error,
        }
    }
}

impl Refused {
    /// `None` for a record of another layout; the programs of this build write none.
    pub(crate) fn from_record(bytes: &[u8]) -> Option<Self> {
        let words: &[u8; size_of::<Refusal>()] =
            bytes.get(..size_of::<Refusal>())?.try_into().ok()?;
        let refusal = Refusal::from_bytes(words);
        let name = refusal
            .command
            .iter()
            .copied()
            .take_while(|byte| *byte != 0);
        Some(Self {
            destination: socket_address(&refusal.destination, refusal.destination_port),
            reason: Verdict::from_slot(refusal.verdict)?,
            cgroup: CgroupId(refusal.cgroup),
            netns: NetnsCookie(refusal.netns),
            uid: refusal.uid,
            process: refusal.process,
            command: String::from_utf8_lossy(&name.collect::<Vec<u8>>()).into_owned(),
        })
    }
}
