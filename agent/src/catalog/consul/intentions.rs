//! What `/v1/connect/intentions` says, as intentions of the model. Pure.
//!
//! Every version of Consul lists all of them there: those of the old API and, since 1.9, those of `service-intentions`
//! config entries. What an agent that does not look into requests cannot fulfil is taken as `deny`, as Consul does
//! for a service that is not HTTP.

use std::{collections::BTreeSet, sync::Arc};

use serde::Deserialize;

use crate::{
    catalog::model::{Intention, IntentionAction, IntentionMatch, ServiceName},
    consul::{
        answers::{self, List},
        judge::Content,
    },
};

/// All intentions, in the order of the answer.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(from = "List<answers::Intention>")]
pub(super) struct Listed {
    pub(super) intentions: Vec<Intention>,
    /// What is written and cannot be used.
    pub(super) problems: Vec<String>,
    count: usize,
}

impl Content for Listed {
    fn is_empty(&self) -> bool {
        self.count == 0
    }
}

impl From<List<answers::Intention>> for Listed {
    fn from(List(entries): List<answers::Intention>) -> Self {
        let mut all = Self {
            count: entries.len(),
            ..Self::default()
        };
        for entry in &entries {
            match intention(entry) {
                Ok(Some(intention)) => all.intentions.push(intention),
                Ok(None) => {}
                Err(problem) => all.problems.push(format!(
                    "intention {} => {}: {problem}",
                    entry.source_name, entry.destination_name
                )),
            }
        }
        all
    }
}

/// `None` if it can never concern a caller or a callee of this cluster.
fn intention(entry: &answers::Intention) -> Result<Option<Intention>, String> {
    let is_other_partition = |partition: &str| !matches!(partition, "" | "default" | "*");
    if !entry.source_peer.is_empty()
        || is_other_partition(&entry.source_partition)
        || is_other_partition(&entry.destination_partition)
    {
        return Ok(None);
    }
    let looks_into_requests = entry.permissions > 0 || entry.jwt.is_some();
    let action = match entry.action.as_str() {
        _ if looks_into_requests => IntentionAction::Deny,
        "allow" => IntentionAction::Allow,
        // An unknown action allows nothing.
        _ => IntentionAction::Deny,
    };
    // Who is in the group is not known here: nobody is let in for it, and everybody by that name is kept out.
    if !entry.source_sameness_group.is_empty() && action == IntentionAction::Allow {
        return Ok(None);
    }
    Ok(Some(Intention {
        source: side(&entry.source_ns, &entry.source_name)?,
        destination: side(&entry.destination_ns, &entry.destination_name)?,
        action,
        description: entry.description.clone(),
        entry: written_in(entry),
    }))
}

/// For people who want to change it.
fn written_in(entry: &answers::Intention) -> Arc<str> {
    let why = if entry.permissions > 0 {
        ", which has permissions for HTTP requests: deny for connections"
    } else if entry.jwt.is_some() {
        ", which asks for tokens in HTTP requests: deny for connections"
    } else {
        ""
    };
    if entry.id.is_empty() {
        format!("service-intentions {}{why}", entry.destination_name).into()
    } else {
        format!("intention {}{why}", entry.id).into()
    }
}

fn side(namespace: &str, name: &str) -> Result<IntentionMatch, String> {
    let namespace = match namespace {
        "*" => None,
        "" => Some(Arc::from("default")),
        named => Some(Arc::from(named)),
    };
    let name: Option<ServiceName> = match name {
        "*" => None,
        named => Some(named.parse().map_err(|error| format!("{error}"))?),
    };
    if namespace.is_none() && name.is_some() {
        return Err("a name in every namespace: Consul has no such intention".to_owned());
    }
    Ok(IntentionMatch { namespace, name })
}

/// Whether one of them answers for everybody, so that the default never does.
pub(super) fn leave_nothing_to_the_default(intentions: &[Intention]) -> bool {
    let is_all = |side: &IntentionMatch| {
        side.name.is_none() && side.namespace.as_deref().is_none_or(|ns| ns == "default")
    };
    intentions
        .iter()
        .any(|intention| is_all(&intention.source) && is_all(&intention.destination))
}

/// Destinations that had an intention which is gone: to be asked about one by one, since a list from which a token's
/// rights have hidden some looks the same. At most `max` of them: rights are seldom lost for one service alone.
pub(super) fn vanished(before: &[Intention], now: &[Intention], max: usize) -> BTreeSet<String> {
    let key = |i: &Intention| (i.source.clone(), i.destination.clone());
    let now: BTreeSet<_> = now.iter().map(key).collect();
    let gone = before.iter().filter(|i| !now.contains(&key(i)));
    let names: BTreeSet<String> = gone
        .map(|i| {
            let name = i.destination.name.as_ref();
            name.map_or("*", ServiceName::as_str).to_owned()
        })
        .collect();
    names.into_iter().take(max).collect()
}

