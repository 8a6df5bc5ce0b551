//! Services that exist only in Consul, and peers that know nothing of Sidestep.

mod calls;
mod access;
mod peers;
mod shapes;
mod intentions;
mod roots;
mod outage;
mod faults;
mod changes;
mod upgrade;
mod migration;
mod upstreams;
mod scale;

use super::{Claim, Topic};

/// See the module.
pub const TOPIC: Topic = Topic {
    name: "consul",
    about: "a real Consul as the only configuration, its built-in proxy and Envoy as peers",
    programs: &[
        "ip",
        "curl",
        "openssl",
        "python3",
        "nginx",
        "redis-server",
        "redis-cli",
        "psql",
        "initdb",
        "consul",
        "envoy",
    ],
    claims: claims! {
        calls::services_in_consul_are_called: "psql, redis-cli and curl reach services that exist only in Consul, and no file names anything but Consul's address";
        calls::the_least_policy_is_enough: "with TLS and ACLs that deny what they do not allow, the documented policy is enough";
        access::every_form_of_address_is_taken: "an agent reaches Consul by a Unix socket, or by HTTPS where Consul asks for a certificate, with a token from a file";
        access::a_token_for_one_service_is_enough_for_it: "with the documented policy for one service, that one is called and calls, and nobody else's certificate is to be had";
        peers::a_built_in_proxy_calls_us: "Consul's built-in proxy reaches a service on a node with Sidestep";
        peers::we_call_a_built_in_proxy: "a service behind Consul's built-in proxy is reached from a node with Sidestep";
        peers::envoy_calls_us: "Envoy, which dials TLS 1.2 with a server name and no ALPN, reaches a service on a node with Sidestep";
        peers::we_call_envoy: "a service behind Envoy is reached from a node with Sidestep";
        migration::explicit_upstreams_go_on: "upstreams with a local port, as sidecars had them, go on without the sidecar, and are the caller's own";
        migration::a_service_goes_from_sidecars_to_us_and_back: "a service goes from sidecars to Sidestep and back, one step after the other";
        upstreams::a_prepared_query_is_followed: "an upstream that is a prepared query leads where the query's answer says, and not where an intention denies";
        upstreams::a_unix_socket_is_offered: "an upstream at a Unix socket is the caller's own by its process, and outlives the agent's kill and upgrade";
        upstreams::another_datacenter_is_reached: "an upstream in another datacenter, named or found by a query that fails over, is reached as who it is there";
        shapes::every_way_of_tls_is_served: "raw TCP that the server begins is served over TLS 1.2 and 1.3, with and without a server name, whatever ALPN is offered";
        shapes::a_tcp_health_check_is_no_call: "connections that open and close, as Consul's TCP checks, reach no application and are no failure";
        shapes::a_denied_peer_sees_no_banner: "a peer that an intention denies reads nothing, and no connection is opened to the application";
        intentions::decisions_are_consuls: "for every pair of services, Sidestep decides as Consul does";
        intentions::a_new_denial_cuts_live_connections: "an intention that is changed in Consul ends the live connections that it forbids and no others";
        intentions::a_denial_cuts_peers_of_other_kinds: "it ends the connections of peers without Sidestep, too";
        roots::a_rotated_root_costs_no_connection: "roots and leaves that are replaced under load cost no connection";
        roots::a_peer_that_knows_only_the_old_root_is_served: "a peer that trusts only the root from before accepts a leaf under the new one";
        outage::a_killed_leader_costs_no_connection: "while Consul's leader is killed and another elected, no connection fails, and the next change is followed";
        outage::a_lost_token_takes_nothing_away: "a token that loses its rights takes no endpoint away and is reported; with them back, changes are followed";
        outage::a_restored_snapshot_is_followed: "indexes that go back, as after a restored snapshot, are followed";
        faults::an_index_of_the_future_does_no_harm: "an answer with an index that Consul never reaches keeps no change away for more than 3 s";
        faults::an_error_with_an_index_does_no_harm: "errors with an index take nothing away and cause no storm of requests";
        faults::a_lying_answer_takes_nothing_away: "empty answers of lost rights, garbage, cut and stalled answers take nothing away, are reported, and the truth is followed";
        faults::a_server_that_lags_takes_nothing_away: "empty answers of a server that has just begun, and knows its leader, take nothing away";
        changes::an_endpoint_change_is_followed_at_once: "a change of endpoints reaches new connections within 200 ms of Consul's answer";
        changes::swapped_virtual_addresses_lead_to_their_new_owners: "two services that swap their virtual addresses: live connections end, new ones reach the new owner";
        upgrade::an_upgrade_is_not_seen_in_consul: "`sidestep upgrade` under load: no connection fails, registrations stay and pass all the time, certificates go on";
        scale::a_large_datacenter_is_carried: "5,000 services with 20,000 instances are carried by a small agent";
    },
};
