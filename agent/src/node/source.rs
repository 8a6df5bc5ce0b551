//! Where the catalog and the identities of this node come from. What differs between the sources is here.

use std::sync::Arc;

use super::{
    Node, NodeError,
    authority::Authority,
    consul::{self, ConsulParts, Snapshots, Surroundings},
};
use crate::{
    catalog::{
        file::{self, FileContext, FileSource, Loaded, Severity},
        model::{NodeName, ServiceName, Snapshot},
        store::CatalogStore,
    },
    config::{Config, FilesConfig, SourceConfig},
    identity::LocalDomain,
    telemetry::log::chain,
};

/// What feeds the catalog.
#[derive(Debug)]
pub(super) enum Source {
    /// A directory of files, with what was read of it last.
    Files(FileSource, Loaded),
    /// Consul.
    Consul(Snapshots),
}

/// A source, with what it says of this node.
#[derive(Debug)]
pub(super) struct Opened {
    /// As the catalog names this node.
    pub(super) name: NodeName,
    pub(super) local: LocalDomain,
    pub(super) authority: Authority,
    pub(super) source: Source,
    /// What a node has beside, if Consul is the source.
    pub(super) consul: Option<ConsulParts>,
}

impl Source {
    /// Opens what the configuration names.
    ///
    /// # Errors
    /// If this node could have no identity.
    pub(super) async fn open(around: Surroundings<'_>) -> Result<Opened, NodeError> {
        let config = around.config;
        match &config.source {
            SourceConfig::Consul(consul) => Box::pin(consul::open(consul, around)).await,
            SourceConfig::Files(files) => {
                let directory = files.directory.clone();
                let source = FileSource::new(directory, file_context(config, files));
                Ok(Opened {
                    name: files.node.clone(),
                    local: LocalDomain::new(
                        files.identity.trust_domain.clone(),
                        files.datacenter.clone(),
                    ),
                    authority: Authority::builtin(files)?,
                    source: Self::Files(source, Loaded::default()),
                    consul: None,
                })
            }
        }
    }

    /// Puts in force what the source says now. Returns what is wrong with it.
    pub(super) async fn load(
        &mut self,
        catalog: &CatalogStore,
        consul: Option<&ConsulParts>,
        config: &Config,
    ) -> Vec<String> {
        match self {
            Self::Files(source, loaded) => {
                *loaded = source.load();
                publish_files(catalog, loaded)
            }
            Self::Consul(snapshots) => {
                if let Some(parts) = consul {
                    consul::first(snapshots, parts, ruled(config)).await;
                }
                let first = snapshots.borrow_and_update().clone();
                first.map_or_else(Vec::new, |snapshot| publish(catalog, snapshot))
            }
        }
    }

    /// Puts in force what the source says from now on.
    pub(super) fn watch(self, node: &Arc<Node>) {
        let (shutdown, inner) = (node.shutdown.clone(), Arc::clone(node));
        match self {
            Self::Consul(snapshots) => {
                let following = follow_consul(inner, snapshots);
                node.shutdown.spawn_service("catalog", following);
            }
            Self::Files(source, loaded) => {
                let publish = move |loaded: &Loaded| {
                    if inner.shutdown.is_draining() {
                        // The rest may be another agent's already. What may not go on is this one's to end.
                        inner.enforce(&loaded.snapshot);
                    } else {
                        *inner.catalog_problems.lock() = publish_files(&inner.catalog, loaded);
                    }
                };
                node.shutdown
                    .spawn_service("file catalog", source.watch(loaded, shutdown, publish));
            }
        }
    }
}

async fn follow_consul(node: Arc<Node>, mut snapshots: Snapshots) {
    while snapshots.changed().await.is_ok() {
        let Some(snapshot) = snapshots.borrow_and_update().clone() else {
            continue;
        };
        if node.shutdown.is_draining() {
            // As with files.
            node.enforce(&snapshot);
        } else {
            *node.catalog_problems.lock() = publish(&node.catalog, snapshot);
        }
    }
}

/// The services that rules of the configuration name.
pub(super) fn ruled(config: &Config) -> impl Iterator<Item = ServiceName> {
    config.workloads.iter().map(|rule| rule.service.clone())
}

/// What the files may leave out, on this node.
pub(crate) fn file_context(config: &Config, files: &FilesConfig) -> FileContext {
    FileContext {
        local_node: files.node.clone(),
        local_address: config.node.address,
        tunnel_port: config.tunnel.port,
    }
}

/// Says what is wrong with the files and puts the rest in force. Returns what is wrong.
fn publish_files(catalog: &CatalogStore, loaded: &Loaded) -> Vec<String> {
    for problem in &loaded.problems {
        match problem.severity {
            Severity::Error => tracing::error!(%problem, "catalog"),
            Severity::Note => tracing::info!(%problem, "catalog"),
        }
    }
    let mut lines = problem_lines(&loaded.problems);
    lines.extend(publish(catalog, loaded.snapshot.clone()));
    lines
}

/// Puts a snapshot in force. Returns what is wrong with its virtual addresses.
fn publish(store: &CatalogStore, snapshot: Snapshot) -> Vec<String> {
    let mut lines = Vec::new();
    for problem in store.publish(snapshot) {
        tracing::error!(problem = %chain(&problem), "virtual addresses");
        lines.push(chain(&problem).to_string());
    }
    let catalog = store.current();
    let services = catalog.snapshot.services.len();
    tracing::info!(version = catalog.version, services, "catalog published");
    lines
}

/// Lines for people out of a file catalog's problems. Notes are none: what has no effect needs no repair.
fn problem_lines(problems: &[file::Problem]) -> Vec<String> {
    let errors = problems
        .iter()
        .filter(|problem| problem.severity == Severity::Error);
    errors.map(ToString::to_string).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_note_is_no_problem() {
        let [error, note] = [Severity::Error, Severity::Note].map(|severity| file::Problem {
            file: "/catalog/x.yaml".into(),
            severity,
            message: "said".to_owned(),
        });
        assert_eq!(problem_lines(&[note, error]), ["/catalog/x.yaml: said"]);
    }
}
