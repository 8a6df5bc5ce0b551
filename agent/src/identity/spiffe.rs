//! SPIFFE ids of services in Consul's grammar: `spiffe://<td>[/ap/<partition>]/ns/<ns>/dc/<dc>/svc/<svc>`.
//!
//! Ids come from certificates of others, so parsing takes any text. The path is split while it is still
//! percent-encoded and each segment decoded on its own, as Consul does: an encoded `/` never makes a new
//! segment. Ids of agents, servers, gateways and CAs are no ids of services and do not parse.

use std::{fmt, str::FromStr, sync::Arc};

use crate::catalog::model::ServiceName;

/// SPIFFE-ID, section 2.3: an id of more bytes need not be supported. No id of a service comes near.
const MAX_ID_BYTES: usize = 2048;

/// SPIFFE-ID, section 2.1: the trust domain is at most 255 bytes.
const MAX_TRUST_DOMAIN_BYTES: usize = 255;

/// The name below which one set of roots speaks for every identity, in lower case.
///
/// Labels of `a-z 0-9 - _`, joined by dots. Parsing lowers the case.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TrustDomain(Arc<str>);

impl TrustDomain {
    /// The trust domain as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The id of the trust domain itself, which CA certificates carry: `spiffe://<td>`.
    pub fn uri(&self) -> String {
        format!("spiffe://{self}")
    }
}

impl FromStr for TrustDomain {
    type Err = TrustDomainError;

    fn from_str(text: &str) -> Result<Self, TrustDomainError> {
        let lower = text.to_ascii_lowercase();
        let label_is_good = |label: &str| {
            (1..=63).contains(&label.len())
                && !label.starts_with('-')
                && !label.ends_with('-')
                && label
                    .bytes()
                    .all(|b| matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'-' | b'_'))
        };
        if lower.len() <= MAX_TRUST_DOMAIN_BYTES && lower.split('.').all(label_is_good) {
            Ok(Self(lower.into()))
        } else {
            Err(TrustDomainError {
                text: text.to_owned(),
            })
        }
    }
}

impl fmt::Display for TrustDomain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for TrustDomain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.0, f)
    }
}

/// A trust domain that is none.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("trust domain {text:?}: expected a name like \"example.org\" of at most 255 characters")]
pub struct TrustDomainError {
    text: String,
}

/// The identity of a service: what its certificate says and what intentions are about.
///
/// Two ids are equal if they name the same service, however their URIs were percent-encoded.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SpiffeId {
    /// Whose roots vouch for it.
    pub trust_domain: TrustDomain,
    /// Consul's admin partition; `None` is `default`.
    pub partition: Option<Arc<str>>,
    /// Consul's namespace.
    pub namespace: Arc<str>,
    /// The datacenter that issued it. Intentions ignore it.
    pub datacenter: Arc<str>,
    /// The service.
    pub service: ServiceName,
}

impl SpiffeId {
    /// The id of `service` in the namespace `default` and in no partition.
    pub fn service(trust_domain: &TrustDomain, datacenter: &str, service: &ServiceName) -> Self {
        Self {
            trust_domain: trust_domain.clone(),
            partition: None,
            namespace: "default".into(),
            datacenter: datacenter.into(),
            service: service.clone(),
        }
    }
}

impl FromStr for SpiffeId {
    type Err = SpiffeIdError;

