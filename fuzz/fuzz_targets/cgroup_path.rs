//! [`sidestep::fuzzing::cgroup_path`].

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| sidestep::fuzzing::cgroup_path(bytes));
