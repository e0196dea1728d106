//! Reading: the newest documents, or those of one moment.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::{Arc, Mutex, PoisonError};

use async_trait::async_trait;
use googleapis_tonic_google_firestore_v1::google::firestore::v1 as proto;
use prost_types::Timestamp;
use proto::batch_get_documents_request::ConsistencySelector as GetAt;
use proto::batch_get_documents_response::Result as Got;
use proto::list_documents_request::ConsistencySelector as ListAt;
use proto::run_aggregation_query_request::{ConsistencySelector as CountAt, QueryType as Count};
use proto::run_query_request::{ConsistencySelector as QueryAt, QueryType};
use proto::structured_aggregation_query::{Aggregation, QueryType as Counted, aggregation};
use proto::value::ValueType;
use proto::{
    BatchGetDocumentsRequest, BatchGetDocumentsResponse, DocumentMask, ListDocumentsRequest,
    RunAggregationQueryRequest, RunAggregationQueryResponse, RunQueryRequest, RunQueryResponse,
    StructuredAggregationQuery, StructuredQuery,
};
use tonic::{Status, Streaming};

use super::channel::{Line, Unusable};
use super::place::Place;
use super::status::{Call, meaning};
use super::{query, value};
use crate::backend::{
    BackendError, Body, Cursor, Document, Found, Key, Kind, Moment as Instant, Name, Page, Query,
    Range, Read, Revision, Scan, refuse_misfit, refuse_query,
};

/// Bytes of bodies in one page: what is left comes with the next.
const PAGE_BYTES: usize = 8 << 20;
/// A range of versions of at most so many documents is read by their names: that needs no index, and
/// on the emulator a query costs as much as there are documents.
const BY_NAME: u64 = 300;
/// Documents in one request.
const MOST_NAMES: usize = 1_000;
/// Governors in one answer.
const LIST_PAGE: i32 = 300;

/// The documents, the newest or of one moment.
#[derive(Debug)]
pub(super) struct Reader {
    line: Arc<Line>,
    moment: Moment,
    /// Where a list of governors ended, so that it can be continued.
    ends: Arc<Mutex<HashMap<Name, String>>>,
}

/// Of when the documents are.
#[derive(Debug)]
enum Moment {
    Newest,
    /// That of the first answer.
    Fixed(tokio::sync::Mutex<Option<Timestamp>>),
}

impl Reader {
    pub(super) fn new(line: Arc<Line>) -> Self {
        Self { line, moment: Moment::Newest, ends: Arc::default() }
    }

    /// A reader of one moment: that of its first answer.
    pub(super) fn fixed(&self) -> Self {
        let moment = Moment::Fixed(tokio::sync::Mutex::default());
        Self { line: Arc::clone(&self.line), moment, ends: Arc::default() }
    }

    /// Reads at the moment, or finds out which it is by reading.
    async fn at<Answer, Reading>(
        &self,
        read: impl Fn(Option<Timestamp>) -> Reading,
    ) -> Result<Answer, BackendError>
    where
        Reading: Future<Output = Result<(Answer, Option<Timestamp>), BackendError>>,
    {
        let Moment::Fixed(moment) = &self.moment else { return Ok(read(None).await?.0) };
        let mut moment = moment.lock().await;
        if let Some(time) = *moment {
            drop(moment);
            return Ok(read(Some(time)).await?.0);
        }
        let (answer, time) = read(None).await?;
        *moment = time;
        Ok(answer)
    }

    /// The documents at these keys, in that order, and when that was, if any was asked for.
    async fn all(
        &self,
        keys: &[Key],
    ) -> Result<(Vec<Option<Document>>, Option<Timestamp>), BackendError> {
        let names: Vec<String> = keys.iter().map(|key| self.line.place().document(key)).collect();
        // One that is asked for twice is answered once.
        let mut seen = HashSet::with_capacity(names.len());
        let asked: Vec<String> =
            names.iter().filter(|name| seen.insert(name.as_str())).cloned().collect();
        let (found, time) = self.documents_within(&asked, usize::MAX).await?;
        let found = found
            .ok_or_else(|| BackendError::Invalid("a read without a limit has met it".into()))?;
        let documents = names
            .iter()
            .map(|name| found.get(name).cloned().map(|it| self.document(it)).transpose());
        Ok((documents.collect::<Result<_, _>>()?, time))
    }

