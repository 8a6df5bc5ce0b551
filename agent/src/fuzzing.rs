//! What must hold for every input from outside: one function per parser, which takes any bytes.
//!
//! `fuzz/` calls these with what a fuzzer invents (`cargo xtask fuzz`), the tests below with the seeds, among which
//! is every input that once broke something, and with what is near them. Not part of the agent: built for a fuzzer and for tests only.

use std::{
    collections::{BTreeMap, BTreeSet},
    ffi::OsStr,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    os::unix::ffi::OsStrExt as _,
    path::Path,
    sync::{Arc, LazyLock},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use rustls::{client::danger::ServerCertVerifier as _, server::danger::ClientCertVerifier as _};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};
use sidestep_abi::{
    Address, Away, Class, Facts, Fallback, Found, Heartbeat, KnownAddress, Origin, PortBe, Ranges,
    Role, Target as KernelTarget, Verdict, VipKey, VipValue, classify, decide, loopback_spread,
    may_fall_back,
};

use crate::{
    catalog::{
        file::{FileContext, content},
        model::{
            Health, Instance, NodeName, Ports, Service, ServiceDefaults, ServiceName, Snapshot,
            Weights,
        },
        store::CatalogStore,
        vip::{VipAllocator, VipPools},
    },
    config::{self, WorkloadConfig, WorkloadRule},
    datapath::{Captured, Refused, cgroup, iptables::conntrack},
    identity::{
        LocalDomain,
        provider::TrustBundle,
        spiffe::{SpiffeId, TrustDomain},
        verify::{ExpectedServer, TrustDomainClients, certificate_identity},
        workload::WorkloadResolver,
    },
    inbound::targets::Targets,
    telemetry::process::resident_in,
};

/// Takes any bytes and panics if something does not hold.
pub type Target = fn(&[u8]);

/// Every target by name. Its seeds are in `fuzz/seeds/<name>`.
pub const TARGETS: &[(&str, Target)] = &[
    ("catalog_hcl", catalog_hcl),
    ("catalog_json", catalog_json),
    ("catalog_yaml", catalog_yaml),
    ("cgroup_path", cgroup_path),
    ("config_toml", config_toml),
    ("connect_decision", connect_decision),
    ("dns_query", dns_query),
    ("kernel_records", kernel_records),
    ("peer_certificate", peer_certificate),
    ("proc_files", proc_files),
    ("server_name", server_name),
    ("sock_diag", sock_diag),
    ("spiffe_id", spiffe_id),
    ("vip_state", vip_state),
];

/// A DNS message of whoever sends one: answered within bounds, forwarded or ignored.
fn dns_query(bytes: &[u8]) {
    crate::dns::testing::bear(bytes);
}

/// A value that is right in the source, or the target panics.
fn right<T: std::str::FromStr<Err: std::fmt::Debug>>(text: &str) -> T {
    #[expect(clippy::expect_used, reason = "of constants of this file")]
    text.parse().expect("a constant of the fuzz targets")
}

/// A catalog file in HCL: read or refused, the same each time.
fn catalog_hcl(bytes: &[u8]) {
    catalog("services.hcl", bytes);
}

/// A catalog file in JSON: read or refused, the same each time.
fn catalog_json(bytes: &[u8]) {
    catalog("services.json", bytes);
}

/// A catalog file in YAML: read or refused, the same each time.
fn catalog_yaml(bytes: &[u8]) {
    catalog("services.yaml", bytes);
}

fn catalog(name: &str, bytes: &[u8]) {
    let Ok(text) = str::from_utf8(bytes) else {
        return;
    };
    let context = FileContext {
        local_node: right("here"),
        local_address: Some(IpAddr::V4(Ipv4Addr::LOCALHOST)),
        tunnel_port: 15_443,
    };
    let read = || content::read(Path::new(name), text, &context);
    assert_eq!(read(), read());
}

