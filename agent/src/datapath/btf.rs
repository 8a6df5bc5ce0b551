//! Where the running kernel keeps fields of its own structures, by its type information (BTF).
//!
//! For what no helper tells a program: which interface a datagram is to leave by, see [`Interfaces`]. The format is
//! that of Documentation/bpf/btf.rst of the kernel. aya reads it as well, and keeps it to itself.

use std::{fs, io};

use sidestep_abi::Interfaces;

/// Of the kernel itself, without its modules.
const KERNEL: &str = "/sys/kernel/btf/vmlinux";

/// The kernel does not say where a field is.
#[derive(Debug, thiserror::Error)]
pub enum BtfError {
    /// Its type information cannot be read.
    #[error(
        "read {KERNEL}: the kernel was built without CONFIG_DEBUG_INFO_BTF, or /sys is not there"
    )]
    Read(#[source] io::Error),
    /// It is in a format that we do not know, or has no such field.
    #[error("{KERNEL} does not say where `{structure}` has `{field}`")]
    Unknown {
        /// A structure of the kernel.
        structure: &'static str,
        /// One of its fields.
        field: &'static str,
    },
}

/// For [`super::DatapathSettings::dns_port`].
///
/// # Errors
/// If the kernel does not tell.
pub fn interfaces() -> Result<Interfaces, BtfError> {
    let bytes = fs::read(KERNEL).map_err(BtfError::Read)?;
    let offset = |structure, field| {
        offset_of(&bytes, structure, field).ok_or(BtfError::Unknown { structure, field })
    };
    let after = offset("ipcm_cookie", "oif")?;
    Ok(Interfaces {
        socket: offset("inet_sock", "uc_index")?,
        context: offset("bpf_sock_addr_kern", "t_ctx")?,
        message: after.wrapping_sub(offset("ipcm_cookie", "addr")?),
    })
}

/// In bytes. `None` if the type information has no such field, or is none.
fn offset_of(bytes: &[u8], structure: &str, field: &str) -> Option<u32> {
    let types = Types::parse(bytes)?;
    let mut rest = types.types;
    while !rest.is_empty() {
        let (kind, name, count) = (kind(rest)?, word(rest, 0)?, word(rest, 4)? & 0xffff);
        let size = TYPE + usize::try_from(count).ok()?.checked_mul(kind.per_item)? + kind.once;
        let (this, next) = rest.split_at_checked(size)?;
        rest = next;
        if kind.number != STRUCT || types.string(name) != Some(structure.as_bytes()) {
            continue;
        }
        let found = this.get(TYPE..)?.chunks_exact(MEMBER).find(|member| {
            word(member, 0).and_then(|name| types.string(name)) == Some(field.as_bytes())
        });
        if let Some(member) = found {
            // With the flag, a field of bits has its width in the upper byte.
            let is_flagged = word(this, 4)? >> 31 == 1;
            let bits = word(member, 8)? & if is_flagged { 0xff_ffff } else { u32::MAX };
            return Some(bits / 8);
        }
    }
    None
}

/// `struct btf_type`, before what its kind adds: name, information, size or type.
const TYPE: usize = 12;

/// `struct btf_member`: name, type, offset in bits.
const MEMBER: usize = 12;

/// `BTF_KIND_STRUCT`
const STRUCT: u32 = 4;

/// What follows a type.
struct Kind {
    number: u32,
    /// Bytes for each of the items that it says it has.
    per_item: usize,
    /// Bytes beside them.
    once: usize,
}

/// `None` for a kind of a later kernel, whose size nobody here knows.
fn kind(bytes: &[u8]) -> Option<Kind> {
    let number = (word(bytes, 4)? >> 24) & 0x1f;
    let (per_item, once) = match number {
        // Pointers, forward declarations, other names, qualifiers, functions, floats, tags of types.
        2 | 7..=12 | 16 | 18 => (0, 0),
        // Integers, variables, tags of declarations.
        1 | 14 | 17 => (0, 4),
        // Arrays.
        3 => (0, 12),
        // Structures, unions, sections, enumerations of 64 bits.
        4 | 5 | 15 | 19 => (12, 0),
        // Enumerations, prototypes of functions.
        6 | 13 => (8, 0),
        _ => return None,
    };
    Some(Kind {
        number,
        per_item,
        once,
    })
}