#[cfg(test)]
mod tests {
    use IntentionAction::{Allow, Deny};
    use serde_json::{Value, json};

    use super::*;

    fn read(entries: Value) -> Listed {
        serde_json::from_value(entries).unwrap()
    }

    /// Who may call whom, in short.
    fn short(listed: &Listed) -> Vec<(String, String, IntentionAction)> {
        let one = |i: &Intention| (i.source.to_string(), i.destination.to_string(), i.action);
        listed.intentions.iter().map(one).collect()
    }

    #[test]
    fn intentions_of_every_version_are_read() {
        // As 1.8.7 lists them, and as later ones do.
        let listed = read(json!([
            {"ID": "1d10", "Description": "test", "SourceNS": "default", "SourceName": "web",
             "DestinationNS": "default", "DestinationName": "db", "SourceType": "consul", "Action": "deny",
             "DefaultAddr": "", "DefaultPort": 0, "Meta": {"k": "v"}, "Precedence": 9},
            {"SourceName": "*", "DestinationName": "*", "Action": "allow", "SourcePartition": "default"},
            {"SourceName": "web", "DestinationName": "api", "Action": "",
             "Permissions": [{"Action": "allow", "HTTP": {"PathPrefix": "/"}}]},
            {"SourceName": "cron", "DestinationName": "api", "Action": "allow", "JWT": {"Providers": [{"Name": "x"}]}},
            {"SourceName": "far", "SourcePeer": "other", "DestinationName": "db", "Action": "allow"},
            {"SourceName": "x", "SourcePartition": "team", "DestinationName": "db", "Action": "deny"},
            {"SourceName": "g", "SourceSamenessGroup": "all", "DestinationName": "db", "Action": "allow"},
            {"SourceName": "g", "SourceSamenessGroup": "all", "DestinationName": "db", "Action": "deny"},
            {"SourceName": "new", "DestinationName": "db", "Action": "perhaps"},
            {"SourceNS": "*", "SourceName": "web", "DestinationName": "db", "Action": "allow"},
        ]));
        let expected = [
            ("web", "db", Deny),
            ("*", "*", Allow),
            ("web", "api", Deny),
            ("cron", "api", Deny),
            ("g", "db", Deny),
            ("new", "db", Deny),
        ];
        assert_eq!(
            short(&listed),
            expected.map(|(s, d, action)| (s.to_owned(), d.to_owned(), action))
        );
        assert_eq!(listed.problems.len(), 1, "{:?}", listed.problems);
        assert_eq!(&*listed.intentions[0].entry, "intention 1d10");
        assert_eq!(listed.intentions[0].description, "test");
        assert_eq!(&*listed.intentions[1].entry, "service-intentions *");
        assert!(listed.intentions[2].entry.contains("HTTP"));
        assert!(read(json!(null)).is_empty());
    }

    #[test]
    fn the_default_answers_unless_everything_is_answered() {
        let table = [
            (json!([]), false),
            (
                json!([{"SourceName": "*", "DestinationName": "*", "Action": "deny"}]),
                true,
            ),
            (
                json!([{"SourceName": "web", "DestinationName": "*", "Action": "deny"}]),
                false,
            ),
            (
                json!([{"SourceName": "*", "DestinationName": "db", "Action": "deny"}]),
                false,
            ),
        ];
        for (entries, expected) in table {
            let listed = read(entries.clone());
            assert_eq!(
                leave_nothing_to_the_default(&listed.intentions),
                expected,
                "{entries}"
            );
        }
    }

    #[test]
    fn what_vanished_is_asked_about_by_destination() {
        let entry = |source: &str, destination: &str, action: &str| json!({"SourceName": source, "DestinationName": destination, "Action": action});
        let before = read(json!([
            entry("web", "db", "allow"),
            entry("cron", "db", "allow"),
            entry("*", "*", "deny"),
            entry("web", "api", "allow"),
        ]));
        let now = read(json!([entry("web", "api", "deny")]));
        let names = |max| vanished(&before.intentions, &now.intentions, max);
        assert_eq!(names(8), BTreeSet::from(["*".to_owned(), "db".to_owned()]));
        assert_eq!(names(1).len(), 1);
        assert!(vanished(&now.intentions, &before.intentions, 8).is_empty());
    }
}
