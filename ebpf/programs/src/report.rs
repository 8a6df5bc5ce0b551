//! Counting, and telling the agent about refusals.

use aya_ebpf::helpers::generated::{
    bpf_get_current_cgroup_id, bpf_get_current_comm, bpf_get_current_pid_tgid,
    bpf_get_current_uid_gid,
};
use sidestep_abi::{Address, FlowEvent, PortBe, Refusal, Verdict};

use crate::maps::{COUNTS, REFUSALS};

/// The process that makes the system call.
pub struct Caller {
    pub cgroup: u64,
    pub uid: u32,
    pub process: u32,
}

#[inline(always)]
pub fn caller() -> Caller {
    // SAFETY: these helpers take nothing.
    let (cgroup, ids, owner) = unsafe {
        (
            bpf_get_current_cgroup_id(),
            bpf_get_current_pid_tgid(),
            bpf_get_current_uid_gid(),
        )
    };
    // The upper half of one is the process (the lower its thread), the lower half of the other the user.
    Caller {
        cgroup,
        uid: owner as u32,
        process: (ids >> 32) as u32,
    }
}

#[inline(always)]
pub fn count(slot: u32) {
    if let Some(counter) = COUNTS.get_ptr_mut(slot) {
        // SAFETY: the pointer is to this CPU's slot, and nothing else runs on it within a program.
        unsafe { *counter += 1 };
    }
}

/// Tells the agent of a refused connect, if there is room.
#[inline(always)]
pub fn refusal(verdict: Verdict, destination: &Address, port: PortBe, netns: u64) {
    let Some(mut entry) = REFUSALS.reserve::<Refusal>(0) else {
        count(FlowEvent::ReportLost.slot());
        return;
    };
    let caller = caller();
    let record = entry.write(Refusal {
        destination: *destination,
        destination_port: port,
        zero: 0,
        verdict: verdict.slot(),
        cgroup: caller.cgroup,
        netns,
        uid: caller.uid,
        process: caller.process,
        command: [0; 16],
    });
    let name = record.command.as_mut_ptr().cast();
    // SAFETY: `name` points to the 16 bytes that the length says.
    let _ = unsafe { bpf_get_current_comm(name, 16) };
    entry.submit(0);
}
