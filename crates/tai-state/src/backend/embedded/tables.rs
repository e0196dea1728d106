//! The tables of a store file, and the check that every row carries.
//!
//! SQLite does not check its pages against bit rot, so every row holds a CRC-32 over its key,
//! revision and body, and what is absent is looked for twice: by the unique index, and by an
//! independent index over a hash of the key. A listing is counted against its governor's row.

use std::fmt;

use rusqlite::Connection;
use rusqlite::types::{FromSql, FromSqlError, FromSqlResult, ToSql, ToSqlOutput, ValueRef};
use sha2::{Digest, Sha256};

use super::rows::Rows;
use crate::backend::{Key, Kind, Name, Revision};

/// `tai1`, in the header of every store file.
pub(crate) const APPLICATION_ID: i32 = 0x7461_6931;
/// The format of the tables.
pub(crate) const FORMAT: i32 = 1;

/// Everything is created at once, in a file that is not visible under its name yet.
///
/// `state` rows stay when their document is deleted (`body` is NULL then), since events refer to
/// them. `event` stands in append order: twice the rate and a third of the bytes of a table that is
/// clustered by its key.
pub(crate) const SCHEMA: &str = "
CREATE TABLE meta (
    name TEXT NOT NULL PRIMARY KEY, value TEXT NOT NULL, crc INTEGER NOT NULL
) STRICT;
CREATE TABLE governor (
    id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, states INTEGER NOT NULL, crc INTEGER NOT NULL
) STRICT;
CREATE TABLE state (
    id INTEGER PRIMARY KEY, governor INTEGER NOT NULL, name TEXT NOT NULL, key_hash INTEGER NOT NULL,
    revision INTEGER NOT NULL, body TEXT, crc INTEGER NOT NULL, UNIQUE (governor, name)
) STRICT;
CREATE INDEX state_by_hash ON state (key_hash);
CREATE TABLE event (
    seq INTEGER PRIMARY KEY, state INTEGER NOT NULL, version INTEGER NOT NULL,
    revision INTEGER NOT NULL, body TEXT NOT NULL, crc INTEGER NOT NULL, UNIQUE (state, version)
) STRICT;
CREATE TABLE snapshot (
    seq INTEGER PRIMARY KEY, state INTEGER NOT NULL, version INTEGER NOT NULL,
    revision INTEGER NOT NULL, body TEXT NOT NULL, crc INTEGER NOT NULL, UNIQUE (state, version)
) STRICT;
CREATE TABLE lock (
    id INTEGER PRIMARY KEY, governor INTEGER NOT NULL, name TEXT NOT NULL, key_hash INTEGER NOT NULL,
    revision INTEGER NOT NULL, body TEXT, crc INTEGER NOT NULL, UNIQUE (governor, name)
) STRICT;
CREATE INDEX lock_by_hash ON lock (key_hash);
CREATE TABLE command (
    id INTEGER PRIMARY KEY, governor INTEGER NOT NULL, name TEXT NOT NULL, key_hash INTEGER NOT NULL,
    revision INTEGER NOT NULL, body TEXT, crc INTEGER NOT NULL, UNIQUE (governor, name)
) STRICT;
CREATE INDEX command_by_hash ON command (key_hash);
";

/// The statements for one kind. All text is fixed, so that prepared statements can be kept.
#[derive(Debug)]
pub(crate) struct Statements {
    /// Unversioned: by governor and name; versioned: by state and version.
    pub(crate) get: &'static str,
    /// Whether the row of this id says itself that it is that one.
    pub(crate) is_here: &'static str,
    /// Unversioned only: by the hash of the key.
    pub(crate) get_by_hash: &'static str,
    /// Unversioned only: ids of the rows with a hash.
    pub(crate) ids_by_hash: &'static str,
    /// Unversioned only: the row that was made last.
    pub(crate) newest: &'static str,
    pub(crate) scan: &'static str,
    /// Unversioned only: names after a name, whether there is a document, and what proves that there is none.
    pub(crate) names: &'static str,
    pub(crate) insert: &'static str,
    pub(crate) update: &'static str,
    pub(crate) delete: &'static str,
    pub(crate) count: &'static str,
    pub(crate) count_of_governor: &'static str,
}

macro_rules! named {
    ($table:literal) => {
        Statements {
            get: concat!("SELECT id, revision, body, crc FROM ", $table, " WHERE governor = ?1 AND name = ?2"),
            is_here: concat!("SELECT 1 FROM ", $table, " NOT INDEXED WHERE id = ?1 AND governor = ?2 AND name = ?3"),
            get_by_hash: concat!(
                "SELECT coalesce(g.name, ''), t.name, t.revision, t.body, t.crc FROM ", $table,
                " t INDEXED BY ", $table, "_by_hash LEFT JOIN governor g ON g.id = t.governor WHERE t.key_hash = ?1"
            ),
            ids_by_hash: concat!("SELECT id FROM ", $table, " INDEXED BY ", $table, "_by_hash WHERE key_hash = ?1"),
            newest: concat!("SELECT id, governor, name, key_hash FROM ", $table, " ORDER BY id DESC LIMIT 1"),
            // From the last name on, that name included: it must still be there, or the index is damaged.
            scan: concat!("SELECT name, revision, body, crc FROM ", $table, " WHERE governor = ?1 AND name >= ?2 ORDER BY name"),
            names: concat!("SELECT name, body IS NOT NULL, revision, NULL, crc FROM ", $table, " WHERE governor = ?1 AND name > ?2 ORDER BY name"),
            insert: concat!("INSERT INTO ", $table, " (governor, name, key_hash, revision, body, crc) VALUES (?1, ?2, ?3, ?4, ?5, ?6)"),
            update: concat!("UPDATE ", $table, " SET revision = ?2, body = ?3, crc = ?4 WHERE id = ?1"),
            delete: concat!("DELETE FROM ", $table, " WHERE id = ?1"),
            count: concat!("SELECT count(*) FROM ", $table, " WHERE body IS NOT NULL"),
            count_of_governor: concat!("SELECT count(*) FROM ", $table, " WHERE governor = ?1 AND body IS NOT NULL"),
        }
    };
}

