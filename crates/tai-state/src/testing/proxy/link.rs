//! One client's connection, and the connection to the server behind it.

use std::error::Error;
use std::future::{Future, pending};
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use http::header::{CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue};
use http::{Request, Response, Uri, Version};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Empty, Full};
use hyper::body::{Body, Frame, Incoming};
use hyper::client::conn::http2::SendRequest;
use hyper::rt::Executor;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tokio::sync::{mpsc, oneshot};

use super::meter::Record;
use super::narrow::Narrow;
use super::rules::{Code, Fault};
use super::{Shared, lock, wire};

/// What a connection is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Order {
    /// End without a word.
    Cut,
    /// Take no more calls, and end when those under way have.
    GoAway,
}

type Broken = Box<dyn Error + Send + Sync>;
type Flow = UnsyncBoxBody<Bytes, hyper::Error>;

/// Streams that one side gave up are remembered, so that what still comes for them is no offence.
const GIVEN_UP: usize = 100_000;

/// Serves a client until it leaves, the server leaves or an order says so.
pub(super) async fn run(shared: Arc<Shared>, number: u64, client: TcpStream) {
    // A client whose server is not there must not get further than a connection that ends.
    let Ok((upstream, address, gone)) = connect(&shared).await else { return };
    let (orders, mut inbox) = mpsc::unbounded_channel();
    let _listed = Listed::new(&shared, number, orders.clone());
    let link = Arc::new(Link { shared: Arc::clone(&shared), upstream, address, orders });
    let service = service_fn(move |request| serve(Arc::clone(&link), request));
    let _ = client.set_nodelay(true);
    let client = Narrow::new(client, Arc::clone(&shared.width));
    let mut server = hyper::server::conn::http2::Builder::new(Tasks(Arc::clone(&shared)));
    // A test may have many calls under way and give many of them up.
    server.max_concurrent_streams(None).auto_date_header(false);
    server.max_pending_accept_reset_streams(GIVEN_UP).max_local_error_reset_streams(None);
    let mut connection = pin!(server.serve_connection(TokioIo::new(client), service));
    let mut gone = pin!(gone);
    loop {
        tokio::select! {
            biased;
            order = inbox.recv() => match order {
                Some(Order::GoAway) => connection.as_mut().graceful_shutdown(),
                Some(Order::Cut) | None => return,
            },
            _ = gone.as_mut() => return,
            _ = connection.as_mut() => return,
        }
    }
}

/// Connects to the server. The receiver wakes when that connection has ended.
async fn connect(
    shared: &Arc<Shared>,
) -> Result<(SendRequest<Flow>, String, oneshot::Receiver<()>), Broken> {
    let address = lock(&shared.upstream).clone();
    let stream = TcpStream::connect(&address).await?;
    stream.set_nodelay(true)?;
    let mut client = hyper::client::conn::http2::Builder::new(Tasks(Arc::clone(shared)));
    client.max_concurrent_reset_streams(GIVEN_UP);
    let (upstream, connection) = client.handshake(TokioIo::new(stream)).await?;
    let (ended, gone) = oneshot::channel();
    shared.spawn(async move {
        let _ = connection.await;
        drop(ended);
    });
    Ok((upstream, address, gone))
}

/// Keeps a connection on the list of those that can be cut.
struct Listed<'a>(&'a Shared, u64);

impl<'a> Listed<'a> {
    fn new(shared: &'a Shared, number: u64, orders: mpsc::UnboundedSender<Order>) -> Self {
        lock(&shared.links).insert(number, orders);
        Self(shared, number)
    }
}

impl Drop for Listed<'_> {
    fn drop(&mut self) {
        lock(&self.0.links).remove(&self.1);
    }
}

/// Runs what a connection needs so that it ends with the proxy.
#[derive(Clone)]
struct Tasks(Arc<Shared>);

impl<F: Future<Output: Send> + Send + 'static> Executor<F> for Tasks {
    fn execute(&self, task: F) {
        self.0.spawn(async move {
            task.await;
        });
    }
}

/// A call's request: as a whole, or what comes of it.
enum Payload {
    Whole(Bytes),
    Stream(Incoming),
}

