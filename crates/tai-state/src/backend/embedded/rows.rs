//! Reads documents out of the tables, and proves each against its row's check. One whose check does not hold is
//! found all the same, as a damaged one: so it can be made anew, or removed.

use rusqlite::types::ValueRef;
use rusqlite::{Connection, OptionalExtension, params};

use super::tables::{Statements, Unsigned, document_crc, key_hash, row_crc, statements};
use crate::backend::{
    BackendError, Body, Document, Key, Kind, Name, Page, Range, Revision, Scan, refuse_misfit,
};

/// What reading meets.
pub(crate) enum RowError {
    Sqlite(rusqlite::Error),
    Port(BackendError),
}

impl From<rusqlite::Error> for RowError {
    fn from(error: rusqlite::Error) -> Self {
        Self::Sqlite(error)
    }
}

impl From<BackendError> for RowError {
    fn from(error: BackendError) -> Self {
        Self::Port(error)
    }
}

pub(crate) type Rows<T> = Result<T, RowError>;

pub(crate) fn corrupt(location: impl ToString, reason: impl Into<String>) -> RowError {
    let (location, reason) = (location.to_string(), reason.into());
    RowError::Port(BackendError::Corrupt { location, reason })
}

/// A page of a scan ends when its bodies reach this many bytes.
pub(crate) const PAGE_BYTES: usize = 4 << 20;

/// A governor's row.
pub(crate) struct Governor {
    pub(crate) id: i64,
    /// Rows of `state` with this governor, those of deleted documents included.
    pub(crate) states: u64,
}

/// A row that was found: its id, and its document unless that was deleted.
pub(crate) struct Row {
    pub(crate) id: i64,
    pub(crate) document: Option<Document>,
}

pub(crate) fn governor(conn: &Connection, name: &Name) -> Rows<Option<Governor>> {
    let mut statement =
        conn.prepare_cached("SELECT id, states, crc FROM governor WHERE name = ?1")?;
    let found = statement
        .query_row([name.as_str()], |row| {
            Ok((row.get::<_, i64>(0)?, row.get::<_, Unsigned>(1)?.0, row.get::<_, u32>(2)?))
        })
        .optional()?;
    let Some((id, states, crc)) = found else { return Ok(None) };
    if crc != governor_crc(id, name, states) {
        return Err(corrupt(format!("the row of governor {name}"), "its check does not hold"));
    }
    Ok(Some(Governor { id, states }))
}

pub(crate) fn governor_crc(id: i64, name: &Name, states: u64) -> u32 {
    row_crc(&[&id, name, &states])
}

/// The row of an unversioned document. What the unique index does not find is looked for by hash
/// before it is called absent.
pub(crate) fn named_row(conn: &Connection, key: &Key) -> Rows<Option<Row>> {
    let sql = statements(key.kind);
    if let Some(governor) = governor(conn, &key.governor)? {
        let name = key.name.as_str();
        let found = conn
            .prepare_cached(sql.get)?
            .query_row(params![governor.id, name], found)
            .optional()?;
        if let Some((id, stored)) = found {
            let is_here = |sql| conn.prepare_cached(sql)?.exists(params![id, governor.id, name]);
            return Ok(Some(row(key, id, stored, is_here)?));
        }
    }
    absent_by_hash(conn, sql, key)?;
    refuse_lost_indexes(conn, sql, key)?;
    Ok(None)
}

