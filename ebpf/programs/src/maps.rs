//! The maps, and looking up in them without being fooled by recycled elements.

use core::{
    mem::MaybeUninit,
    ptr::{read_volatile, write_volatile},
};

use aya_ebpf::{
    bindings::{BPF_F_NO_PREALLOC, BPF_NOEXIST, bpf_sock},
    btf_maps::SkStorage,
    helpers::generated::{bpf_map_lookup_elem, bpf_sk_release},
    macros::{btf_map, map},
    maps::{Array, HashMap, PerCpuArray, RingBuf, SockHash},
};
use sidestep_abi::{
    Address, COUNTERS, Config, Fallback, FlowKey, Found, Heartbeat, KnownAddress, ListenerKey,
    MAX_FALLBACKS, MAX_SERVERS, Origin, PortBe, Server, VipKey, VipValue,
};

/// Sizes of maps that the agent sets from its configuration when it loads the object.
const SIZED_BY_AGENT: u32 = 1;

#[map]
static CONFIG: Array<Config> = Array::with_max_entries(1, 0);

/// Who has a virtual address and port. Written by the agent alone.
#[map]
static VIPS: HashMap<VipKey, VipValue> =
    HashMap::with_max_entries(SIZED_BY_AGENT, BPF_F_NO_PREALLOC);

/// Which addresses are virtual, and who answers at the ports that `VIPS` does not have. Written by the agent alone.
#[map]
static ADDRESSES: HashMap<Address, KnownAddress> =
    HashMap::with_max_entries(SIZED_BY_AGENT, BPF_F_NO_PREALLOC);

/// Where connects to a service go while no agent takes them, by the service's number. Written by the agent alone.
#[map]
static FALLBACKS: HashMap<u64, Fallback> =
    HashMap::with_max_entries(2 * MAX_FALLBACKS, BPF_F_NO_PREALLOC);

/// When the agent last showed that it runs. Written by it alone.
#[map]
static HEARTBEAT: Array<Heartbeat> = Array::with_max_entries(1, 0);

/// The agent's listeners. Written by the agent alone, and an element goes when its socket is closed: what is
/// found here listens, and nobody else can be behind it.
#[map]
static LISTENERS: SockHash<ListenerKey> = SockHash::with_max_entries(32_768, 0);

/// The DNS servers that loopback addresses stand for, by the address's word. Programs add and stamp, the agent retires
/// and takes away.
#[map]
static SERVERS: HashMap<u32, Server> = HashMap::with_max_entries(MAX_SERVERS, 0);

/// Where a socket's application wanted to go; lives and dies with the socket.
#[btf_map]
pub static ORIGINS: SkStorage<Origin> = SkStorage::new();

/// Connections between their SYN and their acceptance. Preallocated: taking an element must not
/// fail for want of memory. Never an LRU: it would drop what is still needed.
#[map]
pub static FLOWS: HashMap<FlowKey, Origin> = HashMap::with_max_entries(SIZED_BY_AGENT, 0);

#[map]
pub static COUNTS: PerCpuArray<u64> = PerCpuArray::with_max_entries(COUNTERS, 0);

/// Refused connects, for the agent's log: 256 KiB hold 3,600 of them.
#[map]
pub static REFUSALS: RingBuf = RingBuf::with_byte_size(256 * 1024, 0);

#[inline(always)]
pub fn config() -> Option<&'static Config> {
    CONFIG.get(0)
}

#[inline(always)]
pub fn vip(key: &VipKey) -> Found<VipValue> {
    settle(|| VIPS.get_ptr(key), |value| value.is_for(key))
}

#[inline(always)]
pub fn address(address: &Address) -> Found<KnownAddress> {
    settle(|| ADDRESSES.get_ptr(address), |value| value.is_for(address))
}

#[inline(always)]
pub fn fallback(service: u64) -> Found<Fallback> {
    settle(|| FALLBACKS.get_ptr(service), |value| value.is_for(service))
}

