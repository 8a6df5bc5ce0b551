//! What programs do with sockets, and what becomes of it under capture: real system calls of a real client.
//!
//! Each test runs a short Python program in a scratch cgroup and network namespace, accepts what was captured,
//! and looks at both ends. No agent runs: the datapath is the test's own.

#![expect(
    clippy::tests_outside_test_module,
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "an integration test is a test module, its support included"
)]

use std::{
    collections::BTreeMap,
    net::{SocketAddr, TcpStream},
    path::Path,
    time::Duration,
};

use bpf_tests::{
    cgroup::Cgroup,
    namespace::Namespace,
    program::Program,
    scratch::Scratch,
    wait::{SOON, wait_for_value},
};
use serde_json::{Value, json};
use sidestep::datapath::{
    AwayPolicy, Captured, CgroupId, Datapath, DatapathSettings, FlowEvent, Reconciled, ServiceId,
    Undesired, Verdict, VipRanges, VipTarget, VipTargets,
    cgroup::id_of_directory,
    listener::{self, CaptureListeners},
    netns::Netns,
};
use sidestep::sockets::ListeningSockets;

const PORT: u16 = 15_001;
const VIP: &str = "240.0.0.5:80";
const OTHER_VIP: &str = "240.0.0.6:443";
const SICK_VIP: &str = "240.0.0.7:80";
const VIP6: &str = "[fd00:1::5]:80";
const CLUSTER_IP: &str = "10.96.0.1:80";
/// An address that answers at every port, with a service of its own at this one.
const OWN_PORT: &str = "240.0.0.8:22";
const ANY_PORT: &str = "240.0.0.8";
const ANY_PORT6: &str = "fd00:1::8";
const ANY_PORT_REAL: &str = "10.96.0.8";

/// Ends up in front of every client's program.
const PRELUDE: &str = r"
import ctypes, errno, json, os, select, socket, struct, sys
VIP, OTHER, SICK, VIP6 = ('240.0.0.5', 80), ('240.0.0.6', 443), ('240.0.0.7', 80), ('fd00:1::5', 80)
libc = ctypes.CDLL(None, use_errno=True)
said = {}
def attempt(action):
    try:
        action()
        return 'ok'
    except TimeoutError:
        return 'timeout'
    except OSError as error:
        return errno.errorcode[error.errno]
def tcp(family=socket.AF_INET):
    return socket.socket(family, socket.SOCK_STREAM)
def disconnect(s):
    unspec = struct.pack('H14x', socket.AF_UNSPEC)
    if libc.connect(s.fileno(), unspec, len(unspec)) != 0:
        raise OSError(ctypes.get_errno(), 'disconnect')
def server():
    listener = tcp()
    listener.bind(('127.0.0.1', 0))
    listener.listen()
    return listener
def enter(cgroup):
    with open(cgroup + '/cgroup.procs', 'w') as procs:
        procs.write('0')
";

struct Bench {
    datapath: Datapath,
    listeners: Option<CaptureListeners>,
    workload: Cgroup,
    agent: Cgroup,
    namespace: Namespace,
    other: Namespace,
    home: Cgroup,
    scratch: Scratch,
}

#[derive(Default)]
struct Options {
    /// Attach above the agent's cgroup, not only above the workloads'.
    everywhere: bool,
    so_original_dst: bool,
}

impl Bench {
    fn new(purpose: &str) -> Self {
        Self::with(purpose, &Options::default())
    }