    /// The documents with these names, as far as they exist, and when that was; no documents when they
    /// are more than so many bytes.
    async fn documents_within(
        &self,
        names: &[String],
        most: usize,
    ) -> Result<(Option<HashMap<String, proto::Document>>, Option<Timestamp>), BackendError> {
        let mut found = HashMap::with_capacity(names.len());
        // More than one request takes are read at the moment of the first.
        let mut moment = None;
        for names in names.chunks(MOST_NAMES) {
            let answers = self.at(|time| async move {
                let message = BatchGetDocumentsRequest {
                    database: self.line.place().database().to_owned(),
                    documents: names.to_vec(),
                    consistency_selector: time.or(moment).map(GetAt::ReadTime),
                    ..BatchGetDocumentsRequest::default()
                };
                let answered = self.line.call(
                    || message.clone(),
                    |mut client, request| async move {
                        let answers = client.batch_get_documents(request).await?.into_inner();
                        collect(answers, names, most).await
                    },
                );
                let (found, time) = answered.await.map_err(failed(Call::Read))?;
                Ok(((found, time), time))
            });
            let (documents, time) = answers.await?;
            moment = moment.or(time);
            let Some(documents) = documents else { return Ok((None, moment)) };
            for document in documents {
                found.insert(document.name.clone(), document);
            }
        }
        Ok((Some(found), moment))
    }

    /// Runs a query until its end or until the page is full; `true` when it was cut off.
    async fn run(
        &self,
        parent: String,
        query: StructuredQuery,
    ) -> Result<(Vec<proto::Document>, bool), BackendError> {
        let (parent, query) = (&parent, &query);
        self.at(|time| async move {
            let message = RunQueryRequest {
                parent: parent.clone(),
                query_type: Some(QueryType::StructuredQuery(query.clone())),
                consistency_selector: time.map(QueryAt::ReadTime),
                ..RunQueryRequest::default()
            };
            let answered = self.line.call(
                || message.clone(),
                |mut client, request| async move {
                    gather(client.run_query(request).await?.into_inner()).await
                },
            );
            let (found, time, cut_off) = answered.await.map_err(failed(Call::Query))?;
            Ok(((found, cut_off), time))
        })
        .await
    }

    fn document(&self, found: proto::Document) -> Result<Document, BackendError> {
        document(self.line.place(), found)
    }

    /// With this token a list goes on after this name, or somewhat before it.
    fn remember_end(&self, last: &Name, token: String) {
        let mut ends = self.ends.lock().unwrap_or_else(PoisonError::into_inner);
        if ends.len() >= 64 {
            ends.clear();
        }
        if !token.is_empty() {
            ends.insert(last.clone(), token);
        }
    }

    /// Documents, and when that was by the service's clock: it says so with every answer.
    pub(super) async fn get_at(
        &self,
        keys: &[Key],
    ) -> Result<(Vec<Option<Document>>, Instant), BackendError> {
        let (documents, mut time) = self.all(keys).await?;
        if time.is_none() {
            time = self.time().await?;
        }
        let silent = || BackendError::Unavailable("the service did not say its time".into());
        let micros = revision(time.as_ref()).ok_or_else(silent)?.token();
        Ok((documents, Instant { epoch: EPOCH.to_owned(), micros }))
    }

    async fn time(&self) -> Result<Option<Timestamp>, BackendError> {
        let message = || super::meta::request(self.line.place());
        let answered = self.line.call(message, |mut client, request| async move {
            super::meta::read(client.batch_get_documents(request).await?.into_inner()).await
        });
        let (_, time) = answered.await.map_err(failed(Call::Read))?;
        Ok(time)
    }

