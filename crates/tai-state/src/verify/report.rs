//! What a proof says: what was read, and which rules are broken where.

use std::fmt;

use serde::Serialize;

use crate::chain::Hash;

/// What a proof of a whole store found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct VerifyReport {
    /// Whether everything holds.
    pub ok: bool,
    /// States, deleted ones included.
    pub states: u64,
    /// Events that belong to the history of a state.
    pub events: u64,
    /// Saved snapshots.
    pub snapshots: u64,
    /// Events that were given up and still stand, since a clean-up or purge was stopped. No problem:
    /// the next one removes them.
    pub leftovers: u64,
    /// What does not hold, each with its place.
    pub problems: Vec<String>,
    /// The hash of all that the log says, as [`StateStore::export`](crate::StateStore::export) computes
    /// it. Says nothing when there are problems.
    pub content_hash: Hash,
}

/// What a proof of one governor found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct ConsistencyReport {
    /// Whose states.
    pub governor_id: String,
    /// Whether everything holds.
    pub ok: bool,
    /// States, deleted ones included.
    pub states: u64,
    /// Events that belong to the history of a state.
    pub events: u64,
    /// Saved snapshots.
    pub snapshots: u64,
    /// Events that were given up and still stand.
    pub leftovers: u64,
    /// Every rule that is broken, and where.
    pub problems: Vec<Problem>,
}

/// A rule that is broken.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct Problem {
    /// Which rule.
    pub rule: Rule,
    /// Where: the state, or the governor or store when it is none of a state.
    pub place: String,
    /// At which version, if it is about one.
    pub version: Option<u64>,
    /// What was found.
    pub reason: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.place)?;
        if let Some(version) = self.version {
            write!(f, " v{version}")?;
        }
        write!(f, ": {}", self.reason)
    }
}

/// What must hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Rule {
    /// Every document can be read, and is what its hash says.
    Readable,
    /// Every version from the first that is kept to the newest has its event.
    NoGap,
    /// Every event follows from the one before it, in its hash and in time.
    Chain,
    /// The head is the newest event.
    HeadIsNewest,
    /// Every saved snapshot that a head names exists.
    SnapshotExists,
    /// A saved snapshot is what the log says.
    SnapshotIsOfLog,
    /// Where history does not begin with version 1, a saved snapshot there or a purge says so, and no saved
    /// snapshot says otherwise.
    CutIsVouched,
    /// No document stands beside a log.
    NoStrays,
    /// The engine's own structure is whole.
    Structure,
}