    fn with(purpose: &str, options: &Options) -> Self {
        let scratch = Scratch::new(purpose).unwrap();
        let agent = scratch.cgroup().child("agent").unwrap();
        let workloads = scratch.cgroup().child("workloads").unwrap();
        let workload = scratch.cgroup().child("workloads/w").unwrap();
        let namespace = Namespace::create(&scratch, "a").unwrap();
        let other = Namespace::create(&scratch, "b").unwrap();
        namespace.join("mesh0", &other, "mesh0").unwrap();
        namespace
            .add_address("mesh0", "192.0.2.1".parse().unwrap())
            .unwrap();
        let attach = if options.everywhere {
            scratch.cgroup()
        } else {
            &workloads
        };
        // Listeners belong to the cgroup that they are made in; this process is the agent here.
        let home = home();
        agent.enter().unwrap();
        let settings = DatapathSettings {
            cgroups: vec![attach.directory().to_owned()],
            agent_cgroup: agent.directory().to_owned(),
            vip_ranges: VipRanges {
                ipv4: "240.0.0.0/4".parse().unwrap(),
                ipv6: "fd00:1::/64".parse().unwrap(),
            },
            max_vips: 1024,
            max_flows: 1024,
            so_original_dst: options.so_original_dst,
            dns_port: None,
            debug: false,
        };
        let datapath = Datapath::load(settings, None).unwrap();
        let mut bench = Self {
            datapath,
            listeners: None,
            workload,
            agent,
            namespace,
            other,
            home,
            scratch,
        };
        bench.fill();
        bench.datapath.attach_hand_over().unwrap();
        bench.listen();
        bench.datapath.attach_capture().unwrap();
        bench
    }

    fn fill(&self) {
        let target = |service, reachable| VipTarget {
            service: ServiceId(service),
            reachable,
            away: AwayPolicy::Closed,
        };
        let vips = [
            (VIP, target(1, true)),
            (OTHER_VIP, target(2, true)),
            (SICK_VIP, target(3, false)),
            (VIP6, target(4, true)),
            (CLUSTER_IP, target(5, true)),
            (OWN_PORT, target(6, true)),
        ];
        let any_port = [
            (ANY_PORT, target(8, true)),
            (ANY_PORT6, target(8, true)),
            (ANY_PORT_REAL, target(8, true)),
        ];
        let vips = VipTargets {
            ports: vips
                .map(|(at, target)| (at.parse().unwrap(), target))
                .into(),
            any_port: any_port
                .map(|(at, target)| (at.parse().unwrap(), target))
                .into(),
            ..VipTargets::default()
        };
        let changed = self.datapath.reconcile(&vips, Undesired::Remove).unwrap();
        assert_eq!((changed.added, changed.changed, changed.removed), (9, 0, 0));
    }

    fn listen(&mut self) {
        let netns = Netns::open(self.namespace.path()).unwrap();
        self.listeners =
            Some(listener::listen(&netns, PORT, &ListeningSockets::default()).unwrap());
        self.datapath
            .enrol_netns(netns.cookie().unwrap(), self.listeners.as_ref().unwrap())
            .unwrap();
    }

    /// Runs a client in the workload's cgroup and in the namespace; what it put into `said`.
    fn client(&self, script: &str) -> Value {
        Self::client_in(&self.workload, &self.namespace, script)
    }

    fn client_in(cgroup: &Cgroup, namespace: &Namespace, script: &str) -> Value {
        let script = format!("{PRELUDE}\n{script}\nprint(json.dumps(said))\n");
        let said = Program::new("python3")
            .args(["-c", &script])
            .in_cgroup(cgroup)
            .in_namespace(namespace)
            .run(SOON)
            .unwrap();
        serde_json::from_str(&said).unwrap()
    }

    /// The next connection at the listeners, and what was captured of it.
    fn accept(&self) -> (TcpStream, Option<Captured>) {
        use std::os::fd::AsFd as _;
        let listeners = self.listeners.as_ref().unwrap();
        let stream = wait_for_value("a captured connection", SOON, || {
            let accepted = listeners.v4.accept().or_else(|_none| match &listeners.v6 {
                Some(listener) => listener.accept(),
                None => Err(std::io::ErrorKind::WouldBlock.into()),
            });
            Ok(accepted.ok().map(|(stream, _peer)| stream))
        })
        .unwrap();
        let captured = self.datapath.captured(stream.as_fd()).unwrap();
        (stream, captured)
    }

