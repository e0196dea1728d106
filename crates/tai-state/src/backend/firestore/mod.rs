//! Google Cloud Firestore, and its emulator.
//!
//! | file | job |
//! |---|---|
//! | `place.rs` | keys to resource names and back |
//! | `value.rs` | JSON bodies to native fields and back; how large they are |
//! | `status.rs` | what an answer means: the one table of errors |
//! | `auth.rs` | the headers that say who asks |
//! | `channel.rs` | connections, deadlines, and which store stands behind them |
//! | `meta.rs` | the document that says which store this is |
//! | `read.rs`, `query.rs` | reading |
//! | `commit.rs` | writing |
//! | `listen.rs` | the alarm |
//!
//! A commit is one `Commit` with a precondition on every document, outside of any transaction on the
//! server: one round trip, and no lock that a dead client leaves behind. Nothing is sent twice here:
//! retries are the work of `records`, which knows how to settle what is unclear.

mod auth;
mod channel;
mod commit;
#[cfg(feature = "testing")]
pub(crate) mod fuzz;
mod listen;
mod meta;
mod place;
mod query;
mod read;
mod status;
#[cfg(all(test, unix, feature = "testing"))]
mod tests;
mod value;

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use googleapis_tonic_google_firestore_v1::google::firestore::v1 as proto;

use self::auth::Auth;
use self::channel::{Line, Target};
use self::commit::Most;
use self::place::Place;
use self::read::{Reader, failed};
use self::status::Call;
use super::{
    Alarm, Backend, BackendError, Committed, Document, Found, Identity, Key, Kind, Limits, Moment,
    Name, Page, Query, Read, Scan, Write,
};
use crate::clock::{Clock, SystemClock};
use crate::error::{Error, Result};
use crate::reader::lift;
use crate::schema::Meta;
use crate::url::StoreUrl;

const GOOGLE: &str = "firestore.googleapis.com";
/// Bytes of one commit: Google takes 10 MiB, the emulator 4 MiB.
const GOOGLE_TAKES: u64 = 9 << 20;
const EMULATOR_TAKES: u64 = 4 << 20;
/// Writes of one commit. Google's documentation names no number any more; it was 500 for long.
const MOST_WRITES: usize = 500;
/// Up to how many bytes an event repeats the state before it.
const REPEAT_BEFORE: usize = 256 << 10;
/// The node that changes are counted under: one for the whole database, so that clocks do not grow with
/// processes, and another for each database, so that none is taken for another.
fn node(store: &str, incarnation: u64) -> String {
    // Short, since it stands in every clock.
    let (_, own) = store.rsplit_once('-').unwrap_or_default();
    match incarnation {
        1 => format!("hub-{own}"),
        again => format!("hub-{own}.{again}"),
    }
}

/// How long finding credentials may take: where there are none, a metadata server is waited for.
const CREDENTIALS_WITHIN: Duration = Duration::from_secs(4);
/// How long looking for the store may take. The first call of all that an emulator gets loads its
/// classes.
const OPEN_WITHIN: Duration = Duration::from_secs(30);

/// How to open a store on Firestore.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct FirestoreConfig {
    /// The Google Cloud project.
    pub project: String,
    /// The database.
    pub database: String,
    /// What stands before the names of the collections.
    pub prefix: String,
    /// `host:port` of an emulator; else Google.
    pub emulator: Option<String>,
    /// Whether the emulator may be elsewhere than on this machine: what goes there is not encrypted.
    pub allow_remote_emulator: bool,
    /// How long one call may take.
    pub attempt_timeout: Duration,
    /// Whether a store may be made where there is none.
    pub create: bool,
}

impl FirestoreConfig {
    /// A store in the database `(default)` of a project, on Google.
    pub fn new(project: impl Into<String>) -> Self {
        Self {
            project: project.into(),
            database: "(default)".into(),
            prefix: String::new(),
            emulator: None,
            allow_remote_emulator: false,
            attempt_timeout: Duration::from_secs(10),
            create: true,
        }
    }
}

