//! Consul's HTTP API, asked with curl from within the agent's namespace.

#![expect(
    clippy::indexing_slicing,
    reason = "a JSON value answers to every key, if with null"
)]

use std::{path::PathBuf, time::Duration};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::{Value, json};

use super::SOON;
use crate::{node::Node, program::Program};

/// The API of one agent, as the owner of one token.
#[derive(Debug, Clone)]
pub struct Api {
    curl: Program,
    base: String,
    token: Option<String>,
}

/// How to be sure whom one talks to, and to be let in.
#[derive(Debug, Clone)]
pub struct Tls {
    /// Signed the agent's certificate.
    pub ca: PathBuf,
    /// The client's certificate.
    pub certificate: PathBuf,
    /// Its key.
    pub key: PathBuf,
}

/// What the agent answered.
#[derive(Debug, Clone)]
pub struct Answer {
    /// The HTTP status.
    pub status: u16,
    head: String,
    /// The body as it came.
    pub body: String,
}

impl Answer {
    /// The header `name`, in whatever case.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.head.lines().find_map(|line| {
            let (found, value) = line.split_once(':')?;
            found.eq_ignore_ascii_case(name).then_some(value.trim())
        })
    }

    /// The body as JSON; null if it has none.
    ///
    /// # Errors
    /// If it is no JSON.
    pub fn json(&self) -> Result<Value> {
        if self.body.trim().is_empty() {
            return Ok(Value::Null);
        }
        serde_json::from_str(&self.body).with_context(|| format!("reading {:?}", self.body))
    }
}

/// A leaf certificate with its key, as PEM.
#[derive(Debug, Clone)]
pub struct Leaf {
    /// When it was made, for [`Api::leaf_after`].
    pub index: u64,
    /// The certificate and what else its chain has.
    pub chain: String,
    /// Its key.
    pub key: String,
    /// Who it is.
    pub uri: String,
}

impl Api {
    /// The API at `base`, from `node`.
    pub(super) fn new(node: &Node, base: &str, tls: Option<&Tls>) -> Result<Self> {
        let mut curl = node.tool("curl")?.args([
            "--silent",
            "--show-error",
            "--include",
            "--http1.1",
            "--max-time",
            "20",
        ]);
        if let Some(tls) = tls {
            curl = curl.arg("--cacert").arg(&tls.ca);
            curl = curl.arg("--cert").arg(&tls.certificate);
            curl = curl.arg("--key").arg(&tls.key);
        }
        Ok(Self {
            curl,
            base: base.to_owned(),
            token: None,
        })
    }

    /// Where it is, as a URL.
    pub fn base(&self) -> &str {
        &self.base
    }

    /// The same with the token `token`.
    #[must_use]
    pub fn with_token(mut self, token: &str) -> Self {
        self.token = Some(token.to_owned());
        self
    }

    /// Whether it is the API of a token's owner.
    pub(super) fn has_token(&self) -> bool {
        self.token.is_some()
    }

    /// Asks, whatever the answer's status.
    ///
    /// # Errors
    /// If there is no answer.
    pub fn ask(&self, method: &str, path: &str, body: Option<&Value>) -> Result<Answer> {
        let mut curl = self.curl.clone().args(["--request", method]);
        if let Some(token) = &self.token {
            curl = curl.args(["--header", &format!("X-Consul-Token: {token}")]);
        }
        if let Some(body) = body {
            curl = curl.args(["--data-binary", "@-"]).input(body.to_string());
        }
        let said = curl
            .arg(format!("{}/v1/{path}", self.base))
            .run(SOON)
            .with_context(|| format!("{method} {path}"))?;
        let (head, body) = said
            .split_once("\r\n\r\n")
            .with_context(|| format!("an answer without a head: {said:?}"))?;
        let status = head.split(' ').nth(1).and_then(|word| word.parse().ok());
        Ok(Answer {
            status: status.with_context(|| format!("an answer without a status: {head:?}"))?,
            head: head.to_owned(),
            body: body.to_owned(),
        })
    }