    fn captured(&self) -> Captured {
        self.accept()
            .1
            .expect("the connection carries no original destination")
    }

    fn assert_captured(&self, destination: &str) {
        let captured = self.captured();
        assert_eq!(captured.destination, destination.parse().unwrap());
        assert_eq!(captured.maker.cgroup, id(&self.workload));
        let netns = Netns::open(self.namespace.path()).unwrap();
        assert_eq!(captured.maker.netns, netns.cookie().unwrap());
        assert_eq!(captured.maker.uid, 0);
    }

    fn assert_nothing_more_captured(&self) {
        let listeners = self.listeners.as_ref().unwrap();
        assert!(
            listeners.v4.accept().is_err(),
            "something else was captured"
        );
    }

    fn count(&self, verdict: Verdict) -> u64 {
        let counters = self.datapath.counters().unwrap();
        counters
            .into_iter()
            .find(|(counted, _)| *counted == verdict)
            .unwrap()
            .1
    }

    fn flows(&self, event: FlowEvent) -> u64 {
        let counters = self.datapath.flow_counters().unwrap();
        counters
            .into_iter()
            .find(|(counted, _)| *counted == event)
            .unwrap()
            .1
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        // Its cgroup goes with the scratch run; this process must not be in it.
        let _left = self.home.enter();
    }
}

/// The cgroup that this process was started in.
fn home() -> Cgroup {
    let own = std::fs::read_to_string("/proc/self/cgroup").unwrap();
    let path = own
        .lines()
        .find_map(|line| line.strip_prefix("0::"))
        .unwrap();
    Cgroup::create(path).unwrap()
}

fn id(cgroup: &Cgroup) -> CgroupId {
    id_of_directory(cgroup.directory()).unwrap()
}

#[test]
fn a_blocking_connect_is_captured_and_sees_its_target_as_peer() {
    let bench = Bench::new("blocking");
    let said = bench.client("s = tcp(); s.connect(VIP); said['peer'] = s.getpeername()");
    assert_eq!(said["peer"], json!(["240.0.0.5", 80]));
    bench.assert_captured(VIP);
    assert_eq!(bench.count(Verdict::Captured), 1);
}

#[test]
fn a_non_blocking_connect_goes_as_without_capture() {
    let bench = Bench::new("nonblocking");
    let said = bench.client(
        "s = tcp(); s.setblocking(False)
said['first'] = s.connect_ex(VIP)
select.select([], [s], [], 5)
said['error'] = s.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
said['second'] = s.connect_ex(VIP)
said['third'] = errno.errorcode[s.connect_ex(VIP)]
said['peer'] = s.getpeername()",
    );
    let expected = json!({"first": libc::EINPROGRESS, "error": 0, "second": 0, "third": "EISCONN",
        "peer": ["240.0.0.5", 80]});
    assert_eq!(said, expected);
    bench.assert_captured(VIP);
    bench.assert_nothing_more_captured();
}

#[test]
fn a_second_connect_fails_and_changes_nothing() {
    let bench = Bench::new("second");
    let said = bench.client(
        "s = tcp(); s.connect(VIP)
said['second'] = attempt(lambda: s.connect(OTHER))
said['peer'] = s.getpeername()",
    );
    assert_eq!(said["second"], "EISCONN");
    assert_eq!(said["peer"], json!(["240.0.0.5", 80]));
    bench.assert_captured(VIP);
}

#[test]
fn a_socket_that_goes_elsewhere_forgets_where_it_was_going() {
    let bench = Bench::new("unspec");
    let said = bench.client(
        "l = server(); s = tcp(); s.connect(VIP); disconnect(s); s.connect(l.getsockname())
said['peer'] = s.getpeername() == l.getsockname()",
    );
    assert_eq!(said["peer"], true);
    bench.assert_captured(VIP);
    bench.assert_nothing_more_captured();
}

