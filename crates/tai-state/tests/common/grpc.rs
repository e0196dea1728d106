//! A gRPC server that says what it got, and a gRPC client that says what it sees, both by hand: they
//! need nothing of what is tested, and can see what a real client hides.

use std::convert::Infallible;
use std::future::Future;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, Request, Response};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Empty, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::client::conn::http2::SendRequest;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use tai_state::testing::proxy::Proxy;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio_stream::wrappers::ReceiverStream;

pub(crate) type Flow = UnsyncBoxBody<Bytes, hyper::Error>;
pub(crate) type Pieces = mpsc::Sender<Result<Frame<Bytes>, Infallible>>;

/// Nothing here takes a second; what hangs shall be a failure.
pub(crate) async fn soon<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(20), future).await.expect("it hangs")
}

/// One gRPC message.
pub(crate) fn message(content: &[u8]) -> Vec<u8> {
    let mut framed = vec![0];
    framed.extend(u32::try_from(content.len()).unwrap().to_be_bytes());
    framed.extend(content);
    framed
}

/// A field of a message, with bytes in it (at most 127).
pub(crate) fn field(number: u8, content: &[u8]) -> Vec<u8> {
    let mut field = vec![number << 3 | 2, u8::try_from(content.len()).unwrap()];
    field.extend(content);
    field
}

pub(crate) fn trailers(status: u32) -> Frame<Bytes> {
    let mut trailers = HeaderMap::new();
    trailers.insert("grpc-status", status.into());
    trailers.insert("x-trailer", "kept".parse().unwrap());
    Frame::trailers(trailers)
}

fn pieces(pieces: Vec<Frame<Bytes>>) -> Flow {
    let pieces = pieces.into_iter().map(Ok::<_, Infallible>);
    StreamBody::new(tokio_stream::iter(pieces)).map_err(|never| match never {}).boxed_unsync()
}

/// A body of one message.
pub(crate) fn whole(content: &[u8]) -> Flow {
    pieces(vec![Frame::data(Bytes::from(message(content)))])
}

pub(crate) fn nothing() -> Flow {
    Empty::new().map_err(|never| match never {}).boxed_unsync()
}

pub(crate) fn channel() -> (Pieces, Flow) {
    let (sender, receiver) = mpsc::channel(10);
    let body = StreamBody::new(ReceiverStream::new(receiver));
    (sender, body.map_err(|never| match never {}).boxed_unsync())
}

/// A server that answers by method and remembers what it got.
pub(crate) struct Upstream {
    pub(crate) address: String,
    pub(crate) got: watch::Receiver<Vec<(String, Bytes)>>,
    pub(crate) headers: Arc<Mutex<HeaderMap>>,
    /// Calls that the client gave up before the end.
    pub(crate) given_up: watch::Receiver<usize>,
    /// Connections that are open.
    pub(crate) open: watch::Receiver<usize>,
    /// Lets `Hold` answer.
    pub(crate) release: watch::Sender<bool>,
    task: JoinHandle<()>,
}

impl Drop for Upstream {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Counts a call as given up unless it is told that it came to its end.
struct GivenUp(Arc<watch::Sender<usize>>, bool);

impl Drop for GivenUp {
    fn drop(&mut self) {
        if !self.1 {
            self.0.send_modify(|count| *count += 1);
        }
    }
}

impl Upstream {
    pub(crate) async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let (gets, got) = watch::channel(Vec::new());
        let (gives, given_up) = watch::channel(0);
        let (release, released) = watch::channel(false);
        let (opens, open) = watch::channel(0);
        let opens = Arc::new(opens);
        let (gets, gives) = (Arc::new(gets), Arc::new(gives));
        let headers = Arc::new(Mutex::new(HeaderMap::new()));
        let seen = Arc::clone(&headers);
        let task = tokio::spawn(async move {
            let mut connections = tokio::task::JoinSet::new();
            loop {
                let stream = TokioIo::new(listener.accept().await.unwrap().0);
                let (gets, gives) = (Arc::clone(&gets), Arc::clone(&gives));
                let (released, headers) = (released.clone(), Arc::clone(&seen));
                let service = service_fn(move |request: Request<Incoming>| {
                    *headers.lock().unwrap() = request.headers().clone();
                    let given_up = GivenUp(Arc::clone(&gives), false);
                    answer(request, Arc::clone(&gets), given_up, released.clone())
                });
                let opens = Arc::clone(&opens);
                opens.send_modify(|count| *count += 1);
                connections.spawn(async move {
                    let server = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
                    let _ = server.serve_connection(stream, service).await;
                    opens.send_modify(|count| *count -= 1);
                });
            }
        });
        Self { address, got, headers, given_up, open, release, task }
    }

    /// The calls that came, by now.
    pub(crate) fn got(&self) -> Vec<String> {
        self.got.borrow().iter().map(|(method, _)| method.clone()).collect()
    }

    pub(crate) async fn has_got(&mut self, calls: usize) {
        soon(self.got.wait_for(|got| got.len() >= calls)).await.unwrap();
    }
}

