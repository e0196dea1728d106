//! Fuzz targets: what Firestore answers, whatever it is, becomes a value or a typed error; and JSON
//! becomes fields that Firestore takes, and comes back.

#![allow(clippy::panic, clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::collections::BTreeMap;
use std::marker::PhantomData;

use bytes::Buf;
use googleapis_tonic_google_firestore_v1::google::firestore::v1 as proto;
use http_body_util::BodyExt;
use prost::Message;
use prost_types::Timestamp;
use proto::value::ValueType;
use proto::{ArrayValue, MapValue, Value as Native};
use serde_json::{Map, Value};
use tonic::codec::{DecodeBuf, Decoder};
use tonic::{Status, Streaming};

use super::listen::{Picture, Scope, take};
use super::place::Place;
use super::status::{Call, Unanswered, meaning};
use super::value::{Fields, to_fields, to_text};
use super::{commit, meta, read};
use crate::backend::{BackendError, Key, Kind, Name, Precondition, Write};
use crate::keys::Address;
use crate::schema;
use crate::testing::fuzz::{BODIES, Input};

/// The text of a body, or with a first byte of 0 a recipe for one.
pub(crate) fn values(bytes: &[u8]) {
    let body = match bytes.split_first() {
        Some((0, recipe)) => {
            let mut input = Input::new(recipe);
            let mut field = || (input.text(), input.json(100));
            Value::Object((0..3).map(|_| field()).collect())
        }
        _ => {
            let Ok(text) = std::str::from_utf8(bytes) else { return };
            match serde_json::from_str::<Map<String, Value>>(text) {
                Ok(body) => Value::Object(body),
                Err(_) => {
                    assert!(to_fields(text, 0).is_err(), "{text} became fields");
                    return;
                }
            }
        }
    };
    there_and_back(&body);
}

fn there_and_back(body: &Value) {
    let text = body.to_string();
    // Deeper than a reader of JSON goes, and so refused long before it comes here.
    let Ok(fields) = to_fields(&text, 100) else {
        assert!(serde_json::from_str::<Value>(&text).is_err(), "{text} is no body");
        return;
    };
    for (key, value) in &fields {
        name(key);
        held(value, 1, false);
    }
    // Over the wire, as Firestore gets and gives it.
    let document = proto::Document { fields, ..proto::Document::default() };
    let sent = document.encode_to_vec();
    let document = proto::Document::decode(sent.as_slice()).expect("its own bytes");
    let again = to_text(document.fields).unwrap_or_else(|reason| panic!("{text}: {reason}"));
    let again: Value = serde_json::from_str(&again).expect("a body is JSON");
    crate::testing::fuzz::same(body, &again);
}

/// That Firestore takes a field of this name.
fn name(key: &str) {
    let reserved = key.len() >= 4 && key.starts_with("__") && key.ends_with("__");
    assert!(!key.is_empty() && key.len() <= 1_500 && !reserved, "a field {key:?}");
}

/// That Firestore takes this value: nested at most 20 deep, and no array within an array.
fn held(value: &Native, level: usize, in_array: bool) {
    match value.value_type.as_ref().expect("a value") {
        ValueType::MapValue(map) => {
            assert!(level <= 20, "too deep");
            for (key, value) in &map.fields {
                name(key);
                held(value, level + 1, false);
            }
        }
        ValueType::ArrayValue(array) => {
            assert!(level <= 20 && !in_array, "too deep, or an array in an array");
            array.values.iter().for_each(|value| held(value, level + 1, true));
        }
        ValueType::DoubleValue(double) => assert!(double.is_finite()),
        _ => {}
    }
}

