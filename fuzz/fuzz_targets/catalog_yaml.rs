//! [`sidestep::fuzzing::catalog_yaml`].

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| sidestep::fuzzing::catalog_yaml(bytes));
