//! bpf(2) for what aya 0.14 leaves out: cgroup links of every kind, pins, batches, queries, checks of layouts.
//!
//! Thin: each function is one command, or one command in a loop. Numbers and layouts are those of
//! `include/uapi/linux/bpf.h`; the kernel takes an attribute shorter than its own as zero beyond the end.

#![expect(unsafe_code, reason = "bpf(2) has no safe binding for these commands")]

use std::{
    ffi::CString,
    io,
    mem::MaybeUninit,
    os::{
        fd::{AsFd as _, AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd, RawFd},
        unix::ffi::OsStrExt as _,
    },
    path::Path,
    time::Duration,
};

use aya::Pod;

const MAP_LOOKUP_ELEM: libc::c_long = 1;
const MAP_UPDATE_ELEM: libc::c_long = 2;
const MAP_DELETE_ELEM: libc::c_long = 3;
const OBJ_PIN: libc::c_long = 6;
const OBJ_GET: libc::c_long = 7;
const OBJ_GET_INFO_BY_FD: libc::c_long = 15;
const PROG_QUERY: libc::c_long = 16;
const PROG_GET_FD_BY_ID: libc::c_long = 13;
const MAP_LOOKUP_BATCH: libc::c_long = 24;
const MAP_UPDATE_BATCH: libc::c_long = 26;
const MAP_DELETE_BATCH: libc::c_long = 27;
const LINK_CREATE: libc::c_long = 28;
const LINK_UPDATE: libc::c_long = 29;
const LINK_GET_FD_BY_ID: libc::c_long = 30;
const LINK_GET_NEXT_ID: libc::c_long = 31;
const LINK_DETACH: libc::c_long = 34;

/// Where in a cgroup a program runs (`enum bpf_attach_type`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum CgroupHook {
    /// Socket operations of TCP.
    SockOps = 3,
    /// `connect()` of `AF_INET` sockets.
    Connect4 = 10,
    /// `connect()` of `AF_INET6` sockets.
    Connect6 = 11,
    /// `sendmsg()` of UDP sockets to an IPv4 address that they are not connected to.
    SendMsg4 = 14,
    /// `recvmsg()` of UDP sockets of `AF_INET`.
    RecvMsg4 = 19,
    /// `recvmsg()` of UDP sockets of `AF_INET6`.
    RecvMsg6 = 20,
    /// `getsockopt()`
    GetSockOpt = 21,
    /// `getpeername()` of `AF_INET` sockets.
    GetPeerName4 = 29,
    /// `getpeername()` of `AF_INET6` sockets.
    GetPeerName6 = 30,
}

impl CgroupHook {
    /// Every hook that Sidestep uses.
    pub const ALL: [Self; 9] = [
        Self::SockOps,
        Self::Connect4,
        Self::Connect6,
        Self::SendMsg4,
        Self::RecvMsg4,
        Self::RecvMsg6,
        Self::GetSockOpt,
        Self::GetPeerName4,
        Self::GetPeerName6,
    ];
}

/// How the programs of a cgroup were attached, as [`prog_query`] tells.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Attached {
    /// Ids of the programs, in the order in which they run.
    pub programs: Vec<u32>,
    /// `BPF_F_ALLOW_OVERRIDE` (1), `BPF_F_ALLOW_MULTI` (2), or 0: exclusive.
    pub flags: u32,
}

/// What the kernel says about a link to a cgroup.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CgroupLink {
    /// The link's id.
    pub id: u32,
    /// The program's id.
    pub program_id: u32,
    /// The cgroup's id; 0 once it was removed, or the link detached.
    pub cgroup_id: u64,
    /// The hook, as [`CgroupHook`] numbers it.
    pub hook: u32,
}

/// What a map is made of: everything that must fit before a program may use one that exists.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MapShape {
    /// `enum bpf_map_type`
    pub kind: u32,
    /// Bytes of a key.
    pub key_size: u32,
    /// Bytes of a value.
    pub value_size: u32,
    /// Elements at most.
    pub max_entries: u32,
    /// `BPF_F_*` of its creation.
    pub flags: u32,
}

