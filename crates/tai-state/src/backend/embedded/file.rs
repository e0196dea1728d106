//! The store's file: created whole or not at all, recognised before it is trusted, and opened with
//! the settings under which "committed" means durable.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use rusqlite::{Connection, OpenFlags, OptionalExtension, params};

use super::held::{Held, is_mounted_alone, names_of};
use super::refusal::{damaged, failing, io_error, is_damage, not_a_store, not_its_log, opening};
use super::rows::{RowError, Rows, corrupt};
use super::tables::{APPLICATION_ID, FORMAT, SCHEMA, row_crc, schema_checks};
use crate::backend::Identity;
use crate::clock::{Stopwatch, jitter, random_id};
use crate::error::{Error, Result};

/// While another process holds the write lock, this long; then the write is reported as not done.
const BUSY_DEADLINE: Duration = Duration::from_secs(30);
/// The longest single wait for another process's write lock. A group commit takes well under it.
const BUSY_WAIT: Duration = Duration::from_millis(4);

/// What stands in `meta`.
pub(super) mod meta {
    pub(in super::super) const STORE: &str = "store";
    pub(super) const INCARNATION: &str = "incarnation";
    pub(super) const FORMAT: &str = "format";
    pub(super) const REVISION: &str = "revision";
    /// The mark of the newest commit and that of the one before it, by which a log is told from that
    /// of another file.
    pub(in super::super) const COMMIT: &str = "commit";
    pub(super) const GOVERNORS: &str = "governors";
    pub(super) const MOVED_TO: &str = "moved_to";
    /// A check over the texts of the schema.
    pub(super) const TABLES: &str = "tables";
    /// The same with the root pages, which only a VACUUM moves.
    pub(super) const ROOTS: &str = "roots";
}

/// Stands for the mark of a commit before the first.
const NO_COMMIT: &str = "-";

/// What opening gives.
pub(crate) struct Opened {
    /// A connection that may write.
    pub(crate) conn: Connection,
    pub(crate) identity: Identity,
    /// The file itself, whatever the working directory becomes or a link leads to later.
    pub(crate) path: PathBuf,
    pub(crate) held: Held,
}

/// Finds or makes the file, and proves that it is a store of a format that is known.
pub(crate) fn open(path: &Path, create: bool, allow_ephemeral: bool) -> Result<Opened> {
    let location = path.display().to_string();
    if !allow_ephemeral && std::env::var_os("K_SERVICE").is_some() {
        return Err(Error::refused(
            format!("the file {location}"),
            "this is Cloud Run (K_SERVICE is set), where the disk is memory and is lost with the \
             instance; use a firestore:// URL, or allow an ephemeral disk explicitly",
        ));
    }
    match fs::metadata(path) {
        Ok(_) => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound && create => make(path, &location)?,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Err(not_a_store(&location, "there is no such file"));
        }
        Err(error) => return Err(io_error(&location, &error)),
    }
    let path = fs::canonicalize(path).map_err(|error| io_error(&location, &error))?;
    refuse_a_journal(&path, &location)?;
    let held = recognise(&path, &location)?;
    let log = sidecar(&path, "-wal");
    if let Some(reason) = super::log::damage(&log).map_err(|error| failing(&location, &error))? {
        return Err(damaged(&location, &reason));
    }
    let stranger =
        super::lineage::stranger(&held, &log).map_err(|error| failing(&location, &error))?;
    if let Some(reason) = stranger {
        return Err(not_its_log(&path, &location, &reason));
    }
    let mut conn = connect(&path).map_err(|error| opening(&location, error.into()))?;
    // What is refused is not touched: closing would fold the log in and remove it.
    super::writer::keep_log(&conn, true);
    let identity = prove(&conn, &location).map_err(|error| match error {
        ProofError::Rows(error) => opening(&location, error),
        ProofError::Final(error) => error,
    })?;
    // What a crash left in the log goes into the file now, so that remains of a commit that was cut
    // short cannot be met again behind later ones. While others use the file that has to wait.
    if log.metadata().is_ok_and(|found| found.len() > 0) {
        let fold = || -> rusqlite::Result<()> {
            conn.busy_timeout(Duration::ZERO)?;
            conn.query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |_| Ok(()))
        };
        match fold() {
            Ok(()) => {}
            Err(error) if super::writer::is_harmless(&error) => {
                tracing::debug!(%error, location, "the log stays for now");
            }
            // What is damaged is no failure of the disk.
            Err(error) if is_damage(&error) => return Err(opening(&location, error.into())),
            // A sync failed: what a second one would report as safe may be gone already.
            Err(error) => {
                let reason = format!("its log could not be folded into the file: {error}");
                return Err(Error::Storage { location, reason });
            }
        }
    }
    super::writer::keep_log(&conn, false);
    // SQLite syncs the folder of a new log too, but passes over a failure: a power cut would then take
    // the log away, and acknowledged changes with it.
    sync_folder(&path).map_err(|error| failing(&location, &error))?;
    wait_for_others(&mut conn, Arc::default()).map_err(|error| opening(&location, error.into()))?;
    Ok(Opened { conn, identity, path, held })
}

