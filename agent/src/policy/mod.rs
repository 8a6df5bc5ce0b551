//! Intentions: may this identity call that service? Pure; Consul's precedence.
//!
//! An intention for an exact destination beats one for `*`, and only among equals does the source count.
//! Source: Consul, "Service intentions: precedence and match order".

pub mod store;

use std::{cmp::Reverse, collections::HashMap, fmt, sync::Arc};

pub use store::PolicyStore;

use crate::{
    catalog::model::{Intention, IntentionAction, IntentionMatch, ServiceName},
    identity::spiffe::SpiffeId,
};

/// The namespace of every service that this node knows.
const NAMESPACE: &str = "default";

/// Intentions, ready to be asked: those of one destination together, the decisive one first.
#[derive(Debug, Clone)]
pub struct Intentions {
    exact: HashMap<ServiceName, Vec<Rule>>,
    /// For every destination; asked after the exact ones, which all have a higher precedence.
    wildcard: Vec<Rule>,
    default: IntentionAction,
}

#[derive(Debug, Clone)]
struct Rule {
    source: IntentionMatch,
    destination: IntentionMatch,
    action: IntentionAction,
    precedence: u8,
    entry: Arc<str>,
}

/// The answer and why.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Decision {
    /// Whether the call may be made.
    pub action: IntentionAction,
    /// What decided.
    pub reason: Reason,
}

/// What decided.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reason {
    /// The matching intention of the highest precedence.
    Intention {
        /// Its answer.
        action: IntentionAction,
        /// Its source.
        source: IntentionMatch,
        /// Its destination.
        destination: IntentionMatch,
        /// 9 (both exact) to 1 (all wildcards).
        precedence: u8,
        /// Where it is written.
        entry: Arc<str>,
    },
    /// None matched: `policy.default`.
    Default(IntentionAction),
}

impl Intentions {
    /// Compiles `intentions`; `default` answers where none matches.
    ///
    /// Of two for the same source and destination, which Consul does not have, `deny` wins.
    pub fn new(intentions: &[Intention], default: IntentionAction) -> Self {
        let mut exact: HashMap<ServiceName, Vec<Rule>> = HashMap::new();
        let mut wildcard = Vec::new();
        for intention in intentions {
            if intention
                .destination
                .namespace
                .as_deref()
                .is_some_and(|ns| ns != NAMESPACE)
            {
                continue;
            }
            let rule = Rule {
                source: intention.source.clone(),
                destination: intention.destination.clone(),
                action: intention.action,
                precedence: precedence(&intention.source, &intention.destination),
                entry: Arc::clone(&intention.entry),
            };
            match &intention.destination.name {
                Some(name) => exact.entry(name.clone()).or_default().push(rule),
                None => wildcard.push(rule),
            }
        }
        for rules in exact.values_mut().chain(std::iter::once(&mut wildcard)) {
            rules.sort_by_key(|rule| {
                (
                    Reverse(rule.precedence),
                    rule.action == IntentionAction::Allow,
                )
            });
        }
        Self {
            exact,
            wildcard,
            default,
        }
    }

    /// May `source` call `destination`?
    pub fn decide(&self, source: &SpiffeId, destination: &ServiceName) -> Decision {
        let exact = self.exact.get(destination).map_or(&[][..], Vec::as_slice);
        let decisive = exact
            .iter()
            .chain(&self.wildcard)
            .find(|rule| rule.matches(source));
        match decisive {
            Some(rule) => Decision {
                action: rule.action,
                reason: Reason::Intention {
                    action: rule.action,
                    source: rule.source.clone(),
                    destination: rule.destination.clone(),
                    precedence: rule.precedence,
                    entry: Arc::clone(&rule.entry),
                },
            },
            None => Decision {
                action: self.default,
                reason: Reason::Default(self.default),
            },
        }
    }
}

impl Rule {
    fn matches(&self, source: &SpiffeId) -> bool {
        self.source
            .namespace
            .as_deref()
            .is_none_or(|ns| ns == &*source.namespace)
            && self
                .source
                .name
                .as_ref()
                .is_none_or(|name| *name == source.service)
    }
}

/// Consul's precedence: 9 where both sides are exact, down to 1 where both are `*/*`.
fn precedence(source: &IntentionMatch, destination: &IntentionMatch) -> u8 {
    // How much a side leaves open: nothing, the name, or the namespace as well.
    let openness = |side: &IntentionMatch| match (&side.namespace, &side.name) {
        (_, Some(_)) => 0,
        (Some(_), None) => 1,
        (None, None) => 2,
    };
    9 - 3 * openness(destination) - openness(source)
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Intention {
                action,
                source,
                destination,
                precedence,
                entry: _,
            } => write!(
                f,
                "intention {} {source} => {destination} (precedence {precedence})",
                word(*action)
            ),
            Self::Default(action) => write!(f, "default {} (no intention matches)", word(*action)),
        }
    }
}

