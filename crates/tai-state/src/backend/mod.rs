//! The port: all that a storage engine must promise so that the rest of the crate holds.
//!
//! A *document* is a [`Key`], a [`Body`] (a JSON object) and a [`Revision`]. A backend keeps
//! documents, reads them, and commits lists of guarded writes. It knows nothing of states, events
//! or versions: every decision of the domain is made above the port, before a commit.
//!
//! The contract stands at each method. [`testing::conformance`](crate::testing::conformance) is the
//! same contract as a list of tests: a new backend is right when that list passes. [`memory`] is the
//! shortest backend that passes it; read it first.

use std::collections::BTreeSet;
use std::fmt;

use async_trait::async_trait;
use serde::Serialize;
use serde::de::DeserializeOwned;

pub use crate::clock::Moment;
pub use crate::keys::{Key, Kind, Name};

mod bell;
#[cfg(feature = "embedded")]
pub mod embedded;
#[cfg(feature = "firestore")]
pub mod firestore;
pub(crate) mod matching;
pub mod memory;
mod query;

pub use query::{Cursor, Direction, Field, Found, Query, Test, refuse_query};

/// The body of a document: the text of one JSON object.
///
/// A backend may keep it as text or as native fields; what it gives back must be the same JSON
/// value, numbers included (`1` and `1.0` are different, so are `0.0` and `-0.0`).
/// Its `Debug` says how long it is, and not what it says: it stands in errors and logs of engines.
#[derive(Clone, PartialEq, Eq)]
pub struct Body {
    text: String,
    /// Why it is not what was written, where the backend can tell.
    damage: Option<&'static str>,
}

impl fmt::Debug for Body {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Body({} bytes)", self.text.len())
    }
}

impl Body {
    /// The body for anything that serialises to a JSON object.
    ///
    /// # Errors
    /// What `serde_json` says.
    pub fn new<T: Serialize>(value: &T) -> Result<Self, serde_json::Error> {
        serde_json::to_string(value).map(Self::from_text)
    }

    /// Takes the text of a JSON object as it was stored. It is parsed when it is used.
    #[must_use]
    pub fn from_text(text: String) -> Self {
        Self { text, damage: None }
    }

    /// For backends that prove what they read: what is left of a body that is not what was written. Whoever reads
    /// it gets an error; its document can be found, replaced and removed like any other, so that what can
    /// be made anew is.
    #[must_use]
    pub fn damaged(text: String, reason: &'static str) -> Self {
        Self { text, damage: Some(reason) }
    }

    /// The text.
    #[must_use]
    pub fn as_text(&self) -> &str {
        &self.text
    }

    /// Reads it.
    ///
    /// # Errors
    /// What `serde_json` says, without what it quotes of the body; that it is damaged.
    pub fn parse<T: DeserializeOwned>(&self) -> Result<T, serde_json::Error> {
        if let Some(reason) = self.damage {
            return Err(serde::de::Error::custom(reason));
        }
        serde_json::from_str(&self.text).map_err(crate::json::without_values)
    }
}

/// A backend's token for one state of one document: compared for equality, nothing else.
///
/// Every `Put` that changes its document gives it a revision that this document never had before,
/// also when an older body comes back, and also after a delete. A `Put` of the very body that stands
/// there may leave the revision as it is, as Firestore does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Revision(u64);

impl Revision {
    /// For backends: wraps their token.
    #[must_use]
    pub const fn new(token: u64) -> Self {
        Self(token)
    }

    /// For backends: their token.
    #[must_use]
    pub fn token(self) -> u64 {
        self.0
    }
}

/// A document as it was read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Document {
    /// Where it stands.
    pub key: Key,
    /// What it says.
    pub body: Body,
    /// Its revision.
    pub revision: Revision,
}

impl Document {
    /// The length of its body in bytes.
    pub(crate) fn bytes(&self) -> u64 {
        self.body.as_text().len() as u64
    }
}

/// What must be true of a document for a write to happen. There is no default: a forgotten guard
/// must not compile.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Precondition {
    /// Nothing.
    Any,
    /// It must not exist.
    Absent,
    /// It must exist.
    Present,
    /// It must exist with this revision.
    Revision(Revision),
}

