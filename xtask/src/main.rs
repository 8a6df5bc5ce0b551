//! All automation of the project; `cargo xtask --help` lists it.

fn main() {}
