//! The way of a connection, from `connect()` on one node to the application on another.

mod capture;
mod clients;
mod life;
mod policy;
mod rotation;
mod scale;
mod shared;

use super::{Claim, Topic};

/// See the module.
pub const TOPIC: Topic = Topic {
    name: "path",
    about: "the way of a connection, from connect() on one node to the application on another",
    programs: &[
        "ip",
        "curl",
        "tcpdump",
        "nginx",
        "redis-server",
        "redis-cli",
        "psql",
        "initdb",
    ],
    claims: claims! {
        life::a_host_like_this_is_accepted: "`sidestep check` accepts a host that can run it";
        life::the_agent_makes_its_own_cgroup: "the agent makes and enters its own cgroup where only root may";
        clients::curl_reaches_nginx: "curl gets pages and files from nginx through a virtual address";
        clients::psql_reaches_postgresql: "psql logs in to PostgreSQL with a password and gets large results";
        clients::redis_cli_pipelines: "redis-cli pipelines commands into Redis";
        clients::an_upload_arrives_whole: "an upload ended by a half-close arrives whole, and its answer comes back";
        clients::a_reset_stays_a_reset: "a connection that the application resets is reset for the client";
        capture::all_kinds_of_workloads_call_and_serve: "workloads by cgroup, user id and network namespace run side by side";
        capture::ipv6_virtual_addresses_work: "IPv6 virtual addresses and IPv4-mapped ones work, and the client sees its target as peer";
        capture::refusals_are_understood: "what cannot be reached is refused with the errno that says why, at once";
        capture::a_stranger_is_refused: "a process that is no known workload reaches no service";
        policy::the_wire_is_tls: "every byte between the nodes belongs to a TLS record";
        policy::a_denied_client_sees_no_banner: "a denied client sees no byte of a server that speaks first, nor that server a connection";
        policy::the_called_side_decides_too: "the called node denies by itself what a calling node would let pass";
        policy::a_new_denial_cuts_live_connections: "an intention that forbids live connections cuts these, and no others";
        policy::silent_strangers_keep_nobody_out: "a peer that opens tunnels and says nothing keeps nobody else out";
        rotation::a_replaced_authority_costs_no_connection: "new intermediates and a new root are taken over by a reload, and no connection is lost";
        life::load_follows_health: "load spreads over instances, follows their health, and stops when there is none";
        life::a_dead_instance_costs_no_connection: "an instance whose node does not answer costs no connection";
        life::a_broken_file_changes_nothing: "a broken catalog file takes nothing away and is reported";
        life::a_bad_reload_changes_nothing: "a bad configuration is refused on reload, a good one taken over";
        life::decisions_are_logged_while_asked_for: "with capture.debug the agent logs what the programs decide, until a reload switches it off";
        life::every_connection_is_counted_once: "every connection has one access-log line and one count on each side";
        life::a_stop_drains: "told to stop, the agent lets live connections end and takes no new ones";
        scale::connections_reach_the_right_service: "connections from 32 threads to 500 virtual addresses reach the right service, each";
        scale::an_agent_out_of_files_catches_up: "an agent that may open no more files keeps callers waiting and serves them once it may";
        scale::many_connections_at_once: "one workload holds more connections at once than there are ephemeral ports";
        shared::calls_share_tunnels: "connections by HBONE share a few tunnels; half-closes and resets stay what they are";
    },
};
