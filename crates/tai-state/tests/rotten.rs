//! Rows of a file that are damaged below the engine: their check does not hold. What can be made anew from the
//! log is; what is only to be removed is removed; and nothing that is damaged is taken for absent.

#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]

mod common;

use std::path::{Path, PathBuf};
use std::time::Duration;

use common::{proved, snapshot, why};
use serde_json::{Value, json};
use tai_state::{
    CleanupOptions, Error, HeadCondition, PersistenceConfig, StateMachinePersister, StateStore,
    StoreOptions, TransactionManager,
};

const NEWEST: u64 = 47;

/// What damage may make of a row: a bit, a text that is none, nothing at all, another number.
const DAMAGES: [&str; 6] = [
    "body = replace(body, '\"version\":', '\"version\": ')",
    "body = CAST(x'7bff' AS TEXT)",
    "body = ''",
    "revision = revision + 1",
    "revision = -1",
    "crc = crc << 31",
];

fn config() -> PersistenceConfig {
    PersistenceConfig { snapshot_interval: 10, snapshot_retention: 3, ..Default::default() }
}

async fn open(path: &Path) -> (StateStore, StateMachinePersister) {
    let mut options = StoreOptions::default();
    options.persistence = config();
    let store = StateStore::open_with(path, options).await.unwrap();
    (store.clone(), StateMachinePersister::new(store, config()))
}

/// `s` and `t` with 47 versions each and snapshots at 20, 30 and 40, closed; then its rows are changed.
async fn rotten(folder: &Path, changes: &[&str]) -> PathBuf {
    let path = folder.join("store.tai");
    let (store, persister) = open(&path).await;
    for id in ["s", "t"] {
        for n in 1..=NEWEST {
            store
                .save_state("g", id, snapshot(id, json!(format!("{id}{n}"))), why())
                .await
                .unwrap();
        }
    }
    drop((store, persister));
    change(&path, changes);
    path
}

fn change(path: &Path, changes: &[&str]) {
    let file = rusqlite::Connection::open(path).unwrap();
    file.busy_timeout(Duration::from_secs(10)).unwrap();
    for change in changes {
        assert_eq!(file.execute(change, ()).unwrap(), 1, "{change}");
    }
}

const HEAD: &str = "WHERE name = 's'";
const OF_S: &str = "WHERE state = (SELECT id FROM state WHERE name = 's') AND version =";

