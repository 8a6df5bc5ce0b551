//! Every claim of `cargo xtask prove speed`, at its quick size.

#![expect(
    clippy::tests_outside_test_module,
    reason = "an integration test is a test module"
)]

use bpf_tests::{claims::speed::TOPIC, test_claims};

test_claims! {
    TOPIC:
    capture_costs_less_than_rules
    capture_is_flat
    others_pay_nothing
    bulk
    requests
    new_connections
    faster_than_sidecars
    beside_bulk
    memory
}
