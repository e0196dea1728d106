//! What can go wrong, cut by what the caller does next.
//!
//! Every variant has a stable [`code`](Error::code) that the command line shares, and most have a
//! [`hint`](Error::hint) that names the remedy. The cause below stays in
//! [`source`](std::error::Error::source).

use std::time::Duration;

/// `Result` with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// A boxed cause.
pub type BoxError = Box<dyn std::error::Error + Send + Sync + 'static>;

/// What went wrong.
///
/// [`is_transient`](Error::is_transient) tells whether the same intention may succeed later;
/// [`code`](Error::code) is a stable name; [`hint`](Error::hint) says what to do.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Somebody else changed the state since the version that the caller had in hand. Nothing was
    /// written. Read again, decide again.
    #[error(
        "version conflict on {governor}/{state}: expected version {expected}, the store has {actual}"
    )]
    VersionConflict {
        /// The governor of the state.
        governor: String,
        /// The state.
        state: String,
        /// The version that the caller expected; 0 means "must not exist".
        expected: u64,
        /// The version that the store has now; 0 means that it does not exist.
        actual: u64,
    },

    /// There is no such state, or not at that version or time.
    #[error("no state {governor}/{state}{at}")]
    StateNotFound {
        /// The governor that was asked.
        governor: String,
        /// The state that was asked for.
        state: String,
        /// Empty, or where in history it was looked for, such as ` at v7`.
        at: String,
    },

    /// Two versions of a state were changed differently in the same fields, and the resolver does not
    /// choose between them. Nothing was written. Decide by hand, or use a resolver that chooses.
    #[error("{state} was changed differently on both sides in {}", some_of(fields))]
    MergeConflict {
        /// The state.
        state: String,
        /// The JSON pointers (RFC 6901) of the fields, sorted; `""` is the whole value.
        fields: Vec<String>,
    },

    /// The input was refused: an id, a value or an argument that no backend can keep.
    #[error("{subject} was refused: {reason}")]
    InvalidState {
        /// What was refused, with its address.
        subject: String,
        /// The rule that it broke.
        reason: String,
    },

    /// JSON could not be read or written.
    #[error("{subject} is not the JSON that was expected: {source}")]
    SerializationError {
        /// What was being read or written.
        subject: String,
        /// What the parser said.
        #[source]
        source: serde_json::Error,
    },

    /// The deadline passed before anything was sent, or while only reading.
    #[error("{operation} did not finish within {after:?}")]
    Timeout {
        /// What was being done.
        operation: String,
        /// The deadline that passed.
        after: Duration,
    },

    /// A transaction gave up after its last attempt; the last cause is the source.
    #[error("the transaction gave up after {attempts} attempts")]
    TransactionFailed {
        /// How often it was tried.
        attempts: u32,
        /// Why the last attempt failed.
        #[source]
        source: Box<Error>,
    },

    /// Somebody else holds the lock, and kept it for as long as was waited. Try again later.
    #[error("the lock {resource} is held by {held_by} (fencing token {fencing_token})")]
    LockHeld {
        /// What is locked.
        resource: String,
        /// The client that holds it.
        held_by: String,
        /// The token of its grant.
        fencing_token: u64,
    },

    /// The lock is not held any more with this token: it was released, broken, or its lease ended and
    /// somebody else got it. Nothing was written under it. Acquire it anew, and look at everything
    /// again that was decided under it.
    #[error(
        "the lock {resource} is not held any more with fencing token {fencing_token}: {reason}"
    )]
    LockLost {
        /// What was locked.
        resource: String,
        /// The token of the grant that is over.
        fencing_token: u64,
        /// What became of it.
        reason: String,
    },

    /// The storage service answered with something that a retry may cure.
    #[error("the storage service answered: {message}")]
    Firestore {
        /// What the service said.
        message: String,
        /// The cause below.
        #[source]
        source: Option<BoxError>,
    },

    /// What is stored is damaged. Nothing was repaired and nothing was guessed.
    #[error("{location} is damaged: {reason}")]
    Corrupt {
        /// Which file, document or version.
        location: String,
        /// What does not fit.
        reason: String,
    },

    /// Larger than any backend takes; refused before anything was written.
    #[error("{what} is too large: {size}{unit}, the limit is {limit}", unit = unit(what))]
    TooLarge {
        /// What was measured.
        what: String,
        /// Its size: bytes, unless `what` is a number of things ("the number of …").
        size: u64,
        /// The limit, in the same unit.
        limit: u64,
    },

    /// The operating system or the service does not allow it.
    #[error("{location}: permission denied: {reason}")]
    PermissionDenied {
        /// The file or database.
        location: String,
        /// What was not allowed.
        reason: String,
    },

    /// The disk or the quota is full. What was being written was rolled back; reading goes on.
    #[error("{location}: the storage is full; nothing of this change was written")]
    StorageFull {
        /// The file or database.
        location: String,
    },

    /// A write or sync failed underneath. The handle takes no more writes: open the store again,
    /// which recovers what was acknowledged.
    #[error("{location}: the storage failed: {reason}; open the store again")]
    Storage {
        /// The file or database.
        location: String,
        /// What failed.
        reason: String,
    },

    /// It is not known whether the change was applied. Look for the event with this id before
    /// doing it again: [`StateStore::event`](crate::StateStore::event) at the version tells.
    #[error(
        "the outcome is unknown: version {version} of {governor}/{state} may or may not be event {event_id}"
    )]
    OutcomeUnknown {
        /// The governor of the state.
        governor: String,
        /// The state.
        state: String,
        /// The version that the change would have made.
        version: u64,
        /// The identity of the change.
        event_id: String,
        /// Why it could not be settled.
        #[source]
        source: Option<Box<Error>>,
    },

    /// That part of the history was cleaned up.
    #[error("{governor}/{state}: history is kept since version {first_version}, asked for {asked}")]
    HistoryTrimmed {
        /// The governor of the state.
        governor: String,
        /// The state.
        state: String,
        /// What was asked for.
        asked: String,
        /// The oldest version that is kept.
        first_version: u64,
    },

    /// The store was written by a newer format than this build knows.
    #[error("{location} has format {found}; this build reads up to format {supported}")]
    NewerFormat {
        /// The file or database.
        location: String,
        /// The format found.
        found: u64,
        /// The newest format that this build knows.
        supported: u64,
    },

    /// The path or database holds something else, or nothing.
    #[error("{location} is not a tai-state store: {reason}")]
    NotAStore {
        /// The file or database.
        location: String,
        /// What stands there instead.
        reason: String,
    },

    /// The query needs an index that the database does not have.
    #[error("{location}: the query needs an index that is not there: {reason}")]
    MissingIndex {
        /// The database.
        location: String,
        /// Which index, as the service says it.
        reason: String,
    },

    /// Another store stands where this one was opened, or none any more. Nothing was written to it.
    #[error("{location} is not the store that was opened: expected {expected}, found {found}")]
    StoreReplaced {
        /// The file or database.
        location: String,
        /// The identity of the store that was opened.
        expected: String,
        /// What stands there now.
        found: String,
    },

    /// The store was moved; this place refuses writes.
    #[error("{location} was moved to {to}")]
    Moved {
        /// The place that was asked.
        location: String,
        /// Where the store is now.
        to: String,
    },
}

