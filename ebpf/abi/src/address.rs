//! Addresses and ports as the maps hold them: one form for both families.

/// An IP address in 16 bytes; IPv4 as IPv4-mapped IPv6, so that one destination has one form.
///
/// Four words in network byte order, since that is how programs see `user_ip6`.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Address {
    /// The words in the order and byte order of the wire.
    pub words: [u32; 4],
}

/// The third word of an IPv4-mapped address.
const MAPPED_PREFIX: u32 = 0x0000_ffff_u32.to_be();

impl Address {
    /// 127.0.0.1.
    pub const LOOPBACK_V4: Self = Self::from_v4_word(0x7f00_0001_u32.to_be());

    /// `::1`, the listener's address for native IPv6.
    pub const LOOPBACK_V6: Self = Self {
        words: [0, 0, 0, 1_u32.to_be()],
    };

    /// From an IPv4 address as the kernel holds it: a word in network byte order.
    #[inline(always)]
    pub const fn from_v4_word(word: u32) -> Self {
        Self {
            words: [0, 0, MAPPED_PREFIX, word],
        }
    }

    /// From the four words of an IPv6 address; an IPv4-mapped one needs no conversion.
    #[inline(always)]
    pub const fn from_words(words: [u32; 4]) -> Self {
        Self { words }
    }

    /// The IPv4 address in network byte order, if it is one.
    #[inline(always)]
    pub const fn v4_word(&self) -> Option<u32> {
        let [first, second, third, fourth] = self.words;
        if first == 0 && second == 0 && third == MAPPED_PREFIX {
            Some(fourth)
        } else {
            None
        }
    }

    /// Whether a connect to it stays on this host: 127/8, `::1`, and the unspecified addresses, which
    /// Linux takes for the loopback address.
    #[inline(always)]
    pub const fn is_loopback(&self) -> bool {
        if let Some(word) = self.v4_word() {
            return word == 0 || u32::from_be(word) >> 24 == 127;
        }
        let [first, second, third, fourth] = self.words;
        first == 0 && second == 0 && third == 0 && (fourth == 0 || fourth == 1_u32.to_be())
    }

    /// From an address of the standard library.
    pub const fn from_ip(ip: core::net::IpAddr) -> Self {
        match ip {
            core::net::IpAddr::V4(v4) => {
                Self::from_v4_word(u32::from_be_bytes(v4.octets()).to_be())
            }
            core::net::IpAddr::V6(v6) => {
                let bits = v6.to_bits();
                Self {
                    words: [
                        word_of(bits, 96).to_be(),
                        word_of(bits, 64).to_be(),
                        word_of(bits, 32).to_be(),
                        word_of(bits, 0).to_be(),
                    ],
                }
            }
        }
    }

    /// As an address of the standard library; IPv4-mapped becomes IPv4.
    pub const fn to_ip(&self) -> core::net::IpAddr {
        if let Some(word) = self.v4_word() {
            return core::net::IpAddr::V4(core::net::Ipv4Addr::from_bits(u32::from_be(word)));
        }
        core::net::IpAddr::V6(self.to_ipv6())
    }

    /// As an IPv6 address; IPv4 stays mapped.
    #[inline(always)]
    pub const fn to_ipv6(&self) -> core::net::Ipv6Addr {
        let [first, second, third, fourth] = self.words;
        let bits = ((u32::from_be(first) as u128) << 96)
            | ((u32::from_be(second) as u128) << 64)
            | ((u32::from_be(third) as u128) << 32)
            | (u32::from_be(fourth) as u128);
        core::net::Ipv6Addr::from_bits(bits)
    }
}

#[expect(
    clippy::cast_possible_truncation,
    reason = "takes exactly 32 of the bits"
)]
const fn word_of(bits: u128, shift: u32) -> u32 {
    (bits >> shift) as u32
}

/// A port in network byte order, as socket addresses carry it.
#[repr(transparent)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct PortBe(pub u16);

impl PortBe {
    /// From host byte order.
    #[inline(always)]
    pub const fn from_host(port: u16) -> Self {
        Self(port.to_be())
    }

    /// In host byte order.
    #[inline(always)]
    pub const fn to_host(self) -> u16 {
        u16::from_be(self.0)
    }
}
