//! The documents that stand beside the states: leases of locks, and the answers to commands.

use std::time::Duration;

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::refuse_newer;
use crate::backend::{Body, Document};
use crate::chain::{FORMAT, Hash, format_time};
use crate::clock::{Moment, to_micros};
use crate::error::{Error, Result};
use crate::lease::Lease;

/// What both backends hold; later than this nothing is.
const LATEST: u64 = i64::MAX as u64;

/// A lock. `held`, `clock` and `clock_micros` are what is judged; the times are for people.
#[derive(Serialize, Deserialize)]
struct LeaseBody {
    format: u64,
    client_id: String,
    lock_token: String,
    fencing_token: u64,
    held: bool,
    broken: bool,
    lost_token: u64,
    lease_ms: u64,
    /// By which clock, and when by it, the lease ends.
    clock: String,
    clock_micros: u64,
    acquired_at: String,
    expires_at: String,
}

/// The body of a lock.
pub(crate) fn lease_body(resource: &str, lease: &Lease) -> Result<Body> {
    let body = LeaseBody {
        format: FORMAT,
        client_id: lease.client_id.clone(),
        lock_token: lease.lock_token.clone(),
        fencing_token: lease.fencing_token,
        held: lease.held,
        broken: lease.broken,
        lost_token: lease.lost_token,
        lease_ms: u64::try_from(lease.lease.as_millis()).unwrap_or(u64::MAX),
        clock: lease.ends.epoch.clone(),
        clock_micros: lease.ends.micros.min(LATEST),
        acquired_at: format_time(&lease.acquired_at),
        expires_at: format_time(&lease.expires_at),
    };
    Body::new(&body).map_err(|source| Error::SerializationError {
        subject: format!("the lock {resource}"),
        source,
    })
}

/// Reads a lock.
pub(crate) fn read_lease(document: &Document) -> Result<Lease> {
    let read: LeaseBody = parse(document)?;
    refuse_newer(document, read.format)?;
    if read.fencing_token == 0 {
        return Err(Error::corrupt(document.key.to_string(), "its fencing token is 0"));
    }
    Ok(Lease {
        client_id: read.client_id,
        lock_token: read.lock_token,
        fencing_token: read.fencing_token,
        held: read.held,
        broken: read.broken,
        lost_token: read.lost_token,
        lease: Duration::from_millis(read.lease_ms),
        ends: Moment { epoch: read.clock, micros: read.clock_micros.min(LATEST) },
        acquired_at: time(document, &read.acquired_at)?,
        expires_at: time(document, &read.expires_at)?,
    })
}

/// The answer to a command that carried an idempotency key. Written once, in the commit that it
/// answers for, and never changed.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Command {
    /// The identity of the commit.
    pub(crate) id: String,
    /// What was asked, so that another request under the same key is noticed; where nobody can tell,
    /// nothing.
    pub(crate) request: Option<Hash>,
    pub(crate) answer: Answered,
    /// From when on it may be forgotten.
    pub(crate) expires_at: DateTime<Utc>,
}

/// What answers a command.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Answered {
    /// A change of one state: the event tells all.
    Event { governor: String, state: String, version: u64 },
    /// What a transaction said.
    Value(Value),
}

#[derive(Serialize, Deserialize)]
struct CommandBody {
    format: u64,
    id: String,
    request: Option<Hash>,
    answer: Answered,
    created_at: String,
    expires_at: String,
}

/// The body of an answer that was made now.
pub(crate) fn command_body(key: &str, command: &Command, now: DateTime<Utc>) -> Result<Body> {
    let body = CommandBody {
        format: FORMAT,
        id: command.id.clone(),
        request: command.request,
        answer: command.answer.clone(),
        created_at: format_time(&to_micros(now)),
        expires_at: format_time(&to_micros(command.expires_at)),
    };
    Body::new(&body).map_err(|source| Error::SerializationError {
        subject: format!("the answer under the idempotency key {key:?}"),
        source,
    })
}

/// Reads an answer.
pub(crate) fn read_command(document: &Document) -> Result<Command> {
    let read: CommandBody = parse(document)?;
    refuse_newer(document, read.format)?;
    let expires_at = to_micros(time(document, &read.expires_at)?);
    Ok(Command { id: read.id, request: read.request, answer: read.answer, expires_at })
}

fn parse<T: serde::de::DeserializeOwned>(document: &Document) -> Result<T> {
    document.body.parse().map_err(|source| {
        Error::corrupt(document.key.to_string(), format!("its body cannot be read: {source}"))
    })
}

fn time(document: &Document, text: &str) -> Result<DateTime<Utc>> {
    let time = text.parse::<DateTime<Utc>>();
    time.map_err(|_| Error::corrupt(document.key.to_string(), "its times cannot be read"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::{Key, Kind, Name, Revision};
    use crate::testing::arbitrary_json;
    use proptest::prelude::*;

    fn document(kind: Kind, body: Body) -> Document {
        let name = Name::escape("r", "id").unwrap();
        let key = Key { governor: name.clone(), kind, name, version: 0 };
        Document { key, body, revision: Revision::new(1) }
    }

    proptest! {
        #[test]
        fn both_bodies_read_back_equal(
            text in any::<String>(), token in 1u64..=i64::MAX as u64, held in any::<bool>(),
            micros in 0..=i64::MAX as u64, lease_ms in 1u64..100_000_000, answer in arbitrary_json(),
            event in any::<bool>(),
        ) {
            let at = DateTime::from_timestamp_micros(1_700_000_000_123_456).unwrap();
            let lease = Lease {
                client_id: text.clone(), lock_token: text.clone(), fencing_token: token, held, broken: held, lost_token: token - 1,
                lease: Duration::from_millis(lease_ms),
                ends: Moment { epoch: text.clone(), micros },
                acquired_at: at, expires_at: at,
            };
            let stored = document(Kind::Locks, lease_body("r", &lease).unwrap());
            prop_assert_eq!(read_lease(&stored).unwrap(), lease);
            let answer = match event {
                true => Answered::Event { governor: text.clone(), state: text.clone(), version: token },
                false => Answered::Value(answer),
            };
            let command = Command { id: text, request: None, answer, expires_at: at };
            let stored = document(Kind::Commands, command_body("k", &command, at).unwrap());
            prop_assert_eq!(read_command(&stored).unwrap(), command);
        }
    }

    #[test]
    fn damage_and_newer_formats_are_named() {
        for (kind, text, code) in [
            (Kind::Locks, "{}", "corrupt"),
            (
                Kind::Locks,
                r#"{"format":2,"client_id":"","lock_token":"","fencing_token":1,"held":true,"broken":false,"lost_token":0,"lease_ms":1,"clock":"","clock_micros":1,"acquired_at":"","expires_at":""}"#,
                "newer_format",
            ),
            (
                Kind::Locks,
                r#"{"format":1,"client_id":"","lock_token":"","fencing_token":0,"held":true,"broken":false,"lost_token":0,"lease_ms":1,"clock":"","clock_micros":1,"acquired_at":"","expires_at":""}"#,
                "corrupt",
            ),
            (Kind::Commands, "[]", "corrupt"),
            (
                Kind::Commands,
                r#"{"format":1,"id":"x","request":null,"answer":{"value":1},"created_at":"","expires_at":"yesterday"}"#,
                "corrupt",
            ),
        ] {
            let document = document(kind, Body::from_text(text.to_owned()));
            let refused = match kind {
                Kind::Locks => read_lease(&document).map(drop),
                _ => read_command(&document).map(drop),
            };
            assert_eq!(refused.unwrap_err().code(), code, "{text}");
        }
    }
}