/// Attaches `program` to `cgroup`. The link is always one of several (`BPF_F_ALLOW_MULTI`). Kernel 5.7.
///
/// # Errors
/// `EPERM` also if a program was attached exclusively to this cgroup or one above.
pub fn link_create(
    program: BorrowedFd<'_>,
    cgroup: BorrowedFd<'_>,
    hook: CgroupHook,
) -> io::Result<OwnedFd> {
    let attr = Words4([word(program), word(cgroup), hook as u32, 0]);
    Ok(new_fd(call(LINK_CREATE, &attr)?))
}

/// Puts another program behind a link; connects see the old one or the new one. Kernel 5.7.
///
/// # Errors
/// `ENOLINK` if the link's cgroup was removed.
pub fn link_update(link: BorrowedFd<'_>, program: BorrowedFd<'_>) -> io::Result<()> {
    call(LINK_UPDATE, &Words4([word(link), word(program), 0, 0])).map(drop)
}

/// Takes the link's program off its cgroup, whoever else holds the link. Kernel 5.9.
///
/// # Errors
/// Whatever the kernel answers.
pub fn link_detach(link: BorrowedFd<'_>) -> io::Result<()> {
    call(LINK_DETACH, &Words4([word(link), 0, 0, 0])).map(drop)
}

/// The links to cgroups that there are in the kernel. Kernel 5.8.
///
/// # Errors
/// `EPERM` without `CAP_SYS_ADMIN`.
pub fn cgroup_links() -> io::Result<Vec<(OwnedFd, CgroupLink)>> {
    let mut links = Vec::new();
    let mut attr = Words4([0, 0, 0, 0]);
    loop {
        match call_mut(LINK_GET_NEXT_ID, &mut attr) {
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => return Ok(links),
            result => result?,
        };
        let Words4([_start, id, ..]) = attr;
        attr = Words4([id, 0, 0, 0]);
        // It may be gone already.
        let Ok(raw) = call(LINK_GET_FD_BY_ID, &Words4([id, 0, 0, 0])) else {
            continue;
        };
        let link = new_fd(raw);
        if let Ok(info) = link_info(link.as_fd()) {
            links.push((link, info));
        }
    }
}

/// Keeps a program, map or link alive at a path of bpffs.
///
/// # Errors
/// `EEXIST` if the path is taken, `EPERM` if it is not on bpffs.
pub fn pin(object: BorrowedFd<'_>, path: &Path) -> io::Result<()> {
    let path = c_path(path)?;
    let attr = PathAttr {
        path: path.as_ptr() as u64,
        fd: word(object),
        flags: 0,
    };
    call(OBJ_PIN, &attr).map(drop)
}

/// Opens what was pinned.
///
/// # Errors
/// `ENOENT` if nothing is there.
pub fn pinned(path: &Path) -> io::Result<OwnedFd> {
    let path = c_path(path)?;
    Ok(new_fd(call(
        OBJ_GET,
        &PathAttr {
            path: path.as_ptr() as u64,
            fd: 0,
            flags: 0,
        },
    )?))
}

/// The programs at one hook of one cgroup; `effective` includes those of the cgroups above.
///
/// # Errors
/// `EINVAL` if the kernel does not know the hook.
pub fn prog_query(
    cgroup: BorrowedFd<'_>,
    hook: CgroupHook,
    effective: bool,
) -> io::Result<Attached> {
    // The kernel attaches at most 64 to one cgroup; the effective ones are those of every level.
    let mut ids = [0_u32; 1024];
    let mut attr = QueryAttr {
        target_fd: word(cgroup),
        attach_type: hook as u32,
        query_flags: u32::from(effective),
        attach_flags: 0,
        prog_ids: ids.as_mut_ptr() as u64,
        prog_cnt: 1024,
        pad: 0,
    };
    call_mut(PROG_QUERY, &mut attr)?;
    let programs = ids.iter().take(attr.prog_cnt as usize).copied().collect();
    Ok(Attached {
        programs,
        flags: attr.attach_flags,
    })
}

