//! What outlives an agent in the kernel, and what the next one makes of it.
//!
//! As in `client_behaviour.rs` no agent runs: a `Datapath` that is dropped is an agent that was killed.

#![expect(
    clippy::tests_outside_test_module,
    clippy::unwrap_used,
    reason = "an integration test is a test module, its support included"
)]

use std::{
    collections::BTreeMap,
    fs,
    net::SocketAddr,
    os::fd::AsFd as _,
    path::{Path, PathBuf},
};

use bpf_tests::{
    cgroup::Cgroup,
    foreign::{ForeignProgram, Sharing, Verdict::Pass},
    namespace::Namespace,
    program::Program,
    scratch::Scratch,
    wait::{SOON, wait_for_value},
};
use sidestep::datapath::{
    Attachment, AwayPolicy, Datapath, DatapathError, DatapathSettings, Reconciled, ServiceId,
    Undesired, Verdict, VipRanges, VipTarget, VipTargets,
    bpf::{self, CgroupHook},
    listener::{self, CaptureListeners},
    netns::Netns,
    pins::{PinDirectory, PinError},
};
use sidestep::sockets::ListeningSockets;
use sidestep_abi::{VipKey, VipValue};

const PORT: u16 = 15_001;
const MAX_VIPS: u32 = 64;

struct Bench {
    workloads: Cgroup,
    agent: Cgroup,
    namespace: Namespace,
    pins: PathBuf,
    home: Cgroup,
    scratch: Scratch,
}

/// What an agent holds.
struct Agent {
    datapath: Datapath,
    listeners: CaptureListeners,
}

impl Bench {
    fn new(purpose: &str) -> Self {
        let scratch = Scratch::new(purpose).unwrap();
        let agent = scratch.cgroup().child("agent").unwrap();
        let workloads = scratch.cgroup().child("workloads").unwrap();
        let namespace = Namespace::create(&scratch, "a").unwrap();
        let home = home();
        agent.enter().unwrap();
        Self {
            workloads,
            agent,
            namespace,
            pins: scratch.bpffs("bpf").unwrap().join("sidestep"),
            home,
            scratch,
        }
    }

    fn load(&self, max_vips: u32) -> Result<Datapath, DatapathError> {
        self.load_for(&[&self.workloads], max_vips)
    }

    fn load_for(&self, cgroups: &[&Cgroup], max_vips: u32) -> Result<Datapath, DatapathError> {
        let settings = DatapathSettings {
            cgroups: cgroups.iter().map(|c| c.directory().to_owned()).collect(),
            agent_cgroup: self.agent.directory().to_owned(),
            vip_ranges: VipRanges {
                ipv4: "240.0.0.0/4".parse().unwrap(),
                ipv6: "fd00:1::/64".parse().unwrap(),
            },
            max_vips,
            max_flows: 1024,
            so_original_dst: false,
            dns_port: None,
            debug: false,
        };
        Datapath::load(settings, Some(PinDirectory::open(&self.pins)?))
    }

    fn start(&self) -> Agent {
        self.start_with(self.load(MAX_VIPS).unwrap())
    }

    fn start_with(&self, datapath: Datapath) -> Agent {
        let netns = Netns::open(self.namespace.path()).unwrap();
        let listeners = listener::listen(&netns, PORT, &ListeningSockets::default()).unwrap();
        datapath
            .reconcile(&catalog(&[1, 2]), Undesired::Remove)
            .unwrap();
        datapath.attach_hand_over().unwrap();
        datapath
            .enrol_netns(netns.cookie().unwrap(), &listeners)
            .unwrap();
        datapath.attach_capture().unwrap();
        Agent {
            datapath,
            listeners,
        }
    }

    /// What becomes of a connect to the first virtual address: `ok`, or the name of an errno.
    fn connect(&self) -> String {
        let script = "import errno, socket
s = socket.socket()
s.settimeout(10)
try:
    s.connect(('240.0.0.1', 80))
    print('ok')
except OSError as error:
    print(errno.errorcode[error.errno])
";
        let client = Program::new("python3").args(["-c", script]);
        let client = client.in_cgroup(&self.workloads);
        let said = client.in_namespace(&self.namespace).run(SOON).unwrap();
        said.trim().to_owned()
    }

    fn assert_captures(&self, agent: &Agent) {
        assert_eq!(self.connect(), "ok");
        let accepted = wait_for_value("a connection", SOON, || {
            Ok(agent.listeners.v4.accept().ok().map(|(stream, _)| stream))
        });
        let captured = agent.datapath.captured(accepted.unwrap().as_fd()).unwrap();
        let destination: SocketAddr = "240.0.0.1:80".parse().unwrap();
        assert_eq!(captured.unwrap().destination, destination);
    }

    /// Names of the programs at `connect()` of the workloads.
    fn running(&self) -> Vec<String> {
        running_in(&self.workloads)
    }

