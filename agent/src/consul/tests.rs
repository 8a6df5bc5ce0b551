//! The client against a scripted Consul and against the real one.
