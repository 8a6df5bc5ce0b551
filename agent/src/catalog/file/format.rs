//! Bytes of a catalog file to documents: YAML, JSON and HCL become one tree with one spelling of keys.

use std::path::Path;

use serde_json::{Map, Value};

use super::expressions;

/// The languages a catalog file may be written in, by its extension.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Format {
    Yaml,
    Json,
    Hcl,
}

impl Format {
    /// `None` for files that are none of ours, like a README or an editor's backup.
    pub(super) fn of(path: &Path) -> Option<Self> {
        let name = path.file_name()?.to_str()?;
        if name.starts_with('.') {
            return None;
        }
        match path.extension()?.to_str()? {
            "yaml" | "yml" => Some(Self::Yaml),
            "json" => Some(Self::Json),
            "hcl" => Some(Self::Hcl),
            _ => None,
        }
    }
}

/// Parses a file into its documents, keys in `snake_case`.
///
/// A top-level list counts as that many documents, an empty document as none.
pub(super) fn parse(format: Format, text: &str) -> Result<Vec<Value>, String> {
    let documents: Vec<Value> = match format {
        Format::Yaml => yaml(text)?,
        Format::Json if text.trim().is_empty() => Vec::new(),
        Format::Json => vec![serde_json::from_str(text).map_err(|error| error.to_string())?],
        Format::Hcl => {
            expressions::refuse(text)?;
            vec![hcl::from_str(text).map_err(|error| hcl_error(&error))?]
        }
    };
    let flattened = documents.into_iter().flat_map(|document| match document {
        Value::Array(documents) => documents,
        Value::Null => Vec::new(),
        Value::Object(map) if map.is_empty() => Vec::new(),
        one @ (Value::Object(_) | Value::String(_) | Value::Number(_) | Value::Bool(_)) => {
            vec![one]
        }
    });
    Ok(flattened.map(snake_case_keys).collect())
}

/// The library's limits are for small files: 1,024 documents. Here the size of the file is the limit, and aliases, by
/// which a small file can be a large tree, keep theirs.
fn yaml(text: &str) -> Result<Vec<Value>, String> {
    let most = text.len().max(1 << 20);
    let options = serde_saphyr::options! {
        budget: serde_saphyr::budget! {
            max_documents: most,
            max_nodes: most,
            // Each node has up to two, a document four.
            max_events: most.saturating_mul(4),
            max_total_scalar_bytes: most.max(64 << 20),
        },
    };
    serde_saphyr::from_multiple_with_options(text, options)
        .map_err(|error| error.without_snippet().to_string())
}

/// On one line, as the log and `sidestep status` have it.
fn hcl_error(error: &hcl::Error) -> String {
    if let hcl::Error::Parse(error) = error {
        let place = error.location();
        let (line, column) = (place.line(), place.column());
        return format!("{} at line {line}, column {column}", error.message());
    }
    error.to_string()
}

/// Consul takes `LocalServicePort` and `local_service_port` alike. The keys of `meta` are the user's own.
fn snake_case_keys(value: Value) -> Value {
    match value {
        Value::Object(map) => {
            let renamed = map.into_iter().map(|(key, value)| {
                let key = snake_case(&key);
                let value = if key == "meta" {
                    value
                } else {
                    snake_case_keys(value)
                };
                (key, value)
            });
            Value::Object(renamed.collect::<Map<_, _>>())
        }
        Value::Array(values) => Value::Array(values.into_iter().map(snake_case_keys).collect()),
        plain @ (Value::String(_) | Value::Number(_) | Value::Bool(_) | Value::Null) => plain,
    }
}

