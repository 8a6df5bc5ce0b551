//! The programs that run in the kernel: one file per hook, attached to cgroups.
//!
//! A captured connection meets them in this order: [`connect4`] or [`connect6`] remembers where the
//! application wanted to go and sends it to the agent's listener; [`sock_ops`] hands that memory from
//! the application's socket to the one which the agent accepts; [`getpeername4`] and [`getpeername6`]
//! keep the application from seeing the listener; [`getsockopt`] answers `SO_ORIGINAL_DST`.
//! A DNS query in a datagram is sent to the agent by [`sendmsg4`], or by the connect hooks if its socket is connected,
//! and [`recvmsg4`] and [`recvmsg6`] let the answer come from the server that was asked.
//! What is decided stands in `sidestep-abi`, where it is tested. Nothing here picks an instance or
//! knows an identity: that is the agent's.
//!
//! Minimum kernel: 6.1 as built (`bpf_set_retval` in sock_addr programs).

#![no_std]
#![no_main]

mod connect4;
mod connect6;
mod connect;
mod sock_ops;
mod query;
mod interface;
mod sendmsg4;
mod recvmsg4;
mod recvmsg6;
mod getpeername4;
mod getpeername6;
mod getsockopt;
mod origins;
mod maps;
mod report;
mod log;
mod context;

/// The verifier proves that nothing panics; the language wants a handler all the same.
#[panic_handler]
fn panic(_info: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

/// The kernel gives the helpers that we use to GPL-compatible programs only; this declares the object as such.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
