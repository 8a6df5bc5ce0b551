//! Every claim of `cargo xtask prove names`, at its quick size.

#![expect(
    clippy::tests_outside_test_module,
    reason = "an integration test is a test module"
)]

use bpf_tests::{claims::names::TOPIC, test_claims};

test_claims! {
    TOPIC:
    programs_resolve_and_connect
    names_are_known_without_being_told
    other_names_come_from_their_server
    captured_names_of_consul_go_on
    resolvers_of_their_own_are_captured
    java_follows_names
    queries_go_on_without_their_agent
    large_answers_come_whole
    nobody_else_gets_an_answer
    a_flood_leaves_others_their_share
    queries_have_lines
    answers_are_consuls
    names_of_consul_go_on
    other_names_are_answered_as_before
    a_lost_upstream_denies_no_name
    a_host_outside_is_called_by_its_name
    the_addresses_of_a_host_are_followed_and_kept
    a_new_denial_ends_what_goes_outside
    an_instance_called_by_its_address_is_kept
    instances_that_come_and_go_are_followed
    srv_records_lead_to_instances_in_the_mesh
    instances_of_consul_are_captured
    own_names_are_answered_fast
    an_upgrade_loses_no_query
}
