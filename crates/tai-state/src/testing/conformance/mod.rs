//! The contract of [`Backend`] as a list of behaviours: one list for every backend, none may be left
//! out.
//!
//! ```
//! # #[tokio::main(flavor = "current_thread")] async fn main() {
//! use std::sync::Arc;
//! use tai_state::backend::memory::MemoryBackend;
//! use tai_state::testing::conformance;
//!
//! // Each behaviour gets a backend of its own.
//! conformance::run(|| async { Arc::new(MemoryBackend::new()) as _ }).await;
//! # }
//! ```

macro_rules! ensure {
    ($holds:expr, $($message:tt)+) => {
        if !$holds {
            return Err(format!($($message)+));
        }
    };
}

mod querying;
mod reading;
mod watching;
mod writing;

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};

use crate::backend::{
    Backend, BackendError, Body, Committed, Document, Key, Kind, Name, Precondition, Range, Read,
    Revision, Scan, Write,
};

type Outcome = Result<(), String>;
type Running = Pin<Box<dyn Future<Output = Outcome> + Send>>;
/// One behaviour: its name, and a test of it on an empty backend.
pub type Behaviour = (&'static str, fn(Arc<dyn Backend>) -> Running);

macro_rules! behaviours {
    ($($file:ident::$name:ident),* $(,)?) => {
        /// All behaviours.
        pub const BEHAVIOURS: &[Behaviour] =
            &[$((stringify!($name), |backend| Box::pin($file::$name(backend)))),*];
    };
}

behaviours![
    writing::absent_documents_are_none_and_order_is_kept,
    writing::bodies_come_back_equal,
    writing::large_bodies_come_back_equal,
    writing::any_overwrites,
    writing::absent_refuses_what_exists,
    writing::present_refuses_what_does_not,
    writing::a_stale_revision_is_refused,
    writing::every_put_moves_the_revision,
    writing::a_commit_tells_the_revisions,
    writing::deleting_honours_preconditions,
    writing::a_refused_commit_applies_nothing,
    writing::preconditions_are_judged_before_any_write,
    writing::a_check_guards_what_is_not_written,
    writing::a_check_for_absence_creates_nothing,
    writing::a_document_stands_once_in_a_commit,
    writing::an_empty_commit_is_no_error,
    writing::many_writes_are_one_commit,
    reading::names_are_scanned_in_order,
    reading::pages_have_no_gaps_and_no_doubles,
    reading::a_scan_sees_only_its_own,
    reading::versions_are_scanned_in_their_range,
    reading::a_scan_must_fit_its_kind,
    reading::governors_are_listed_in_order,
    reading::documents_are_counted,
    reading::escaped_ids_of_any_kind_are_kept,
    reading::a_view_is_one_cut,
    reading::a_view_of_governors_is_one_cut,
    reading::a_reader_who_sees_the_last_write_sees_the_first,
    reading::of_racing_creates_one_wins,
    reading::racing_writers_lose_nothing,
    reading::identity_does_not_change,
    reading::the_backends_clock_goes_on,
    querying::a_query_finds_what_is_equal,
    querying::a_query_finds_a_range_of_one_type,
    querying::a_query_finds_one_of_several,
    querying::all_filters_of_a_query_must_hold,
    querying::a_query_is_ordered_and_continues,
    querying::a_query_orders_texts_by_their_bytes,
    querying::a_query_reaches_fields_of_any_name,
    querying::a_query_sees_only_its_own,
    querying::a_query_that_nobody_can_answer_is_refused,
    querying::a_query_in_a_view_sees_its_cut,
    watching::every_change_rings,
    watching::nothing_that_changes_is_missed,
    watching::a_ring_waits_for_who_listens_later,
    watching::a_wait_that_is_given_up_loses_nothing,
    watching::a_watch_must_fit_its_kind,
];

/// How long one behaviour may take: the slowest takes about a second on a slow disk.
const DEADLINE: Duration = Duration::from_secs(60);

/// Runs every behaviour, each on a backend of its own.
///
/// # Panics
/// Naming every behaviour that does not hold: this is a test.
#[allow(clippy::panic)]
pub async fn run<F, Fut>(make: F)
where
    F: FnMut() -> Fut,
    Fut: Future<Output = Arc<dyn Backend>>,
{
    let failures = failures(make).await;
    assert!(
        failures.is_empty(),
        "{} of {} behaviours do not hold: {failures:#?}",
        failures.len(),
        BEHAVIOURS.len()
    );
}

/// Runs every behaviour, each on a backend of its own, and returns those that do not hold.
pub async fn failures<F, Fut>(mut make: F) -> Vec<(&'static str, String)>
where
    F: FnMut() -> Fut,
    Fut: Future<Output = Arc<dyn Backend>>,
{
    let mut failures = Vec::new();
    for (name, behaviour) in BEHAVIOURS {
        // A backend that forgets may keep a behaviour waiting for ever.
        let outcome = tokio::time::timeout(DEADLINE, behaviour(make().await)).await;
        if let Err(reason) = outcome.unwrap_or_else(|_| Err(format!("no end after {DEADLINE:?}"))) {
            failures.push((*name, reason));
        }
    }
    failures
}

fn name(id: &str) -> Result<Name, String> {
    Name::escape(id, "id").map_err(|error| error.to_string())
}

fn key(kind: Kind, id: &str, version: u64) -> Result<Key, String> {
    Ok(Key { governor: name("gov")?, kind, name: name(id)?, version })
}

fn state(id: &str) -> Result<Key, String> {
    key(Kind::States, id, 0)
}

fn body(value: &Value) -> Result<Body, String> {
    Body::new(value).map_err(|error| error.to_string())
}

fn put(key: Key, value: &Value, precondition: Precondition) -> Result<Write, String> {
    Ok(Write::put(key, body(value)?, precondition))
}

async fn commit(backend: &Arc<dyn Backend>, writes: Vec<Write>) -> Result<Committed, String> {
    backend.commit(writes).await.map_err(|error| format!("commit: {error}"))
}

async fn refused(backend: &Arc<dyn Backend>, writes: Vec<Write>) -> Outcome {
    match backend.commit(writes).await {
        Err(BackendError::Conflict) => Ok(()),
        other => Err(format!("a conflict was due, not {other:?}")),
    }
}

async fn read(backend: &(impl Read + ?Sized), key: Key) -> Result<Option<Document>, String> {
    let mut found = backend.get(&[key]).await.map_err(|error| format!("get: {error}"))?;
    ensure!(found.len() == 1, "one key was asked for, {} answers came", found.len());
    Ok(found.pop().flatten())
}

fn value(document: Option<&Document>) -> Result<Option<Value>, String> {
    document.map(|d| d.body.parse::<Value>().map_err(|error| error.to_string())).transpose()
}

async fn value_at(backend: &Arc<dyn Backend>, key: Key) -> Result<Option<Value>, String> {
    value(read(backend.as_ref(), key).await?.as_ref())
}

async fn put_any(backend: &Arc<dyn Backend>, key: Key, n: u64) -> Result<Revision, String> {
    let write = put(key, &json!({"n": n}), Precondition::Any)?;
    let committed = commit(backend, vec![write]).await?;
    match committed.revisions.as_slice() {
        [Some(revision)] => Ok(*revision),
        other => Err(format!("one revision was due, not {other:?}")),
    }
}

async fn pages(backend: &(impl Read + ?Sized), scan: Scan) -> Result<Vec<Document>, String> {
    let mut all = Vec::new();
    let mut next = Some(scan);
    while let Some(scan) = next {
        let page = backend.scan(&scan).await.map_err(|error| format!("scan: {error}"))?;
        ensure!(page.documents.len() <= scan.limit, "a page is larger than its limit");
        ensure!(all.len() < 10_000, "the scan does not end");
        all.extend(page.documents);
        next = page.next;
    }
    Ok(all)
}

fn names(kind: Kind, after: Option<&str>, limit: usize) -> Result<Scan, String> {
    let range = Range::Names { after: after.map(name).transpose()? };
    Ok(Scan { governor: name("gov")?, kind, range, limit })
}

fn versions(id: &str, from: u64, to: u64, limit: usize) -> Result<Scan, String> {
    let range = Range::Versions { name: name(id)?, from, to };
    Ok(Scan { governor: name("gov")?, kind: Kind::Events, range, limit })
}

fn ids(documents: &[Document]) -> Vec<String> {
    documents.iter().map(|document| document.key.name.id()).collect()
}
