//! What a name below the domain asks for, in Consul's grammar. Pure; who answers is [`super::zone`].

/// What a name asks for. All texts are in lower case.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Asked {
    /// The domain itself.
    Apex,
    /// `ns`: the host of the name server.
    NameServer,
    /// A name that has names below it and nothing itself.
    Branch,
    /// `<service>.virtual`
    Virtual {
        /// The service.
        service: String,
    },
    /// `[<tag>.]<service>.service[.<datacenter>]` or `_<service>._<tag or tcp>.service[.<datacenter>]`
    Service {
        /// The service.
        service: String,
        /// Only instances with this tag.
        tag: Option<String>,
        /// Where; here if it is not said.
        datacenter: Option<String>,
    },
    /// `<service>.connect[.<datacenter>]`
    Connect {
        /// The service.
        service: String,
        /// Where; here if it is not said.
        datacenter: Option<String>,
    },
    /// `<node>.node[.<datacenter>]`
    Node {
        /// The node.
        node: String,
        /// Where; here if it is not said.
        datacenter: Option<String>,
    },
    /// `<address in hexadecimal>.addr[.<datacenter>]`
    Address {
        /// The digits.
        digits: String,
    },
    /// Nothing that there could be.
    Nothing,
}

/// The words that say what kind of name it is.
const KINDS: [&str; 5] = ["service", "connect", "virtual", "node", "addr"];

/// Reads the labels of a name without those of the domain. `for_srv`: the word `service` may be left out then.
///
/// As in Consul, the rightmost word that is a kind decides.
/// Source: agent/dns.go of Consul 1.8, `dispatch`.
pub(super) fn read(labels: &[String], for_srv: bool) -> Asked {
    let kind_at = labels
        .iter()
        .rposition(|label| KINDS.contains(&label.as_str()) || (for_srv && label.starts_with('_')));
    let Some(at) = kind_at else {
        return without_kind(labels);
    };
    let (before, rest) = labels.split_at(at);
    let Some((kind, suffix)) = rest.split_first() else {
        return Asked::Nothing;
    };
    // Of `_web._tcp` the kind is left out, and the label itself belongs to what is before it.
    let (kind, before) = if kind.starts_with('_') {
        ("service", labels.get(..=at).unwrap_or_default())
    } else {
        (kind.as_str(), before)
    };
    let Ok(datacenter) = datacenter(suffix) else {
        return Asked::Nothing;
    };
    if before.is_empty() {
        return Asked::Branch;
    }
    match kind {
        "service" => service(before, datacenter),
        "connect" => Asked::Connect {
            // Consul pays no heed to what is before the service either.
            service: before.last().cloned().unwrap_or_default(),
            datacenter,
        },
        "virtual" if suffix.is_empty() => Asked::Virtual {
            service: before.join("."),
        },
        "node" => Asked::Node {
            node: before.join("."),
            datacenter,
        },
        "addr" => match before {
            [digits] => Asked::Address {
                digits: digits.clone(),
            },
            _ => Asked::Nothing,
        },
        _ => Asked::Nothing,
    }
}

fn without_kind(labels: &[String]) -> Asked {
    match labels {
        [] => Asked::Apex,
        [ns] if ns == "ns" => Asked::NameServer,
        // `<datacenter>` and `<datacenter>.dc`: names of services end so.
        [_] => Asked::Branch,
        [_, dc] if dc == "dc" => Asked::Branch,
        _ => Asked::Nothing,
    }
}

/// What follows the kind is no datacenter.
struct NoDatacenter;

/// The datacenter, if one is named.
fn datacenter(suffix: &[String]) -> Result<Option<String>, NoDatacenter> {
    match suffix {
        [] => Ok(None),
        [datacenter] => Ok(Some(datacenter.clone())),
        [datacenter, dc] if dc == "dc" => Ok(Some(datacenter.clone())),
        _ => Err(NoDatacenter),
    }
}

fn service(before: &[String], datacenter: Option<String>) -> Asked {
    match before {
        // RFC 2782, with a tag in place of the protocol if it is not `tcp`.
        [service, tag] if service.starts_with('_') && tag.starts_with('_') => {
            let tag = tag.trim_start_matches('_');
            Asked::Service {
                service: service.trim_start_matches('_').to_owned(),
                tag: (tag != "tcp").then(|| tag.to_owned()),
                datacenter,
            }
        }
        [protocol] if protocol.starts_with('_') => Asked::Branch,
        [tag @ .., service] => Asked::Service {
            service: service.clone(),
            tag: (!tag.is_empty()).then(|| tag.join(".")),
            datacenter,
        },
        [] => Asked::Branch,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(name: &str, for_srv: bool) -> Asked {
        let labels: Vec<String> = name
            .split('.')
            .filter(|label| !label.is_empty())
            .map(str::to_owned)
            .collect();
        read(&labels, for_srv)
    }

    fn service(service: &str, tag: Option<&str>, datacenter: Option<&str>) -> Asked {
        Asked::Service {
            service: service.to_owned(),
            tag: tag.map(str::to_owned),
            datacenter: datacenter.map(str::to_owned),
        }
    }

    #[test]
    fn services_are_named_as_in_consul() {
        let table = [
            ("web.service", service("web", None, None)),
            ("web.service.dc1", service("web", None, Some("dc1"))),
            ("web.service.dc1.dc", service("web", None, Some("dc1"))),
            ("v1.web.service", service("web", Some("v1"), None)),
            (
                "a.b.web.service.dc1",
                service("web", Some("a.b"), Some("dc1")),
            ),
            ("_web._tcp.service", service("web", None, None)),
            (
                "_web._v1.service.dc1",
                service("web", Some("v1"), Some("dc1")),
            ),
            // The rightmost word decides.
            ("web.service.service", service("service", Some("web"), None)),
            ("service", Asked::Branch),
            ("service.dc1", Asked::Branch),
            ("_tcp.service", Asked::Branch),
            ("web.service.a.b", Asked::Nothing),
        ];
        for (name, expected) in table {
            assert_eq!(of(name, false), expected, "{name}");
        }
    }

    #[test]
    fn the_word_service_may_be_left_out_of_an_srv_name() {
        assert_eq!(of("_web._tcp", true), service("web", None, None));
        assert_eq!(
            of("_web._v1.dc1", true),
            service("web", Some("v1"), Some("dc1"))
        );
        assert_eq!(of("_web._tcp", false), Asked::Nothing);
    }

    #[test]
    fn other_kinds_have_their_names() {
        let text = str::to_owned;
        let table = [
            ("", Asked::Apex),
            ("ns", Asked::NameServer),
            ("dc1", Asked::Branch),
            (
                "web.virtual",
                Asked::Virtual {
                    service: text("web"),
                },
            ),
            (
                "a.b.virtual",
                Asked::Virtual {
                    service: text("a.b"),
                },
            ),
            ("web.virtual.dc1", Asked::Nothing),
            (
                "web.connect.dc1",
                Asked::Connect {
                    service: text("web"),
                    datacenter: Some(text("dc1")),
                },
            ),
            (
                "x.node",
                Asked::Node {
                    node: text("x"),
                    datacenter: None,
                },
            ),
            (
                "c0000201.addr.dc1",
                Asked::Address {
                    digits: text("c0000201"),
                },
            ),
            ("a.c0000201.addr", Asked::Nothing),
            ("web.query", Asked::Nothing),
            ("a.b.c", Asked::Nothing),
        ];
        for (name, expected) in table {
            assert_eq!(of(name, false), expected, "{name}");
        }
    }
}