    fn expect(&self, method: &str, path: &str, body: Option<&Value>) -> Result<Value> {
        let answer = self.ask(method, path, body)?;
        ensure!(
            answer.status == 200,
            "{method} {path}: {} {}",
            answer.status,
            answer.body
        );
        answer.json()
    }

    /// Gets what is at `path`, below `/v1/`.
    ///
    /// # Errors
    /// If the status is not 200.
    pub fn get(&self, path: &str) -> Result<Value> {
        self.expect("GET", path, None)
    }

    /// Puts `body` to `path`, below `/v1/`.
    ///
    /// # Errors
    /// If the status is not 200.
    pub fn put(&self, path: &str, body: &Value) -> Result<Value> {
        self.expect("PUT", path, Some(body))
    }

    /// Puts each body to the path beside it, one after the other over one connection; without a token.
    ///
    /// # Errors
    /// If one fails, or all of them take more than five minutes.
    pub fn put_many(&self, bodies: &[(&str, Value)]) -> Result<()> {
        let transfers: Vec<String> = bodies
            .iter()
            .map(|(path, body)| {
                // JSON in JSON's quotes is what curl's are, too.
                let (base, body) = (&self.base, Value::String(body.to_string()));
                format!(
                    "url = \"{base}/v1/{path}\"\nrequest = PUT\noutput = /dev/null\nfail\ndata = {body}\n"
                )
            })
            .collect();
        self.curl
            .clone()
            .args(["--config", "-"])
            .input(transfers.join("next\n"))
            .run(Duration::from_mins(5))
            .map(drop)
    }

    /// Registers a service of this agent's node, in Consul's own terms.
    ///
    /// # Errors
    /// If the agent refuses.
    pub fn register(&self, service: &Value) -> Result<()> {
        self.put("agent/service/register", service).map(drop)
    }

    /// Removes a service of this agent's node.
    ///
    /// # Errors
    /// If the agent refuses.
    pub fn deregister(&self, id: &str) -> Result<()> {
        self.put(&format!("agent/service/deregister/{id}"), &Value::Null)
            .map(drop)
    }

    /// Writes a config entry.
    ///
    /// # Errors
    /// If the agent refuses.
    pub fn write_config(&self, entry: &Value) -> Result<()> {
        self.put("config", entry).map(drop)
    }

    /// Lets `source` call `destination`, or not: `allow` or `deny`. Takes the place of the intention for the same two.
    ///
    /// # Errors
    /// If the agent refuses.
    pub fn intend(&self, source: &str, destination: &str, action: &str) -> Result<()> {
        let intention = json!({
            "SourceName": source,
            "DestinationName": destination,
            "SourceType": "consul",
            "Action": action,
        });
        match self.intention_id(source, destination)? {
            Some(id) => self.put(&format!("connect/intentions/{id}"), &intention),
            None => self.expect("POST", "connect/intentions", Some(&intention)),
        }
        .map(drop)
    }

    /// Removes the intention for these two.
    ///
    /// # Errors
    /// If there is none, or the agent refuses.
    pub fn forget_intention(&self, source: &str, destination: &str) -> Result<()> {
        let Some(id) = self.intention_id(source, destination)? else {
            bail!("there is no intention for {source} and {destination}");
        };
        self.expect("DELETE", &format!("connect/intentions/{id}"), None)
            .map(drop)
    }

    fn intention_id(&self, source: &str, destination: &str) -> Result<Option<String>> {
        let all = self.get("connect/intentions")?;
        let found = all.as_array().into_iter().flatten().find(|intention| {
            intention["SourceName"] == source && intention["DestinationName"] == destination
        });
        Ok(found.and_then(|intention| Some(intention["ID"].as_str()?.to_owned())))
    }

    /// The certificate that this agent has for `service`.
    ///
    /// # Errors
    /// If the agent gives none.
    pub fn leaf(&self, service: &str) -> Result<Leaf> {
        self.leaf_after(service, 0)
    }