/// What a write does.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Operation {
    /// Creates or replaces the document.
    Put(Body),
    /// Removes the document; one that is absent stays absent.
    Delete,
    /// Changes nothing: only the precondition is checked.
    Check,
}

/// One guarded write.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Write {
    /// The document.
    pub key: Key,
    /// What to do.
    pub operation: Operation,
    /// What must be true of it.
    pub precondition: Precondition,
}

impl Write {
    /// Creates or replaces a document.
    #[must_use]
    pub fn put(key: Key, body: Body, precondition: Precondition) -> Self {
        Self { key, operation: Operation::Put(body), precondition }
    }

    /// Removes a document.
    #[must_use]
    pub fn delete(key: Key, precondition: Precondition) -> Self {
        Self { key, operation: Operation::Delete, precondition }
    }

    /// Guards a document that was read and is not written.
    #[must_use]
    pub fn check(key: Key, precondition: Precondition) -> Self {
        Self { key, operation: Operation::Check, precondition }
    }
}

/// Which documents a [`scan`](Read::scan) reads.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Range {
    /// The documents of an unversioned kind with a name after this one; all of them for `None`.
    Names {
        /// The last name that is not wanted any more.
        after: Option<Name>,
    },
    /// The documents of a versioned kind with this name and a version in `from..=to`.
    Versions {
        /// The name.
        name: Name,
        /// The first version.
        from: u64,
        /// The last version.
        to: u64,
    },
}

/// One ordered reading of one kind within one governor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Scan {
    /// The governor.
    pub governor: Name,
    /// The kind: versioned for [`Range::Versions`], not for [`Range::Names`].
    pub kind: Kind,
    /// Which of its documents.
    pub range: Range,
    /// How many at most in one page. A backend may give fewer, so that a page stays small in bytes.
    pub limit: usize,
}

impl Scan {
    /// The scan that continues after a page with these documents.
    #[must_use]
    pub fn after(&self, documents: &[Document]) -> Option<Scan> {
        let last = &documents.last()?.key;
        let range = match &self.range {
            Range::Names { .. } => Range::Names { after: Some(last.name.clone()) },
            Range::Versions { name, to, .. } => {
                Range::Versions { name: name.clone(), from: last.version.checked_add(1)?, to: *to }
            }
        };
        Some(Scan { range, ..self.clone() })
    }
}

/// A page of a scan.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Page {
    /// The documents, ascending by name or version.
    pub documents: Vec<Document>,
    /// The scan that continues after this page; `None` when there is nothing more.
    pub next: Option<Scan>,
}

/// What an alarm says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Rung {
    /// These documents may have changed.
    Names(BTreeSet<Name>),
    /// Anything may have changed: after a gap, or where it is not known.
    Anything,
}

/// Wakes its holder when documents change. It is an alarm, not a log: changes may be told late,
/// together, or without need, but never not at all.
#[async_trait]
pub trait Alarm: Send + fmt::Debug {
    /// Waits until something may have changed since [`watch`](Backend::watch) returned or since the
    /// last ring. A backend that loses its line to the storage mends it by itself and then rings for
    /// [`Anything`](Rung::Anything). May be dropped and called again without losing a ring.
    ///
    /// # Errors
    /// Only what waiting does not cure, such as a permission.
    async fn ring(&mut self) -> Result<Rung, BackendError>;
}

/// What a commit answers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Committed {
    /// For every write, in order, the revision that its document has now; `None` if it is absent.
    pub revisions: Vec<Option<Revision>>,
}

/// What a backend takes at most. A request beyond it is refused before it is sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Bytes of the bodies of one commit together.
    pub commit_bytes: u64,
    /// Writes in one commit.
    pub commit_writes: usize,
    /// Whether a read costs far less than a commit (a file) or about the same (a network). Decides
    /// whether it pays to guess that a document is absent rather than to look.
    pub reads_are_cheap: bool,
    /// Whether every read of several documents is one cut. Google's emulator may show half a
    /// commit; then a reader of several documents checks what it read by a commit of
    /// [`Check`](Operation::Check)s.
    pub cuts_are_exact: bool,
    /// Up to how many bytes an event repeats the state before it, for readers with other tools.
    pub repeat_before: usize,
}

