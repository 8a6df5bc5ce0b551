//! Measuring: what is set up, loaded and read, for `cargo xtask bench` and for the claims about speed.
//!
//! Everything that is compared stands at the same time and is measured by turns, in an order drawn anew for each round,
//! so that what else the machine does falls on all alike. A figure is the median over the rounds.

pub mod statistics;
pub mod machine;
pub mod recording;
pub mod capture;
pub mod mesh;
