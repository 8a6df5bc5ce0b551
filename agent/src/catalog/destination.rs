//! Where a service is that is outside the mesh: the `Destination` of a `service-defaults` entry, as Consul has it
//! since 1.13. Pure.
//!
//! There are two kinds, for bytes are not looked at: a host name has virtual addresses of its own, and what comes to
//! them goes to the host; an IP address is called as it is, and what is for it goes to it. Two host names would share
//! the virtual addresses of the service, and nothing could tell which one was meant.

use std::{
    collections::BTreeSet,
    fmt,
    net::{IpAddr, SocketAddr},
    str::FromStr,
    sync::Arc,
};

/// Where a service is that is outside the mesh.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Destination {
    /// `Addresses`
    pub place: Place,
    /// `Port`
    pub port: u16,
}

/// What `Addresses` says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place {
    /// At the addresses of a host.
    Host(HostName),
    /// At these addresses, which are called as they are.
    Addresses(BTreeSet<IpAddr>),
}

/// A host's name as the Internet has them, in lower case and without a dot at its end.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct HostName(Arc<str>);

/// What a destination cannot be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DestinationError {
    /// No address.
    #[error("destination.addresses: expected a host name, or IP addresses")]
    Nowhere,
    /// Two host names, or a host name and an IP address.
    #[error(
        "destination.addresses: {0:?} beside others: expected one host name, or only IP addresses; \
         each host name is a service of its own"
    )]
    Several(String),
    /// Neither a host name nor an IP address.
    #[error(
        "destination.addresses: {0:?}: expected a host name (without wildcards) or an IP address"
    )]
    NoName(String),
    /// An address that nobody else has.
    #[error("destination.addresses: {0}: {1}")]
    NotOutside(IpAddr, Inside),
    /// A port that is none.
    #[error("destination.port: {0}: expected 1 to 65535")]
    Port(i64),
}

/// Why an address is none of a host outside.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Inside {
    /// Of the node itself, or of nobody.
    #[error("expected a unicast address that is not loopback")]
    Own,
    /// Of the neighbourhood, and meaningless without saying which.
    #[error("a link-local address says nothing without its link")]
    LinkLocal,
    /// Nobody has those but the mesh.
    #[error("addresses of 240.0.0.0/4 are virtual")]
    Virtual,
}

impl Destination {
    /// Reads `Addresses` and `Port`.
    ///
    /// # Errors
    /// If it is no destination that can be called.
    pub fn read(addresses: &[String], port: i64) -> Result<Self, DestinationError> {
        let port = u16::try_from(port)
            .ok()
            .filter(|port| *port != 0)
            .ok_or(DestinationError::Port(port))?;
        let mut listed = BTreeSet::new();
        for text in addresses {
            match text.parse::<IpAddr>() {
                Ok(address) => {
                    let address = address.to_canonical();
                    is_outside(address)
                        .map_err(|inside| DestinationError::NotOutside(address, inside))?;
                    listed.insert(address);
                }
                Err(_a_name) => {
                    let host = text.parse()?;
                    if addresses.len() > 1 {
                        return Err(DestinationError::Several(text.clone()));
                    }
                    return Ok(Self {
                        place: Place::Host(host),
                        port,
                    });
                }
            }
        }
        if listed.is_empty() {
            return Err(DestinationError::Nowhere);
        }
        Ok(Self {
            place: Place::Addresses(listed),
            port,
        })
    }

    /// The host, if that is what it is.
    pub fn host(&self) -> Option<&HostName> {
        match &self.place {
            Place::Host(host) => Some(host),
            Place::Addresses(_) => None,
        }
    }

    /// The addresses that are called as they are.
    pub fn addresses(&self) -> BTreeSet<IpAddr> {
        match &self.place {
            Place::Host(_) => BTreeSet::new(),
            Place::Addresses(addresses) => addresses.clone(),
        }
    }
}

impl fmt::Display for Destination {
    /// As `host:port`, or `address:port` for each.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let port = self.port;
        match &self.place {
            Place::Host(host) => write!(f, "{host}:{port}"),
            Place::Addresses(addresses) => {
                let all: Vec<String> = addresses
                    .iter()
                    .map(|address| SocketAddr::new(*address, port).to_string())
                    .collect();
                f.write_str(&all.join(" "))
            }
        }
    }
}

