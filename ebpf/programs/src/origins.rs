//! The memory on a socket of where its application wanted to go.

use core::{ffi::c_void, ptr::null_mut};

use aya_ebpf::{
    bindings::BPF_SK_STORAGE_GET_F_CREATE,
    helpers::generated::{bpf_sk_storage_delete, bpf_sk_storage_get},
};
use sidestep_abi::Origin;

use crate::{context::Socket, maps::ORIGINS};

#[inline(always)]
fn map() -> *mut c_void {
    (&raw const ORIGINS).cast_mut().cast()
}

/// What the socket remembers, in place.
#[inline(always)]
pub fn of(socket: Socket) -> Option<&'static mut Origin> {
    // SAFETY: `socket` is not null; without the flag to create, no value is read.
    let origin: *mut Origin =
        unsafe { bpf_sk_storage_get(map(), socket.as_ptr(), null_mut(), 0).cast() };
    // SAFETY: null or the storage of this socket, which outlives the program's run.
    unsafe { origin.as_mut() }
}

/// Makes the socket remember; whether there was memory for it (`net.core.optmem_max` limits it).
#[inline(always)]
pub fn remember(socket: Socket, origin: &Origin) -> bool {
    let initial = core::ptr::from_ref(origin).cast_mut().cast();
    let create = u64::from(BPF_SK_STORAGE_GET_F_CREATE);
    // SAFETY: `socket` is not null and `initial` points to a value of the map's type.
    let stored: *mut Origin =
        unsafe { bpf_sk_storage_get(map(), socket.as_ptr(), initial, create).cast() };
    // SAFETY: null or the storage of this socket, which outlives the program's run.
    let Some(stored) = (unsafe { stored.as_mut() }) else {
        return false;
    };
    // The storage may have existed, then the helper left it as it was.
    *stored = *origin;
    true
}

/// Makes the socket forget.
#[inline(always)]
pub fn forget(socket: Socket) {
    // SAFETY: `socket` is not null.
    let _ = unsafe { bpf_sk_storage_delete(map(), socket.as_ptr()) };
}