/// The configuration: taken, or refused with at least one problem that says something.
fn config_toml(bytes: &[u8]) {
    let Ok(text) = str::from_utf8(bytes) else {
        return;
    };
    match config::read_text(text) {
        Ok(config) => {
            assert!(config.needs_restart(&config).is_empty());
            assert!(!config.capture.cgroups.is_empty());
            assert_ne!(config.capture.port, config.tunnel.port);
        }
        Err(error) => {
            assert!(!error.problems.is_empty());
            assert!(error.problems.iter().all(|p| !p.message.is_empty()));
        }
    }
}

/// Any bytes as fields of fixed width; zeros once they run out.
struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn take<const N: usize>(&mut self) -> [u8; N] {
        let (now, later) = self.0.split_at(N.min(self.0.len()));
        self.0 = later;
        let mut field = [0; N];
        field.iter_mut().zip(now).for_each(|(to, from)| *to = *from);
        field
    }

    fn byte(&mut self) -> u8 {
        let [byte] = self.take();
        byte
    }

    fn u16(&mut self) -> u16 {
        u16::from_le_bytes(self.take())
    }

    fn u32(&mut self) -> u32 {
        u32::from_le_bytes(self.take())
    }

    fn u64(&mut self) -> u64 {
        u64::from_le_bytes(self.take())
    }

    /// Every other address is an IPv4 one.
    fn address(&mut self) -> Address {
        if self.byte().is_multiple_of(2) {
            Address::from_v4_word(self.u32())
        } else {
            Address::from_words([self.u32(), self.u32(), self.u32(), self.u32()])
        }
    }
}

/// What the kernel hands over: a record of the ring buffer, and what was captured of a connection.
fn kernel_records(bytes: &[u8]) {
    if let Some(refused) = Refused::from_record(bytes) {
        assert!(refused.command.chars().count() <= 16);
        assert!(!refused.command.contains('\0'));
        assert_eq!(
            Verdict::from_slot(refused.reason.slot()),
            Some(refused.reason)
        );
        assert_eq!(
            refused.destination.ip(),
            refused.destination.ip().to_canonical()
        );
    }
    let mut fields = Fields(bytes);
    let origin = Origin {
        destination: fields.address(),
        rewritten: fields.address(),
        destination_port: PortBe(fields.u16()),
        rewritten_port: PortBe(fields.u16()),
        uid: fields.u32(),
        service: fields.u64(),
        cgroup: fields.u64(),
        netns: fields.u64(),
        socket_cookie: fields.u64(),
        stamped_ns: fields.u64(),
        check: fields.u64(),
        process: fields.u32(),
        bound_device: fields.u32(),
        role: Role(fields.u16()),
        flags: fields.u16(),
        zero: fields.u32(),
    };
    let captured = Captured::from(origin);
    assert_eq!(
        Address::from_ip(captured.destination.ip()),
        origin.destination
    );
    let port = PortBe::from_host(captured.destination.port());
    assert_eq!(port, origin.destination_port);
}