/// The call in the first byte; with its highest bit set what follows is a recipe for well-formed
/// answers, else it is the body of gRPC's answer.
pub(crate) fn answers(bytes: &[u8]) {
    let Some((first, rest)) = bytes.split_first() else { return };
    let body = if first & 0x80 == 0 { rest.to_vec() } else { frames(*first, Input::new(rest)) };
    let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
    runtime.block_on(async {
        match first & 0x7f {
            0 => batch(streaming(&body)).await,
            1 => queried(streaming(&body)).await,
            2 => {
                if let Ok((count, _)) = read::counted(streaming(&body)).await {
                    assert!(count.is_none_or(|count| i64::try_from(count).is_ok()));
                }
            }
            3 => drop(meta::read(streaming(&body)).await.map_err(told)),
            4 => committed(streaming(&body)).await,
            5 => listened(streaming(&body)).await,
            _ => listed(streaming(&body)).await,
        }
    });
}

fn place() -> Place {
    Place::new("p", "d", "x-")
}

fn address() -> Address {
    Address::new("g", "s").expect("two ids")
}

fn keys() -> [Key; 3] {
    let address = address();
    [address.head(), address.event(1), address.snapshot(1)]
}

/// Any status is an error of the port, as one plain line.
fn told(status: Status) {
    for call in [Call::Read, Call::Query, Call::Commit] {
        for failure in [Unanswered::sent(status.clone()), Unanswered::not_sent(status.clone())] {
            let said = meaning(call, &failure).to_string();
            assert!(said.len() < 4_000 && !said.contains(char::is_control), "{said:?}");
        }
    }
}

async fn batch(answers: Streaming<proto::BatchGetDocumentsResponse>) {
    let names: Vec<String> = keys().iter().map(|key| place().document(key)).collect();
    match read::collect(answers, &names, 1 << 20).await {
        Ok((Some(found), _)) => found.into_iter().for_each(document),
        Ok((None, _)) => {}
        Err(status) => told(status),
    }
}

async fn queried(answers: Streaming<proto::RunQueryResponse>) {
    match read::gather(answers).await {
        Ok((found, _, _)) => found.into_iter().for_each(document),
        Err(status) => told(status),
    }
}

/// What stands in a document is what its fields say, or it is corrupt; and it is read further only by
/// what proves itself.
fn document(found: proto::Document) {
    let said = found.name.clone();
    match read::document(&place(), found) {
        Ok(document) => {
            assert_eq!(place().document(&document.key), said);
            let address = Address {
                governor: document.key.governor.clone(),
                state: document.key.name.clone(),
            };
            let read = match document.key.kind {
                Kind::States => schema::read_head(&address, &document).map(drop),
                Kind::Events | Kind::Snapshots => {
                    schema::read_change(&address, &document).map(drop)
                }
                Kind::Locks => schema::read_lease(&document).map(drop),
                Kind::Commands => schema::read_command(&document).map(drop),
            };
            if let Err(error) = read {
                assert!(matches!(error.code(), "corrupt" | "newer_format"), "{error:?}");
            }
        }
        Err(BackendError::Corrupt { location, .. }) => assert_eq!(location, said),
        Err(error) => panic!("an error of another kind: {error:?}"),
    }
}

async fn committed(mut answers: Streaming<proto::CommitResponse>) {
    let writes = [
        Write::delete(keys()[0].clone(), Precondition::Any),
        Write::check(keys()[1].clone(), Precondition::Present),
    ];
    match answers.message().await {
        Ok(Some(answer)) => match commit::revisions(&writes, answer) {
            Ok(done) => assert!(done.revisions[0].is_none() && done.revisions[1].is_some()),
            // It was applied: nothing else may be said.
            Err(error) => assert!(matches!(error, BackendError::Indeterminate(_)), "{error:?}"),
        },
        Ok(None) => {}
        Err(status) => told(status),
    }
}

async fn listened(mut answers: Streaming<proto::ListenResponse>) {
    let Address { governor, state } = address();
    for name in [None, Some(state)] {
        let scope = Scope { governor: governor.clone(), kind: Kind::States, name };
        let mut picture = Picture::default();
        picture.begin();
        loop {
            match answers.message().await {
                Ok(Some(answer)) => match take(&place(), &scope, answer, &mut picture) {
                    Ok(false) => {}
                    Ok(true) => drop(picture.settle()),
                    Err(status) => return told(status),
                },
                Ok(None) => break,
                Err(status) => return told(status),
            }
        }
    }
}