/// Before "absent" is believed: the newest row of the table must be found by both of its indexes,
/// and the newest governor by its name. An index whose root was lost finds nothing, and would call
/// everything absent.
fn refuse_lost_indexes(conn: &Connection, sql: &Statements, key: &Key) -> Rows<()> {
    let lost = |what: &str| Err(corrupt(key, format!("{what} does not find what is there")));
    let newest_governor = conn
        .prepare_cached("SELECT id, name FROM governor ORDER BY id DESC LIMIT 1")?
        .query_row([], |row| Ok((row.get::<_, i64>(0)?, row.get::<_, String>(1)?)))
        .optional()?;
    if newest_governor.as_ref().map_or(0, |(id, _)| *id)
        != i64::try_from(super::file::governors(conn)?).unwrap_or(0)
    {
        return lost("the table of governors");
    }
    if let Some((id, name)) = newest_governor {
        let found = conn
            .prepare_cached("SELECT id FROM governor WHERE name = ?1")?
            .query_row([name], |row| row.get::<_, i64>(0))
            .optional()?;
        if found != Some(id) {
            return lost("the index of governors");
        }
    }
    let newest = conn
        .prepare_cached(sql.newest)?
        .query_row([], |row| {
            let (id, governor, name) = (row.get(0)?, row.get(1)?, row.get(2)?);
            Ok::<(i64, i64, String, i64), _>((id, governor, name, row.get(3)?))
        })
        .optional()?;
    let Some((id, of, name, hash)) = newest else {
        // Rows of states are never removed.
        let states = governor(conn, &key.governor)?.map_or(0, |governor| governor.states);
        return if key.kind == Kind::States && states > 0 { lost("the table") } else { Ok(()) };
    };
    let by_name = conn
        .prepare_cached(sql.get)?
        .query_row(params![of, name], |row| row.get::<_, i64>(0))
        .optional()?;
    let mut statement = conn.prepare_cached(sql.ids_by_hash)?;
    let by_hash: Vec<i64> =
        statement.query_map([hash], |row| row.get(0))?.collect::<Result<_, _>>()?;
    if by_name != Some(id) || !by_hash.contains(&id) {
        return lost("an index");
    }
    Ok(())
}

/// Fails when the hash index knows a row that the unique index did not find.
fn absent_by_hash(conn: &Connection, sql: &Statements, key: &Key) -> Rows<()> {
    let mut statement = conn.prepare_cached(sql.get_by_hash)?;
    let mut rows = statement.query([key_hash(&key.governor, &key.name)])?;
    while let Some(row) = rows.next()? {
        // Another key with the same hash is allowed, if its row is in order.
        let other = Name::from_escaped(&row.get::<_, String>(0)?)
            .zip(Name::from_escaped(&row.get::<_, String>(1)?))
            .map(|(governor, name)| Key { governor, name, ..key.clone() })
            .filter(|other| other != key);
        let Some(other) = other else {
            return Err(corrupt(key, "one index knows it and the other does not"));
        };
        if stored(row, 2)?.is_damaged(&other) {
            return Err(corrupt(&other, DAMAGE));
        }
    }
    Ok(())
}

/// The row of a versioned document. `state` is the id of the row of its state.
pub(crate) fn versioned_row(conn: &Connection, state: i64, key: &Key) -> Rows<Option<Row>> {
    // Beyond what a column can hold there is nothing.
    let Ok(version) = i64::try_from(key.version) else { return Ok(None) };
    let found = conn
        .prepare_cached(statements(key.kind).get)?
        .query_row(params![state, version], found)
        .optional()?;
    let Some((id, stored)) = found else { return Ok(None) };
    let is_here = |sql| conn.prepare_cached(sql)?.exists(params![id, state, version]);
    row(key, id, stored, is_here).map(Some)
}

/// The row of the state that a versioned document belongs to.
pub(crate) fn state_of(conn: &Connection, key: &Key) -> Rows<Option<i64>> {
    let state = Key { kind: Kind::States, version: 0, ..key.clone() };
    Ok(named_row(conn, &state)?.map(|row| row.id))
}

const DAMAGE: &str = "the check of its row does not hold";

/// What stands in a row, whatever a damage has made of it.
struct Stored {
    revision: u64,
    body: Option<String>,
    /// `None` where one of the columns is not even of its type.
    crc: Option<u32>,
}

impl Stored {
    fn is_damaged(&self, key: &Key) -> bool {
        let revision = Revision::new(self.revision);
        self.crc != Some(document_crc(key, revision, self.body.as_deref()))
    }

    /// The document, if there is one, and whether it is damaged. That it is absent is believed only of a row
    /// whose check holds.
    fn document(self, key: &Key) -> (Option<Document>, bool) {
        let is_damaged = self.is_damaged(key);
        let body = match (is_damaged, self.body) {
            (true, body) => Some(Body::damaged(body.unwrap_or_default(), DAMAGE)),
            (false, body) => body.map(Body::from_text),
        };
        let revision = Revision::new(self.revision);
        (body.map(|body| Document { key: key.clone(), body, revision }), is_damaged)
    }
}

