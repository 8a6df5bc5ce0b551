//! The rules, as text for `iptables-restore`. Pure.
//!
//! ```text
//! filter  OUTPUT -> SIDESTEP_OUTPUT -> SIDESTEP_REFUSE   what is not captured and may not pass: reset
//! nat     OUTPUT -> SIDESTEP_OUTPUT -> SIDESTEP_CAPTURE  what is captured: to the listener on loopback
//!                                   -> SIDESTEP_VIRTUAL  the same, of the ranges: others do not walk through it
//! ```
//!
//! `OUTPUT` hands over first packets only, and `SIDESTEP_OUTPUT` those of processes below an attach point. The nat table
//! comes first in the kernel: what it redirected has another destination when the filter sees it, and everything else
//! that is aimed at a virtual address is refused there. So an address that nobody knows is refused without a rule of
//! its own.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write as _,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    path::{Path, PathBuf},
};

use ipnet::{IpNet, Ipv4Net};
use sidestep_abi::{Address, PortBe, loopback_spread};

use crate::datapath::{VipRanges, VipTargets};

const OUTPUT: &str = "SIDESTEP_OUTPUT";
const REFUSE: &str = "SIDESTEP_REFUSE";
const CAPTURE: &str = "SIDESTEP_CAPTURE";
const VIRTUAL: &str = "SIDESTEP_VIRTUAL";

/// The tables, and our chains in them. Refusing comes before capturing, so that nothing is let through between the two.
const TABLES: [(&str, &[&str]); 2] = [
    ("filter", &[OUTPUT, REFUSE]),
    ("nat", &[OUTPUT, CAPTURE, VIRTUAL]),
];

/// How our rules begin. A connection that there was before goes on: only a first packet can be aimed anew.
const JUMP: &str = "-I OUTPUT 1 -p tcp -m tcp --syn -j SIDESTEP_OUTPUT";

/// IPv4 and IPv6 have their own rules.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Family {
    V4,
    V6,
}

impl Family {
    fn of(self, address: IpAddr) -> bool {
        (self == Self::V4) == address.is_ipv4()
    }
}

/// Whom to capture, and where to.
#[derive(Debug, Clone)]
pub(super) struct Scope {
    /// Below the cgroup2 mount.
    pub(super) attach_points: Vec<PathBuf>,
    /// The agent's own, likewise.
    pub(super) agent: PathBuf,
    pub(super) ranges: VipRanges,
    /// The listener's.
    pub(super) port: u16,
}

impl Scope {
    /// What belongs to the virtual addresses whether or not somebody has it.
    pub(super) fn ranges(&self, family: Family) -> Vec<IpNet> {
        match family {
            Family::V4 => {
                // Class E is one whatever is configured.
                let class_e = Ipv4Net::new_assert(Ipv4Addr::new(240, 0, 0, 0), 4);
                let configured = self.ranges.ipv4;
                let mut ranges = vec![class_e.into()];
                if !class_e.contains(&configured) {
                    ranges.push(configured.into());
                }
                ranges
            }
            Family::V6 => vec![self.ranges.ipv6.into()],
        }
    }

    fn is_in_range(&self, address: IpAddr) -> bool {
        [Family::V4, Family::V6]
            .iter()
            .flat_map(|family| self.ranges(*family))
            .any(|range| range.contains(&address))
    }
}