    /// The next one, if it is another than that of `index` within ten seconds. Agents renew a leaf only while somebody
    /// waits for that, and up to half a minute after the root has changed.
    ///
    /// # Errors
    /// If the agent gives none.
    pub fn leaf_after(&self, service: &str, index: u64) -> Result<Leaf> {
        let path = format!("agent/connect/ca/leaf/{service}?index={index}&wait=10s");
        let answer = self.ask("GET", &path, None)?;
        ensure!(
            answer.status == 200,
            "no leaf for {service}: {} {}",
            answer.status,
            answer.body
        );
        let index = answer.header("x-consul-index").unwrap_or_default();
        let leaf = answer.json()?;
        Ok(Leaf {
            index: index
                .parse()
                .with_context(|| format!("the index {index:?}"))?,
            chain: text(&leaf, "CertPEM")?,
            key: text(&leaf, "PrivateKeyPEM")?,
            uri: text(&leaf, "ServiceURI")?,
        })
    }

    /// All roots that are trusted, as PEM.
    ///
    /// # Errors
    /// If the agent gives none.
    pub fn roots(&self) -> Result<String> {
        let answer = self.get("agent/connect/ca/roots")?;
        let roots = answer["Roots"].as_array();
        let roots = roots.with_context(|| format!("no roots in {answer}"))?;
        roots.iter().map(|root| text(root, "RootCert")).collect()
    }

    /// The id of the root that signs.
    ///
    /// # Errors
    /// If there is none yet.
    pub fn active_root(&self) -> Result<String> {
        text(&self.get("agent/connect/ca/roots")?, "ActiveRootID")
    }

    /// The trust domain of all identities.
    ///
    /// # Errors
    /// If the agent does not know it yet.
    pub fn trust_domain(&self) -> Result<String> {
        text(&self.get("agent/connect/ca/roots")?, "TrustDomain")
    }

    /// Makes a new root, cross-signed by the one before, and waits until this agent knows it.
    ///
    /// # Errors
    /// If the servers refuse, or `openssl` is missing.
    pub fn rotate_root(&self) -> Result<()> {
        let key = Program::new("openssl")
            .args(["ecparam", "-name", "prime256v1", "-genkey", "-noout"])
            .run(SOON)?;
        let before = self.active_root()?;
        let configuration = json!({ "Provider": "consul", "Config": { "PrivateKey": key } });
        self.put("connect/ca/configuration", &configuration)?;
        crate::wait::wait_for_value("the new root", SOON, || {
            let active = self.active_root()?;
            Ok((active != before).then_some(()))
        })
    }

    /// Makes a policy with `rules` and a token that has it and the identities of `services`. Returns the token.
    ///
    /// # Errors
    /// If the servers refuse.
    pub fn token(&self, name: &str, rules: &str, services: &[&str]) -> Result<String> {
        self.put("acl/policy", &json!({ "Name": name, "Rules": rules }))?;
        let identities: Vec<Value> = services
            .iter()
            .map(|service| json!({ "ServiceName": service }))
            .collect();
        let token = self.put(
            "acl/token",
            &json!({ "Policies": [{ "Name": name }], "ServiceIdentities": identities }),
        )?;
        text(&token, "SecretID")
    }

    /// Changes what the policy `name` lets its tokens do.
    ///
    /// # Errors
    /// If there is no such policy, or the servers refuse.
    pub fn change_policy(&self, name: &str, rules: &str) -> Result<()> {
        let policies = self.get("acl/policies")?;
        let mut all = policies.as_array().into_iter().flatten();
        let found = all.find(|policy| policy["Name"] == name);
        let id = text(found.with_context(|| format!("no policy {name}"))?, "ID")?;
        let policy = json!({ "ID": id, "Name": name, "Rules": rules });
        self.put(&format!("acl/policy/{id}"), &policy).map(drop)
    }
}

fn text(value: &Value, key: &str) -> Result<String> {
    let text = value.get(key).and_then(Value::as_str);
    let text = text.with_context(|| format!("no {key} in {value}"))?;
    Ok(text.to_owned())
}