async fn listed(mut answers: Streaming<proto::ListDocumentsResponse>) {
    while let Ok(Some(answer)) = answers.message().await {
        for found in answer.documents {
            if let Some(governor) = place().governor_of(&found.name) {
                assert_eq!(place().governor(&governor), found.name);
            }
        }
    }
}

/// The body of an answer, with the end that gRPC wants.
fn streaming<T: Message + Default + 'static>(body: &[u8]) -> Streaming<T> {
    let body = http_body_util::Full::new(bytes::Bytes::copy_from_slice(body));
    let trailers = http::HeaderMap::from_iter([(
        http::HeaderName::from_static("grpc-status"),
        http::HeaderValue::from_static("0"),
    )]);
    let body = body.with_trailers(std::future::ready(Some(Ok(trailers))));
    Streaming::new_response(Prost(PhantomData), body, http::StatusCode::OK, None, Some(1 << 20))
}

/// Reads messages as the client does.
struct Prost<T>(PhantomData<fn() -> T>);

impl<T: Message + Default> Decoder for Prost<T> {
    type Item = T;
    type Error = Status;

    fn decode(&mut self, bytes: &mut DecodeBuf<'_>) -> Result<Option<T>, Status> {
        let bytes = bytes.copy_to_bytes(bytes.remaining());
        T::decode(bytes).map(Some).map_err(|error| Status::internal(error.to_string()))
    }
}

/// Well-formed answers by a recipe, each in gRPC's frame.
fn frames(call: u8, mut input: Input<'_>) -> Vec<u8> {
    let mut body = Vec::new();
    while !input.is_empty() && body.len() < 1 << 16 {
        let message = match call & 0x7f {
            0 | 3 => {
                use proto::batch_get_documents_response::Result as Got;
                let result = match input.below(8) {
                    0 => None,
                    1 => Some(Got::Missing(resource(&mut input))),
                    _ => Some(Got::Found(drawn(&mut input))),
                };
                let read_time = time(&mut input);
                let answer =
                    proto::BatchGetDocumentsResponse { result, read_time, ..<_>::default() };
                answer.encode_to_vec()
            }
            1 => {
                let document = (input.below(8) > 0).then(|| drawn(&mut input));
                let read_time = time(&mut input);
                let answer = proto::RunQueryResponse { document, read_time, ..<_>::default() };
                answer.encode_to_vec()
            }
            2 => {
                let value = native(&mut input, 3);
                let result = proto::AggregationResult {
                    aggregate_fields: BTreeMap::from_iter([("n".to_owned(), value)]),
                };
                let result = (input.below(8) > 0).then_some(result);
                let read_time = time(&mut input);
                proto::RunAggregationQueryResponse { result, read_time, ..<_>::default() }
                    .encode_to_vec()
            }
            4 => {
                let result = |input: &mut Input<'_>| proto::WriteResult {
                    update_time: time(input),
                    ..<_>::default()
                };
                let count = [2, 0, 1, 3][input.below(4)];
                let write_results = (0..count).map(|_| result(&mut input)).collect();
                let commit_time = time(&mut input);
                proto::CommitResponse { write_results, commit_time }.encode_to_vec()
            }
            5 => told_by_listen(&mut input).encode_to_vec(),
            _ => {
                let documents = (0..input.below(4)).map(|_| drawn(&mut input)).collect();
                let next_page_token = input.text();
                proto::ListDocumentsResponse { documents, next_page_token }.encode_to_vec()
            }
        };
        body.push(0);
        body.extend_from_slice(&(message.len() as u32).to_be_bytes());
        body.extend_from_slice(&message);
    }
    body
}

