//! What only the inside of the embedded backend can show.

use std::sync::Arc;

use serde_json::json;

use super::*;
use crate::backend::{Body, Precondition, Rung, Write};
use crate::{ChangeMetadata, Error, StateSnapshot, StateStore, StoreOptions};

pub(super) fn put(name: &str) -> Write {
    let key = Key {
        governor: Name::escape("g", "id").unwrap(),
        kind: Kind::States,
        name: Name::escape(name, "id").unwrap(),
        version: 0,
    };
    Write::put(key, Body::new(&json!({"n": 1})).unwrap(), Precondition::Any)
}

pub(super) async fn open(path: &Path) -> crate::Result<EmbeddedBackend> {
    EmbeddedBackend::open(path, true, false).await
}

fn raw(path: &Path) -> Connection {
    Connection::open(path).unwrap()
}

#[tokio::test]
async fn a_newer_format_is_refused_and_left_alone() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.tai");
    drop(open(&path).await.unwrap());
    let conn = raw(&path);
    file::set_format(&conn, 2);
    conn.close().unwrap();
    let before = std::fs::read(&path).unwrap();
    let refused = open(&path).await.unwrap_err();
    assert!(matches!(refused, Error::NewerFormat { found: 2, supported: 1, .. }), "{refused}");
    assert_eq!(std::fs::read(&path).unwrap(), before);
}

#[tokio::test]
async fn a_moved_store_refuses_writes_and_says_where_it_is() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.tai");
    let backend = open(&path).await.unwrap();
    backend.commit(vec![put("a")]).await.unwrap();
    file::set_moved_to(&raw(&path), "firestore://new-home");
    let refused = backend.commit(vec![put("b")]).await.unwrap_err();
    assert!(
        matches!(&refused, BackendError::Moved(to) if to == "firestore://new-home"),
        "{refused}"
    );
    let store = StateStore::with_backend(Arc::new(backend), StoreOptions::default());
    let why = ChangeMetadata::new("test", "", None);
    let state = StateSnapshot::new("s".into(), json!(1), why.clone());
    let refused = store.save_state("g", "s", state, why).await.unwrap_err();
    assert_eq!(refused.code(), "moved");
}

#[tokio::test]
async fn commits_are_synced_and_settings_in_force() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.tai");
    let backend = open(&path).await.unwrap();
    let conn = file::connect(&path).unwrap();
    let setting =
        |name: &str| conn.pragma_query_value(None, name, |row| row.get::<_, i64>(0)).unwrap();
    assert_eq!(
        (setting("synchronous"), setting("auto_vacuum"), setting("wal_autocheckpoint")),
        (2, 2, 0)
    );
    let mode: String = conn.pragma_query_value(None, "journal_mode", |row| row.get(0)).unwrap();
    assert_eq!(mode, "wal");
    drop(backend);
}

#[tokio::test]
async fn a_vacuum_from_outside_is_no_damage() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.tai");
    let backend = open(&path).await.unwrap();
    for n in 0..50 {
        backend.commit(vec![put(&format!("s{n}"))]).await.unwrap();
    }
    drop(backend);
    raw(&path).execute_batch("DROP INDEX command_by_hash; CREATE INDEX command_by_hash ON command (key_hash); VACUUM").unwrap();
    let backend = open(&path).await.unwrap();
    assert_eq!(backend.count(None, Kind::States).await.unwrap(), 50);
}

#[tokio::test]
async fn other_tables_are_noticed() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.tai");
    drop(open(&path).await.unwrap());
    raw(&path).execute_batch("DROP INDEX state_by_hash").unwrap();
    assert_eq!(open(&path).await.unwrap_err().code(), "corrupt");
}

