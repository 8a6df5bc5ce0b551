//! The names that the catalog gives, and what they lead to. Pure: a catalog, a name and a type in, records out.

#[cfg(test)]
mod tests;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use hickory_proto::{
    op::ResponseCode,
    rr::{
        Name, RData, Record, RecordType,
        rdata::{A, AAAA, NS, PTR, SOA, SRV},
    },
};
use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use super::grammar::{self, Asked};
use crate::catalog::{
    destination::HostName,
    model::{Health, Instance, NodeName, Ports, Service, ServiceName},
    store::Catalog,
};

/// What `<service>.service` and `<service>.connect` lead to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ServiceAnswers {
    /// To the service's virtual addresses, so that its connections are captured.
    Virtual,
    /// To its instances, as with Consul's own DNS.
    Instances,
}

/// What an operator decides about the names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ZoneSettings {
    /// The domain that all names are below.
    pub domain: Name,
    /// How long an answer may be kept, also a negative one.
    pub ttl: Duration,
    /// What services' names lead to.
    pub service_answers: ServiceAnswers,
    /// Names may end with this datacenter; of others nothing is known here.
    pub datacenter: String,
    /// Where virtual addresses are taken from: their reverse names are ours, given out or not.
    pub ranges: (Ipv4Net, Ipv6Net),
    /// Where the name server is.
    pub name_servers: Vec<IpAddr>,
    /// Whether somebody else answers for the domain too: Consul, which knows every service, instance and node. Then only
    /// names that lead to virtual addresses are ours.
    pub shared: bool,
}

/// An answer, short of what the query says itself.
#[derive(Debug, Clone, PartialEq)]
pub struct Answer {
    /// The response code.
    pub code: ResponseCode,
    /// The answer section.
    pub answers: Vec<Record>,
    /// The authority section.
    pub authorities: Vec<Record>,
    /// The additional section.
    pub additionals: Vec<Record>,
}

impl Answer {
    /// Nothing but a code.
    pub fn only(code: ResponseCode) -> Self {
        Self {
            code,
            answers: vec![],
            authorities: vec![],
            additionals: vec![],
        }
    }
}

/// All names of one version of the catalog.
#[derive(Debug)]
pub struct Zone {
    settings: Arc<ZoneSettings>,
    catalog: Arc<Catalog>,
    ttl: u32,
    serial: u32,
    /// By their names in lower case: DNS knows no other difference.
    services: HashMap<String, ServiceName>,
    nodes: HashMap<String, (NodeName, IpAddr)>,
    virtual_addresses: HashMap<IpAddr, ServiceName>,
    /// Services outside the mesh by the names of their hosts.
    hosts: HashMap<HostName, ServiceName>,
}

/// Where an answer about an instance leads.
#[derive(Debug, Clone, Copy)]
enum Through {
    /// The application's own port.
    Application,
    /// The port that takes tunnels for it.
    Tunnel,
}

impl Zone {
    /// The names of `catalog`.
    pub fn new(settings: Arc<ZoneSettings>, catalog: Arc<Catalog>) -> Self {
        let mut services = HashMap::new();
        for name in catalog.snapshot.services.keys() {
            // Of two that DNS cannot tell apart, the first has the name.
            services
                .entry(name.as_str().to_ascii_lowercase())
                .or_insert_with(|| name.clone());
        }
        let mut nodes = HashMap::new();
        for (name, address) in &catalog.snapshot.nodes {
            nodes
                .entry(name.as_str().to_ascii_lowercase())
                .or_insert_with(|| (name.clone(), *address));
        }
        let virtual_addresses = catalog
            .addresses
            .iter()
            .flat_map(|(name, addresses)| addresses.iter().map(|a| (*a, name.clone())))
            .collect();
        let mut hosts = HashMap::new();
        for service in catalog.snapshot.services.values() {
            let host = service.destination().and_then(|it| it.host());
            if let Some(host) = host {
                hosts
                    .entry(host.clone())
                    .or_insert_with(|| service.name.clone());
            }
        }
        let published = catalog.published_at.unwrap_or(UNIX_EPOCH);
        Self {
            ttl: u32::try_from(settings.ttl.as_secs()).unwrap_or(u32::MAX),
            serial: seconds(published),
            services,
            nodes,
            virtual_addresses,
            hosts,
            settings,
            catalog,
        }
    }