    async fn versions(
        &self,
        scan: &Scan,
        (name, from, to): (&Name, u64, u64),
    ) -> Result<Page, BackendError> {
        let key = |version| Key {
            governor: scan.governor.clone(),
            kind: scan.kind,
            name: name.clone(),
            version,
        };
        if from > to {
            return Ok(Page { documents: Vec::new(), next: None });
        }
        let place = self.line.place();
        let wanted = BY_NAME.min(scan.limit as u64);
        let mut by_name = None;
        if to - from < wanted {
            let names: Vec<String> = (from..=to).map(|v| place.document(&key(v))).collect();
            // Too large for one page: a query comes in order and can stop.
            if let (Some(mut found), _) = self.documents_within(&names, PAGE_BYTES).await? {
                by_name = Some(names.iter().filter_map(|name| found.remove(name)).collect());
            }
        }
        let (found, cut_off) = match by_name {
            Some(found) => (found, false),
            None => {
                let start = (place.document(&key(from)), true);
                let end = (place.document(&key(to)), false);
                let (collection, limit) = (place.collection(scan.kind), scan.limit);
                let query = query::between(collection, false, Some(start), Some(end), Some(limit));
                self.run(place.governor(&scan.governor), query).await?
            }
        };
        let documents: Vec<Document> =
            found.into_iter().map(|found| self.document(found)).collect::<Result<_, _>>()?;
        let reached_end = documents.last().is_none_or(|last| last.key.version == to);
        let more = !reached_end && (cut_off || documents.len() == scan.limit);
        let next = if more { scan.after(&documents) } else { None };
        Ok(Page { documents, next })
    }
}

#[async_trait]
impl Read for Reader {
    async fn get(&self, keys: &[Key]) -> Result<Vec<Option<Document>>, BackendError> {
        Ok(self.all(keys).await?.0)
    }

    async fn scan(&self, scan: &Scan) -> Result<Page, BackendError> {
        refuse_misfit(scan)?;
        let after = match &scan.range {
            Range::Versions { name, from, to } => {
                return self.versions(scan, (name, *from, *to)).await;
            }
            Range::Names { after } => after,
        };
        let place = self.line.place();
        let start = after.clone().map(|name| {
            let (governor, kind) = (scan.governor.clone(), scan.kind);
            (place.document(&Key { governor, kind, name, version: 0 }), false)
        });
        let collection = place.collection(scan.kind);
        let query = query::between(collection, false, start, None, Some(scan.limit));
        let (found, cut_off) = self.run(place.governor(&scan.governor), query).await?;
        let documents: Vec<Document> =
            found.into_iter().map(|found| self.document(found)).collect::<Result<_, _>>()?;
        let more = cut_off || documents.len() == scan.limit;
        let next = if more { scan.after(&documents) } else { None };
        Ok(Page { documents, next })
    }

    async fn names(
        &self,
        governor: &Name,
        kind: Kind,
        after: Option<&Name>,
        limit: usize,
    ) -> Result<Vec<Name>, BackendError> {
        let place = self.line.place();
        let start = after.map(|name| {
            let (governor, name) = (governor.clone(), name.clone());
            (place.document(&Key { governor, kind, name, version: 0 }), false)
        });
        let query = query::between(place.collection(kind), false, start, None, Some(limit));
        let query = query::names_only(query);
        let (found, _) = self.run(place.governor(governor), query).await?;
        let name = |document: proto::Document| {
            place.key(&document.name).map(|key| key.name).ok_or_else(|| BackendError::Corrupt {
                location: document.name.clone(),
                reason: "no tai-state store writes such a name".into(),
            })
        };
        found.into_iter().map(name).collect()
    }

