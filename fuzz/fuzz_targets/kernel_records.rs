//! [`sidestep::fuzzing::kernel_records`].

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| sidestep::fuzzing::kernel_records(bytes));
