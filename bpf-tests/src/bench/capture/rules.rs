//! What stands in the kernel without an agent: a map of nftables with all services, and a rule of somebody else that wants
//! connections tracked.

use std::{
    fmt::Write as _,
    fs,
    net::{Ipv4Addr, SocketAddrV4},
    path::Path,
    time::Duration,
};

use anyhow::{Context as _, Result};

use crate::{namespace::Namespace, program::Program, wait::SOON};

/// For 100,000 elements.
const PATIENCE: Duration = Duration::from_mins(2);

/// Where the plain server listens, on all of 127.0.0.0/8.
pub(super) const PORT: u16 = 9000;

/// The virtual address of service number `index`.
pub(super) fn virtual_address(index: u32) -> SocketAddrV4 {
    let first = u32::from(Ipv4Addr::new(240, 16, 0, 0));
    SocketAddrV4::new(Ipv4Addr::from(first + index), 80)
}

/// The address of loopback that stands for it: as by the agent, not the same for all, so that ports do not run out.
pub(super) fn loopback(index: u32) -> SocketAddrV4 {
    let first = u32::from(Ipv4Addr::new(127, 1, 0, 0));
    SocketAddrV4::new(Ipv4Addr::from(first + index), PORT)
}

/// The best that nftables can do: one look-up in a hash of all services.
pub(super) fn table(services: u32) -> String {
    let mut text = "\
table ip bench {
  map services {
    type ipv4_addr . inet_service : ipv4_addr . inet_service
    elements = {
"
    .to_owned();
    for index in 0..services {
        // Writing to a string does not fail.
        let _written = writeln!(text, "      {},", element(index));
    }
    text += "\
    }
  }
  chain output {
    type nat hook output priority -100
    dnat to ip daddr . tcp dport map @services
  }
}
";
    text
}

fn element(index: u32) -> String {
    let (from, to) = (virtual_address(index), loopback(index));
    format!(
        "{} . {} : {} . {}",
        from.ip(),
        from.port(),
        to.ip(),
        to.port()
    )
}

/// Loads [`table`], and sends virtual addresses nowhere but to loopback.
pub(super) fn load(namespace: &Namespace, directory: &Path, services: u32) -> Result<()> {
    let file = directory.join("services.nft");
    fs::write(&file, table(services)).with_context(|| format!("writing {}", file.display()))?;
    namespace.ip("route add 240.0.0.0/4 dev lo src 127.0.0.1")?;
    let nft = Program::new("nft").arg("-f").arg(&file);
    nft.in_namespace(namespace).run(PATIENCE).map(drop)
}

/// Adds service number `index`.
pub(super) fn add(namespace: &Namespace, index: u32) -> Result<()> {
    let command = format!("add element ip bench services {{ {} }}", element(index));
    let nft = Program::new("nft").arg(command);
    nft.in_namespace(namespace).run(SOON).map(drop)
}

/// A rule of somebody else that looks at the state of connections, as most hosts with a firewall have one.
pub(super) fn track(namespace: &Namespace) -> Result<()> {
    let words = "-A INPUT -m conntrack --ctstate INVALID -j DROP";
    let iptables = Program::new("iptables-nft").args(words.split(' '));
    iptables.in_namespace(namespace).run(SOON).map(drop)
}

/// Makes the kernel forget connections a second after their end: at the usual two minutes, and even at ten seconds for
/// what was reset, its table would be full before a round is over. This favours whoever tracks.
pub(in crate::bench) fn forget_fast(namespace: &Namespace) -> Result<()> {
    namespace.run(|| {
        for state in ["close", "time_wait"] {
            let file = format!("/proc/sys/net/netfilter/nf_conntrack_tcp_timeout_{state}");
            fs::write(&file, "1").with_context(|| format!("writing {file}"))?;
        }
        Ok(())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_service_is_an_element() {
        let text = table(300);
        assert!(
            text.contains("240.16.0.0 . 80 : 127.1.0.0 . 9000,"),
            "{text}"
        );
        assert!(
            text.contains("240.16.1.43 . 80 : 127.1.1.43 . 9000,"),
            "{text}"
        );
        assert_eq!(text.matches(" : 127.").count(), 300);
    }

    #[test]
    fn the_most_services_are_all_on_loopback() {
        assert!(loopback(100_000).ip().is_loopback());
        assert!(virtual_address(100_000).ip().octets()[0] == 240);
    }
}