/// The content of our chains: refuses what it does not know, and `known` addresses outside of the ranges too.
///
/// Loopback is the host itself and never touched.
pub(super) fn content(
    scope: &Scope,
    family: Family,
    desired: &VipTargets,
    known: &BTreeSet<IpAddr>,
) -> BTreeMap<&'static str, String> {
    let ours = |address: IpAddr| family.of(address) && !address.is_loopback();
    let mut closed: BTreeSet<IpAddr> = known.clone();
    closed.extend(desired.ports.keys().map(SocketAddr::ip));
    closed.extend(desired.any_port.keys());
    closed.retain(|address| {
        ours(*address) && !scope.is_in_range(*address) && !desired.real.contains(address)
    });

    let agent = quoted(&scope.agent);
    let [mut filter, mut nat] = [REFUSE, CAPTURE].map(|chain| {
        let mut text = String::new();
        for path in &scope.attach_points {
            let path = quoted(path);
            line(
                &mut text,
                &format!("-A {OUTPUT} -m cgroup --path {path} -j {chain}"),
            );
        }
        text
    });
    let refuse = |to: &str| format!("-A {REFUSE} -d {to} -p tcp -j REJECT --reject-with tcp-reset");
    for range in scope.ranges(family) {
        line(&mut filter, &refuse(&range.to_string()));
    }
    // The agent may have to do with the real thing behind an address outside of them.
    for (text, chain) in [(&mut filter, REFUSE), (&mut nat, CAPTURE)] {
        line(
            text,
            &format!("-A {chain} -m cgroup --path {agent} -j RETURN"),
        );
    }
    for address in closed {
        line(&mut filter, &refuse(&address.to_string()));
    }
    for at in desired.ports.keys().filter(|at| ours(at.ip())) {
        if desired.real.contains(&at.ip()) {
            let (address, port) = (at.ip(), at.port());
            let rule = format!(
                "-A {REFUSE} -d {address} -p tcp -m tcp --dport {port} -j REJECT --reject-with tcp-reset"
            );
            line(&mut filter, &rule);
        }
    }
    for range in scope.ranges(family) {
        line(&mut nat, &format!("-A {CAPTURE} -d {range} -j {VIRTUAL}"));
    }
    let mut capture = |at: SocketAddr, of_port: &str, action: &str| {
        let address = at.ip();
        let chain = if scope.is_in_range(address) {
            VIRTUAL
        } else {
            CAPTURE
        };
        if ours(address) {
            line(
                &mut nat,
                &format!("-A {chain} -d {address} -p tcp{of_port} {action}"),
            );
        }
    };
    let to = |at| format!("-j DNAT --to-destination {}", listener(at, scope.port));
    for (at, target) in &desired.ports {
        let of_port = format!(" -m tcp --dport {}", at.port());
        if target.reachable {
            capture(*at, &of_port, &to(*at));
        } else if desired.any_port.contains_key(&at.ip()) {
            // Not by who answers at the others.
            capture(*at, &of_port, "-j RETURN");
        }
    }
    for (address, _) in desired
        .any_port
        .iter()
        .filter(|(_, target)| target.reachable)
    {
        let at = (*address, 0).into();
        capture(at, "", &to(at));
    }
    BTreeMap::from([("filter", filter), ("nat", nat)])
}

/// Where the listener is met by who is aimed at `destination`: all of 127.0.0.0/8, and `::1`.
///
/// Different destinations get different addresses, as by the programs: connections that differ in their destination
/// alone must not become the same.
fn listener(destination: SocketAddr, port: u16) -> SocketAddr {
    let ip: IpAddr = match destination.ip() {
        IpAddr::V4(v4) => {
            let address = Address::from_ip(v4.into());
            let spread = loopback_spread(&address, PortBe::from_host(destination.port()));
            Ipv4Addr::from_bits(u32::from_be(spread)).into()
        }
        IpAddr::V6(_) => Ipv6Addr::LOCALHOST.into(),
    };
    (ip, port).into()
}

fn line(text: &mut String, rule: &str) {
    // Writing to a string does not fail.
    let _written = writeln!(text, "{rule}");
}

/// As `iptables-restore` reads one argument.
fn quoted(path: &Path) -> String {
    let path = path.to_string_lossy();
    format!("\"{}\"", path.replace('\\', "\\\\").replace('"', "\\\""))
}

/// What is there of ours already.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct Present(BTreeMap<String, Table>);

#[derive(Debug, Clone, PartialEq, Eq, Default)]
struct Table {
    chains: BTreeSet<String>,
    /// Rules of `OUTPUT` that jump to our chain, as they are, and whether the first rule of all is one.
    jumps: Vec<String>,
    is_first: bool,
    /// Single addresses that our chains name.
    addresses: BTreeSet<IpAddr>,
}