/// A store on Firestore.
#[derive(Debug)]
pub struct FirestoreBackend {
    line: Arc<Line>,
    reader: Reader,
    identity: Identity,
    location: String,
    is_emulator: bool,
}

impl FirestoreBackend {
    /// Finds the store, or makes one where there is none and `create` is set.
    ///
    /// # Errors
    /// [`Error::InvalidState`] for names that Firestore does not take, [`Error::PermissionDenied`]
    /// without credentials or rights, [`Error::NotAStore`] when there is no such database or no store
    /// in it, [`Error::NewerFormat`], [`Error::Firestore`] when it cannot be reached.
    pub async fn open(config: FirestoreConfig) -> Result<Self> {
        let location = location(&config);
        let target = target(&config, &location)?;
        let is_emulator = config.emulator.is_some();
        let auth = auth(&config, &location)?;
        let credentials = tokio::time::timeout(CREDENTIALS_WITHIN, auth.headers()).await;
        match credentials.map(|headers| headers.map(drop)) {
            Ok(Ok(())) => {}
            Ok(Err(status)) => return Err(no_way(&location, status.message())),
            Err(_) => return Err(no_way(&location, "nobody gave out credentials")),
        }
        let place = Place::new(&config.project, &config.database, &config.prefix);
        let line = Arc::new(Line::new(target, auth, place, config.attempt_timeout));
        let meta = match tokio::time::timeout(OPEN_WITHIN, find(&line, config.create)).await {
            Ok(found) => found.map_err(|error| unopened(error, &location, is_emulator))?,
            Err(_) => {
                let silent = BackendError::Unavailable(format!("no answer within {OPEN_WITHIN:?}"));
                return Err(unopened(silent, &location, is_emulator));
            }
        };
        let Some(meta) = meta else {
            let reason = "there is no store yet".to_owned();
            return Err(Error::NotAStore { location, reason });
        };
        if meta.format > crate::chain::FORMAT {
            let (found, supported) = (meta.format, crate::chain::FORMAT);
            return Err(Error::NewerFormat { location, found, supported });
        }
        line.expect(&meta.store);
        line.note(&meta);
        if is_emulator {
            tracing::warn!(location, store = meta.store, "opened a store on a Firestore EMULATOR");
        } else {
            tracing::info!(location, store = meta.store, "opened a store on Firestore");
        }
        let node = node(&meta.store, meta.incarnation);
        let identity = Identity { store: meta.store, incarnation: meta.incarnation, node };
        let reader = Reader::new(Arc::clone(&line));
        Ok(Self { line, reader, identity, location, is_emulator })
    }
}

/// Reads which store it is, or makes one.
async fn find(line: &Arc<Line>, create: bool) -> Result<Option<Meta>, BackendError> {
    loop {
        let answered = line.call(
            || meta::request(line.place()),
            |mut client, request| async move {
                meta::read(client.batch_get_documents(request).await?.into_inner()).await
            },
        );
        let (found, _) = answered.await.map_err(failed(Call::Read))?;
        let found = found
            .map_err(|reason| BackendError::Corrupt { location: line.place().meta(), reason })?;
        if found.is_some() || !create {
            return Ok(found);
        }
        let meta = Meta {
            format: crate::chain::FORMAT,
            store: crate::clock::random_id().to_string(),
            incarnation: 1,
            created_at: crate::chain::format_time(&crate::clock::to_micros(SystemClock.now())),
            moved_to: None,
        };
        match make(line, &meta).await {
            Ok(()) => return Ok(Some(meta)),
            // Somebody else made it meanwhile, or it is not known whether we did: look again.
            Err(BackendError::Conflict | BackendError::Indeterminate(_)) => {}
            Err(error) => return Err(error),
        }
    }
}

