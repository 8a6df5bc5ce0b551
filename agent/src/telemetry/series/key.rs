//! The labels of a pair of services.

use std::hash::{Hash, Hasher};

use crate::{catalog::model::ServiceName, telemetry::record::Direction};

/// What a label says when a name is not known (a connection refused before it was).
const UNKNOWN: &str = "unknown";
/// What source and destination say for pairs beyond the cap.
const OTHER: &str = "other";

/// Who talks to whom. `None` is a name that was not learned.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct PairLabels {
    /// Which way it crosses the agent.
    pub direction: Direction,
    /// The calling service.
    pub source: Option<ServiceName>,
    /// The called service.
    pub destination: Option<ServiceName>,
}

/// A pair's labels. Equal if they print alike, whatever they stand for: a scrape must not say a label
/// set twice, even if somebody names a service `unknown`.
#[derive(Debug, Clone)]
pub(super) struct Key {
    pub(super) direction: Direction,
    source: Label,
    destination: Label,
}

#[derive(Debug, Clone)]
enum Label {
    Name(ServiceName),
    Fixed(&'static str),
}

impl Label {
    fn of(name: Option<ServiceName>) -> Self {
        name.map_or(Self::Fixed(UNKNOWN), Self::Name)
    }

    fn as_str(&self) -> &str {
        match self {
            Self::Name(name) => name.as_str(),
            Self::Fixed(text) => text,
        }
    }
}

impl Key {
    pub(super) fn other(direction: Direction) -> Self {
        Self {
            direction,
            source: Label::Fixed(OTHER),
            destination: Label::Fixed(OTHER),
        }
    }

    pub(super) fn is_other(&self) -> bool {
        self.source.as_str() == OTHER && self.destination.as_str() == OTHER
    }

    pub(super) fn text(&self) -> (Direction, &str, &str) {
        (
            self.direction,
            self.source.as_str(),
            self.destination.as_str(),
        )
    }

    pub(super) fn labels(&self) -> Vec<(&'static str, &str)> {
        vec![
            ("direction", self.direction.as_str()),
            ("source", self.source.as_str()),
            ("destination", self.destination.as_str()),
        ]
    }
}

impl From<PairLabels> for Key {
    fn from(labels: PairLabels) -> Self {
        Self {
            direction: labels.direction,
            source: Label::of(labels.source),
            destination: Label::of(labels.destination),
        }
    }
}

impl PartialEq for Key {
    fn eq(&self, other: &Self) -> bool {
        self.text() == other.text()
    }
}

impl Eq for Key {}

impl Hash for Key {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.text().hash(state);
    }
}
