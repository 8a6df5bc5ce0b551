//! The thin module over bpf(2): links, pins, batches and the check of layouts, against the kernel.

#![expect(
    clippy::tests_outside_test_module,
    clippy::panic,
    clippy::unwrap_used,
    reason = "an integration test is a test module, its support included"
)]

use std::{
    fs::File,
    io,
    os::fd::{AsFd as _, BorrowedFd},
    path::{Path, PathBuf},
};

use aya::{
    maps::{Map, MapData},
    programs::{CgroupSockAddr, Program},
};
use bpf_tests::{
    cgroup::Cgroup,
    program::Program as Command,
    scratch::Scratch,
    wait::{SOON, wait_for},
};
use sidestep::datapath::{
    bpf::{self, CgroupHook, MapShape},
    load::open_object,
};
use sidestep_abi::{Address, Interfaces, KnownAddress};

/// The object with one program loaded.
fn object() -> aya::Ebpf {
    let mut object = open_object(64, 64, &Interfaces::default()).unwrap();
    connect4(&mut object).load().unwrap();
    object
}

fn connect4(object: &mut aya::Ebpf) -> &mut CgroupSockAddr {
    let Some(Program::CgroupSockAddr(program)) = object.program_mut("sidestep_conn4") else {
        panic!("the object has no connect4 program")
    };
    program
}

fn hash(object: &aya::Ebpf) -> &MapData {
    let Some(Map::HashMap(map)) = object.map("ADDRESSES") else {
        panic!("the object has no map ADDRESSES")
    };
    map
}

fn open(cgroup: &Cgroup) -> File {
    File::open(cgroup.directory()).unwrap()
}

fn attached(cgroup: &File) -> Vec<u32> {
    bpf::prog_query(cgroup.as_fd(), CgroupHook::Connect4, false)
        .unwrap()
        .programs
}

#[test]
fn a_link_is_made_told_updated_and_ends_with_its_descriptor() {
    let scratch = Scratch::new("link").unwrap();
    let cgroup = open(scratch.cgroup());
    let (mut old, mut new) = (object(), object());
    let old_fd = connect4(&mut old).fd().unwrap().as_fd();
    let new_fd = connect4(&mut new).fd().unwrap().as_fd();
    let link = bpf::link_create(old_fd, cgroup.as_fd(), CgroupHook::Connect4).unwrap();
    let before = bpf::link_info(link.as_fd()).unwrap();
    assert_eq!(attached(&cgroup), [before.program_id]);
    assert_eq!(
        bpf::program_name(before.program_id).unwrap(),
        "sidestep_conn4"
    );

    bpf::link_update(link.as_fd(), new_fd).unwrap();
    let after = bpf::link_info(link.as_fd()).unwrap();
    assert_eq!(after.id, before.id);
    assert_ne!(after.program_id, before.program_id);
    assert_eq!(attached(&cgroup), [after.program_id]);

    drop(link);
    assert_eq!(attached(&cgroup), Vec::<u32>::new());
}

#[test]
fn a_link_of_a_removed_cgroup_says_so() {
    let scratch = Scratch::new("gone").unwrap();
    let child = scratch.cgroup().child("child").unwrap();
    let mut object = object();
    let program = connect4(&mut object).fd().unwrap().as_fd();
    let link = bpf::link_create(program, open(&child).as_fd(), CgroupHook::Connect4).unwrap();
    std::fs::remove_dir(child.directory()).unwrap();
    // The kernel lets go of it by and by.
    wait_for("the link to lose its cgroup", SOON, || {
        bpf::link_info(link.as_fd()).unwrap().cgroup_id == 0
    })
    .unwrap();
    let error = bpf::link_update(link.as_fd(), program).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::ENOLINK));
}

/// bpffs, mounted in a place of the test's own.
struct Bpffs(PathBuf);

impl Bpffs {
    fn mount(directory: PathBuf) -> Self {
        Command::new("mount")
            .args(["-t", "bpf", "bpf"])
            .arg(&directory)
            .run(SOON)
            .unwrap();
        Self(directory)
    }
}

impl Drop for Bpffs {
    fn drop(&mut self) {
        let _unmounted = Command::new("umount").arg(&self.0).run(SOON);
    }
}