impl Present {
    /// From what `iptables-save` prints.
    pub(super) fn read(saved: &str) -> Self {
        let mut tables = BTreeMap::<String, Table>::new();
        let (mut name, mut rules) = (String::new(), 0);
        for text in saved.lines() {
            if let Some(table) = text.strip_prefix('*') {
                (name, rules) = (table.trim().to_owned(), 0);
                continue;
            }
            let table = tables.entry(name.clone()).or_default();
            let words: Vec<&str> = text.split_whitespace().collect();
            match words.as_slice() {
                [chain, ..] if chain.starts_with(":SIDESTEP_") => {
                    table
                        .chains
                        .insert(chain.trim_start_matches(':').to_owned());
                }
                ["-A", "OUTPUT", rule @ ..] => {
                    if rule.ends_with(&["-j", OUTPUT]) {
                        table.jumps.push(rule.join(" "));
                        table.is_first |= rules == 0;
                    }
                    rules += 1;
                }
                ["-A", chain, "-d", destination, ..] if chain.starts_with("SIDESTEP_") => {
                    let single = destination.parse::<IpNet>().ok();
                    let single = single.filter(|net| net.prefix_len() == net.max_prefix_len());
                    table.addresses.extend(single.map(|net| net.addr()));
                }
                _ => {}
            }
        }
        tables.retain(|_, table| !table.chains.is_empty());
        Self(tables)
    }

    /// Whether there is nothing.
    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The single addresses that the rules name.
    pub(super) fn addresses(&self) -> BTreeSet<IpAddr> {
        let tables = self.0.values();
        tables.flat_map(|table| &table.addresses).copied().collect()
    }

    /// Removes all of it, and nothing else.
    pub(super) fn removal(&self) -> String {
        let mut text = String::new();
        for (name, table) in &self.0 {
            line(&mut text, &format!("*{name}"));
            for jump in &table.jumps {
                line(&mut text, &format!("-D OUTPUT {jump}"));
            }
            // A chain goes when nothing jumps to it.
            for action in ["-F", "-X"] {
                for chain in &table.chains {
                    line(&mut text, &format!("{action} {chain}"));
                }
            }
            line(&mut text, "COMMIT");
        }
        text
    }
}

