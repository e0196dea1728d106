//! The record of one change.

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};

use crate::chain::Hash;
use crate::clock_vector::VectorClockSnapshot;
use crate::id::GovernorId;
use crate::state::{ChangeMetadata, StateSnapshot};

/// One change of one state: the event at version *v* is the one that made version *v*.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Event {
    /// The identity of the change: a UUID, chosen before it was first sent.
    pub id: String,
    /// Whose state it is.
    pub governor_id: GovernorId,
    /// What was done: `increment`, `transfer`, … and `save`, `update`, `delete` for the store's
    /// own verbs.
    pub action: String,
    /// The state before, `None` when there was none.
    pub from_state: Option<StateSnapshot>,
    /// The state after. After a delete its data is `null`.
    pub to_state: StateSnapshot,
    /// When, as in `to_state`.
    pub timestamp: DateTime<Utc>,
    /// What the change could have known of, as in `to_state`.
    pub causality: VectorClockSnapshot,
    /// Who and why, as in `to_state`.
    pub metadata: ChangeMetadata,
    /// Whether this change deleted the state.
    pub deleted: bool,
    /// The hash of the event before; `None` for version 1.
    pub prev_hash: Option<Hash>,
    /// The hash of this event, which covers `prev_hash`.
    pub hash: Hash,
}

impl Event {
    /// The version that this change made.
    #[must_use]
    pub fn version(&self) -> u64 {
        self.to_state.version
    }
}
