//! What the documentation shows is what the agent takes: its examples, and the keys of the configuration.
//!
//! Metrics and access-log fields are compared with their pages beside the code that writes them.

#![expect(
    clippy::tests_outside_test_module,
    clippy::unwrap_used,
    clippy::panic,
    reason = "an integration test is a test module, its support included"
)]

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

use sidestep::{
    catalog::file::{FileContext, FileSource},
    config::{self, Config, ConfigError},
    identity::workload::WorkloadResolver,
    telemetry::names,
};
use tempfile::{TempDir, tempdir};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// The README and everything in `docs/`, by path.
fn pages() -> Vec<(PathBuf, String)> {
    let mut files = vec![root().join("README.md")];
    let mut directories = vec![root().join("docs")];
    while let Some(directory) = directories.pop() {
        for entry in fs::read_dir(directory).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                directories.push(path);
            } else if path.extension().is_some_and(|extension| extension == "md") {
                files.push(path);
            }
        }
    }
    let read = |path: PathBuf| {
        let text = fs::read_to_string(&path).unwrap();
        (path, text)
    };
    files.into_iter().map(read).collect()
}

/// A fenced block.
struct Example {
    /// File and line, for people.
    place: String,
    language: String,
    /// Whether it is marked as what the agent refuses: the word `wrong` behind the language.
    is_wrong: bool,
    text: String,
}

fn examples() -> Vec<Example> {
    let mut examples = vec![];
    for (path, page) in pages() {
        let mut open: Option<Example> = None;
        for (number, line) in page.lines().enumerate() {
            let place = format!("{}:{}", path.display(), number + 1);
            match (line.trim_start().strip_prefix("```"), &mut open) {
                (Some(info), None) => {
                    let mut words = info.split_whitespace();
                    let language = words.next().unwrap_or_default().to_owned();
                    let marks: Vec<&str> = words.collect();
                    assert!(
                        marks.is_empty() || marks == ["wrong"],
                        "{place}: {marks:?}: expected nothing or \"wrong\" behind the language"
                    );
                    open = Some(Example {
                        place,
                        language,
                        is_wrong: !marks.is_empty(),
                        text: String::new(),
                    });
                }
                (Some(_end), Some(_)) => examples.extend(open.take()),
                (None, Some(example)) => {
                    example.text.push_str(line);
                    example.text.push('\n');
                }
                (None, None) => {}
            }
        }
        assert!(open.is_none(), "{}: a block has no end", path.display());
    }
    examples
}

fn load(main: &str, drop_in: Option<&str>) -> Result<Config, ConfigError> {
    let directory = tempdir().unwrap();
    let path = directory.path().join("sidestep.toml");
    fs::write(&path, main).unwrap();
    if let Some(text) = drop_in {
        let drop_ins = directory.path().join("sidestep.d");
        fs::create_dir(&drop_ins).unwrap();
        fs::write(drop_ins.join("example.toml"), text).unwrap();
    }
    config::load(&path)
}

/// What an example that is a part is laid over.
const LEAST: &str = r#"
[capture]
cgroups = ["/mesh"]
[identity]
trust_domain = "example.test"
[identity.ca]
certificate = "/etc/sidestep/node-ca.pem"
key = "/etc/sidestep/node-ca-key.pem"
"#;

/// An example without `[capture]` is a part, and has to be good as a drop-in.
fn check_configuration(text: &str) -> Result<(), String> {
    let loaded = if text.contains("[capture]") {
        load(text, None)
    } else {
        load(LEAST, Some(text))
    };
    let config = loaded.map_err(|error| error.to_string())?;
    WorkloadResolver::new(&config.workloads, |_cgroup| None)
        .map(drop)
        .map_err(|conflict| conflict.to_string())
}

fn check_catalog(language: &str, text: &str) -> Result<(), String> {
    let directory: TempDir = tempdir().unwrap();
    fs::write(
        directory.path().join("example").with_extension(language),
        text,
    )
    .unwrap();
    let context = FileContext {
        local_node: "a".parse().unwrap(),
        local_address: Some("192.0.2.1".parse().unwrap()),
        tunnel_port: 15_443,
    };
    let loaded = FileSource::new(directory.path().to_owned(), context).load();
    if let Some(problem) = loaded.problems.first() {
        return Err(problem.to_string());
    }
    if loaded.snapshot.services.is_empty() && loaded.snapshot.intentions.is_empty() {
        return Err("says nothing".to_owned());
    }
    Ok(())
}

