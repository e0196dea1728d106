//! One file on this machine, on SQLite: write-ahead log, full sync, group commit.
//!
//! | file | job |
//! |---|---|
//! | `file.rs` | create, recognise and open the file |
//! | `refusal.rs` | what a file that cannot be opened is refused as |
//! | `tables.rs` | its tables, and the check that every row carries |
//! | `held.rs` | the one descriptor of the file in this process |
//! | `log.rs` | read a write-ahead log, tell damage from a torn end |
//! | `lineage.rs` | tell whether a log belongs to its file |
//! | `place.rs` | where it is, and whether a handle may go on |
//! | `rows.rs` | read documents and prove them |
//! | `find.rs` | answer queries |
//! | `writer.rs` | the one thread that writes |
//! | `watch.rs` | hear of commits, this process's and others' |
//!
//! Several handles and several processes may use one file at the same time: SQLite's locks order
//! their groups, and every group judges its preconditions inside its own transaction.

mod file;
mod find;
mod held;
mod lineage;
mod log;
mod place;
mod refusal;
mod rows;
mod tables;
#[cfg(test)]
mod tests;
mod watch;
mod writer;

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::thread::JoinHandle;
use std::time::Duration;

use async_trait::async_trait;
use rusqlite::{Connection, ErrorCode};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};

use self::place::{CUT, Place, REPLACED};
use self::rows::{RowError, Rows};
use super::bell::Bell;
use super::{
    Alarm, Backend, BackendError, Committed, Document, Found, Identity, Key, Kind, Limits, Moment,
    Name, Page, Query, Read, Scan, Write, refuse_doubles,
};
use crate::clock::MachineClock;
use crate::error::Result;

/// Readings at the same time, and connections that are kept for them; more wait.
const READERS: usize = 8;
/// Views at the same time; more wait, and are refused after a while.
const VIEWS: usize = 64;
const VIEW_WAIT: Duration = Duration::from_secs(30);

/// The embedded store in one file.
#[derive(Debug)]
pub struct EmbeddedBackend {
    identity: Identity,
    pool: Arc<Pool>,
    commits: Arc<AtomicU64>,
    /// `None` only while it is being dropped.
    requests: Option<Arc<mpsc::Sender<writer::Message>>>,
    writer: Option<JoinHandle<()>>,
    bell: Bell,
    looks: watch::Looks,
    clock: MachineClock,
}

/// Connections for reading.
struct Pool {
    idle: Mutex<Vec<Connection>>,
    permits: Semaphore,
    views: Arc<Semaphore>,
    /// Last, so that the file is closed after the connections.
    place: Arc<Place>,
}

impl fmt::Debug for Pool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pool").field("path", &self.place.path).finish_non_exhaustive()
    }
}

impl EmbeddedBackend {
    /// Opens the file, and makes it when there is none and `create` is set. `allow_ephemeral_disk`
    /// accepts a disk that is known to be memory.
    ///
    /// # Errors
    /// As [`StateStore::open`](crate::StateStore::open).
    pub async fn open(path: &Path, create: bool, allow_ephemeral_disk: bool) -> Result<Self> {
        let path = path.to_path_buf();
        let location = path.display().to_string();
        let opened = tokio::task::spawn_blocking(move || {
            Self::open_blocking(path, create, allow_ephemeral_disk)
        });
        match opened.await {
            Ok(opened) => opened,
            Err(error) => Err(crate::reader::lift(cancelled(&error), &location)),
        }
    }

    fn open_blocking(path: PathBuf, create: bool, allow_ephemeral_disk: bool) -> Result<Self> {
        let location = path.display().to_string();
        let file::Opened { conn, identity, path, held } =
            file::open(&path, create, allow_ephemeral_disk)?;
        // While the connection is open, which keeps the log where it is.
        let place = Arc::new(Place::new(path, location.clone(), held));
        tracing::info!(
            location,
            store = identity.store,
            "opened an embedded store, sync on every commit"
        );
        let (requests, waiting) = mpsc::channel();
        let commits = Arc::new(AtomicU64::new(0));
        let bell = Bell::new();
        let writer = writer::Writer::new(
            conn,
            waiting,
            Arc::clone(&place),
            Arc::clone(&commits),
            bell.clone(),
        );
        let writer = std::thread::Builder::new()
            .name("tai-state-writer".into())
            .spawn(move || writer.run())
            .map_err(|error| crate::Error::Storage {
                location,
                reason: format!("no thread could be started: {error}"),
            })?;
        let pool = Pool {
            idle: Mutex::default(),
            permits: Semaphore::new(READERS),
            views: Arc::new(Semaphore::new(VIEWS)),
            place,
        };
        let (requests, writer) = (Some(Arc::new(requests)), Some(writer));
        let (pool, looks) = (Arc::new(pool), watch::Looks::new());
        let clock = MachineClock::new();
        Ok(Self { identity, pool, commits, requests, writer, bell, looks, clock })
    }