async fn is_whole(store: &StateStore, said: &str) {
    proved(store).await;
    for id in ["s", "t"] {
        let (state, version) = store.get_state("g", id).await.unwrap();
        assert_eq!((state.data, version), (json!(format!("{id}{NEWEST}")), NEWEST), "{said}");
        for n in [1, 20, NEWEST] {
            let then = store.state_at_version("g", id, n).await.unwrap();
            assert_eq!(then.data, json!(format!("{id}{n}")), "{said}");
        }
    }
    let exported = store.export(None, &mut Vec::new(), |_| {}).await.unwrap();
    assert_eq!(exported.transitions, 2 * NEWEST, "{said}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_head_is_made_anew() {
    for damage in DAMAGES.iter().chain(&["body = NULL"]) {
        let folder = tempfile::tempdir().unwrap();
        let path = rotten(folder.path(), &[&format!("UPDATE state SET {damage} {HEAD}")]).await;
        let (store, persister) = open(&path).await;
        let error = store.get_state("g", "s").await.unwrap_err();
        assert_eq!(error.code(), "corrupt", "{damage}");
        assert_eq!(store.exists("g", "s").await.unwrap_err().code(), "corrupt", "{damage}");
        assert!(!store.verify(|_| {}).await.unwrap().ok, "{damage}");
        let (_, report) = persister.recover("g", "s").await.unwrap();
        assert!(matches!(report.head, HeadCondition::Damaged(_)), "{damage}: {report:?}");
        assert!(report.repaired && report.version == NEWEST, "{damage}: {report:?}");
        is_whole(&store, damage).await;
        drop((store, persister));
        is_whole(&open(&path).await.0, damage).await;
    }
}

/// Also those that a replay does not need, since there is a newer one.
#[tokio::test(flavor = "multi_thread")]
async fn every_saved_snapshot_is_made_anew_when_that_is_asked_for() {
    let lost = format!("DELETE FROM snapshot {OF_S} 20");
    let damaged = format!("UPDATE snapshot SET {} {OF_S} 30", DAMAGES[1]);
    let folder = tempfile::tempdir().unwrap();
    let path = rotten(folder.path(), &[&lost, &damaged]).await;
    let (store, persister) = open(&path).await;
    assert!(!store.verify(|_| {}).await.unwrap().ok);
    let (_, report) = persister.recover("g", "s").await.unwrap();
    let passed: Vec<u64> = report.passed_over.iter().map(|passed| passed.version).collect();
    assert_eq!((passed, report.repaired), (vec![30, 20], true), "{report:?}");
    is_whole(&store, "two of three").await;
    let saved = persister.saved_snapshots("g", "s").await.unwrap();
    assert!(saved.iter().all(|saved| saved.problem.is_none()) && saved.len() == 3, "{saved:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_saved_snapshot_is_made_anew_also_with_its_head() {
    for damage in DAMAGES {
        for head in [None, Some(DAMAGES[0])] {
            let said = format!("{damage}, {head:?}");
            let folder = tempfile::tempdir().unwrap();
            let saved = format!("UPDATE snapshot SET {damage} {OF_S} 40");
            let head = head.map(|damage| format!("UPDATE state SET {damage} {HEAD}"));
            let changes: Vec<&str> =
                [Some(&saved), head.as_ref()].into_iter().flatten().map(String::as_str).collect();
            let path = rotten(folder.path(), &changes).await;
            let (store, persister) = open(&path).await;
            let (loaded, _) = persister.load_state("g", "s").await.unwrap();
            assert_eq!(loaded.data, json!(format!("s{NEWEST}")), "{said}");
            let (_, report) = persister.recover("g", "s").await.unwrap();
            assert_eq!(report.version, NEWEST, "{said}");
            is_whole(&store, &said).await;
        }
    }
}

/// One that can be read, of another log: it is passed over, and dropped with a head that is made anew.
#[tokio::test(flavor = "multi_thread")]
async fn a_snapshot_of_another_log_is_dropped_with_a_head_that_is_missing() {
    use tai_state::backend::memory::MemoryBackend;
    use tai_state::backend::{Backend, Key, Kind, Name, Precondition, Read as _, Write};
    let name = |id| Name::escape(id, "id").unwrap();
    let key = |kind, version| Key { governor: name("g"), kind, name: name("s"), version };
    let backends = [MemoryBackend::new(), MemoryBackend::new()].map(std::sync::Arc::new);
    let mut persisters = Vec::new();
    for (n, backend) in backends.iter().enumerate() {
        let mut options = StoreOptions::default();
        options.persistence = config();
        let store =
            StateStore::with_backend(backend.clone() as std::sync::Arc<dyn Backend>, options);
        for m in 1..=NEWEST {
            store.save_state("g", "s", snapshot("s", json!([n, m])), why()).await.unwrap();
        }
        persisters.push((store.clone(), StateMachinePersister::new(store, config())));
    }
    let other = backends[1].get(&[key(Kind::Snapshots, 40)]).await.unwrap().remove(0).unwrap();
    let put = Write::put(key(Kind::Snapshots, 40), other.body, Precondition::Any);
    let gone = Write::delete(key(Kind::States, 0), Precondition::Any);
    backends[0].commit(vec![put, gone]).await.unwrap();
    let (store, persister) = &persisters[0];
    let (state, report) = persister.recover("g", "s").await.unwrap();
    assert_eq!((state.unwrap().data, report.repaired), (json!([0, NEWEST]), true));
    proved(store).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_purge_removes_what_cannot_be_read() {
    for (table, version) in [("event", 20), ("event", 1), ("snapshot", 30)] {
        for damage in DAMAGES {
            let said = format!("{table} {version}: {damage}");
            let folder = tempfile::tempdir().unwrap();
            let damaged = format!("UPDATE {table} SET {damage} {OF_S} {version}");
            let path = rotten(folder.path(), &[&damaged]).await;
            let (store, persister) = open(&path).await;
            let report = persister.purge("g", "s", why(), |_| {}).await.unwrap();
            assert_eq!((report.events, report.snapshots), (NEWEST, 3), "{said}");
            persister.verify_purge(&report).await.unwrap();
            proved(&store).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_clean_up_removes_what_cannot_be_read() {
    for (table, version) in [("event", 20), ("event", 1), ("snapshot", 30)] {
        let folder = tempfile::tempdir().unwrap();
        let damaged = format!("UPDATE {table} SET {} {OF_S} {version}", DAMAGES[0]);
        let path = rotten(folder.path(), &[&damaged]).await;
        let (store, persister) = open(&path).await;
        assert!(!store.verify(|_| {}).await.unwrap().ok, "{table} {version}");
        let options = CleanupOptions::older_than(Duration::ZERO).keep_versions(10);
        let report = persister.cleanup("g", &options, |_| {}).await.unwrap();
        assert_eq!((report.events, report.snapshots), (2 * (NEWEST - 10), 4), "{table} {version}");
        proved(&store).await;
    }
}

/// Its index leads to the row of another: that one is not touched.
#[tokio::test(flavor = "multi_thread")]
async fn the_row_of_another_is_not_overwritten() {
    let folder = tempfile::tempdir().unwrap();
    let path = rotten(folder.path(), &[]).await;
    // The rows change places in the table, and not in the index, which is taken away meanwhile.
    let file = rusqlite::Connection::open(&path).unwrap();
    let index = "name = 'sqlite_autoindex_state_1'";
    let unique = ("crc INTEGER NOT NULL, UNIQUE (governor, name)", "crc INTEGER NOT NULL /* */");
    let sql = format!(
        "PRAGMA writable_schema = ON;
         CREATE TABLE aside AS SELECT type, name, tbl_name, rootpage, sql FROM sqlite_schema WHERE {index};
         DELETE FROM sqlite_schema WHERE {index};
         UPDATE sqlite_schema SET sql = replace(sql, '{0}', '{1}') WHERE name = 'state';
         PRAGMA writable_schema = RESET;
         UPDATE state SET id = -id;
         UPDATE state SET id = 3 + id;
         PRAGMA writable_schema = ON;
         INSERT INTO sqlite_schema SELECT * FROM aside;
         UPDATE sqlite_schema SET sql = replace(sql, '{1}', '{0}') WHERE name = 'state';
         PRAGMA writable_schema = RESET;
         DROP TABLE aside;",
        unique.0, unique.1
    );
    file.execute_batch(&sql).unwrap();
    drop(file);
    let (store, persister) = open(&path).await;
    for id in ["s", "t"] {
        assert_eq!(store.get_state("g", id).await.unwrap_err().code(), "corrupt");
        assert_eq!(persister.recover("g", id).await.unwrap_err().code(), "corrupt");
        let purged = persister.purge("g", id, why(), |_| {}).await;
        assert_eq!(purged.unwrap_err().code(), "corrupt");
    }
    drop((store, persister));
    let file = rusqlite::Connection::open(&path).unwrap();
    let stands: (u64, u64) = file
        .query_row("SELECT (SELECT count(*) FROM event), (SELECT count(*) FROM state)", (), |row| {
            Ok((row.get::<_, i64>(0)? as u64, row.get::<_, i64>(1)? as u64))
        })
        .unwrap();
    assert_eq!(stands, (2 * NEWEST, 2));
}

/// Locks and kept answers are in no log: that they are damaged is told, and the others go on.
#[tokio::test(flavor = "multi_thread")]
async fn a_proof_reads_locks_and_answers_too() {
    for table in ["lock", "command"] {
        let folder = tempfile::tempdir().unwrap();
        let path = rotten(folder.path(), &[]).await;
        let (store, persister) = open(&path).await;
        let manager = TransactionManager::new(&store);
        let lock = manager.acquire_lock("r", "somebody", Duration::from_secs(60)).await.unwrap();
        lock.release().await.unwrap();
        for n in 0..2 {
            let keyed = store.idempotency_key(format!("k{n}")).unwrap();
            keyed.save_state("g", "s", snapshot("s", json!(n)), why()).await.unwrap();
        }
        proved(&store).await;
        drop((store, persister, manager));
        let one = format!("UPDATE {table} SET {} WHERE id = 1", "body = ''");
        change(&path, &[&one]);
        let (store, _) = open(&path).await;
        let report = store.verify(|_| {}).await.unwrap();
        assert!(!report.ok && report.problems.len() == 1, "{table}: {:?}", report.problems);
        assert!(report.problems[0].contains(table), "{table}: {:?}", report.problems);
        let manager = TransactionManager::new(&store);
        assert_eq!(manager.forget_expired_commands().await.unwrap(), 0);
        let refused: Result<Value, Error> = match table {
            "lock" => manager.lock_record("r").await.map(|_| Value::Null),
            _ => {
                let keyed = store.idempotency_key("k0").unwrap();
                let saved = keyed.save_state("g", "s", snapshot("s", json!(0)), why()).await;
                saved.map(Value::from)
            }
        };
        assert_eq!(refused.unwrap_err().code(), "corrupt", "{table}");
    }
}
