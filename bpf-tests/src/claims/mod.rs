//! What Sidestep promises, each as something that can be run: the cases of `cargo xtask prove` and,
//! at a smaller size, of the two-node tests.

pub mod path;

use anyhow::Result;

/// How much to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Size {
    /// Enough to see it: seconds each. For CI and tests.
    Quick,
    /// As the claim says.
    Full,
}

impl Size {
    /// `quick` or `full`, as it is.
    pub fn pick<T>(self, quick: T, full: T) -> T {
        match self {
            Self::Quick => quick,
            Self::Full => full,
        }
    }
}

/// Claims that belong together.
#[derive(Debug)]
pub struct Topic {
    /// Its name on the command line.
    pub name: &'static str,
    /// What it is about.
    pub about: &'static str,
    /// Programs that its claims use.
    pub programs: &'static [&'static str],
    /// The claims, in the order in which they are run.
    pub claims: &'static [Claim],
}

/// One promise.
#[derive(Debug, Clone, Copy)]
pub struct Claim {
    /// A short name, which is also its test's.
    pub name: &'static str,
    /// The promise, as a sentence.
    pub says: &'static str,
    /// Finds out.
    pub check: fn(Size) -> Result<Finding>,
}

/// What was found out.
#[derive(Debug)]
pub struct Finding {
    /// The figure that the verdict rests on, for people.
    pub figure: String,
    /// Whether the claim holds.
    pub holds: bool,
}

impl Finding {
    fn new(holds: bool, figure: impl Into<String>) -> Self {
        Self {
            figure: figure.into(),
            holds,
        }
    }
}

/// All topics.
pub const TOPICS: &[Topic] = &[path::TOPIC];