#[test]
fn what_is_pinned_outlives_its_descriptor() {
    let scratch = Scratch::new("pin").unwrap();
    let bpffs = Bpffs::mount(scratch.subdirectory("bpffs").unwrap());
    let cgroup = open(scratch.cgroup());
    let mut object = object();
    let program = connect4(&mut object).fd().unwrap().as_fd();
    let link = bpf::link_create(program, cgroup.as_fd(), CgroupHook::Connect4).unwrap();
    let path = bpffs.0.join("connect4");
    bpf::pin(link.as_fd(), &path).unwrap();
    let again = bpf::pin(link.as_fd(), &path).unwrap_err();
    assert_eq!(again.kind(), io::ErrorKind::AlreadyExists);
    let id = bpf::link_info(link.as_fd()).unwrap().id;
    drop(link);
    assert_eq!(attached(&cgroup).len(), 1);
    let adopted = bpf::pinned(&path).unwrap();
    assert_eq!(bpf::link_info(adopted.as_fd()).unwrap().id, id);
    std::fs::remove_file(&path).unwrap();
    drop(adopted);
    assert_eq!(attached(&cgroup).len(), 0);
    let missing = bpf::pinned(Path::new("/nonexistent")).unwrap_err();
    assert_eq!(missing.kind(), io::ErrorKind::NotFound);
}

fn element(number: u32) -> (Address, KnownAddress) {
    let address = Address::from_v4_word(number.to_be());
    (address, KnownAddress::listed_ports(&address))
}

fn entries(map: BorrowedFd<'_>) -> Vec<(Address, KnownAddress)> {
    let mut entries = bpf::map_entries(map).unwrap();
    entries.sort_by_key(|(address, _)| *address);
    entries
}

#[test]
fn batches_write_list_and_remove() {
    let object = open_object(64, 64, &Interfaces::default()).unwrap();
    let map = hash(&object).fd().as_fd();
    let mut all: Vec<_> = (0..50).map(element).collect();
    all.sort_by_key(|(address, _)| *address);
    bpf::map_update_batch(map, &all).unwrap();
    assert_eq!(entries(map), all);
    let (first, value) = element(0);
    assert_eq!(
        bpf::map_lookup::<_, KnownAddress>(map, &first).unwrap(),
        Some(value)
    );

    let keys: Vec<Address> = all.iter().map(|(address, _)| *address).collect();
    bpf::map_delete_batch(map, &keys[..49]).unwrap();
    assert_eq!(entries(map).len(), 1);
    assert!(bpf::map_delete(map, &keys[49]).unwrap());
    assert!(!bpf::map_delete(map, &keys[49]).unwrap());
    assert_eq!(
        bpf::map_lookup::<_, KnownAddress>(map, &first).unwrap(),
        None
    );
    bpf::map_update_batch::<Address, KnownAddress>(map, &[]).unwrap();
}

#[test]
fn a_map_of_many_batches_is_listed_whole() {
    let object = open_object(20_000, 64, &Interfaces::default()).unwrap();
    let map = hash(&object).fd().as_fd();
    let mut all: Vec<_> = (0..20_000).map(element).collect();
    all.sort_by_key(|(address, _)| *address);
    bpf::map_update_batch(map, &all).unwrap();
    assert_eq!(entries(map), all);
}

#[test]
fn a_full_map_is_an_error() {
    let object = open_object(4, 4, &Interfaces::default()).unwrap();
    let map = hash(&object).fd().as_fd();
    let all: Vec<_> = (0..5).map(element).collect();
    let error = bpf::map_update_batch(map, &all).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::E2BIG));
}

#[test]
fn a_map_of_another_shape_is_refused() {
    let object = open_object(64, 64, &Interfaces::default()).unwrap();
    let map = hash(&object).fd().as_fd();
    let shape = bpf::map_shape(map).unwrap();
    assert_eq!(
        (shape.key_size, shape.value_size, shape.max_entries),
        (16, 32, 64)
    );
    bpf::check_map_shape(map, shape).unwrap();
    let others = [
        MapShape {
            kind: shape.kind + 1,
            ..shape
        },
        MapShape {
            key_size: 20,
            ..shape
        },
        MapShape {
            value_size: 16,
            ..shape
        },
        MapShape {
            max_entries: 65,
            ..shape
        },
        MapShape {
            flags: shape.flags ^ 1,
            ..shape
        },
    ];
    for other in others {
        let error = bpf::check_map_shape(map, other).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidData, "{other:?}");
    }
}
