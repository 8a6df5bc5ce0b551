//! DNS queries under capture: which ones reach the agent, and from whom the client sees its answers come.
//!
//! Each test runs a short Python program in a scratch cgroup and network namespace. No agent runs: a thread of the test
//! answers each captured datagram with the server that it was meant for.

#![expect(
    clippy::tests_outside_test_module,
    clippy::unwrap_used,
    reason = "an integration test is a test module, its support included"
)]

use std::{
    collections::HashSet,
    net::{Ipv4Addr, SocketAddr},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
    time::Duration,
};

use bpf_tests::{
    cgroup::Cgroup,
    namespace::Namespace,
    program::{Program, Running},
    scratch::Scratch,
    wait::{SOON, pause, wait_for, wait_for_value},
};
use serde_json::{Value, json};
use sidestep::{
    datapath::{
        Captured, Datapath, DatapathError, DatapathSettings, Verdict, VipRanges,
        listener::{self, CaptureListeners},
        netns::Netns,
        queries::{QuerySocket, SweepLimits},
    },
    sockets::ListeningSockets,
};

const PORT: u16 = 15_001;

/// Ends up in front of every client's program. `ask` returns what came, and from where.
const PRELUDE: &str = r"
import errno, json, socket, struct, sys
NOWHERE, OTHER, REAL = ('198.51.100.53', 53), ('203.0.113.53', 53), ('192.0.2.2', 53)
said = {}
def udp(family=socket.AF_INET):
    s = socket.socket(family, socket.SOCK_DGRAM)
    s.settimeout(3)
    return s
def receive(s):
    try:
        answer, server = s.recvfrom(4096)
        return [answer.decode(), server[0], server[1]]
    except OSError as error:
        return 'timeout' if isinstance(error, TimeoutError) else errno.errorcode[error.errno]
def ask(s, server):
    try:
        s.sendto(b'query', server)
    except OSError as error:
        return errno.errorcode[error.errno]
    return receive(s)
def index(interface):
    return socket.if_nametoindex(interface) if interface else 0
def pick(s, interface):
    IP_UNICAST_IF = 50
    s.setsockopt(socket.IPPROTO_IP, IP_UNICAST_IF, struct.pack('!I', index(interface)))
def ask_by(s, interface, server, source='0.0.0.0'):
    IP_PKTINFO, source = 8, socket.inet_aton(source)
    information = struct.pack('@i4s4s', index(interface), source, bytes(4))
    s.sendmsg([b'query'], [(socket.IPPROTO_IP, IP_PKTINFO, information)], 0, *filter(None, [server]))
    return receive(s)
";

/// A server as it is without any capture, which says that it is itself.
const SERVER: &str = r"
import socket
s = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
s.bind(('::', 53))
print('serves', flush=True)
while True:
    query, client = s.recvfrom(4096)
    s.sendto(b'the server itself', client)
";

struct Bench {
    datapath: Arc<Datapath>,
    listeners: Option<CaptureListeners>,
    answering: Option<(Arc<AtomicBool>, JoinHandle<()>)>,
    workload: Cgroup,
    agent: Cgroup,
    namespace: Namespace,
    _server: Running,
    _other: Namespace,
    home: Cgroup,
    scratch: Scratch,
}

impl Bench {
    fn new(purpose: &str) -> Self {
        Self::with(purpose, false)
    }

    /// With `debug`, the programs are those which can log every decision.
    fn with(purpose: &str, debug: bool) -> Self {
        let scratch = Scratch::new(purpose).unwrap();
        let agent = scratch.cgroup().child("agent").unwrap();
        let workload = scratch.cgroup().child("workload").unwrap();
        let namespace = Namespace::create(&scratch, "a").unwrap();
        let other = Namespace::create(&scratch, "b").unwrap();
        namespace.join("mesh0", &other, "mesh0").unwrap();
        for (namespace, addresses) in [
            (&namespace, ["192.0.2.1", "2001:db8::1"]),
            (&other, ["192.0.2.2", "2001:db8::2"]),
        ] {
            for address in addresses {
                let address = address.parse().unwrap();
                namespace.add_address("mesh0", address).unwrap();
            }
        }
        let log = scratch.directory().join("server");
        let server = Program::new("python3")
            .args(["-c", SERVER])
            .in_cgroup(&scratch.cgroup().child("server").unwrap())
            .in_namespace(&other)
            .log(&log)
            .spawn()
            .unwrap();
        wait_for("the server", SOON, || {
            std::fs::read_to_string(&log).is_ok_and(|said| said.contains("serves"))
        })
        .unwrap();
        // Sockets belong to the cgroup that they are made in; this process is the agent here.
        let home = home();
        agent.enter().unwrap();
        let settings = DatapathSettings {
            // Above the agent too: what it asks itself must go on.
            cgroups: vec![scratch.cgroup().directory().to_owned()],
            agent_cgroup: agent.directory().to_owned(),
            vip_ranges: VipRanges {
                ipv4: "240.0.0.0/4".parse().unwrap(),
                ipv6: "fd00:1::/64".parse().unwrap(),
            },
            max_vips: 1024,
            max_flows: 1024,
            so_original_dst: false,
            dns_port: Some(PORT),
            debug,
        };
        let datapath = Arc::new(Datapath::load(settings, None).unwrap());
        datapath.attach_hand_over().unwrap();
        let mut bench = Self {
            datapath,
            listeners: None,
            answering: None,
            workload,
            agent,
            namespace,
            _server: server,
            _other: other,
            home,
            scratch,
        };
        bench.listen();
        bench.datapath.attach_capture().unwrap();
        bench
    }

