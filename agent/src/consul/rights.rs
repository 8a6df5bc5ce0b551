//! Whether the agent's token may do what the agent needs.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use super::{
    Client, ConsulError, Request, answers::AgentServices, registration::plan::local_services,
};
use crate::telemetry::log::chain;

/// No service and no node is called so. Rights to it are rights to all, by a rule with an empty prefix.
const ANY: &str = "sidestep-checks-its-rights";

/// Of services of this node, how many names are asked about at a time.
const QUESTIONS_MAX: usize = 64;

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
struct Question<'a> {
    resource: &'static str,
    access: &'static str,
    segment: &'a str,
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
    let answered = ask(client, &questions).await;
    let problem = |index: usize| match &answered {
        Ok(allowed) if allowed.get(index) == Some(&true) => None,
        Ok(_) => Some("the token in consul.token_file may not".to_owned()),
        Err(error) if is_without_acls(error) => None,
        Err(error) => Some(chain(error).to_string()),
    };
    for (index, (needed_for, _, access, rule, is_vital)) in NEEDED.into_iter().enumerate() {
        let mut problem = problem(index).map(|problem| format!("{problem}; it takes {rule}"));
        if access == "write" && problem.is_some() {
            problem = match out_of_reach(client).await {
                Some(names) if names.is_empty() => None,
                Some(names) => Some(format!(
                    "the token in consul.token_file may not write {}; it takes {rule}",
                    names.join(", ")
                )),
                None => problem,
            };
        }
        rights.push(Right {
            needed_for,
            rule,
            is_vital,
            problem,
        });
    }
    rights
}

/// Which of the services of this node, and of the names of their proxies, the token may not write. `None` if there are
/// no services, or nobody tells.
async fn out_of_reach(client: &Client) -> Option<Vec<String>> {
    let request = Request::to(&["v1", "agent", "services"]);
    let present = client.get::<AgentServices>(&request).await.ok()?.body;
    let (services, _unusable) = local_services(&present);
    let services: BTreeSet<&str> = services
        .iter()
        .map(|local| local.service.as_str())
        .collect();
    let names: Vec<String> = services
        .iter()
        .flat_map(|name| [(*name).to_owned(), format!("{name}-sidestep-proxy")])
        .collect();
    let mut missing = Vec::new();
    for some in names.chunks(QUESTIONS_MAX) {
        let questions: Vec<_> = some
            .iter()
            .map(|name| Question {
                resource: "service",
                access: "write",
                segment: name,
            })
            .collect();
        let allowed = ask(client, &questions).await.ok()?;
        for (index, name) in some.iter().enumerate() {
            if allowed.get(index) != Some(&true) {
                missing.push(name.clone());
            }
        }
    }
    (!names.is_empty()).then_some(missing)
}

/// Whether the token may, question by question.
async fn ask(client: &Client, questions: &[Question<'_>]) -> Result<Vec<bool>, ConsulError> {
    let request = Request::to(&["v1", "internal", "acl", "authorize"]);
    let answer = client.post::<Vec<Response>>(&request, &questions).await?;
    Ok(answer.body.iter().map(|answer| answer.allow).collect())
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
    use crate::consul::testing::{RealConsul, register, with_sidecar};

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
        // A token for the services that are here.
        let policy = json!({"Name": "p", "Rules": r#"
            service "db" { policy = "write" }
            service "db-sidestep-proxy" { policy = "write" }
            service_prefix "" { policy = "read" intentions = "read" }
            node_prefix "" { policy = "read" }
            agent_prefix "" { policy = "read" }"#});
        let to = |what| Request::to(&["v1", "acl", what]);
        root.put(&to("policy"), &policy).await.unwrap();
        let secret = "11111111-2222-3333-4444-555555555555";
        let token = json!({"SecretID": secret, "Policies": [{"Name": "p"}]});
        root.put(&to("token"), &token).await.unwrap();
        let narrow = consul.client_with("narrow", secret);
        assert_eq!(missing(&check(&narrow).await), 1, "no service is here");
        register(&root, &with_sidecar("db", 5432, 21000)).await;
        let rights = check(&narrow).await;
        assert_eq!(missing(&rights), 0, "{rights:?}");
        register(&root, &with_sidecar("web", 8080, 21001)).await;
        let rights = check(&narrow).await;
        let said = rights.last().and_then(|right| right.problem.clone());
        let said = said.unwrap_or_default();
        assert!(
            said.contains("may not write web, web-sidestep-proxy; "),
            "{said}"
        );
    }
}