    /// The settings it was made by.
    pub fn settings(&self) -> &Arc<ZoneSettings> {
        &self.settings
    }

    /// What `name` leads to; `None` if it is for somebody else to say. `turn` says who comes first: it rises with each
    /// query.
    pub fn answer(&self, name: &Name, query: RecordType, turn: usize) -> Option<Answer> {
        let in_domain = self.settings.domain.zone_of(name);
        if matches!(query, RecordType::AXFR | RecordType::IXFR) {
            let is_ours = in_domain && !self.settings.shared || self.reverse(name).is_some();
            return is_ours.then(|| Answer::only(ResponseCode::Refused));
        }
        if in_domain {
            let apex = name.trim_to(usize::from(self.settings.domain.num_labels()));
            let asking = Asking {
                zone: self,
                name,
                apex,
                query,
                turn,
            };
            return if self.settings.shared {
                asking.virtual_answer()
            } else {
                Some(asking.answer())
            };
        }
        self.answer_host(name, query, turn).or_else(|| {
            let network = self.reverse(name)?;
            Some(self.answer_reverse(name, network, query))
        })
    }

    /// The answer for the host of a service outside the mesh: the service's virtual addresses. Other records are for
    /// others to tell, but not those that have addresses in them (RFC 9460).
    fn answer_host(&self, name: &Name, query: RecordType, turn: usize) -> Option<Answer> {
        let is_ours = matches!(
            query,
            RecordType::A
                | RecordType::AAAA
                | RecordType::ANY
                | RecordType::HTTPS
                | RecordType::SVCB
        );
        if !is_ours || self.hosts.is_empty() {
            return None;
        }
        let host: HostName = name.to_ascii().parse().ok()?;
        let service = self.catalog.service(self.hosts.get(&host)?)?;
        let asking = Asking {
            zone: self,
            name,
            apex: name.clone(),
            query,
            turn,
        };
        Some(asking.virtual_addresses(service))
    }

    /// The service that `name` would lead to if the mesh has it, in a [shared](ZoneSettings::shared) domain. `None` if
    /// the catalog has it already.
    pub fn might_lead_to(&self, name: &Name, query: RecordType) -> Option<ServiceName> {
        let settings = &self.settings;
        if !settings.shared || !settings.domain.zone_of(name) {
            return None;
        }
        let service = self.virtually(&self.labels(name)?, query)?;
        let is_known = self.services.contains_key(&service);
        service.parse().ok().filter(|_| !is_known)
    }

    /// The service whose virtual addresses a name of a shared domain leads to.
    fn virtually(&self, labels: &[String], query: RecordType) -> Option<String> {
        let by_default = self.settings.service_answers == ServiceAnswers::Virtual;
        match grammar::read(labels, query == RecordType::SRV) {
            Asked::Virtual { service } => Some(service),
            Asked::Service {
                service,
                tag: None,
                datacenter,
            }
            | Asked::Connect {
                service,
                datacenter,
            } => (by_default && self.is_here(datacenter.as_deref())).then_some(service),
            Asked::Apex
            | Asked::NameServer
            | Asked::Branch
            | Asked::Service { .. }
            | Asked::Node { .. }
            | Asked::Address { .. }
            | Asked::Nothing => None,
        }
    }

    /// The labels before the domain, in lower case; `None` if a name of the catalog cannot have them.
    fn labels(&self, name: &Name) -> Option<Vec<String>> {
        let count = name.num_labels() - self.settings.domain.num_labels();
        let labels = name.iter().take(usize::from(count));
        labels
            .map(|label| {
                let text = str::from_utf8(label).ok()?;
                let plain = !text.contains('.');
                plain.then(|| text.to_ascii_lowercase())
            })
            .collect()
    }

    /// The virtual address, or the network of them, whose reverse name this is.
    fn reverse(&self, name: &Name) -> Option<IpNet> {
        let network = name.parse_arpa_name().ok()?;
        let in_range = match network {
            IpNet::V4(network) => self.settings.ranges.0.contains(&network),
            IpNet::V6(network) => self.settings.ranges.1.contains(&network),
        };
        let given = network.prefix_len() == network.max_prefix_len()
            && self.virtual_addresses.contains_key(&network.addr());
        (in_range || given).then_some(network)
    }

