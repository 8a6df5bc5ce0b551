//! Hook `cgroup/sendmsg4`: datagrams of sockets that are not connected, or not to where this one goes. IPv6 sockets
//! that send to an IPv4-mapped address come here too.

use aya_ebpf::{macros::cgroup_sock_addr, programs::SockAddrContext};
use sidestep_abi::{Address, DNS_PORT, PortBe, maps::UDP};

use crate::{context::SockAddr, query};

#[cgroup_sock_addr(sendmsg4)]
pub fn sidestep_send4(context: SockAddrContext) -> i32 {
    let context = SockAddr(context.sock_addr);
    // Nearly all datagrams are none of ours: they pay for this look.
    if context.port() != DNS_PORT || context.protocol() != UDP {
        return 1;
    }
    let mut rewritten = (Address::default(), PortBe(0));
    if query::redirect(context, &context.address_v4(), &mut rewritten) {
        context.set_v4(&rewritten.0, rewritten.1);
    }
    1
}