fn told_by_listen(input: &mut Input<'_>) -> proto::ListenResponse {
    use proto::listen_response::ResponseType;
    let read_time = time(input);
    let response_type = match input.below(6) {
        0 => ResponseType::TargetChange(proto::TargetChange {
            target_change_type: input.below(7) as i32 - 1,
            read_time,
            ..<_>::default()
        }),
        1 => ResponseType::DocumentDelete(proto::DocumentDelete {
            document: resource(input),
            read_time,
            ..<_>::default()
        }),
        2 => ResponseType::DocumentRemove(proto::DocumentRemove {
            document: resource(input),
            read_time,
            ..<_>::default()
        }),
        3 => ResponseType::Filter(proto::ExistenceFilter {
            count: input.below(4) as i32 - 1,
            ..<_>::default()
        }),
        _ => ResponseType::DocumentChange(proto::DocumentChange {
            document: (input.below(8) > 0).then(|| drawn(input)),
            ..<_>::default()
        }),
    };
    proto::ListenResponse { response_type: Some(response_type) }
}

/// A document that is often one of those that were asked for.
fn drawn(input: &mut Input<'_>) -> proto::Document {
    let name = resource(input);
    let fields = match input.below(4) {
        0 => (0..input.below(5)).map(|_| (input.text(), native(input, 4))).collect(),
        _ => sound(input),
    };
    proto::Document { name, fields, create_time: time(input), update_time: time(input) }
}

/// The fields of a document as a store writes them, with one of them changed now and then.
fn sound(input: &mut Input<'_>) -> Fields {
    let mut fields = to_fields(BODIES[input.below(BODIES.len())], 0).expect("a body");
    if input.below(2) == 1 {
        let at = input.below(fields.len());
        if let Some(value) = fields.values_mut().nth(at) {
            *value = native(input, 3);
        }
    }
    fields
}

fn resource(input: &mut Input<'_>) -> String {
    let keys = keys();
    match input.below(6) {
        at @ 0..3 => place().document(&keys[at]),
        3 => {
            let name = |text: String| Name::escape(&text, "id").ok();
            let (governor, name_) = (name(input.text()), name(input.text()));
            let kind = Kind::ALL[input.below(5)];
            let version = if kind.is_versioned() { input.edge() } else { 0 };
            match (governor, name_) {
                (Some(governor), Some(name)) => {
                    place().document(&Key { governor, kind, name, version })
                }
                _ => place().meta(),
            }
        }
        4 => format!("{}/{}", place().root(), input.text()),
        _ => input.text(),
    }
}

fn time(input: &mut Input<'_>) -> Option<Timestamp> {
    match input.below(8) {
        0 => None,
        1 => Some(Timestamp {
            seconds: input.edge() as i64,
            nanos: i32::from_ne_bytes((input.edge() as u32).to_ne_bytes()),
        }),
        seconds => Some(Timestamp { seconds: seconds as i64, nanos: 1_000 }),
    }
}

fn native(input: &mut Input<'_>, depth: usize) -> Native {
    let most = if depth == 0 { 10 } else { 13 };
    let value_type = match input.below(most) {
        0 => return Native { value_type: None },
        1 => ValueType::NullValue(0),
        2 => ValueType::BooleanValue(true),
        3 => ValueType::IntegerValue(input.edge() as i64),
        4 => ValueType::DoubleValue(f64::from_bits(input.number())),
        5 => ValueType::TimestampValue(time(input).unwrap_or_default()),
        6 => ValueType::StringValue(input.text()),
        7 => ValueType::BytesValue(vec![1].into()),
        8 => ValueType::ReferenceValue(input.text()),
        9 => {
            let text = if input.byte() > 99 { input.json(4).to_string() } else { input.text() };
            let wrapped = Native { value_type: Some(ValueType::StringValue(text)) };
            ValueType::MapValue(MapValue { fields: [("tai:json".to_owned(), wrapped)].into() })
        }
        10 => ValueType::ArrayValue(ArrayValue {
            values: (0..input.below(4)).map(|_| native(input, depth - 1)).collect(),
        }),
        _ => ValueType::MapValue(MapValue {
            fields: (0..input.below(4)).map(|_| (input.text(), native(input, depth - 1))).collect(),
        }),
    };
    Native { value_type: Some(value_type) }
}