#[test]
fn examples_are_what_the_agent_takes() {
    let mut seen = BTreeSet::new();
    let mut failures = vec![];
    for example in examples() {
        let checked = match example.language.as_str() {
            "toml" => check_configuration(&example.text),
            language @ ("yaml" | "json" | "hcl") => check_catalog(language, &example.text),
            // Not for the agent.
            "sh" | "text" => continue,
            other => Err(format!(
                "language {other:?}: expected one that this test knows"
            )),
        };
        match (checked, example.is_wrong) {
            (Err(error), false) => failures.push(format!("{}: {error}", example.place)),
            (Ok(()), true) => failures.push(format!("{}: is marked wrong and good", example.place)),
            (Ok(()), false) | (Err(_), true) => {}
        }
        seen.insert(example.language);
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
    let expected = ["hcl", "toml", "yaml"].map(str::to_owned);
    assert!(
        seen.is_superset(&expected.into()),
        "only {seen:?} were found"
    );
}

/// The keys below `table` (empty: of all), asked of the agent by giving it one that cannot be.
fn keys_below(table: &str) -> Option<Vec<String>> {
    const NOT_A_KEY: &str = "not_a_key";
    let header = match table {
        "" => String::new(),
        "workload" | "away" => format!("[[{table}]]\n"),
        table => format!("[{table}]\n"),
    };
    let error = load(&format!("{header}{NOT_A_KEY} = 1\n"), None).unwrap_err();
    let [problem] = error.problems.as_slice() else {
        panic!("{table}: {error}");
    };
    // Anything else is said of what is no table.
    let known = problem
        .message
        .strip_prefix("unknown field `not_a_key`, expected ")?;
    let names = known.split('`').skip(1).step_by(2);
    let full = |name: &str| match table {
        "" => name.to_owned(),
        table => format!("{table}.{name}"),
    };
    Some(names.map(full).collect())
}

/// Every key that the agent knows, as `table.key`.
fn known_keys() -> BTreeSet<String> {
    let mut open = keys_below("").unwrap();
    let mut known = BTreeSet::new();
    while let Some(key) = open.pop() {
        match keys_below(&key) {
            Some(below) => open.extend(below),
            None => {
                known.insert(key);
            }
        }
    }
    known
}

/// What stands in backquotes.
fn quoted(text: &str) -> impl Iterator<Item = &str> {
    text.split('`').skip(1).step_by(2)
}

#[test]
fn the_page_of_the_configuration_has_every_key_and_no_other() {
    let known = known_keys();
    assert!(known.contains("identity.ca.roots"), "{known:?}");
    let page = fs::read_to_string(root().join("docs/configuration.md")).unwrap();
    let rows = page.lines().filter(|line| line.starts_with("| `"));
    let mut documented = BTreeSet::new();
    for row in rows {
        let mut table = "";
        for key in quoted(row.split('|').nth(1).unwrap()) {
            // `workload.cgroup`, `.unit`
            let full = match key.strip_prefix('.') {
                Some(name) => format!("{table}.{name}"),
                None => key.to_owned(),
            };
            if let Some((first, _name)) = key.rsplit_once('.')
                && !first.is_empty()
            {
                table = first;
            }
            assert!(documented.insert(full), "{key} is there twice");
        }
    }
    let missing: Vec<_> = known.difference(&documented).collect();
    let invented: Vec<_> = documented.difference(&known).collect();
    assert!(
        missing.is_empty() && invented.is_empty(),
        "not on the page: {missing:?}; unknown to the agent: {invented:?}"
    );
}

#[test]
fn the_shipped_configuration_shows_every_key() {
    let shipped = fs::read_to_string(root().join("manifests/sidestep.toml")).unwrap();
    for key in known_keys() {
        let name = key.rsplit('.').next().unwrap();
        assert!(shipped.contains(&format!("{name} =")), "{key} is missing");
    }
}

#[test]
fn keys_and_metrics_that_pages_name_exist() {
    let known = known_keys();
    let tables: BTreeSet<&str> = known
        .iter()
        .filter_map(|key| key.split('.').next())
        .collect();
    for (path, page) in pages() {
        let place = path.display();
        for word in page.split(|c: char| !c.is_ascii_alphanumeric() && c != '_') {
            let is_metric = word.starts_with("sidestep_") && !word.ends_with('_');
            let exists = || names::ALL.iter().any(|metric| metric.name == word);
            let is_program = [
                "conn4", "conn6", "flows", "origd", "peer4", "peer6", "recv4", "recv6", "send4",
            ]
            .iter()
            .any(|name| word == format!("sidestep_{name}"));
            assert!(
                !is_metric || is_program || exists(),
                "{place}: no metric {word}"
            );
        }
        for word in quoted(&page) {
            let is_key = word
                .chars()
                .all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || matches!(c, '_' | '.'))
                && word
                    .split_once('.')
                    .is_some_and(|(table, key)| tables.contains(table) && !key.is_empty());
            let exists = || {
                known
                    .iter()
                    .any(|key| key == word || key.starts_with(&format!("{word}.")))
            };
            assert!(!is_key || exists(), "{place}: no key {word}");
        }
    }
}