/// What was edited by hand has the old check.
#[tokio::test]
async fn an_edited_row_is_noticed() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.tai");
    let backend = open(&path).await.unwrap();
    backend.commit(vec![put("a"), put("b")]).await.unwrap();
    for edit in [
        "UPDATE state SET body = '{\"n\":2}' WHERE name = 'a'",
        "UPDATE state SET revision = revision + 1 WHERE name = 'a'",
        "UPDATE state SET name = 'c' WHERE name = 'a'",
        "UPDATE state SET key_hash = 1 WHERE name = 'a'; UPDATE state SET name = 'd' WHERE name = 'a'",
    ] {
        raw(&path).execute_batch("SAVEPOINT s").unwrap();
        let copy = folder.path().join("copy.tai");
        raw(&path).execute_batch(&format!("VACUUM INTO '{}'", copy.display())).unwrap();
        raw(&copy).pragma_update(None, "journal_mode", "WAL").unwrap();
        raw(&copy).execute_batch(edit).unwrap();
        let damaged = open(&copy).await.unwrap();
        let mut noticed = false;
        for name in ["a", "c", "d"] {
            let found = damaged.get(&[put(name).key]).await;
            match found {
                Err(BackendError::Corrupt { .. }) => noticed = true,
                // What is left of it can be replaced, and not be read.
                Ok(found) => {
                    for body in found.into_iter().flatten().map(|document| document.body) {
                        let read = body.parse::<serde_json::Value>();
                        noticed |= read.is_err();
                        assert!(read.is_err() || body.as_text() == "{\"n\":1}", "{edit}");
                    }
                }
                Err(error) => panic!("{edit}: {error}"),
            }
        }
        assert!(noticed, "{edit}");
        drop(damaged);
        std::fs::remove_file(&copy).unwrap();
    }
}

/// Dropping the handle answers what waits and leaves one whole file.
#[tokio::test]
async fn after_the_drop_there_is_one_file() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.tai");
    let backend = Arc::new(open(&path).await.unwrap());
    for n in 0..20 {
        let backend = Arc::clone(&backend);
        let write = put(&format!("s{n}"));
        // The future is dropped at once; the commit happens whole or not at all.
        let _ = tokio::time::timeout(std::time::Duration::ZERO, async move {
            backend.commit(vec![write]).await
        })
        .await;
    }
    let reads = backend.get(&[put("s0").key]).await.unwrap();
    assert_eq!(reads.len(), 1);
    drop(backend);
    let names: Vec<_> =
        std::fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(names, ["a.tai"]);
}

/// A saved snapshot that is damaged stops neither its state nor anybody else, and verify names it.
#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_saved_snapshot_stops_nobody() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.tai");
    let mut options = StoreOptions::default();
    options.persistence.snapshot_interval = 2;
    options.persistence.snapshot_retention = 2;
    let store = StateStore::open_with(&path, options).await.unwrap();
    let why = || ChangeMetadata::new("test", "", None);
    let state = |n: u64| StateSnapshot::new("s".into(), json!(n), why());
    for n in 1..=5 {
        store.save_state("g", "s", state(n), why()).await.unwrap();
    }
    raw(&path).execute_batch("UPDATE snapshot SET body = replace(body, '2', '3')").unwrap();
    let report = store.verify(|_| {}).await.unwrap();
    assert!(!report.ok && report.problems.iter().any(|p| p.contains("snapshots")), "{report:?}");
    let persister = crate::StateMachinePersister::with_defaults(store.clone());
    assert_eq!(persister.load_state("g", "s").await.unwrap().0.data, json!(5));
    let mut tasks = tokio::task::JoinSet::new();
    for task in 0..20 {
        let store = store.clone();
        let state = state(task);
        tasks.spawn(async move { store.save_state("g", format!("t{task}"), state, why()).await });
    }
    for n in 6..=9 {
        assert_eq!(store.save_state("g", "s", state(n), why()).await.unwrap(), n);
    }
    assert!(tasks.join_all().await.iter().all(Result::is_ok));
    // The damaged ones have been replaced by now.
    assert!(store.verify(|_| {}).await.unwrap().ok);
}

/// A request that meets damage fails alone.
#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_row_fails_only_those_who_touch_it() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.tai");
    let backend = Arc::new(open(&path).await.unwrap());
    backend.commit(vec![put("bad"), put("good")]).await.unwrap();
    // Its hash leads to a row that says that it is another.
    raw(&path).execute_batch("UPDATE state SET name = 'worse' WHERE name = 'bad'").unwrap();
    let mut tasks = tokio::task::JoinSet::new();
    for n in 0..40 {
        let backend = Arc::clone(&backend);
        tasks.spawn(async move {
            // Half of them write something else first, which must not stay.
            let writes = if n % 2 == 0 {
                vec![put(&format!("new{n}"))]
            } else {
                vec![put(&format!("half{n}")), put("bad")]
            };
            (n, backend.commit(writes).await)
        });
    }
    for (n, outcome) in tasks.join_all().await {
        assert_eq!(outcome.is_ok(), n % 2 == 0, "{n}: {outcome:?}");
    }
    let names: Vec<Name> =
        backend.names(&Name::escape("g", "id").unwrap(), Kind::States, None, 100).await.unwrap();
    assert_eq!(names.len(), 2 + 20);
    assert!(names.iter().all(|name| !name.as_str().starts_with("half")));
}