/// One more connection to a file that was opened before.
pub(crate) fn connect(path: &Path) -> rusqlite::Result<Connection> {
    // Not a URI, no creation, and never two threads on one connection.
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let mut conn = Connection::open_with_flags(path, flags)?;
    wait_for_others(&mut conn, Arc::default())?;
    for (pragma, value) in [
        // A commit returns only after the log is synced.
        ("synchronous", "FULL"),
        ("fullfsync", "ON"),
        ("checkpoint_fullfsync", "ON"),
        // Checkpoints are the writer's own, so that a failed sync is noticed.
        ("wal_autocheckpoint", "0"),
        ("journal_size_limit", "67108864"),
        ("cell_size_check", "ON"),
        ("trusted_schema", "OFF"),
        // What is removed is overwritten: a purge must leave nothing to be found in the file.
        ("secure_delete", "ON"),
        ("temp_store", "MEMORY"),
        ("cache_size", "-4096"),
    ] {
        conn.pragma_update(None, pragma, value)?;
    }
    conn.set_prepared_statement_cache_capacity(64);
    Ok(conn)
}

/// While another process writes, this one waits, with jitter, for as long as `BUSY_DEADLINE`, or until
/// the handle is being closed.
pub(super) fn wait_for_others(
    conn: &mut Connection,
    closing: Arc<AtomicBool>,
) -> rusqlite::Result<()> {
    let mut since = Stopwatch::start();
    conn.busy_handler(Some(move |before: i32| {
        if before == 0 {
            since = Stopwatch::start();
        }
        // By the clock: on a busy machine a sleep takes longer than it was asked to.
        if closing.load(Ordering::Acquire) || since.elapsed() >= BUSY_DEADLINE {
            return false;
        }
        // SQLite asks on the engine's own thread; another process cannot notify it.
        #[allow(clippy::disallowed_methods)]
        std::thread::sleep(jitter(BUSY_WAIT));
        true
    }))
}

/// Makes the names in a file's folder durable, where that can be done at all.
fn sync_folder(file: &Path) -> io::Result<()> {
    use io::ErrorKind::{InvalidInput, PermissionDenied, Unsupported};
    let Some(folder) = file.parent() else { return Ok(()) };
    let synced = File::open(folder).and_then(|folder| folder.sync_all());
    // Some file systems cannot, and a folder that may not be listed cannot be opened for it.
    synced.or_else(|error| match error.kind() {
        InvalidInput | Unsupported | PermissionDenied => Ok(()),
        _ => Err(error),
    })
}

/// A store has a write-ahead log and never a rollback journal, which SQLite would play back over the file.
fn refuse_a_journal(path: &Path, location: &str) -> Result<()> {
    let journal = sidecar(path, "-journal");
    if journal.symlink_metadata().is_ok_and(|found| found.len() > 0) {
        let reason = format!(
            "there is a rollback journal beside it, which a store never has: nothing was played back; \
             move {} away",
            journal.display()
        );
        return Err(damaged(location, &reason));
    }
    Ok(())
}

