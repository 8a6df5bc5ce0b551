//! Is what is attached also effective? Found out by doing: a process below each attach point connects to a reserved
//! virtual address, and the agent at the other end answers.
//!
//! Programs can be attached and without effect: their cgroup was replaced by another of the same name, or somebody's
//! program rewrites or refuses a connect before ours sees it.

use std::{
    collections::BTreeMap,
    io::{self, Read as _},
    net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream},
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use ipnet::Ipv6Net;
use parking_lot::Mutex;
use tokio::{
    io::{AsyncWrite, AsyncWriteExt as _},
    process::Command,
    time::timeout,
};

use crate::{
    datapath::{AwayPolicy, Captured, ServiceId, VipTarget},
    telemetry::log::chain,
};

/// The service of the reserved addresses. Numbers of others follow from names, and this one from none that can be.
const PROBE: ServiceId = ServiceId(u64::MAX);

/// What the agent says to who was captured.
const ANSWER: &[u8] = b"captured\n";

/// For one connect of a probe.
const PATIENCE: Duration = Duration::from_secs(2);

/// For a probe as a whole: it starts a process.
const LIMIT: Duration = Duration::from_secs(10);

/// The cgroup of a probe, below an attach point. It is there only while one runs.
const CGROUP: &str = "sidestep-probe";

/// Addresses and port that no service has: the last of class E before the broadcast address, and the last of the
/// IPv6 range, at port 1.
pub fn reserved(ipv6_range: Ipv6Net) -> [SocketAddr; 2] {
    let v4 = Ipv4Addr::new(255, 255, 255, 254);
    [IpAddr::V4(v4), IpAddr::V6(ipv6_range.broadcast())].map(|address| (address, 1).into())
}

/// What the kernel must know of a reserved address.
pub fn target() -> VipTarget {
    VipTarget {
        service: PROBE,
        reachable: true,
        away: AwayPolicy::Closed,
    }
}

/// Whether somebody asks if he is captured.
pub fn is_probe(captured: &Captured) -> bool {
    captured.service == PROBE
}

/// Tells him.
pub async fn answer(stream: &mut (impl AsyncWrite + Unpin)) {
    // Who asked and left does not want to know any more.
    let _told = timeout(PATIENCE, stream.write_all(ANSWER)).await;
}

/// Whether connects below an attach point are captured.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Effect {
    /// They are.
    Captured,
    /// They are not; what happened instead.
    Missed(String),
    /// It could not be found out; why not.
    Unknown(String),
}

/// What is known of each attach point.
#[derive(Debug, Default)]
pub struct Health(Mutex<BTreeMap<PathBuf, Effect>>);

impl Health {
    /// Remembers what was found out. Returns whether that is news.
    pub fn found(&self, cgroup: &Path, effect: Effect) -> bool {
        let before = self.0.lock().insert(cgroup.to_owned(), effect.clone());
        before != Some(effect)
    }

    /// Every attach point that was looked at.
    pub fn all(&self) -> Vec<(PathBuf, Effect)> {
        let known = self.0.lock();
        let pair = |(cgroup, effect): (&PathBuf, &Effect)| (cgroup.clone(), effect.clone());
        known.iter().map(pair).collect()
    }

    /// Whether connects are captured as far as is known.
    pub fn is_well(&self) -> bool {
        let known = self.0.lock();
        !known.values().any(|e| matches!(e, Effect::Missed(_)))
    }
}

/// Starts a process below the attach point, whose directory this is, and has it connect to `addresses`.
pub async fn probe(cgroup: &Path, addresses: &[SocketAddr]) -> Effect {
    let below = cgroup.join(CGROUP);
    let asked = timeout(LIMIT, ask(&below, addresses)).await;
    // The process is gone; if it is not, the next probe finds the cgroup and uses it.
    let _removed = std::fs::remove_dir(&below);
    match asked {
        Ok(Ok(said)) => read(&said),
        Ok(Err(error)) => Effect::Unknown(format!("start a probe: {}", chain(&error))),
        Err(_elapsed) => Effect::Unknown("the probe did not end".to_owned()),
    }
}

async fn ask(cgroup: &Path, addresses: &[SocketAddr]) -> io::Result<String> {
    let output = Command::new("/proc/self/exe")
        .arg("probe")
        .arg(cgroup)
        .args(addresses.iter().map(ToString::to_string))
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .output()
        .await?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    Err(io::Error::other(said))
}

/// One line for each address: `captured`, or what happened instead.
fn read(said: &str) -> Effect {
    let missed: Vec<&str> = said.lines().filter(|line| *line != "captured").collect();
    match (said.is_empty(), missed.is_empty()) {
        (true, _) => Effect::Unknown("the probe said nothing".to_owned()),
        (false, true) => Effect::Captured,
        (false, false) => Effect::Missed(missed.join("; ")),
    }
}

/// The process of a probe: enters `cgroup`, connects, and returns its line for each address.
///
/// # Errors
/// If the cgroup cannot be made or entered.
pub fn look(cgroup: &Path, addresses: &[SocketAddr]) -> io::Result<String> {
    std::fs::create_dir_all(cgroup)?;
    std::fs::write(cgroup.join("cgroup.procs"), "0")?;
    let lines = addresses.iter().map(|address| match connect(*address) {
        Ok(line) => format!("{}\n", line.trim_end()),
        Err(error) => format!("{address}: {error}\n"),
    });
    Ok(lines.collect::<Vec<String>>().concat())
}

fn connect(address: SocketAddr) -> io::Result<String> {
    let mut stream = TcpStream::connect_timeout(&address, PATIENCE)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let mut said = String::new();
    stream.read_to_string(&mut said)?;
    if said.as_bytes() == ANSWER {
        Ok(said)
    } else {
        Err(io::Error::other("somebody else answered"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_address_must_be_captured() {
        assert_eq!(read("captured\ncaptured\n"), Effect::Captured);
        let missed = "240.0.0.1:1: Network is unreachable";
        let said = format!("captured\n{missed}\n");
        assert_eq!(read(&said), Effect::Missed(missed.to_owned()));
        assert!(matches!(read(""), Effect::Unknown(_)));
    }

    #[test]
    fn only_what_changes_is_news_and_only_a_miss_is_an_illness() {
        let health = Health::default();
        let cgroup = Path::new("/a");
        assert!(health.found(cgroup, Effect::Captured));
        assert!(!health.found(cgroup, Effect::Captured));
        assert!(health.found(cgroup, Effect::Unknown("no fork".to_owned())));
        assert!(health.is_well());
        assert!(health.found(cgroup, Effect::Missed("refused".to_owned())));
        assert!(!health.is_well());
    }

    #[test]
    fn reserved_addresses_are_the_last_ones() {
        let reserved = reserved("fd00:1::/64".parse().unwrap());
        let expected = ["255.255.255.254:1", "[fd00:1::ffff:ffff:ffff:ffff]:1"];
        assert_eq!(reserved.map(|address| address.to_string()), expected);
    }
}