async fn make(line: &Arc<Line>, meta: &Meta) -> Result<(), BackendError> {
    let invalid = |error: serde_json::Error| BackendError::Invalid(error.to_string());
    let name = line.place().meta();
    let text = serde_json::to_string(meta).map_err(invalid)?;
    let fields = value::to_fields(&text, Place::name_bytes(&name)).map_err(invalid)?;
    let document = proto::Document { name, fields, ..proto::Document::default() };
    let absent = proto::precondition::ConditionType::Exists(false);
    let message = proto::CommitRequest {
        database: line.place().database().to_owned(),
        writes: vec![proto::Write {
            operation: Some(proto::write::Operation::Update(document)),
            current_document: Some(proto::Precondition { condition_type: Some(absent) }),
            ..proto::Write::default()
        }],
        ..proto::CommitRequest::default()
    };
    let answered = line.call(
        || message.clone(),
        |mut client, request| async move { Ok(client.commit(request).await?.into_inner()) },
    );
    answered.await.map(drop).map_err(failed(Call::Commit))
}

fn location(config: &FirestoreConfig) -> String {
    // Before an `@` may stand a password. Such names are refused, by an error that says where.
    let shown = |name: &String| match name.rsplit_once('@') {
        Some((_, name)) => format!("…@{name}"),
        None => name.clone(),
    };
    let (project, database) = (shown(&config.project), shown(&config.database));
    let prefix = shown(&config.prefix);
    match config.emulator.as_ref().map(shown) {
        Some(host) => StoreUrl::FirestoreEmulator { host, project, database, prefix },
        None => StoreUrl::Firestore { project, database, prefix },
    }
    .to_string()
    .replace(char::is_control, "?")
}

/// Where to connect, after looking at all names: they go into headers and resource names.
fn target(config: &FirestoreConfig, location: &str) -> Result<Target> {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.' | ':');
    let is_plain = |text: &str| !text.is_empty() && text.len() <= 100 && text.chars().all(plain);
    // Not `..`, which would change where a resource's name leads.
    let is_name = |text: &str| is_plain(text) && text.starts_with(|c: char| c.is_alphanumeric());
    if !is_name(&config.project) {
        return Err(Error::refused(location, "this is no name of a Google Cloud project"));
    }
    if config.database != "(default)" && !is_name(&config.database) {
        return Err(Error::refused(location, "this is no name of a Firestore database"));
    }
    let in_prefix = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-');
    if config.prefix.len() > 64 || !config.prefix.chars().all(in_prefix) {
        return Err(Error::refused(
            location,
            "a prefix has at most 64 letters, digits, underscores and hyphens",
        ));
    }
    let Some(emulator) = &config.emulator else {
        return Ok(Target { host: GOOGLE.into(), port: 443, tls: true });
    };
    let parts = emulator.rsplit_once(':').and_then(|(host, port)| {
        let host = host.strip_prefix('[').and_then(|it| it.strip_suffix(']')).unwrap_or(host);
        Some((host.to_owned(), port.parse::<u16>().ok()?))
    });
    let Some((host, port)) = parts.filter(|(host, _)| is_plain(host)) else {
        return Err(Error::refused(location, "an emulator is written HOST:PORT"));
    };
    let is_here =
        host == "localhost" || host.parse::<IpAddr>().is_ok_and(|address| address.is_loopback());
    if !is_here && !config.allow_remote_emulator {
        return Err(Error::refused(
            location,
            "an emulator is spoken to without encryption, so only on this machine; \
             allow_remote_emulator permits another",
        ));
    }
    Ok(Target { host, port, tls: false })
}

fn auth(config: &FirestoreConfig, location: &str) -> Result<Auth> {
    if config.emulator.is_some() {
        return Ok(Auth::Emulator);
    }
    // By Google's own convention such a project never exists.
    if config.project.starts_with("demo-") {
        return Err(no_way(
            location,
            "a project whose name begins with `demo-` is only for an emulator",
        ));
    }
    #[cfg(feature = "gcp-auth")]
    return match auth::google::Google::find() {
        Ok(google) => Ok(Auth::Google(google)),
        Err(reason) => Err(no_way(location, &reason)),
    };
    #[cfg(not(feature = "gcp-auth"))]
    Err(no_way(location, "this build lacks the feature `gcp-auth`"))
}

