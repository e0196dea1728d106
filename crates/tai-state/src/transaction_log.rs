//! What transactions were run lately through a manager, and what became of them.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use chrono::{DateTime, Utc};
use serde::Serialize;

/// How many are kept, unless a manager was told otherwise.
const KEPT: usize = 256;

/// What became of a transaction.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum TransactionStatus {
    /// Its writes are durable.
    Committed,
    /// It wrote nothing; what it read was all there at one moment.
    ReadOnly,
    /// Its idempotency key was answered before; it wrote nothing.
    Answered,
    /// It wrote nothing, for the reason that is given.
    Failed,
    /// It is not known whether its writes were applied.
    Unknown,
    /// Whoever waited for it went away. Its writes were applied together or not at all.
    Abandoned,
}

impl TransactionStatus {
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Committed => "committed",
            Self::ReadOnly => "read_only",
            Self::Answered => "answered",
            Self::Failed => "failed",
            Self::Unknown => "unknown",
            Self::Abandoned => "abandoned",
        }
    }
}

/// A state at a version, as a transaction saw or made it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct TouchedState {
    /// The governor.
    pub governor_id: String,
    /// The state.
    pub state_id: String,
    /// The version that was read (0 = there was none), or made.
    pub version: u64,
}

/// One transaction of the log.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[non_exhaustive]
pub struct TransactionRecord {
    /// The id of its last attempt, which stands in the context of its changes.
    pub id: String,
    /// What it was called with, for the log only.
    pub governor: String,
    /// What became of it.
    pub status: TransactionStatus,
    /// How often its closure ran.
    pub attempts: u32,
    /// What its last attempt read.
    pub reads: Vec<TouchedState>,
    /// What its last attempt wrote, or would have.
    pub writes: Vec<TouchedState>,
    /// Why it failed, or what kept it from the first attempt on: the last conflict.
    pub reason: Option<String>,
    /// When it ended, by the wall clock.
    pub finished_at: DateTime<Utc>,
    /// How long it took.
    pub took: Duration,
}

/// The newest transactions, the oldest first; bounded.
#[derive(Debug, Clone)]
pub(crate) struct TransactionLog {
    records: Arc<Mutex<VecDeque<TransactionRecord>>>,
    kept: usize,
}

impl Default for TransactionLog {
    fn default() -> Self {
        Self::keeping(KEPT)
    }
}

impl TransactionLog {
    pub(crate) fn keeping(kept: usize) -> Self {
        Self { records: Arc::default(), kept }
    }

    pub(crate) fn add(&self, record: TransactionRecord) {
        let status = record.status.as_str();
        metrics::counter!("tai_state_transactions_total", "status" => status).increment(1);
        metrics::histogram!("tai_state_transaction_attempts").record(f64::from(record.attempts));
        let mut records = self.records.lock().unwrap_or_else(PoisonError::into_inner);
        if records.len() >= self.kept {
            records.pop_front();
        }
        if self.kept > 0 {
            records.push_back(record);
        }
    }

    pub(crate) fn records(&self) -> Vec<TransactionRecord> {
        let records = self.records.lock().unwrap_or_else(PoisonError::into_inner);
        records.iter().cloned().collect()
    }
}