    fn answer_reverse(&self, name: &Name, network: IpNet, query: RecordType) -> Answer {
        let is_address = network.prefix_len() == network.max_prefix_len();
        let service = is_address
            .then(|| self.virtual_addresses.get(&network.addr()))
            .flatten();
        let target = service.and_then(|service| self.name_of(service.as_str(), "virtual"));
        let mut answer = Answer::only(ResponseCode::NoError);
        match target {
            Some(target) if matches!(query, RecordType::PTR | RecordType::ANY) => {
                answer
                    .answers
                    .push(self.record(name, RData::PTR(PTR(target))));
                return answer;
            }
            None if is_address => answer.code = self.missing(),
            Some(_) | None => {}
        }
        // The zone is cut where the range ends, at the next label.
        let labels = match network {
            IpNet::V4(_) => 2 + usize::from(self.settings.ranges.0.prefix_len().div_ceil(8)),
            IpNet::V6(_) => 2 + usize::from(self.settings.ranges.1.prefix_len().div_ceil(4)),
        };
        let labels = labels.min(usize::from(name.num_labels()));
        answer.authorities.push(self.soa(&name.trim_to(labels)));
        answer
    }

    /// What is not there. It may only be unread as long as the catalog was not read whole.
    fn missing(&self) -> ResponseCode {
        if self.catalog.snapshot.is_whole {
            ResponseCode::NXDomain
        } else {
            ResponseCode::ServFail
        }
    }

    fn record(&self, name: &Name, data: RData) -> Record {
        Record::from_rdata(name.clone(), self.ttl, data)
    }

    /// RFC 2308: what says how long a negative answer holds.
    fn soa(&self, apex: &Name) -> Record {
        let domain = &self.settings.domain;
        let below = |label: &str| {
            domain
                .prepend_label(label)
                .unwrap_or_else(|_| domain.clone())
        };
        let soa = SOA::new(
            below("ns"),
            below("hostmaster"),
            self.serial,
            3600,
            600,
            86_400,
            self.ttl,
        );
        self.record(apex, RData::SOA(soa))
    }

    /// `<text>.<kind>.<domain>`; `None` if that is too long for DNS.
    fn name_of(&self, text: &str, kind: &str) -> Option<Name> {
        let labels = text.split('.').chain(kind.split('.'));
        let labels: Vec<&[u8]> = labels.map(str::as_bytes).collect();
        let name = Name::from_labels(labels).ok()?;
        name.append_domain(&self.settings.domain).ok()
    }

    fn service(&self, name: &str) -> Option<&Arc<Service>> {
        self.catalog.service(self.services.get(name)?)
    }

    fn addresses(&self, service: &ServiceName) -> impl Iterator<Item = IpAddr> {
        self.catalog
            .addresses
            .get(service)
            .into_iter()
            .flatten()
            .copied()
    }

    fn is_here(&self, datacenter: Option<&str>) -> bool {
        datacenter.is_none_or(|named| named.eq_ignore_ascii_case(&self.settings.datacenter))
    }
}

/// One name asked for, while its answer is made.
struct Asking<'a> {
    zone: &'a Zone,
    name: &'a Name,
    /// The domain as it was spelled in the name.
    apex: Name,
    query: RecordType,
    turn: usize,
}