/// The decision at `connect()`, over map values that may be torn: nothing in a virtual range passes, nothing is
/// captured without a target and a listener, and a value counts only for the key that it was written for.
fn connect_decision(bytes: &[u8]) {
    let mut fields = Fields(bytes);
    let ranges = Ranges {
        v4_network: fields.u32(),
        v4_mask: fields.u32(),
        v6_network: fields.address(),
        v6_mask: fields.address(),
    };
    let (destination, port) = (fields.address(), PortBe(fields.u16()));
    let (service, reachable) = (fields.u64(), fields.byte() % 2 == 1);
    let key = VipKey::new(destination, port);
    let away = Away(u32::from(fields.byte() % 4));
    let target = KernelTarget::new(service, reachable, away);
    let whole = VipValue::new(&key, target);
    assert!(whole.is_for(&key));
    let torn = VipValue {
        target: KernelTarget {
            service: service ^ fields.u64(),
            ..target
        },
        ..whole
    };
    assert!(torn == whole || !torn.is_for(&key));
    let mut facts = Facts {
        class: classify(&destination, &ranges),
        configured: fields.byte() % 2 == 1,
        agent: fields.byte() % 2 == 1,
        vip: found(fields.byte(), whole),
        address: found(fields.byte(), KnownAddress::listed_ports(&destination)),
        listener: PortBe(fields.u16()),
        heartbeat: Heartbeat::default(),
        now_ns: 0,
    };
    if fields.byte() % 2 == 1 && matches!(facts.address, Found::Value(_)) {
        let any_port = KernelTarget::new(!service, fields.byte() % 2 == 1, away);
        facts.address = Found::Value(KnownAddress::any_port(&destination, any_port));
    }
    facts.heartbeat.beat_ns = fields.u64();
    facts.heartbeat.hung_after_ns = fields.u64();
    facts.now_ns = fields.u64();
    let verdict = decide(&facts);
    let is_ours = facts.configured && !facts.agent && facts.target().is_some();
    let may_capture = is_ours
        && facts.target().is_some_and(|target| target.reachable == 1)
        && facts.away().is_none();
    assert!(verdict != Verdict::Captured || may_capture);
    let may_go_around = is_ours && facts.away().is_some_and(Verdict::is_refusal);
    assert!(!matches!(verdict, Verdict::Fallback | Verdict::PassedOpen) || may_go_around);
    let to = Fallback::new(service, fields.address(), PortBe(fields.u16()));
    assert!(to.is_for(service));
    if may_fall_back(&destination, &to, &ranges) {
        assert_ne!(classify(&to.endpoint, &ranges), Class::VipRange);
    }
    let is_sent = matches!(verdict, Verdict::Captured | Verdict::Fallback);
    let goes_on = is_sent || verdict.is_refusal();
    assert!(
        facts.class != Class::VipRange || goes_on,
        "{verdict} of a virtual range"
    );
    if let IpAddr::V4(v4) = destination.to_ip()
        && v4.octets()[0] >= 240
        && !v4.is_broadcast()
    {
        assert_eq!(facts.class, Class::VipRange);
    }
    let spread = Ipv4Addr::from_bits(u32::from_be(loopback_spread(&destination, port)));
    assert!(spread.is_loopback() && spread.octets()[1] != 0);
}

fn found<T>(which: u8, value: T) -> Found<T> {
    match which % 3 {
        0 => Found::Absent,
        1 => Found::Value(value),
        _ => Found::Torn,
    }
}

/// A root whose key was thrown away, and a moment at which it and the seeds are valid.
const ROOT: &[u8] = include_bytes!("../../fuzz/root.der");
const NOW: Duration = Duration::from_secs(1_800_000_000);

struct Verifiers {
    server: ExpectedServer,
    clients: TrustDomainClients,
}

#[expect(clippy::expect_used, reason = "of constants of this file")]
static VERIFIERS: LazyLock<Verifiers> = LazyLock::new(|| {
    let trust_domain: TrustDomain = right("example.org");
    let roots = [CertificateDer::from(ROOT)];
    let bundle = TrustBundle::new(trust_domain, roots).expect("the root of the fuzz targets");
    let crypto = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    Verifiers {
        server: ExpectedServer {
            expected: right("spiffe://example.org/ns/default/dc/dc1/svc/web"),
            roots: Arc::clone(bundle.store()),
            algorithms: crypto.signature_verification_algorithms,
        },
        clients: TrustDomainClients::new(&bundle, &crypto).expect("verifiers of a good root"),
    }
});

/// A peer's certificate, and behind it perhaps another: whoever passes is who was expected.
///
/// The first two bytes are the length of the first certificate; what follows it is the second.
fn peer_certificate(bytes: &[u8]) {
    let mut fields = Fields(bytes);
    let length = usize::from(fields.u16()).min(fields.0.len());
    let (leaf, rest) = fields.0.split_at(length);
    let leaf = CertificateDer::from(leaf);
    let intermediates: Vec<_> = (!rest.is_empty())
        .then(|| CertificateDer::from(rest))
        .into_iter()
        .collect();
    let now = UnixTime::since_unix_epoch(NOW);
    let named = certificate_identity(&leaf);
    let Verifiers { server, clients } = &*VERIFIERS;
    let name = ServerName::IpAddress(Ipv4Addr::LOCALHOST.into());
    if server
        .verify_server_cert(&leaf, &intermediates, &name, &[], now)
        .is_ok()
    {
        assert_eq!(named.as_ref(), Ok(&server.expected));
    }
    if clients
        .verify_client_cert(&leaf, &intermediates, now)
        .is_ok()
    {
        let domain = named.map(|id| id.trust_domain);
        assert_eq!(domain, Ok(server.expected.trust_domain.clone()));
    }
}