macro_rules! versioned {
    ($table:literal) => {
        Statements {
            get: concat!(
                "SELECT seq, revision, body, crc FROM ",
                $table,
                " WHERE state = ?1 AND version = ?2"
            ),
            is_here: concat!(
                "SELECT 1 FROM ",
                $table,
                " NOT INDEXED WHERE seq = ?1 AND state = ?2 AND version = ?3"
            ),
            get_by_hash: "",
            ids_by_hash: "",
            newest: "",
            names: "",
            scan: concat!(
                "SELECT version, revision, body, crc FROM ",
                $table,
                " WHERE state = ?1 AND version BETWEEN ?2 AND ?3 ORDER BY version"
            ),
            insert: concat!(
                "INSERT INTO ",
                $table,
                " (state, version, revision, body, crc) VALUES (?1, ?2, ?3, ?4, ?5)"
            ),
            update: concat!(
                "UPDATE ",
                $table,
                " SET revision = ?2, body = ?3, crc = ?4 WHERE seq = ?1"
            ),
            delete: concat!("DELETE FROM ", $table, " WHERE seq = ?1"),
            count: concat!("SELECT count(*) FROM ", $table),
            count_of_governor: concat!(
                "SELECT count(*) FROM state JOIN ",
                $table,
                " ON ",
                $table,
                ".state = state.id WHERE state.governor = ?1"
            ),
        }
    };
}

pub(crate) fn statements(kind: Kind) -> &'static Statements {
    static STATES: Statements = named!("state");
    static LOCKS: Statements = named!("lock");
    static COMMANDS: Statements = named!("command");
    static EVENTS: Statements = versioned!("event");
    static SNAPSHOTS: Statements = versioned!("snapshot");
    match kind {
        Kind::States => &STATES,
        Kind::Events => &EVENTS,
        Kind::Snapshots => &SNAPSHOTS,
        Kind::Locks => &LOCKS,
        Kind::Commands => &COMMANDS,
    }
}

/// The check of one document's row.
pub(crate) fn document_crc(key: &Key, revision: Revision, body: Option<&str>) -> u32 {
    let mut crc = crc32fast::Hasher::new();
    for part in [key.governor.as_str(), key.kind.as_str(), key.name.as_str()] {
        crc.update(part.as_bytes());
        // Names hold no NUL, so the parts cannot run into one another.
        crc.update(&[0]);
    }
    crc.update(&key.version.to_le_bytes());
    crc.update(&revision.token().to_le_bytes());
    crc.update(&[u8::from(body.is_some())]);
    crc.update(body.unwrap_or_default().as_bytes());
    crc.finalize()
}

/// The check of any other row, over its columns as text.
pub(crate) fn row_crc(columns: &[&dyn fmt::Display]) -> u32 {
    let mut crc = crc32fast::Hasher::new();
    for column in columns {
        crc.update(column.to_string().as_bytes());
        crc.update(&[0]);
    }
    crc.finalize()
}

/// Checks over the schema's texts, and over the texts with their root pages.
pub(crate) fn schema_checks(conn: &Connection) -> Rows<(u32, u32)> {
    let mut statement = conn.prepare(
        "SELECT type, name, tbl_name, rootpage, coalesce(sql, '') FROM sqlite_schema ORDER BY name",
    )?;
    let mut rows = statement.query([])?;
    let (mut texts, mut roots) = (String::new(), String::new());
    while let Some(row) = rows.next()? {
        let (kind, name, table): (String, String, String) = (row.get(0)?, row.get(1)?, row.get(2)?);
        let (root, sql): (i64, String) = (row.get(3)?, row.get(4)?);
        let line = format!("{kind}\0{name}\0{table}\0{sql}\0");
        texts.push_str(&line);
        roots.push_str(&format!("{line}{root}\0"));
    }
    Ok((row_crc(&[&texts]), row_crc(&[&roots])))
}

/// The second way to a row: the first 63 bits of the SHA-256 of governor and name.
pub(crate) fn key_hash(governor: &Name, name: &Name) -> i64 {
    let mut hash = Sha256::new();
    hash.update(governor.as_str());
    hash.update([0]);
    hash.update(name.as_str());
    let first =
        hash.finalize().iter().take(8).fold(0u64, |sum, byte| (sum << 8) | u64::from(*byte));
    i64::try_from(first >> 1).unwrap_or(0)
}

/// A `u64` in a column that is a signed 64-bit integer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Unsigned(pub(crate) u64);

impl ToSql for Unsigned {
    fn to_sql(&self) -> rusqlite::Result<ToSqlOutput<'_>> {
        match i64::try_from(self.0) {
            Ok(value) => Ok(value.into()),
            Err(error) => Err(rusqlite::Error::ToSqlConversionFailure(Box::new(error))),
        }
    }
}

impl FromSql for Unsigned {
    fn column_result(value: ValueRef<'_>) -> FromSqlResult<Self> {
        let value = i64::column_result(value)?;
        u64::try_from(value).map(Self).map_err(|_| FromSqlError::OutOfRange(value))
    }
}
