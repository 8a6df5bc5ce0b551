//! Hook `cgroup/getpeername6`: as [`crate::getpeername4`], for IPv6 sockets.

use aya_ebpf::{macros::cgroup_sock_addr, programs::SockAddrContext};

use crate::{context::SockAddr, getpeername4::shown_peer};

#[cgroup_sock_addr(getpeername6)]
pub fn sidestep_peer6(context: SockAddrContext) -> i32 {
    let context = SockAddr(context.sock_addr);
    if let Some((address, port)) = shown_peer(context, context.address_v6()) {
        context.set_v6(&address, port);
    }
    1
}
