//! Hook `cgroup/connect4`: IPv4 sockets.

use aya_ebpf::{macros::cgroup_sock_addr, programs::SockAddrContext};

use crate::{
    connect::{self, Step},
    context::SockAddr,
};

#[cgroup_sock_addr(connect4)]
pub fn sidestep_conn4(context: SockAddrContext) -> i32 {
    let context = SockAddr(context.sock_addr);
    match connect::handle(context, context.address_v4()) {
        Step::Pass => 1,
        Step::Refuse => 0,
        Step::Rewrite(address, port) => {
            context.set_v4(&address, port);
            1
        }
    }
}
