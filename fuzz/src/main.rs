//! One of [`sidestep::fuzzing::TARGETS`] under libFuzzer: the one that `SIDESTEP_FUZZ_TARGET` names.
//!
//! A single program, since linking the agent takes longer than what a fuzzer finds in its first seconds. Built and
//! run by `cargo xtask fuzz`.

#![no_main]

use std::{env, sync::LazyLock};

use sidestep::fuzzing::{TARGETS, Target};

static TARGET: LazyLock<Target> = LazyLock::new(|| {
    let wanted = env::var("SIDESTEP_FUZZ_TARGET").unwrap_or_default();
    let found = TARGETS.iter().find(|(name, _)| *name == wanted);
    let (_name, target) = found.expect("SIDESTEP_FUZZ_TARGET names no target");
    *target
});

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| TARGET(bytes));
