//! Hook sock_ops: hands the memory of a captured connect from the application's socket to the agent's.
//!
//! The application's side publishes it before its SYN leaves: later would be too late, since with TCP
//! Fast Open the agent may accept before the application's side is established. The agent's side takes
//! it as its socket comes to be. What no agent takes goes with the application's socket: were it to stay,
//! whoever gets the same ports next would be taken for that application. The agent's sweep is for sockets
//! whose end no program sees.

use aya_ebpf::{
    bindings::{
        BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB, BPF_SOCK_OPS_STATE_CB, BPF_SOCK_OPS_STATE_CB_FLAG,
        BPF_SOCK_OPS_TCP_CONNECT_CB, BPF_TCP_CLOSE,
    },
    helpers::generated::bpf_ktime_get_ns,
    macros::sock_ops,
    programs::SockOpsContext,
};
use sidestep_abi::{FlowEvent, Found, Role, maps::STATE_CALLBACK_ARMED};

use crate::{
    context::{Ends, SockOps},
    log,
    maps::{self, FLOWS, snapshot},
    origins, report,
};

#[sock_ops]
pub fn sidestep_flows(context: SockOpsContext) -> u32 {
    let context = SockOps(context.ops);
    let operation = context.operation();
    if operation == BPF_SOCK_OPS_TCP_CONNECT_CB {
        publish(context);
    } else if operation == BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB {
        take(context);
    } else if operation == BPF_SOCK_OPS_STATE_CB {
        withdraw(context);
    }
    1
}

/// The source port is chosen, the SYN not yet sent.
#[inline(always)]
fn publish(context: SockOps) {
    let ends = context.ends();
    if !ends.remote.is_loopback() {
        return;
    }
    let key = context.key_from_client(&ends);
    let Some(socket) = context.socket() else {
        return;
    };
    let Some(stored) = origins::of(socket) else {
        // A connect of nobody's concern; what an earlier one with the same ports left is not its.
        let _ = FLOWS.remove(&key);
        return;
    };
    let mut origin = snapshot(stored);
    if origin.role == Role::FALLBACK {
        // On its way to a fallback at this host, which no agent hears of.
        let _ = FLOWS.remove(&key);
        return;
    }
    let is_live = origin.role == Role::CLIENT
        && origin.rewritten == ends.remote
        && origin.rewritten_port.to_host() == ends.remote_port;
    if !is_live {
        let _ = FLOWS.remove(&key);
        tell(context, &ends, FlowEvent::Stale);
        return;
    }
    // SAFETY: takes nothing.
    origin.stamped_ns = unsafe { bpf_ktime_get_ns() };
    origin.check = key.digest();
    origin.flags = 0;
    if FLOWS.insert(&key, &origin, 0).is_err() {
        tell(context, &ends, FlowEvent::Full);
        return;
    }
    tell(context, &ends, FlowEvent::Published);
    let flags = context.callback_flags();
    let is_armed = flags & BPF_SOCK_OPS_STATE_CB_FLAG != 0;
    if !is_armed && context.set_callback_flags(flags | BPF_SOCK_OPS_STATE_CB_FLAG) {
        // Only what we switched on do we switch off: the flags are shared with other programs.
        stored.flags |= STATE_CALLBACK_ARMED;
    }
}

/// An accepted socket came to be: if its connection was captured, the memory becomes its own.
#[inline(always)]
fn take(context: SockOps) {
    let ends = context.ends();
    if !ends.local.is_loopback() {
        return;
    }
    let key = context.key_from_server(&ends);
    let mut origin = match maps::flow(&key) {
        Found::Value(origin) => origin,
        Found::Absent | Found::Torn => return,
    };
    let Some(socket) = context.socket() else {
        return;
    };
    origin.role = Role::ACCEPTED;
    origin.check = 0;
    let event = if origins::remember(socket, &origin) {
        FlowEvent::Moved
    } else {
        FlowEvent::MoveFailed
    };
    let _ = FLOWS.remove(&key);
    tell(context, &ends, event);
}

#[inline(always)]
fn tell(context: SockOps, ends: &Ends, event: FlowEvent) {
    report::count(event.slot());
    log::flow(context, ends, event);
}

/// The application's socket ends, its ports become free: nobody may take what was published for it.
///
/// Not before that: an application may be done with a connection that waits for a place in the listener's
/// queue. Its socket lives on in the kernel until the agent's side was established.
#[inline(always)]
fn withdraw(context: SockOps) {
    let (_left, entered) = context.states();
    if entered != BPF_TCP_CLOSE {
        return;
    }
    let ends = context.ends();
    if !ends.remote.is_loopback() {
        return;
    }
    if FLOWS.remove(&context.key_from_client(&ends)).is_ok() {
        tell(context, &ends, FlowEvent::Removed);
    }
    disarm(context);
}

/// The socket may be used again, for connections that are not captured.
#[inline(always)]
fn disarm(context: SockOps) {
    let Some(socket) = context.socket() else {
        return;
    };
    let Some(stored) = origins::of(socket) else {
        return;
    };
    if stored.flags & STATE_CALLBACK_ARMED != 0 {
        stored.flags &= !STATE_CALLBACK_ARMED;
        let flags = context.callback_flags() & !BPF_SOCK_OPS_STATE_CB_FLAG;
        let _ = context.set_callback_flags(flags);
    }
}
