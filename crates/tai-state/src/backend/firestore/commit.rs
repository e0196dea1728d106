//! A list of writes as one Firestore commit, without a transaction on the server: no lock outlives it.

use std::sync::Arc;

use googleapis_tonic_google_firestore_v1::google::firestore::v1 as proto;
use prost::Message;
use prost_types::Timestamp;
use proto::precondition::ConditionType;
use proto::write::Operation as Native;
use proto::{CommitRequest, CommitResponse, DocumentMask};

use super::channel::Line;
use super::place::Place;
use super::read::{failed, revision};
use super::status::Call;
use super::value;
use crate::backend::{
    BackendError, Committed, Operation, Precondition, Revision, Write, refuse_doubles,
};

/// What one commit may be at most.
#[derive(Debug, Clone, Copy)]
pub(super) struct Most {
    pub(super) bytes: u64,
    pub(super) writes: usize,
}

pub(super) async fn commit(
    line: &Arc<Line>,
    writes: Vec<Write>,
    most: Most,
) -> Result<Committed, BackendError> {
    refuse_doubles(&writes)?;
    if writes.is_empty() {
        return Ok(Committed { revisions: Vec::new() });
    }
    let mut first = Some(request(line.place(), &writes, most)?);
    // Only what was not sent at all is made again: a copy for each commit would cost more.
    let message = || {
        let again = || request(line.place(), &writes, most).unwrap_or_default();
        first.take().unwrap_or_else(again)
    };
    let answered = line.call(message, |mut client, request| async move {
        Ok(client.commit(request).await?.into_inner())
    });
    revisions(&writes, answered.await.map_err(failed(Call::Commit))?)
}

/// The request, measured before it is sent.
fn request(place: &Place, writes: &[Write], most: Most) -> Result<CommitRequest, BackendError> {
    if writes.len() > most.writes {
        return Err(BackendError::TooLarge {
            what: "the number of documents in one commit".into(),
            size: writes.len() as u64,
            limit: most.writes as u64,
        });
    }
    let message = CommitRequest {
        database: place.database().to_owned(),
        writes: writes.iter().map(|write| native(place, write)).collect::<Result<_, _>>()?,
        ..CommitRequest::default()
    };
    let (what, size, limit) = ("the commit", message.encoded_len() as u64, most.bytes);
    if size > limit {
        return Err(BackendError::TooLarge { what: what.into(), size, limit });
    }
    Ok(message)
}

fn native(place: &Place, write: &Write) -> Result<proto::Write, BackendError> {
    let name = place.document(&write.key);
    let condition = match write.precondition {
        Precondition::Any => None,
        Precondition::Absent => Some(ConditionType::Exists(false)),
        Precondition::Present => Some(ConditionType::Exists(true)),
        Precondition::Revision(revision) => Some(ConditionType::UpdateTime(time(revision))),
    };
    let mut update_mask = None;
    let operation = match &write.operation {
        Operation::Put(body) => {
            let name_bytes = Place::name_bytes(&name);
            let fields = value::to_fields(body.as_text(), name_bytes).map_err(|error| {
                BackendError::Invalid(format!("{}: its body is no JSON object: {error}", write.key))
            })?;
            let size = value::document_bytes(&fields, name_bytes);
            if size > value::MAX_DOCUMENT_BYTES {
                return Err(BackendError::TooLarge {
                    what: format!("the document {}", write.key),
                    size,
                    limit: value::MAX_DOCUMENT_BYTES,
                });
            }
            Native::Update(proto::Document { name, fields, ..proto::Document::default() })
        }
        Operation::Delete => Native::Delete(name),
        // The public interface has no operation that only checks. To delete what must not exist
        // changes nothing; to update no field changes nothing either, not even the time of the last
        // change.
        Operation::Check if write.precondition == Precondition::Absent => Native::Delete(name),
        Operation::Check => {
            update_mask = Some(DocumentMask::default());
            Native::Update(proto::Document { name, ..proto::Document::default() })
        }
    };
    Ok(proto::Write {
        operation: Some(operation),
        update_mask,
        current_document: condition
            .map(|condition| proto::Precondition { condition_type: Some(condition) }),
        ..proto::Write::default()
    })
}

pub(super) fn revisions(
    writes: &[Write],
    answer: CommitResponse,
) -> Result<Committed, BackendError> {
    // It was applied; an answer that does not fit must not look like a refusal.
    let odd =
        || BackendError::Indeterminate("the commit's answer has not the form it should".into());
    if answer.write_results.len() != writes.len() {
        return Err(odd());
    }
    let mut revisions = Vec::with_capacity(writes.len());
    for (write, result) in writes.iter().zip(&answer.write_results) {
        let is_absent = write.operation == Operation::Delete
            || (write.operation == Operation::Check && write.precondition == Precondition::Absent);
        revisions.push(if is_absent {
            None
        } else {
            Some(revision(result.update_time.as_ref()).ok_or_else(odd)?)
        });
    }
    Ok(Committed { revisions })
}

fn time(revision: Revision) -> Timestamp {
    let micros = revision.token();
    let nanos = (micros % 1_000_000) * 1_000;
    Timestamp {
        seconds: i64::try_from(micros / 1_000_000).unwrap_or(i64::MAX),
        nanos: i32::try_from(nanos).unwrap_or(0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::{Key, Kind, Name};

    /// A commit that was answered was applied: an answer that does not fit is not taken for a refusal.
    #[test]
    fn an_answer_that_does_not_fit_leaves_the_outcome_open() {
        let name = Name::escape("a", "id").unwrap();
        let key = Key { governor: name.clone(), kind: Kind::States, name, version: 0 };
        let writes = [
            Write::delete(key.clone(), Precondition::Any),
            Write::check(key, Precondition::Present),
        ];
        let at = Timestamp { seconds: 1, nanos: 2_000 };
        let result =
            |update_time| proto::WriteResult { update_time, ..proto::WriteResult::default() };
        let answer = |write_results| CommitResponse { write_results, commit_time: None };
        let fits = revisions(&writes, answer(vec![result(None), result(Some(at))])).unwrap();
        assert_eq!(fits.revisions, [None, Some(Revision::new(1_000_002))]);
        assert_eq!(time(Revision::new(1_000_002)), at);
        for odd in [vec![], vec![result(Some(at))], vec![result(None), result(None)]] {
            let odd = revisions(&writes, answer(odd));
            assert!(matches!(odd, Err(BackendError::Indeterminate(_))), "{odd:?}");
        }
    }
}
