//! What becomes of connects that no agent takes, by the policy of their service: real system calls.
//!
//! As in `client_behaviour.rs` no agent runs: the datapath is the test's own, and this process the agent.

#![expect(
    clippy::tests_outside_test_module,
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "an integration test is a test module, its support included"
)]

use std::{collections::BTreeMap, fs, net::SocketAddr, os::fd::AsFd as _, time::Duration};

use anyhow::ensure;
use bpf_tests::{
    cgroup::Cgroup,
    namespace::Namespace,
    program::Program,
    scratch::Scratch,
    wait::{SOON, wait_for_value},
};
use serde_json::{Value, json};
use sidestep::datapath::{
    AwayPolicy, Datapath, DatapathSettings, FlowEvent, ServiceId, Undesired, Verdict, VipRanges,
    VipTarget, VipTargets,
    listener::{self, CaptureListeners},
    netns::Netns,
};
use sidestep::sockets::ListeningSockets;

const PORT: u16 = 15_001;

/// Long enough that it does not end by itself while a test runs.
const PATIENT: Duration = Duration::from_secs(600);

struct Bench {
    datapath: Datapath,
    listeners: Option<CaptureListeners>,
    workload: Cgroup,
    namespace: Namespace,
    home: Cgroup,
    scratch: Scratch,
}

impl Bench {
    fn new(purpose: &str) -> Self {
        let scratch = Scratch::new(purpose).unwrap();
        let agent = scratch.cgroup().child("agent").unwrap();
        let workload = scratch.cgroup().child("workload").unwrap();
        let namespace = Namespace::create(&scratch, "a").unwrap();
        namespace
            .ip("link add dev0 type veth peer name dev1")
            .unwrap();
        // Real addresses, of which the host itself is.
        for address in ["10.97.0.1", "192.0.2.9", "2001:db8::9", "10.96.0.6"] {
            namespace
                .add_address("lo", address.parse().unwrap())
                .unwrap();
        }
        let home = home();
        agent.enter().unwrap();
        let settings = DatapathSettings {
            cgroups: vec![workload.directory().to_owned()],
            agent_cgroup: agent.directory().to_owned(),
            vip_ranges: VipRanges {
                ipv4: "10.96.0.0/16".parse().unwrap(),
                ipv6: "fd00:1::/64".parse().unwrap(),
            },
            max_vips: 64,
            max_flows: 64,
            so_original_dst: false,
            dns_port: None,
            debug: false,
        };
        let datapath = Datapath::load(settings, None).unwrap();
        datapath.reconcile(&catalog(), Undesired::Remove).unwrap();
        datapath.attach_hand_over().unwrap();
        let mut bench = Self {
            datapath,
            listeners: None,
            workload,
            namespace,
            home,
            scratch,
        };
        bench.listen();
        bench.datapath.attach_capture().unwrap();
        bench
    }

    fn listen(&mut self) {
        let netns = Netns::open(self.namespace.path()).unwrap();
        let listeners = listener::listen(&netns, PORT, &ListeningSockets::default()).unwrap();
        self.datapath
            .enrol_netns(netns.cookie().unwrap(), &listeners)
            .unwrap();
        self.listeners = Some(listeners);
    }

    /// As when an agent is killed: its sockets close.
    fn kill(&mut self) {
        self.listeners = None;
    }

    /// As when an agent hangs: it listens, and its last heartbeat is older than allowed.
    fn hang(&self) {
        self.datapath.beat(Some(Duration::from_nanos(1))).unwrap();
    }

    fn client(&self, script: &str) -> Value {
        let script = format!("{PRELUDE}\n{script}\nprint(json.dumps(said))\n");
        let said = Program::new("python3")
            .args(["-c", &script])
            .in_cgroup(&self.workload)
            .in_namespace(&self.namespace)
            .run(SOON)
            .unwrap();
        serde_json::from_str(&said).unwrap()
    }

    /// Where the next connection at the listeners was aimed at.
    fn captured(&self) -> SocketAddr {
        let listeners = self.listeners.as_ref().unwrap();
        let stream = wait_for_value("a captured connection", SOON, || {
            Ok(listeners.v4.accept().ok().map(|(stream, _peer)| stream))
        })
        .unwrap();
        let captured = self.datapath.captured(stream.as_fd()).unwrap();
        captured.unwrap().destination
    }

    fn assert_nothing_captured(&self) {
        if let Some(listeners) = &self.listeners {
            let none = listeners.v4.accept().map(|(_stream, peer)| peer);
            assert!(none.is_err(), "captured: {none:?}");
        }
    }

    fn counts<const N: usize>(&self, verdicts: [Verdict; N]) -> [u64; N] {
        let counters: BTreeMap<_, _> = self.datapath.counters().unwrap().into_iter().collect();
        verdicts.map(|verdict| counters[&verdict])
    }