    fn netns(&self) -> Netns {
        Netns::open(self.namespace.path()).unwrap()
    }

    fn listen(&mut self) {
        let netns = self.netns();
        let cookie = netns.cookie().unwrap();
        let socket = QuerySocket::open(&netns, PORT).unwrap();
        let listeners = listener::listen(&netns, PORT, &ListeningSockets::default()).unwrap();
        self.datapath.enrol_netns(cookie, &listeners).unwrap();
        self.datapath.enrol_queries(cookie, &socket).unwrap();
        self.listeners = Some(listeners);
        let (over, datapath) = (Arc::<AtomicBool>::default(), Arc::clone(&self.datapath));
        let ended = Arc::clone(&over);
        let thread = std::thread::spawn(move || answer(&socket, &datapath, &ended));
        self.answering = Some((over, thread));
    }

    /// What a kill of the agent does.
    fn stop_listening(&mut self) {
        self.listeners = None;
        if let Some((over, thread)) = self.answering.take() {
            over.store(true, Ordering::Relaxed);
            thread.join().unwrap();
        }
    }

    fn client(&self, script: &str) -> Value {
        self.client_in(&self.workload, script)
    }

    fn client_in(&self, cgroup: &Cgroup, script: &str) -> Value {
        let script = format!("{PRELUDE}\n{script}\nprint(json.dumps(said))\n");
        let said = Program::new("python3")
            .args(["-c", &script])
            .in_cgroup(cgroup)
            .in_namespace(&self.namespace)
            .run(SOON)
            .unwrap();
        serde_json::from_str(&said).unwrap()
    }

    fn accepted(&self) -> Captured {
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
        self.datapath.captured(stream.as_fd()).unwrap().unwrap()
    }

    fn count(&self, verdict: Verdict) -> u64 {
        let counters = self.datapath.counters().unwrap();
        let counted = counters
            .into_iter()
            .find(|(counted, _)| *counted == verdict);
        counted.unwrap().1
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        self.stop_listening();
        // Its cgroup goes with the scratch run; this process must not be in it.
        let _left = self.home.enter();
    }
}

/// Answers each datagram with the server that it was meant for.
fn answer(socket: &QuerySocket, datapath: &Datapath, over: &AtomicBool) {
    let mut buffer = [0; 4096];
    while !over.load(Ordering::Relaxed) {
        let Ok(received) = socket.receive(&mut buffer) else {
            pause(Duration::from_millis(1));
            continue;
        };
        let server = datapath.server(received.stand_in).unwrap();
        let text = server.map_or("unknown".to_owned(), |server| server.to_string());
        let _sent = socket.send(text.as_bytes(), received.client, received.stand_in);
    }
}

/// The cgroup that this process was started in.
fn home() -> Cgroup {
    let own = std::fs::read_to_string("/proc/self/cgroup").unwrap();
    let path = own.lines().find_map(|line| line.strip_prefix("0::"));
    Cgroup::create(path.unwrap()).unwrap()
}

#[test]
fn one_socket_asks_many_servers_and_hears_each_by_its_name() {
    let bench = Bench::new("many");
    let said = bench.client(
        "s = udp()
said['one'], said['other'] = ask(s, NOWHERE), ask(s, OTHER)
said['loopback'] = [ask(s, (f'127.0.0.{n}', 53)) for n in (1, 11, 53)]
for n in range(200):
    s.sendto(b'query', (f'198.51.100.{n}', 53))
said['burst'] = sorted(receive(s) for n in range(200)) == sorted(
    [f'198.51.100.{n}:53', f'198.51.100.{n}', 53] for n in range(200))",
    );
    let loopback = [1, 11, 53].map(|n| {
        let server = format!("127.0.0.{n}");
        json!([format!("{server}:53"), server, 53])
    });
    let expected = json!({
        "one": ["198.51.100.53:53", "198.51.100.53", 53],
        "other": ["203.0.113.53:53", "203.0.113.53", 53],
        "loopback": loopback,
        "burst": true,
    });
    assert_eq!(said, expected);
    assert_eq!(bench.count(Verdict::QueryCaptured), 205);
    assert_eq!(bench.count(Verdict::QueryPassed), 0);
}

