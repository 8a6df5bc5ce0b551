//! Can this host capture by iptables? Asked by doing, in a namespace that is gone afterwards.

use std::{
    collections::BTreeSet,
    net::{IpAddr, TcpListener},
    path::Path,
    thread,
};

use rustix::thread::{UnshareFlags, unshare_unsafe};

use super::{
    Choice, IptablesError, ToolError, Variant,
    rules::{self, Family, Present, Scope},
    tool,
};
use crate::{
    config,
    datapath::{
        ServiceId, VipRanges, VipTarget, VipTargets,
        probe::{Finding, fail, ok},
    },
    sock_diag::SockDiag,
    telemetry::log::chain,
};

/// Makes rules as the agent does, and asks whose a socket is.
pub(in crate::datapath) fn probe(choice: Choice) -> Vec<Finding> {
    const NAME: &str = "iptables";
    let variant = match choice.resolve() {
        Ok(variant) => variant,
        Err(error) => return vec![fail(NAME, chain(&error).to_string(), "")],
    };
    let name = format!("{NAME}-{}", variant.as_str());
    let done = thread::spawn(move || {
        leave_namespace().map_err(std::io::Error::from)?;
        let rules = [Family::V4, Family::V6].map(|family| try_rules(variant, family));
        Ok((rules, try_sockets()))
    });
    let (rules, sockets) = match done.join() {
        Ok(Ok(done)) => done,
        Ok(Err(error)) => {
            let error: std::io::Error = error;
            return vec![fail(name, chain(&error).to_string(), "run as root")];
        }
        Err(_panic) => return vec![fail(name, "the attempt panicked", "")],
    };
    let mut findings: Vec<Finding> = ["IPv4", "IPv6"]
        .iter()
        .zip(rules)
        .map(|(family, tried)| match tried {
            Ok(()) => ok(format!("{name} {family}"), "takes the rules"),
            Err(error) => fail(
                format!("{name} {family}"),
                chain(&error).to_string(),
                "the kernel needs the match cgroup, and the targets DNAT and REJECT",
            ),
        })
        .collect();
    findings.push(match sockets {
        Ok(()) => ok("sock_diag", "tells the cgroup of a socket"),
        Err(error) => fail("sock_diag", chain(&error).to_string(), ""),
    });
    findings
}

fn try_rules(variant: Variant, family: Family) -> Result<(), ToolError> {
    let (ipv4, ipv6) = config::default_ranges();
    let scope = Scope {
        attach_points: vec![Path::new("/").into()],
        agent: Path::new("/").into(),
        ranges: VipRanges { ipv4, ipv6 },
        port: 1,
    };
    let target = VipTarget {
        service: ServiceId(0),
        reachable: true,
        away: config::AwayPolicy::Closed,
    };
    let addresses = [ipv4.network().into(), ipv6.network().into()];
    let desired = VipTargets {
        ports: addresses
            .map(|address: IpAddr| ((address, 1).into(), target))
            .into(),
        any_port: addresses.map(|address| (address, target)).into(),
        ..VipTargets::default()
    };
    let content = rules::content(&scope, family, &desired, &BTreeSet::new());
    let present = Present::read(&tool::save(variant, family)?);
    tool::restore(
        variant,
        family,
        &rules::replacement(&content, Some(&present)),
    )
}

fn try_sockets() -> Result<(), IptablesError> {
    let open = || Ok((TcpListener::bind(("0.0.0.0", 0))?, SockDiag::open()?));
    let (_listener, sockets) = open().map_err(IptablesError::Open)?;
    sockets.listeners()?;
    Ok(())
}

#[expect(unsafe_code, reason = "rustix cannot know what the flags do")]
fn leave_namespace() -> rustix::io::Result<()> {
    // SAFETY: a new network namespace for this thread alone; nothing that is shared with others is unshared.
    unsafe { unshare_unsafe(UnshareFlags::NEWNET) }
}
