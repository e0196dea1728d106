//! What Firestore's answers mean to the caller of the port: one table for all calls.
//!
//! A code means different things on different calls: FAILED_PRECONDITION is a stale guard on a commit
//! and a missing index on a query. For a commit, an answer that leaves open whether it was applied is
//! `Indeterminate`; a read has no such thing. Sources: Firestore's error codes
//! (<https://firebase.google.com/docs/firestore/understand-error-codes>) and the retry settings of the
//! official clients.

use tonic::{Code, Status};

use crate::backend::BackendError;

/// What was asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Call {
    /// A get, a list, a count.
    Read,
    /// A query.
    Query,
    /// A commit.
    Commit,
}

/// Why a call has no answer.
#[derive(Debug)]
pub(super) struct Unanswered {
    pub(super) status: Status,
    /// Whether anything may have reached the service.
    pub(super) sent: bool,
}

impl Unanswered {
    pub(super) fn not_sent(status: Status) -> Self {
        Self { status, sent: false }
    }

    pub(super) fn sent(status: Status) -> Self {
        Self { status, sent: true }
    }
}

/// The table.
pub(super) fn meaning(call: Call, failure: &Unanswered) -> BackendError {
    use BackendError::{
        Conflict, Denied, Indeterminate, Invalid, NeedsIndex, NoDatabase, Throttled, Unavailable,
    };
    let status = &failure.status;
    let text = said(status);
    let says = |part: &str| status.message().contains(part);
    // What was not sent was not applied: what kept it from being sent is like a read that failed.
    let call = if failure.sent { call } else { Call::Read };
    let is_commit = call == Call::Commit;
    match status.code() {
        Code::NotFound | Code::FailedPrecondition | Code::InvalidArgument
            if says("Datastore Mode") || says("MongoDB") =>
        {
            Invalid(format!("{text}; only databases in Native mode can be used"))
        }
        Code::NotFound if says("database") && says("does not exist") => NoDatabase(text),
        Code::PermissionDenied
        | Code::InvalidArgument
        | Code::NotFound
        | Code::FailedPrecondition
            if says("has not been used in project")
                || says("API is not enabled")
                || says("Project not found")
                || says("CONSUMER_INVALID")
                || (says("roject") && says("not found or deleted")) =>
        {
            NoDatabase(text)
        }
        Code::AlreadyExists | Code::NotFound | Code::FailedPrecondition if is_commit => Conflict,
        // After a restore a revision may lie in the future of the documents.
        Code::InvalidArgument if is_commit && says("Invalid base version") => Conflict,
        Code::FailedPrecondition if says("index") => NeedsIndex(text),
        // The service's own word: not applied, contention.
        Code::Aborted => Unavailable(text),
        Code::ResourceExhausted if says("message exceeds") || says("larger than max") => {
            Invalid(text)
        }
        Code::ResourceExhausted => Throttled(text),
        Code::PermissionDenied | Code::Unauthenticated => Denied(text),
        Code::InvalidArgument
        | Code::OutOfRange
        | Code::Unimplemented
        | Code::NotFound
        | Code::AlreadyExists
        | Code::FailedPrecondition => Invalid(text),
        Code::DataLoss if !is_commit => {
            BackendError::Corrupt { location: "the service's own storage".into(), reason: text }
        }
        _ if is_commit => Indeterminate(text),
        _ => Unavailable(text),
    }
}

/// Code and message as one line, without anything that was sent along.
fn said(status: &Status) -> String {
    let message: String =
        status.message().chars().map(|c| if c.is_control() { ' ' } else { c }).take(600).collect();
    let code = name(status.code());
    if message.is_empty() { code.to_owned() } else { format!("{code}: {message}") }
}

