//! Every claim of `cargo xtask prove path`, at its quick size.

#![expect(
    clippy::tests_outside_test_module,
    reason = "an integration test is a test module"
)]

use bpf_tests::{claims::path::TOPIC, test_claims};

test_claims! {
    TOPIC:
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
    calls_share_tunnels
}
