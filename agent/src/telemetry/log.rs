//! The agent's log: structured lines on standard error, the level changeable while it runs.

use std::{error::Error, fmt, io::IsTerminal as _};

use tracing_subscriber::{
    EnvFilter, Layer as _, Registry,
    filter::{LevelFilter, ParseError},
    fmt::layer,
    layer::SubscriberExt as _,
    reload,
    util::SubscriberInitExt as _,
    util::TryInitError,
};

/// How lines look.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// One JSON object per line.
    Json,
}

/// Why the log could not be set up or changed.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// The directives are not `level` or `target=level,...`.
    #[error("log filter {directives:?}")]
    Directives {
        /// What was given.
        directives: String,
        /// Where it went wrong.
        #[source]
        source: FilterError,
    },
    /// There is a log already.
    #[error("the log is set up already")]
    Twice(#[source] TryInitError),
    /// The log is gone: the process is ending.
    #[error("the log level cannot be changed any more")]
    Gone(#[source] reload::Error),
}

/// What is wrong with the directives of a filter.
#[derive(Debug, thiserror::Error)]
pub enum FilterError {
    /// A target alone. To tracing it means everything of the target; here it is rather a level with a typing error.
    #[error("no level in {directive:?}: expected {EXPECTED}")]
    NoLevel {
        /// The directive.
        directive: String,
    },
    /// Anything else that tracing does not take.
    #[error("not understood: expected {EXPECTED}")]
    Syntax(#[source] ParseError),
}

const EXPECTED: &str = "off, error, warn, info, debug or trace, alone or behind a target, like \"info,sidestep::relay=debug\"";

/// Changes the level of the running log.
#[derive(Debug, Clone)]
pub struct LogHandle {
    filter: reload::Handle<EnvFilter, Registry>,
}

impl LogHandle {
    /// Sets what is logged from now on.
    ///
    /// # Errors
    /// [`LogError::Directives`] if they are not understood; nothing changes then. [`LogError::Gone`] at
    /// the end of the process.
    pub fn set(&self, directives: &str) -> Result<(), LogError> {
        let filter = parse_given(directives)?;
        self.filter.reload(filter).map_err(LogError::Gone)?;
        tracing::info!(directives, "log level changed");
        Ok(())
    }
}

/// Sends the log to standard error. Once per process.
///
/// # Errors
/// [`LogError::Directives`] if they are not understood, [`LogError::Twice`] at the second call.
pub fn init(directives: &str, format: LogFormat) -> Result<LogHandle, LogError> {
    let (filter, handle) = reload::Layer::new(parse_given(directives)?);
    let lines = layer()
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal());
    let lines = match format {
        LogFormat::Text => lines.boxed(),
        LogFormat::Json => lines.json().flatten_event(true).boxed(),
    };
    tracing_subscriber::registry()
        .with(filter)
        .with(lines)
        .try_init()
        .map_err(LogError::Twice)?;
    Ok(LogHandle { filter: handle })
}

/// What `directives` let through: `level` or `target=level`, several with commas between them.
///
/// # Errors
/// [`FilterError`] if one of them is neither.
pub fn parse(directives: &str) -> Result<EnvFilter, FilterError> {
    let has_level = |directive: &str| {
        directive.contains('=')
            || (!directive.is_empty() && directive.parse::<LevelFilter>().is_ok())
    };
    if let Some(directive) = directives.split(',').find(|one| !has_level(one)) {
        return Err(FilterError::NoLevel {
            directive: directive.to_owned(),
        });
    }
    EnvFilter::builder()
        .parse(directives)
        .map_err(FilterError::Syntax)
}

fn parse_given(directives: &str) -> Result<EnvFilter, LogError> {
    parse(directives).map_err(|source| LogError::Directives {
        directives: directives.to_owned(),
        source,
    })
}

/// Prints an error and its sources, separated by `: `.
pub fn chain<'a>(error: &'a (dyn Error + 'a)) -> impl fmt::Display + 'a {
    Chain(error)
}

struct Chain<'a>(&'a (dyn Error + 'a));

impl fmt::Display for Chain<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self.0, f)?;
        let mut next = self.0.source();
        while let Some(error) = next {
            write!(f, ": {error}")?;
            next = error.source();
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("the outer step failed")]
    struct Outer(#[source] std::io::Error);

    #[test]
    fn a_chain_names_each_error_once() {
        let error = Outer(std::io::Error::other("disk on fire"));
        assert_eq!(
            chain(&error).to_string(),
            "the outer step failed: disk on fire"
        );
    }

    #[test]
    fn directives_are_checked() {
        for good in ["info", "WARN", "debug,hyper=warn", "off"] {
            parse(good).unwrap();
        }
        let table = [
            ("loud", "no level in \"loud\": expected off, error"),
            ("info,hyper", "no level in \"hyper\": expected"),
            ("", "no level in \"\": expected"),
            ("sidestep=loud", "not understood: expected off, error"),
        ];
        for (wrong, expected) in table {
            let error = parse(wrong).unwrap_err().to_string();
            assert!(error.starts_with(expected), "{wrong:?} gave {error:?}");
        }
    }
}
