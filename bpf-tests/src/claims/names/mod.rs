//! Names that lead to services, answered by the agent, and all others, answered as before.

mod captured;
mod clients;
mod consul;
mod instances;
mod flood;
mod java;
mod load;
mod outside;
mod query_log;
mod upstream;

use std::{fs, path::Path};

use anyhow::{Context as _, Result};

use super::{Claim, Topic};
use crate::{node::Node, program::Program, workload::Workload};

/// See the module.
pub const TOPIC: Topic = Topic {
    name: "names",
    about: "DNS names that lead to services, asked by real programs, beside a real Consul and real upstreams",
    programs: &[
        "ip", "curl", "python3", "nginx", "dig", "getent", "dnsmasq", "dnsperf", "consul",
        "musl-gcc", "openssl", "java", "javac",
    ],
    claims: claims! {
        clients::programs_resolve_and_connect: "dig, getent, python and curl resolve a service's name by resolv.conf alone, and their connections reach the service";
        captured::names_are_known_without_being_told: "with capture.dns and a resolver that exists nowhere, dig, getent, python and curl resolve a service's name, also where there is no route";
        captured::other_names_come_from_their_server: "with capture.dns, other names get their own server's answers byte for byte, in each namespace from the server there, and at once from it when the agent is killed";
        captured::captured_names_of_consul_go_on: "with capture.dns and Consul, names of mesh services lead into the mesh, allowed or not, and their own server answers every other name";
        captured::resolvers_of_their_own_are_captured: "with capture.dns, programs that bring their own resolver (musl, Go) resolve a service's name and reach it";
        java::java_follows_names: "with capture.dns, Java programs find services by getaddrinfo and by JNDI, and what Java remembers leads neither to an instance that is gone nor past a service that is new";
        captured::queries_go_on_without_their_agent: "with capture.dns, lookups go on while the agent is killed, away, started and upgraded: none fails, an upgrade costs none a second try, and a kill at most those that the agent held";
        clients::large_answers_come_whole: "an answer over UDP is no larger than the client takes, and comes whole over TCP";
        clients::nobody_else_gets_an_answer: "who is not allowed to ask gets no answer, and who asks too much gets no more than the limit";
        flood::a_flood_leaves_others_their_share: "with capture.dns, a workload that floods a silent server over UDP and TCP takes no lookup from another namespace";
        query_log::queries_have_lines: "with dns.query_log, each query has a line that says who asked what, whom, and what became of it";
        consul::answers_are_consuls: "for 40 forms of queries, answers are those of Consul 1.8.7, or differ as documented";
        consul::names_of_consul_go_on: "with Consul, names of mesh services lead into the mesh, allowed or not, and Consul's own DNS answers every other name of its domain";
        upstream::other_names_are_answered_as_before: "queries for other names, sent through the agent, get the upstream's answers byte for byte";
        upstream::a_lost_upstream_denies_no_name: "while the upstream is away, other names are answered SERVFAIL and own names as ever";
        outside::a_host_outside_is_called_by_its_name: "a host outside the mesh is called by its name over TLS from a container without a route to it, and by its address; who may not call it does not reach it";
        outside::the_addresses_of_a_host_are_followed_and_kept: "when a host outside the mesh moves, calls follow it, and go on while the upstream that knows it is away";
        outside::a_new_denial_ends_what_goes_outside: "an intention that denies ends live connections to a host outside the mesh";
        instances::an_instance_called_by_its_address_is_kept: "with capture.instances, an instance that is called by its own address is reached through the mesh, that one and no other, also on its own node; who may not call it is refused";
        instances::instances_that_come_and_go_are_followed: "with capture.instances, instances that come and go are followed, one that fails its checks is reached, and two services at one address are refused there";
        instances::srv_records_lead_to_instances_in_the_mesh: "with capture.instances and dns.service_answers = instances, curl to what dig finds by SRV goes through the mesh to that instance";
        instances::instances_of_consul_are_captured: "with capture.instances and Consul, instances that Consul's own DNS names are reached through the mesh, with an address of their own too, and once denied not at all";
        load::own_names_are_answered_fast: "20,000 queries of own names per second (5,000 without optimisation) are answered, at the listener and captured, and none is lost; of those that are forwarded at most one in 100,000; dnsmasq's rate is told beside";
        load::an_upgrade_loses_no_query: "`sidestep upgrade` under load: no query is lost, and none is answered wrong";
    },
};

/// Where the agent answers in these tests.
const LISTENER: &str = "127.0.0.1";

/// A server that exists nowhere.
const NOWHERE: &str = "192.0.2.53";

/// `[dns]` with these keys.
fn dns(node: &mut Node, keys: &str) {
    node.add_setting(&format!("[dns]\n{keys}"));
}

/// `dig` on the node with these words, at the agent.
fn dig(node: &Node, words: &str) -> Result<String> {
    let program = node.tool("dig")?.arg(format!("@{LISTENER}"));
    let program = program.args(["+tries=1", "+timeout=5"]);
    program
        .args(words.split_whitespace())
        .run(crate::wait::SOON)
}

/// A program in `workload` that finds `resolv_conf` at `/etc/resolv.conf`, in a mount namespace of its own.
fn with_resolv_conf(workload: &Workload, resolv_conf: &Path, command: &[&str]) -> Program {
    workload
        .program("unshare")
        .args(["--mount", "--propagation", "private", "sh", "-c"])
        .arg("mount --bind \"$0\" /etc/resolv.conf && exec \"$@\"")
        .arg(resolv_conf)
        .args(command)
}

fn write_resolv_conf(directory: &Path, server: &str) -> Result<std::path::PathBuf> {
    let file = directory.join("resolv.conf");
    fs::write(&file, format!("nameserver {server}\n"))
        .with_context(|| format!("writing {}", file.display()))?;
    Ok(file)
}