    /// How many groups this handle has committed, each with one sync: beside the number of changes,
    /// the measure of group commit.
    #[must_use]
    pub fn group_commits(&self) -> u64 {
        self.commits.load(Ordering::Relaxed)
    }
}

impl Drop for EmbeddedBackend {
    /// Waits for the writer, so that after the drop the file is closed and whole in itself.
    fn drop(&mut self) {
        // The writer's connection closes last: it is the one that may fold the log into the file.
        self.pool.close();
        // Nobody can wait for an answer any more: what has not begun never will.
        self.pool.place.closing.store(true, Ordering::Release);
        drop(self.requests.take());
        if let Some(writer) = self.writer.take() {
            let _ = writer.join();
        }
    }
}

impl Pool {
    fn take(&self) -> Rows<Connection> {
        // What is read there may be lost already, and must not settle what became of a commit.
        if self.place.is_replaced() {
            return Err(BackendError::Failed(REPLACED.into()).into());
        }
        let idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner).pop();
        match idle {
            Some(conn) => Ok(conn),
            None => {
                // Before, since connecting makes a new log where there is none.
                let opened = match self.place.is_ours() {
                    true => Some(file::connect(&self.place.path)?),
                    false => None,
                };
                let conn = opened.filter(|_| self.place.is_ours());
                let conn = conn.ok_or_else(|| BackendError::Failed(REPLACED.into()))?;
                conn.pragma_update(None, "query_only", "ON")?;
                Ok(conn)
            }
        }
    }

    fn give_back(&self, conn: Connection) {
        let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        // One that is still inside a transaction is not fit for reuse.
        if conn.is_autocommit() && idle.len() < READERS {
            idle.push(conn);
        } else {
            drop(idle);
            self.discard(&conn);
        }
    }

    fn discard(&self, conn: &Connection) {
        self.place.before_closing(conn);
    }

    fn close(&self) {
        let idle = std::mem::take(&mut *self.idle.lock().unwrap_or_else(PoisonError::into_inner));
        idle.iter().for_each(|conn| self.discard(conn));
    }

    /// Runs a reading on a connection of the pool, in one read transaction, off the async threads.
    async fn read<T: Send + 'static>(
        self: &Arc<Self>,
        reading: impl FnOnce(&Connection) -> Rows<T> + Send + 'static,
    ) -> Result<T, BackendError> {
        let permit = self.permits.acquire().await;
        let pool = Arc::clone(self);
        let read = tokio::task::spawn_blocking(move || {
            let conn = pool.take()?;
            conn.prepare_cached("BEGIN")?.execute([])?;
            let outcome = reading(&conn);
            let ended = conn.prepare_cached("COMMIT").and_then(|mut end| end.execute([]));
            if ended.is_ok() {
                pool.give_back(conn);
            } else {
                pool.discard(&conn);
            }
            outcome
        });
        let outcome = read.await;
        drop(permit);
        self.answer(outcome)
    }

    fn answer<T>(
        &self,
        outcome: Result<Rows<T>, tokio::task::JoinError>,
    ) -> Result<T, BackendError> {
        match outcome {
            Ok(outcome) => outcome.map_err(|error| {
                self.place.note(&error);
                port_error(error, &self.place.location)
            }),
            Err(error) => Err(cancelled(&error)),
        }
    }
}

fn cancelled(error: &tokio::task::JoinError) -> BackendError {
    BackendError::Unavailable(format!("the runtime is shutting down: {error}"))
}

/// Whether there is no space. The file of shared memory is made larger when a store is opened, and as its
/// log grows; that it cannot be is an error of its own, and space is what it wants.
fn is_full(error: &rusqlite::Error) -> bool {
    error.sqlite_error_code() == Some(ErrorCode::DiskFull)
        || error
            .sqlite_error()
            .is_some_and(|error| error.extended_code == rusqlite::ffi::SQLITE_IOERR_SHMSIZE)
}