/// The columns revision, body and check, from this one on.
fn stored(row: &rusqlite::Row<'_>, at: usize) -> rusqlite::Result<Stored> {
    let integer = |at| match row.get_ref(at)? {
        ValueRef::Integer(number) => Ok::<_, rusqlite::Error>(Some(number)),
        _ => Ok(None),
    };
    let (revision, crc) = (integer(at)?, integer(at + 2)?);
    let mut is_typed = revision.is_some_and(|revision| revision >= 0);
    let body = match row.get_ref(at + 1)? {
        ValueRef::Null => None,
        ValueRef::Text(text) => {
            is_typed &= std::str::from_utf8(text).is_ok();
            Some(String::from_utf8_lossy(text).into_owned())
        }
        _ => {
            is_typed = false;
            Some(String::new())
        }
    };
    let crc = crc.filter(|_| is_typed).and_then(|crc| u32::try_from(crc).ok());
    Ok(Stored { revision: revision.unwrap_or_default().unsigned_abs(), body, crc })
}

fn found(row: &rusqlite::Row<'_>) -> rusqlite::Result<(i64, Stored)> {
    Ok((row.get(0)?, stored(row, 1)?))
}

/// A row that an index led to. If its check does not hold, either what it says is damaged, or the index led
/// to another row, which must not be taken for this one: then its own columns say whose it is.
fn row(
    key: &Key,
    id: i64,
    stored: Stored,
    is_here: impl FnOnce(&'static str) -> rusqlite::Result<bool>,
) -> Rows<Row> {
    let (document, is_damaged) = stored.document(key);
    if is_damaged && !is_here(statements(key.kind).is_here)? {
        return Err(corrupt(key, DAMAGE));
    }
    Ok(Row { id, document })
}

pub(crate) fn get(conn: &Connection, key: &Key) -> Rows<Option<Document>> {
    let row = if key.kind.is_versioned() {
        match state_of(conn, key)? {
            Some(state) => versioned_row(conn, state, key)?,
            None => None,
        }
    } else {
        named_row(conn, key)?
    };
    Ok(row.and_then(|row| row.document))
}

pub(crate) fn scan(conn: &Connection, scan: &Scan) -> Rows<Page> {
    refuse_misfit(scan)?;
    match &scan.range {
        Range::Names { after } => scan_names(conn, scan, after.as_ref()),
        Range::Versions { name, from, to } => scan_versions(conn, scan, name, *from, *to),
    }
}

/// Gathers one page, and notes whether it was cut short.
struct Gather<'a> {
    scan: &'a Scan,
    documents: Vec<Document>,
    bytes: usize,
}

impl Gather<'_> {
    fn is_full(&self) -> bool {
        self.documents.len() >= self.scan.limit || self.bytes >= PAGE_BYTES
    }

    fn push(&mut self, document: Document) {
        self.bytes += document.body.as_text().len();
        self.documents.push(document);
    }

    fn page(self, more: bool) -> Page {
        let next = if more { self.scan.after(&self.documents) } else { None };
        Page { documents: self.documents, next }
    }
}

fn scan_names(conn: &Connection, scan: &Scan, after: Option<&Name>) -> Rows<Page> {
    let mut gather = Gather { scan, documents: Vec::new(), bytes: 0 };
    let Some(governor) = governor(conn, &scan.governor)? else {
        refuse_lost_governor(conn, &scan.governor)?;
        return Ok(gather.page(false));
    };
    let mut statement = conn.prepare_cached(statements(scan.kind).scan)?;
    let mut rows =
        statement.query(params![governor.id, after.map(Name::as_str).unwrap_or_default()])?;
    let mut last = after.map(|name| name.as_str().to_owned()).unwrap_or_default();
    let mut is_first = true;
    while let Some(row) = rows.next()? {
        if gather.is_full() {
            return Ok(gather.page(true));
        }
        let name: String = row.get(0)?;
        let is_cursor = std::mem::take(&mut is_first) && after.is_some();
        if is_cursor && name == last {
            continue;
        }
        if name <= last {
            return Err(corrupt(list(scan), format!("its index is out of order at {name:?}")));
        }
        if let Some(after) = after.filter(|_| is_cursor) {
            refuse_lost_cursor(conn, scan, after)?;
        }
        let found = Name::from_escaped(&name)
            .ok_or_else(|| corrupt(list(scan), format!("{name:?} is not an escaped id")))?;
        let key = Key { governor: scan.governor.clone(), kind: scan.kind, name: found, version: 0 };
        if let Some(document) = stored(row, 1)?.document(&key).0 {
            gather.push(document);
        }
        last = name;
    }
    if is_first && let Some(after) = after {
        refuse_lost_cursor(conn, scan, after)?;
    }
    drop(rows);
    count_states(conn, scan, &governor)?;
    Ok(gather.page(false))
}

