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

use std::collections::BTreeSet;
use std::pin::Pin;
use std::sync::Arc;

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
    ($($name:ident),* $(,)?) => {
        /// All behaviours.
        pub const BEHAVIOURS: &[Behaviour] =
            &[$((stringify!($name), |backend| Box::pin($name(backend)))),*];
    };
}

behaviours![
    absent_documents_are_none_and_order_is_kept,
    bodies_come_back_equal,
    large_bodies_come_back_equal,
    any_overwrites,
    absent_refuses_what_exists,
    present_refuses_what_does_not,
    a_stale_revision_is_refused,
    every_put_moves_the_revision,
    a_commit_tells_the_revisions,
    deleting_honours_preconditions,
    a_refused_commit_applies_nothing,
    preconditions_are_judged_before_any_write,
    a_check_guards_what_is_not_written,
    a_check_for_absence_creates_nothing,
    a_document_stands_once_in_a_commit,
    an_empty_commit_is_no_error,
    many_writes_are_one_commit,
    names_are_scanned_in_order,
    pages_have_no_gaps_and_no_doubles,
    a_scan_sees_only_its_own,
    versions_are_scanned_in_their_range,
    a_scan_must_fit_its_kind,
    governors_are_listed_in_order,
    documents_are_counted,
    escaped_ids_of_any_kind_are_kept,
    a_view_is_one_cut,
    a_reader_who_sees_the_last_write_sees_the_first,
    of_racing_creates_one_wins,
    racing_writers_lose_nothing,
    identity_does_not_change,
];

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
        if let Err(reason) = behaviour(make().await).await {
            failures.push((*name, reason));
        }
    }
    failures
}

