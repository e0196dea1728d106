//! What a recovery says: where replay began, what was found, what was put right.

use std::time::Duration;

use serde::{Serialize, Serializer};

use crate::error::Result;

/// How a state was established from its log.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[non_exhaustive]
pub struct RecoveryReport {
    /// Whose state.
    pub governor_id: String,
    /// Which state.
    pub state_id: String,
    /// The version that was established.
    pub version: u64,
    /// Where replay began.
    pub base: RecoveryBase,
    /// What was found in the head's place.
    pub head: HeadCondition,
    /// Whether something was put right: the head, or saved snapshots.
    pub repaired: bool,
    /// Saved snapshots that could not be used, the newest first; then those that the head did not name, and that
    /// were named or removed.
    pub passed_over: Vec<PassedOver>,
    /// Saved snapshots that were of the log, but said otherwise than the head since when history is kept.
    pub disputed: Vec<u64>,
    /// Events that were folded on the base.
    pub events_replayed: u64,
    /// Bytes of the documents that were read.
    pub bytes_read: u64,
    /// How long it took.
    #[serde(rename = "elapsed_seconds", serialize_with = "seconds")]
    pub elapsed: Duration,
}

/// Where a replay began.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum RecoveryBase {
    /// At the saved snapshot of this version.
    SavedSnapshot(u64),
    /// At the oldest event that is kept, of this version.
    FirstEvent(u64),
}

/// What was found where the head belongs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum HeadCondition {
    /// It is what the log says.
    Sound,
    /// It is of this version, and older than its log: that goes on after it, or was cleaned up since.
    Behind(u64),
    /// It cannot be used, for this reason.
    Damaged(String),
    /// Nothing.
    Missing,
}

/// A saved snapshot that could not be used, or that the head did not name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct PassedOver {
    /// Its version.
    pub version: u64,
    /// Why.
    pub reason: String,
}

/// An elapsed time, in seconds.
fn seconds<S: Serializer>(elapsed: &Duration, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_f64(elapsed.as_secs_f64())
}
