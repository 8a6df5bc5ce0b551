//! Test support for tests that need a kernel: scratch cgroups and network namespaces, programs inside them,
//! and whole nodes with an agent and workloads. Used by the tests of this crate and by `cargo xtask`.
//!
//! Everything that a run makes has the run's name and goes with it: see [`scratch`].

pub mod wait;
pub mod programs;
pub mod scratch;
pub mod cgroup;
pub mod namespace;
pub mod program;
pub mod catalog;
pub mod lab;
pub mod mode;
pub mod node;
pub mod workload;
pub mod services;
pub mod foreign;
pub mod wire;
pub mod mesh;
pub mod daemon;
pub mod consul;
pub mod envoy;
pub mod tls_client;
pub mod forward;
pub mod bench;
pub mod claims;
