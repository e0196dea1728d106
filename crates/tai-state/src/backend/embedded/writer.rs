//! The one thread that writes: group commit.
//!
//! It drains what waits, judges and applies each request in one transaction, syncs once, and then
//! answers all. A request whose preconditions do not hold writes nothing and costs the others
//! nothing. If the sync fails, nobody is told "committed", and the handle writes no more: after
//! a failed sync the system may have dropped the very pages that a second sync would report as safe.

use std::collections::HashMap;
use std::sync::atomic::{AtomicI32, AtomicU64, Ordering};
use std::sync::{Arc, mpsc};

use rusqlite::config::DbConfig;
use rusqlite::{Connection, ErrorCode, params};
use tokio::sync::oneshot;

use super::place::{Place, REPLACED};
use super::rows::{self, RowError, Rows};
use super::tables::{Unsigned, document_crc, key_hash, statements};
use super::{file, port_error};
use crate::backend::bell::{self, Bell};
use crate::backend::{
    BackendError, Committed, Key, Kind, Name, Operation, Precondition, Revision, Write,
};

/// Requests in one group at most, and bytes of their bodies.
const GROUP_REQUESTS: usize = 1_024;
const GROUP_BYTES: usize = 16 << 20;
/// The log is folded into the file every so many pages.
const CHECKPOINT_PAGES: i32 = 1_000;

type Answer = Result<Committed, BackendError>;

/// A commit that waits.
pub(crate) struct Request {
    pub(crate) writes: Vec<Write>,
    pub(crate) answer: oneshot::Sender<Answer>,
}

/// What the writer's thread is asked.
pub(crate) enum Message {
    Commit(Request),
    /// Look whether others have committed, and ring if so.
    Look,
}

impl Request {
    fn bytes(&self) -> usize {
        let body = |write: &Write| match &write.operation {
            Operation::Put(body) => body.as_text().len(),
            _ => 0,
        };
        self.writes.iter().map(body).sum()
    }
}

/// What the writer's thread owns. The connection goes before the descriptor.
pub(crate) struct Writer {
    conn: Connection,
    requests: mpsc::Receiver<Message>,
    place: Arc<Place>,
    /// Pages in the log after the newest commit.
    log_pages: Arc<AtomicI32>,
    /// The same at the last checkpoint.
    folded_at: i32,
    commits: Arc<AtomicU64>,
    bell: Bell,
    /// Moves with the commits of others.
    data_version: Option<i64>,
    /// Whether a look was asked for.
    look: bool,
}

/// Why a whole group was not committed.
enum GroupError {
    /// Before the commit: surely nothing was written.
    Before(RowError),
    /// In the commit itself: it may be found in the log after a crash.
    Commit(rusqlite::Error),
}

impl<E: Into<RowError>> From<E> for GroupError {
    fn from(error: E) -> Self {
        Self::Before(error.into())
    }
}

/// After a failed sync the log must not be folded in and removed when the last connection closes.
pub(crate) fn keep_log(conn: &Connection, keep: bool) {
    let _ = conn.set_db_config(DbConfig::SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, keep);
}

fn data_version(conn: &Connection) -> rusqlite::Result<i64> {
    conn.prepare_cached("PRAGMA data_version")?.query_row([], |row| row.get(0))
}

impl Writer {
    pub(crate) fn new(
        mut conn: Connection,
        requests: mpsc::Receiver<Message>,
        place: Arc<Place>,
        commits: Arc<AtomicU64>,
        bell: Bell,
    ) -> Self {
        let log_pages = Arc::new(AtomicI32::new(0));
        let noted = Arc::clone(&log_pages);
        let hook = move |_: &mut rusqlite::hooks::Wal, pages: std::ffi::c_int| {
            noted.store(pages, Ordering::Relaxed);
            Ok(())
        };
        if let Err(error) = conn.wal_hook(Some(hook)) {
            tracing::error!(%error, "the log's size cannot be watched");
        }
        if let Err(error) = file::wait_for_others(&mut conn, Arc::clone(&place.closing)) {
            tracing::error!(%error, "closing may have to wait for other processes");
        }
        let data_version = data_version(&conn).ok();
        Self {
            conn,
            requests,
            place,
            log_pages,
            folded_at: 0,
            commits,
            bell,
            data_version,
            look: false,
        }
    }

    /// Runs until all senders are gone.
    pub(crate) fn run(mut self) {
        while let Ok(first) = self.requests.recv() {
            let group = self.gather(first);
            if !group.is_empty() {
                self.commit(group);
                self.checkpoint();
            }
            if std::mem::take(&mut self.look) {
                self.look_around();
            }
        }
        self.place.before_closing(&self.conn);
    }

