//! The document that says which store this is.

use googleapis_tonic_google_firestore_v1::google::firestore::v1 as proto;
use prost_types::Timestamp;
use proto::batch_get_documents_response::Result as Got;
use proto::{BatchGetDocumentsRequest, BatchGetDocumentsResponse};
use tonic::{Status, Streaming};

use super::place::Place;
use super::value;
use crate::schema::Meta;

/// Asks for the document.
pub(super) fn request(place: &Place) -> BatchGetDocumentsRequest {
    BatchGetDocumentsRequest {
        database: place.database().to_owned(),
        documents: vec![place.meta()],
        ..BatchGetDocumentsRequest::default()
    }
}

/// What the document says, why it cannot be read, or `None` without one; and when that was.
pub(super) type Read = (Result<Option<Meta>, String>, Option<Timestamp>);

pub(super) async fn read(
    mut answers: Streaming<BatchGetDocumentsResponse>,
) -> Result<Read, Status> {
    let mut meta = None;
    let mut at = None;
    while let Some(answer) = answers.message().await? {
        at = at.or(answer.read_time);
        match answer.result {
            Some(Got::Found(document)) => {
                meta = Some(value::to_text(document.fields).and_then(|text| {
                    serde_json::from_str(&text).map(Some).map_err(|error| error.to_string())
                }));
            }
            Some(Got::Missing(_)) => meta = Some(Ok(None)),
            None => {}
        }
    }
    // A stream that ends early must not look like a store that is not there.
    let meta = meta.ok_or_else(|| Status::unavailable("the answer about the store is missing"))?;
    Ok((meta, at))
}