/// Puts `content` in force: each table at once. With `present`, `OUTPUT` jumps to our chains afterwards, once and
/// first; without, that is left alone.
pub(super) fn replacement(
    content: &BTreeMap<&'static str, String>,
    present: Option<&Present>,
) -> String {
    let mut text = String::new();
    for (name, chains) in TABLES {
        line(&mut text, &format!("*{name}"));
        for chain in chains {
            // Naming a chain makes it, or empties it.
            line(&mut text, &format!(":{chain} - [0:0]"));
        }
        text.push_str(content.get(name).map_or("", String::as_str));
        if let Some(present) = present {
            let none = Table::default();
            let table = present.0.get(name).unwrap_or(&none);
            if !(table.is_first && table.jumps.len() == 1) {
                for jump in &table.jumps {
                    line(&mut text, &format!("-D OUTPUT {jump}"));
                }
                line(&mut text, JUMP);
            }
        }
        line(&mut text, "COMMIT");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::datapath::{ServiceId, VipTarget};

    fn scope() -> Scope {
        Scope {
            attach_points: vec!["/mesh".into(), "/other \"one\"".into()],
            agent: "/agent".into(),
            ranges: VipRanges {
                ipv4: "240.0.0.0/8".parse().unwrap(),
                ipv6: "fd00:1::/64".parse().unwrap(),
            },
            port: 15_001,
        }
    }

    fn target(reachable: bool) -> VipTarget {
        let service = ServiceId(1);
        VipTarget {
            service,
            reachable,
            away: crate::config::AwayPolicy::Closed,
        }
    }

    fn desired(destinations: &[(&str, bool)]) -> VipTargets {
        let targets = destinations.iter();
        let targets = targets.map(|(at, reachable)| (at.parse().unwrap(), target(*reachable)));
        VipTargets {
            ports: targets.collect(),
            ..VipTargets::default()
        }
    }

    #[test]
    fn of_a_host_outside_only_the_ports_that_are_listed_are_ours() {
        let mut desired = desired(&[("192.0.2.7:443", true), ("192.0.2.8:443", true)]);
        desired.real.insert("192.0.2.7".parse().unwrap());
        let v4 = content(&scope(), Family::V4, &desired, &BTreeSet::new());
        let of = |table: &str, address: &str| -> Vec<String> {
            let lines = v4[table].lines().filter(|line| line.contains(address));
            lines.map(str::to_owned).collect()
        };
        let refuse = "-A SIDESTEP_REFUSE -d 192.0.2.7 -p tcp -m tcp --dport 443 -j REJECT --reject-with tcp-reset";
        assert_eq!(of("filter", "192.0.2.7"), [refuse]);
        let whole = "-A SIDESTEP_REFUSE -d 192.0.2.8 -p tcp -j REJECT --reject-with tcp-reset";
        assert_eq!(of("filter", "192.0.2.8"), [whole]);
        for address in ["192.0.2.7", "192.0.2.8"] {
            let [captured] = of("nat", address).try_into().unwrap();
            assert!(captured.contains("--dport 443 -j DNAT"), "{captured}");
        }
    }

    #[test]
    fn every_port_of_an_address_goes_to_who_has_it_but_those_of_others() {
        let mut desired = desired(&[("240.0.0.5:80", true), ("240.0.0.5:81", false)]);
        for (address, reachable) in [("240.0.0.5", true), ("240.0.0.6", false)] {
            let address = address.parse().unwrap();
            desired.any_port.insert(address, target(reachable));
        }
        let v4 = content(&scope(), Family::V4, &desired, &BTreeSet::new());
        let rules: Vec<&str> = v4["nat"]
            .lines()
            .filter_map(|rule| rule.strip_prefix("-A SIDESTEP_VIRTUAL -d "))
            .map(|rule| rule.split(" --to").next().unwrap())
            .collect();
        assert_eq!(
            rules,
            [
                "240.0.0.5 -p tcp -m tcp --dport 80 -j DNAT",
                "240.0.0.5 -p tcp -m tcp --dport 81 -j RETURN",
                "240.0.0.5 -p tcp -j DNAT",
            ]
        );
    }

    #[test]
    fn known_ports_are_captured_and_the_rest_of_the_range_is_refused() {
        let desired = desired(&[
            ("240.0.0.5:80", true),
            ("240.0.0.5:443", true),
            ("240.0.0.5:81", false),
            ("10.96.0.1:80", true),
            ("10.96.0.2:80", false),
            ("127.0.0.1:80", true),
            ("[fd00:1::5]:80", true),
        ]);
        let v4 = content(&scope(), Family::V4, &desired, &BTreeSet::new());
        let ends = |before: &str, between: [&str; 2]| -> Vec<String> {
            let rules = v4[between[0]].lines();
            let rules = rules.filter_map(|rule| rule.strip_prefix(before));
            rules
                .map(|rule| rule.split(between[1]).next().unwrap().to_owned())
                .collect()
        };
        assert_eq!(
            ends("-A SIDESTEP_OUTPUT ", ["nat", " -j"]),
            [
                "-m cgroup --path \"/mesh\"",
                "-m cgroup --path \"/other \\\"one\\\"\""
            ]
        );
        assert_eq!(
            ends("-A SIDESTEP_CAPTURE ", ["nat", " -j"]),
            [
                "-m cgroup --path \"/agent\"",
                "-d 240.0.0.0/4",
                "-d 10.96.0.1 -p tcp -m tcp --dport 80",
            ]
        );
        assert_eq!(
            ends("-A SIDESTEP_VIRTUAL ", ["nat", " -j"]),
            [
                "-d 240.0.0.5 -p tcp -m tcp --dport 80",
                "-d 240.0.0.5 -p tcp -m tcp --dport 443",
            ]
        );
        let listeners: BTreeSet<&str> = v4["nat"]
            .lines()
            .filter_map(|rule| rule.split("--to-destination ").nth(1))
            .collect();
        assert_eq!(listeners.len(), 3, "{listeners:?}");
        assert!(
            listeners
                .iter()
                .all(|at| at.starts_with("127.") && at.ends_with(":15001"))
        );
        let refused = ends("-A SIDESTEP_REFUSE -d ", ["filter", " "]);
        assert_eq!(refused, ["240.0.0.0/4", "10.96.0.1", "10.96.0.2"]);
        let v6 = content(&scope(), Family::V6, &desired, &BTreeSet::new());
        assert!(
            v6["nat"].contains("--to-destination [::1]:15001"),
            "{}",
            v6["nat"]
        );
        assert!(
            v6["filter"].contains("-d fd00:1::/64 -p tcp"),
            "{}",
            v6["filter"]
        );
        assert!(!v6["nat"].contains("240.") && !v6["filter"].contains("240."));
    }

    const FOREIGN: &str = "# Generated\n*nat\n:OUTPUT ACCEPT [0:0]\n:DOCKER - [0:0]\n\
        -A OUTPUT -j DOCKER\n-A DOCKER -d 240.0.0.9/32 -j RETURN\nCOMMIT\n";

    #[test]
    fn nothing_of_others_is_ours() {
        let present = Present::read(FOREIGN);
        assert!(present.is_empty() && present.addresses().is_empty());
        assert_eq!(present.removal(), "");
        let text = replacement(&BTreeMap::new(), Some(&present));
        assert_eq!(text.matches(JUMP).count(), 2);
        assert!(!text.contains("-D "), "{text}");
    }

    #[test]
    fn a_jump_that_is_first_stays_and_others_are_replaced_by_one() {
        let ours = ":SIDESTEP_OUTPUT - [0:0]\n:SIDESTEP_CAPTURE - [0:0]\n-A OUTPUT -p tcp -j SIDESTEP_OUTPUT\n\
            -A SIDESTEP_CAPTURE -d 10.96.0.1/32 -p tcp -j REDIRECT --to-ports 15001\n";
        let first = FOREIGN.replace("-A OUTPUT", &format!("{ours}-A OUTPUT"));
        let present = Present::read(&first);
        assert_eq!(present.addresses(), BTreeSet::from([[10, 96, 0, 1].into()]));
        let text = replacement(&BTreeMap::new(), Some(&present));
        // The filter table has none.
        assert_eq!(text.matches("-I OUTPUT").count(), 1);
        assert!(!text.contains("-D "), "{text}");

        let again = first.replace("COMMIT", "-A OUTPUT -p tcp -j SIDESTEP_OUTPUT\nCOMMIT");
        let text = replacement(&BTreeMap::new(), Some(&Present::read(&again)));
        assert_eq!(
            text.matches("-D OUTPUT -p tcp -j SIDESTEP_OUTPUT\n")
                .count(),
            2
        );
        assert_eq!(text.matches("-I OUTPUT").count(), 2);
    }

    #[test]
    fn a_removal_names_what_is_there() {
        let saved = "*filter\n:SIDESTEP_OUTPUT - [0:0]\n:SIDESTEP_OLD - [0:0]\n\
            -A OUTPUT -p tcp -j SIDESTEP_OUTPUT\n-A SIDESTEP_OUTPUT -j SIDESTEP_OLD\nCOMMIT\n";
        assert_eq!(
            Present::read(saved).removal(),
            "*filter\n-D OUTPUT -p tcp -j SIDESTEP_OUTPUT\n-F SIDESTEP_OLD\n-F SIDESTEP_OUTPUT\n\
             -X SIDESTEP_OLD\n-X SIDESTEP_OUTPUT\nCOMMIT\n"
        );
    }
}