    fn gather(&mut self, first: Message) -> Vec<Request> {
        let mut bytes = 0;
        let mut group = Vec::new();
        let mut next = Some(first);
        while let Some(message) = next {
            match message {
                Message::Commit(request) => {
                    bytes += request.bytes();
                    group.push(request);
                }
                Message::Look => self.look = true,
            }
            let is_full = group.len() >= GROUP_REQUESTS || bytes >= GROUP_BYTES;
            next = if is_full { None } else { self.requests.try_recv().ok() };
        }
        group
    }

    /// Rings when another connection has committed since the last look.
    fn look_around(&mut self) {
        let found = data_version(&self.conn);
        if let Err(error) = &found {
            tracing::warn!(%error, "it cannot be seen whether others have committed");
        }
        let found = found.ok();
        // What cannot be seen may have changed.
        if found.is_none() || found != self.data_version {
            self.bell.anything();
        }
        self.data_version = found;
    }

    fn commit(&mut self, mut group: Vec<Request>) {
        // Whose caller has gone away is not begun: another process may have kept it waiting for long.
        group.retain(|request| !request.answer.is_closed());
        if group.is_empty() {
            return;
        }
        // What is written to a file or a log without a name is lost when it is closed.
        self.look_at_the_names();
        if self.place.has_failed() {
            for request in group {
                let _ = request.answer.send(Err(poisoned()));
            }
            return;
        }
        let outcome = self.apply(&group);
        tracing::trace!(requests = group.len(), ok = outcome.is_ok(), "group commit");
        match outcome {
            // It may have gone to a log that nobody will find: nothing of it is acknowledged.
            Ok(_) if !self.look_at_the_names() => {
                for request in group {
                    let lost = BackendError::Indeterminate(REPLACED.to_owned());
                    let _ = request.answer.send(Err(lost));
                }
            }
            Ok(answers) => {
                if self.bell.has_listeners() {
                    let done = group.iter().zip(&answers).filter(|(_, answer)| answer.is_ok());
                    self.bell.changed(done.flat_map(|(r, _)| bell::changes(&r.writes)).collect());
                }
                for (request, answer) in group.into_iter().zip(answers) {
                    // The caller may have gone away; what it asked for is done all the same.
                    let _ = request.answer.send(answer);
                }
            }
            Err(error) => self.fail(group, &error),
        }
    }

    /// Whether the file and its log still have their names; if not, this handle writes no more.
    fn look_at_the_names(&self) -> bool {
        let is_ours = self.place.is_ours();
        if !is_ours && !self.place.has_failed() {
            self.place.poison(REPLACED);
            if self.place.can_be_saved() {
                let folded = self.conn.query_row("PRAGMA wal_checkpoint(PASSIVE)", [], |_| Ok(()));
                tracing::warn!(
                    ?folded,
                    "the log was removed; what was in it was folded into the file"
                );
            }
        }
        is_ours
    }

    /// One transaction for the whole group.
    fn apply(&mut self, group: &[Request]) -> Result<Vec<Answer>, GroupError> {
        self.conn.prepare_cached("BEGIN IMMEDIATE")?.execute([])?;
        let conn = &self.conn;
        let mut step = Group { conn, revision: file::revision(conn)?, states: HashMap::new() };
        let moved = file::moved_to(conn)?;
        let before = step.revision;
        let mut answers = Vec::with_capacity(group.len());
        for request in group {
            answers.push(match &moved {
                Some(to) => Err(BackendError::Moved(to.clone())),
                None => step.take(&request.writes)?,
            });
        }
        if step.revision == before {
            // Nothing was written: no sync is needed to say so.
            conn.prepare_cached("ROLLBACK")?.execute([])?;
            return Ok(answers);
        }
        file::set_revision(conn, step.revision)?;
        file::mark_commit(conn)?;
        conn.prepare_cached("COMMIT")?.execute([]).map_err(GroupError::Commit)?;
        self.commits.fetch_add(1, Ordering::Relaxed);
        Ok(answers)
    }

    fn fail(&mut self, group: Vec<Request>, error: &GroupError) {
        if !self.conn.is_autocommit() && self.conn.execute_batch("ROLLBACK").is_err() {
            self.place.poison("a rollback failed");
        }
        let answer = match error {
            GroupError::Before(RowError::Port(error)) => {
                tracing::error!(%error, location = %self.place.location, "nothing can be written");
                copy(error)
            }
            GroupError::Before(RowError::Sqlite(error)) => self.port_error(error),
            // A full disk or a busy file is met before the log is complete: nothing of it counts.
            GroupError::Commit(error) if is_harmless(error) => self.port_error(error),
            GroupError::Commit(error) => {
                self.place.poison(&format!("a commit failed: {error}"));
                BackendError::Indeterminate(error.to_string())
            }
        };
        for request in group {
            let _ = request.answer.send(Err(copy(&answer)));
        }
    }