/// The name of a loaded program, cut to 15 characters by the kernel.
///
/// # Errors
/// `ENOENT` if it is gone.
pub fn program_name(id: u32) -> io::Result<String> {
    let program = new_fd(call(PROG_GET_FD_BY_ID, &Words4([id, 0, 0, 0]))?);
    let mut info = [0_u8; 80];
    info_of(program.as_fd(), &mut info)?;
    // struct bpf_prog_info: name is 16 bytes at offset 64.
    let name = info
        .iter()
        .skip(64)
        .take(16)
        .copied()
        .take_while(|byte| *byte != 0);
    Ok(String::from_utf8_lossy(&name.collect::<Vec<u8>>()).into_owned())
}

/// What a link to a cgroup links.
///
/// # Errors
/// If the descriptor is no link, or one to something else.
pub fn link_info(link: BorrowedFd<'_>) -> io::Result<CgroupLink> {
    #[repr(C)]
    #[derive(Clone, Copy, Default)]
    struct Info {
        kind: u32,
        id: u32,
        program_id: u32,
        pad: u32,
        cgroup_id: u64,
        attach_type: u32,
        pad2: u32,
    }
    /// `BPF_LINK_TYPE_CGROUP`
    const CGROUP: u32 = 3;
    let mut info = Info::default();
    info_of(link, &mut info)?;
    if info.kind != CGROUP {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "no link to a cgroup",
        ));
    }
    Ok(CgroupLink {
        id: info.id,
        program_id: info.program_id,
        cgroup_id: info.cgroup_id,
        hook: info.attach_type,
    })
}

/// What a map is made of.
///
/// # Errors
/// If the descriptor is no map.
pub fn map_shape(map: BorrowedFd<'_>) -> io::Result<MapShape> {
    // struct bpf_map_info: type, id, key_size, value_size, max_entries, map_flags.
    let mut info = [0_u32; 6];
    info_of(map, &mut info)?;
    let [kind, _id, key_size, value_size, max_entries, flags] = info;
    Ok(MapShape {
        kind,
        key_size,
        value_size,
        max_entries,
        flags,
    })
}

/// Refuses a map that a program with other expectations would read garbage from. aya reuses pins unseen.
///
/// # Errors
/// [`io::ErrorKind::InvalidData`], naming both shapes.
pub fn check_map_shape(map: BorrowedFd<'_>, expected: MapShape) -> io::Result<()> {
    let found = map_shape(map)?;
    if found == expected {
        return Ok(());
    }
    let message = format!("the map is {found:?}, expected {expected:?}");
    Err(io::Error::new(io::ErrorKind::InvalidData, message))
}

/// One element, or `None`.
///
/// # Errors
/// Whatever the kernel answers but `ENOENT`.
pub fn map_lookup<K: Pod, V: Pod>(map: BorrowedFd<'_>, key: &K) -> io::Result<Option<V>> {
    let mut value = MaybeUninit::<V>::zeroed();
    let attr = element(map, key, value.as_mut_ptr() as u64, 0);
    if !found(call(MAP_LOOKUP_ELEM, &attr))? {
        return Ok(None);
    }
    // SAFETY: zeroed, then written by the kernel; a Pod has no invalid bit patterns.
    Ok(Some(unsafe { value.assume_init() }))
}

/// One element of a per-CPU map of 8-byte values, for every CPU there may be.
///
/// # Errors
/// Whatever the kernel answers, and if the CPUs cannot be counted.
pub fn map_lookup_per_cpu<K: Pod>(map: BorrowedFd<'_>, key: &K) -> io::Result<Vec<u64>> {
    let cpus = aya::util::nr_cpus().map_err(|(_file, error)| error)?;
    let mut values = vec![0_u64; cpus];
    call(
        MAP_LOOKUP_ELEM,
        &element(map, key, values.as_mut_ptr() as u64, 0),
    )?;
    Ok(values)
}