    fn maps_directories(&self) -> Vec<PathBuf> {
        let entries = fs::read_dir(&self.pins).unwrap().map(|e| e.unwrap().path());
        let is_maps = |path: &PathBuf| path.file_name().unwrap() != "links";
        entries.filter(is_maps).collect()
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        // Its cgroup goes with the scratch run; this process must not be in it.
        let _left = self.home.enter();
    }
}

fn home() -> Cgroup {
    let own = fs::read_to_string("/proc/self/cgroup").unwrap();
    let path = own.lines().find_map(|line| line.strip_prefix("0::"));
    Cgroup::create(path.unwrap()).unwrap()
}

fn running_in(cgroup: &Cgroup) -> Vec<String> {
    let cgroup = fs::File::open(cgroup.directory()).unwrap();
    let attached = bpf::prog_query(cgroup.as_fd(), CgroupHook::Connect4, false).unwrap();
    let ids = attached.programs.into_iter();
    ids.map(|id| bpf::program_name(id).unwrap()).collect()
}

fn catalog(hosts: &[u8]) -> VipTargets {
    let target = VipTarget {
        service: ServiceId(1),
        reachable: true,
        away: AwayPolicy::Closed,
    };
    let destination = |host: &u8| SocketAddr::from(([240, 0, 0, *host], 80));
    let ports = hosts.iter().map(|host| (destination(host), target));
    VipTargets {
        ports: ports.collect(),
        ..VipTargets::default()
    }
}

fn by_link(attachments: &[Attachment]) -> BTreeMap<u32, u32> {
    let pair = |attachment: &Attachment| (attachment.link_id, attachment.program_id);
    attachments.iter().map(pair).collect()
}

#[test]
fn the_next_agent_takes_over_links_and_maps() {
    let bench = Bench::new("adopt");
    let first = bench.start();
    bench.assert_captures(&first);
    let before = by_link(&first.datapath.attachments());
    drop(first);

    // Nobody listens: refused, at once, and not as an address that nobody knows.
    assert_eq!(bench.connect(), "ECONNREFUSED");

    let datapath = bench.load(MAX_VIPS).unwrap();
    let found = datapath.reconcile(&catalog(&[1, 2]), Undesired::Remove);
    assert_eq!(found.unwrap(), Reconciled::default());
    let second = bench.start_with(datapath);
    bench.assert_captures(&second);
    let after = by_link(&second.datapath.attachments());
    assert!(before.keys().eq(after.keys()), "{before:?} {after:?}");
    assert!(
        before
            .values()
            .all(|id| !after.values().any(|new| new == id))
    );
    let counted = second.datapath.counters().unwrap();
    assert!(counted.contains(&(Verdict::Captured, 2)), "{counted:?}");
}

#[test]
fn what_a_catalog_in_part_lacks_stays() {
    let bench = Bench::new("part");
    let agent = bench.start();
    let other = catalog(&[3]);
    let changed = agent.datapath.reconcile(&other, Undesired::Keep).unwrap();
    assert_eq!((changed.added, changed.removed), (1, 0));
    bench.assert_captures(&agent);
    let changed = agent.datapath.reconcile(&other, Undesired::Remove).unwrap();
    assert_eq!((changed.added, changed.removed), (0, 2));
    assert_eq!(bench.connect(), "EHOSTUNREACH");
}

#[test]
fn what_somebody_else_removed_comes_back() {
    let bench = Bench::new("removed");
    let agent = bench.start();
    let folders = fs::read_dir(&bench.pins).unwrap();
    let pinned = folders
        .map(|folder| folder.unwrap().path().join("VIPS"))
        .find(|path| path.exists())
        .unwrap();
    let vips = bpf::pinned(&pinned).unwrap();
    for undesired in [Undesired::Keep, Undesired::Remove] {
        let there = bpf::map_entries::<VipKey, VipValue>(vips.as_fd()).unwrap();
        assert_eq!(there.len(), 2);
        for (key, _value) in there {
            assert!(bpf::map_delete(vips.as_fd(), &key).unwrap());
        }
        let mended = agent.datapath.reconcile(&catalog(&[1, 2]), undesired);
        assert_eq!(mended.unwrap().added, 2);
        bench.assert_captures(&agent);
    }
}

#[test]
fn another_layout_gets_maps_of_its_own() {
    let bench = Bench::new("layout");
    drop(bench.start());
    let before = bench.maps_directories();
    let second = bench.start_with(bench.load(2 * MAX_VIPS).unwrap());
    bench.assert_captures(&second);
    let after = bench.maps_directories();
    assert_eq!((before.len(), after.len()), (1, 1));
    assert_ne!(before, after);
    assert_eq!(bench.running().len(), 1);
}

#[test]
fn a_pinned_map_of_another_shape_is_replaced() {
    let bench = Bench::new("shape");
    drop(bench.start());
    let [maps] = bench.maps_directories().try_into().unwrap();
    fs::remove_file(maps.join("VIPS")).unwrap();
    fs::rename(maps.join("COUNTS"), maps.join("VIPS")).unwrap();
    let second = bench.start();
    bench.assert_captures(&second);
}