impl Error {
    /// A stable name of the kind, the same in the command line's JSON.
    #[must_use]
    pub fn code(&self) -> &'static str {
        match self {
            Self::VersionConflict { .. } => "version_conflict",
            Self::StateNotFound { .. } => "state_not_found",
            Self::MergeConflict { .. } => "merge_conflict",
            Self::InvalidState { .. } => "invalid_state",
            Self::SerializationError { .. } => "serialization_error",
            Self::Timeout { .. } => "timeout",
            Self::TransactionFailed { .. } => "transaction_failed",
            Self::LockHeld { .. } => "lock_held",
            Self::LockLost { .. } => "lock_lost",
            Self::Firestore { .. } => "firestore",
            Self::Corrupt { .. } => "corrupt",
            Self::TooLarge { .. } => "too_large",
            Self::PermissionDenied { .. } => "permission_denied",
            Self::StorageFull { .. } => "storage_full",
            Self::Storage { .. } => "storage_failed",
            Self::OutcomeUnknown { .. } => "outcome_unknown",
            Self::HistoryTrimmed { .. } => "history_trimmed",
            Self::NewerFormat { .. } => "newer_format",
            Self::NotAStore { .. } => "not_a_store",
            Self::MissingIndex { .. } => "missing_index",
            Self::StoreReplaced { .. } => "store_replaced",
            Self::Moved { .. } => "moved",
        }
    }

    /// Whether the same intention may succeed later. After a
    /// [`VersionConflict`](Error::VersionConflict) that means: read again first.
    #[must_use]
    pub fn is_transient(&self) -> bool {
        matches!(
            self,
            Self::Timeout { .. }
                | Self::TransactionFailed { .. }
                | Self::Firestore { .. }
                | Self::VersionConflict { .. }
                | Self::LockHeld { .. }
        )
    }

    /// The opposite of [`is_transient`](Error::is_transient): something must be mended first.
    #[must_use]
    pub fn is_permanent(&self) -> bool {
        !self.is_transient()
    }

    /// How long to wait before trying again; zero for a permanent error. Spread it (full jitter)
    /// when many clients wait at once.
    #[must_use]
    pub fn backoff_duration(&self) -> Duration {
        match self {
            Self::VersionConflict { .. } => Duration::from_millis(10),
            Self::TransactionFailed { .. } => Duration::from_millis(100),
            Self::Timeout { .. } | Self::Firestore { .. } | Self::LockHeld { .. } => {
                Duration::from_millis(500)
            }
            _ => Duration::ZERO,
        }
    }

    /// What to do about it, in one sentence.
    #[must_use]
    pub fn hint(&self) -> Option<&'static str> {
        Some(match self {
            Self::VersionConflict { .. } => "read the state again and decide again",
            Self::LockHeld { .. } => {
                "wait longer, or look who holds it with `tai-state locks show`"
            }
            Self::LockLost { .. } => "acquire the lock anew and decide again",
            Self::MergeConflict { .. } => {
                "decide these fields by hand, or let FieldMergeResolver::or_last_write decide them"
            }
            Self::StateNotFound { .. } => "list what exists with `tai-state ls`",
            Self::TooLarge { what, .. } if is_number(what) => "do it in several smaller steps",
            Self::TooLarge { .. } => "keep large data elsewhere and store a reference to it",
            Self::Corrupt { .. } => {
                "run `tai-state verify` for the whole extent; restore from a backup or an export"
            }
            Self::PermissionDenied { .. } => "check the owner and mode, or the role of the account",
            Self::StorageFull { .. } => "free space; the handle goes on by itself afterwards",
            Self::Storage { .. } => "open the store again; what was acknowledged is still there",
            Self::OutcomeUnknown { .. } => {
                "read the event at that version: if it has this id, the change was applied"
            }
            Self::HistoryTrimmed { .. } => {
                "ask for a version that is kept, or read an older export"
            }
            Self::NewerFormat { .. } => "use a newer tai-state",
            Self::NotAStore { .. } => "check the path; `tai-state init` makes a new store",
            Self::MissingIndex { .. } => {
                "deploy the indexes that `tai-state firestore indexes` prints, and those of your own \
                 queries"
            }
            Self::StoreReplaced { .. } => {
                "this is not the store that was opened; look what stands there, then open it again"
            }
            Self::Moved { .. } => "use the new address",
            Self::Timeout { .. } | Self::Firestore { .. } => "try again later",
            _ => return None,
        })
    }

    pub(crate) fn refused(subject: impl Into<String>, reason: impl Into<String>) -> Self {
        Self::InvalidState { subject: subject.into(), reason: reason.into() }
    }

    pub(crate) fn corrupt(location: impl Into<String>, reason: impl Into<String>) -> Self {
        Self::Corrupt { location: location.into(), reason: reason.into() }
    }
}

