//! Services that exist only in Consul, and peers that know nothing of Sidestep.

use super::Topic;

/// See the module.
pub const TOPIC: Topic = Topic {
    name: "consul",
    about: "a real Consul as the only configuration, its built-in proxy and Envoy as peers",
    programs: &[
        "ip",
        "curl",
        "openssl",
        "nginx",
        "redis-server",
        "redis-cli",
        "psql",
        "initdb",
        "consul",
        "envoy",
    ],
    claims: &[],
};
