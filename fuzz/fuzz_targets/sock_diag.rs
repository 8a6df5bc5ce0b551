//! [`sidestep::fuzzing::sock_diag`].

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| sidestep::fuzzing::sock_diag(bytes));
