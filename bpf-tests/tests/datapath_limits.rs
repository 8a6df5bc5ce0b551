//! Capture at its limits: maps that are full, listeners that are, callers that may do little.
//!
//! As in `client_behaviour.rs` no agent runs: the datapath is the test's own, and this process the agent.

#![expect(
    clippy::tests_outside_test_module,
    clippy::unwrap_used,
    reason = "an integration test is a test module, its support included"
)]

use std::{
    collections::BTreeMap,
    fs,
    net::{Ipv4Addr, SocketAddr},
    os::fd::AsFd as _,
    path::PathBuf,
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::Duration,
};

use anyhow::ensure;
use bpf_tests::{
    cgroup::Cgroup,
    namespace::Namespace,
    program::Program,
    scratch::Scratch,
    wait::{SOON, Stopwatch, wait_for_value},
};
use sidestep::datapath::{
    AwayPolicy, Captured, Datapath, DatapathSettings, FlowEvent, ServiceId, Undesired, Verdict,
    VipRanges, VipTarget, VipTargets,
    listener::{self, CaptureListeners},
    netns::Netns,
};
use sidestep::sockets::ListeningSockets;

const PORT: u16 = 15_001;

/// Smaller than anything else here is, so that it is reached.
const FEW: u32 = 64;

struct Bench {
    datapath: Datapath,
    listeners: CaptureListeners,
    workload: Cgroup,
    namespace: Namespace,
    home: Cgroup,
    scratch: Scratch,
}

impl Bench {
    /// `attach` names the cgroups to attach to, given that of the workloads; `prepare` may change the namespace.
    fn new(
        purpose: &str,
        attach: impl FnOnce(PathBuf) -> Vec<PathBuf>,
        prepare: impl FnOnce(&Namespace),
    ) -> Self {
        Self::with_flows(purpose, 65_536, attach, prepare)
    }

    /// As [`Self::new`], with room for so many connections between their SYN and the accept.
    fn with_flows(
        purpose: &str,
        max_flows: u32,
        attach: impl FnOnce(PathBuf) -> Vec<PathBuf>,
        prepare: impl FnOnce(&Namespace),
    ) -> Self {
        let scratch = Scratch::new(purpose).unwrap();
        let agent = scratch.cgroup().child("agent").unwrap();
        let workload = scratch.cgroup().child("workload").unwrap();
        let namespace = Namespace::create(&scratch, "a").unwrap();
        prepare(&namespace);
        let home = home();
        agent.enter().unwrap();
        let settings = DatapathSettings {
            cgroups: attach(workload.directory().to_owned()),
            agent_cgroup: agent.directory().to_owned(),
            vip_ranges: VipRanges {
                ipv4: "240.0.0.0/4".parse().unwrap(),
                ipv6: "fd00:1::/64".parse().unwrap(),
            },
            max_vips: FEW,
            max_flows,
            so_original_dst: false,
            dns_port: None,
            debug: false,
        };
        let datapath = Datapath::load(settings, None).unwrap();
        let netns = Netns::open(namespace.path()).unwrap();
        let listeners = listener::listen(&netns, PORT, &ListeningSockets::default()).unwrap();
        datapath.reconcile(&catalog(0), Undesired::Remove).unwrap();
        datapath.attach_hand_over().unwrap();
        datapath
            .enrol_netns(netns.cookie().unwrap(), &listeners)
            .unwrap();
        datapath.attach_capture().unwrap();
        Self {
            datapath,
            listeners,
            workload,
            namespace,
            home,
            scratch,
        }
    }

    fn client(&self, cgroup: &Cgroup, script: &str) -> String {
        let script = format!("import errno, os, socket\n{script}");
        Program::new("python3")
            .args(["-c", &script])
            .in_cgroup(cgroup)
            .in_namespace(&self.namespace)
            .run(SOON)
            .unwrap()
    }

    fn accept(&self) -> Option<Captured> {
        let stream = wait_for_value("a connection", SOON, || {
            Ok(self.listeners.v4.accept().ok().map(|(stream, _)| stream))
        })
        .unwrap();
        self.datapath.captured(stream.as_fd()).unwrap()
    }

    fn count(&self, verdict: Verdict) -> u64 {
        let counters = self.datapath.counters().unwrap();
        let found = counters
            .into_iter()
            .find(|(counted, _)| *counted == verdict);
        found.unwrap().1
    }