async fn answer(
    request: Request<Incoming>,
    gets: Arc<watch::Sender<Vec<(String, Bytes)>>>,
    mut call: GivenUp,
    mut released: watch::Receiver<bool>,
) -> Result<Response<Flow>, hyper::Error> {
    let method = request.uri().path().rsplit('/').next().unwrap().to_owned();
    let got = |body: Bytes| gets.send_modify(|got| got.push((method.clone(), body)));
    if method == "Listen" {
        got(Bytes::new());
        // An echo that ends with the request.
        let echo = request.into_body().map_frame(move |frame| {
            let _held = &call;
            frame
        });
        return Ok(Response::new(echo.boxed_unsync()));
    }
    if method == "Write" {
        got(Bytes::new());
        // Says nothing, and ends only when it is given up.
        let (sender, body) = channel();
        let body = body.map_frame(move |frame| {
            let _held = (&call, &sender);
            frame
        });
        return Ok(Response::new(body.boxed_unsync()));
    }
    let body = request.into_body().collect().await?.to_bytes();
    got(body.clone());
    if method == "Hold" {
        released.wait_for(|released| *released).await.unwrap();
    }
    call.1 = true;
    if method == "Fail" {
        let mut answer = Response::new(nothing());
        answer.headers_mut().insert("grpc-status", 5.into());
        answer.headers_mut().insert("grpc-message", "no%20such".parse().unwrap());
        return Ok(answer);
    }
    let data = match method.as_str() {
        // The first and the last without a document, the second cut in two.
        "RunQuery" => vec![
            message(&field(3, b"time")),
            message(&field(1, b"document"))[..7].to_vec(),
            [&message(&field(1, b"document"))[7..], &message(&field(1, b"d"))[..]].concat(),
            message(&field(3, b"time")),
        ],
        "RunQueryOfNothing" => vec![],
        "ListDocuments" => {
            vec![message(&[field(1, b"a"), field(1, b"b"), field(2, b"c")].concat())]
        }
        _ => vec![message(&[b"answer ", gets.borrow().len().to_string().as_bytes()].concat())],
    };
    let data = data.into_iter().map(|piece| Frame::data(Bytes::from(piece)));
    let mut answer = Response::new(pieces(data.chain([trailers(0)]).collect()));
    answer.headers_mut().insert("x-header", "kept".parse().unwrap());
    Ok(answer)
}

/// A client's connection.
pub(crate) struct Client {
    sender: SendRequest<Flow>,
    connection: JoinHandle<Result<(), hyper::Error>>,
    /// What it says that its calls are about.
    pub(crate) database: String,
}

/// What a client gets.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Answer {
    pub(crate) status: Option<String>,
    pub(crate) message: Option<String>,
    pub(crate) body: Bytes,
}

impl Answer {
    pub(crate) fn status(code: u32) -> Self {
        Self { status: Some(code.to_string()), message: Some(String::new()), body: Bytes::new() }
    }

    /// The upstream's answer to the n-th call that it got.
    pub(crate) fn nth(n: usize) -> Self {
        let body = message(format!("answer {n}").as_bytes()).into();
        Self { status: Some("0".into()), message: None, body }
    }
}

impl Client {
    pub(crate) async fn connect(proxy: &Proxy) -> Self {
        Self::try_connect(proxy).await.unwrap()
    }

    pub(crate) async fn try_connect(proxy: &Proxy) -> Result<Self, hyper::Error> {
        let stream = TokioIo::new(TcpStream::connect(proxy.address()).await.unwrap());
        let client = hyper::client::conn::http2::Builder::new(TokioExecutor::new());
        let (sender, connection) = soon(client.handshake(stream)).await?;
        Ok(Self { sender, connection: tokio::spawn(connection), database: String::new() })
    }

    pub(crate) async fn send(
        &self,
        method: &str,
        body: Flow,
    ) -> Result<Response<Incoming>, hyper::Error> {
        let request =
            Request::post(format!("http://client/google.firestore.v1.Firestore/{method}"))
                .header("te", "trailers")
                .header("content-type", "application/grpc")
                .header("google-cloud-resource-prefix", &self.database)
                .header("x-request", "kept");
        self.sender.clone().send_request(request.body(body).unwrap()).await
    }

    pub(crate) async fn call(&self, method: &str, body: &[u8]) -> Result<Answer, hyper::Error> {
        let answer = soon(self.send(method, whole(body))).await?;
        let (head, body) = answer.into_parts();
        let body = soon(body.collect()).await?;
        let headers = body.trailers().unwrap_or(&head.headers).clone();
        let text = |name| headers.get(name).map(|value| value.to_str().unwrap().to_owned());
        let (status, message) = (text("grpc-status"), text("grpc-message"));
        Ok(Answer { status, message, body: body.to_bytes() })
    }

    /// A call on its way.
    pub(crate) fn start(&self, method: &'static str) -> JoinHandle<Result<Answer, hyper::Error>> {
        let (sender, connection) = (self.sender.clone(), tokio::spawn(async { Ok(()) }));
        let client = Self { sender, connection, database: self.database.clone() };
        tokio::spawn(async move { client.call(method, b"x").await })
    }

    /// Returns when the other side has ended the connection.
    pub(crate) async fn ended(self) {
        let _ = soon(self.connection).await.unwrap();
        // Until now: without a sender the connection would end by itself.
        drop(self.sender);
    }

    /// Ends the connection.
    pub(crate) async fn leave(self) {
        drop(self.sender);
        let _ = soon(self.connection).await.unwrap();
    }
}
