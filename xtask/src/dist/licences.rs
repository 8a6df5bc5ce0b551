//! The licences of the libraries in the agent, whose texts must come with it.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::Path,
};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use crate::{build, progress::Step};

/// How files with licences, and with what they ask to be passed on, begin.
const FILES: [&str; 5] = ["LICENSE", "LICENCE", "COPYING", "COPYRIGHT", "NOTICE"];

/// Each library with its licence and the texts that come with it; a text that several share stands there once.
///
/// # Errors
/// If cargo does not tell, or a library names no licence.
pub(super) fn of_the_agent(step: &Step) -> Result<String> {
    // What is linked into it, for this machine.
    let tree = [
        "tree",
        "--locked",
        "--package",
        "sidestep",
        "--edges",
        "normal",
    ];
    let said = step.run(build::cargo(&tree).args(["--prefix", "none", "--format", "{p}"]))?;
    let linked: BTreeSet<&str> = said
        .iter()
        .filter_map(|line| name_and_version(line))
        .collect();
    let metadata = ["metadata", "--locked", "--format-version", "1"];
    let said = step.run(&mut build::cargo(&metadata))?;
    let metadata = said
        .iter()
        .find(|line| line.starts_with('{'))
        .context("cargo metadata says nothing")?;
    let metadata: Value = serde_json::from_str(metadata).context("reading cargo metadata")?;
    let packages = metadata.get("packages").and_then(Value::as_array);
    let mut text = String::from("Libraries in /usr/bin/sidestep, and their licences.\n\n");
    let mut texts: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for package in packages.context("cargo metadata names no packages")? {
        let field = |key: &str| package.get(key).and_then(Value::as_str);
        let library = format!(
            "{} v{}",
            field("name").unwrap_or_default(),
            field("version").unwrap_or_default()
        );
        // Without a source it is of this workspace.
        if field("source").is_none() || !linked.contains(library.as_str()) {
            continue;
        }
        let named = field("license").or_else(|| field("license_file"));
        let licence = named.with_context(|| format!("{library} names no licence"))?;
        text.push_str(&format!("{library}: {licence}\n"));
        let manifest = Path::new(field("manifest_path").unwrap_or_default());
        for found in beside(manifest)? {
            texts.entry(found).or_default().push(library.clone());
        }
    }
    ensure!(!texts.is_empty(), "no licences were found");
    for (licence, libraries) in texts {
        let line = "-".repeat(78);
        text.push_str(&format!(
            "\n{line}\n{}:\n\n{}\n",
            libraries.join(", "),
            licence.trim_end()
        ));
    }
    Ok(text)
}

/// "name v1.2.3" of a line that may go on with a path or a mark.
fn name_and_version(line: &str) -> Option<&str> {
    let name = line.find(' ')?;
    let end = line
        .get(name + 1..)?
        .find(' ')
        .map(|length| name + 1 + length);
    line.get(..end.unwrap_or(line.len()))
}

fn beside(manifest: &Path) -> Result<Vec<String>> {
    let directory = manifest.parent().context("a manifest is nowhere")?;
    let mut texts = vec![];
    for entry in
        fs::read_dir(directory).with_context(|| format!("reading {}", directory.display()))?
    {
        let path = entry?.path();
        let name = path
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .to_uppercase();
        if path.is_file() && FILES.iter().any(|file| name.starts_with(file)) {
            let bytes = fs::read(&path).with_context(|| format!("reading {}", path.display()))?;
            texts.push(String::from_utf8_lossy(&bytes).into_owned());
        }
    }
    Ok(texts)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_of_cargo_tree_begins_with_name_and_version() {
        for line in [
            "serde v1.0.2",
            "serde v1.0.2 (*)",
            "serde v1.0.2 (proc-macro)",
        ] {
            assert_eq!(name_and_version(line), Some("serde v1.0.2"));
        }
        assert_eq!(name_and_version(""), None);
    }
}