/// Each field is read whole, and a beat counts with the limit before or after.
#[inline(always)]
pub fn heartbeat() -> Heartbeat {
    match HEARTBEAT.get_ptr(0) {
        Some(pointer) => snapshot(pointer),
        // Cannot be: the map has one element.
        None => Heartbeat::default(),
    }
}

/// Its port; 0 if there is none. Not an option: its payload would be undefined in that case, and where the
/// compiler spills it the verifier refuses the program.
#[inline(always)]
pub fn listener(key: &ListenerKey) -> PortBe {
    let map = (&raw const LISTENERS).cast_mut().cast();
    // SAFETY: both point to what the map's definition says. The socket found must be released.
    let socket = unsafe { bpf_map_lookup_elem(map, core::ptr::from_ref(key).cast()) };
    let mut port = 0;
    if !socket.is_null() {
        // SAFETY: a socket in this map, not null; the verifier knows its fields.
        port = unsafe { read_volatile(&raw const (*socket.cast::<bpf_sock>()).src_port) };
        // SAFETY: referenced by the look-up, and not used after.
        let _ = unsafe { bpf_sk_release(socket) };
    }
    PortBe::from_host(port as u16)
}

/// The server that a loopback address stands for, by the address's word.
#[inline(always)]
pub fn server(stand_in: u32) -> Found<Server> {
    settle(
        || SERVERS.get_ptr(stand_in),
        |server| server.is_for(stand_in),
    )
}

/// Lets a loopback address stand for a server, if it stands for none yet and there is room.
#[inline(always)]
pub fn add_server(stand_in: u32, server: &Server) {
    // Whether it does is seen by looking it up: another CPU may have been faster.
    let _ = SERVERS.insert(stand_in, server, u64::from(BPF_NOEXIST));
}

/// Writes down that somebody is sent to this loopback address.
#[inline(always)]
pub fn stamp_server(stand_in: u32, now_ns: u64) {
    if let Some(server) = SERVERS.get_ptr_mut(stand_in) {
        // SAFETY: an element of the map, of this server or recycled for another: see `Server::used_ns`.
        unsafe { write_volatile(&raw mut (*server).used_ns, now_ns) };
    }
}

#[inline(always)]
pub fn flow(key: &FlowKey) -> Found<Origin> {
    settle(|| FLOWS.get_ptr(key), |value| value.check == key.digest())
}

/// Copies what a look-up found and verifies it; looks up once more if the element was recycled meanwhile.
#[inline(always)]
fn settle<T: Copy>(
    look_up: impl Fn() -> Option<*const T>,
    is_whole: impl Fn(&T) -> bool,
) -> Found<T> {
    let Some(pointer) = look_up() else {
        return Found::Absent;
    };
    let value = snapshot(pointer);
    if is_whole(&value) {
        return Found::Value(value);
    }
    let Some(pointer) = look_up() else {
        return Found::Absent;
    };
    let value = snapshot(pointer);
    if is_whole(&value) {
        Found::Value(value)
    } else {
        Found::Torn
    }
}

/// Copies a map value to the stack, once. A plain copy may be optimised into later loads from the map.
#[inline(always)]
pub fn snapshot<T: Copy>(source: *const T) -> T {
    const {
        assert!(
            size_of::<T>() % 8 == 0 && align_of::<T>() == 8,
            "copied in words of 8 bytes"
        )
    };
    let mut copy = MaybeUninit::<T>::uninit();
    let from = source.cast::<u64>();
    let to = copy.as_mut_ptr().cast::<u64>();
    let mut word = 0;
    while word < size_of::<T>() / 8 {
        // SAFETY: both sides are `T` and `word` stays within; map values are aligned to 8 bytes.
        unsafe { write_volatile(to.add(word), read_volatile(from.add(word))) };
        word += 1;
    }
    // SAFETY: every word was written; a `T` of the maps has no invalid bit patterns.
    unsafe { copy.assume_init() }
}