#[test]
fn a_socket_that_reconnects_is_captured_with_its_new_target() {
    let bench = Bench::new("reconnect");
    let said = bench.client(
        "s = tcp(); s.connect(VIP); disconnect(s); s.connect(OTHER); said['peer'] = s.getpeername()",
    );
    assert_eq!(said["peer"], json!(["240.0.0.6", 443]));
    bench.assert_captured(VIP);
    bench.assert_captured(OTHER_VIP);
}

#[test]
fn a_refused_socket_can_be_used_again() {
    let bench = Bench::new("reuse");
    let said = bench.client(
        "s = tcp(); said['first'] = attempt(lambda: s.connect(SICK)); s.connect(VIP)
said['peer'] = s.getpeername()",
    );
    assert_eq!(said["first"], "ECONNREFUSED");
    assert_eq!(said["peer"], json!(["240.0.0.5", 80]));
    bench.assert_captured(VIP);
}

#[test]
fn refusals_have_the_errno_that_says_why() {
    let bench = Bench::new("errno");
    let said = bench.client(
        "for name, target in [('sick', SICK), ('port', ('240.0.0.5', 81)), ('vip', ('240.9.9.9', 80)),
        ('cluster_port', ('10.96.0.1', 81))]:
    said[name] = attempt(lambda: tcp().connect(target))
said['vip6'] = attempt(lambda: tcp(socket.AF_INET6).connect(('fd00:1::9', 80)))",
    );
    let expected = json!({"sick": "ECONNREFUSED", "port": "ECONNREFUSED", "vip": "EHOSTUNREACH",
        "cluster_port": "ECONNREFUSED", "vip6": "EHOSTUNREACH"});
    assert_eq!(said, expected);
    assert_eq!(bench.count(Verdict::RefusedNoEndpoint), 1);
    assert_eq!(bench.count(Verdict::RefusedUnknownPort), 2);
    assert_eq!(bench.count(Verdict::RefusedUnknownVip), 2);
}

#[test]
fn an_address_outside_the_ranges_is_captured_if_listed_and_else_left_alone() {
    let bench = Bench::new("clusterip");
    let said = bench.client(
        "s = tcp(); s.connect(('10.96.0.1', 80)); said['peer'] = s.getpeername()
said['unlisted'] = attempt(lambda: tcp().connect(('10.96.0.2', 80)))
said['broadcast'] = attempt(lambda: tcp().connect(('255.255.255.255', 80)))",
    );
    assert_eq!(said["peer"], json!(["10.96.0.1", 80]));
    assert_eq!(said["unlisted"], "ENETUNREACH");
    assert_ne!(said["broadcast"], "ok");
    bench.assert_captured(CLUSTER_IP);
    assert_eq!(bench.count(Verdict::PassedOther), 2);
}

#[test]
fn a_namespace_without_listener_is_refused() {
    let bench = Bench::new("foreign");
    let script = "said['error'] = attempt(lambda: tcp().connect(VIP))";
    let said = Bench::client_in(&bench.workload, &bench.other, script);
    assert_eq!(said["error"], "ECONNREFUSED");
    assert_eq!(bench.count(Verdict::RefusedNetns), 1);
}

#[test]
fn udp_passes_and_leaves_nothing() {
    let bench = Bench::new("udp");
    let said = bench.client(
        "u = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
said['error'] = attempt(lambda: u.connect(VIP))",
    );
    assert_eq!(
        said["error"], "ENETUNREACH",
        "as without capture: there is no route"
    );
    assert_eq!(bench.count(Verdict::PassedProtocol), 1);
}