/// The first few of many, each in quotes.
fn some_of(fields: &[String]) -> String {
    const SHOWN: usize = 5;
    let shown: Vec<String> = fields.iter().take(SHOWN).map(|field| format!("{field:?}")).collect();
    match fields.len().saturating_sub(SHOWN) {
        0 => shown.join(", "),
        more => format!("{} and {more} more", shown.join(", ")),
    }
}

fn is_number(what: &str) -> bool {
    what.contains("the number of ")
}

fn unit(what: &str) -> &'static str {
    if is_number(what) { "" } else { " bytes" }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_error_has_its_class() {
        let conflict = Error::VersionConflict {
            governor: "g".into(),
            state: "s".into(),
            expected: 1,
            actual: 2,
        };
        let missing =
            Error::StateNotFound { governor: "g".into(), state: "s".into(), at: String::new() };
        let timeout = Error::Timeout { operation: "get".into(), after: Duration::from_secs(1) };
        assert!(conflict.is_transient() && !conflict.is_permanent());
        assert!(timeout.is_transient() && timeout.backoff_duration() > Duration::ZERO);
        assert!(missing.is_permanent() && missing.backoff_duration() == Duration::ZERO);
        assert!(Error::refused("x", "y").is_permanent());
    }

    #[test]
    fn a_conflict_names_both_versions() {
        let text = Error::VersionConflict {
            governor: "g".into(),
            state: "s".into(),
            expected: 5,
            actual: 6,
        }
        .to_string();
        assert!(text.contains("g/s") && text.contains('5') && text.contains('6'), "{text}");
    }
}
