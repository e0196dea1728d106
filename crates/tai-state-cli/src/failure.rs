//! How a command fails: the exit code, and the error as text or as one JSON object.

use serde_json::{Map, Value, json};
use tai_state::Error;

use crate::args::Format;

/// Exit codes, as the help lists them.
pub(crate) mod exit {
    pub(crate) const OTHER: u8 = 1;
    pub(crate) const USAGE: u8 = 2;
    pub(crate) const NOT_FOUND: u8 = 3;
    pub(crate) const CONFLICT: u8 = 4;
    pub(crate) const REJECTED: u8 = 5;
    pub(crate) const UNAVAILABLE: u8 = 6;
    pub(crate) const DENIED: u8 = 7;
    pub(crate) const INTEGRITY: u8 = 8;
    pub(crate) const PART_WAY: u8 = 9;
}

/// Why a command ends without success.
#[derive(Debug)]
pub(crate) struct Failure {
    pub(crate) exit: u8,
    code: &'static str,
    message: String,
    retryable: bool,
    hint: Option<String>,
    detail: Map<String, Value>,
    reader_left: bool,
    /// What is wrong is that the answer could not be written.
    is_unsaid: bool,
    /// Nothing is said: the exit code is that of a command which was run, and which has said it all.
    quiet: bool,
}

pub(crate) type Outcome<T = ()> = Result<T, Failure>;

impl Failure {
    pub(crate) fn new(exit: u8, code: &'static str, message: impl Into<String>) -> Self {
        let message = message.into();
        Self {
            exit,
            code,
            message,
            retryable: false,
            hint: None,
            detail: Map::new(),
            reader_left: false,
            is_unsaid: false,
            quiet: false,
        }
    }

    pub(crate) fn usage(message: impl Into<String>) -> Self {
        Self::new(exit::USAGE, "usage", message)
    }

    pub(crate) fn rejected(message: impl Into<String>) -> Self {
        Self::new(exit::REJECTED, "rejected", message)
    }

    pub(crate) fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    pub(crate) fn with_exit(mut self, exit: u8) -> Self {
        self.exit = exit;
        self
    }

    /// Puts what was being done before the message.
    pub(crate) fn context(mut self, context: &str) -> Self {
        self.message = format!("{context}: {}", self.message);
        self
    }

    pub(crate) fn with(mut self, key: &str, value: impl Into<Value>) -> Self {
        self.detail.insert(key.to_owned(), value.into());
        self
    }

    /// The reader of standard output went away.
    pub(crate) fn reader_left() -> Self {
        let message = "whoever read standard output has gone";
        Self { reader_left: true, ..Self::new(exit::OTHER, "io", message) }
    }

    /// The answer could not be written to standard output.
    pub(crate) fn unsaid(error: &std::io::Error) -> Self {
        Self { is_unsaid: true, ..io("standard output", error) }
    }

    /// Ends with the exit code of a command that was run.
    pub(crate) fn passed_on(exit: u8) -> Self {
        Self { quiet: true, ..Self::new(exit, "other", "the command failed") }
    }

    /// Whether the reader of standard output went away. For a command that only shows things that is
    /// a good end; for one that changes them it is not.
    pub(crate) fn is_reader_left(&self) -> bool {
        self.reader_left
    }

    /// For a command that changes things: without its reader it has stopped part-way.
    pub(crate) fn part_way(mut self) -> Self {
        if std::mem::take(&mut self.reader_left) || self.is_unsaid {
            self.exit = exit::PART_WAY;
        }
        self
    }

    /// For a command whose one change stands: an answer that could not be written does not undo it.
    pub(crate) fn though(self, what_was_done: &str) -> Self {
        if self.is_unsaid { self.part_way().context(what_was_done) } else { self }
    }

    /// As one JSON object.
    pub(crate) fn to_json(&self) -> Value {
        let mut object = self.detail.clone();
        object.insert("code".into(), self.code.into());
        object.insert("message".into(), self.message.clone().into());
        object.insert("retryable".into(), self.retryable.into());
        object.insert("hint".into(), self.hint.clone().map_or(Value::Null, Value::from));
        Value::Object(object)
    }

    /// Writes it to standard error.
    pub(crate) fn report(&self, format: Format) {
        match format {
            _ if self.quiet => {}
            Format::Table => {
                eprintln!("error: {}", crate::output::visible_line(&self.message));
                if let Some(hint) = &self.hint {
                    eprintln!("hint: {}", crate::output::visible_line(hint));
                }
            }
            Format::Json | Format::Jsonl => {
                eprintln!("{}", crate::output::compact(&self.to_json()));
            }
        }
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        let exit = match error.code() {
            "state_not_found" | "history_trimmed" => exit::NOT_FOUND,
            "version_conflict" | "transaction_failed" | "lock_held" | "lock_lost" => exit::CONFLICT,
            "invalid_state"
            | "merge_conflict"
            | "serialization_error"
            | "too_large"
            | "not_a_store"
            | "newer_format"
            | "missing_index"
            | "moved" => exit::REJECTED,
            "timeout" | "firestore" | "storage_full" | "storage_failed" | "outcome_unknown" => {
                exit::UNAVAILABLE
            }
            "permission_denied" => exit::DENIED,
            "corrupt" | "store_replaced" => exit::INTEGRITY,
            _ => exit::OTHER,
        };
        let mut message = error.to_string();
        let mut below = std::error::Error::source(&error);
        while let Some(cause) = below {
            let cause_text = cause.to_string();
            if !message.contains(&cause_text) {
                message = format!("{message}: {cause_text}");
            }
            below = cause.source();
        }
        let mut failure = Self::new(exit, error.code(), message);
        failure.retryable = error.is_transient();
        failure.hint = error.hint().map(str::to_owned);
        let conflict = match &error {
            Error::TransactionFailed { source, .. } => source.as_ref(),
            other => other,
        };
        if let Error::VersionConflict { governor, state, expected, actual } = conflict {
            failure.detail = Map::from_iter([
                ("address".to_owned(), json!(format!("{governor}/{state}"))),
                ("expected".to_owned(), json!(expected)),
                ("actual".to_owned(), json!(actual)),
            ]);
        }
        match &error {
            Error::LockHeld { resource, held_by, fencing_token } => {
                failure.detail.insert("held_by".into(), json!(held_by));
                failure.detail.insert("lock".into(), json!(resource));
                failure.detail.insert("fencing_token".into(), json!(fencing_token));
            }
            Error::LockLost { resource, fencing_token, .. } => {
                failure.detail.insert("lock".into(), json!(resource));
                failure.detail.insert("fencing_token".into(), json!(fencing_token));
            }
            _ => {}
        }
        if let Error::OutcomeUnknown { event_id, version, .. } = &error {
            failure = failure.with("event_id", event_id.as_str()).with("version", *version);
        }
        failure
    }
}

/// An error of the operating system on a file or stream that the user named.
pub(crate) fn io(what: &str, error: &std::io::Error) -> Failure {
    use std::io::ErrorKind;
    let exit = match error.kind() {
        ErrorKind::NotFound => exit::NOT_FOUND,
        ErrorKind::PermissionDenied => exit::DENIED,
        ErrorKind::InvalidData | ErrorKind::InvalidInput | ErrorKind::UnexpectedEof => {
            exit::REJECTED
        }
        _ => exit::OTHER,
    };
    Failure::new(exit, "io", format!("{what}: {error}"))
}
