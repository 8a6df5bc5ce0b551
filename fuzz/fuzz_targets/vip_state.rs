//! [`sidestep::fuzzing::vip_state`].

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| sidestep::fuzzing::vip_state(bytes));
