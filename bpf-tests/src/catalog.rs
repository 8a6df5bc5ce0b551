//! Writing a file catalog: services, instances and intentions as YAML in Consul's terms.

use std::{
    fmt::Write as _,
    fs,
    net::{IpAddr, SocketAddr},
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};

/// A directory of catalog files, one file for each subject. All nodes of a run read the same one.
#[derive(Debug, Clone)]
pub struct Catalog {
    directory: PathBuf,
}

/// One instance of a service.
#[derive(Debug, Clone)]
pub struct Instance {
    /// The service's name.
    pub service: String,
    /// Its id.
    pub id: String,
    /// The name of its node.
    pub node: String,
    /// The address of its node.
    pub node_address: IpAddr,
    /// The service's virtual address and port.
    pub virtual_address: SocketAddr,
    /// Where its own node reaches it.
    pub local: SocketAddr,
    /// Where its node takes tunnels for it, if not at the port for all.
    pub tunnel_port: Option<u16>,
    /// Its meta, as pairs of key and value.
    pub meta: Vec<(&'static str, &'static str)>,
    /// Its check's status.
    pub health: &'static str,
}

impl Catalog {
    /// A catalog in `directory`.
    pub fn new(directory: PathBuf) -> Self {
        Self { directory }
    }

    /// Where the files are.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Writes `name`.yaml with `instances`, in place of what it held.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn write_instances(&self, name: &str, instances: &[Instance]) -> Result<()> {
        let documents: Vec<String> = instances.iter().map(instance_yaml).collect();
        self.write(&format!("{name}.yaml"), &documents.join("---\n"))
    }

    /// Writes the intentions for `destination`: pairs of source and action.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn write_intentions(&self, destination: &str, sources: &[(&str, &str)]) -> Result<()> {
        let mut text = format!("Kind: service-intentions\nName: \"{destination}\"\nSources:\n");
        for (source, action) in sources {
            // Writing to a string does not fail.
            let _written = writeln!(text, "  - {{ Name: \"{source}\", Action: {action} }}");
        }
        let file = if destination == "*" {
            "any"
        } else {
            destination
        };
        self.write(&format!("intentions-{file}.yaml"), &text)
    }

    /// Writes any file, so that a reader sees the old content or the new.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn write(&self, file: &str, text: &str) -> Result<()> {
        let path = self.directory.join(file);
        let unfinished = self.directory.join(format!(".{file}.unfinished"));
        fs::write(&unfinished, text)
            .and_then(|()| fs::rename(&unfinished, &path))
            .with_context(|| format!("writing {}", path.display()))
    }

    /// Removes a file.
    ///
    /// # Errors
    /// If it cannot be removed.
    pub fn remove(&self, file: &str) -> Result<()> {
        let path = self.directory.join(file);
        fs::remove_file(&path).with_context(|| format!("removing {}", path.display()))
    }
}

fn instance_yaml(instance: &Instance) -> String {
    let tunnel_port = instance
        .tunnel_port
        .map_or_else(String::new, |port| format!("port: {port}, "));
    let meta: Vec<String> = instance
        .meta
        .iter()
        .map(|(key, value)| format!("{key}: \"{value}\""))
        .collect();
    let meta = meta.join(", ");
    format!(
        "\
node: {{ name: {node}, address: \"{node_address}\" }}
service:
  id: {id}
  name: {service}
  port: {port}
  meta: {{ {meta} }}
  tagged_addresses:
    virtual: {{ address: \"{vip}\", port: {vip_port} }}
  connect:
    sidecar_service:
      {{ {tunnel_port}proxy: {{ local_service_address: \"{local}\", local_service_port: {port} }} }}
  checks:
    - {{ name: test, status: {health} }}
",
        node = instance.node,
        node_address = instance.node_address,
        id = instance.id,
        service = instance.service,
        port = instance.local.port(),
        vip = instance.virtual_address.ip(),
        vip_port = instance.virtual_address.port(),
        local = instance.local.ip(),
        health = instance.health,
    )
}