/// `LocalConnectTimeoutMs` -> `local_connect_timeout_ms`, `SourceNS` -> `source_ns`, `ID` -> `id`.
fn snake_case(key: &str) -> String {
    let letters: Vec<char> = key.chars().collect();
    let mut snake = String::with_capacity(key.len() + 4);
    for (index, letter) in letters.iter().enumerate() {
        let before = index.checked_sub(1).and_then(|i| letters.get(i));
        let after = letters.get(index + 1);
        let begins_word = letter.is_ascii_uppercase()
            && before.is_some_and(|b| {
                b.is_ascii_lowercase()
                    || b.is_ascii_digit()
                    || (b.is_ascii_uppercase() && after.is_some_and(char::is_ascii_lowercase))
            });
        if begins_word {
            snake.push('_');
        }
        snake.push(letter.to_ascii_lowercase());
    }
    snake
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_spelt_one_way() {
        for (camel, snake) in [
            ("Name", "name"),
            ("ID", "id"),
            ("LocalServicePort", "local_service_port"),
            ("SourceNS", "source_ns"),
            ("MaxInboundConnections", "max_inbound_connections"),
            ("already_snake", "already_snake"),
            ("consul-virtual", "consul-virtual"),
            ("lan_ipv4", "lan_ipv4"),
        ] {
            assert_eq!(snake_case(camel), snake);
        }
    }

    #[test]
    fn meta_keys_stay_the_users() {
        let documents = parse(Format::Json, r#"{"Service":{"Meta":{"BuildID":"7"}}}"#).unwrap();
        assert_eq!(
            documents,
            [serde_json::json!({"service":{"meta":{"BuildID":"7"}}})]
        );
    }

    #[test]
    fn three_languages_say_the_same() {
        let yaml = "service:\n  name: web\n  port: 80\n";
        let json = r#"{"service":{"name":"web","port":80}}"#;
        let hcl = "service {\n  name = \"web\"\n  port = 80\n}\n";
        let expected = [serde_json::json!({"service":{"name":"web","port":80}})];
        assert_eq!(parse(Format::Yaml, yaml).unwrap(), expected);
        assert_eq!(parse(Format::Json, json).unwrap(), expected);
        assert_eq!(parse(Format::Hcl, hcl).unwrap(), expected);
    }

    #[test]
    fn repeated_blocks_are_a_list() {
        let hcl = "service {\n  name = \"a\"\n}\nservice {\n  name = \"b\"\n}\n";
        let expected = serde_json::json!({"service":[{"name":"a"},{"name":"b"}]});
        assert_eq!(parse(Format::Hcl, hcl).unwrap(), [expected]);
    }

    /// A stack that overflows ends the process, and the test with it.
    #[test]
    fn deep_nesting_is_refused() {
        for (format, before, level) in [
            (Format::Yaml, "", "["),
            (Format::Yaml, "", "{a: "),
            (Format::Yaml, "", "- "),
            (Format::Yaml, "", "? "),
            (Format::Json, "", "["),
            (Format::Json, "", "{\"a\":"),
            (Format::Hcl, "", "a {\n"),
            (Format::Hcl, "a = ", "["),
            (Format::Hcl, "a = ", "{ a = "),
            (Format::Hcl, "a = ", "\"${"),
            (Format::Hcl, "a = ", "\"%{ if a }"),
            (Format::Hcl, "a = ", "("),
            (Format::Hcl, "a = ", "f("),
        ] {
            let text = format!("{before}{}", level.repeat(100_000));
            assert!(parse(format, &text).is_err(), "{before}{level}");
        }
    }

    #[test]
    fn yaml_may_hold_several_documents() {
        assert_eq!(
            parse(Format::Yaml, "a: 1\n---\nb: 2\n---\n").unwrap().len(),
            2
        );
        assert_eq!(parse(Format::Yaml, "").unwrap().len(), 0);
    }

    #[test]
    fn a_file_may_hold_a_whole_datacenter() {
        let service = "---\nservice:\n  name: web\n  port: 80\n  tags: [a, b, c]\n";
        let documents = parse(Format::Yaml, &service.repeat(20_000)).unwrap();
        assert_eq!(documents.len(), 20_000);
    }

    /// Ten levels of ten aliases each.
    #[test]
    fn aliases_that_explode_are_refused() {
        let mut text = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n".to_owned();
        for level in 1..10 {
            let aliases = vec![format!("*a{}", level - 1); 10].join(", ");
            text.push_str(&format!("a{level}: &a{level} [{aliases}]\n"));
        }
        parse(Format::Yaml, &text).unwrap_err();
    }

    proptest::proptest! {
        #[test]
        fn no_text_makes_it_panic(text in ".{0,200}") {
            for format in [Format::Yaml, Format::Json, Format::Hcl] {
                drop(parse(format, &text));
            }
        }
    }
}
