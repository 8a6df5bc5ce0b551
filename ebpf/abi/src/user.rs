//! The agent's side: which types may be read from and written to maps as bytes.

#![expect(unsafe_code, reason = "a promise about layouts, which `maps` asserts")]

use crate::{
    Address, Config, Fallback, FlowKey, Heartbeat, Interfaces, KnownAddress, ListenerKey, Origin,
    Refusal, Server, VipKey, VipValue,
};

macro_rules! pod {
    ($($type:ty),*) => {
        $(
            // SAFETY: `repr(C)` of integers only, without implicit padding; any bit pattern is a value.
            unsafe impl aya::Pod for $type {}
        )*
    };
}

pod!(
    Address,
    Config,
    Fallback,
    FlowKey,
    Heartbeat,
    Interfaces,
    KnownAddress,
    ListenerKey,
    Origin,
    Refusal,
    Server,
    VipKey,
    VipValue
);

impl Refusal {
    /// Reads a record of the ring buffer.
    pub fn from_bytes(bytes: &[u8; size_of::<Self>()]) -> Self {
        // SAFETY: as many bytes as the type has, of which any are a value; alignment is not asked for.
        unsafe { bytes.as_ptr().cast::<Self>().read_unaligned() }
    }
}
