//! Reading and writing the contexts of programs.
//!
//! The verifier wants each field accessed with its own width. LLVM likes to merge neighbours into
//! one wider load, so every access here is volatile.

use core::{
    ffi::c_void,
    ptr::{addr_of, addr_of_mut, read_volatile, write_volatile},
};

use aya_ebpf::{
    bindings::{bpf_sock, bpf_sock_addr, bpf_sock_ops, bpf_sockopt},
    helpers::generated::{
        bpf_get_netns_cookie, bpf_get_socket_cookie, bpf_set_retval, bpf_setsockopt,
        bpf_sock_ops_cb_flags_set,
    },
};
use sidestep_abi::{Address, FlowKey, PortBe};

macro_rules! read_field {
    ($context:expr, $($field:tt)+) => {
        // SAFETY: the kernel hands every program a valid context of its type.
        unsafe { read_volatile(addr_of!((*$context).$($field)+)) }
    };
}

macro_rules! write_field {
    ($value:expr => $context:expr, $($field:tt)+) => {
        // SAFETY: the kernel hands every program a valid context of its type.
        unsafe { write_volatile(addr_of_mut!((*$context).$($field)+), $value) }
    };
}

/// `SOL_SOCKET`.
const SOL_SOCKET: i32 = 1;
/// `SO_BINDTOIFINDEX`.
const SO_BINDTOIFINDEX: i32 = 62;
/// The loopback interface has this index in every network namespace.
pub const LOOPBACK_DEVICE: u32 = 1;

/// A socket; never null.
#[derive(Clone, Copy)]
pub struct Socket(*mut bpf_sock);

impl Socket {
    #[inline(always)]
    fn new(pointer: *mut bpf_sock) -> Option<Self> {
        if pointer.is_null() {
            None
        } else {
            Some(Self(pointer))
        }
    }

    #[inline(always)]
    pub fn as_ptr(self) -> *mut c_void {
        self.0.cast()
    }

    /// The interface that the socket is bound to; 0 for none.
    #[inline(always)]
    pub fn bound_device(self) -> u32 {
        read_field!(self.0, bound_dev_if)
    }
}

/// What connect and getpeername programs get.
#[derive(Clone, Copy)]
pub struct SockAddr(pub *mut bpf_sock_addr);

impl SockAddr {
    #[inline(always)]
    pub fn as_ptr(self) -> *mut c_void {
        self.0.cast()
    }

    #[inline(always)]
    pub fn protocol(self) -> u32 {
        read_field!(self.0, protocol)
    }

    #[inline(always)]
    pub fn socket(self) -> Option<Socket> {
        Socket::new(read_field!(self.0, __bindgen_anon_1.sk))
    }

    /// Only in programs for IPv4.
    #[inline(always)]
    pub fn address_v4(self) -> Address {
        Address::from_v4_word(read_field!(self.0, user_ip4))
    }

    /// Only in programs for IPv6.
    #[inline(always)]
    pub fn address_v6(self) -> Address {
        Address::from_words([
            read_field!(self.0, user_ip6[0]),
            read_field!(self.0, user_ip6[1]),
            read_field!(self.0, user_ip6[2]),
            read_field!(self.0, user_ip6[3]),
        ])
    }

    /// The field is wider than a port.
    #[inline(always)]
    pub fn port(self) -> PortBe {
        PortBe(read_field!(self.0, user_port) as u16)
    }

    /// Only in programs for IPv4; `address` is an IPv4 address.
    #[inline(always)]
    pub fn set_v4(self, address: &Address, port: PortBe) {
        write_field!(address.words[3] => self.0, user_ip4);
        write_field!(u32::from(port.0) => self.0, user_port);
    }

    /// Only in programs for IPv6.
    #[inline(always)]
    pub fn set_v6(self, address: &Address, port: PortBe) {
        write_field!(address.words[0] => self.0, user_ip6[0]);
        write_field!(address.words[1] => self.0, user_ip6[1]);
        write_field!(address.words[2] => self.0, user_ip6[2]);
        write_field!(address.words[3] => self.0, user_ip6[3]);
        write_field!(u32::from(port.0) => self.0, user_port);
    }

    #[inline(always)]
    pub fn netns(self) -> u64 {
        // SAFETY: the helper takes this context.
        unsafe { bpf_get_netns_cookie(self.as_ptr()) }
    }

    #[inline(always)]
    pub fn socket_cookie(self) -> u64 {
        // SAFETY: the helper takes this context.
        unsafe { bpf_get_socket_cookie(self.as_ptr()) }
    }

    /// Binds the socket to an interface; whether that worked.
    #[inline(always)]
    pub fn bind_device(self, device: u32) -> bool {
        let mut device = device;
        let value = (&raw mut device).cast();
        // SAFETY: `value` points to the 4 bytes that the length says.
        unsafe { bpf_setsockopt(self.as_ptr(), SOL_SOCKET, SO_BINDTOIFINDEX, value, 4) == 0 }
    }
}

/// Lets the system call fail with `errno` instead of EPERM, when the program returns 0. Kernel 6.1 for sock_addr.
#[inline(always)]
pub fn fail_with(errno: i32) {
    // SAFETY: takes a number.
    let _ = unsafe { bpf_set_retval(-errno) };
}