/// What `/proc` says of mounts, cgroups and memory: in it are paths and names that others chose.
fn proc_files(bytes: &[u8]) {
    // A root that is not whole, or another file system, never counts.
    if let Some(mount) = cgroup::mount_point(bytes) {
        let says = |word: &[u8]| bytes.windows(word.len()).any(|at| at == word);
        assert!(says(b" - cgroup2"), "{}", mount.display());
    }
    if let Some(own) = cgroup::own_path(bytes) {
        assert!(!own.as_os_str().as_bytes().contains(&b'\n'));
    }
    if let Ok(text) = str::from_utf8(bytes) {
        assert!(resident_in(text).is_none_or(|bytes| bytes.is_multiple_of(1024)));
    }
    // A path of any bytes is read back as the kernel writes it; without a slash it is no mount point.
    let mangled: Vec<u8> = bytes.iter().flat_map(|byte| mangle(*byte)).collect();
    let line = [
        b"31 23 0:27 / /".as_slice(),
        &mangled,
        b" rw - cgroup2 none rw",
    ]
    .concat();
    if !bytes.contains(&0) {
        let path = [b"/".as_slice(), bytes].concat();
        let expected = Path::new(OsStr::from_bytes(&path));
        assert_eq!(cgroup::mount_point(&line).as_deref(), Some(expected));
    }
}

static WORKLOADS: LazyLock<Vec<WorkloadConfig>> = LazyLock::new(|| {
    let rules = [
        ("cgroup", WorkloadRule::Cgroup("/a/b".into())),
        ("unit", WorkloadRule::Unit("web".to_owned())),
        ("slice", WorkloadRule::Unit("batch.slice".to_owned())),
        ("user", WorkloadRule::User(1000)),
    ];
    let workload = |(service, rule)| WorkloadConfig {
        service: right(service),
        instance: None,
        rule,
    };
    rules.into_iter().map(workload).collect()
});

/// The path of a caller's cgroup, of which others choose the last names: a service comes of the names that only
/// root can give, however the rest is called.
fn cgroup_path(bytes: &[u8]) {
    let path = Path::new(OsStr::from_bytes(bytes)).to_owned();
    #[expect(clippy::expect_used, reason = "of constants of this file")]
    let resolver = WorkloadResolver::new(&WORKLOADS, move |_| Some(path.clone()))
        .expect("the rules of the fuzz targets");
    let caller = Captured::from(Origin {
        uid: 1000,
        ..Origin::default()
    });
    let service = resolver.resolve(&caller.maker).map(|name| name.to_string());

    let names: Vec<&[u8]> = bytes
        .split(|byte| *byte == b'/')
        .filter(|name| !matches!(*name, b"" | b"." | b".."))
        .collect();
    let slices = names
        .iter()
        .take_while(|name| name.len() > 6 && name.ends_with(b".slice"))
        .count();
    let unit = names
        .iter()
        .take(slices + 1)
        .rposition(|name| matches!(*name, b"web.service" | b"batch.slice"));
    let expected = match unit {
        Some(at) if at >= 2 || !names.starts_with(&[b"a", b"b"]) => match names.get(at) {
            Some(&b"web.service") => "unit",
            _ => "slice",
        },
        _ if names.starts_with(&[b"a", b"b"]) => "cgroup",
        _ => "user",
    };
    assert_eq!(service.as_deref(), Ok(expected));
}

/// `mangle()` of the kernel's `fs/proc_namespace.c`, which shows mounts.
fn mangle(byte: u8) -> Vec<u8> {
    match byte {
        b' ' | b'\t' | b'\n' | b'\\' => format!("\\{byte:03o}").into_bytes(),
        _ => vec![byte],
    }
}

