//! `sidestep status`

use std::{path::PathBuf, process::ExitCode};

use clap::Args;

use super::{block_on, load_config, output};
use crate::{
    admin::{
        client,
        status::{ConsulStatus, HeartbeatStatus, QueriesStatus, Status},
    },
    telemetry::timestamp::Timestamp,
};

/// How to reach the agent, and how to print.
#[derive(Debug, Args)]
pub(super) struct StatusArgs {
    #[command(flatten)]
    pub(super) agent: AgentArgs,
    /// Print JSON.
    #[arg(long)]
    pub(super) json: bool,
}

/// Which agent.
#[derive(Debug, Args)]
pub(super) struct AgentArgs {
    /// The agent's admin socket.
    #[arg(
        long,
        value_name = "SOCKET",
        default_value = "/run/sidestep/admin.sock"
    )]
    socket: PathBuf,
    /// The agent's configuration, which names the socket.
    #[arg(long, short, value_name = "FILE", conflicts_with = "socket")]
    config: Option<PathBuf>,
}

impl AgentArgs {
    /// The socket to ask at.
    pub(super) fn socket(&self) -> Result<PathBuf, ExitCode> {
        match &self.config {
            None => Ok(self.socket.clone()),
            Some(path) => load_config(path).map(|config| config.admin.socket),
        }
    }
}

/// Asks for `path` and reads the answer.
pub(super) fn ask<T: serde::de::DeserializeOwned>(
    args: &StatusArgs,
    path: &str,
) -> Result<T, ExitCode> {
    let bytes = block_on(client::get(&args.agent.socket()?, path))?
        .map_err(|error| output::failed(&error))?;
    serde_json::from_slice(&bytes).map_err(|error| output::failed(&error))
}

/// Shows what the agent does.
pub(super) fn status(args: &StatusArgs) -> ExitCode {
    match ask::<Status>(args, "/status") {
        Ok(status) if args.json => output::print_json(&status),
        Ok(status) => output::print(&render(&status)),
        Err(code) => code,
    }
}

fn render(status: &Status) -> String {
    let mut text = summary(status);
    sections(status, &mut text);
    text
}

fn summary(status: &Status) -> String {
    let mut text = format!(
        "sidestep {} on node {}, up {}{}\nkernel {}, captures by {}\n",
        status.version,
        status.node,
        span(status.uptime_seconds),
        if status.draining { ", draining" } else { "" },
        status.kernel,
        status.capture_mode,
    );
    for effect in &status.effects {
        if let Some(problem) = &effect.problem {
            let what = if effect.captured.is_some() {
                "NOT CAPTURED"
            } else {
                "not known whether captured"
            };
            text.push_str(&format!("{what}: {}: {problem}\n", effect.cgroup));
        }
    }
    text.push_str(&heartbeat(&status.heartbeat));
    text.push_str(&queries(status.queries.as_ref()));
    if let Some(before) = &status.predecessor {
        text.push_str(&format!(
            "process {} drains, {} connections left\n",
            before.process, before.connections
        ));
    }
    let connections = &status.connections;
    text.push_str(&format!(
        "connections: {} outbound, {} inbound (at most {} each)\n",
        connections.live_outbound, connections.live_inbound, connections.limit
    ));
    let catalog = &status.catalog;
    text.push_str(&format!(
        "catalog: version {}, {} services, {} instances, published {} ago\n",
        catalog.version,
        catalog.services,
        catalog.instances,
        span(catalog.age_seconds)
    ));
    for problem in &catalog.problems {
        text.push_str(&format!("  problem: {problem}\n"));
    }
    if let Some(consul) = &status.consul {
        text.push_str(&consul_lines(consul));
    }
    let authority = &status.authority;
    text.push_str(&format!(
        "authority: {}, {}, trusts {}\n",
        authority.subject,
        expiry(Timestamp::now(), authority.not_after),
        authority.roots.join(" and ")
    ));
    if let Some(problem) = &authority.problem {
        text.push_str(&format!("  problem: {problem}\n"));
    }
    text
}

fn consul_lines(consul: &ConsulStatus) -> String {
    let mut text = format!(
        "consul: {} at {}, {} services followed, {} read in turns, {} unread\n",
        consul.version, consul.address, consul.watched, consul.in_turns, consul.unread
    );
    for registered in &consul.registered {
        let (instance, port) = (&registered.instance, registered.port);
        text.push_str(&format!("  {instance} is reached at port {port}\n"));
    }
    for problem in &consul.problems {
        text.push_str(&format!("  problem: {problem}\n"));
    }
    text
}