/// Neither an emulator nor credentials: what can be done.
fn no_way(location: &str, reason: &str) -> Error {
    Error::PermissionDenied {
        location: location.to_owned(),
        reason: format!(
            "{reason}. Three ways out: (1) start Google's emulator and set \
             FIRESTORE_EMULATOR_HOST=127.0.0.1:8080; (2) give credentials by \
             `gcloud auth application-default login` or GOOGLE_APPLICATION_CREDENTIALS; \
             (3) use a file instead: StateStore::open(\"app.tai\"), or -u app.tai"
        ),
    }
}

fn unopened(error: BackendError, location: &str, is_emulator: bool) -> Error {
    match error {
        BackendError::Unavailable(reason) | BackendError::Indeterminate(reason) if is_emulator => {
            Error::Firestore {
                message: format!("{reason}; is the emulator at {location} running?"),
                source: None,
            }
        }
        error => lift(error, location),
    }
}

#[async_trait]
impl Read for FirestoreBackend {
    async fn get(&self, keys: &[Key]) -> Result<Vec<Option<Document>>, BackendError> {
        self.reader.get(keys).await
    }

    async fn scan(&self, scan: &Scan) -> Result<Page, BackendError> {
        self.reader.scan(scan).await
    }

    async fn names(
        &self,
        governor: &Name,
        kind: Kind,
        after: Option<&Name>,
        limit: usize,
    ) -> Result<Vec<Name>, BackendError> {
        self.reader.names(governor, kind, after, limit).await
    }

    async fn governors(
        &self,
        after: Option<&Name>,
        limit: usize,
    ) -> Result<Vec<Name>, BackendError> {
        self.reader.governors(after, limit).await
    }

    async fn query(&self, query: &Query) -> Result<Found, BackendError> {
        self.reader.query(query).await
    }

    async fn count(&self, governor: Option<&Name>, kind: Kind) -> Result<u64, BackendError> {
        self.reader.count(governor, kind).await
    }
}

#[async_trait]
impl Backend for FirestoreBackend {
    async fn commit(&self, writes: Vec<Write>) -> Result<Committed, BackendError> {
        if let Some(to) = self.line.moved_to() {
            return Err(BackendError::Moved(to.clone()));
        }
        let Limits { commit_bytes: bytes, commit_writes: writes_at_most, .. } = self.limits();
        commit::commit(&self.line, writes, Most { bytes, writes: writes_at_most }).await
    }

    async fn view(&self) -> Result<Box<dyn Read>, BackendError> {
        Ok(Box::new(self.reader.fixed()))
    }

    async fn watch(
        &self,
        governor: &Name,
        kind: Kind,
        name: Option<&Name>,
    ) -> Result<Box<dyn Alarm>, BackendError> {
        let scope = listen::Scope { governor: governor.clone(), kind, name: name.cloned() };
        Ok(Box::new(listen::listen(&self.line, scope).await?))
    }

    async fn get_at(&self, keys: &[Key]) -> Result<(Vec<Option<Document>>, Moment), BackendError> {
        self.reader.get_at(keys).await
    }

    fn limits(&self) -> Limits {
        Limits {
            commit_bytes: if self.is_emulator { EMULATOR_TAKES } else { GOOGLE_TAKES },
            commit_writes: MOST_WRITES,
            reads_are_cheap: false,
            cuts_are_exact: !self.is_emulator,
            repeat_before: REPEAT_BEFORE,
        }
    }

    fn identity(&self) -> Identity {
        self.identity.clone()
    }

    fn location(&self) -> String {
        self.location.clone()
    }

    /// Firestore's own structure is Google's to check.
    async fn check_structure(&self) -> Result<Vec<String>, BackendError> {
        Ok(Vec::new())
    }
}
