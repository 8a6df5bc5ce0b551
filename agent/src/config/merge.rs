//! Drop-ins over the main file: tables deep, `[[workload]]` and `[[away]]` appended, everything else replaced.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use toml::{Table, Value};

use super::{ConfigError, ConfigProblem};

/// The files laid over each other, and which of them set each key.
#[derive(Debug)]
pub(super) struct Merged {
    pub(super) table: Table,
    main: PathBuf,
    origins: BTreeMap<String, PathBuf>,
}

impl Merged {
    /// The file that set `key`, or the nearest table above it; the main file for keys that nobody set.
    pub(super) fn file_of(&self, key: &str) -> PathBuf {
        let mut key = key;
        loop {
            if let Some(file) = self.origins.get(key) {
                return file.clone();
            }
            match key.rsplit_once(['.', '[']) {
                Some((above, _)) => key = above,
                None => return self.main.clone(),
            }
        }
    }
}

/// Reads `main` and its drop-ins.
pub(super) fn read(main: &Path) -> Result<Merged, ConfigError> {
    let mut merged = Merged {
        table: Table::new(),
        main: main.to_owned(),
        origins: BTreeMap::new(),
    };
    let mut problems = Vec::new();
    let drop_ins = drop_ins(main).unwrap_or_else(|problem| {
        problems.push(problem);
        Vec::new()
    });
    for file in std::iter::once(main.to_owned()).chain(drop_ins) {
        match read_one(&file) {
            Ok(table) => overlay(&mut merged.table, table, "", &file, &mut merged.origins),
            Err(problem) => problems.push(problem),
        }
    }
    if problems.is_empty() {
        Ok(merged)
    } else {
        Err(ConfigError { problems })
    }
}

/// Takes `text` for the main file's, without drop-ins.
#[cfg(any(test, fuzzing))]
pub(super) fn read_text(main: &Path, text: &str) -> Result<Merged, ConfigError> {
    let table = parse(main, text).map_err(|problem| ConfigError {
        problems: vec![problem],
    })?;
    let mut merged = Merged {
        table: Table::new(),
        main: main.to_owned(),
        origins: BTreeMap::new(),
    };
    overlay(&mut merged.table, table, "", main, &mut merged.origins);
    Ok(merged)
}

fn read_one(file: &Path) -> Result<Table, ConfigProblem> {
    let text = std::fs::read_to_string(file)
        .map_err(|error| unreadable(file, format!("cannot be read: {error}")))?;
    parse(file, &text)
}

fn parse(file: &Path, text: &str) -> Result<Table, ConfigProblem> {
    text.parse().map_err(|error: toml::de::Error| {
        let before = error.span().and_then(|span| text.get(..span.start));
        let line = before.unwrap_or_default().matches('\n').count() + 1;
        let message = error.message().replace('\n', ", ");
        unreadable(file, format!("is not TOML: line {line}: {message}"))
    })
}

fn unreadable(file: &Path, message: String) -> ConfigProblem {
    ConfigProblem {
        file: file.to_owned(),
        key: String::new(),
        message,
    }
}

/// `/etc/sidestep/sidestep.toml` has its drop-ins in `/etc/sidestep/sidestep.d/`. None is fine.
fn drop_ins(main: &Path) -> Result<Vec<PathBuf>, ConfigProblem> {
    let directory = main.with_extension("d");
    let problem = |error: std::io::Error| ConfigProblem {
        file: directory.clone(),
        key: String::new(),
        message: format!("cannot be listed: {error}"),
    };
    let entries = match std::fs::read_dir(&directory) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(problem(error)),
    };
    let mut files = Vec::new();
    for entry in entries {
        let path = entry.map_err(problem)?.path();
        let hidden = path
            .file_name()
            .is_some_and(|name| name.to_string_lossy().starts_with('.'));
        if !hidden
            && path
                .extension()
                .is_some_and(|extension| extension == "toml")
        {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}

fn overlay(
    under: &mut Table,
    over: Table,
    prefix: &str,
    file: &Path,
    origins: &mut BTreeMap<String, PathBuf>,
) {
    for (name, value) in over {
        let key = if prefix.is_empty() {
            name.clone()
        } else {
            format!("{prefix}.{name}")
        };
        match (under.get_mut(&name), value) {
            (Some(Value::Table(below)), Value::Table(above)) => {
                overlay(below, above, &key, file, origins);
            }
            (Some(Value::Array(below)), Value::Array(above))
                if matches!(key.as_str(), "workload" | "away") =>
            {
                note_elements(&key, below.len(), above.len(), file, origins);
                below.extend(above);
            }
            (_, value) => {
                note(&key, &value, file, origins);
                under.insert(name, value);
            }
        }
    }
}

fn note(key: &str, value: &Value, file: &Path, origins: &mut BTreeMap<String, PathBuf>) {
    origins.insert(key.to_owned(), file.to_owned());
    match value {
        Value::Table(table) => {
            for (name, value) in table {
                note(&format!("{key}.{name}"), value, file, origins);
            }
        }
        Value::Array(array) => note_elements(key, 0, array.len(), file, origins),
        Value::String(_)
        | Value::Integer(_)
        | Value::Float(_)
        | Value::Boolean(_)
        | Value::Datetime(_) => {}
    }
}

fn note_elements(
    key: &str,
    first: usize,
    count: usize,
    file: &Path,
    origins: &mut BTreeMap<String, PathBuf>,
) {
    for index in first..first + count {
        origins.insert(format!("{key}[{index}]"), file.to_owned());
    }
}
