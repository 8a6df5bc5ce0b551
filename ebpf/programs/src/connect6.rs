//! Hook `cgroup/connect6`: IPv6 sockets, also those which talk IPv4 through mapped addresses.

use aya_ebpf::{macros::cgroup_sock_addr, programs::SockAddrContext};

use crate::{
    connect::{self, Step},
    context::SockAddr,
};

#[cgroup_sock_addr(connect6)]
pub fn sidestep_conn6(context: SockAddrContext) -> i32 {
    let context = SockAddr(context.sock_addr);
    match connect::handle(context, context.address_v6()) {
        Step::Pass => 1,
        Step::Refuse => 0,
        Step::Rewrite(address, port) => {
            context.set_v6(&address, port);
            1
        }
    }
}