#[test]
fn a_connected_socket_sees_its_server_as_peer() {
    let bench = Bench::new("connected");
    let said = bench.client(
        "s = udp(); s.connect(NOWHERE)
said['peer'] = s.getpeername()
s.send(b'query'); said['answer'] = receive(s)
s.send(b'query'); said['bytes'] = s.recv(100).decode()
s.connect(OTHER)
s.send(b'query'); said['next'] = receive(s)
six = udp(socket.AF_INET6); six.connect(('::ffff:198.51.100.53', 53))
said['peer6'] = six.getpeername()[:2]
six.send(b'query'); said['answer6'] = receive(six)",
    );
    let answer = ["198.51.100.53:53", "198.51.100.53"];
    let expected = json!({
        "peer": ["198.51.100.53", 53],
        "answer": [answer[0], answer[1], 53],
        "bytes": answer[0],
        "next": ["203.0.113.53:53", "203.0.113.53", 53],
        "peer6": ["::ffff:198.51.100.53", 53],
        "answer6": [answer[0], "::ffff:198.51.100.53", 53],
    });
    assert_eq!(said, expected);
}

#[test]
fn mapped_addresses_and_bound_sockets_are_captured() {
    let bench = Bench::new("bound");
    let said = bench.client(
        "said['mapped'] = ask(udp(socket.AF_INET6), ('::ffff:198.51.100.53', 53))
bound = udp(); bound.bind(('192.0.2.1', 0))
said['bound'] = ask(bound, NOWHERE)
bound.connect(NOWHERE); bound.send(b'query')
said['bound and connected'] = receive(bound)
loopback = udp(); loopback.bind(('127.0.0.1', 0))
said['loopback'] = ask(loopback, ('127.0.0.53', 53))
lo = udp(); lo.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b'lo')
said['lo'] = ask(lo, ('127.0.0.53', 53))",
    );
    let expected = json!({
        "mapped": ["198.51.100.53:53", "::ffff:198.51.100.53", 53],
        "bound": ["198.51.100.53:53", "198.51.100.53", 53],
        "bound and connected": ["198.51.100.53:53", "198.51.100.53", 53],
        "loopback": ["127.0.0.53:53", "127.0.0.53", 53],
        "lo": ["127.0.0.53:53", "127.0.0.53", 53],
    });
    assert_eq!(said, expected);
}

#[test]
fn what_cannot_be_captured_goes_to_its_server() {
    let bench = Bench::new("passed");
    let said = bench.client(
        "device = udp(); device.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b'mesh0')
said['device'] = ask(device, REAL)
device.connect(REAL); device.send(b'query')
said['device and connected'] = receive(device)
said['six'] = ask(udp(socket.AF_INET6), ('2001:db8::2', 53))[0]
said['vip'] = ask(udp(), ('240.0.0.5', 53))
said['port'] = ask(udp(), ('198.51.100.53', 54))",
    );
    let itself = json!(["the server itself", "192.0.2.2", 53]);
    let expected = json!({
        "device": itself, "device and connected": itself, "six": itself[0],
        "vip": "ENETUNREACH", "port": "ENETUNREACH",
    });
    assert_eq!(said, expected);
    assert_eq!(bench.count(Verdict::QueryCaptured), 0);
}

#[test]
fn the_agents_own_queries_go_to_their_server() {
    let bench = Bench::new("own");
    let said = bench.client_in(
        &bench.agent,
        "said['datagram'] = ask(udp(), REAL)
s = udp(); s.connect(REAL); s.send(b'query'); said['connected'] = receive(s)
try:
    socket.create_connection(NOWHERE, 3)
except OSError as error:
    said['tcp'] = errno.errorcode[error.errno]",
    );
    let itself = json!(["the server itself", "192.0.2.2", 53]);
    let expected = json!({"datagram": itself, "connected": itself, "tcp": "ENETUNREACH"});
    assert_eq!(said, expected);
    assert_eq!(bench.count(Verdict::QueryPassed), 0);
}

