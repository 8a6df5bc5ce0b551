//! [`sidestep::fuzzing::server_name`].

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| sidestep::fuzzing::server_name(bytes));