/// Adds or replaces one element.
///
/// # Errors
/// `E2BIG` if the map is full.
pub fn map_update<K: Pod, V: Pod>(map: BorrowedFd<'_>, key: &K, value: &V) -> io::Result<()> {
    call(
        MAP_UPDATE_ELEM,
        &element(map, key, std::ptr::from_ref(value) as u64, 0),
    )
    .map(drop)
}

/// Removes one element; says whether it was there.
///
/// # Errors
/// Whatever the kernel answers but `ENOENT`.
pub fn map_delete<K: Pod>(map: BorrowedFd<'_>, key: &K) -> io::Result<bool> {
    found(call(MAP_DELETE_ELEM, &element(map, key, 0, 0)))
}

/// Adds or replaces many elements. Kernel 5.6.
///
/// # Errors
/// As [`map_update`]; some may have been written.
pub fn map_update_batch<K: Pod, V: Pod>(map: BorrowedFd<'_>, all: &[(K, V)]) -> io::Result<()> {
    let keys: Vec<K> = all.iter().map(|(key, _)| *key).collect();
    let values: Vec<V> = all.iter().map(|(_, value)| *value).collect();
    batch(MAP_UPDATE_BATCH, map, &keys, values.as_ptr() as u64)
}

/// Removes many elements, all of which are there. Kernel 5.6.
///
/// # Errors
/// `ENOENT` at the first that is not there; those before it were removed.
pub fn map_delete_batch<K: Pod>(map: BorrowedFd<'_>, keys: &[K]) -> io::Result<()> {
    batch(MAP_DELETE_BATCH, map, keys, 0)
}

/// Every element of a hash. One that is added or removed meanwhile may be missed. Kernel 5.6.
///
/// # Errors
/// Whatever the kernel answers.
pub fn map_entries<K: Pod, V: Pod>(map: BorrowedFd<'_>) -> io::Result<Vec<(K, V)>> {
    let mut entries = Vec::new();
    let mut room = 4096;
    let mut position: Option<u32> = None;
    loop {
        let (found, next) = next_entries(map, position, room)?;
        entries.extend(found);
        match next {
            Next::At(bucket) => position = Some(bucket),
            // The next bucket alone has more than there is room for.
            Next::NeedsRoom => room *= 2,
            Next::End => return Ok(entries),
        }
    }
}

/// `CLOCK_MONOTONIC`, which `bpf_ktime_get_ns()` reads too.
pub fn monotonic_now() -> Duration {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    let seconds = u64::try_from(now.tv_sec).unwrap_or_default();
    Duration::new(seconds, u32::try_from(now.tv_nsec).unwrap_or_default())
}

/// Where a walk goes on.
enum Next {
    At(u32),
    NeedsRoom,
    End,
}

/// At most `room` elements of a hash, from `position` on, which is one of its buckets.
fn next_entries<K: Pod, V: Pod>(
    map: BorrowedFd<'_>,
    position: Option<u32>,
    room: u32,
) -> io::Result<(impl Iterator<Item = (K, V)>, Next)> {
    let mut keys: Vec<K> = Vec::with_capacity(room as usize);
    let mut values: Vec<V> = Vec::with_capacity(room as usize);
    let mut next = 0_u32;
    let mut attr = BatchAttr {
        in_batch: position
            .as_ref()
            .map_or(0, |at| std::ptr::from_ref(at) as u64),
        out_batch: std::ptr::from_mut(&mut next) as u64,
        keys: keys.as_mut_ptr() as u64,
        values: values.as_mut_ptr() as u64,
        count: room,
        map_fd: word(map),
        element_flags: 0,
        flags: 0,
    };
    let after = match call_mut(MAP_LOOKUP_BATCH, &mut attr) {
        Ok(_) => Next::At(next),
        Err(error) => match error.raw_os_error() {
            Some(libc::ENOENT) => Next::End,
            Some(libc::ENOSPC) => Next::NeedsRoom,
            _ => return Err(error),
        },
    };
    let count = attr.count.min(room) as usize;
    // SAFETY: the kernel wrote `count` keys, which is not more than there is room for; a Pod has no invalid bit
    // patterns.
    unsafe { keys.set_len(count) };
    // SAFETY: as for the keys.
    unsafe { values.set_len(count) };
    Ok((keys.into_iter().zip(values), after))
}