    async fn governors(
        &self,
        after: Option<&Name>,
        limit: usize,
    ) -> Result<Vec<Name>, BackendError> {
        let place = self.line.place();
        if let Moment::Fixed(moment) = &self.moment {
            // A list does not say of when it is.
            let mut moment = moment.lock().await;
            if moment.is_none() {
                *moment = self.time().await?;
            }
        }
        let mut names: Vec<Name> = Vec::new();
        let known = |after: &Name| {
            self.ends.lock().unwrap_or_else(PoisonError::into_inner).get(after).cloned()
        };
        // A list goes on by a token, not by a name: without one it starts from the beginning.
        let mut token = after.and_then(known).unwrap_or_default();
        while names.len() < limit {
            let page_token = &token;
            let answer = self.at(|time| async move {
                let message = ListDocumentsRequest {
                    parent: place.root(),
                    collection_id: place.governors(),
                    page_size: LIST_PAGE,
                    page_token: page_token.clone(),
                    mask: Some(DocumentMask::default()),
                    // Governors have no document of their own.
                    show_missing: true,
                    consistency_selector: time.map(ListAt::ReadTime),
                    ..ListDocumentsRequest::default()
                };
                let answered = self.line.call(
                    || message.clone(),
                    |mut client, request| async move {
                        Ok(client.list_documents(request).await?.into_inner())
                    },
                );
                let answer = answered.await.map_err(failed(Call::Read))?;
                Ok((answer, time))
            });
            let answer = answer.await?;
            for document in &answer.documents {
                let name = place.governor_of(&document.name);
                let name = name.ok_or_else(|| BackendError::Corrupt {
                    location: document.name.clone(),
                    reason: "no tai-state store writes such a name".into(),
                })?;
                if after.is_none_or(|after| name > *after) {
                    names.push(name);
                }
            }
            let next = answer.next_page_token;
            if names.len() >= limit || next.is_empty() {
                let is_whole = names.len() <= limit && !next.is_empty();
                names.truncate(limit);
                if let Some(last) = names.last() {
                    let token = if is_whole { next } else { token };
                    self.remember_end(last, token);
                }
                return Ok(names);
            }
            token = next;
        }
        Ok(names)
    }

    async fn query(&self, query: &Query) -> Result<Found, BackendError> {
        refuse_query(query)?;
        let place = self.line.place();
        let native = query::matching(place, query);
        let (found, cut_off) = self.run(place.governor(&query.governor), native).await?;
        let documents: Vec<Document> =
            found.into_iter().map(|found| self.document(found)).collect::<Result<_, _>>()?;
        if let Some(odd) = documents.iter().find(|document| !query::is_of(query, &document.key)) {
            return Err(BackendError::Corrupt {
                location: odd.key.to_string(),
                reason: "it was found where it does not stand".into(),
            });
        }
        let more = cut_off || documents.len() == query.limit;
        let next = documents.last().filter(|_| more).map(|last| Cursor {
            key: last.key.clone(),
            value: query::ordered_by(query, last.body.as_text()),
        });
        Ok(Found { documents, next })
    }

    async fn count(&self, governor: Option<&Name>, kind: Kind) -> Result<u64, BackendError> {
        let place = self.line.place();
        let collection = place.collection(kind);
        let (parent, query) = match governor {
            Some(governor) => {
                (place.governor(governor), query::between(collection, false, None, None, None))
            }
            None => {
                let (low, high) = place.bounds();
                let (start, end) = (Some((low, true)), Some((high, true)));
                (place.root(), query::between(collection, true, start, end, None))
            }
        };
        let asked = StructuredAggregationQuery {
            aggregations: vec![Aggregation {
                alias: COUNT.into(),
                operator: Some(aggregation::Operator::Count(aggregation::Count { up_to: None })),
            }],
            query_type: Some(Counted::StructuredQuery(query)),
        };
        let (parent, asked) = (&parent, &asked);
        self.at(|time| async move {
            let message = RunAggregationQueryRequest {
                parent: parent.clone(),
                query_type: Some(Count::StructuredAggregationQuery(asked.clone())),
                consistency_selector: time.map(CountAt::ReadTime),
                ..RunAggregationQueryRequest::default()
            };
            let answered = self.line.call(
                || message.clone(),
                |mut client, request| async move {
                    counted(client.run_aggregation_query(request).await?.into_inner()).await
                },
            );
            let (count, time) = answered.await.map_err(failed(Call::Query))?;
            let silent = || BackendError::Unavailable("the service did not say a count".into());
            Ok((count.ok_or_else(silent)?, time))
        })
        .await
    }
}

const COUNT: &str = "n";
/// All of Firestore has one clock.
const EPOCH: &str = "firestore";