#[test]
fn ipv6_sockets_reach_native_and_mapped_targets() {
    let bench = Bench::new("ipv6");
    let said = bench.client(
        "s = tcp(socket.AF_INET6); s.connect(VIP6); said['native'] = s.getpeername()[:2]
m = tcp(socket.AF_INET6); m.connect(('::ffff:240.0.0.5', 80)); said['mapped'] = m.getpeername()[:2]
d = tcp(socket.AF_INET6); d.bind(('::', 0)); d.connect(('::ffff:240.0.0.6', 443))
said['bound'] = d.getpeername()[:2]",
    );
    let expected = json!({"native": ["fd00:1::5", 80], "mapped": ["::ffff:240.0.0.5", 80],
        "bound": ["::ffff:240.0.0.6", 443]});
    assert_eq!(said, expected);
    let mut seen: Vec<String> = (0..3)
        .map(|_| bench.captured().destination.to_string())
        .collect();
    seen.sort();
    assert_eq!(seen, [VIP, OTHER_VIP, VIP6]);
}

#[test]
fn an_ipv6_only_socket_cannot_reach_a_mapped_target() {
    let bench = Bench::new("v6only");
    let said = bench.client(
        "s = tcp(socket.AF_INET6); s.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
said['error'] = attempt(lambda: s.connect(('::ffff:240.0.0.5', 80)))",
    );
    assert_eq!(said["error"], "ENETUNREACH", "as without capture");
}

#[test]
fn data_in_the_syn_is_captured() {
    let bench = Bench::new("fastopen");
    bench
        .namespace
        // Client and server, without cookies, for every listener.
        .run(|| Ok(std::fs::write("/proc/sys/net/ipv4/tcp_fastopen", "1543")?))
        .unwrap();
    let said = bench.client(
        "s = tcp(); said['sent'] = s.sendto(b'early', 0x20000000, VIP); said['peer'] = s.getpeername()
c = tcp(); c.setsockopt(socket.IPPROTO_TCP, 30, 1); c.connect(OTHER); c.send(b'early')
said['other'] = c.getpeername()",
    );
    let expected = json!({"sent": 5, "peer": ["240.0.0.5", 80], "other": ["240.0.0.6", 443]});
    assert_eq!(said, expected);
    bench.assert_captured(VIP);
    bench.assert_captured(OTHER_VIP);
}

#[test]
fn a_socket_bound_to_a_device_is_captured_and_gets_its_device_back() {
    let bench = Bench::new("device");
    let said = bench.client(
        "s = tcp(); s.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b'mesh0')
s.connect(VIP); said['peer'] = s.getpeername(); disconnect(s)
attempt(lambda: s.settimeout(0.1)); attempt(lambda: s.connect(('192.0.2.77', 9)))
said['device'] = s.getsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, 16).rstrip(b'\\0').decode()",
    );
    assert_eq!(said["peer"], json!(["240.0.0.5", 80]));
    assert_eq!(said["device"], "mesh0");
    bench.assert_captured(VIP);
}

#[test]
fn a_bound_source_is_kept() {
    let bench = Bench::new("bound");
    let said = bench.client(
        "s = tcp(); s.bind(('192.0.2.1', 0)); s.connect(VIP)
said['peer'] = s.getpeername(); said['name'] = s.getsockname()[0]",
    );
    assert_eq!(
        said,
        json!({"peer": ["240.0.0.5", 80], "name": "192.0.2.1"})
    );
    bench.assert_captured(VIP);
}

#[test]
fn mptcp_sockets_are_captured() {
    let bench = Bench::new("mptcp");
    let said = bench.client(
        "s = socket.socket(socket.AF_INET, socket.SOCK_STREAM, 262)
said['error'] = attempt(lambda: s.connect(VIP))",
    );
    assert_eq!(said["error"], "ok");
    bench.assert_captured(VIP);
}

#[test]
fn a_child_that_inherits_a_connection_sees_the_same_peer() {
    let bench = Bench::new("fork");
    let said = bench.client(
        "s = tcp(); s.connect(VIP); r, w = os.pipe()
if os.fork() == 0:
    os.write(w, json.dumps(s.getpeername()).encode()); os._exit(0)
os.wait(); said['peer'] = json.loads(os.read(r, 100))",
    );
    assert_eq!(said["peer"], json!(["240.0.0.5", 80]));
    bench.assert_captured(VIP);
}