    /// # Errors
    /// One variant of [`SpiffeIdError`] per rule of the grammar; never panics, whatever the text.
    fn from_str(text: &str) -> Result<Self, SpiffeIdError> {
        if text.len() > MAX_ID_BYTES {
            return Err(SpiffeIdError::TooLong { bytes: text.len() });
        }
        let (scheme, rest) = text.split_once("://").ok_or(SpiffeIdError::Scheme)?;
        if !scheme.eq_ignore_ascii_case("spiffe") {
            return Err(SpiffeIdError::Scheme);
        }
        let (authority, path) = rest.split_once('/').ok_or(SpiffeIdError::NotAService)?;
        let trust_domain = authority.parse()?;
        let mut segments = path.split('/');
        let mut rest = || segments.next();
        let (partition, namespace, datacenter, service) = match (rest(), rest(), rest()) {
            (Some("ap"), partition, Some("ns")) => (
                partition,
                rest(),
                keyed("dc", &mut rest),
                keyed("svc", &mut rest),
            ),
            (Some("ns"), namespace, Some("dc")) => {
                (None, namespace, rest(), keyed("svc", &mut rest))
            }
            _ => return Err(SpiffeIdError::NotAService),
        };
        let (Some(namespace), Some(datacenter), Some(service), None) =
            (namespace, datacenter, service, rest())
        else {
            return Err(SpiffeIdError::NotAService);
        };
        Ok(Self {
            trust_domain,
            partition: partition.map(decode_segment).transpose()?,
            namespace: decode_segment(namespace)?,
            datacenter: decode_segment(datacenter)?,
            service: decode_segment(service)?
                .parse()
                .ok()
                .ok_or_else(|| bad_segment(service))?,
        })
    }
}

/// The segment that follows the segment `key`, if that is what comes next.
fn keyed<'a>(key: &str, next: &mut impl FnMut() -> Option<&'a str>) -> Option<&'a str> {
    (next()? == key).then(next).flatten()
}

/// Decodes `%xx` and refuses what no name of Consul holds: nothing, `/`, control characters, `.` and `..`.
fn decode_segment(encoded: &str) -> Result<Arc<str>, SpiffeIdError> {
    let error = || bad_segment(encoded);
    let mut bytes = encoded.bytes();
    let mut decoded = Vec::with_capacity(encoded.len());
    while let Some(byte) = bytes.next() {
        decoded.push(match byte {
            b'%' => {
                let high = bytes.next().and_then(hex_digit).ok_or_else(error)?;
                let low = bytes.next().and_then(hex_digit).ok_or_else(error)?;
                high << 4 | low
            }
            // These end a path in a URI: a reader that splits there would see another id.
            b'?' | b'#' => return Err(error()),
            plain => plain,
        });
    }
    let text = String::from_utf8(decoded).ok().ok_or_else(error)?;
    let bad = text.is_empty()
        || text == "."
        || text == ".."
        || text.chars().any(|c| c == '/' || c.is_control());
    if bad { Err(error()) } else { Ok(text.into()) }
}

fn bad_segment(encoded: &str) -> SpiffeIdError {
    SpiffeIdError::Segment {
        segment: encoded.to_owned(),
    }
}

fn hex_digit(byte: u8) -> Option<u8> {
    char::from(byte)
        .to_digit(16)
        .and_then(|digit| u8::try_from(digit).ok())
}

impl fmt::Display for SpiffeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "spiffe://{}", self.trust_domain)?;
        if let Some(partition) = &self.partition {
            write!(f, "/ap/{}", Encoded(partition))?;
        }
        write!(
            f,
            "/ns/{}/dc/{}/svc/{}",
            Encoded(&self.namespace),
            Encoded(&self.datacenter),
            Encoded(self.service.as_str())
        )
    }
}

impl fmt::Debug for SpiffeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Shows a segment with everything but RFC 3986's unreserved characters percent-encoded.
struct Encoded<'a>(&'a str);

impl fmt::Display for Encoded<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for byte in self.0.bytes() {
            match byte {
                b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => {
                    write!(f, "{}", char::from(byte))?;
                }
                other => write!(f, "%{other:02X}")?,
            }
        }
        Ok(())
    }
}