impl Asking<'_> {
    fn answer(&self) -> Answer {
        let Some(labels) = self.zone.labels(self.name) else {
            return self.negative(self.zone.missing());
        };
        let here = |datacenter: &Option<String>| self.zone.is_here(datacenter.as_deref());
        match grammar::read(&labels, self.query == RecordType::SRV) {
            Asked::Apex => self.apex(),
            Asked::NameServer => self.addresses(self.zone.settings.name_servers.iter().copied()),
            Asked::Branch => self.negative(ResponseCode::NoError),
            Asked::Virtual { service } => match self.zone.service(&service) {
                Some(service) => self.virtual_addresses(service),
                None => self.negative(self.zone.missing()),
            },
            Asked::Service { datacenter, .. }
            | Asked::Connect { datacenter, .. }
            | Asked::Node { datacenter, .. }
                if !here(&datacenter) =>
            {
                // Not known here is not known to be absent.
                Answer::only(ResponseCode::ServFail)
            }
            Asked::Service { service, tag, .. } => {
                self.service(&service, tag.as_deref(), Through::Application)
            }
            Asked::Connect { service, .. } => self.service(&service, None, Through::Tunnel),
            Asked::Node { node, .. } => match self.zone.nodes.get(&node) {
                Some((_, address)) => self.addresses([*address]),
                None => self.negative(self.zone.missing()),
            },
            Asked::Address { digits } => match address(&digits) {
                Some(address) => self.addresses([address]),
                None => self.negative(ResponseCode::NXDomain),
            },
            Asked::Nothing => self.negative(self.zone.missing()),
        }
    }

    /// The answer where the domain is shared: what leads to a virtual address of a service that the catalog has.
    fn virtual_answer(&self) -> Option<Answer> {
        let labels = self.zone.labels(self.name)?;
        let service = self.zone.virtually(&labels, self.query)?;
        let service = self.zone.service(&service)?;
        let is_virtual = labels.last().is_some_and(|kind| kind == "virtual");
        Some(if self.query == RecordType::SRV && !is_virtual {
            self.virtual_ports(service)
        } else {
            self.virtual_addresses(service)
        })
    }

    fn negative(&self, code: ResponseCode) -> Answer {
        let mut answer = Answer::only(code);
        if code != ResponseCode::ServFail {
            answer.authorities.push(self.zone.soa(&self.apex));
        }
        answer
    }

    fn apex(&self) -> Answer {
        let mut answer = Answer::only(ResponseCode::NoError);
        let any = self.query == RecordType::ANY;
        if any || self.query == RecordType::SOA {
            answer.answers.push(self.zone.soa(&self.apex));
        }
        let host = self.apex.prepend_label("ns");
        if let Ok(host) = host
            && (any || self.query == RecordType::NS)
        {
            for address in &self.zone.settings.name_servers {
                answer
                    .additionals
                    .push(self.zone.record(&host, data(*address)));
            }
            let ns = self.zone.record(&self.apex, RData::NS(NS(host)));
            answer.answers.push(ns);
        }
        if answer.answers.is_empty() {
            return self.negative(ResponseCode::NoError);
        }
        answer
    }

    /// These addresses, as far as the type asks for them.
    fn addresses(&self, addresses: impl IntoIterator<Item = IpAddr>) -> Answer {
        let mut answer = Answer::only(ResponseCode::NoError);
        let mut seen = BTreeSet::new();
        for address in addresses {
            let own = match address {
                IpAddr::V4(_) => RecordType::A,
                IpAddr::V6(_) => RecordType::AAAA,
            };
            let wanted = self.query == own || self.query == RecordType::ANY;
            if wanted && seen.insert(address) {
                answer
                    .answers
                    .push(self.zone.record(self.name, data(address)));
            }
        }
        if answer.answers.is_empty() {
            return self.negative(ResponseCode::NoError);
        }
        answer
    }

    fn virtual_addresses(&self, service: &Service) -> Answer {
        let mut addresses = self.zone.addresses(&service.name).peekable();
        if addresses.peek().is_none() {
            // It has a name but got no address: a fault that passes, not a name without one.
            return Answer::only(ResponseCode::ServFail);
        }
        self.addresses(addresses)
    }

    fn service(&self, name: &str, tag: Option<&str>, through: Through) -> Answer {
        let Some(service) = self.zone.service(name) else {
            return self.negative(self.zone.missing());
        };
        // A tag picks instances, which a virtual address cannot.
        let virtually = self.zone.settings.service_answers == ServiceAnswers::Virtual;
        if virtually && tag.is_none() {
            return if self.query == RecordType::SRV {
                self.virtual_ports(service)
            } else {
                self.virtual_addresses(service)
            };
        }
        let mut instances: Vec<&Instance> = service
            .instances
            .iter()
            .map(Arc::as_ref)
            .filter(|instance| instance.health != Health::Critical)
            // What stands in for it is another service, with names of its own.
            .filter(|instance| instance.target.is_none())
            .filter(|instance| tag.is_none_or(|tag| has_tag(instance, tag)))
            .collect();
        if instances.is_empty() {
            return self.negative(self.zone.missing());
        }
        let first = self.turn.checked_rem(instances.len()).unwrap_or(0);
        instances.rotate_left(first);
        if self.query == RecordType::SRV {
            return self.instance_ports(&instances, through);
        }
        self.addresses(instances.iter().map(|instance| instance.tunnel.ip()))
    }

    /// The ports of the virtual addresses: those that answer, or those of the instances if every one does.
    fn virtual_ports(&self, service: &Service) -> Answer {
        let ports: BTreeSet<u16> = match &service.ports {
            Ports::Listed(ports) => ports.clone(),
            Ports::Any => service.instances.iter().map(|i| i.port).collect(),
        };
        let target = self.zone.name_of(service.name.as_str(), "virtual");
        let (Some(target), false) = (target, ports.is_empty()) else {
            return self.negative(ResponseCode::NoError);
        };
        let mut answer = Answer::only(ResponseCode::NoError);
        for port in ports {
            let srv = SRV::new(1, 1, port, target.clone());
            answer
                .answers
                .push(self.zone.record(self.name, RData::SRV(srv)));
        }
        for address in self.zone.addresses(&service.name) {
            answer
                .additionals
                .push(self.zone.record(&target, data(address)));
        }
        answer
    }

    fn instance_ports(&self, instances: &[&Instance], through: Through) -> Answer {
        let mut answer = Answer::only(ResponseCode::NoError);
        let mut told: BTreeMap<Name, IpAddr> = BTreeMap::new();
        for instance in instances {
            let address = instance.tunnel.ip();
            let port = match through {
                Through::Application => instance.port,
                Through::Tunnel => instance.tunnel.port(),
            };
            let Some(target) = self.target(instance, address) else {
                continue;
            };
            let weight = u16::try_from(instance.weight()).unwrap_or(u16::MAX);
            let srv = SRV::new(1, weight, port, target.clone());
            answer
                .answers
                .push(self.zone.record(self.name, RData::SRV(srv)));
            if told.insert(target.clone(), address).is_none() {
                answer
                    .additionals
                    .push(self.zone.record(&target, data(address)));
            }
        }
        if answer.answers.is_empty() {
            return self.negative(ResponseCode::NoError);
        }
        answer
    }

    /// As Consul names it: by the node, or by its address if that is another than the node's.
    fn target(&self, instance: &Instance, address: IpAddr) -> Option<Name> {
        let node = instance.node.as_str();
        let of_node = self.zone.nodes.get(&node.to_ascii_lowercase());
        let datacenter = self.zone.settings.datacenter.to_ascii_lowercase();
        let of_datacenter = |kind: &str| format!("{kind}.{datacenter}");
        match of_node {
            Some((node, known)) if *known == address => {
                self.zone.name_of(node.as_str(), &of_datacenter("node"))
            }
            _ => self.zone.name_of(&digits(address), &of_datacenter("addr")),
        }
    }
}

