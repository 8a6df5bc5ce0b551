//! Which interface a datagram is to leave by, whatever the routes say.
//!
//! A datagram to a loopback address never arrives if its sender has picked another interface. A program sees to what a
//! socket is bound, but neither `IP_UNICAST_IF` nor what comes with the datagram (`IP_PKTINFO`). So this reads what
//! the kernel will go by, out of the kernel's own memory; where that is, the agent learns from the kernel.

use core::{
    ffi::c_void,
    ptr::{null, read_volatile, write_volatile},
};

use aya_ebpf::helpers::generated::bpf_probe_read_kernel;
use sidestep_abi::Interfaces;

use crate::context::SockAddr;

/// The agent sets it as it loads the programs. The verifier takes it for a constant and leaves out what depends on
/// it, so that programs which capture no queries need not be allowed to read the kernel's memory.
#[unsafe(no_mangle)]
static INTERFACES: Interfaces = Interfaces {
    socket: 0,
    context: 0,
    message: 0,
};

/// Of no interface.
const UNKNOWN: u32 = u32::MAX;

/// The index of the interface that the sender has picked for a datagram; 0 if it has not, `u32::MAX` if that cannot be
/// told. For IPv4.
#[inline(always)]
pub fn picked(context: SockAddr) -> u32 {
    // SAFETY: a constant of this file; read as the agent has set it.
    let offset = unsafe { read_volatile(&raw const INTERFACES.socket) };
    let Some(socket) = context.socket() else {
        return UNKNOWN;
    };
    if offset == 0 {
        return UNKNOWN;
    }
    let mut interface = match of_message(context) {
        // A connect, at which there is no message yet.
        0 => socket.bound_device(),
        message => read_word(message),
    };
    if interface == 0 {
        interface = read_word(address_of(socket.as_ptr()) + u64::from(offset));
    }
    interface
}

/// Where the kernel keeps the interface of the datagram at hand; 0 if there is none.
#[inline(always)]
fn of_message(context: SockAddr) -> u64 {
    // SAFETY: as above.
    let (pointer, interface) = unsafe {
        (
            read_volatile(&raw const INTERFACES.context),
            read_volatile(&raw const INTERFACES.message),
        )
    };
    let mut message = 0_u64;
    let at = address_of(context.as_ptr()) + u64::from(pointer);
    // What cannot be read fails again, where that is seen.
    if !read((&raw mut message).cast(), 8, at as *const c_void) {
        return 1;
    }
    if message == 0 {
        return 0;
    }
    message + u64::from(interface)
}

#[inline(always)]
fn read_word(address: u64) -> u32 {
    let mut word = UNKNOWN;
    if read((&raw mut word).cast(), 4, address as *const c_void) {
        word
    } else {
        UNKNOWN
    }
}

/// A pointer as a number: the verifier lets no program reckon with a pointer to a context or a socket, but read it
/// from its own stack.
#[inline(always)]
fn address_of(pointer: *mut c_void) -> u64 {
    let mut kept: *const c_void = null();
    // SAFETY: both are on the stack.
    unsafe { write_volatile(&raw mut kept, pointer.cast_const()) };
    let mut address = 0_u64;
    let _ = read((&raw mut address).cast(), 8, (&raw const kept).cast());
    address
}

/// Whether `length` bytes could be read. If not, they are zeros.
#[inline(always)]
fn read(to: *mut c_void, length: u32, from: *const c_void) -> bool {
    // SAFETY: `to` has room for `length` bytes; the helper bears any other address.
    unsafe { bpf_probe_read_kernel(to, length, from) == 0 }
}
