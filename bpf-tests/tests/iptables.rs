//! Every claim of `cargo xtask prove iptables`, and of `prove path` by iptables rules, at its quick size; and those of
//! `prove names` that are about capture.

#![expect(
    clippy::tests_outside_test_module,
    reason = "an integration test is a test module"
)]

use bpf_tests::{
    claims::{iptables, names, path},
    mode::Mode,
};

/// A test for each claim, by rules of one kind.
macro_rules! test_claims_by {
    ($($mode:ident, $module:ident: $topic:path: $($name:ident)*;)*) => {
        $(
            mod $module {
                use super::*;
                $(
                    #[test]
                    fn $name() {
                        Mode::$mode.choose();
                        $topic.assert_holds(stringify!($name));
                    }
                )*
            }
        )*
    };
}

test_claims_by! {
    IptablesNft, nft: iptables::TOPIC:
    the_agent_says_by_what_it_captures
    a_killed_agent_fails_closed
    rules_of_others_stay
    detach_leaves_a_clean_host
    without_a_pin_directory_nothing_stays
    what_others_removed_comes_back
    the_listener_serves_nobody_directly
    a_real_address_is_captured_too
    who_takes_the_port_gets_nothing
    equal_ports_are_told_apart
    one_mode_follows_the_other
    an_upgrade_loses_no_connection;

    IptablesLegacy, legacy: iptables::TOPIC:
    the_agent_says_by_what_it_captures
    a_killed_agent_fails_closed
    rules_of_others_stay
    detach_leaves_a_clean_host
    without_a_pin_directory_nothing_stays
    what_others_removed_comes_back
    the_listener_serves_nobody_directly
    a_real_address_is_captured_too
    who_takes_the_port_gets_nothing
    equal_ports_are_told_apart
    one_mode_follows_the_other
    an_upgrade_loses_no_connection;

    IptablesNft, path_nft: path::TOPIC:
    a_host_like_this_is_accepted
    the_agent_makes_its_own_cgroup
    curl_reaches_nginx
    psql_reaches_postgresql
    redis_cli_pipelines
    an_upload_arrives_whole
    a_reset_stays_a_reset
    all_kinds_of_workloads_call_and_serve
    ipv6_virtual_addresses_work
    refusals_are_understood
    a_stranger_is_refused
    the_wire_is_tls
    a_denied_client_sees_no_banner
    the_called_side_decides_too
    a_new_denial_cuts_live_connections
    silent_strangers_keep_nobody_out
    a_replaced_authority_costs_no_connection
    load_follows_health
    a_dead_instance_costs_no_connection
    a_broken_file_changes_nothing
    a_bad_reload_changes_nothing
    decisions_are_logged_while_asked_for
    every_connection_is_counted_once
    a_stop_drains
    connections_reach_the_right_service
    an_agent_out_of_files_catches_up
    many_connections_at_once
    calls_share_tunnels;

    IptablesLegacy, path_legacy: path::TOPIC:
    all_kinds_of_workloads_call_and_serve
    ipv6_virtual_addresses_work
    refusals_are_understood
    a_stranger_is_refused
    load_follows_health
    connections_reach_the_right_service
    many_connections_at_once;

    IptablesNft, names_nft: names::TOPIC:
    an_instance_called_by_its_address_is_kept
    instances_that_come_and_go_are_followed;

    IptablesLegacy, names_legacy: names::TOPIC:
    instances_that_come_and_go_are_followed;
}

#[test]
fn no_claim_is_without_a_test() {
    let source = include_str!("iptables.rs");
    for claim in iptables::TOPIC.claims.iter().chain(path::TOPIC.claims) {
        let tests = source
            .lines()
            .filter(|line| line.trim().trim_end_matches(';') == claim.name);
        assert!(tests.count() > 0, "{} is not tested", claim.name);
    }
}