/// The two sections.
struct Types<'a> {
    types: &'a [u8],
    strings: &'a [u8],
}

impl<'a> Types<'a> {
    fn parse(bytes: &'a [u8]) -> Option<Self> {
        const MAGIC: u32 = 0xeb9f;
        (word(bytes, 0)? & 0xffff == MAGIC).then_some(())?;
        let sections = bytes.get(usize::try_from(word(bytes, 4)?).ok()?..)?;
        let section = |at| {
            let start = usize::try_from(word(bytes, at)?).ok()?;
            let length = usize::try_from(word(bytes, at + 4)?).ok()?;
            sections.get(start..start.checked_add(length)?)
        };
        Some(Self {
            types: section(8)?,
            strings: section(16)?,
        })
    }

    fn string(&self, offset: u32) -> Option<&'a [u8]> {
        let rest = self.strings.get(usize::try_from(offset).ok()?..)?;
        rest.split(|byte| *byte == 0).next()
    }
}

/// In the byte order of the machine, which is that of its kernel.
fn word(bytes: &[u8], at: usize) -> Option<u32> {
    let word = bytes.get(at..at.checked_add(4)?)?;
    word.try_into().ok().map(u32::from_ne_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Type information with an integer, an array, and structures `a` and `b`; both have `y`, one as bits.
    fn example() -> Vec<u8> {
        let strings = b"\0a\0b\0x\0y\0";
        let (a, b, x, y) = (1, 3, 5, 7);
        let (kind, flag) = (|number: u32, count: u32| (number << 24) | count, 1 << 31);
        let types: Vec<u32> = [
            &[0, kind(1, 0), 4, 32][..],
            &[0, kind(3, 0), 0, 1, 1, 8],
            &[a, kind(4, 2), 8, x, 1, 0, y, 1, 32],
            &[b, kind(4, 1) | flag, 16, y, 1, (4 << 24) | 64],
        ]
        .concat();
        let length = u32::try_from(types.len() * 4).unwrap();
        let header = [0x0001_eb9f, 24, 0, length, length, 9];
        let words = header.iter().chain(&types);
        let mut bytes: Vec<u8> = words
            .flat_map(|word| crate::netlink::host32(*word))
            .collect();
        bytes.extend_from_slice(strings);
        bytes
    }

    #[test]
    fn a_field_is_found_in_its_structure() {
        let bytes = example();
        for (structure, field, offset) in [
            ("a", "x", Some(0)),
            ("a", "y", Some(4)),
            ("b", "y", Some(8)),
            ("b", "x", None),
            ("c", "x", None),
        ] {
            assert_eq!(
                offset_of(&bytes, structure, field),
                offset,
                "{structure}.{field}"
            );
        }
    }

    #[test]
    fn what_is_cut_short_or_of_an_unknown_kind_says_nothing() {
        let bytes = example();
        for length in 0..bytes.len() {
            let cut = bytes.get(..length).unwrap();
            assert_eq!(offset_of(cut, "b", "y"), None, "{length}");
        }
        let mut unknown = bytes;
        // The kind of the first type.
        *unknown.get_mut(24 + 7).unwrap() = 31;
        assert_eq!(offset_of(&unknown, "a", "x"), None);
    }

    #[test]
    fn this_kernel_says_where_datagrams_leave() {
        let found = interfaces().unwrap();
        // After the part that all sockets have, which has some hundred bytes; a few words into the others.
        assert!(
            found.socket > 256 && found.socket.is_multiple_of(4),
            "{found:?}"
        );
        assert!(
            found.context > 0 && found.context.is_multiple_of(8),
            "{found:?}"
        );
        assert!(found.message > 0 && found.message < 256, "{found:?}");
    }
}