macro_rules! ensure {
    ($holds:expr, $($message:tt)+) => {
        if !$holds {
            return Err(format!($($message)+));
        }
    };
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

async fn absent_documents_are_none_and_order_is_kept(backend: Arc<dyn Backend>) -> Outcome {
    put_any(&backend, state("b")?, 2).await?;
    put_any(&backend, state("a")?, 1).await?;
    put_any(&backend, key(Kind::Events, "a", 7)?, 7).await?;
    let keys = [
        state("b")?,
        state("none")?,
        key(Kind::Events, "a", 7)?,
        state("a")?,
        key(Kind::Events, "a", 8)?,
        key(Kind::Events, "none", 7)?,
        key(Kind::Events, "a", u64::MAX)?,
        state("b")?,
    ];
    let found = backend.get(&keys).await.map_err(|error| error.to_string())?;
    let numbers: Vec<Option<Value>> =
        found.iter().map(|d| value(d.as_ref())).collect::<Result<_, _>>()?;
    let n = |n: u64| Some(json!({"n": n}));
    ensure!(numbers == [n(2), None, n(7), n(1), None, None, None, n(2)], "{numbers:?}");
    for (asked, document) in keys.iter().zip(&found) {
        ensure!(document.as_ref().is_none_or(|d| d.key == *asked), "{asked} came with another key");
    }
    Ok(())
}

async fn bodies_come_back_equal(backend: Arc<dyn Backend>) -> Outcome {
    let bodies = [
        json!({}),
        json!({"a": null, "b": [], "c": {}, "d": [[], [[1]]], "e": [{"f": [{}]}]}),
        json!({"i": [0, -1, 1, i64::MIN, i64::MAX, u64::MAX, 9_007_199_254_740_993_u64]}),
        json!({"d": [0.0, -0.0, 1.0, 0.1, 0.1 + 0.2, 1e308, 5e-324, 1_015.714_285_714_285_7]}),
        json!({"s": ["", "\0", "\n", "\u{202e}é\u{10ffff}", "\"\\/", "__x__", " "]}),
        json!({"": 1, "__x__": 2, "a.b": 3, "`": 4, "/": 5, "\0": 6, "é": 7, "__type__": "__vector__"}),
        json!({"nest": (0..90).fold(json!("deep"), |inner, _| json!({"k": inner}))}),
        json!({"nest": (0..90).fold(json!("deep"), |inner, _| json!([inner]))}),
        json!({"long": {"k".repeat(2_000): "v"}}),
    ];
    for (index, wanted) in bodies.iter().enumerate() {
        let key = state(&format!("s{index}"))?;
        commit(&backend, vec![put(key.clone(), wanted, Precondition::Absent)?]).await?;
        let found = value_at(&backend, key).await?;
        // Compared as text: `1` and `1.0` differ, and so do `0.0` and `-0.0`.
        let (found, wanted) = (found.map(|v| v.to_string()), wanted.to_string());
        ensure!(found.as_deref() == Some(&wanted), "{wanted} came back as {found:?}");
    }
    Ok(())
}

async fn large_bodies_come_back_equal(backend: Arc<dyn Backend>) -> Outcome {
    let wanted = json!({"text": "x".repeat(900 * 1024)});
    commit(&backend, vec![put(state("large")?, &wanted, Precondition::Absent)?]).await?;
    ensure!(value_at(&backend, state("large")?).await? == Some(wanted), "it came back changed");
    Ok(())
}

async fn any_overwrites(backend: Arc<dyn Backend>) -> Outcome {
    put_any(&backend, state("a")?, 1).await?;
    put_any(&backend, state("a")?, 2).await?;
    ensure!(value_at(&backend, state("a")?).await? == Some(json!({"n": 2})), "not overwritten");
    Ok(())
}

async fn absent_refuses_what_exists(backend: Arc<dyn Backend>) -> Outcome {
    for key in [state("a")?, key(Kind::Events, "b", 1)?, key(Kind::Locks, "c", 0)?] {
        let create = || put(key.clone(), &json!({"n": 1}), Precondition::Absent);
        commit(&backend, vec![create()?]).await?;
        refused(&backend, vec![create()?]).await?;
        commit(&backend, vec![Write::delete(key.clone(), Precondition::Any)]).await?;
        commit(&backend, vec![create()?]).await?;
    }
    Ok(())
}

async fn present_refuses_what_does_not(backend: Arc<dyn Backend>) -> Outcome {
    let update = || put(state("a")?, &json!({"n": 2}), Precondition::Present);
    refused(&backend, vec![update()?]).await?;
    ensure!(value_at(&backend, state("a")?).await?.is_none(), "it was created");
    put_any(&backend, state("a")?, 1).await?;
    commit(&backend, vec![update()?]).await?;
    Ok(())
}

async fn a_stale_revision_is_refused(backend: Arc<dyn Backend>) -> Outcome {
    let old = put_any(&backend, state("a")?, 1).await?;
    let new = put_any(&backend, state("a")?, 2).await?;
    let guarded = |revision| put(state("a")?, &json!({"n": 3}), Precondition::Revision(revision));
    refused(&backend, vec![guarded(old)?]).await?;
    ensure!(value_at(&backend, state("a")?).await? == Some(json!({"n": 2})), "it was written");
    commit(&backend, vec![guarded(new)?]).await?;
    refused(&backend, vec![guarded(new)?]).await?;
    commit(&backend, vec![Write::delete(state("a")?, Precondition::Any)]).await?;
    refused(&backend, vec![guarded(new)?]).await
}

async fn every_put_moves_the_revision(backend: Arc<dyn Backend>) -> Outcome {
    let mut seen = Vec::new();
    for round in 0..6 {
        // The same body each time, and twice after a deletion.
        let revision = put_any(&backend, state("a")?, 1).await?;
        ensure!(!seen.contains(&revision), "round {round}: {revision:?} was given before");
        seen.push(revision);
        if round >= 3 {
            commit(&backend, vec![Write::delete(state("a")?, Precondition::Any)]).await?;
        }
    }
    Ok(())
}

async fn a_commit_tells_the_revisions(backend: Arc<dyn Backend>) -> Outcome {
    put_any(&backend, state("kept")?, 1).await?;
    put_any(&backend, state("gone")?, 1).await?;
    let writes = vec![
        put(key(Kind::Events, "new", 1)?, &json!({"n": 1}), Precondition::Absent)?,
        Write::delete(state("gone")?, Precondition::Present),
        Write::check(state("kept")?, Precondition::Present),
        put(state("new")?, &json!({"n": 1}), Precondition::Absent)?,
    ];
    let keys: Vec<Key> = writes.iter().map(|write| write.key.clone()).collect();
    let told = commit(&backend, writes).await?.revisions;
    let found = backend.get(&keys).await.map_err(|error| error.to_string())?;
    let shown: Vec<_> = found.iter().map(|d| d.as_ref().map(|d| d.revision)).collect();
    ensure!(told == shown, "told {told:?}, shown {shown:?}");
    ensure!(
        shown.iter().map(Option::is_some).eq([true, false, true, true]),
        "wrong documents: {shown:?}"
    );
    Ok(())
}

async fn deleting_honours_preconditions(backend: Arc<dyn Backend>) -> Outcome {
    commit(&backend, vec![Write::delete(state("a")?, Precondition::Any)]).await?;
    commit(&backend, vec![Write::delete(state("a")?, Precondition::Absent)]).await?;
    refused(&backend, vec![Write::delete(state("a")?, Precondition::Present)]).await?;
    let old = put_any(&backend, state("a")?, 1).await?;
    let new = put_any(&backend, state("a")?, 2).await?;
    let at =
        |revision| Ok::<_, String>(Write::delete(state("a")?, Precondition::Revision(revision)));
    refused(&backend, vec![at(old)?]).await?;
    refused(&backend, vec![Write::delete(state("a")?, Precondition::Absent)]).await?;
    commit(&backend, vec![at(new)?]).await?;
    ensure!(value_at(&backend, state("a")?).await?.is_none(), "it is still there");
    Ok(())
}

async fn a_refused_commit_applies_nothing(backend: Arc<dyn Backend>) -> Outcome {
    put_any(&backend, state("taken")?, 1).await?;
    let bad = || put(state("taken")?, &json!({"n": 2}), Precondition::Absent);
    let good = |id: &str| put(state(id)?, &json!({"n": 2}), Precondition::Absent);
    let delete = || Ok::<_, String>(Write::delete(state("taken2")?, Precondition::Any));
    put_any(&backend, state("taken2")?, 1).await?;
    // The one that is refused stands first, in the middle, and last.
    refused(&backend, vec![bad()?, good("x")?, good("y")?, delete()?]).await?;
    refused(&backend, vec![good("x")?, bad()?, delete()?, good("y")?]).await?;
    refused(&backend, vec![good("x")?, delete()?, good("y")?, bad()?]).await?;
    for id in ["x", "y"] {
        ensure!(value_at(&backend, state(id)?).await?.is_none(), "{id} was created");
    }
    for id in ["taken", "taken2"] {
        let found = value_at(&backend, state(id)?).await?;
        ensure!(found == Some(json!({"n": 1})), "{id} is {found:?}");
    }
    Ok(())
}

async fn preconditions_are_judged_before_any_write(backend: Arc<dyn Backend>) -> Outcome {
    // `b` must be absent and is, whatever `a` becomes.
    put_any(&backend, state("a")?, 1).await?;
    let writes = vec![
        Write::delete(state("a")?, Precondition::Present),
        put(state("b")?, &json!({"n": 1}), Precondition::Absent)?,
        put(key(Kind::Events, "b", 1)?, &json!({"n": 1}), Precondition::Absent)?,
    ];
    commit(&backend, writes).await?;
    ensure!(value_at(&backend, state("a")?).await?.is_none(), "a is still there");
    ensure!(value_at(&backend, state("b")?).await?.is_some(), "b is not there");
    Ok(())
}

async fn a_check_guards_what_is_not_written(backend: Arc<dyn Backend>) -> Outcome {
    let old = put_any(&backend, state("read")?, 1).await?;
    let new = put_any(&backend, state("read")?, 2).await?;
    let guarded = |revision| {
        Ok::<_, String>(vec![
            put(state("written")?, &json!({"n": 1}), Precondition::Any)?,
            Write::check(state("read")?, Precondition::Revision(revision)),
        ])
    };
    refused(&backend, guarded(old)?).await?;
    ensure!(value_at(&backend, state("written")?).await?.is_none(), "it was written");
    commit(&backend, guarded(new)?).await?;
    let read = read(backend.as_ref(), state("read")?).await?;
    ensure!(read.as_ref().map(|d| d.revision) == Some(new), "the check moved the revision");
    ensure!(value(read.as_ref())? == Some(json!({"n": 2})), "the check changed the body");
    Ok(())
}

async fn a_check_for_absence_creates_nothing(backend: Arc<dyn Backend>) -> Outcome {
    let absent = || Ok::<_, String>(vec![Write::check(state("a")?, Precondition::Absent)]);
    commit(&backend, absent()?).await?;
    ensure!(value_at(&backend, state("a")?).await?.is_none(), "the check created it");
    put_any(&backend, state("a")?, 1).await?;
    refused(&backend, absent()?).await
}

async fn a_document_stands_once_in_a_commit(backend: Arc<dyn Backend>) -> Outcome {
    let twice = vec![
        put(state("a")?, &json!({"n": 1}), Precondition::Any)?,
        put(state("b")?, &json!({"n": 1}), Precondition::Any)?,
        Write::check(state("a")?, Precondition::Any),
    ];
    match backend.commit(twice).await {
        Err(BackendError::Invalid(_)) => {}
        other => return Err(format!("it was answered {other:?}")),
    }
    ensure!(value_at(&backend, state("b")?).await?.is_none(), "half of it was applied");
    Ok(())
}

async fn an_empty_commit_is_no_error(backend: Arc<dyn Backend>) -> Outcome {
    ensure!(commit(&backend, Vec::new()).await?.revisions.is_empty(), "revisions of nothing");
    Ok(())
}

async fn many_writes_are_one_commit(backend: Arc<dyn Backend>) -> Outcome {
    let most = backend.limits().commit_writes.min(500);
    let all: Vec<Write> = (0..most)
        .map(|n| put(state(&format!("s{n:04}"))?, &json!({"n": n}), Precondition::Absent))
        .collect::<Result<_, String>>()?;
    let told = commit(&backend, all).await?.revisions;
    ensure!(told.len() == most && told.iter().all(Option::is_some), "revisions are missing");
    let found = pages(backend.as_ref(), names(Kind::States, None, 1_000)?).await?;
    ensure!(found.len() == most, "{} of {most} are there", found.len());
    Ok(())
}

async fn names_are_scanned_in_order(backend: Arc<dyn Backend>) -> Outcome {
    let unordered = ["b", "a", "é", "Z", "a0", "a!", "a/", "a~", "z", "\u{10ffff}", "\u{ffff}"];
    for id in unordered {
        put_any(&backend, state(id)?, 1).await?;
    }
    let mut wanted: Vec<Name> = unordered.iter().map(|id| name(id)).collect::<Result<_, _>>()?;
    wanted.sort_by(|a, b| a.as_str().as_bytes().cmp(b.as_str().as_bytes()));
    for limit in [100, 3, 1] {
        let found = pages(backend.as_ref(), names(Kind::States, None, limit)?).await?;
        let found: Vec<Name> = found.into_iter().map(|document| document.key.name).collect();
        ensure!(found == wanted, "by {limit}: {found:?}");
    }
    Ok(())
}

async fn pages_have_no_gaps_and_no_doubles(backend: Arc<dyn Backend>) -> Outcome {
    for n in 0..25 {
        put_any(&backend, state(&format!("s{n:02}"))?, n).await?;
    }
    for n in [0, 7, 8, 24] {
        let gone = state(&format!("s{n:02}"))?;
        commit(&backend, vec![Write::delete(gone, Precondition::Present)]).await?;
    }
    for limit in [1, 5, 7, 21, 100] {
        let found = pages(backend.as_ref(), names(Kind::States, None, limit)?).await?;
        let found = ids(&found);
        let distinct: BTreeSet<&String> = found.iter().collect();
        ensure!(found.len() == 21 && distinct.len() == 21, "by {limit}: {found:?}");
    }
    // After a name that is deleted, that never was, and the last.
    for (after, count) in [("s07", 15), ("s05x", 16), ("s23", 0), ("zzz", 0), ("!", 21)] {
        let found = pages(backend.as_ref(), names(Kind::States, Some(after), 4)?).await?;
        ensure!(found.len() == count, "after {after}: {:?}", ids(&found));
    }
    Ok(())
}

async fn a_scan_sees_only_its_own(backend: Arc<dyn Backend>) -> Outcome {
    for governor in ["go", "gov", "gov2"] {
        for kind in Kind::ALL {
            let (governor, name) = (name(governor)?, name("a")?);
            let key = Key { governor, kind, name, version: u64::from(kind.is_versioned()) };
            put_any(&backend, key, 1).await?;
        }
    }
    put_any(&backend, key(Kind::Events, "aa", 1)?, 1).await?;
    for kind in [Kind::States, Kind::Locks, Kind::Commands] {
        let found = pages(backend.as_ref(), names(kind, None, 10)?).await?;
        ensure!(found.len() == 1, "{kind:?}: {found:?}");
        ensure!(
            found.iter().all(|d| d.key.kind == kind && d.key.governor.id() == "gov"),
            "{kind:?}"
        );
    }
    let found = pages(backend.as_ref(), versions("a", 0, u64::MAX, 10)?).await?;
    ensure!(ids(&found) == ["a"], "{found:?}");
    let nobody = Scan { governor: name("nobody")?, ..names(Kind::States, None, 10)? };
    ensure!(pages(backend.as_ref(), nobody).await?.is_empty(), "an unknown governor has states");
    Ok(())
}

async fn versions_are_scanned_in_their_range(backend: Arc<dyn Backend>) -> Outcome {
    for version in [3, 1, 2, 10, 9, 11, 100, i64::MAX as u64] {
        put_any(&backend, key(Kind::Events, "a", version)?, version).await?;
    }
    for (from, to, wanted) in [
        (0, u64::MAX, vec![1, 2, 3, 9, 10, 11, 100, i64::MAX as u64]),
        (2, 10, vec![2, 3, 9, 10]),
        (4, 8, vec![]),
        (100, 100, vec![100]),
        (5, 4, vec![]),
        (101, u64::MAX, vec![i64::MAX as u64]),
    ] {
        for limit in [1, 3, 100] {
            let found = pages(backend.as_ref(), versions("a", from, to, limit)?).await?;
            let found: Vec<u64> = found.iter().map(|document| document.key.version).collect();
            ensure!(found == wanted, "{from}..={to} by {limit}: {found:?}");
        }
    }
    Ok(())
}

async fn a_scan_must_fit_its_kind(backend: Arc<dyn Backend>) -> Outcome {
    let misfits = [
        names(Kind::Events, None, 1)?,
        Scan { kind: Kind::States, ..versions("a", 0, 1, 1)? },
        names(Kind::States, None, 0)?,
    ];
    for misfit in misfits {
        match backend.scan(&misfit).await {
            Err(BackendError::Invalid(_)) => {}
            other => return Err(format!("{misfit:?} was answered {other:?}")),
        }
    }
    Ok(())
}

async fn governors_are_listed_in_order(backend: Arc<dyn Backend>) -> Outcome {
    for id in ["c", "a", "b/", "b", "é"] {
        let key = Key { governor: name(id)?, ..state("s")? };
        put_any(&backend, key, 1).await?;
    }
    let mut found = Vec::new();
    loop {
        let page = backend.governors(found.last(), 2).await.map_err(|error| error.to_string())?;
        ensure!(page.len() <= 2, "a page is larger than its limit");
        if page.is_empty() {
            break;
        }
        found.extend(page);
    }
    let found: Vec<String> = found.iter().map(Name::id).collect();
    ensure!(found == ["a", "b", "b/", "c", "é"], "{found:?}");
    Ok(())
}

async fn documents_are_counted(backend: Arc<dyn Backend>) -> Outcome {
    for n in 1..=5 {
        put_any(&backend, state(&format!("s{n}"))?, n).await?;
        put_any(&backend, key(Kind::Events, "s1", n)?, n).await?;
    }
    let elsewhere = Key { governor: name("other")?, ..state("s")? };
    put_any(&backend, elsewhere, 1).await?;
    commit(&backend, vec![Write::delete(state("s5")?, Precondition::Any)]).await?;
    let (gov, none) = (name("gov")?, name("none")?);
    for (governor, kind, wanted) in [
        (None, Kind::States, 5),
        (Some(&gov), Kind::States, 4),
        (None, Kind::Events, 5),
        (Some(&gov), Kind::Events, 5),
        (Some(&none), Kind::Events, 0),
        (None, Kind::Locks, 0),
    ] {
        let found = backend.count(governor, kind).await.map_err(|error| error.to_string())?;
        ensure!(found == wanted, "{governor:?} {kind:?}: {found}");
    }
    Ok(())
}

async fn escaped_ids_of_any_kind_are_kept(backend: Arc<dyn Backend>) -> Outcome {
    let long = "x".repeat(1_400);
    let wide = "é".repeat(700);
    let hostile = [
        ".",
        "..",
        "../../etc/passwd",
        "__x__",
        "__id7__",
        "a~00000000000000000001",
        "%2F",
        "a\0b",
        "\n",
        " ",
        "-rf",
        "CON",
        "\u{202e}",
        "e\u{301}",
        "\u{e9}",
        "\u{feff}",
        "'; --",
        "`",
        &long,
        &wide,
    ];
    for (n, id) in hostile.iter().enumerate() {
        let n = n as u64;
        let governor = name(id)?;
        put_any(&backend, state(id)?, n).await?;
        put_any(&backend, key(Kind::Events, id, 1)?, n).await?;
        put_any(&backend, Key { governor, ..state("s")? }, n).await?;
    }
    for (n, id) in hostile.iter().enumerate() {
        let wanted = Some(json!({"n": n}));
        let governor = name(id)?;
        for key in [state(id)?, key(Kind::Events, id, 1)?, Key { governor, ..state("s")? }] {
            ensure!(value_at(&backend, key).await? == wanted, "{id:?} came back changed");
        }
        let found = pages(backend.as_ref(), versions(id, 0, 9, 9)?).await?;
        ensure!(ids(&found) == [*id], "{id:?}: {found:?}");
    }
    let found = pages(backend.as_ref(), names(Kind::States, None, 6)?).await?;
    ensure!(found.len() == hostile.len(), "{} of {}", found.len(), hostile.len());
    Ok(())
}

async fn a_view_is_one_cut(backend: Arc<dyn Backend>) -> Outcome {
    put_any(&backend, state("a")?, 1).await?;
    put_any(&backend, state("b")?, 1).await?;
    let view = backend.view().await.map_err(|error| format!("view: {error}"))?;
    let first = read(view.as_ref(), state("a")?).await?;
    put_any(&backend, state("a")?, 2).await?;
    put_any(&backend, state("b")?, 2).await?;
    put_any(&backend, state("c")?, 2).await?;
    let one = Some(json!({"n": 1}));
    ensure!(value(first.as_ref())? == one, "a is not what it was");
    for id in ["a", "b"] {
        let found = value(read(view.as_ref(), state(id)?).await?.as_ref())?;
        ensure!(found == one, "{id} is {found:?} in the view");
    }
    let found = pages(view.as_ref(), names(Kind::States, None, 1)?).await?;
    ensure!(ids(&found) == ["a", "b"], "the view lists {:?}", ids(&found));
    drop(view);
    ensure!(value_at(&backend, state("b")?).await? == Some(json!({"n": 2})), "b is not newest");
    Ok(())
}

async fn a_reader_who_sees_the_last_write_sees_the_first(backend: Arc<dyn Backend>) -> Outcome {
    const ROUNDS: u64 = 60;
    let writer = {
        let backend = Arc::clone(&backend);
        tokio::spawn(async move {
            for n in 1..=ROUNDS {
                let writes = vec![
                    put(key(Kind::Events, "s", n)?, &json!({"n": n}), Precondition::Absent)?,
                    put(state("log")?, &json!({"n": n}), Precondition::Any)?,
                    put(state("head")?, &json!({"n": n}), Precondition::Any)?,
                ];
                commit(&backend, writes).await?;
            }
            Ok::<(), String>(())
        })
    };
    loop {
        let found = backend
            .get(&[state("head")?, state("log")?])
            .await
            .map_err(|error| error.to_string())?;
        let mut numbers = found.iter().map(|document| {
            let n = value(document.as_ref())?.and_then(|v| v.get("n").and_then(Value::as_u64));
            Ok::<u64, String>(n.unwrap_or(0))
        });
        let (Some(head), Some(log)) = (numbers.next(), numbers.next()) else {
            return Err("two answers were due".into());
        };
        let (head, log) = (head?, log?);
        ensure!(head <= log, "the head says {head} and the log {log}");
        if head > 0 {
            let event = value_at(&backend, key(Kind::Events, "s", head)?).await?;
            ensure!(event.is_some(), "the head says {head} and its event is not there");
        }
        if head == ROUNDS {
            break;
        }
        tokio::task::yield_now().await;
    }
    writer.await.map_err(|error| error.to_string())?
}

async fn of_racing_creates_one_wins(backend: Arc<dyn Backend>) -> Outcome {
    for round in 0..5 {
        let mut tasks = Vec::new();
        for n in 0..16 {
            let backend = Arc::clone(&backend);
            let write = put(state(&format!("r{round}"))?, &json!({"n": n}), Precondition::Absent)?;
            tasks.push(tokio::spawn(async move { (n, backend.commit(vec![write]).await) }));
        }
        let mut winners = Vec::new();
        for task in tasks {
            match task.await.map_err(|error| error.to_string())? {
                (n, Ok(_)) => winners.push(n),
                (_, Err(BackendError::Conflict)) => {}
                (n, Err(error)) => return Err(format!("writer {n}: {error}")),
            }
        }
        let found = value_at(&backend, state(&format!("r{round}"))?).await?;
        ensure!(
            winners.len() == 1 && found == winners.first().map(|n| json!({"n": n})),
            "winners {winners:?}, stored {found:?}"
        );
    }
    Ok(())
}

async fn racing_writers_lose_nothing(backend: Arc<dyn Backend>) -> Outcome {
    const WRITERS: u64 = 8;
    const STEPS: u64 = 10;
    put_any(&backend, state("counter")?, 0).await?;
    let mut tasks = Vec::new();
    for _ in 0..WRITERS {
        let backend = Arc::clone(&backend);
        tasks.push(tokio::spawn(async move {
            let mut done = 0;
            while done < STEPS {
                let found = read(backend.as_ref(), state("counter")?).await?.ok_or("it is gone")?;
                let n: Value = found.body.parse().map_err(|error| format!("{error}"))?;
                let n = n.get("n").and_then(Value::as_u64).ok_or("no number")?;
                let guard = Precondition::Revision(found.revision);
                let write = put(state("counter")?, &json!({"n": n + 1}), guard)?;
                match backend.commit(vec![write]).await {
                    Ok(_) => done += 1,
                    Err(BackendError::Conflict) => {
                        tokio::time::sleep(crate::clock::jitter(std::time::Duration::from_millis(
                            5,
                        )))
                        .await;
                    }
                    Err(error) => return Err(error.to_string()),
                }
            }
            Ok::<(), String>(())
        }));
    }
    for task in tasks {
        task.await.map_err(|error| error.to_string())??;
    }
    let found = value_at(&backend, state("counter")?).await?;
    ensure!(found == Some(json!({"n": WRITERS * STEPS})), "{found:?}");
    Ok(())
}

async fn identity_does_not_change(backend: Arc<dyn Backend>) -> Outcome {
    let before = backend.identity();
    put_any(&backend, state("a")?, 1).await?;
    ensure!(backend.identity() == before, "it changed");
    ensure!(!before.store.is_empty() && !before.node.is_empty(), "it is empty");
    ensure!(before.incarnation > 0, "the incarnation is 0");
    let now = backend.now().await.map_err(|error| error.to_string())?;
    ensure!(backend.now().await.map_err(|error| error.to_string())? >= now, "time went back");
    Ok(())
}