/// The names of those documents that exist, without their bodies.
pub(crate) fn names(
    conn: &Connection,
    of: &Name,
    kind: Kind,
    after: Option<&Name>,
    limit: usize,
) -> Rows<Vec<Name>> {
    walk(conn, of, kind, after, limit, false)
}

/// The names of those who have, or had, events or saved snapshots, whether or not their head exists.
pub(crate) fn owners(
    conn: &Connection,
    of: &Name,
    after: Option<&Name>,
    limit: usize,
) -> Rows<Vec<Name>> {
    walk(conn, of, Kind::States, after, limit, true)
}

/// The same walk as a scan, and counted like one when it reaches the end.
fn walk(
    conn: &Connection,
    of: &Name,
    kind: Kind,
    after: Option<&Name>,
    limit: usize,
    absent_too: bool,
) -> Rows<Vec<Name>> {
    let scan = Scan { governor: of.clone(), kind, range: Range::Names { after: None }, limit };
    refuse_misfit(&scan)?;
    let Some(governor) = governor(conn, of)? else {
        refuse_lost_governor(conn, of)?;
        return Ok(Vec::new());
    };
    let mut statement = conn.prepare_cached(statements(kind).names)?;
    let mut rows =
        statement.query(params![governor.id, after.map(Name::as_str).unwrap_or_default()])?;
    let mut names: Vec<Name> = Vec::new();
    while names.len() < limit {
        let Some(row) = rows.next()? else {
            drop(rows);
            count_states(conn, &scan, &governor)?;
            return Ok(names);
        };
        let text: String = row.get(0)?;
        let name = Name::from_escaped(&text)
            .filter(|name| names.last().or(after).is_none_or(|last| last < name));
        let Some(name) = name else {
            return Err(corrupt(list(&scan), format!("{text:?} is out of place")));
        };
        let key = Key { governor: of.clone(), kind, name, version: 0 };
        // That there is no document is believed of a row in order only.
        if absent_too || row.get(1)? || stored(row, 2)?.is_damaged(&key) {
            names.push(key.name);
        }
    }
    Ok(names)
}

/// At the end of a list of states its index is counted.
fn count_states(conn: &Connection, scan: &Scan, governor: &Governor) -> Rows<()> {
    if scan.kind != Kind::States {
        return Ok(());
    }
    let counted: u64 = conn
        .prepare_cached("SELECT count(*) FROM state WHERE governor = ?1 AND name > ''")?
        .query_row([governor.id], |row| row.get::<_, Unsigned>(0))?
        .0;
    if counted == governor.states {
        return Ok(());
    }
    let reason = format!("{counted} are in its index, {} were counted", governor.states);
    Err(corrupt(list(scan), reason))
}

/// A scan that continues after a row starts at that row. If it did not meet it, then the row must
/// not exist: else the index led to the wrong place, and rows may have been passed over.
fn refuse_lost_cursor(conn: &Connection, scan: &Scan, after: &Name) -> Rows<()> {
    let key =
        Key { governor: scan.governor.clone(), kind: scan.kind, name: after.clone(), version: 0 };
    match named_row(conn, &key)? {
        None => Ok(()),
        Some(_) => Err(corrupt(list(scan), format!("its index does not lead to {after}"))),
    }
}

fn list(scan: &Scan) -> String {
    format!("the list of {} in {}", scan.kind.as_str(), scan.governor)
}