#[test]
fn the_process_that_connects_counts_not_the_one_that_made_the_socket() {
    let bench = Bench::new("pass");
    let receiver = bench.scratch.cgroup().child("workloads/receiver").unwrap();
    let script = format!(
        "a, b = socket.socketpair()
if os.fork() == 0:
    enter('{}'); fds = socket.recv_fds(b, 1, 1)[1]
    socket.socket(fileno=fds[0]).connect(VIP); os._exit(0)
s = tcp(); socket.send_fds(a, [b'x'], [s.fileno()]); said['status'] = os.wait()[1]",
        receiver.directory().display()
    );
    assert_eq!(bench.client(&script)["status"], 0);
    assert_eq!(bench.captured().maker.cgroup, id(&receiver));
}

#[test]
fn a_cgroup_below_the_workloads_is_captured_under_its_own_id() {
    let bench = Bench::new("child");
    let child = bench.scratch.cgroup().child("workloads/w/child").unwrap();
    Bench::client_in(&child, &bench.namespace, "tcp().connect(VIP)");
    assert_eq!(bench.captured().maker.cgroup, id(&child));
}

#[test]
fn a_socket_belongs_to_the_cgroup_that_it_was_made_in() {
    let bench = Bench::new("moved");
    let outside = bench.scratch.cgroup().child("outside").unwrap();
    let (inside, outside_path) = (
        bench.workload.directory().display(),
        outside.directory().display(),
    );
    // Made outside, as before enrolment: never captured.
    let script = format!(
        "s = tcp(); enter('{inside}'); said['old'] = attempt(lambda: s.connect(VIP))
said['new'] = attempt(lambda: tcp().connect(VIP))
late = tcp(); enter('{outside_path}'); said['late'] = attempt(lambda: late.connect(OTHER))"
    );
    let said = Bench::client_in(&outside, &bench.namespace, &script);
    assert_eq!(
        said,
        json!({"old": "ENETUNREACH", "new": "ok", "late": "ok"})
    );
    bench.assert_captured(VIP);
    let late = bench.captured();
    assert_eq!(
        late.maker.cgroup,
        id(&outside),
        "who connects is what the process is now"
    );
}

#[test]
fn outside_the_attach_point_nothing_changes() {
    let bench = Bench::new("outside");
    let outside = bench.scratch.cgroup().child("outside").unwrap();
    let script = "said['error'] = attempt(lambda: tcp().connect(VIP))";
    let said = Bench::client_in(&outside, &bench.namespace, script);
    assert_eq!(said["error"], "ENETUNREACH");
    let all: u64 = bench
        .datapath
        .counters()
        .unwrap()
        .iter()
        .map(|(_, count)| count)
        .sum();
    assert_eq!(all, 0);
}

#[test]
fn the_agent_and_what_it_starts_is_not_captured() {
    let bench = Bench::with(
        "agent",
        &Options {
            everywhere: true,
            ..Options::default()
        },
    );
    let below = bench.scratch.cgroup().child("agent/below").unwrap();
    for cgroup in [&bench.agent, &below] {
        let said = Bench::client_in(
            cgroup,
            &bench.namespace,
            "l = server(); said['direct'] = attempt(lambda: tcp().connect(l.getsockname()))
said['vip'] = attempt(lambda: tcp().connect(VIP))
said['cluster'] = attempt(lambda: tcp().connect(('10.96.0.1', 80)))",
        );
        let expected = json!({"direct": "ok", "vip": "EHOSTUNREACH", "cluster": "ENETUNREACH"});
        assert_eq!(said, expected);
    }
    bench.assert_nothing_more_captured();
}

#[test]
fn a_direct_connection_to_the_listener_carries_nothing() {
    let bench = Bench::new("direct");
    bench.client("said['error'] = attempt(lambda: tcp().connect(('127.0.0.1', 15001)))");
    assert_eq!(bench.accept().1, None);
}

#[test]
fn loopback_is_left_alone() {
    let bench = Bench::new("loopback");
    let said = bench.client("l = server(); s = tcp(); s.connect(l.getsockname())");
    assert_eq!(said, json!({}));
    assert_eq!(bench.count(Verdict::PassedLoopback), 1);
}

