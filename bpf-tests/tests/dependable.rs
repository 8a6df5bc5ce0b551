//! Every claim of `cargo xtask prove dependable`, at its quick size.

#![expect(
    clippy::tests_outside_test_module,
    reason = "an integration test is a test module"
)]

use bpf_tests::{claims::dependable::TOPIC, test_claims};

test_claims! {
    TOPIC:
    a_killed_agent_fails_closed
    a_killed_agent_is_answered_by_the_policy
    a_hung_agent_is_answered_by_the_policy
    a_reload_changes_the_policy
    a_busy_machine_is_no_hang
    a_broken_catalog_at_start_takes_nothing_away
    an_upgrade_loses_no_connection
    a_kill_costs_only_the_time_away
    changes_cost_no_connection
    nothing_is_readable_meanwhile
    an_effect_that_is_lost_is_told
    a_cgroup_that_was_replaced_is_attached_anew
    detach_leaves_a_clean_host
    a_catalog_too_large_takes_nothing_away
    a_socket_without_memory_is_refused
    refusals_that_nobody_reads_block_nothing
    a_full_disk_keeps_nobody_from_calling
    a_replaced_catalog_directory_is_followed
    an_authority_that_ran_out_fails_closed
    connections_that_say_nothing_are_cheap_and_end
    garbage_at_the_tunnel_port_harms_nobody
    an_agent_starts_beside_others_or_says_why_not
    others_that_come_later_take_nothing_away
    a_transfer_goes_on_when_the_link_is_back
    a_transfer_to_a_lost_node_ends
}
