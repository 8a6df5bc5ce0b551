//! [`sidestep::fuzzing::connect_decision`].

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| sidestep::fuzzing::connect_decision(bytes));