/// Whether another host may have `address`, whatever is configured.
///
/// # Errors
/// Why not.
pub fn is_outside(address: IpAddr) -> Result<(), Inside> {
    let address = address.to_canonical();
    if address.is_loopback() || address.is_unspecified() || address.is_multicast() {
        return Err(Inside::Own);
    }
    match address {
        // 240.0.0.0/4 counts as virtual whatever is configured.
        IpAddr::V4(v4) if v4.octets()[0] >= 240 => Err(Inside::Virtual),
        // 0.0.0.0/8 is "this host".
        IpAddr::V4(v4) if v4.octets()[0] == 0 => Err(Inside::Own),
        IpAddr::V6(v6) if v6.is_unicast_link_local() => Err(Inside::LinkLocal),
        IpAddr::V4(_) | IpAddr::V6(_) => Ok(()),
    }
}

impl HostName {
    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for HostName {
    type Err = DestinationError;

    /// RFC 1123, section 2.1, and the underscores that are in use. Nothing that could be taken for an address.
    fn from_str(text: &str) -> Result<Self, DestinationError> {
        let name = text.strip_suffix('.').unwrap_or(text);
        let good_label = |label: &str| {
            (1..=63).contains(&label.len())
                && label
                    .bytes()
                    .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_'))
                && !label.starts_with('-')
                && !label.ends_with('-')
        };
        let last = name.rsplit('.').next().unwrap_or_default();
        let good = name.len() <= 253
            && name.split('.').all(good_label)
            && !last.bytes().all(|b| b.is_ascii_digit())
            && !last.eq_ignore_ascii_case("localhost");
        if !good {
            return Err(DestinationError::NoName(text.to_owned()));
        }
        Ok(Self(name.to_ascii_lowercase().into()))
    }
}

impl fmt::Display for HostName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for HostName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.0, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(addresses: &[&str], port: i64) -> Result<String, String> {
        let addresses: Vec<String> = addresses.iter().map(|a| (*a).to_owned()).collect();
        let destination = Destination::read(&addresses, port);
        destination
            .map(|destination| destination.to_string())
            .map_err(|error| error.to_string())
    }

    #[test]
    fn a_destination_is_a_host_or_addresses() {
        let long = format!("{}.test", ["x".repeat(63).as_str(); 3].join("."));
        let good = [
            (&["api.example.com"][..], 443, "api.example.com:443"),
            (&["API.Example.COM."], 1, "api.example.com:1"),
            (&["_x.a-b.test"], 65_535, "_x.a-b.test:65535"),
            (&["intranet"], 80, "intranet:80"),
            (&[long.as_str()], 80, &format!("{long}:80")),
            (
                &["192.0.2.8", "2001:db8::1", "192.0.2.7", "::ffff:192.0.2.7"],
                443,
                "192.0.2.7:443 192.0.2.8:443 [2001:db8::1]:443",
            ),
            (&["169.254.169.254"], 80, "169.254.169.254:80"),
        ];
        for (addresses, port, expected) in good {
            assert_eq!(read(addresses, port), Ok(expected.to_owned()));
        }
    }

    #[test]
    fn what_is_none_is_told() {
        let too_long = format!("{}.test", ["x".repeat(63).as_str(); 4].join("."));
        let bad = [
            (&[][..], 443, "expected a host name, or IP addresses"),
            (&["a.test", "b.test"], 443, "\"a.test\" beside others"),
            (&["192.0.2.7", "b.test"], 443, "\"b.test\" beside others"),
            (&["*.example.com"], 443, "without wildcards"),
            (&["a..test"], 443, "expected a host name"),
            (&["-a.test"], 443, "expected a host name"),
            (&["192.0.2"], 443, "expected a host name"),
            (&["a.test:443"], 443, "expected a host name"),
            (&[""], 443, "expected a host name"),
            (&["my.localhost"], 443, "expected a host name"),
            (&[too_long.as_str()], 443, "expected a host name"),
            (&["127.0.0.1"], 443, "127.0.0.1: expected a unicast address"),
            (&["::1"], 443, "not loopback"),
            (&["::ffff:127.0.0.1"], 443, "not loopback"),
            (&["0.0.0.0"], 443, "not loopback"),
            (&["224.0.0.1"], 443, "unicast"),
            (&["240.0.0.7"], 443, "240.0.0.0/4 are virtual"),
            (&["255.255.255.255"], 443, "240.0.0.0/4 are virtual"),
            (&["fe80::1"], 443, "link-local"),
            (&["a.test"], 0, "destination.port: 0"),
            (&["a.test"], 65_536, "destination.port: 65536"),
            (&["a.test"], -1, "destination.port: -1"),
        ];
        for (addresses, port, expected) in bad {
            let error = read(addresses, port).unwrap_err();
            assert!(error.contains(expected), "{addresses:?} {port}: {error}");
        }
    }
}