fn batch<K: Pod>(
    command: libc::c_long,
    map: BorrowedFd<'_>,
    keys: &[K],
    values: u64,
) -> io::Result<()> {
    if keys.is_empty() {
        return Ok(());
    }
    let count = u32::try_from(keys.len())
        .map_err(|error| io::Error::new(io::ErrorKind::InvalidInput, error))?;
    let mut attr = BatchAttr {
        in_batch: 0,
        out_batch: 0,
        keys: keys.as_ptr() as u64,
        values,
        count,
        map_fd: word(map),
        element_flags: 0,
        flags: 0,
    };
    call_mut(command, &mut attr).map(drop)
}

fn info_of<T: Copy>(object: BorrowedFd<'_>, info: &mut T) -> io::Result<()> {
    #[expect(
        clippy::cast_possible_truncation,
        reason = "info structures are below 4 GiB"
    )]
    let info_len = size_of::<T>() as u32;
    let attr = InfoAttr {
        fd: word(object),
        info_len,
        info: std::ptr::from_mut(info) as u64,
    };
    call(OBJ_GET_INFO_BY_FD, &attr).map(drop)
}

#[repr(C)]
struct Words4([u32; 4]);

#[repr(C)]
struct PathAttr {
    path: u64,
    fd: u32,
    flags: u32,
}

#[repr(C)]
struct ElementAttr {
    map_fd: u32,
    pad: u32,
    key: u64,
    value: u64,
    flags: u64,
}

#[repr(C)]
struct BatchAttr {
    in_batch: u64,
    out_batch: u64,
    keys: u64,
    values: u64,
    count: u32,
    map_fd: u32,
    element_flags: u64,
    flags: u64,
}

#[repr(C)]
struct InfoAttr {
    fd: u32,
    info_len: u32,
    info: u64,
}

#[repr(C)]
struct QueryAttr {
    target_fd: u32,
    attach_type: u32,
    query_flags: u32,
    attach_flags: u32,
    prog_ids: u64,
    prog_cnt: u32,
    pad: u32,
}

fn element<K: Pod>(map: BorrowedFd<'_>, key: &K, value: u64, flags: u64) -> ElementAttr {
    ElementAttr {
        map_fd: word(map),
        pad: 0,
        key: std::ptr::from_ref(key) as u64,
        value,
        flags,
    }
}

fn word(fd: BorrowedFd<'_>) -> u32 {
    // A borrowed descriptor is never negative.
    fd.as_raw_fd().cast_unsigned()
}

fn c_path(path: &Path) -> io::Result<CString> {
    CString::new(path.as_os_str().as_bytes())
        .map_err(|error| io::Error::new(io::ErrorKind::InvalidInput, error))
}

fn found(result: io::Result<RawFd>) -> io::Result<bool> {
    match result {
        Ok(_) => Ok(true),
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(false),
        Err(error) => Err(error),
    }
}

fn new_fd(raw: RawFd) -> OwnedFd {
    // SAFETY: only results of commands come here whose result is a descriptor that the kernel has just made.
    unsafe { OwnedFd::from_raw_fd(raw) }
}

fn call<A>(command: libc::c_long, attr: &A) -> io::Result<RawFd> {
    // SAFETY: `attr` is an attribute of `command`, and what it points at outlives the call; the commands
    // that go through here write only behind its pointers, which their callers made from `&mut` or raw parts.
    let result = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            command,
            std::ptr::from_ref(attr),
            size_of::<A>(),
        )
    };
    returned(result)
}

fn call_mut<A>(command: libc::c_long, attr: &mut A) -> io::Result<RawFd> {
    // SAFETY: as in `call`; the kernel writes counts back into `attr`, which is ours alone meanwhile.
    let result = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            command,
            std::ptr::from_mut(attr),
            size_of::<A>(),
        )
    };
    returned(result)
}

fn returned(result: libc::c_long) -> io::Result<RawFd> {
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    RawFd::try_from(result).map_err(io::Error::other)
}
