//! Every claim of `cargo xtask prove consul`, at its quick size.

#![expect(
    clippy::tests_outside_test_module,
    reason = "an integration test is a test module"
)]

use bpf_tests::{claims::consul::TOPIC, test_claims};

test_claims! {
    TOPIC:
    services_in_consul_are_called
    the_least_policy_is_enough
    every_form_of_address_is_taken
    a_token_for_one_service_is_enough_for_it
    a_built_in_proxy_calls_us
    we_call_a_built_in_proxy
    envoy_calls_us
    we_call_envoy
    explicit_upstreams_go_on
    a_service_goes_from_sidecars_to_us_and_back
    a_prepared_query_is_followed
    a_unix_socket_is_offered
    another_datacenter_is_reached
    every_way_of_tls_is_served
    a_tcp_health_check_is_no_call
    a_denied_peer_sees_no_banner
    decisions_are_consuls
    a_new_denial_cuts_live_connections
    a_denial_cuts_peers_of_other_kinds
    a_rotated_root_costs_no_connection
    a_peer_that_knows_only_the_old_root_is_served
    a_killed_leader_costs_no_connection
    a_lost_token_takes_nothing_away
    a_restored_snapshot_is_followed
    an_index_of_the_future_does_no_harm
    an_error_with_an_index_does_no_harm
    a_lying_answer_takes_nothing_away
    a_server_that_lags_takes_nothing_away
    an_endpoint_change_is_followed_at_once
    swapped_virtual_addresses_lead_to_their_new_owners
    an_upgrade_is_not_seen_in_consul
    a_large_datacenter_is_carried
}