#[test]
fn connects_that_nobody_answers_leave_nothing_behind() {
    let bench = Bench::new("failed");
    // The programs find a listener, but it is elsewhere: nobody answers where they send the connect.
    let elsewhere = Netns::open(bench.other.path()).unwrap();
    let listeners = listener::listen(&elsewhere, PORT + 1, &ListeningSockets::default()).unwrap();
    let here = Netns::open(bench.namespace.path()).unwrap();
    bench
        .datapath
        .enrol_netns(here.cookie().unwrap(), &listeners)
        .unwrap();
    let said =
        bench.client("for _ in range(50): said['error'] = attempt(lambda: tcp().connect(VIP))");
    assert_eq!(said["error"], "ECONNREFUSED");
    assert_eq!(bench.flows(FlowEvent::Published), 50);
    assert_eq!(bench.flows(FlowEvent::Removed), 50);
    assert_eq!(bench.datapath.sweep_flows(Duration::ZERO).unwrap(), 0);
}

#[test]
fn who_takes_the_port_when_the_agent_is_gone_gets_nothing() {
    let mut bench = Bench::new("squatter");
    bench.listeners = None;
    let said = bench.client(
        "squatter = tcp(); squatter.bind(('0.0.0.0', 15001)); squatter.listen(); squatter.settimeout(0.1)
six = tcp(socket.AF_INET6); six.bind(('::1', 15001)); six.listen(); six.settimeout(0.1)
said['vip'] = attempt(lambda: tcp().connect(VIP))
said['vip6'] = attempt(lambda: tcp(socket.AF_INET6).connect(VIP6))
said['accepted'] = [attempt(squatter.accept), attempt(six.accept)]",
    );
    let expected = json!({
        "vip": "ECONNREFUSED", "vip6": "ECONNREFUSED", "accepted": ["timeout", "timeout"],
    });
    assert_eq!(said, expected);
    assert_eq!(bench.count(Verdict::RefusedNetns), 2);
}

#[test]
fn captured_connects_leave_nothing_behind() {
    let bench = Bench::new("moves");
    bench.client("held = [tcp() for _ in range(50)]\nfor s in held: s.connect(VIP)");
    assert_eq!(bench.flows(FlowEvent::Published), 50);
    assert_eq!(bench.flows(FlowEvent::Moved), 50);
    assert_eq!(bench.datapath.sweep_flows(Duration::ZERO).unwrap(), 0);
}

#[test]
fn so_original_dst_answers_only_if_switched_on() {
    for on in [true, false] {
        let options = Options {
            so_original_dst: on,
            ..Options::default()
        };
        let bench = Bench::with("origdst", &options);
        bench.client("tcp().connect(VIP)");
        let (stream, _) = bench.accept();
        let answer = socket2::SockRef::from(&stream).original_dst_v4();
        if on {
            assert_eq!(answer.unwrap().as_socket(), Some(VIP.parse().unwrap()));
        } else {
            drop(answer.unwrap_err());
        }
    }
}

#[test]
fn what_is_gone_from_the_catalog_is_gone_from_the_kernel() {
    let bench = Bench::new("gone");
    let target = VipTarget {
        service: ServiceId(1),
        reachable: true,
        away: AwayPolicy::Closed,
    };
    let one = VipTargets {
        ports: BTreeMap::from([(VIP.parse().unwrap(), target)]),
        ..VipTargets::default()
    };
    let changed = bench.datapath.reconcile(&one, Undesired::Remove).unwrap();
    assert_eq!((changed.added, changed.changed, changed.removed), (0, 0, 8));
    let said = bench.client(
        "said['kept'] = attempt(lambda: tcp().connect(VIP))
said['gone'] = attempt(lambda: tcp().connect(OTHER))",
    );
    assert_eq!(said, json!({"kept": "ok", "gone": "EHOSTUNREACH"}));
}