fn word(action: IntentionAction) -> &'static str {
    match action {
        IntentionAction::Allow => "allow",
        IntentionAction::Deny => "deny",
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn side(text: &str) -> IntentionMatch {
        let (namespace, name) = text.split_once('/').unwrap_or((NAMESPACE, text));
        IntentionMatch {
            namespace: (namespace != "*").then(|| namespace.into()),
            name: (name != "*").then(|| name.parse().unwrap()),
        }
    }

    fn intention(source: &str, destination: &str, action: IntentionAction) -> Intention {
        Intention {
            source: side(source),
            destination: side(destination),
            action,
            description: String::new(),
            entry: "a test".into(),
        }
    }

    fn id(service: &str) -> SpiffeId {
        format!("spiffe://example.test/ns/default/dc/dc1/svc/{service}")
            .parse()
            .unwrap()
    }

    #[test]
    fn precedence_is_consuls() {
        let table = [
            ("web", "db", 9),
            ("*", "db", 8),
            ("*/*", "db", 7),
            ("web", "*", 6),
            ("*", "*", 5),
            ("*/*", "*", 4),
            ("web", "*/*", 3),
            ("*", "*/*", 2),
            ("*/*", "*/*", 1),
        ];
        for (source, destination, expected) in table {
            assert_eq!(
                precedence(&side(source), &side(destination)),
                expected,
                "{source} => {destination}"
            );
        }
    }

    #[test]
    fn the_destination_is_more_specific_than_the_source() {
        use IntentionAction::{Allow, Deny};
        let intentions = Intentions::new(
            &[
                intention("*", "*", Allow),
                intention("web", "*", Deny),
                intention("*", "db", Deny),
                intention("web", "db", Allow),
            ],
            Deny,
        );
        let table = [
            (
                "web",
                "db",
                Allow,
                "intention allow web => db (precedence 9)",
            ),
            (
                "web",
                "cache",
                Deny,
                "intention deny web => * (precedence 6)",
            ),
            ("other", "db", Deny, "intention deny * => db (precedence 8)"),
            (
                "other",
                "cache",
                Allow,
                "intention allow * => * (precedence 5)",
            ),
        ];
        for (source, destination, action, reason) in table {
            let decision = intentions.decide(&id(source), &destination.parse().unwrap());
            assert_eq!(decision.action, action, "{source} => {destination}");
            assert_eq!(decision.reason.to_string(), reason);
        }
    }

    #[test]
    fn the_default_answers_when_nothing_matches() {
        let none = Intentions::new(&[], IntentionAction::Deny);
        let decision = none.decide(&id("web"), &"db".parse().unwrap());
        assert_eq!(decision.action, IntentionAction::Deny);
        assert_eq!(
            decision.reason.to_string(),
            "default deny (no intention matches)"
        );
    }

    /// As the documentation tells it: sort everything by precedence, take the first that matches.
    fn naive(all: &[Intention], source: &SpiffeId, destination: &ServiceName) -> IntentionAction {
        let side_matches = |side: &IntentionMatch, namespace: &str, name: &ServiceName| {
            side.namespace.as_deref().is_none_or(|n| n == namespace)
                && side.name.as_ref().is_none_or(|n| n == name)
        };
        let mut matching: Vec<_> = all
            .iter()
            .filter(|i| side_matches(&i.source, &source.namespace, &source.service))
            .filter(|i| side_matches(&i.destination, NAMESPACE, destination))
            .collect();
        matching.sort_by_key(|i| {
            (
                Reverse(precedence(&i.source, &i.destination)),
                i.action == IntentionAction::Allow,
            )
        });
        matching.first().map_or(IntentionAction::Deny, |i| i.action)
    }

    proptest! {
        #[test]
        fn decisions_equal_the_naive_ones(
            raw in proptest::collection::vec(("(a|b|\\*|\\*/\\*|other/a)", "(a|b|\\*|\\*/\\*)", any::<bool>()), 0..12),
            source in "(a|b|c)",
            destination in "(a|b|c)",
        ) {
            let all: Vec<Intention> = raw
                .iter()
                .map(|(s, d, allow)| {
                    let action = if *allow { IntentionAction::Allow } else { IntentionAction::Deny };
                    intention(s, d, action)
                })
                .collect();
            let destination: ServiceName = destination.parse().unwrap();
            let compiled = Intentions::new(&all, IntentionAction::Deny);
            let decided = compiled.decide(&id(&source), &destination).action;
            prop_assert_eq!(decided, naive(&all, &id(&source), &destination));
        }
    }
}