#[test]
fn a_connection_carries_its_server_and_shows_it_as_peer() {
    let bench = Bench::new("tcp");
    for (server, family) in [
        ("198.51.100.53", "AF_INET"),
        ("127.0.0.53", "AF_INET"),
        ("2001:db8::53", "AF_INET6"),
        ("::1", "AF_INET6"),
    ] {
        let said = bench.client(&format!(
            "s = socket.socket(socket.{family}, socket.SOCK_STREAM); s.connect(('{server}', 53))
said['peer'] = s.getpeername()[:2]"
        ));
        assert_eq!(said["peer"], json!([server, 53]));
        let captured = bench.accepted();
        assert_eq!(
            captured.destination,
            SocketAddr::new(server.parse().unwrap(), 53)
        );
        assert!(captured.is_dns());
    }
    assert_eq!(bench.count(Verdict::QueryCaptured), 4);
}

#[test]
fn while_the_agent_is_away_or_hung_queries_go_to_their_server() {
    let mut bench = Bench::new("away");
    let all = "said['datagram'] = ask(udp(), REAL)
s = udp(); s.connect(REAL); s.send(b'query'); said['connected'] = receive(s)
six = udp(socket.AF_INET6)
said['mapped'] = ask(six, ('::ffff:192.0.2.2', 53))[0]
try:
    socket.create_connection(REAL, 3)
except OSError as error:
    said['tcp'] = errno.errorcode[error.errno]";
    let itself = json!(["the server itself", "192.0.2.2", 53]);
    // Nobody listens there over TCP, as without capture.
    let expected = json!({
        "datagram": itself, "connected": itself, "mapped": itself[0], "tcp": "ECONNREFUSED",
    });
    let hung_after = Some(Duration::from_millis(1));
    bench.datapath.stop_beating(hung_after).unwrap();
    assert_eq!(bench.client(all), expected);
    bench.datapath.beat(None).unwrap();
    assert_eq!(
        bench.client("said['datagram'] = ask(udp(), REAL)")["datagram"][0],
        "192.0.2.2:53"
    );
    bench.stop_listening();
    assert_eq!(bench.client(all), expected);
    assert_eq!(bench.count(Verdict::QueryPassed), 8);
    let _lives = bench.scratch.name();
}

#[test]
fn programs_that_can_log_capture_as_well() {
    let bench = Bench::with("log", true);
    let said = bench.client("said['answer'] = ask(udp(), NOWHERE)");
    assert_eq!(said["answer"][1], "198.51.100.53");
    bench.client("s = socket.socket(); s.connect(NOWHERE)");
    assert!(bench.accepted().is_dns());
}

/// What the agent looks up every minute: only here it need not be crowded, nor long ago.
fn sweep(bench: &Bench) -> usize {
    let limits = SweepLimits {
        room: 0,
        idle: Duration::ZERO,
        grace: Duration::ZERO,
    };
    let connected = || Ok::<_, DatapathError>(connected(bench));
    bench.datapath.sweep_servers(limits, connected).unwrap()
}

/// Where sockets of the workloads' namespace are connected to that wait for answers to queries.
fn connected(bench: &Bench) -> HashSet<Ipv4Addr> {
    let table = bench
        .netns()
        .run(|| std::fs::read_to_string("/proc/thread-self/net/udp"));
    let port = format!("{PORT:04X}");
    let address = |line: &str| {
        let (word, of_port) = line.split_whitespace().nth(2)?.split_once(':')?;
        let word = u32::from_str_radix(word, 16).ok()?;
        (of_port == port).then_some(Ipv4Addr::from_bits(u32::from_be(word)))
    };
    let table = table.unwrap().unwrap();
    table.lines().skip(1).filter_map(address).collect()
}