    fn port_error(&self, error: &rusqlite::Error) -> BackendError {
        let error = RowError::Sqlite(copy_sqlite(error));
        self.place.note(&error);
        port_error(error, &self.place.location)
    }

    /// Folds the log into the file, as far as readers allow, once it has grown enough since the
    /// last time.
    fn checkpoint(&mut self) {
        let pages = self.log_pages.load(Ordering::Relaxed);
        if pages < self.folded_at {
            self.folded_at = 0;
        }
        if pages - self.folded_at < CHECKPOINT_PAGES || self.place.has_failed() {
            return;
        }
        let folded =
            self.conn.query_row("PRAGMA wal_checkpoint(PASSIVE)", [], |row| row.get::<_, i64>(0));
        self.folded_at = pages;
        match folded {
            Ok(_) => {}
            // Another process folds, or the disk is full: the log just grows until the next time.
            Err(error) if is_harmless(&error) => {
                tracing::warn!(%error, "the log could not be folded into the file");
            }
            Err(error) => self.place.poison(&format!("a checkpoint failed: {error}")),
        }
    }
}

/// Somebody else is at it, or there is no space: nothing is wrong with what is stored.
pub(crate) fn is_harmless(error: &rusqlite::Error) -> bool {
    matches!(
        error.sqlite_error_code(),
        Some(ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked | ErrorCode::DiskFull)
    )
}

fn poisoned() -> BackendError {
    BackendError::Failed(
        "a write or sync failed earlier, or the file or its log was removed or replaced".to_owned(),
    )
}

/// The same error for each of a group.
fn copy(error: &BackendError) -> BackendError {
    match error {
        BackendError::Full => BackendError::Full,
        BackendError::Denied(reason) => BackendError::Denied(reason.clone()),
        BackendError::Unavailable(reason) => BackendError::Unavailable(reason.clone()),
        BackendError::Indeterminate(reason) => BackendError::Indeterminate(reason.clone()),
        BackendError::Corrupt { location, reason } => {
            BackendError::Corrupt { location: location.clone(), reason: reason.clone() }
        }
        BackendError::Failed(reason) => BackendError::Failed(reason.clone()),
        other => BackendError::Failed(other.to_string()),
    }
}

fn copy_sqlite(error: &rusqlite::Error) -> rusqlite::Error {
    match error {
        rusqlite::Error::SqliteFailure(code, message) => {
            rusqlite::Error::SqliteFailure(*code, message.clone())
        }
        other => rusqlite::Error::SqliteFailure(
            rusqlite::ffi::Error::new(rusqlite::ffi::SQLITE_CORRUPT),
            Some(other.to_string()),
        ),
    }
}

/// The transaction of one group.
struct Group<'a> {
    conn: &'a Connection,
    /// The newest revision given out; every request that writes gets one of its own.
    revision: u64,
    /// Rows of states found or made in this group.
    states: HashMap<(Name, Name), i64>,
}