/// Whether the log is shorter than all who have it open agreed that it is. While somebody reads it, SQLite
/// cuts nothing off; of the file itself, what is missing reads as zeros.
fn is_cut_log(error: &rusqlite::Error) -> bool {
    error
        .sqlite_error()
        .is_some_and(|error| error.extended_code == rusqlite::ffi::SQLITE_IOERR_SHORT_READ)
}

/// What an SQLite error means to the room above.
fn port_error(error: RowError, location: &str) -> BackendError {
    let error = match error {
        RowError::Port(error) => return error,
        RowError::Sqlite(error) => error,
    };
    let corrupt =
        |reason: String| BackendError::Corrupt { location: format!("the file {location}"), reason };
    match error.sqlite_error_code() {
        _ if is_full(&error) => BackendError::Full,
        _ if is_cut_log(&error) => BackendError::Failed(CUT.into()),
        Some(ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked) => {
            BackendError::Unavailable("another process has held the file for too long".into())
        }
        Some(
            ErrorCode::PermissionDenied
            | ErrorCode::ReadOnly
            | ErrorCode::AuthorizationForStatementDenied,
        ) => BackendError::Denied(error.to_string()),
        Some(ErrorCode::TooBig) => {
            BackendError::TooLarge { what: "a document".into(), size: 0, limit: 1_000_000_000 }
        }
        Some(
            ErrorCode::SystemIoFailure
            | ErrorCode::OutOfMemory
            | ErrorCode::OperationInterrupted
            | ErrorCode::OperationAborted
            | ErrorCode::FileLockingProtocolFailed
            | ErrorCode::SchemaChanged
            // The file could be opened before: this process has too many files open.
            | ErrorCode::CannotOpen,
        ) => BackendError::Unavailable(error.to_string()),
        // The statements are fixed: if one does not fit the tables, or a column does not hold what
        // it must, then the file is not as it was made.
        _ => corrupt(error.to_string()),
    }
}

#[async_trait]
impl Read for EmbeddedBackend {
    async fn get(&self, keys: &[Key]) -> Result<Vec<Option<Document>>, BackendError> {
        let keys = keys.to_vec();
        self.pool.read(move |conn| keys.iter().map(|key| rows::get(conn, key)).collect()).await
    }

    async fn scan(&self, scan: &Scan) -> Result<Page, BackendError> {
        let scan = scan.clone();
        self.pool.read(move |conn| rows::scan(conn, &scan)).await
    }

    async fn names(
        &self,
        governor: &Name,
        kind: Kind,
        after: Option<&Name>,
        limit: usize,
    ) -> Result<Vec<Name>, BackendError> {
        let (governor, after) = (governor.clone(), after.cloned());
        self.pool.read(move |conn| rows::names(conn, &governor, kind, after.as_ref(), limit)).await
    }

    async fn governors(
        &self,
        after: Option<&Name>,
        limit: usize,
    ) -> Result<Vec<Name>, BackendError> {
        let after = after.cloned();
        self.pool.read(move |conn| rows::governors(conn, after.as_ref(), limit)).await
    }

    async fn query(&self, query: &Query) -> Result<Found, BackendError> {
        let query = query.clone();
        self.pool.read(move |conn| find::query(conn, &query)).await
    }

    async fn count(&self, governor: Option<&Name>, kind: Kind) -> Result<u64, BackendError> {
        let governor = governor.cloned();
        self.pool.read(move |conn| rows::count(conn, governor.as_ref(), kind)).await
    }
}

#[async_trait]
impl Backend for EmbeddedBackend {
    async fn commit(&self, writes: Vec<Write>) -> Result<Committed, BackendError> {
        refuse_doubles(&writes)?;
        if let Some(write) = writes.iter().find(|write| write.key.version > i64::MAX as u64) {
            return Err(BackendError::Invalid(format!("{}: the version is too large", write.key)));
        }
        let (answer, answered) = oneshot::channel();
        let gone = || BackendError::Failed("the writer's thread has ended".into());
        let requests = self.requests.as_ref().ok_or_else(gone)?;
        let request = writer::Request { writes, answer };
        requests.send(writer::Message::Commit(request)).map_err(|_| gone())?;
        answered
            .await
            .map_err(|_| BackendError::Indeterminate("the writer's thread ended".into()))?
    }

