//! [`sidestep::fuzzing::config_toml`].

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| sidestep::fuzzing::config_toml(bytes));
