//! What the node knows of services: one model, filled by sources, read as complete snapshots.

pub mod model;
pub mod destination;
pub mod file;
pub mod consul;
pub mod vip;
pub mod instances;
pub mod store;