fn has_tag(instance: &Instance, tag: &str) -> bool {
    instance
        .tags
        .iter()
        .any(|own| own.eq_ignore_ascii_case(tag))
}

fn data(address: IpAddr) -> RData {
    match address {
        IpAddr::V4(v4) => RData::A(A(v4)),
        IpAddr::V6(v6) => RData::AAAA(AAAA(v6)),
    }
}

/// As Consul writes addresses in names: 8 or 32 hexadecimal digits.
fn address(digits: &str) -> Option<IpAddr> {
    let plain = digits.bytes().all(|b| b.is_ascii_hexdigit());
    let number = u128::from_str_radix(digits, 16).ok()?;
    match digits.len() {
        8 if plain => Some(Ipv4Addr::from_bits(u32::try_from(number).ok()?).into()),
        32 if plain => Some(Ipv6Addr::from_bits(number).into()),
        _ => None,
    }
}

fn digits(address: IpAddr) -> String {
    match address {
        IpAddr::V4(v4) => format!("{:08x}", v4.to_bits()),
        IpAddr::V6(v6) => format!("{:032x}", v6.to_bits()),
    }
}

/// Seconds since 1970, which grow from version to version also over restarts; they wrap as serial numbers do.
fn seconds(time: SystemTime) -> u32 {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    u32::try_from(since.as_secs() & u64::from(u32::MAX)).unwrap_or(0)
}
