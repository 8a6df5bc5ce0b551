//! [`sidestep::fuzzing::spiffe_id`].

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| sidestep::fuzzing::spiffe_id(bytes));