#[test]
fn only_a_server_that_nobody_is_connected_to_loses_its_address() {
    let bench = Bench::new("sweep");
    let [go_on, log] = ["go-on", "held"].map(|name| bench.scratch.directory().join(name));
    let hold = format!(
        "{PRELUDE}
import os, time
s = udp(); s.connect(OTHER)
print('connected', flush=True)
while not os.path.exists('{}'): time.sleep(0.01)
s.send(b'query')
print(receive(s)[0], flush=True)",
        go_on.display()
    );
    let mut held = Program::new("python3")
        .args(["-c", &hold])
        .in_cgroup(&bench.workload)
        .in_namespace(&bench.namespace)
        .log(&log)
        .spawn()
        .unwrap();
    let heard = || std::fs::read_to_string(&log).unwrap_or_default();
    wait_for("a connected socket", SOON, || heard().contains("connected")).unwrap();
    let asks = || bench.client("said['answer'] = ask(udp(), NOWHERE)")["answer"].clone();
    let answer = json!(["198.51.100.53:53", "198.51.100.53", 53]);
    assert_eq!(asks(), answer);
    assert_eq!(bench.datapath.servers().unwrap(), 2);
    // Retired: what is asked from now on goes by another address.
    assert_eq!(sweep(&bench), 0);
    assert_eq!(asks(), answer);
    assert_eq!(bench.datapath.servers().unwrap(), 3);
    assert_eq!(sweep(&bench), 1);
    assert_eq!(sweep(&bench), 1);
    assert_eq!(bench.datapath.servers().unwrap(), 1);
    assert_eq!(asks(), answer);
    std::fs::write(&go_on, "").unwrap();
    held.wait(SOON).unwrap();
    assert!(heard().contains("203.0.113.53:53"), "{}", heard());
    // Its socket has gone with it.
    let mut freed = 0;
    wait_for("all to go", SOON, || {
        freed += sweep(&bench);
        freed == 2
    })
    .unwrap();
    assert_eq!(bench.datapath.servers().unwrap(), 0);
}

/// From another interface than loopback no loopback address is reached: such queries would be lost.
#[test]
fn who_picks_an_interface_reaches_its_server() {
    let bench = Bench::new("interface");
    let said = bench.client(
        "unicast = udp(); pick(unicast, 'mesh0')
said['IP_UNICAST_IF'] = ask(unicast, REAL)
unicast.connect(REAL); unicast.send(b'query')
said['and connected'] = receive(unicast)
said['IP_PKTINFO'] = ask_by(udp(), 'mesh0', REAL)
six = udp(socket.AF_INET6)
by = (socket.IPPROTO_IPV6, 50, socket.inet_pton(socket.AF_INET6, '::ffff:0.0.0.0') + struct.pack('@i', index('mesh0')))
six.sendmsg([b'query'], [by], 0, ('::ffff:192.0.2.2', 53))
said['IPV6_PKTINFO'] = receive(six)
# As systemd-resolved does it.
resolved = udp(); pick(resolved, 'mesh0')
resolved.setsockopt(socket.SOL_SOCKET, 62, index('mesh0'))
resolved.connect(REAL)
resolved.setsockopt(socket.SOL_SOCKET, 62, 0)
resolved.send(b'query')
said['bound to connect'] = receive(resolved)",
    );
    let itself = json!(["the server itself", "192.0.2.2", 53]);
    let expected = json!({
        "IP_UNICAST_IF": itself, "and connected": itself, "IP_PKTINFO": itself,
        "IPV6_PKTINFO": ["the server itself", "::ffff:192.0.2.2", 53], "bound to connect": itself,
    });
    assert_eq!(said, expected);
    assert_eq!(bench.count(Verdict::QueryCaptured), 0);
    assert_eq!(bench.count(Verdict::QueryPassed), 5);
}

#[test]
fn who_picks_loopback_or_none_is_captured() {
    let bench = Bench::new("loopback");
    let said = bench.client(
        "lo = udp(); pick(lo, 'lo')
said['lo'] = ask(lo, ('127.0.0.53', 53))
said['by lo'] = ask_by(udp(), 'lo', ('127.0.0.53', 53))
none = udp(); pick(none, 'mesh0'); pick(none, None)
said['none'] = ask(none, NOWHERE)
said['by none'] = ask_by(udp(), None, NOWHERE)
said['from'] = ask_by(udp(), None, NOWHERE, '192.0.2.1')",
    );
    let loopback = json!(["127.0.0.53:53", "127.0.0.53", 53]);
    let nowhere = json!(["198.51.100.53:53", "198.51.100.53", 53]);
    let expected = json!({
        "lo": loopback, "by lo": loopback, "none": nowhere, "by none": nowhere, "from": nowhere,
    });
    assert_eq!(said, expected);
    assert_eq!(bench.count(Verdict::QueryCaptured), 5);
}

/// What the documentation calls limits. A kernel that does better is good news, and this test says so.
#[test]
fn what_harms_is_as_documented() {
    let mut bench = Bench::new("harm");
    let said = bench.client(
        "late = udp(); late.connect(REAL); late.settimeout(1)
pick(late, 'mesh0')
said['picked after connect'] = ask_by(late, 'mesh0', None)
again = udp(); again.connect(REAL)
try:
    again.connect(('192.0.2.2', 54))
except OSError as error:
    said['again'] = errno.errorcode[error.errno]
said['own'] = again.getsockname()[0]",
    );
    let expected =
        json!({"picked after connect": "timeout", "again": "EINVAL", "own": "127.0.0.1"});
    assert_eq!(said, expected);
    bench.stop_listening();
}
