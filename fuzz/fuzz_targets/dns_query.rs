//! [`sidestep::fuzzing::dns_query`].

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| sidestep::fuzzing::dns_query(bytes));