    fn published(&self) -> u64 {
        let counters = self.datapath.flow_counters().unwrap();
        let of = |wanted| {
            counters
                .iter()
                .find(|(event, _)| *event == wanted)
                .unwrap()
                .1
        };
        assert_eq!(of(FlowEvent::Stale), 0);
        of(FlowEvent::Published)
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

/// Each policy at an address of a virtual range and at one that is real.
fn catalog() -> VipTargets {
    let fallback = |endpoint: &str| AwayPolicy::Fallback(endpoint.parse().unwrap());
    let all = [
        ("240.0.0.1:80", AwayPolicy::Closed),
        ("10.97.0.1:80", AwayPolicy::Closed),
        ("240.0.0.2:80", AwayPolicy::Open),
        ("10.96.0.6:7000", AwayPolicy::Open),
        ("10.97.0.1:7000", AwayPolicy::Open),
        ("240.0.0.3:80", fallback("192.0.2.9:7000")),
        ("[fd00:1::3]:80", fallback("[2001:db8::9]:7000")),
        ("240.0.0.4:80", fallback("127.0.0.1:7000")),
        ("240.0.0.5:80", fallback("[2001:db8::9]:7000")),
        ("[fd00:1::6]:80", fallback("192.0.2.9:7000")),
        ("240.0.0.7:80", fallback("10.96.0.6:7000")),
    ];
    let target = |service, away| VipTarget {
        service: ServiceId(service),
        reachable: true,
        away,
    };
    let ports = (1..).zip(all).map(|(service, (destination, away))| {
        (destination.parse().unwrap(), target(service, away))
    });
    let any_port = fallback("192.0.2.9:7000");
    VipTargets {
        ports: ports.collect(),
        any_port: BTreeMap::from([("240.0.0.8".parse().unwrap(), target(99, any_port))]),
        ..VipTargets::default()
    }
}

/// Ends up in front of every client's program. `plain` is a server at every address of the host.
const PRELUDE: &str = r"
import errno, json, os, socket, struct
said = {}
def family(address):
    return socket.AF_INET6 if ':' in address else socket.AF_INET
plain = socket.socket(socket.AF_INET6)
plain.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
plain.bind(('::', 7000))
plain.listen()
plain.settimeout(5)
def call(address, port, s=None):
    'What became of a connect: its error, or what the plain server said.'
    s = s or socket.socket(family(address))
    s.settimeout(5)
    code = s.connect_ex((address, port))
    if code:
        return errno.errorcode[code]
    peer = s.getpeername()[:2]
    assert peer == (address, port), peer
    accepted, _ = plain.accept()
    accepted.sendall(b'plain')
    accepted.close()
    return s.recv(9).decode()
ALL = [('240.0.0.1', 80), ('10.97.0.1', 80), ('240.0.0.2', 80), ('10.96.0.6', 7000), ('10.97.0.1', 7000),
       ('240.0.0.3', 80), ('fd00:1::3', 80), ('240.0.0.4', 80), ('240.0.0.5', 80), ('fd00:1::6', 80),
       ('240.0.0.7', 80), ('240.0.0.8', 1234)]
";

/// The answers to all of `ALL` while the agent is away, however that is known.
fn expected() -> Value {
    json!([
        "ECONNREFUSED",
        "ECONNREFUSED", // closed
        "ECONNREFUSED",
        "ECONNREFUSED",
        "plain", // open: never an address of a virtual range
        "plain",
        "plain",
        "plain",        // fallback
        "ECONNREFUSED", // an IPv4 socket cannot go to IPv6
        "plain",        // an IPv6 socket can go to IPv4
        "ECONNREFUSED", // a fallback in a virtual range
        "plain",        // any port
    ])
}

#[test]
fn a_killed_agent_is_answered_by_the_policy_at_once() {
    let mut bench = Bench::new("killed");
    bench.datapath.beat(Some(PATIENT)).unwrap();
    bench.kill();
    let said = bench.client("said = [call(*to) for to in ALL]");
    assert_eq!(said, expected());
    let counts = bench.counts([
        Verdict::RefusedNetns,
        Verdict::PassedOpen,
        Verdict::Fallback,
        Verdict::RefusedHung,
        Verdict::Captured,
    ]);
    assert_eq!(counts, [6, 1, 5, 0, 0]);
    assert_eq!(bench.published(), 0);
}

#[test]
fn a_hung_agent_is_answered_by_the_policy() {
    let bench = Bench::new("hung");
    bench.hang();
    let said = bench.client("said = [call(*to) for to in ALL]");
    assert_eq!(said, expected());
    let counts = bench.counts([
        Verdict::RefusedHung,
        Verdict::PassedOpen,
        Verdict::Fallback,
        Verdict::RefusedNetns,
        Verdict::Captured,
    ]);
    assert_eq!(counts, [6, 1, 5, 0, 0]);
    assert_eq!(bench.published(), 0);
    bench.assert_nothing_captured();
}

#[test]
fn a_heartbeat_brings_capture_back() {
    let bench = Bench::new("beats");
    let connect = "said = socket.socket().connect_ex(('240.0.0.1', 80))";
    for limit in [Some(PATIENT), None] {
        bench.hang();
        assert_eq!(bench.client(connect), json!(111));
        bench.datapath.beat(limit).unwrap();
        assert_eq!(bench.client(connect), json!(0));
        assert_eq!(bench.captured(), "240.0.0.1:80".parse().unwrap());
    }
}

#[test]
fn an_agent_that_stopped_leaves_no_heartbeat() {
    let bench = Bench::new("stopped");
    // As the machine has been up for longer, nothing but a heartbeat is younger.
    let limit = Some(Duration::from_secs(1));
    bench.datapath.beat(limit).unwrap();
    bench.datapath.stop_beating(limit).unwrap();
    let said = bench.client("said = socket.socket().connect_ex(('240.0.0.1', 80))");
    assert_eq!(said, json!(111));
    assert_eq!(bench.counts([Verdict::RefusedHung]), [1]);
}

#[test]
fn while_the_agent_is_there_no_policy_lets_a_connect_around_it() {
    let bench = Bench::new("there");
    bench.datapath.beat(Some(PATIENT)).unwrap();
    let mut sick = catalog();
    for target in sick.ports.values_mut() {
        target.reachable = false;
    }
    let fallback: SocketAddr = "240.0.0.3:80".parse().unwrap();
    sick.ports.get_mut(&fallback).unwrap().reachable = true;
    bench.datapath.reconcile(&sick, Undesired::Remove).unwrap();
    let said = bench.client(
        "s = socket.socket()
said = [s.connect_ex(('240.0.0.3', 80)), call('10.97.0.1', 7000), call('240.0.0.4', 80)]",
    );
    assert_eq!(said, json!([0, "ECONNREFUSED", "ECONNREFUSED"]));
    assert_eq!(bench.captured(), fallback);
    assert_eq!(bench.counts([Verdict::RefusedNoEndpoint]), [2]);
}

/// A socket that is captured, falls back, goes elsewhere, and is captured again.
const REUSED: &str = r"
import ctypes, time
libc = ctypes.CDLL(None)
def disconnect(s):
    unspec = struct.pack('H14x', socket.AF_UNSPEC)
    assert libc.connect(s.fileno(), unspec, len(unspec)) == 0
def device(s):
    return s.getsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, 16).rstrip(b'\0').decode()
def step(name):
    print(name, flush=True)
    while not os.path.exists(DIRECTORY + '/' + name):
        time.sleep(0.01)
s = socket.socket()
s.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b'dev0')
s.connect(('240.0.0.3', 80))
said['captured'] = device(s)
disconnect(s)
step('hang')
# The fallback is not behind the device that the socket is bound to again.
said['bound'] = s.connect_ex(('240.0.0.3', 80)) == 0
said['hung'] = device(s)
disconnect(s)
s.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b'')
said['fallback'] = call('240.0.0.3', 80, s)
disconnect(s)
said['local fallback'] = call('240.0.0.4', 80, s)
disconnect(s)
said['elsewhere'] = call('192.0.2.9', 7000, s)
disconnect(s)
step('beat')
s.connect(('240.0.0.1', 80))
said['again'] = s.getpeername()
print(json.dumps(said), flush=True)
";