fn name(code: Code) -> &'static str {
    match code {
        Code::Ok => "OK",
        Code::Cancelled => "CANCELLED",
        Code::Unknown => "UNKNOWN",
        Code::InvalidArgument => "INVALID_ARGUMENT",
        Code::DeadlineExceeded => "DEADLINE_EXCEEDED",
        Code::NotFound => "NOT_FOUND",
        Code::AlreadyExists => "ALREADY_EXISTS",
        Code::PermissionDenied => "PERMISSION_DENIED",
        Code::ResourceExhausted => "RESOURCE_EXHAUSTED",
        Code::FailedPrecondition => "FAILED_PRECONDITION",
        Code::Aborted => "ABORTED",
        Code::OutOfRange => "OUT_OF_RANGE",
        Code::Unimplemented => "UNIMPLEMENTED",
        Code::Internal => "INTERNAL",
        Code::Unavailable => "UNAVAILABLE",
        Code::DataLoss => "DATA_LOSS",
        Code::Unauthenticated => "UNAUTHENTICATED",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kind(error: &BackendError) -> &'static str {
        match error {
            BackendError::Conflict => "conflict",
            BackendError::Unavailable(_) => "unavailable",
            BackendError::Indeterminate(_) => "indeterminate",
            BackendError::Denied(_) => "denied",
            BackendError::Invalid(_) => "invalid",
            BackendError::Throttled(_) => "throttled",
            BackendError::NoDatabase(_) => "no database",
            BackendError::NeedsIndex(_) => "needs index",
            BackendError::Corrupt { .. } => "corrupt",
            _ => "other",
        }
    }

    #[test]
    fn the_table() {
        use Call::{Commit, Query, Read};
        for (call, code, message, wanted) in [
            (Commit, Code::AlreadyExists, "entity already exists", "conflict"),
            (Commit, Code::NotFound, "no entity to update", "conflict"),
            (Commit, Code::FailedPrecondition, "the stored version (1) does not match", "conflict"),
            (Commit, Code::InvalidArgument, "Invalid base version, it is greater", "conflict"),
            (Commit, Code::InvalidArgument, "maximum entity size is 1048576 bytes", "invalid"),
            (Commit, Code::Aborted, "Transaction lock timeout.", "unavailable"),
            (Commit, Code::ResourceExhausted, "Quota exceeded.", "throttled"),
            (Commit, Code::ResourceExhausted, "gRPC message exceeds maximum size", "invalid"),
            (Commit, Code::Unavailable, "", "indeterminate"),
            (Commit, Code::DeadlineExceeded, "", "indeterminate"),
            (Commit, Code::Internal, "", "indeterminate"),
            (Commit, Code::Unknown, "", "indeterminate"),
            (Commit, Code::Cancelled, "", "indeterminate"),
            (Commit, Code::PermissionDenied, "Missing or insufficient permissions.", "denied"),
            (Commit, Code::Unauthenticated, "", "denied"),
            (Commit, Code::Unimplemented, "", "invalid"),
            (Read, Code::Unavailable, "", "unavailable"),
            (Read, Code::DeadlineExceeded, "", "unavailable"),
            (Read, Code::Internal, "", "unavailable"),
            (Read, Code::Unknown, "", "unavailable"),
            (Read, Code::Aborted, "", "unavailable"),
            (Read, Code::DataLoss, "", "corrupt"),
            (
                Read,
                Code::NotFound,
                "The database (default) does not exist for project p",
                "no database",
            ),
            (Commit, Code::NotFound, "The database d does not exist for project p", "no database"),
            (
                Read,
                Code::PermissionDenied,
                "Cloud Firestore API has not been used in project 1 before or it is disabled",
                "no database",
            ),
            (Read, Code::InvalidArgument, "Project 'p' not found or deleted.", "no database"),
            (Read, Code::PermissionDenied, "Missing or insufficient permissions.", "denied"),
            (Query, Code::FailedPrecondition, "The query requires an index.", "needs index"),
            (Query, Code::FailedPrecondition, "The requested 'read_time' is too old.", "invalid"),
            (
                Commit,
                Code::FailedPrecondition,
                "The Cloud Firestore API is not available for Firestore in Datastore Mode",
                "invalid",
            ),
        ] {
            let failure = Unanswered::sent(Status::new(code, message));
            assert_eq!(kind(&meaning(call, &failure)), wanted, "{call:?} {code:?} {message}");
        }
        // What was never sent was never applied.
        for code in [Code::Unavailable, Code::Unknown, Code::DeadlineExceeded] {
            let failure = Unanswered::not_sent(Status::new(code, "x"));
            assert_eq!(kind(&meaning(Commit, &failure)), "unavailable");
        }
    }

    #[test]
    fn messages_are_short_and_plain() {
        let status = Status::new(Code::Internal, format!("a\nb\u{1b}[31m{}", "x".repeat(10_000)));
        let text = said(&status);
        assert!(text.len() < 700 && !text.contains(['\n', '\u{1b}']), "{text}");
    }
}