    fn flows(&self, event: FlowEvent) -> u64 {
        let counters = self.datapath.flow_counters().unwrap();
        let found = counters.into_iter().find(|(counted, _)| *counted == event);
        found.unwrap().1
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
    let path = own
        .lines()
        .find_map(|line| line.strip_prefix("0::"))
        .unwrap();
    Cgroup::create(path).unwrap()
}

/// As many destinations as there may be, all in one /24 of 240/8 that `network` chooses.
fn catalog(network: u8) -> VipTargets {
    let target = VipTarget {
        service: ServiceId(1),
        reachable: true,
        away: AwayPolicy::Closed,
    };
    let destination = |host| {
        let host = u8::try_from(host).unwrap();
        let address = Ipv4Addr::new(240, 0, network, host);
        (SocketAddr::from((address, 80)), target)
    };
    VipTargets {
        ports: (0..FEW).map(destination).collect(),
        ..VipTargets::default()
    }
}

#[test]
fn a_full_catalog_can_be_replaced_by_another() {
    let bench = Bench::new("replace", |workload| vec![workload], |_| {});
    let changed = bench
        .datapath
        .reconcile(&catalog(1), Undesired::Remove)
        .unwrap();
    let few = FEW as usize;
    assert_eq!(
        (changed.added, changed.changed, changed.removed),
        (few, 0, few)
    );
}

#[test]
fn a_real_address_that_is_forgotten_passes_again_and_the_others_stay() {
    let bench = Bench::new("forget", |workload| vec![workload], |_| {});
    let [kept, gone, never]: [SocketAddr; 3] =
        ["192.0.2.1:80", "192.0.2.2:80", "192.0.2.3:80"].map(|it| it.parse().unwrap());
    let target = catalog(1).ports.into_values().next().unwrap();
    let some = VipTargets {
        ports: [(kept, target), (gone, target)].into(),
        real: [kept.ip(), gone.ip()].into(),
        ..VipTargets::default()
    };
    let update = |some: &VipTargets, forgotten: &[SocketAddr]| {
        let changed = bench.datapath.update(some, forgotten).unwrap();
        (changed.added, changed.changed, changed.removed)
    };
    let ends = || {
        bench.client(
            &bench.workload,
            "for end in (('192.0.2.1', 80), ('192.0.2.2', 80), ('192.0.2.2', 81), ('240.0.0.5', 80)):\n\
             \ts = socket.socket(); print(errno.errorcode.get(s.connect_ex(end), 'taken'), end=' ')",
        )
    };
    assert_eq!(update(&some, &[]), (2, 0, 0));
    assert_eq!(ends(), "taken taken ENETUNREACH taken ");
    assert_eq!(bench.accept().unwrap().destination, kept);
    assert_eq!(update(&VipTargets::default(), &[never, gone]), (0, 0, 1));
    // What is in no range and nobody's goes where it went before: here, nowhere.
    assert_eq!(ends(), "taken ENETUNREACH ENETUNREACH taken ");
    assert_eq!(update(&some, &[kept]), (1, 0, 1));
}

#[test]
fn a_cgroup_that_is_listed_twice_captures_as_if_listed_once() {
    let twice = |workload: PathBuf| vec![workload.clone(), workload];
    let bench = Bench::new("twice", twice, |_| {});
    bench.client(
        &bench.workload,
        "s = socket.create_connection(('240.0.0.5', 80)); print(s.getpeername())",
    );
    let captured = bench.accept().unwrap();
    assert_eq!(captured.destination, "240.0.0.5:80".parse().unwrap());
}

#[test]
fn a_socket_that_may_not_leave_its_device_is_refused() {
    let bench = Bench::new(
        "device",
        |workload| vec![workload],
        |namespace| {
            namespace
                .ip("link add dev0 type veth peer name dev1")
                .unwrap();
        },
    );
    // Without CAP_NET_RAW a socket is bound to a device once; loopback cannot be reached from there.
    let said = bench.client(
        &bench.workload,
        r"
os.setgid(65534); os.setuid(65534)
s = socket.socket()
s.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b'dev0')
print(errno.errorcode[s.connect_ex(('240.0.0.5', 80))])
print(s.getsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, 16).rstrip(b'\0').decode())",
    );
    assert_eq!(said.trim(), "ECONNREFUSED\ndev0");
    assert_eq!(bench.count(Verdict::RefusedDevice), 1);
}