fn scan_versions(conn: &Connection, scan: &Scan, name: &Name, from: u64, to: u64) -> Rows<Page> {
    let mut gather = Gather { scan, documents: Vec::new(), bytes: 0 };
    let key =
        Key { governor: scan.governor.clone(), kind: scan.kind, name: name.clone(), version: 0 };
    let most = i64::MAX as u64;
    let Some(state) = state_of(conn, &key)?.filter(|_| from <= to && from <= most) else {
        return Ok(gather.page(false));
    };
    let mut statement = conn.prepare_cached(statements(scan.kind).scan)?;
    let mut rows = statement.query(params![state, Unsigned(from), Unsigned(to.min(most))])?;
    while let Some(row) = rows.next()? {
        if gather.is_full() {
            return Ok(gather.page(true));
        }
        let key = Key { version: row.get::<_, Unsigned>(0)?.0, ..key.clone() };
        if let Some(document) = stored(row, 1)?.document(&key).0 {
            let follows = gather.documents.last().is_none_or(|last| last.key.version < key.version);
            if !follows || key.version < from {
                return Err(corrupt(&key, "its index is out of order"));
            }
            gather.push(document);
        }
    }
    drop(rows);
    Ok(gather.page(false))
}

/// Before a governor is called absent, the table itself is read: its index may have lost the name. A
/// state would be found by its hash; a listing has no hash to look for.
fn refuse_lost_governor(conn: &Connection, name: &Name) -> Rows<()> {
    check_governors(conn)?;
    let there = conn
        .prepare_cached("SELECT 1 FROM governor NOT INDEXED WHERE name = ?1")?
        .exists([name.as_str()])?;
    if there {
        return Err(corrupt(
            format!("the index of governor {name}"),
            "it does not find the governor",
        ));
    }
    Ok(())
}

/// Governors are never removed, so their ids run without a gap.
fn check_governors(conn: &Connection) -> Rows<()> {
    let (by_name, newest): (u64, u64) = conn
        .prepare_cached(
            "SELECT (SELECT count(*) FROM governor WHERE name > ''), \
             (SELECT coalesce(max(id), 0) FROM governor)",
        )?
        .query_row([], |row| Ok((row.get::<_, Unsigned>(0)?.0, row.get::<_, Unsigned>(1)?.0)))?;
    let noted = super::file::governors(conn)?;
    if by_name == newest && newest == noted {
        return Ok(());
    }
    Err(corrupt(
        "the list of governors",
        format!("{by_name} are in its index, {newest} in its table, {noted} were counted"),
    ))
}

pub(crate) fn governors(conn: &Connection, after: Option<&Name>, limit: usize) -> Rows<Vec<Name>> {
    check_governors(conn)?;
    let mut statement = conn.prepare_cached(
        "SELECT id, name, states, crc FROM governor WHERE name > ?1 ORDER BY name LIMIT ?2",
    )?;
    let limit = i64::try_from(limit).unwrap_or(i64::MAX);
    let mut rows = statement.query(params![after.map(Name::as_str).unwrap_or_default(), limit])?;
    let mut names = Vec::new();
    while let Some(row) = rows.next()? {
        let name: String = row.get(1)?;
        let found = Name::from_escaped(&name)
            .filter(|found| names.last().or(after).is_none_or(|last| last < found));
        let Some(found) = found else {
            return Err(corrupt("the list of governors", format!("{name:?} is out of place")));
        };
        let crc = governor_crc(row.get(0)?, &found, row.get::<_, Unsigned>(2)?.0);
        if crc != row.get::<_, u32>(3)? {
            return Err(corrupt(format!("the row of governor {name}"), "its check does not hold"));
        }
        names.push(found);
    }
    Ok(names)
}

pub(crate) fn count(conn: &Connection, of: Option<&Name>, kind: Kind) -> Rows<u64> {
    let sql = statements(kind);
    let one = |row: &rusqlite::Row<'_>| row.get::<_, Unsigned>(0);
    let counted = match of {
        None => conn.prepare_cached(sql.count)?.query_row([], one)?,
        Some(name) => match governor(conn, name)? {
            Some(governor) => {
                conn.prepare_cached(sql.count_of_governor)?.query_row([governor.id], one)?
            }
            None => {
                refuse_lost_governor(conn, name)?;
                Unsigned(0)
            }
        },
    };
    Ok(counted.0)
}
