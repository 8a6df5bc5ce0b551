//! Whether the agent's token may do what the agent needs.

use serde::{Deserialize, Serialize};

use super::{Client, ConsulError, Request};
use crate::telemetry::log::chain;

/// No service and no node is called so. Rights to it are rights to all, by a rule with an empty prefix.
const ANY: &str = "sidestep-checks-its-rights";

/// Something the agent needs, and whether it may.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Right {
    /// What it is needed for.
    pub needed_for: &'static str,
    /// The rule of an ACL policy that gives it.
    pub rule: &'static str,
    /// Whether the agent is of no use without.
    pub is_vital: bool,
    /// Why it is not there.
    pub problem: Option<String>,
}

/// One question of `/v1/internal/acl/authorize`.
#[derive(Debug, Serialize)]
#[serde(rename_all = "PascalCase")]
struct Question {
    resource: &'static str,
    access: &'static str,
    segment: &'static str,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Response {
    #[serde(default)]
    allow: bool,
}

/// For each: what for, the resource and the access to it, the rule that gives it, and whether it is vital.
const NEEDED: [(&str, &str, &str, &str, bool); 4] = [
    (
        "where services are",
        "node",
        "read",
        "node_prefix \"\" { policy = \"read\" }",
        true,
    ),
    (
        "which services there are",
        "service",
        "read",
        "service_prefix \"\" { policy = \"read\" }",
        true,
    ),
    (
        "intentions",
        "intention",
        "read",
        "service_prefix \"\" { intentions = \"read\" }",
        true,
    ),
    (
        "certificates and registrations of whatever service is here",
        "service",
        "write",
        "service_prefix \"\" { policy = \"write\" }, or service \"NAME\" for each service of this node",
        false,
    ),
];

/// Asks Consul. Where ACLs are off, everything may be done.
pub async fn check(client: &Client) -> Vec<Right> {
    let mut rights = vec![own_agent(client).await];
    let questions = NEEDED.map(|(_, resource, access, ..)| Question {
        resource,
        access,
        segment: ANY,
    });
    let request = Request::to(&["v1", "internal", "acl", "authorize"]);
    let answered = client.post::<Vec<Response>>(&request, &questions).await;
    let problem = |index: usize| match &answered {
        Ok(answer) if answer.body.get(index).is_some_and(|answer| answer.allow) => None,
        Ok(_) => Some("the token in consul.token_file may not".to_owned()),
        Err(error) if is_without_acls(error) => None,
        Err(error) => Some(chain(error).to_string()),
    };
    for (index, (needed_for, _, _, rule, is_vital)) in NEEDED.into_iter().enumerate() {
        rights.push(Right {
            needed_for,
            rule,
            is_vital,
            problem: problem(index).map(|problem| format!("{problem}; it takes {rule}")),
        });
    }
    rights
}

/// Asked for itself: a rule may name this one node.
async fn own_agent(client: &Client) -> Right {
    let rule = "agent \"NODE\" { policy = \"read\" }";
    let asked = client
        .get::<serde::de::IgnoredAny>(&Request::to(&["v1", "agent", "self"]))
        .await;
    Right {
        needed_for: "the names of this node and its datacenter",
        rule,
        is_vital: true,
        problem: asked
            .err()
            .map(|error| format!("{}; it takes {rule}", chain(&error))),
    }
}

/// Consul says so with status 401, or 404 where it has no such endpoint.
fn is_without_acls(error: &ConsulError) -> bool {
    match error {
        ConsulError::Status { status, text, .. } => {
            text.contains("ACL support disabled") || status.as_u16() == 404
        }
        ConsulError::Connect { .. }
        | ConsulError::TlsFile { .. }
        | ConsulError::TlsSettings(_)
        | ConsulError::TokenFile { .. }
        | ConsulError::Timeout { .. }
        | ConsulError::Exchange { .. }
        | ConsulError::Request { .. }
        | ConsulError::Body { .. }
        | ConsulError::Decode { .. } => false,
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use serde_json::json;
    use tokio::time::{Instant, sleep};

    use super::*;
    use crate::consul::testing::RealConsul;

    fn missing(rights: &[Right]) -> usize {
        rights
            .iter()
            .filter(|right| right.problem.is_some())
            .count()
    }

    #[tokio::test]
    async fn without_acls_everything_may_be_done() {
        let Some(consul) = RealConsul::start(json!({})).await else {
            return;
        };
        let rights = check(&consul.client()).await;
        assert_eq!(
            (rights.len(), missing(&rights)),
            (1 + NEEDED.len(), 0),
            "{rights:?}"
        );
    }

    #[tokio::test]
    async fn what_a_token_may_not_do_is_told() {
        let acl = json!({"acl": {"enabled": true, "default_policy": "deny", "tokens": {"master": "root"}}});
        let Some(consul) = RealConsul::start(acl).await else {
            return;
        };
        let root = consul.client_with("root", "root");
        let deadline = Instant::now() + Duration::from_secs(20);
        // Until the ACLs are in force.
        while missing(&check(&root).await) > 0 {
            assert!(Instant::now() < deadline, "{:?}", check(&root).await);
            sleep(Duration::from_millis(50)).await;
        }
        let rights = check(&consul.client()).await;
        assert_eq!(missing(&rights), 1 + NEEDED.len(), "{rights:?}");
        for right in rights {
            assert!(right.problem.unwrap_or_default().ends_with(right.rule));
        }
    }
}