struct Link {
    shared: Arc<Shared>,
    upstream: SendRequest<Flow>,
    /// The server's `host:port`.
    address: String,
    orders: mpsc::UnboundedSender<Order>,
}

async fn serve(link: Arc<Link>, request: Request<Incoming>) -> Result<Response<Flow>, Broken> {
    let (head, body) = request.into_parts();
    let method = head.uri.path().rsplit('/').next().unwrap_or_default().to_owned();
    let (payload, seen) = if matches!(method.as_str(), "Listen" | "Write") {
        (Payload::Stream(body), Bytes::new())
    } else {
        let whole = body.collect().await?.to_bytes();
        (Payload::Whole(whole.clone()), whole)
    };
    let fault = link.shared.fault(&method, &seen);
    let record = link.shared.meter.arrived(&method, fault.clone());
    let call = Arc::new(Passing { link, head, record: Arc::clone(&record) });
    let answer = with_fault(call, payload, fault).await?;
    record.answered(answer.headers());
    let noted = answer.map(|body| {
        let noted = body.map_frame(move |frame| {
            if let Some(trailers) = frame.trailers_ref() {
                record.answered(trailers);
            }
            frame
        });
        noted.boxed_unsync()
    });
    Ok(noted)
}

async fn with_fault(
    call: Arc<Passing>,
    payload: Payload,
    fault: Option<Fault>,
) -> Result<Response<Flow>, Broken> {
    let Some(fault) = fault else { return call.forward(payload).await };
    match fault {
        Fault::DropRequest => pending().await,
        Fault::Answer(code) => Ok(status(code, "")),
        Fault::AnswerWith { code, message } => Ok(status(code, &message)),
        Fault::Reset => call.cut().await,
        Fault::Delay(time) => {
            tokio::time::sleep(time).await;
            call.forward(payload).await
        }
        Fault::GoAway => {
            let answer = call.forward(payload).await?;
            let _ = call.link.orders.send(Order::GoAway);
            Ok(answer)
        }
        Fault::AnswerPart { messages, code } => {
            let mut answer = call.landed(payload).await?;
            // Where an answer that is a status alone has it.
            answer.headers_mut().remove("grpc-status");
            answer.headers_mut().remove("grpc-message");
            let cut = wire::Cut::after(messages);
            Ok(answer.map(|inner| Part { inner: Some(inner), cut, code }.boxed_unsync()))
        }
        Fault::LoseReply => {
            call.landed(payload).await?;
            Err("the answer was lost".into())
        }
        Fault::AnswerAfter(code) => {
            call.landed(payload).await?;
            Ok(status(code, ""))
        }
        Fault::ResetAfter => {
            let _ = call.landed(payload).await?;
            call.cut().await
        }
        Fault::Stall(time) => {
            let answer = call.landed(payload).await?;
            tokio::time::sleep(time).await;
            Ok(answer)
        }
        Fault::StallRequest(time) => {
            let late = Arc::clone(&call);
            let landing = async move {
                tokio::time::sleep(time).await;
                late.whole(payload).await
            };
            call.whatever_the_client_does(landing).await
        }
        Fault::Duplicate => {
            let first = match &payload {
                Payload::Whole(whole) => Some(Payload::Whole(whole.clone())),
                Payload::Stream(_) => None,
            };
            let twice = Arc::clone(&call);
            let landing = async move {
                if let Some(first) = first {
                    twice.whole(first).await?;
                }
                twice.whole(payload).await
            };
            call.whatever_the_client_does(landing).await
        }
    }
}

/// A call on its way to the server.
struct Passing {
    link: Arc<Link>,
    head: http::request::Parts,
    record: Arc<Record>,
}

