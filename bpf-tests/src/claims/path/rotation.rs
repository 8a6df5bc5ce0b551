//! Certificate authorities that are replaced under agents that run.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use super::policy::live;
use crate::{
    claims::{Finding, Size},
    lab::{make_intermediate, make_root},
    mesh::{Mesh, local, vip},
    node::{Authority, Node},
    services,
    wait::{SOON, Stopwatch},
    workload::Kind,
};

/// First the nodes' intermediates, then, step by step, the root. Both agents sign with the root at first.
pub(super) fn a_replaced_authority_costs_no_connection(_size: Size) -> Result<Finding> {
    let mut mesh = Mesh::new("rotate")?;
    let chat = mesh.place("chat", "chat-1", Kind::Cgroup)?;
    mesh.register("chat", "chat-1", vip(1, 80), local(8080));
    mesh.keep(services::peer(&chat, "echo", local(8080), "")?);
    let web = mesh.place("web", "web-1", Kind::Cgroup)?;
    mesh.register("web", "web-1", vip(2, 80), local(8081));
    mesh.keep(services::http(&web, local(8081), "page")?);
    mesh.start()?;
    let old = mesh.scratch().subdirectory("ca")?;
    let new = mesh.scratch().subdirectory("new-ca")?;
    let [old_root, new_root] = [&old, &new].map(|directory| directory.join("root.pem"));
    let mut calls = Calls { mesh, made: 0 };
    let mut kept = live(&calls.mesh.shop)?;

    calls.replace(signed_by(&old, vec![old_root.clone()]))?;
    make_root(&new)?;
    let both = vec![old_root, new_root.clone()];
    calls.replace(trusting(both.clone()))?;
    let refused = calls.refuse_a_missing_file()?;
    calls.replace(signed_by(&new, both))?;
    calls.replace(trusting(vec![new_root]))?;

    let lives = kept.ended()?.is_none();
    kept.kill();
    Ok(Finding::new(
        lives && refused.contains("missing.pem"),
        format!(
            "all {} calls during four changes succeed, a live connection {}; a bad change: {refused}",
            calls.made,
            if lives { "goes on" } else { "was cut" },
        ),
    ))
}

/// For a node: an intermediate by the root in the directory `root`, with which it trusts `roots`.
fn signed_by(root: &Path, roots: Vec<PathBuf>) -> impl Fn(&Node) -> Result<Authority> + '_ {
    move |node| {
        let made = make_intermediate(root, node.name(), &root.join("nodes"))?;
        Ok(Authority {
            roots: roots.clone(),
            ..made
        })
    }
}

/// For a node: what it has, but with other roots.
fn trusting(roots: Vec<PathBuf>) -> impl Fn(&Node) -> Result<Authority> {
    move |node| {
        Ok(Authority {
            roots: roots.clone(),
            ..node.authority().clone()
        })
    }
}

/// A mesh in which someone calls all the time.
struct Calls {
    mesh: Mesh,
    made: u32,
}

impl Calls {
    /// Gives each node, one after the other, what `authority` makes for it, and calls until all leaves follow.
    fn replace(&mut self, authority: impl Fn(&Node) -> Result<Authority>) -> Result<()> {
        for name in ["a", "b"] {
            let node = self.node(name);
            let authority = authority(node)?;
            let roots = authority.roots.len();
            node.set_authority(authority);
            node.reload_agent()?;
            let signer = format!(" {name}");
            self.until(name, |status| follows(status, roots, &signer))?;
        }
        Ok(())
    }

    /// Names a file that does not exist; returns what node `a` says, which must go on as it was.
    fn refuse_a_missing_file(&mut self) -> Result<String> {
        let node = self.node("a");
        let good = node.authority().clone();
        node.set_authority(Authority {
            certificate: good.certificate.with_file_name("missing.pem"),
            ..good.clone()
        });
        node.reload_agent()?;
        let problem = |status: &Value| {
            let problem = status.pointer("/authority/problem");
            problem.and_then(Value::as_str).map(str::to_owned)
        };
        let said = self.until("a", problem)?;
        self.node("a").set_authority(good);
        Ok(said)
    }

    /// Calls until `look` finds what it wants in the status of a node. Each call must succeed.
    fn until<T>(&mut self, name: &str, look: impl Fn(&Value) -> Option<T>) -> Result<T> {
        let url = format!("http://{}/", vip(2, 80));
        let clock = Stopwatch::start();
        loop {
            let page = self.mesh.shop.curl(&url).run(SOON);
            let page = page.with_context(|| format!("call {} failed", self.made + 1))?;
            ensure!(page.trim() == "page", "another page: {page:?}");
            self.made += 1;
            let status = self.node(name).status()?;
            if let Some(found) = look(&status) {
                return Ok(found);
            }
            ensure!(
                clock.elapsed() < SOON,
                "node {name} did not follow; its status: {status:#}"
            );
        }
    }

    fn node(&mut self, name: &str) -> &mut Node {
        if name == "a" {
            &mut self.mesh.lab.a
        } else {
            &mut self.mesh.lab.b
        }
    }
}

/// Whether a node trusts `roots` roots, and the authority whose name ends in `signer` signed all its leaves.
fn follows(status: &Value, roots: usize, signer: &str) -> Option<()> {
    let authority = status.get("authority")?;
    let subject = authority.get("subject")?;
    let mut leaves = status.get("certificates")?.as_array()?.iter();
    (authority.get("roots")?.as_array()?.len() == roots
        && authority.get("problem")?.is_null()
        && subject.as_str()?.ends_with(signer)
        && leaves.all(|leaf| leaf.get("issuer") == Some(subject)))
    .then_some(())
}