/// Three instances: two share a port, one is alone at another.
static CHOICE: LazyLock<(Targets, LocalDomain)> = LazyLock::new(|| {
    let node: NodeName = right("here");
    let local = LocalDomain::new(right("example.org"), "dc1".to_owned());
    let services = [("web", 15_443), ("api", 15_443), ("db", 15_444)].map(|(name, port)| {
        let instance = Instance {
            id: right(name),
            node: node.clone(),
            tunnel: SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), port),
            local: SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 80),
            port: 80,
            tags: vec![],
            meta: BTreeMap::new(),
            health: Health::Passing,
            weights: Weights::default(),
            target: None,
        };
        service(right(name), vec![Arc::new(instance)])
    });
    let snapshot = Snapshot {
        is_whole: true,
        services: services.into_iter().collect(),
        intentions: vec![],
        nodes: BTreeMap::new(),
        default_intention: None,
    };
    let (allocator, _no_problem) = VipAllocator::new(pools(), None, Duration::ZERO);
    let store = CatalogStore::new(allocator);
    store.publish(snapshot);
    (
        Targets::new(store.current().instances_on(&node), &local),
        local,
    )
});

fn service(name: ServiceName, instances: Vec<Arc<Instance>>) -> (ServiceName, Arc<Service>) {
    let service = Service {
        name: name.clone(),
        instances,
        explicit_addresses: BTreeSet::new(),
        ports: Ports::Listed(BTreeSet::from([80])),
        defaults: ServiceDefaults::default(),
    };
    (name, Arc::new(service))
}

/// Small, so that names collide, and with the broadcast address in it.
fn pools() -> VipPools {
    VipPools {
        ipv4: right("255.255.255.240/28"),
        ipv6: right("fd00:1::/64"),
    }
}

/// The server name that a peer asks for: it gets whom it named, or nobody.
fn server_name(bytes: &[u8]) {
    let Ok(sni) = str::from_utf8(bytes) else {
        return;
    };
    let (targets, local) = &*CHOICE;
    for port in [15_443, 15_444, 15_445] {
        let Ok(target) = targets.choose(port, Some(sni)) else {
            continue;
        };
        assert_eq!(target.instance.tunnel.port(), port);
        let names = [
            local.service_sni(&target.service),
            local.instance_sni(&target.service, &target.instance.id),
        ];
        assert!(names.iter().any(|name| name.eq_ignore_ascii_case(sni)));
    }
}

/// What the kernel answers about sockets and connections: read or refused, whatever its lengths say.
fn sock_diag(bytes: &[u8]) {
    crate::sock_diag::wire::read_any(bytes);
    conntrack::read_any(bytes);
}

/// The URI of a certificate: an id that parses prints as one that parses to the same.
fn spiffe_id(bytes: &[u8]) {
    let Ok(text) = str::from_utf8(bytes) else {
        return;
    };
    if let Ok(id) = text.parse::<SpiffeId>() {
        let printed = id.to_string();
        // Encoding may make it longer than an id may be.
        if printed.len() <= 2048 {
            assert_eq!(printed.parse(), Ok(id));
        }
    }
    if let Ok(domain) = text.parse::<TrustDomain>() {
        assert_eq!(domain.as_str().parse(), Ok(domain.clone()));
        assert!(!domain.as_str().contains(['/', '%', ':', '@']));
    }
}

/// The state file of virtual addresses: whatever it says, no two services share one and each is of its range.
fn vip_state(bytes: &[u8]) {
    let Ok(mut allocator) = VipAllocator::with_state(pools(), bytes) else {
        return;
    };
    let names = ["web", "api", "db", "x"].map(right::<ServiceName>);
    let snapshot = Snapshot {
        is_whole: true,
        services: names
            .map(|name| service(name, vec![]))
            .into_iter()
            .collect(),
        intentions: vec![],
        nodes: BTreeMap::new(),
        default_intention: None,
    };
    let now: SystemTime = UNIX_EPOCH + NOW;
    let assigned = allocator.assign(&snapshot, now);
    let mut taken = BTreeSet::new();
    for address in assigned.addresses.values().flatten() {
        assert!(taken.insert(*address), "{address} went to two services");
        match address {
            IpAddr::V4(v4) => assert!(pools().ipv4.contains(v4) && !v4.is_broadcast()),
            IpAddr::V6(v6) => assert!(pools().ipv6.contains(v6)),
        }
    }
    let again = allocator.assign(&snapshot, now);
    assert_eq!(again.addresses, assigned.addresses);
}