/// Looks at the header before SQLite does: what is refused here is refused with its reason, and is
/// not touched.
fn recognise(path: &Path, location: &str) -> Result<Held> {
    let found = fs::metadata(path).map_err(|error| io_error(location, &error))?;
    if found.is_dir() {
        return Err(not_a_store(location, "it is a directory"));
    }
    if !found.is_file() {
        return Err(not_a_store(location, "it is not a regular file"));
    }
    if found.len() == 0 {
        return Err(not_a_store(location, "it is empty"));
    }
    if names_of(&found) > 1 {
        return Err(not_a_store(
            location,
            "it has more than one name (hard links): each name would get a log of its own; make a copy",
        ));
    }
    if is_mounted_alone(path) {
        return Err(not_a_store(
            location,
            "the file is mounted by itself: its log would be in another folder than that of whoever uses \
             the file where it is; mount its folder",
        ));
    }
    let held = Held::open(path, &found).map_err(|error| io_error(location, &error))?;
    let header = held.header().map_err(|error| failing(location, &error))?;
    let at = |range: std::ops::Range<usize>| header.get(range).unwrap_or_default();
    let is_sqlite = at(0..16) == b"SQLite format 3\0";
    let is_ours = at(68..72) == APPLICATION_ID.to_be_bytes();
    match (is_sqlite, is_ours) {
        (true, true) => {}
        (false, true) => return Err(damaged(location, "its header does not begin as it must")),
        (true, false) if header.len() == 100 && !holds_our_tables(path) => {
            return Err(not_a_store(location, "it is an SQLite file of another program"));
        }
        (true, false) => return Err(damaged(location, "its header does not name tai-state")),
        (false, false) if header.iter().all(|byte| *byte == 0) => {
            return Err(damaged(location, "its header is zeros"));
        }
        (false, false) => return Err(not_a_store(location, "it does not begin like one")),
    }
    let format = at(60..64).iter().fold(0u64, |sum, byte| (sum << 8) | u64::from(*byte));
    if format > FORMAT as u64 {
        // A newer format says so in its own table too; else it is a flipped bit.
        return Err(match format_in_table(path) {
            Some(noted) if noted == FORMAT as u64 => {
                damaged(location, "its header and its tables name different formats")
            }
            _ => Error::NewerFormat {
                location: location.to_owned(),
                found: format,
                supported: FORMAT as u64,
            },
        });
    }
    // What never changes in a store's header: page size, journal mode, fractions, schema format,
    // text encoding.
    let journal = matches!(at(18..20), [1, 1] | [2, 2]);
    let fixed = at(16..18) == [0x10, 0x00]
        && at(20..24) == [0, 64, 32, 32]
        && at(44..48) == 4u32.to_be_bytes()
        && at(56..60) == 1u32.to_be_bytes()
        && at(64..68) == 1u32.to_be_bytes();
    if format != FORMAT as u64 || !journal || !fixed {
        return Err(damaged(location, "its header does not say what the header of a store says"));
    }
    Ok(held)
}

/// Whether an SQLite file whose header lost its name is a store all the same. Read only.
fn holds_our_tables(path: &Path) -> bool {
    let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let tables = Connection::open_with_flags(path, flags).and_then(|conn| {
        conn.query_row(
            "SELECT count(*) FROM sqlite_schema WHERE name IN ('meta', 'governor', 'state', 'event')",
            [],
            |row| row.get::<_, i64>(0),
        )
    });
    // What cannot be read at all may well have been a store.
    tables.map_or(true, |tables| tables == 4)
}

fn format_in_table(path: &Path) -> Option<u64> {
    let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let conn = Connection::open_with_flags(path, flags).ok()?;
    number(&conn, meta::FORMAT).ok()
}

/// Makes the file under another name and links it to its own only when it is complete and synced,
/// so that a power cut leaves no half of it, and of two processes that make it only one does.
fn make(path: &Path, location: &str) -> Result<()> {
    if path.symlink_metadata().is_ok_and(|found| found.is_symlink()) {
        return Err(not_a_store(location, "it is a symbolic link that leads to no file"));
    }
    // Unless somebody else has just made the store.
    if sidecar(path, "-wal").exists() && !path.exists() {
        return Err(not_a_store(
            location,
            "there is no such file, but its write-ahead log (-wal) is there: bring the file back, or \
             move the log away",
        ));
    }
    let parent = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let failed = |error: io::Error| failing(location, &error);
    // Absolute, so that SQLite finds no special meaning in the name.
    let parent = fs::canonicalize(parent).map_err(|error| io_error(location, &error))?;
    let temporary = tempfile::Builder::new()
        .prefix(".tai-state-")
        .suffix(".new")
        .tempfile_in(&parent)
        .map_err(failed)?
        .into_temp_path();
    build(&temporary).map_err(|error| opening(location, error))?;
    File::open(&temporary).and_then(|file| file.sync_all()).map_err(failed)?;
    match temporary.persist_noclobber(path) {
        Ok(()) => {}
        // Another process was faster: its file is as good.
        Err(error) if error.error.kind() == io::ErrorKind::AlreadyExists => {}
        Err(error) => return Err(failed(error.error)),
    }
    File::open(&parent).and_then(|directory| directory.sync_all()).map_err(failed)
}