/// Were one published connection to outlive its socket, whoever gets its ports would be taken for the workload.
#[test]
fn what_was_published_for_a_connection_that_is_aborted_goes_with_it() {
    let bench = Bench::new(
        "overload",
        |workload| vec![workload],
        |namespace| {
            namespace.set_ipv4("../core/somaxconn", "4").unwrap();
        },
    );
    let is_done = AtomicBool::new(false);
    thread::scope(|scope| {
        // Draining keeps the queue at its edge, where the client is established and the listener is not.
        scope.spawn(|| {
            while !is_done.load(Ordering::Relaxed) {
                let _drained = bench.listeners.v4.accept();
            }
        });
        bench.client(&bench.workload, ABORTING_CLIENTS);
        is_done.store(true, Ordering::Relaxed);
    });
    let [published, moved, removed, full] = [
        FlowEvent::Published,
        FlowEvent::Moved,
        FlowEvent::Removed,
        FlowEvent::Full,
    ]
    .map(|event| bench.flows(event));
    assert!(moved > 0 && removed > 0, "{moved} moved, {removed} removed");
    assert_eq!((published, full), (moved + removed, 0));
    assert_eq!(bench.datapath.sweep_flows(Duration::ZERO).unwrap(), 0);
}

/// More connections on their way than the map has room for: none gets another's destination, and none is lost
/// once there is room again.
#[test]
fn a_full_map_of_flows_takes_only_those_that_do_not_fit() {
    let bench = Bench::with_flows(
        "flows",
        FEW,
        |workload| vec![workload],
        |namespace| {
            // A listener whose queue is full drops SYNs: their connections stay on their way.
            namespace.set_ipv4("../core/somaxconn", "4").unwrap();
        },
    );
    let directory = bench.scratch.subdirectory("flows").unwrap();
    let [done, said] = ["done", "said"].map(|file| directory.join(file));
    let script = format!(
        r"
import errno, os, socket, struct, time
sockets, lines = [], []
for number in range({}):
    s = socket.socket()
    s.setblocking(False)
    # Gone when closed, established or not.
    s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0))
    # So that its port is known, and nobody else's.
    s.bind(('127.0.0.1', 0))
    destination = '240.0.0.%d' % (number % {FEW})
    assert s.connect_ex((destination, 80)) == errno.EINPROGRESS
    sockets.append(s)
    lines.append('%s %s' % (s.getsockname()[1], destination))
print('\n'.join(lines + ['begun']), flush=True)
while not os.path.exists('{}'):
    time.sleep(0.01)",
        4 * FEW,
        done.display()
    );
    let mut client = Program::new("python3")
        .args(["-c", &script])
        .in_cgroup(&bench.workload)
        .in_namespace(&bench.namespace)
        .log(&said)
        .spawn()
        .unwrap();
    let begun = wait_for_value("connects on their way", SOON, || {
        let said = fs::read_to_string(&said).unwrap_or_default();
        ensure!(!said.contains("Error"), "{said}");
        Ok(said.contains("begun").then_some(said))
    })
    .unwrap();
    let destinations: BTreeMap<&str, &str> = begun
        .lines()
        .filter_map(|line| line.split_once(' '))
        .collect();
    assert_eq!(bench.count(Verdict::Captured), u64::from(4 * FEW));
    let full = bench.flows(FlowEvent::Full);
    assert!(full > 0, "none was too many");

    // SYNs are sent again, so that more reach the listener: those that were published and those that were not.
    let (mut with, mut without) = (0_u64, 0_u64);
    let clock = Stopwatch::start();
    while (with == 0 || without == 0) && clock.elapsed() < SOON {
        let Ok((stream, peer)) = bench.listeners.v4.accept() else {
            continue;
        };
        let Some(captured) = bench.datapath.captured(stream.as_fd()).unwrap() else {
            without += 1;
            continue;
        };
        let destination = captured.destination.ip().to_string();
        assert_eq!(destinations[peer.port().to_string().as_str()], destination);
        with += 1;
    }
    assert!(with > 0 && without > 0, "{with} with, {without} without");
    assert!(without <= full, "{without} without, {full} did not fit");
    fs::write(&done, "").unwrap();
    client.wait(SOON).unwrap().unwrap();
    assert_eq!(bench.datapath.sweep_flows(Duration::ZERO).unwrap(), 0);

    while bench.listeners.v4.accept().is_ok() {}
    bench.client(
        &bench.workload,
        "socket.create_connection(('240.0.0.5', 80))",
    );
    let captured = bench.accept().unwrap();
    assert_eq!(captured.destination, "240.0.0.5:80".parse().unwrap());
}

/// Eight processes that connect and reset at once, again and again.
const ABORTING_CLIENTS: &str = r"
import struct, time
end = time.monotonic() + 2
children = []
for _ in range(8):
    child = os.fork()
    if child == 0:
        while time.monotonic() < end:
            sockets = []
            for host in range(20):
                s = socket.socket()
                s.setblocking(False)
                s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0))
                s.connect_ex(('240.0.0.%d' % host, 80))
                sockets.append(s)
            for s in sockets:
                s.close()
        os._exit(0)
    children.append(child)
for child in children:
    os.waitpid(child, 0)";