/// The documents of one answer and of when they are; no documents when they are more than so many
/// bytes.
pub(super) async fn collect(
    mut answers: Streaming<BatchGetDocumentsResponse>,
    names: &[String],
    most: usize,
) -> Result<(Option<Vec<proto::Document>>, Option<Timestamp>), Status> {
    let mut found = Vec::new();
    let (mut time, mut bytes) = (None, 0usize);
    let mut unanswered: HashSet<&str> = names.iter().map(String::as_str).collect();
    while let Some(answer) = answers.message().await? {
        time = later(time, answer.read_time);
        match answer.result {
            Some(Got::Found(document)) => {
                unanswered.remove(document.name.as_str());
                bytes = bytes.saturating_add(prost::Message::encoded_len(&document));
                found.push(document);
            }
            Some(Got::Missing(name)) => {
                unanswered.remove(name.as_str());
            }
            None => {}
        }
        if bytes > most {
            return Ok((None, time));
        }
    }
    // A stream that ends early must not look like documents that are not there.
    if !unanswered.is_empty() {
        return Err(Status::unavailable(format!("{} answers are missing", unanswered.len())));
    }
    Ok((Some(found), time))
}

/// What a query has found; `true` when the page is full before its end.
pub(super) async fn gather(
    mut answers: Streaming<RunQueryResponse>,
) -> Result<(Vec<proto::Document>, Option<Timestamp>, bool), Status> {
    let (mut found, mut time, mut bytes) = (Vec::new(), None, 0usize);
    let mut is_answered = false;
    while let Some(answer) = answers.message().await? {
        is_answered = true;
        time = later(time, answer.read_time);
        if let Some(document) = answer.document {
            bytes += prost::Message::encoded_len(&document);
            found.push(document);
            if bytes > PAGE_BYTES {
                return Ok((found, time, true));
            }
        }
    }
    // Also what finds nothing is answered, with a time. (An end without gRPC's trailers is an error of
    // the client's library.)
    if !is_answered {
        return Err(Status::unavailable("the query was not answered"));
    }
    Ok((found, time, false))
}

/// What was counted, if the answers say so.
pub(super) async fn counted(
    mut answers: Streaming<RunAggregationQueryResponse>,
) -> Result<(Option<u64>, Option<Timestamp>), Status> {
    let (mut count, mut time) = (None, None);
    while let Some(answer) = answers.message().await? {
        time = later(time, answer.read_time);
        let fields: Option<BTreeMap<_, _>> = answer.result.map(|r| r.aggregate_fields);
        count = count.or(fields.and_then(|mut fields| fields.remove(COUNT)));
    }
    let count = match count.and_then(|value| value.value_type) {
        Some(ValueType::IntegerValue(count)) => Some(u64::try_from(count).unwrap_or(0)),
        _ => None,
    };
    Ok((count, time))
}

/// A document as it was answered.
pub(super) fn document(place: &Place, found: proto::Document) -> Result<Document, BackendError> {
    let proto::Document { name, fields, update_time, .. } = found;
    let corrupt = |reason| BackendError::Corrupt { location: name.clone(), reason };
    let key = place.key(&name);
    let key = key.ok_or_else(|| corrupt("no tai-state store writes such a name".into()))?;
    let revision = revision(update_time.as_ref());
    let revision = revision.ok_or_else(|| corrupt("it has no time of its last change".into()))?;
    let body = value::to_text(fields).map_err(corrupt)?;
    Ok(Document { key, body: Body::from_text(body), revision })
}

/// The later of two times: what was told before holds up to it.
fn later(a: Option<Timestamp>, b: Option<Timestamp>) -> Option<Timestamp> {
    let order = |time: &Timestamp| (time.seconds, time.nanos);
    a.into_iter().chain(b).max_by_key(order)
}

/// What a failure means to the caller of the port.
pub(super) fn failed(call: Call) -> impl Fn(Unusable) -> BackendError {
    move |failure| match failure {
        Unusable::Failed(failure) => meaning(call, &failure),
        Unusable::Replaced { expected, found } => BackendError::Replaced { expected, found },
    }
}

/// The time of a document's last change, in microseconds: Firestore's own precision.
pub(super) fn revision(time: Option<&Timestamp>) -> Option<Revision> {
    let time = time?;
    let seconds = u64::try_from(time.seconds).ok()?;
    let micros = u64::try_from(time.nanos).ok()? / 1_000;
    Some(Revision::new(seconds.checked_mul(1_000_000)?.checked_add(micros)?))
}