fn build(path: &Path) -> Rows<()> {
    let conn = Connection::open(path)?;
    conn.pragma_update(None, "page_size", 4096)?;
    // Before the first table, or it has no effect.
    conn.pragma_update(None, "auto_vacuum", "INCREMENTAL")?;
    conn.pragma_update(None, "application_id", APPLICATION_ID)?;
    conn.pragma_update(None, "user_version", FORMAT)?;
    conn.pragma_update(None, "synchronous", "FULL")?;
    conn.execute_batch(SCHEMA)?;
    let (tables, roots) = schema_checks(&conn)?;
    for (name, value) in [
        (meta::STORE, random_id().to_string()),
        (meta::INCARNATION, "1".to_owned()),
        (meta::FORMAT, FORMAT.to_string()),
        (meta::REVISION, "0".to_owned()),
        (meta::COMMIT, format!("{} {NO_COMMIT}", random_id())),
        (meta::GOVERNORS, "0".to_owned()),
        (meta::TABLES, tables.to_string()),
        (meta::ROOTS, roots.to_string()),
    ] {
        conn.execute(
            "INSERT INTO meta (name, value, crc) VALUES (?1, ?2, ?3)",
            params![name, value, row_crc(&[&name, &value])],
        )?;
    }
    let mode = keep_a_log(&conn)?;
    if mode != "wal" {
        return Err(corrupt("a new file", format!("journal mode {mode} instead of wal")));
    }
    conn.close().map_err(|(_, error)| error.into())
}

/// Has a write-ahead log kept, and says what is kept. That it is stands in the file, and this is committed only
/// after the answer has come: who reads no further never learns that the commit has failed.
fn keep_a_log(conn: &Connection) -> Rows<String> {
    let mut statement = conn.prepare("PRAGMA journal_mode = WAL")?;
    let mut answer = statement.query([])?;
    let mode = answer.next()?.map_or(Ok(String::new()), |row| row.get(0))?;
    while answer.next()?.is_some() {}
    Ok(mode)
}

enum ProofError {
    Rows(RowError),
    Final(Error),
}

impl<E: Into<RowError>> From<E> for ProofError {
    fn from(error: E) -> Self {
        Self::Rows(error.into())
    }
}

/// Proves that the settings are in force and the tables are the ones that were made.
fn prove(conn: &Connection, location: &str) -> Result<Identity, ProofError> {
    let mode = keep_a_log(conn)?;
    let synchronous: i64 = conn.pragma_query_value(None, "synchronous", |row| row.get(0))?;
    if mode != "wal" || synchronous != 2 {
        let reason =
            format!("journal mode {mode}, synchronous {synchronous}: commits would not be durable");
        return Err(ProofError::Final(Error::Storage { location: location.to_owned(), reason }));
    }
    let (tables, roots) = schema_checks(conn)?;
    if number(conn, meta::TABLES)? != u64::from(tables) {
        return Err(damaged_tables("they are not the ones that were made"));
    }
    if number(conn, meta::ROOTS)? != u64::from(roots) {
        // Somebody ran VACUUM, or a root was damaged: only reading everything tells.
        if !integrity(conn)?.is_empty() {
            return Err(damaged_tables("their root pages are not where they were"));
        }
        set(conn, meta::ROOTS, &roots.to_string())?;
    }
    let format = number(conn, meta::FORMAT)?;
    if format > FORMAT as u64 {
        let supported = FORMAT as u64;
        let location = location.to_owned();
        return Err(ProofError::Final(Error::NewerFormat { location, found: format, supported }));
    }
    let store = text(conn, meta::STORE)?.unwrap_or_default();
    let incarnation = number(conn, meta::INCARNATION)?;
    // Short, since it stands in every clock. A copy has the same (docs/guarantees.md, what causality rests on).
    let short: String = store.chars().filter(char::is_ascii_hexdigit).take(12).collect();
    let node = format!("{short}.{incarnation}");
    Ok(Identity { store, incarnation, node })
}

