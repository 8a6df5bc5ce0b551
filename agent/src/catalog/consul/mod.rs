//! The catalog of a Consul datacenter.

mod services;
mod intentions;
mod entries;
mod chain;