#[cfg(test)]
mod tests {
    use std::{fs, path::PathBuf};

    use super::*;

    #[test]
    fn every_target_has_seeds() {
        let fuzz = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz");
        let seeds = fs::read_dir(fuzz.join("seeds")).unwrap();
        let seeds: BTreeSet<_> = seeds.map(|entry| entry.unwrap().file_name()).collect();
        let names = TARGETS.iter().map(|(name, _)| OsStr::new(name).to_owned());
        assert_eq!(seeds, names.collect());
    }

    #[test]
    fn every_seed_passes() {
        let fuzz = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz");
        for (name, target) in TARGETS {
            let seeds = fs::read_dir(fuzz.join("seeds").join(name)).unwrap();
            let seeds: Vec<PathBuf> = seeds.map(|seed| seed.unwrap().path()).collect();
            assert!(!seeds.is_empty(), "{name} has no seed");
            for seed in seeds {
                eprintln!("{}", seed.display());
                target(&fs::read(seed).unwrap());
            }
        }
    }

    /// What a fuzzer would try first, without its eye for coverage: the same inputs in each run.
    #[test]
    fn what_is_near_a_seed_passes() {
        const MUTANTS: usize = 1000;
        let fuzz = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz");
        let mut random = fastrand::Rng::with_seed(1);
        for (name, target) in TARGETS {
            let seeds = fs::read_dir(fuzz.join("seeds").join(name)).unwrap();
            let mut seeds: Vec<PathBuf> = seeds.map(|seed| seed.unwrap().path()).collect();
            seeds.sort();
            let seeds: Vec<Vec<u8>> = seeds.iter().map(|seed| fs::read(seed).unwrap()).collect();
            for _ in 0..MUTANTS {
                let mut mutant = random.choice(&seeds).unwrap().clone();
                for _ in 0..random.usize(1..4) {
                    mutate(&mut mutant, random.choice(&seeds).unwrap(), &mut random);
                }
                let kept = mutant.clone();
                let outcome = std::panic::catch_unwind(|| target(&kept));
                assert!(outcome.is_ok(), "{name} fails on {mutant:02x?}");
            }
        }
    }

    fn mutate(bytes: &mut Vec<u8>, other: &[u8], random: &mut fastrand::Rng) {
        let at = random.usize(0..=bytes.len());
        let end = random.usize(at..=bytes.len().min(at + 16));
        match random.u8(0..6) {
            0 => bytes.truncate(at),
            1 => drop(bytes.drain(at..end)),
            2 => bytes.insert(at, random.u8(..)),
            3 => {
                for byte in &mut bytes[at..end] {
                    *byte ^= 1 << random.u8(0..8);
                }
            }
            4 => {
                let twice = bytes[at..end].to_vec();
                bytes.splice(at..at, twice);
            }
            _ => {
                let from = random.usize(0..=other.len());
                bytes.truncate(at);
                bytes.extend_from_slice(&other[from..]);
            }
        }
    }

    #[test]
    fn the_good_certificates_among_the_seeds_are_accepted() {
        let good = include_bytes!("../../fuzz/seeds/peer_certificate/web");
        let leaf = CertificateDer::from(&good[2..]);
        let now = UnixTime::since_unix_epoch(NOW);
        let Verifiers { server, clients } = &*VERIFIERS;
        let name = ServerName::IpAddress(Ipv4Addr::LOCALHOST.into());
        server
            .verify_server_cert(&leaf, &[], &name, &[], now)
            .unwrap();
        clients.verify_client_cert(&leaf, &[], now).unwrap();
    }
}
