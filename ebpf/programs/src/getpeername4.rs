//! Hook `cgroup/getpeername4`: an application asks whom it is connected to and hears the virtual address, or the DNS
//! server.
//!
//! Also runs when `accept()` reports the peer; there the socket is an accepted one and keeps its answer.

use aya_ebpf::{macros::cgroup_sock_addr, programs::SockAddrContext};
use sidestep_abi::{Address, FlowEvent, PortBe, Role, maps::UDP};

use crate::{context::SockAddr, origins, query, report};

#[cgroup_sock_addr(getpeername4)]
pub fn sidestep_peer4(context: SockAddrContext) -> i32 {
    let context = SockAddr(context.sock_addr);
    if let Some((address, port)) = shown_peer(context, context.address_v4()) {
        context.set_v4(&address, port);
    }
    // The kernel takes no other answer from this hook.
    1
}

/// What to show instead of `peer`; `None` leaves it.
///
/// Memory that does not fit the peer is stale and not shown.
#[inline(always)]
pub fn shown_peer(context: SockAddr, peer: Address) -> Option<(Address, PortBe)> {
    if context.protocol() == UDP {
        return query::shown_server(context, &peer);
    }
    let origin = origins::of(context.socket()?)?;
    let is_application = origin.role == Role::CLIENT || origin.role == Role::FALLBACK;
    let fits =
        is_application && origin.rewritten == peer && origin.rewritten_port == context.port();
    if !fits {
        return None;
    }
    report::count(FlowEvent::PeerShown.slot());
    Some((origin.destination, origin.destination_port))
}