    async fn view(&self) -> Result<Box<dyn Read>, BackendError> {
        let permit = tokio::time::timeout(VIEW_WAIT, Arc::clone(&self.pool.views).acquire_owned());
        let Ok(Ok(permit)) = permit.await else {
            return Err(BackendError::Unavailable(format!("{VIEWS} views are open already")));
        };
        let pool = Arc::clone(&self.pool);
        let begun = tokio::task::spawn_blocking(move || {
            let conn = pool.take()?;
            // The cut is taken by the first reading inside the transaction.
            conn.execute_batch("BEGIN")?;
            conn.prepare_cached("SELECT count(*) FROM meta")?.query_row([], |_| Ok(()))?;
            Ok(conn)
        });
        let conn = self.pool.answer(begun.await)?;
        let conn = Arc::new(Mutex::new(Some(conn)));
        Ok(Box::new(FileView { conn, pool: Arc::clone(&self.pool), _permit: permit }))
    }

    async fn watch(
        &self,
        governor: &Name,
        kind: Kind,
        name: Option<&Name>,
    ) -> Result<Box<dyn Alarm>, BackendError> {
        let listener = self.bell.listen(governor, kind, name)?;
        let writer = self.requests.as_ref().map(Arc::downgrade).unwrap_or_default();
        Ok(Box::new(watch::FileAlarm { listener, looks: self.looks.clone(), writer }))
    }

    async fn get_at(&self, keys: &[Key]) -> Result<(Vec<Option<Document>>, Moment), BackendError> {
        let found = self.get(keys).await?;
        Ok((found, self.clock.now()))
    }

    fn limits(&self) -> Limits {
        Limits {
            commit_bytes: 9 << 20,
            commit_writes: 500,
            reads_are_cheap: true,
            cuts_are_exact: true,
            repeat_before: 0,
        }
    }

    fn identity(&self) -> Identity {
        self.identity.clone()
    }

    fn location(&self) -> String {
        self.pool.place.location.clone()
    }

    async fn check_structure(&self) -> Result<Vec<String>, BackendError> {
        self.pool.read(file::integrity).await
    }
}

/// A read transaction that stays open.
#[derive(Debug)]
struct FileView {
    conn: Arc<Mutex<Option<Connection>>>,
    pool: Arc<Pool>,
    _permit: OwnedSemaphorePermit,
}

impl FileView {
    async fn read<T: Send + 'static>(
        &self,
        reading: impl FnOnce(&Connection) -> Rows<T> + Send + 'static,
    ) -> Result<T, BackendError> {
        let conn = Arc::clone(&self.conn);
        let read = tokio::task::spawn_blocking(move || {
            let guard = conn.lock().unwrap_or_else(PoisonError::into_inner);
            match guard.as_ref() {
                Some(conn) => reading(conn),
                None => Err(BackendError::Invalid("the view has ended".into()).into()),
            }
        });
        self.pool.answer(read.await)
    }
}

impl Drop for FileView {
    fn drop(&mut self) {
        // A reading that is still under way keeps the connection; it is closed when that ends.
        let conn = match self.conn.try_lock() {
            Ok(mut guard) => guard.take(),
            Err(_) => None,
        };
        if let Some(conn) = conn
            && conn.execute_batch("ROLLBACK").is_ok()
        {
            self.pool.give_back(conn);
        }
    }
}

#[async_trait]
impl Read for FileView {
    async fn get(&self, keys: &[Key]) -> Result<Vec<Option<Document>>, BackendError> {
        let keys = keys.to_vec();
        self.read(move |conn| keys.iter().map(|key| rows::get(conn, key)).collect()).await
    }

    async fn scan(&self, scan: &Scan) -> Result<Page, BackendError> {
        let scan = scan.clone();
        self.read(move |conn| rows::scan(conn, &scan)).await
    }

    async fn names(
        &self,
        governor: &Name,
        kind: Kind,
        after: Option<&Name>,
        limit: usize,
    ) -> Result<Vec<Name>, BackendError> {
        let (governor, after) = (governor.clone(), after.cloned());
        self.read(move |conn| rows::names(conn, &governor, kind, after.as_ref(), limit)).await
    }

    async fn governors(
        &self,
        after: Option<&Name>,
        limit: usize,
    ) -> Result<Vec<Name>, BackendError> {
        let after = after.cloned();
        self.read(move |conn| rows::governors(conn, after.as_ref(), limit)).await
    }

    async fn query(&self, query: &Query) -> Result<Found, BackendError> {
        let query = query.clone();
        self.read(move |conn| find::query(conn, &query)).await
    }

    async fn count(&self, governor: Option<&Name>, kind: Kind) -> Result<u64, BackendError> {
        let governor = governor.cloned();
        self.read(move |conn| rows::count(conn, governor.as_ref(), kind)).await
    }
}
