//! The connections to the service: opened when needed, watched, and never mended in silence.
//!
//! One HTTP/2 connection to Google carries about 100 calls at a time and queues the rest, so there
//! may be several; each call takes the one with the least to do. A connection is used until it breaks
//! and then thrown away: its successor first looks whether the same store still stands behind it. So
//! an emulator that came back empty, or an address that leads elsewhere now, is noticed before
//! anything is written to it. It also tells a call that was never sent from one whose answer was lost.

use std::fmt;
use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use googleapis_tonic_google_firestore_v1::google::firestore::v1::firestore_client::FirestoreClient;
use http::{HeaderMap, HeaderValue, Uri};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tonic::metadata::MetadataMap;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Extensions, Request, Status};

use super::auth::Auth;
use super::place::Place;
use super::status::Unanswered;
use crate::clock::Stopwatch;

/// Connections at most.
const MOST_CONNECTIONS: usize = 4;
/// Calls on every connection before another is opened.
const BUSY: usize = 64;
/// How long connecting may take, and with it looking which store stands behind the connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(4);
const OPEN_TIMEOUT: Duration = Duration::from_secs(10);
/// The longest time limit of a call.
const LONGEST_LIMIT: Duration = Duration::from_secs(24 * 60 * 60);
/// Bytes of one message from the service: a page of a list may hold many documents.
const MOST_RECEIVED: usize = 64 << 20;
/// What may be under way towards us: a page of large documents should not wait for each other.
const STREAM_WINDOW: u32 = 2 << 20;
const CONNECTION_WINDOW: u32 = 8 << 20;

pub(super) type Client = FirestoreClient<Channel>;

/// Where to connect.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Target {
    pub(super) host: String,
    pub(super) port: u16,
    pub(super) tls: bool,
}

/// The connections of one store.
pub(super) struct Line {
    target: Target,
    auth: Auth,
    place: Place,
    /// How long one call may take.
    limit: Duration,
    connections: Mutex<Vec<Arc<Connection>>>,
    /// Held while a connection is opened, so that many callers open one.
    opening: tokio::sync::Mutex<()>,
    /// The store that must stand behind every connection, once it is known.
    expected: OnceLock<String>,
    moved_to: OnceLock<String>,
}

impl fmt::Debug for Line {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { target, auth, place, .. } = self;
        f.debug_struct("Line")
            .field("target", target)
            .field("auth", auth)
            .field("place", place)
            .finish_non_exhaustive()
    }
}

struct Connection {
    client: Client,
    calls: AtomicUsize,
}

/// A connection while it is used by one call or stream.
pub(super) struct Lent(Arc<Connection>);

impl Lent {
    pub(super) fn client(&self) -> Client {
        self.0.client.clone()
    }