/// A text that is no id of a service.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SpiffeIdError {
    /// Longer than any id may be.
    #[error("a SPIFFE id has at most {MAX_ID_BYTES} bytes, this has {bytes}")]
    TooLong {
        /// How long it is.
        bytes: usize,
    },
    /// Does not begin with `spiffe://`.
    #[error("expected spiffe://")]
    Scheme,
    /// A URI with another path: an agent's, a gateway's or a CA's id, for example.
    #[error("expected the path [/ap/<partition>]/ns/<namespace>/dc/<datacenter>/svc/<service>")]
    NotAService,
    /// A path segment which is empty, badly encoded or no name.
    #[error("path segment {segment:?} is not a name")]
    Segment {
        /// As it was written.
        segment: String,
    },
    /// What stands for the trust domain.
    #[error(transparent)]
    TrustDomain(#[from] TrustDomainError),
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn parse(text: &str) -> Result<SpiffeId, SpiffeIdError> {
        text.parse()
    }

    #[test]
    fn service_ids_parse_and_print() {
        for text in [
            "spiffe://example.org/ns/default/dc/dc1/svc/web",
            "spiffe://8855c729-3e56-1ceb-587a-6e2a39c7effc.consul/ap/team/ns/a%20b/dc/dc-1/svc/db_2",
        ] {
            assert_eq!(parse(text).map(|id| id.to_string()), Ok(text.to_owned()));
        }
        let web = "web".parse().unwrap();
        let made = SpiffeId::service(&"Example.ORG".parse().unwrap(), "dc1", &web);
        assert_eq!(
            parse("SPIFFE://EXAMPLE.org/ns/default/dc/dc1/svc/%77eb"),
            Ok(made)
        );
    }

    #[test]
    fn what_is_no_service_is_refused() {
        for text in [
            "",
            "spiffe://",
            "spiffe://example.org",
            "spiffe://example.org/",
            "https://example.org/ns/default/dc/dc1/svc/web",
            "spiffe:///ns/default/dc/dc1/svc/web",
            "spiffe://user@example.org/ns/default/dc/dc1/svc/web",
            "spiffe://example.org:443/ns/default/dc/dc1/svc/web",
            "spiffe://example..org/ns/default/dc/dc1/svc/web",
            "spiffe://example.org/ns/default/dc/dc1/svc/",
            "spiffe://example.org/ns/default/dc/dc1/svc/web/",
            "spiffe://example.org/ns/default/dc/dc1/svc/web/more",
            "spiffe://example.org//ns/default/dc/dc1/svc/web",
            "spiffe://example.org/ns//dc/dc1/svc/web",
            "spiffe://example.org/ns/../dc/dc1/svc/web",
            "spiffe://example.org/ns/a%2fb/dc/dc1/svc/web",
            "spiffe://example.org/ns/a%00/dc/dc1/svc/web",
            "spiffe://example.org/ns/%ff/dc/dc1/svc/web",
            "spiffe://example.org/ns/%4/dc/dc1/svc/web",
            "spiffe://example.org/ns/%+4/dc/dc1/svc/web",
            "spiffe://example.org/ns/default/dc/dc1/svc/web?x=y",
            "spiffe://example.org/ns/default/dc/d#c1/svc/web",
            "spiffe://example.org/ns/default/dc/dc1/svc/-web",
            "spiffe://example.org/ap/x/dc/dc1/svc/web",
            "spiffe://example.org/agent/client/dc/dc1/id/web",
            "spiffe://example.org/gateway/mesh/dc/dc1",
            &format!(
                "spiffe://example.org/ns/{}/dc/dc1/svc/web",
                "x".repeat(2048)
            ),
        ] {
            assert!(parse(text).is_err(), "{text:?} passed");
        }
    }

    fn segment() -> impl Strategy<Value = Arc<str>> {
        "\\PC{1,40}"
            .prop_filter("a name", |s| !s.contains('/') && s != "." && s != "..")
            .prop_map(Arc::from)
    }

    proptest! {
        #[test]
        fn printed_ids_parse_to_themselves(
            trust_domain in "[a-z0-9]{1,20}(\\.[a-z0-9][a-z0-9_-]{0,20}[a-z0-9]){0,3}",
            partition in proptest::option::of(segment()),
            namespace in segment(),
            datacenter in segment(),
            service in "[a-zA-Z0-9][a-zA-Z0-9._-]{0,60}",
        ) {
            let id = SpiffeId {
                trust_domain: trust_domain.parse().unwrap(),
                partition,
                namespace,
                datacenter,
                service: service.parse().unwrap(),
            };
            prop_assert_eq!(parse(&id.to_string()), Ok(id));
        }

        #[test]
        fn any_text_is_answered(text in "\\PC*", tail in "(/|%|ap|ns|dc|svc|[a-z]|\\PC){0,20}") {
            let _ = parse(&text);
            if let Ok(id) = parse(&format!("spiffe://example.org/{tail}")) {
                prop_assert_eq!(parse(&id.to_string()), Ok(id));
            }
        }
    }
}