#[test]
fn an_address_may_answer_at_every_port() {
    let bench = Bench::new("anyport");
    let said = bench.client(
        "held = []
def connect(family, address):
    s = tcp(family)
    held.append(s)
    s.connect(address)
    assert s.getpeername()[:2] == address, s.getpeername()
for port in (1, 80, 65535):
    said['v4 %d' % port] = attempt(lambda: connect(socket.AF_INET, ('240.0.0.8', port)))
    said['v6 %d' % port] = attempt(lambda: connect(socket.AF_INET6, ('fd00:1::8', port)))
said['own'] = attempt(lambda: connect(socket.AF_INET, ('240.0.0.8', 22)))
said['real'] = attempt(lambda: connect(socket.AF_INET, ('10.96.0.8', 9)))
said['listed'] = attempt(lambda: connect(socket.AF_INET, ('240.0.0.5', 81)))",
    );
    let expected = json!({
        "v4 1": "ok", "v4 80": "ok", "v4 65535": "ok", "v6 1": "ok", "v6 80": "ok", "v6 65535": "ok",
        "own": "ok", "real": "ok", "listed": "ECONNREFUSED",
    });
    assert_eq!(said, expected);
    let captured: BTreeMap<SocketAddr, ServiceId> = (0..8)
        .map(|_| bench.captured())
        .map(|captured| (captured.destination, captured.service))
        .collect();
    let expected = [
        ("240.0.0.8:1", 8),
        ("240.0.0.8:80", 8),
        ("240.0.0.8:65535", 8),
        ("[fd00:1::8]:1", 8),
        ("[fd00:1::8]:80", 8),
        ("[fd00:1::8]:65535", 8),
        (OWN_PORT, 6),
        ("10.96.0.8:9", 8),
    ];
    let expected = expected.map(|(at, service)| (at.parse().unwrap(), ServiceId(service)));
    assert_eq!(captured, expected.into());
    bench.assert_nothing_more_captured();
    assert_eq!(bench.count(Verdict::RefusedUnknownPort), 1);
}

#[test]
fn an_address_goes_from_every_port_to_few_and_back() {
    let bench = Bench::new("fewports");
    let target = VipTarget {
        service: ServiceId(8),
        reachable: true,
        away: AwayPolicy::Closed,
    };
    let any_port = VipTargets {
        any_port: BTreeMap::from([(ANY_PORT.parse().unwrap(), target)]),
        ..VipTargets::default()
    };
    let few = VipTargets {
        ports: BTreeMap::from([("240.0.0.8:80".parse().unwrap(), target)]),
        ..VipTargets::default()
    };
    let mut answers = Vec::new();
    for targets in [&any_port, &few, &any_port] {
        let changed = bench
            .datapath
            .reconcile(targets, Undesired::Remove)
            .unwrap();
        let again = bench
            .datapath
            .reconcile(targets, Undesired::Remove)
            .unwrap();
        assert_eq!(again, Reconciled::default());
        let said = bench.client(
            "said = [attempt(lambda: tcp().connect(('240.0.0.8', port))) for port in (80, 81)]",
        );
        answers.push((changed.added, changed.removed, said));
    }
    let both = json!(["ok", "ok"]);
    let expected = [
        (0, 8, both.clone()),
        (1, 1, json!(["ok", "ECONNREFUSED"])),
        (1, 1, both),
    ];
    assert_eq!(answers, expected);
}

#[test]
fn attachments_tell_what_runs_where() {
    let bench = Bench::new("attached");
    let attachments = bench.datapath.attachments();
    assert_eq!(
        attachments.len(),
        6,
        "five at the attach point, one at the agent"
    );
    assert!(attachments.iter().all(|attachment| attachment.is_live));
    let workloads: &Path = bench.workload.directory().parent().unwrap();
    let there = attachments
        .iter()
        .filter(|attachment| attachment.target == workloads);
    assert_eq!(there.count(), 5);
}