/// Which store this is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// A UUID given at creation.
    pub store: String,
    /// One, in every store so far; a later build may count it up for a copy (docs/decisions/0018).
    pub incarnation: u64,
    /// The node that this store counts its changes under in vector clocks.
    pub node: String,
}

/// Why a backend did not do what it was asked, by what the room above does next.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BackendError {
    /// A precondition did not hold; nothing was written. Which one is not promised.
    #[error("a precondition did not hold")]
    Conflict,
    /// Surely not applied; the same request may work later.
    #[error("unavailable: {0}")]
    Unavailable(String),
    /// It may have been applied: settle before answering.
    #[error("the outcome is unknown: {0}")]
    Indeterminate(String),
    /// Surely not applied, and asked to wait: try again, but not soon.
    #[error("asked to wait: {0}")]
    Throttled(String),
    /// The service knows no such project or database.
    #[error("there is no such database: {0}")]
    NoDatabase(String),
    /// The query needs an index that the database does not have.
    #[error("an index is missing: {0}")]
    NeedsIndex(String),
    /// Another store stands where this one was opened, or none any more.
    #[error("the store {expected} is not there any more: {found}")]
    Replaced {
        /// The identity of the store that was opened.
        expected: String,
        /// What was found.
        found: String,
    },
    /// Not allowed.
    #[error("denied: {0}")]
    Denied(String),
    /// Never possible, such as a scan of versions over a kind that has none.
    #[error("invalid: {0}")]
    Invalid(String),
    /// Beyond a limit.
    #[error("{what} is too large: {size} bytes, the limit is {limit}")]
    TooLarge {
        /// What was measured.
        what: String,
        /// Its size.
        size: u64,
        /// The limit.
        limit: u64,
    },
    /// What is stored is damaged.
    #[error("damaged: {location}: {reason}")]
    Corrupt {
        /// Which document or file.
        location: String,
        /// What does not fit.
        reason: String,
    },
    /// No space; the commit was rolled back.
    #[error("the storage is full")]
    Full,
    /// A write or sync failed earlier; this handle writes no more.
    #[error("the storage failed: {0}")]
    Failed(String),
    /// The store was moved to this place.
    #[error("moved to {0}")]
    Moved(String),
}

/// Reading. A backend reads the newest committed documents; a [view](Backend::view) reads one cut.
#[async_trait]
pub trait Read: Send + Sync + fmt::Debug {
    /// The documents at `keys`, in that order, `None` for those that are absent.
    ///
    /// All of them from one consistent cut: a commit is seen whole or not at all. (Google's
    /// emulator breaks this for plain readers; so callers ask for a head first, and commits write
    /// it last.)
    ///
    /// # Errors
    /// [`Corrupt`](BackendError::Corrupt) when one of them is damaged: never a wrong or a missing
    /// document in its place.
    async fn get(&self, keys: &[Key]) -> Result<Vec<Option<Document>>, BackendError>;

    /// The documents of a range, ascending by the bytes of the name or by version: no gaps, no
    /// doubles. [`Page::next`] continues it; documents written in between may or may not appear
    /// on a later page.
    ///
    /// # Errors
    /// [`Invalid`](BackendError::Invalid) when kind and range do not fit.
    async fn scan(&self, scan: &Scan) -> Result<Page, BackendError>;

    /// The names of the documents of an unversioned kind after a name, ascending, at most `limit`,
    /// whether or not their bodies can be read: for those who look for damage.
    ///
    /// # Errors
    /// As [`scan`](Read::scan), but for damaged bodies.
    async fn names(
        &self,
        governor: &Name,
        kind: Kind,
        after: Option<&Name>,
        limit: usize,
    ) -> Result<Vec<Name>, BackendError>;

    /// The governors that have, or had, a document, ascending, after the given one, at most
    /// `limit`.
    ///
    /// # Errors
    /// As [`get`](Read::get).
    async fn governors(
        &self,
        after: Option<&Name>,
        limit: usize,
    ) -> Result<Vec<Name>, BackendError>;

    /// The documents whose bodies match. One page is one cut; documents written between two pages
    /// may or may not appear.
    ///
    /// # Errors
    /// [`Invalid`](BackendError::Invalid) for a query that no backend can answer (see
    /// [`refuse_query`]); [`NeedsIndex`](BackendError::NeedsIndex).
    async fn query(&self, query: &Query) -> Result<Found, BackendError>;