impl Passing {
    /// Sends it to the server; its answer comes as the server gives it.
    async fn forward(&self, payload: Payload) -> Result<Response<Flow>, Broken> {
        let mut request = Request::new(());
        *request.method_mut() = self.head.method.clone();
        *request.version_mut() = Version::HTTP_2;
        *request.headers_mut() = self.head.headers.clone();
        let path = self.head.uri.path_and_query().map_or("/", |path| path.as_str());
        let server = Uri::builder().scheme("http").authority(self.link.address.as_str());
        *request.uri_mut() = server.path_and_query(path).build()?;
        let (seen, body) = match payload {
            // Through `map_frame`, which hides the length: no client of gRPC sends one.
            Payload::Whole(whole) => (
                whole.clone(),
                Full::new(whole)
                    .map_frame(|frame| frame)
                    .map_err(|never| match never {})
                    .boxed_unsync(),
            ),
            Payload::Stream(body) => (Bytes::new(), body.boxed_unsync()),
        };
        let mut upstream = self.link.upstream.clone();
        upstream.ready().await?;
        self.link.shared.meter.forwarded(&self.record, &seen);
        let answer = upstream.send_request(request.map(|()| body)).await?;
        let shared = Arc::clone(&self.link.shared);
        Ok(answer.map(|body| match shared.meter.reader(&self.record.method) {
            None => body.boxed_unsync(),
            Some(mut reader) => {
                let counted = body.map_frame(move |frame| {
                    if let Some(piece) = frame.data_ref() {
                        shared.meter.read(&mut reader, piece);
                    }
                    frame
                });
                counted.boxed_unsync()
            }
        }))
    }

    /// As [`Passing::forward`], but the answer is there as a whole, unless the call is a stream of
    /// requests: its answer may have no end.
    async fn whole(&self, payload: Payload) -> Result<Response<Flow>, Broken> {
        let stream = matches!(payload, Payload::Stream(_));
        let answer = self.forward(payload).await?;
        if stream || answer.body().is_end_stream() {
            return Ok(answer);
        }
        let (head, body) = answer.into_parts();
        let whole = body.collect().await?;
        Ok(Response::from_parts(head, whole.map_err(|never| match never {}).boxed_unsync()))
    }

    /// As [`Passing::whole`], also if the client gives up meanwhile.
    async fn landed(self: &Arc<Self>, payload: Payload) -> Result<Response<Flow>, Broken> {
        let call = Arc::clone(self);
        self.whatever_the_client_does(async move { call.whole(payload).await }).await
    }

    /// What serves a client ends when the client gives up. This goes on.
    async fn whatever_the_client_does(
        &self,
        work: impl Future<Output = Result<Response<Flow>, Broken>> + Send + 'static,
    ) -> Result<Response<Flow>, Broken> {
        let (done, answer) = oneshot::channel();
        self.link.shared.spawn(async move {
            let _ = done.send(work.await);
        });
        answer.await?
    }

    /// Ends the client's connection.
    async fn cut<T>(&self) -> T {
        let _ = self.link.orders.send(Order::Cut);
        pending().await
    }
}

/// An answer of a status alone, in the headers.
fn status(code: Code, message: &str) -> Response<Flow> {
    let empty = Empty::new().map_err(|never| match never {});
    let mut answer = Response::new(empty.boxed_unsync());
    *answer.version_mut() = Version::HTTP_2;
    answer.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
    put_status(answer.headers_mut(), code, message);
    answer
}

fn put_status(headers: &mut HeaderMap, code: Code, message: &str) {
    headers.insert(HeaderName::from_static("grpc-status"), HeaderValue::from(code.0));
    // gRPC's percent encoding: all that is not printable ASCII, and the percent sign.
    let encode = |byte| match byte {
        b' '..=b'~' if byte != b'%' => char::from(byte).to_string(),
        _ => format!("%{byte:02X}"),
    };
    let encoded: String = message.bytes().map(encode).collect();
    if let Ok(message) = HeaderValue::from_str(&encoded) {
        headers.insert(HeaderName::from_static("grpc-message"), message);
    }
}

/// The first messages of an answer, and then a status.
struct Part {
    /// None once the status has been given.
    inner: Option<Flow>,
    cut: wire::Cut,
    code: Code,
}

impl Body for Part {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        let this = &mut *self;
        let Some(inner) = &mut this.inner else { return Poll::Ready(None) };
        if !this.cut.reached() {
            let frame = ready!(Pin::new(inner).poll_frame(context)).transpose()?;
            if let Some(Ok(mut piece)) = frame.map(Frame::into_data) {
                piece.truncate(this.cut.before(&piece));
                return Poll::Ready(Some(Ok(Frame::data(piece))));
            }
        }
        this.inner = None;
        let mut trailers = HeaderMap::new();
        put_status(&mut trailers, this.code, "");
        Poll::Ready(Some(Ok(Frame::trailers(trailers))))
    }
}