fn sections(status: &Status, text: &mut String) {
    section(
        text,
        "services",
        status.services.iter().map(|service| {
            let addresses: Vec<String> =
                service.addresses.iter().map(ToString::to_string).collect();
            let available = match &service.destination {
                Some(destination) => format!(
                    "outside at {}, {} addresses",
                    destination.place,
                    destination.endpoints.len()
                ),
                None => format!("{}/{} available", service.available, service.instances),
            };
            vec![
                service.name.clone(),
                addresses.join(" "),
                ports(service.ports.as_deref()),
                available,
            ]
        }),
    );
    section(
        text,
        "workloads",
        status.workloads.iter().map(|workload| {
            let present = if workload.present { "" } else { "absent" };
            vec![
                workload.service.clone(),
                workload.rule.clone(),
                present.to_owned(),
            ]
        }),
    );
    section(
        text,
        "certificates",
        status.certificates.iter().map(|certificate| {
            let expires = certificate.not_after.map_or_else(
                || "none yet".to_owned(),
                |not_after| expiry(Timestamp::now(), not_after),
            );
            let error = certificate.last_error.clone().unwrap_or_default();
            let issuer = certificate.issuer.as_deref();
            let issuer = issuer.map(|issuer| format!("by {issuer}"));
            vec![
                certificate.identity.clone(),
                expires,
                issuer.unwrap_or_default(),
                error,
            ]
        }),
    );
    section(
        text,
        "listeners",
        status.listeners.iter().map(|listener| {
            let netns = listener.netns.clone().unwrap_or_default();
            vec![listener.purpose.clone(), listener.address.clone(), netns]
        }),
    );
    section(
        text,
        "programs",
        status.attachments.iter().map(|attachment| {
            let ids = format!(
                "link {} program {}",
                attachment.link_id, attachment.program_id
            );
            vec![attachment.program.clone(), attachment.target.clone(), ids]
        }),
    );
    let counted = status.capture.iter().filter(|(_, count)| **count > 0);
    section(
        text,
        "connects",
        counted.map(|(verdict, count)| vec![verdict.clone(), count.to_string()]),
    );
    let counted = status.hand_over.iter().filter(|(_, count)| **count > 0);
    section(
        text,
        "hand-over",
        counted.map(|(event, count)| vec![event.clone(), count.to_string()]),
    );
}

fn heartbeat(heartbeat: &HeartbeatStatus) -> String {
    let limit = match heartbeat.hung_after_ms {
        Some(limit) => format!("hung after {limit} ms without"),
        None => "never counted as hung".to_owned(),
    };
    let (gap, hangs) = (heartbeat.longest_gap_ms, heartbeat.hangs);
    let hangs = match hangs {
        0 => String::new(),
        hangs => format!(", WAS HUNG {hangs} times"),
    };
    format!("heartbeat: longest gap {gap} ms, {limit}{hangs}\n")
}

fn queries(queries: Option<&QueriesStatus>) -> String {
    let Some(queries) = queries else {
        return "DNS queries: not captured\n".to_owned();
    };
    let without_udp = match queries.namespaces.saturating_sub(queries.over_udp) {
        0 => String::new(),
        some => format!(", IN {some} NOT OVER UDP"),
    };
    format!(
        "DNS queries: captured in {} namespaces{without_udp}, {} captured, {} passed, {} servers (at most {})\n",
        queries.namespaces,
        queries.captured,
        queries.passed,
        queries.servers,
        queries.servers_limit
    )
}

fn ports(ports: Option<&[u16]>) -> String {
    match ports {
        Some(ports) => {
            let ports: Vec<String> = ports.iter().map(ToString::to_string).collect();
            format!("ports {}", ports.join(" "))
        }
        None => "any port".to_owned(),
    }
}

fn section(text: &mut String, title: &str, rows: impl Iterator<Item = Vec<String>>) {
    let rows: Vec<Vec<String>> = rows.collect();
    if rows.is_empty() {
        return;
    }
    text.push_str(&format!("{title}:\n"));
    for line in output::table(&rows).lines() {
        text.push_str(&format!("  {line}\n"));
    }
}

fn expiry(now: Timestamp, not_after: Timestamp) -> String {
    match now.until(not_after).as_secs() {
        0 => "expired".to_owned(),
        left => format!("expires in {}", span(left)),
    }
}

/// A duration in its two largest units.
pub(super) fn span(seconds: u64) -> String {
    let (minutes, hours, days) = (seconds / 60, seconds / 3600, seconds / 86_400);
    match (days, hours, minutes) {
        (0, 0, 0) => format!("{seconds} s"),
        (0, 0, _) => format!("{minutes} min {} s", seconds % 60),
        (0, _, _) => format!("{hours} h {} min", minutes % 60),
        _ => format!("{days} d {} h", hours % 24),
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, SystemTime};

    use super::{QueriesStatus, Timestamp, expiry, queries, span};

    #[test]
    fn it_is_said_where_queries_are_captured() {
        let captured = QueriesStatus {
            namespaces: 3,
            over_udp: 3,
            captured: 12,
            passed: 1,
            servers: 2,
            servers_limit: 9,
        };
        for (status, text) in [
            (None, "not captured"),
            (
                Some(captured),
                "captured in 3 namespaces, 12 captured, 1 passed, 2 servers (at most 9)",
            ),
            (
                Some(QueriesStatus {
                    over_udp: 1,
                    ..captured
                }),
                "captured in 3 namespaces, IN 2 NOT OVER UDP, 12 captured, 1 passed, 2 servers (at most 9)",
            ),
        ] {
            assert_eq!(queries(status.as_ref()), format!("DNS queries: {text}\n"));
        }
    }

    #[test]
    fn what_has_expired_does_not_expire_in_a_while() {
        let now = SystemTime::now();
        let at = |moment| expiry(Timestamp(now), Timestamp(moment));
        assert_eq!(at(now + Duration::from_secs(61)), "expires in 1 min 1 s");
        assert_eq!(at(now), "expired");
        assert_eq!(at(now - Duration::from_secs(61)), "expired");
    }

    #[test]
    fn spans_show_two_units() {
        for (seconds, text) in [
            (0, "0 s"),
            (61, "1 min 1 s"),
            (3_700, "1 h 1 min"),
            (90_000, "1 d 1 h"),
        ] {
            assert_eq!(span(seconds), text);
        }
    }
}
