//! What a state is: a JSON value with a version, and who changed it.

use std::collections::BTreeMap;

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::clock::{Clock, SystemClock, to_micros};
use crate::clock_vector::VectorClockSnapshot;
use crate::id::StateId;

/// Who changed a state, and why.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct ChangeMetadata {
    /// The person, service or node that made the change.
    pub changed_by: String,
    /// Why, in words.
    pub reason: String,
    /// The version that the change was based on, if the caller knew one.
    #[serde(default)]
    pub parent_version: Option<u64>,
    /// Anything else worth keeping with the change.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub context: BTreeMap<String, Value>,
}

impl ChangeMetadata {
    /// Who, why, and the version that the change is based on.
    ///
    /// ```
    /// use tai_state::ChangeMetadata;
    /// let by_hand = ChangeMetadata::new("ada", "unstick the order", Some(7));
    /// assert_eq!(by_hand.changed_by, "ada");
    /// ```
    pub fn new(
        changed_by: impl Into<String>,
        reason: impl Into<String>,
        parent_version: Option<u64>,
    ) -> Self {
        Self {
            changed_by: changed_by.into(),
            reason: reason.into(),
            parent_version,
            context: BTreeMap::new(),
        }
    }

    /// Adds one entry of context.
    #[must_use]
    pub fn with_context(mut self, key: impl Into<String>, value: impl Into<Value>) -> Self {
        self.context.insert(key.into(), value.into());
        self
    }
}

/// A state at one version.
///
/// What the store returns has version 1 or more; [`StateSnapshot::new`] makes one that has never
/// been stored, with version 0. The store assigns `version`, `timestamp`, `causality` and
/// `metadata` when it keeps a change, and gives them back when it is read.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StateSnapshot {
    /// The name of the state within its governor.
    pub id: StateId,
    /// The value itself: any JSON.
    pub data: Value,
    /// 0 = never stored; then 1, 2, 3 … one for every change.
    pub version: u64,
    /// When the change was made, by the clock of who made it, in whole microseconds. Never earlier
    /// than the version before; a payload, not an order.
    pub timestamp: DateTime<Utc>,
    /// Who made the change, and why.
    pub metadata: ChangeMetadata,
    /// What the change could have known of.
    pub causality: VectorClockSnapshot,
}

impl StateSnapshot {
    /// A state that has never been stored: version 0, made now.
    #[must_use]
    pub fn new(id: StateId, data: Value, metadata: ChangeMetadata) -> Self {
        Self {
            id,
            data,
            version: 0,
            timestamp: to_micros(SystemClock.now()),
            metadata,
            causality: VectorClockSnapshot::new(),
        }
    }
}