impl Group<'_> {
    /// One request, whole or not at all. What is wrong with it, damage to what it touches included,
    /// is its own answer and does not concern the others of the group.
    fn take(&mut self, writes: &[Write]) -> Rows<Answer> {
        match self.judge(writes) {
            Ok(()) => {}
            Err(RowError::Port(refused)) => return Ok(Err(refused)),
            Err(error) => return Err(error),
        }
        let before = self.revision;
        self.conn.prepare_cached("SAVEPOINT request")?.execute([])?;
        let outcome = self.write(writes);
        if let Err(RowError::Port(refused)) = outcome {
            self.conn.prepare_cached("ROLLBACK TO request")?.execute([])?;
            self.conn.prepare_cached("RELEASE request")?.execute([])?;
            self.revision = before;
            // Rows that it made are gone.
            self.states.clear();
            return Ok(Err(refused));
        }
        // Where SQLite has ended the whole transaction, the savepoint is gone too: the first error counts.
        let committed = outcome?;
        self.conn.prepare_cached("RELEASE request")?.execute([])?;
        Ok(Ok(committed))
    }

    /// Checks every precondition of a request before any of it is written.
    fn judge(&mut self, writes: &[Write]) -> Rows<()> {
        for write in writes {
            let found = match write.precondition {
                Precondition::Any => continue,
                _ => self.revision_of(&write.key)?,
            };
            let holds = match write.precondition {
                Precondition::Any => true,
                Precondition::Absent => found.is_none(),
                Precondition::Present => found.is_some(),
                Precondition::Revision(wanted) => found == Some(wanted),
            };
            if !holds {
                return Err(BackendError::Conflict.into());
            }
        }
        Ok(())
    }

    fn row(&mut self, key: &Key) -> Rows<Option<rows::Row>> {
        if key.kind.is_versioned() {
            return match self.state(key)? {
                Some(state) => rows::versioned_row(self.conn, state, key),
                None => Ok(None),
            };
        }
        rows::named_row(self.conn, key)
    }

    fn revision_of(&mut self, key: &Key) -> Rows<Option<Revision>> {
        let document = self.row(key)?.and_then(|row| row.document);
        Ok(document.map(|document| document.revision))
    }

    fn state(&mut self, key: &Key) -> Rows<Option<i64>> {
        let names = (key.governor.clone(), key.name.clone());
        if let Some(state) = self.states.get(&names) {
            return Ok(Some(*state));
        }
        let found = rows::state_of(self.conn, key)?;
        if let Some(state) = found {
            self.states.insert(names, state);
        }
        Ok(found)
    }

    fn write(&mut self, writes: &[Write]) -> Rows<Committed> {
        let changes = writes.iter().any(|write| write.operation != Operation::Check);
        self.revision += u64::from(changes);
        let revision = Revision::new(self.revision);
        let mut revisions = Vec::with_capacity(writes.len());
        for write in writes {
            revisions.push(match &write.operation {
                Operation::Put(body) => {
                    self.put(&write.key, revision, body.as_text())?;
                    Some(revision)
                }
                Operation::Delete => {
                    self.delete(&write.key, revision)?;
                    None
                }
                Operation::Check => self.revision_of(&write.key)?,
            });
        }
        Ok(Committed { revisions })
    }

    fn put(&mut self, key: &Key, revision: Revision, body: &str) -> Rows<()> {
        let sql = statements(key.kind);
        let crc = document_crc(key, revision, Some(body));
        if let Some(row) = self.row(key)? {
            self.conn.prepare_cached(sql.update)?.execute(params![
                row.id,
                Unsigned(revision.token()),
                body,
                crc
            ])?;
            return Ok(());
        }
        if key.kind.is_versioned() {
            let state = self.state_or_new(key)?;
            let columns =
                params![state, Unsigned(key.version), Unsigned(revision.token()), body, crc];
            self.conn.prepare_cached(sql.insert)?.execute(columns)?;
            return Ok(());
        }
        self.insert_named(key, revision, Some(body))?;
        Ok(())
    }

    fn delete(&mut self, key: &Key, revision: Revision) -> Rows<()> {
        let Some(rows::Row { id, .. }) = self.row(key)? else { return Ok(()) };
        let sql = statements(key.kind);
        if key.kind == Kind::States {
            // Events refer to the row.
            let crc = document_crc(key, revision, None);
            let columns = params![id, Unsigned(revision.token()), None::<&str>, crc];
            self.conn.prepare_cached(sql.update)?.execute(columns)?;
        } else {
            self.conn.prepare_cached(sql.delete)?.execute([id])?;
        }
        Ok(())
    }

    /// The row of the state that an event or saved snapshot belongs to. The event is written before
    /// the head, so for a new state it is made here, and filled when the head follows.
    fn state_or_new(&mut self, key: &Key) -> Rows<i64> {
        if let Some(state) = self.state(key)? {
            return Ok(state);
        }
        let state = Key { kind: Kind::States, version: 0, ..key.clone() };
        let id = self.insert_named(&state, Revision::new(self.revision), None)?;
        self.states.insert((key.governor.clone(), key.name.clone()), id);
        Ok(id)
    }

    fn insert_named(&mut self, key: &Key, revision: Revision, body: Option<&str>) -> Rows<i64> {
        let (governor, states) = match rows::governor(self.conn, &key.governor)? {
            Some(governor) => (governor.id, governor.states),
            None => (self.new_governor(&key.governor)?, 0),
        };
        self.conn.prepare_cached(statements(key.kind).insert)?.execute(params![
            governor,
            key.name.as_str(),
            key_hash(&key.governor, &key.name),
            Unsigned(revision.token()),
            body,
            document_crc(key, revision, body),
        ])?;
        let id = self.conn.last_insert_rowid();
        if key.kind == Kind::States {
            let states = states + 1;
            self.conn
                .prepare_cached("UPDATE governor SET states = ?2, crc = ?3 WHERE id = ?1")?
                .execute(params![
                    governor,
                    Unsigned(states),
                    rows::governor_crc(governor, &key.governor, states)
                ])?;
        }
        Ok(id)
    }

    fn new_governor(&mut self, name: &Name) -> Rows<i64> {
        let id = file::governors(self.conn)? + 1;
        file::set_governors(self.conn, id)?;
        let id = i64::try_from(id).unwrap_or(i64::MAX);
        self.conn
            .prepare_cached("INSERT INTO governor (id, name, states, crc) VALUES (?1, ?2, 0, ?3)")?
            .execute(params![id, name.as_str(), rows::governor_crc(id, name, 0)])?;
        Ok(id)
    }
}