    fn new(connection: &Arc<Connection>) -> Self {
        connection.calls.fetch_add(1, Ordering::Relaxed);
        Self(Arc::clone(connection))
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        self.0.calls.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Why a connection is not used.
pub(super) enum Unusable {
    /// It could not be opened, or broke.
    Failed(Unanswered),
    /// Another store stands behind it.
    Replaced { expected: String, found: String },
}

impl From<Unanswered> for Unusable {
    fn from(failure: Unanswered) -> Self {
        Self::Failed(failure)
    }
}

impl Line {
    pub(super) fn new(target: Target, auth: Auth, place: Place, limit: Duration) -> Self {
        Self {
            target,
            auth,
            place,
            // The library refuses to send a longer one.
            limit: limit.min(LONGEST_LIMIT),
            connections: Mutex::default(),
            opening: tokio::sync::Mutex::default(),
            expected: OnceLock::new(),
            moved_to: OnceLock::new(),
        }
    }

    pub(super) fn place(&self) -> &Place {
        &self.place
    }

    /// How long one call may take.
    pub(super) fn limit(&self) -> Duration {
        self.limit
    }

    /// Where the store has been moved, as far as it is known here.
    pub(super) fn moved_to(&self) -> Option<&String> {
        self.moved_to.get()
    }

    /// Notes what the document about the store says of its place.
    pub(super) fn note(&self, meta: &crate::schema::Meta) {
        if let Some(to) = &meta.moved_to {
            let _ = self.moved_to.set(to.clone());
        }
    }

    /// From now on only this store is spoken to.
    pub(super) fn expect(&self, store: &str) {
        let _ = self.expected.set(store.to_owned());
    }

    /// Makes one call within the time limit. What was surely not sent because a connection had gone
    /// is sent once on a new one.
    pub(super) async fn call<Message, Answer, Making, Work>(
        &self,
        mut message: impl FnMut() -> Message,
        work: Work,
    ) -> Result<Answer, Unusable>
    where
        Work: Fn(Client, Request<Message>) -> Making,
        Making: Future<Output = Result<Answer, Status>>,
    {
        let started = Stopwatch::start();
        let mut again = true;
        loop {
            let left = self.limit.saturating_sub(started.elapsed());
            let expired =
                || Status::deadline_exceeded(format!("no answer within {:?}", self.limit));
            let Ok(lent) = tokio::time::timeout(left, self.lend()).await else {
                return Err(Unanswered::not_sent(expired()).into());
            };
            let lent = lent?;
            let left = self.limit.saturating_sub(started.elapsed());
            let answered = tokio::time::timeout(left, async {
                let request = self.request(message(), left).await?;
                work(lent.client(), request).await.map_err(unanswered)
            });
            let failure = match answered.await {
                Ok(Ok(answer)) => return Ok(answer),
                Ok(Err(failure)) => failure,
                Err(_) => Unanswered::sent(expired()),
            };
            let is_broken = is_broken(&failure);
            if is_broken {
                self.retire(&lent.0);
            }
            if !(is_broken && !failure.sent && std::mem::take(&mut again)) {
                return Err(failure.into());
            }
        }
    }

    /// What became of a stream on this connection: one that broke is not used any more.
    pub(super) fn stream_ended(&self, lent: &Lent, status: Status) -> Unusable {
        let failure = unanswered(status);
        if is_broken(&failure) {
            self.retire(&lent.0);
        }
        failure.into()
    }

    /// A message with all headers.
    pub(super) async fn request<Message>(
        &self,
        message: Message,
        left: Duration,
    ) -> Result<Request<Message>, Unanswered> {
        let headers = self.auth.headers().await.map_err(Unanswered::not_sent)?;
        let metadata = MetadataMap::from_headers(self.routed(headers));
        let mut request = Request::from_parts(metadata, Extensions::default(), message);
        request.set_timeout(left);
        Ok(request)
    }

    /// Adds the headers by which Google routes a call to its database.
    fn routed(&self, mut headers: HeaderMap) -> HeaderMap {
        let place = &self.place;
        let (project, database) = (place.project(), place.database_id());
        let routing = format!("project_id={project}&database_id={database}");
        for (name, value) in [
            ("google-cloud-resource-prefix", HeaderValue::from_str(place.database())),
            ("x-goog-request-params", HeaderValue::from_str(&routing)),
        ] {
            // Project and database were checked when the store was opened.
            if let Ok(value) = value {
                headers.insert(name, value);
            }
        }
        headers
    }

    /// The connection with the least to do.
    pub(super) async fn lend(&self) -> Result<Lent, Unusable> {
        if let Some(lent) = self.idle() {
            return Ok(lent);
        }
        let _opening = self.opening.lock().await;
        // Somebody may have opened one meanwhile.
        if let Some(lent) = self.idle() {
            return Ok(lent);
        }
        // Whoever waits here waits with all others, so it ends whatever the other side does.
        let within = self.limit.min(OPEN_TIMEOUT);
        let opened = tokio::time::timeout(within, self.open()).await.unwrap_or_else(|_| {
            let status = Status::unavailable(format!("no connection within {within:?}"));
            Err(Unanswered::not_sent(status).into())
        });
        let connection = match (opened, self.least_busy()) {
            (Ok(connection), _) => Arc::new(connection),
            // One more would have been better; those that are there will do.
            (Err(Unusable::Failed(_)), Some(lent)) => return Ok(lent),
            (Err(failure), _) => return Err(failure),
        };
        let lent = Lent::new(&connection);
        self.connections().push(connection);
        Ok(lent)
    }

    /// The connection with the least to do, unless another should be opened.
    fn idle(&self) -> Option<Lent> {
        let connections = self.connections();
        let least = connections.iter().min_by_key(|it| it.calls.load(Ordering::Relaxed))?;
        let is_busy = least.calls.load(Ordering::Relaxed) >= BUSY;
        (!is_busy || connections.len() >= MOST_CONNECTIONS).then(|| Lent::new(least))
    }

    fn least_busy(&self) -> Option<Lent> {
        let connections = self.connections();
        connections.iter().min_by_key(|it| it.calls.load(Ordering::Relaxed)).map(Lent::new)
    }

    fn connections(&self) -> std::sync::MutexGuard<'_, Vec<Arc<Connection>>> {
        self.connections.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn retire(&self, broken: &Arc<Connection>) {
        self.connections().retain(|connection| !Arc::ptr_eq(connection, broken));
    }

    async fn open(&self) -> Result<Connection, Unusable> {
        let Target { host, port, tls } = &self.target;
        let refused = |error: &dyn std::error::Error| {
            let cause = root_cause(error);
            let text = format!("cannot connect to {host}:{port}: {cause}");
            Unusable::Failed(Unanswered::not_sent(Status::unavailable(text)))
        };
        let scheme = if *tls { "https" } else { "http" };
        let bracketed = if host.contains(':') { format!("[{host}]") } else { host.clone() };
        let endpoint = Endpoint::from_shared(format!("{scheme}://{bracketed}:{port}"))
            .map_err(|error| refused(&error))?
            .tcp_nodelay(true)
            .initial_stream_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW);
        let endpoint = secured(endpoint, *tls).map_err(|error| refused(&error))?;
        let once = Once { host: host.clone(), port: *port, used: Arc::default() };
        let connecting = endpoint.connect_with_connector(once);
        let channel = match tokio::time::timeout(CONNECT_TIMEOUT, connecting).await {
            Ok(channel) => channel.map_err(|error| refused(&error))?,
            Err(_) => return Err(refused(&io::Error::from(io::ErrorKind::TimedOut))),
        };
        let client = FirestoreClient::new(channel).max_decoding_message_size(MOST_RECEIVED);
        if let Some(expected) = self.expected.get() {
            self.check(client.clone(), expected).await?;
        }
        Ok(Connection { client, calls: AtomicUsize::new(0) })
    }

    /// Looks which store stands behind a new connection.
    async fn check(&self, mut client: Client, expected: &str) -> Result<(), Unusable> {
        let message = super::meta::request(&self.place);
        let request = self.request(message, self.limit).await?;
        let looked = async {
            let answers = client.batch_get_documents(request).await?.into_inner();
            super::meta::read(answers).await
        };
        let found = match looked.await {
            Ok((Ok(found), _)) => found.map(|meta| {
                self.note(&meta);
                meta.store
            }),
            Ok((Err(reason), _)) => {
                let (expected, found) = (expected.to_owned(), reason);
                return Err(Unusable::Replaced { expected, found });
            }
            // Nothing of the caller's was sent yet.
            Err(status) => return Err(Unanswered::not_sent(status).into()),
        };
        match found {
            Some(found) if found == expected => Ok(()),
            other => Err(Unusable::Replaced {
                expected: expected.to_owned(),
                found: other.map_or_else(
                    || "there is no store any more".to_owned(),
                    |found| format!("the store {found} stands there"),
                ),
            }),
        }
    }
}

#[cfg(feature = "gcp-auth")]
fn secured(endpoint: Endpoint, tls: bool) -> Result<Endpoint, tonic::transport::Error> {
    /// Google asks for no more than one ping a minute; the emulator for none.
    const PING_EVERY: Duration = Duration::from_secs(60);
    const PING_TIMEOUT: Duration = Duration::from_secs(20);
    if !tls {
        return Ok(endpoint);
    }
    let config = tonic::transport::ClientTlsConfig::new().with_native_roots();
    Ok(endpoint
        .tls_config(config)?
        .http2_keep_alive_interval(PING_EVERY)
        .keep_alive_timeout(PING_TIMEOUT))
}

#[cfg(not(feature = "gcp-auth"))]
fn secured(endpoint: Endpoint, _: bool) -> Result<Endpoint, tonic::transport::Error> {
    Ok(endpoint)
}

/// Whether a connection should not be used any more.
fn is_broken(failure: &Unanswered) -> bool {
    use std::error::Error;
    // What the service itself says has no source; a deadline that passed may be a line that is dead.
    let status = &failure.status;
    !failure.sent || status.source().is_some() || status.code() == Code::DeadlineExceeded
}

fn unanswered(status: Status) -> Unanswered {
    let mut cause = std::error::Error::source(&status);
    while let Some(error) = cause {
        if error.is::<Gone>() {
            return Unanswered::not_sent(Status::unavailable("the connection had gone"));
        }
        cause = error.source();
    }
    Unanswered::sent(status)
}

fn root_cause(error: &dyn std::error::Error) -> String {
    let mut last = error;
    while let Some(source) = last.source() {
        last = source;
    }
    last.to_string()
}

/// Connects once. A second attempt would be a reconnection behind our back.
#[derive(Debug, Clone)]
struct Once {
    host: String,
    port: u16,
    used: Arc<AtomicBool>,
}

/// The connection is gone, and what should have been sent on it was not.
#[derive(Debug, thiserror::Error)]
#[error("the connection is gone")]
struct Gone;

type BoxError = Box<dyn std::error::Error + Send + Sync>;

impl tower_service::Service<Uri> for Once {
    type Response = TokioIo<TcpStream>;
    type Error = BoxError;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, BoxError>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, _: Uri) -> Self::Future {
        let Self { host, port, used } = self.clone();
        Box::pin(async move {
            if used.swap(true, Ordering::AcqRel) {
                return Err(Gone.into());
            }
            let stream = TcpStream::connect((host.as_str(), port)).await?;
            stream.set_nodelay(true)?;
            Ok(TokioIo::new(stream))
        })
    }
}
