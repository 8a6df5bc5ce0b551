//! Hook `cgroup/recvmsg6`: as [`crate::recvmsg4`], for IPv6 sockets, which talk IPv4 through mapped addresses.

use aya_ebpf::{macros::cgroup_sock_addr, programs::SockAddrContext};

use crate::{context::SockAddr, query::shown_server};

#[cgroup_sock_addr(recvmsg6)]
pub fn sidestep_recv6(context: SockAddrContext) -> i32 {
    let context = SockAddr(context.sock_addr);
    if let Some((address, port)) = shown_server(context, &context.address_v6()) {
        context.set_v6(&address, port);
    }
    // The kernel takes no other answer from this hook.
    1
}