/// What sock_ops programs get.
#[derive(Clone, Copy)]
pub struct SockOps(pub *mut bpf_sock_ops);

/// `AF_INET6`.
const AF_INET6: u32 = 10;

/// The two ends as the socket at hand has them; ports in host byte order.
pub struct Ends {
    pub local: Address,
    pub remote: Address,
    pub local_port: u16,
    pub remote_port: u16,
}

impl SockOps {
    #[inline(always)]
    pub fn operation(self) -> u32 {
        read_field!(self.0, op)
    }

    #[inline(always)]
    pub fn socket(self) -> Option<Socket> {
        Socket::new(read_field!(self.0, __bindgen_anon_2.sk))
    }

    #[inline(always)]
    pub fn callback_flags(self) -> u32 {
        read_field!(self.0, bpf_sock_ops_cb_flags)
    }

    #[inline(always)]
    pub fn set_callback_flags(self, flags: u32) -> bool {
        // SAFETY: the helper takes this context.
        unsafe { bpf_sock_ops_cb_flags_set(self.0, flags as i32) == 0 }
    }

    /// For `BPF_SOCK_OPS_STATE_CB`: the state left and the state entered.
    #[inline(always)]
    pub fn states(self) -> (u32, u32) {
        (
            read_field!(self.0, __bindgen_anon_1.args[0]),
            read_field!(self.0, __bindgen_anon_1.args[1]),
        )
    }

    /// A socket of family `AF_INET6` that talks IPv4 has mapped addresses; what counts is the wire.
    #[inline(always)]
    pub fn ends(self) -> Ends {
        let v6_remote = self.remote_v6();
        let is_v6 = read_field!(self.0, family) == AF_INET6 && v6_remote.v4_word().is_none();
        let (local, remote) = if is_v6 {
            (self.local_v6(), v6_remote)
        } else {
            let local = read_field!(self.0, local_ip4);
            let remote = read_field!(self.0, remote_ip4);
            (Address::from_v4_word(local), Address::from_v4_word(remote))
        };
        Ends {
            local,
            remote,
            // The context has the local port in host order, the remote one in network order in the upper half.
            local_port: read_field!(self.0, local_port) as u16,
            remote_port: u32::from_be(read_field!(self.0, remote_port)) as u16,
        }
    }

    #[inline(always)]
    fn local_v6(self) -> Address {
        Address::from_words([
            read_field!(self.0, local_ip6[0]),
            read_field!(self.0, local_ip6[1]),
            read_field!(self.0, local_ip6[2]),
            read_field!(self.0, local_ip6[3]),
        ])
    }

    #[inline(always)]
    fn remote_v6(self) -> Address {
        Address::from_words([
            read_field!(self.0, remote_ip6[0]),
            read_field!(self.0, remote_ip6[1]),
            read_field!(self.0, remote_ip6[2]),
            read_field!(self.0, remote_ip6[3]),
        ])
    }

    /// Kernel 5.15 in sock_ops programs.
    #[inline(always)]
    pub fn netns(self) -> u64 {
        // SAFETY: the helper takes this context.
        unsafe { bpf_get_netns_cookie(self.0.cast()) }
    }

    /// The key of this connection, asked from the connecting side.
    #[inline(always)]
    pub fn key_from_client(self, ends: &Ends) -> FlowKey {
        FlowKey {
            netns: self.netns(),
            source: ends.local,
            destination: ends.remote,
            source_port: ends.local_port,
            destination_port: ends.remote_port,
            zero: 0,
        }
    }

    /// The key of this connection, asked from the accepting side.
    #[inline(always)]
    pub fn key_from_server(self, ends: &Ends) -> FlowKey {
        FlowKey {
            netns: self.netns(),
            source: ends.remote,
            destination: ends.local,
            source_port: ends.remote_port,
            destination_port: ends.local_port,
            zero: 0,
        }
    }
}

/// What getsockopt programs get.
#[derive(Clone, Copy)]
pub struct SockOption(pub *mut bpf_sockopt);

impl SockOption {
    #[inline(always)]
    pub fn level(self) -> i32 {
        read_field!(self.0, level)
    }

    #[inline(always)]
    pub fn name(self) -> i32 {
        read_field!(self.0, optname)
    }

    #[inline(always)]
    pub fn socket(self) -> Option<Socket> {
        Socket::new(read_field!(self.0, __bindgen_anon_1.sk))
    }

    /// Where the caller wants the value, if it has room for `words`.
    #[inline(always)]
    pub fn room_for(self, words: usize) -> Option<*mut u32> {
        let start = read_field!(self.0, __bindgen_anon_2.optval).cast::<u32>();
        let end = read_field!(self.0, __bindgen_anon_3.optval_end).cast::<u32>();
        if start.wrapping_add(words) > end {
            None
        } else {
            Some(start)
        }
    }

    /// Makes the call succeed with a value of `length` bytes.
    #[inline(always)]
    pub fn answer(self, length: i32) {
        write_field!(length => self.0, optlen);
        write_field!(0 => self.0, retval);
    }
}
