//! [`sidestep::fuzzing::peer_certificate`].

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| sidestep::fuzzing::peer_certificate(bytes));
