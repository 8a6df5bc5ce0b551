//! Hook `cgroup/recvmsg4`: answers to captured queries come from the server that was asked.

use aya_ebpf::{macros::cgroup_sock_addr, programs::SockAddrContext};

use crate::{context::SockAddr, query::shown_server};

#[cgroup_sock_addr(recvmsg4)]
pub fn sidestep_recv4(context: SockAddrContext) -> i32 {
    let context = SockAddr(context.sock_addr);
    if let Some((address, port)) = shown_server(context, &context.address_v4()) {
        context.set_v4(&address, port);
    }
    // The kernel takes no other answer from this hook.
    1
}