#[test]
fn a_socket_carries_nothing_of_a_fallback_to_where_it_goes_next() {
    let bench = Bench::new("reuse");
    let directory = bench.scratch.subdirectory("steps").unwrap();
    let said = directory.join("said");
    let script = format!("DIRECTORY = '{}'\n{PRELUDE}\n{REUSED}", directory.display());
    let mut client = Program::new("python3")
        .args(["-c", &script])
        .in_cgroup(&bench.workload)
        .in_namespace(&bench.namespace)
        .log(&said)
        .spawn()
        .unwrap();
    let wait_for_line = |expected: &str| {
        wait_for_value(expected, SOON, || {
            let text = fs::read_to_string(&said).unwrap_or_default();
            ensure!(!text.contains("Error"), "{text}");
            let line = text.lines().find(|line| line.starts_with(expected));
            Ok(line.map(str::to_owned))
        })
        .unwrap()
    };
    wait_for_line("hang");
    assert_eq!(bench.captured(), "240.0.0.3:80".parse().unwrap());
    bench.hang();
    fs::write(directory.join("hang"), "").unwrap();
    wait_for_line("beat");
    bench.assert_nothing_captured();
    bench.datapath.beat(Some(PATIENT)).unwrap();
    fs::write(directory.join("beat"), "").unwrap();
    let said: Value = serde_json::from_str(&wait_for_line("{")).unwrap();
    client.wait(SOON).unwrap().unwrap();
    let expected = json!({
        "captured": "lo", "bound": false, "hung": "dev0", "fallback": "plain", "local fallback": "plain",
        "elsewhere": "plain", "again": ["240.0.0.1", 80],
    });
    assert_eq!(said, expected);
    assert_eq!(bench.captured(), "240.0.0.1:80".parse().unwrap());
    assert_eq!(bench.published(), 2);
}
