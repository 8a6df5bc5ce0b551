//! Hook `cgroup/getsockopt`: `SO_ORIGINAL_DST` on accepted sockets, as netfilter would answer it.
//!
//! Lets a proxy that knows only iptables' REDIRECT be the one behind our capture. Attached on request.

use core::ptr::write_volatile;

use aya_ebpf::{macros::cgroup_sockopt, programs::SockoptContext};
use sidestep_abi::{FlowEvent, Origin, Role};

use crate::{context::SockOption, origins, report};

/// `SOL_IP`.
const SOL_IP: i32 = 0;
/// `SOL_IPV6`.
const SOL_IPV6: i32 = 41;
/// `SO_ORIGINAL_DST` and `IP6T_SO_ORIGINAL_DST`, the same number at their levels.
const SO_ORIGINAL_DST: i32 = 80;
/// `AF_INET`.
const AF_INET: u32 = 2;
/// `AF_INET6`.
const AF_INET6: u32 = 10;

#[cgroup_sockopt(getsockopt)]
pub fn sidestep_origd(context: SockoptContext) -> i32 {
    let _ = answer(SockOption(context.sockopt));
    // Lets the kernel's answer or ours stand; 0 would be EPERM.
    1
}

#[inline(always)]
fn answer(option: SockOption) -> Option<()> {
    let level = option.level();
    if option.name() != SO_ORIGINAL_DST || (level != SOL_IP && level != SOL_IPV6) {
        return None;
    }
    let origin = origins::of(option.socket()?)?;
    if origin.role != Role::ACCEPTED {
        return None;
    }
    if level == SOL_IP {
        write_v4(option, origin)?;
    } else {
        write_v6(option, origin)?;
    }
    report::count(FlowEvent::DestinationShown.slot());
    Some(())
}

/// A `sockaddr_in`: four words.
#[inline(always)]
fn write_v4(option: SockOption, origin: &Origin) -> Option<()> {
    let word = origin.destination.v4_word()?;
    let value = option.room_for(4)?;
    // SAFETY: there is room for four words.
    unsafe {
        write_volatile(
            value,
            AF_INET | (u32::from(origin.destination_port.0) << 16),
        );
        write_volatile(value.add(1), word);
        write_volatile(value.add(2), 0);
        write_volatile(value.add(3), 0);
    }
    option.answer(16);
    Some(())
}

/// A `sockaddr_in6`: seven words. IPv4 comes as IPv4-mapped.
#[inline(always)]
fn write_v6(option: SockOption, origin: &Origin) -> Option<()> {
    let [first, second, third, fourth] = origin.destination.words;
    let value = option.room_for(7)?;
    // SAFETY: there is room for seven words.
    unsafe {
        write_volatile(
            value,
            AF_INET6 | (u32::from(origin.destination_port.0) << 16),
        );
        write_volatile(value.add(1), 0);
        write_volatile(value.add(2), first);
        write_volatile(value.add(3), second);
        write_volatile(value.add(4), third);
        write_volatile(value.add(5), fourth);
        write_volatile(value.add(6), 0);
    }
    option.answer(28);
    Some(())
}