fn damaged_tables(reason: &str) -> ProofError {
    ProofError::Rows(corrupt("the tables of the file", reason))
}

/// What SQLite finds when it reads its whole structure.
pub(crate) fn integrity(conn: &Connection) -> Rows<Vec<String>> {
    let mut statement = conn.prepare("PRAGMA integrity_check(20)")?;
    let found: Vec<String> =
        statement.query_map([], |row| row.get(0))?.collect::<Result<_, _>>()?;
    Ok(found.into_iter().filter(|line| line != "ok").collect())
}

fn text(conn: &Connection, name: &str) -> Rows<Option<String>> {
    let mut statement = conn.prepare_cached("SELECT value, crc FROM meta WHERE name = ?1")?;
    let found = statement
        .query_row([name], |row| Ok((row.get::<_, String>(0)?, row.get::<_, u32>(1)?)))
        .optional()?;
    match found {
        Some((value, crc)) if crc != row_crc(&[&name, &value]) => {
            Err(corrupt(format!("the note {name:?} of the file"), "its check does not hold"))
        }
        found => Ok(found.map(|(value, _)| value)),
    }
}

fn number(conn: &Connection, name: &str) -> Rows<u64> {
    text(conn, name)?.and_then(|value| value.parse().ok()).ok_or_else(|| {
        corrupt(format!("the note {name:?} of the file"), "it is missing or not a number")
    })
}

fn set(conn: &Connection, name: &str, value: &str) -> Rows<()> {
    let changed = conn
        .prepare_cached("UPDATE meta SET value = ?2, crc = ?3 WHERE name = ?1")?
        .execute(params![name, value, row_crc(&[&name, &value])])?;
    if changed == 1 {
        return Ok(());
    }
    Err(corrupt(format!("the note {name:?} of the file"), "it is missing"))
}

/// The newest revision that was given out.
pub(crate) fn revision(conn: &Connection) -> Rows<u64> {
    number(conn, meta::REVISION)
}

pub(crate) fn set_revision(conn: &Connection, revision: u64) -> Rows<()> {
    set(conn, meta::REVISION, &revision.to_string())
}

/// Gives the commit that is being made its mark.
pub(crate) fn mark_commit(conn: &Connection) -> Rows<()> {
    // Files of earlier builds have none.
    let noted = text(conn, meta::COMMIT)?.unwrap_or_default();
    let before = noted.split(' ').next().filter(|mark| !mark.is_empty()).unwrap_or(NO_COMMIT);
    let value = format!("{} {before}", random_id());
    conn.prepare_cached(
        "INSERT INTO meta (name, value, crc) VALUES (?1, ?2, ?3)
         ON CONFLICT (name) DO UPDATE SET value = ?2, crc = ?3",
    )?
    .execute(params![meta::COMMIT, value, row_crc(&[&meta::COMMIT, &value])])?;
    Ok(())
}

/// How many governors there are.
pub(crate) fn governors(conn: &Connection) -> Rows<u64> {
    number(conn, meta::GOVERNORS)
}

pub(crate) fn set_governors(conn: &Connection, governors: u64) -> Rows<()> {
    set(conn, meta::GOVERNORS, &governors.to_string())
}

/// Where the store was moved to, if it was.
pub(crate) fn moved_to(conn: &Connection) -> Rows<Option<String>> {
    text(conn, meta::MOVED_TO)
}

/// The path of a file that SQLite keeps beside the store.
pub(crate) fn sidecar(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    PathBuf::from(name)
}

/// Writes what a newer program would, for the test that it is refused.
#[cfg(test)]
pub(super) fn set_format(conn: &Connection, format: i32) {
    set(conn, meta::FORMAT, &format.to_string()).ok().unwrap();
    conn.pragma_update(None, "user_version", format).unwrap();
}

/// Marks a store as moved, for the test that it then refuses writes.
#[cfg(test)]
pub(super) fn set_moved_to(conn: &Connection, to: &str) {
    conn.execute(
        "INSERT INTO meta (name, value, crc) VALUES (?1, ?2, ?3)",
        params![meta::MOVED_TO, to, row_crc(&[&meta::MOVED_TO, &to])],
    )
    .unwrap();
}
