//! Showing the programs that the agent runs. A listener alone does not: it takes connections while nobody accepts.

use std::{os::fd::AsFd as _, time::Duration};

use sidestep_abi::Heartbeat;

use super::{Datapath, DatapathError, MapOperation, bpf};

/// How often [`Datapath::beat`] is to be called: a few system calls a second, and many chances before any limit.
pub const HEARTBEAT_PERIOD: Duration = Duration::from_millis(200);

impl Datapath {
    /// Says that the agent runs now. Once that is older than `hung_after`, the programs count the agent as hung and
    /// treat new connects as if it were not there; without a limit they never do.
    ///
    /// # Errors
    ///
    /// [`DatapathError::Map`] if the kernel refuses.
    pub fn beat(&self, hung_after: Option<Duration>) -> Result<(), DatapathError> {
        self.write_heartbeat(Heartbeat {
            beat_ns: nanoseconds(bpf::monotonic_now()),
            hung_after_ns: hung_after.map_or(0, nanoseconds),
        })
    }

    /// Takes the last heartbeat back: for an agent that ends, and that no other one has replaced.
    ///
    /// # Errors
    ///
    /// As [`Self::beat`].
    pub fn stop_beating(&self, hung_after: Option<Duration>) -> Result<(), DatapathError> {
        self.write_heartbeat(Heartbeat {
            beat_ns: 0,
            hung_after_ns: hung_after.map_or(0, nanoseconds),
        })
    }

    fn write_heartbeat(&self, heartbeat: Heartbeat) -> Result<(), DatapathError> {
        bpf::map_update(self.maps.heartbeat.as_fd(), &0_u32, &heartbeat)
            .map_err(|source| DatapathError::map("HEARTBEAT", MapOperation::Write, source))
    }
}

fn nanoseconds(span: Duration) -> u64 {
    u64::try_from(span.as_nanos()).unwrap_or(u64::MAX)
}