/// This handle's own commits are told by name; only those of others ring for anything.
#[tokio::test(flavor = "multi_thread")]
async fn own_commits_are_told_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.tai");
    let backend = open(&path).await.unwrap();
    let other = open(&path).await.unwrap();
    let key = put("a").key;
    let mut alarm = backend.watch(&key.governor, key.kind, None).await.unwrap();
    let moment = watch::PERIOD * 3;
    for n in 0..6 {
        backend.commit(vec![put(&format!("s{}", n % 2))]).await.unwrap();
        let rung = alarm.ring().await.unwrap();
        assert!(matches!(&rung, Rung::Names(names) if names.len() == 1), "{rung:?}");
        // The file is looked at meanwhile.
        assert!(tokio::time::timeout(moment, alarm.ring()).await.is_err(), "at {n}");
    }
    for _ in 0..3 {
        other.commit(vec![put("b")]).await.unwrap();
        let rung = tokio::time::timeout(Duration::from_secs(20), alarm.ring()).await.unwrap();
        assert_eq!(rung.unwrap(), Rung::Anything);
        assert!(tokio::time::timeout(moment, alarm.ring()).await.is_err());
    }
}

/// An alarm does not keep the file open, and says that it has been closed.
#[tokio::test(flavor = "multi_thread")]
async fn an_alarm_that_is_left_over_ends() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.tai");
    let backend = open(&path).await.unwrap();
    let key = put("a").key;
    let mut alarm = backend.watch(&key.governor, key.kind, Some(&key.name)).await.unwrap();
    assert!(tokio::time::timeout(watch::PERIOD * 2, alarm.ring()).await.is_err());
    let waiting = tokio::spawn(async move { alarm.ring().await });
    tokio::task::spawn_blocking(move || drop(backend)).await.unwrap();
    let ended = waiting.await.unwrap();
    assert!(matches!(ended, Err(BackendError::Failed(_))), "{ended:?}");
}

/// Another process holds the write lock while this handle is dropped: it does not wait for it.
#[tokio::test(flavor = "multi_thread")]
async fn closing_waits_for_nobody() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.tai");
    let backend = open(&path).await.unwrap();
    let other = raw(&path);
    other.execute_batch("BEGIN IMMEDIATE").unwrap();
    let moment = Duration::from_millis(100);
    for name in ["a", "b"] {
        assert!(tokio::time::timeout(moment, backend.commit(vec![put(name)])).await.is_err());
    }
    let closed = tokio::task::spawn_blocking(move || drop(backend));
    tokio::time::timeout(Duration::from_secs(10), closed).await.expect("it waits").unwrap();
    other.execute_batch("COMMIT").unwrap();
    drop(other);
    let backend = open(&path).await.unwrap();
    assert_eq!(backend.count(None, Kind::States).await.unwrap(), 0);
}

/// A request whose caller has gone away while it stood behind another is not begun.
#[tokio::test(flavor = "multi_thread")]
async fn what_nobody_waits_for_is_not_begun() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.tai");
    let backend = open(&path).await.unwrap();
    let other = raw(&path);
    other.execute_batch("BEGIN IMMEDIATE").unwrap();
    let (first, last) = (backend.commit(vec![put("first")]), backend.commit(vec![put("last")]));
    let meanwhile = async {
        tokio::time::sleep(Duration::from_millis(100)).await;
        let gone = backend.commit(vec![put("gone")]);
        assert!(tokio::time::timeout(Duration::from_millis(100), gone).await.is_err());
        other.execute_batch("COMMIT").unwrap();
        last.await.unwrap();
    };
    let (first, ()) = tokio::join!(first, meanwhile);
    first.unwrap();
    let names = backend.names(&put("a").key.governor, Kind::States, None, 100).await.unwrap();
    assert_eq!(names, [put("first").key.name, put("last").key.name]);
}

/// It is not asked for again and again, and takes no more commits: they would stand behind a hole.
#[tokio::test(flavor = "multi_thread")]
async fn a_log_that_is_cut_off_ends_the_handle() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.tai");
    let backend = open(&path).await.unwrap();
    backend.commit(vec![put("a")]).await.unwrap();
    let log = std::fs::File::options().write(true).open(file::sidecar(&path, "-wal")).unwrap();
    log.set_len(0).unwrap();
    let told = backend.get(&[put("a").key]).await.unwrap_err();
    assert!(matches!(told, BackendError::Failed(_)), "{told}");
    let told = backend.commit(vec![put("b")]).await.unwrap_err();
    assert!(matches!(told, BackendError::Failed(_)), "{told}");
}