    /// How many documents of a kind there are, in one governor or in all.
    ///
    /// # Errors
    /// As [`get`](Read::get).
    async fn count(&self, governor: Option<&Name>, kind: Kind) -> Result<u64, BackendError>;
}

/// A storage engine.
#[async_trait]
pub trait Backend: Read + 'static {
    /// Applies all writes or none.
    ///
    /// When it returns `Ok`, all of them are durable and every later read sees them. All
    /// preconditions are judged against the state before the commit. A document stands at most
    /// once in the list. The order of the list is the order in which a reader that is not
    /// protected from half a commit may see the documents: heads come last.
    ///
    /// # Errors
    /// [`Conflict`](BackendError::Conflict) when a precondition does not hold;
    /// [`Indeterminate`](BackendError::Indeterminate) when the answer was lost, after which the
    /// same list may be sent again; [`Invalid`](BackendError::Invalid) when a document stands
    /// twice.
    async fn commit(&self, writes: Vec<Write>) -> Result<Committed, BackendError>;

    /// A reader whose answers all come from one cut, taken not before this call. Hold it for
    /// a short time only: a file cannot reclaim space behind it.
    ///
    /// # Errors
    /// As [`get`](Read::get).
    async fn view(&self) -> Result<Box<dyn Read>, BackendError>;

    /// An alarm for the documents of an unversioned kind in a governor, or for one of them.
    ///
    /// # Errors
    /// [`Invalid`](BackendError::Invalid) for a versioned kind; as [`get`](Read::get).
    async fn watch(
        &self,
        governor: &Name,
        kind: Kind,
        name: Option<&Name>,
    ) -> Result<Box<dyn Alarm>, BackendError>;

    /// As [`get`](Read::get), and when that was by the backend's own clock, by which leases are
    /// judged. All who use the store share the clock, or its moments are of different epochs; and
    /// no change of a machine's wall time moves it.
    ///
    /// # Errors
    /// As [`get`](Read::get).
    async fn get_at(&self, keys: &[Key]) -> Result<(Vec<Option<Document>>, Moment), BackendError>;

    /// What it takes at most.
    fn limits(&self) -> Limits;

    /// Which store this is.
    fn identity(&self) -> Identity;

    /// Where it is, safe to log: no credentials.
    fn location(&self) -> String;

    /// Looks through its own structure for damage that reading single documents may not meet, and
    /// says what it finds. May take as long as reading everything.
    ///
    /// # Errors
    /// As [`get`](Read::get).
    async fn check_structure(&self) -> Result<Vec<String>, BackendError>;
}

/// Refuses a list in which a document stands twice, or a check that checks nothing: no backend gives
/// that a meaning.
///
/// # Errors
/// [`BackendError::Invalid`] naming the document.
pub fn refuse_doubles(writes: &[Write]) -> Result<(), BackendError> {
    let empty = |write: &&Write| {
        write.operation == Operation::Check && write.precondition == Precondition::Any
    };
    if let Some(write) = writes.iter().find(empty) {
        return Err(BackendError::Invalid(format!("the check of {} checks nothing", write.key)));
    }
    let mut keys: Vec<&Key> = writes.iter().map(|write| &write.key).collect();
    keys.sort_unstable();
    match keys.windows(2).find(|pair| pair.first() == pair.last()) {
        Some(pair) => Err(BackendError::Invalid(format!(
            "{} stands twice in one commit",
            pair.first().map(ToString::to_string).unwrap_or_default()
        ))),
        None => Ok(()),
    }
}

/// Refuses a scan whose range does not fit its kind.
///
/// # Errors
/// [`BackendError::Invalid`].
pub fn refuse_misfit(scan: &Scan) -> Result<(), BackendError> {
    let versions = matches!(scan.range, Range::Versions { .. });
    if versions == scan.kind.is_versioned() && scan.limit > 0 {
        return Ok(());
    }
    Err(BackendError::Invalid(format!(
        "a scan of {} with limit {} over {:?}",
        scan.kind.as_str(),
        scan.limit,
        scan.range
    )))
}
