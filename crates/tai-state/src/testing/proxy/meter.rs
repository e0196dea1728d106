//! What has passed: calls, and the documents that Firestore would bill.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use http::HeaderMap;

use super::rules::Fault;
use super::{lock, wire};
use crate::clock::Stopwatch;

/// What has passed, counted on the wire.
///
/// Documents are counted as Firestore bills them if it does what it is asked: those that a forwarded
/// call asks to write or to read, and those that a query or a listing found, at least one. What
/// `Listen` delivers is not counted: the emulator resends all of it at each change.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Usage {
    /// Calls that clients have made, by method (`Commit`), forwarded or not.
    pub calls: BTreeMap<String, u64>,
    /// Documents read.
    pub reads: u64,
    /// Documents written.
    pub writes: u64,
    /// Documents deleted.
    pub deletes: u64,
}

/// One call of a client.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Call {
    /// Its method (`Commit`).
    pub method: String,
    /// When it came: the time since the proxy was started.
    pub at: Duration,
    /// The status that the client was given; none as long as there is none, and where the stream or
    /// the connection ended without.
    pub grpc_status: Option<u32>,
    /// What was done to it.
    pub fault: Option<Fault>,
    /// How often the server got it.
    pub forwarded: u32,
}

#[derive(Debug)]
pub(super) struct Meter {
    start: Stopwatch,
    usage: Mutex<Usage>,
    calls: Mutex<Vec<Arc<Record>>>,
}

impl Default for Meter {
    fn default() -> Self {
        Self { start: Stopwatch::start(), usage: Mutex::default(), calls: Mutex::default() }
    }
}

impl Meter {
    pub(super) fn usage(&self) -> Usage {
        lock(&self.usage).clone()
    }

    pub(super) fn calls(&self) -> Vec<Call> {
        lock(&self.calls).iter().map(|record| record.call()).collect()
    }

    pub(super) fn reset(&self) {
        *lock(&self.usage) = Usage::default();
        lock(&self.calls).clear();
    }

    /// A call has come.
    pub(super) fn arrived(&self, method: &str, fault: Option<Fault>) -> Arc<Record> {
        *lock(&self.usage).calls.entry(method.to_owned()).or_default() += 1;
        let record = Arc::new(Record {
            method: method.to_owned(),
            at: self.start.elapsed(),
            fault,
            status: Mutex::default(),
            forwarded: AtomicU32::new(0),
        });
        lock(&self.calls).push(Arc::clone(&record));
        record
    }

    /// It is forwarded, with this request.
    pub(super) fn forwarded(&self, record: &Record, request: &[u8]) {
        record.forwarded.fetch_add(1, Ordering::SeqCst);
        let messages = wire::Messages::default().feed(request);
        let fields = messages.iter().flat_map(|message| wire::fields(message));
        let mut usage = lock(&self.usage);
        // The numbers are those of google/firestore/v1/firestore.proto and write.proto.
        match record.method.as_str() {
            "Commit" | "BatchWrite" => {
                let writes = fields.filter(|(number, _)| *number == 2);
                for (number, _) in writes.flat_map(|(_, write)| wire::fields(write)) {
                    match number {
                        1 | 6 => usage.writes += 1,
                        2 => usage.deletes += 1,
                        _ => {}
                    }
                }
            }
            "CreateDocument" | "UpdateDocument" => usage.writes += 1,
            "DeleteDocument" => usage.deletes += 1,
            "BatchGetDocuments" => {
                let documents = fields.filter(|(number, _)| *number == 2).count();
                usage.reads += u64::try_from(documents).unwrap_or(u64::MAX);
            }
            "GetDocument"
            | "RunQuery"
            | "ListDocuments"
            | "RunAggregationQuery"
            | "ListCollectionIds" => usage.reads += 1,
            _ => {}
        }
    }

    /// What reads the answer to a forwarded call and counts the documents in it.
    pub(super) fn reader(&self, method: &str) -> Option<Reader> {
        let counted = matches!(method, "RunQuery" | "ListDocuments");
        counted.then(Reader::default)
    }

    pub(super) fn read(&self, reader: &mut Reader, piece: &[u8]) {
        let messages = reader.messages.feed(piece);
        let fields = messages.iter().flat_map(|message| wire::fields(message));
        for _ in fields.filter(|(number, _)| *number == 1) {
            // The first was counted with the call, which costs one also if nothing is found.
            lock(&self.usage).reads += u64::from(reader.found);
            reader.found = true;
        }
    }
}

/// What has been seen of an answer.
#[derive(Debug, Default)]
pub(super) struct Reader {
    messages: wire::Messages,
    found: bool,
}

/// What is known of a call, while it goes on.
#[derive(Debug)]
pub(super) struct Record {
    pub(super) method: String,
    at: Duration,
    fault: Option<Fault>,
    status: Mutex<Option<u32>>,
    forwarded: AtomicU32,
}

impl Record {
    /// Notes the status if it is among these headers or trailers.
    pub(super) fn answered(&self, headers: &HeaderMap) {
        let status = headers.get("grpc-status").and_then(|status| status.to_str().ok());
        if let Some(status) = status.and_then(|status| status.parse().ok()) {
            *lock(&self.status) = Some(status);
        }
    }

    fn call(&self) -> Call {
        Call {
            method: self.method.clone(),
            at: self.at,
            grpc_status: *lock(&self.status),
            fault: self.fault.clone(),
            forwarded: self.forwarded.load(Ordering::SeqCst),
        }
    }
}
