//! The agent's log: structured lines on standard error, the level changeable while it runs.

use std::{error::Error, fmt, io::IsTerminal as _};

use tracing_subscriber::{
    EnvFilter, Layer as _, Registry, filter::ParseError, fmt::layer, layer::SubscriberExt as _,
    reload, util::SubscriberInitExt as _, util::TryInitError,
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
    #[error(
        "log level {directives:?} is not understood: expected for example \"info\" or \"info,sidestep::relay=debug\""
    )]
    Directives {
        /// What was given.
        directives: String,
        /// Where it went wrong.
        #[source]
        source: ParseError,
    },
    /// There is a log already.
    #[error("the log is set up already")]
    Twice(#[source] TryInitError),
    /// The log is gone: the process is ending.
    #[error("the log level cannot be changed any more")]
    Gone(#[source] reload::Error),
}

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
        let filter = parse(directives)?;
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
    let (filter, handle) = reload::Layer::new(parse(directives)?);
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

fn parse(directives: &str) -> Result<EnvFilter, LogError> {
    EnvFilter::builder()
        .parse(directives)
        .map_err(|source| LogError::Directives {
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
        for good in ["info", "debug,hyper=warn", "off"] {
            parse(good).unwrap();
        }
        let error = parse("sidestep=loud").unwrap_err();
        assert!(error.to_string().contains("sidestep=loud"), "{error}");
    }
}