#[test]
fn a_link_whose_cgroup_was_replaced_is_made_anew() {
    let bench = Bench::new("replaced");
    drop(bench.start());
    let directory = bench.workloads.directory();
    fs::remove_dir(directory).unwrap();
    fs::create_dir(directory).unwrap();
    let second = bench.start();
    bench.assert_captures(&second);
    assert!(
        second
            .datapath
            .attachments()
            .iter()
            .all(|link| link.is_live)
    );
    let pinned = fs::read_dir(bench.pins.join("links")).unwrap().count();
    assert_eq!(pinned, second.datapath.attachments().len());
}

#[test]
fn a_pin_that_is_no_link_of_ours_is_replaced() {
    let bench = Bench::new("mixed");
    drop(bench.start());
    let links = bench.pins.join("links");
    let pins: Vec<PathBuf> = fs::read_dir(&links)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    let named = |name: &str| {
        let is_named = |pin: &&PathBuf| pin.to_string_lossy().contains(name);
        pins.iter().find(is_named).unwrap()
    };
    // One program's link under another's name, and a map under a link's.
    fs::rename(named("conn4"), links.join("aside")).unwrap();
    fs::rename(named("conn6"), named("conn4")).unwrap();
    let [maps] = bench.maps_directories().try_into().unwrap();
    fs::rename(maps.join("COUNTS"), named("conn6")).unwrap();
    let second = bench.start();
    bench.assert_captures(&second);
    assert_eq!(bench.running().len(), 1);
}

#[test]
fn what_is_not_wanted_any_more_is_detached() {
    let bench = Bench::new("fewer");
    let more = bench.scratch.cgroup().child("more").unwrap();
    let wide = bench.load_for(&[&bench.workloads, &more], MAX_VIPS);
    drop(bench.start_with(wide.unwrap()));
    assert_eq!(running_in(&more), ["sidestep_conn4"]);
    let second = bench.start();
    assert!(running_in(&more).is_empty());
    bench.assert_captures(&second);
}

#[test]
fn a_second_program_of_ours_is_detached_and_others_stay() {
    let mut bench = Bench::new("twice");
    let foreign = ForeignProgram::load("somebody_else", Pass).unwrap();
    foreign.attach(&bench.workloads, Sharing::Multi).unwrap();
    drop(bench.start());
    // An agent that does not know of the pins of the first.
    bench.pins = bench.scratch.bpffs("other").unwrap().join("sidestep");
    let second = bench.start();
    bench.assert_captures(&second);
    assert_eq!(bench.running(), ["somebody_else", "sidestep_conn4"]);
}

#[test]
fn who_holds_a_hook_alone_is_named_in_the_error() {
    let bench = Bench::new("alone");
    let foreign = ForeignProgram::load("somebody_else", Pass).unwrap();
    foreign
        .attach(bench.scratch.cgroup(), Sharing::Exclusive)
        .unwrap();
    let datapath = bench.load(MAX_VIPS).unwrap();
    datapath.attach_hand_over().unwrap();
    let error = datapath.attach_capture().unwrap_err();
    assert!(
        matches!(
            &error,
            DatapathError::Attach {
                program: "sidestep_conn4",
                ..
            }
        ),
        "{error}"
    );
    assert!(error.to_string().contains("exclusively"), "{error}");
}

#[test]
fn one_agent_at_a_time_holds_the_pins() {
    let bench = Bench::new("held");
    let first = bench.start();
    let second = bench.load(MAX_VIPS);
    assert!(
        matches!(&second, Err(DatapathError::Pins(PinError::Held { .. }))),
        "{second:?}"
    );
    assert!(matches!(
        PinDirectory::open_existing(&bench.pins),
        Err(PinError::Held { .. })
    ));
    bench.assert_captures(&first);
}

#[test]
fn a_directory_elsewhere_is_refused() {
    let bench = Bench::new("elsewhere");
    let elsewhere = bench.scratch.subdirectory("pins").unwrap();
    let error = PinDirectory::open(&elsewhere).unwrap_err();
    assert!(matches!(error, PinError::NotBpffs { .. }), "{error}");
}

#[test]
fn detaching_leaves_nothing() {
    let bench = Bench::new("detach");
    drop(bench.start());
    let pins = PinDirectory::open_existing(&bench.pins).unwrap().unwrap();
    let detached = pins.remove_all().unwrap();
    assert_eq!(detached.len(), 6, "{detached:?}");
    assert!(bench.running().is_empty());
    assert!(!Path::new(&bench.pins).exists());
    assert!(PinDirectory::open_existing(&bench.pins).unwrap().is_none());
    // As on a host that never had an agent.
    assert_eq!(bench.connect(), "ENETUNREACH");
}
