//! What Sidestep promises, each as something that can be run: the cases of `cargo xtask prove` and,
//! at a smaller size, of the two-node tests.

/// A list of claims: where the check is, what it says.
macro_rules! claims {
    ($($module:ident :: $name:ident: $says:literal;)*) => {
        &[$(Claim { name: stringify!($name), says: $says, check: $module::$name }),*]
    };
}

pub mod consul;
pub mod dependable;
pub mod iptables;
pub mod names;
pub mod path;
pub mod speed;
mod storm;

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

impl Topic {
    /// Checks the claim `name` at its quick size: for tests.
    ///
    /// # Panics
    /// If it does not hold.
    #[expect(clippy::panic, reason = "this is how a test fails")]
    pub fn assert_holds(&self, name: &str) {
        let Some(claim) = self.claims.iter().find(|claim| claim.name == name) else {
            panic!("there is no claim {name}");
        };
        match (claim.check)(Size::Quick) {
            Ok(finding) => assert!(finding.holds, "{}: {}", claim.says, finding.figure),
            Err(error) => panic!("{}: {error:#}", claim.says),
        }
    }
}

/// A test for each claim of a topic, and one that none is missing.
#[macro_export]
macro_rules! test_claims {
    ($topic:ident: $($name:ident)*) => {
        $(
            #[test]
            fn $name() {
                $topic.assert_holds(stringify!($name));
            }
        )*

        #[test]
        fn no_claim_is_without_a_test() {
            let tested = [$(stringify!($name)),*];
            let claimed: Vec<_> = $topic.claims.iter().map(|claim| claim.name).collect();
            assert_eq!(tested.as_slice(), claimed);
        }
    };
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
pub const TOPICS: &[Topic] = &[
    path::TOPIC,
    dependable::TOPIC,
    consul::TOPIC,
    names::TOPIC,
    iptables::TOPIC,
    speed::TOPIC,
];
