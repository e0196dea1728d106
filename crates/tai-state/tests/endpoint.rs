//! What stands behind the address of an emulator: it gets no credentials, and it cannot make us take memory.

#![cfg(feature = "firestore")]
#![allow(clippy::unwrap_used, clippy::panic)]

use std::convert::Infallible;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, Request, Response};
use http_body_util::StreamBody;
use hyper::body::{Frame, Incoming};
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use tai_state::backend::firestore::{FirestoreBackend, FirestoreConfig};
use tokio::net::TcpListener;

/// Answers every call with a message that is said to have so many bytes, and sends bytes for as long as they
/// are taken; counts them.
async fn endless(said: u32) -> (String, Arc<Mutex<HeaderMap>>, Arc<Mutex<u64>>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let (headers, sent) = (Arc::new(Mutex::new(HeaderMap::new())), Arc::new(Mutex::new(0)));
    let (seen, count) = (Arc::clone(&headers), Arc::clone(&sent));
    tokio::spawn(async move {
        loop {
            let stream = TokioIo::new(listener.accept().await.unwrap().0);
            let (seen, count) = (Arc::clone(&seen), Arc::clone(&count));
            let service = service_fn(move |request: Request<Incoming>| {
                *seen.lock().unwrap() = request.headers().clone();
                let count = Arc::clone(&count);
                async move {
                    let first = [&[0][..], &said.to_be_bytes()].concat();
                    let mut first = Some(Bytes::from(first));
                    let parts = futures(move || {
                        let part = first.take().unwrap_or_else(|| Bytes::from(vec![10; 1 << 16]));
                        *count.lock().unwrap() += part.len() as u64;
                        part
                    });
                    let answer = Response::builder().header("content-type", "application/grpc");
                    Ok::<_, Infallible>(answer.body(StreamBody::new(parts)).unwrap())
                }
            });
            tokio::spawn(async move {
                let server = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
                let _ = server.serve_connection(stream, service).await;
            });
        }
    });
    (address, headers, sent)
}

/// A stream without an end.
fn futures(
    mut next: impl FnMut() -> Bytes,
) -> impl tokio_stream::Stream<Item = Result<Frame<Bytes>, Infallible>> {
    tokio_stream::iter(std::iter::from_fn(move || Some(Ok(Frame::data(next())))))
}

async fn opened(address: &str) -> tai_state::Error {
    let mut config = FirestoreConfig::new("demo-endless");
    config.emulator = Some(address.to_owned());
    config.attempt_timeout = Duration::from_secs(5);
    let opening = FirestoreBackend::open(config);
    tokio::time::timeout(Duration::from_secs(20), opening).await.unwrap().unwrap_err()
}

/// By the length that it is said to have, before a byte of it is kept.
#[tokio::test(flavor = "multi_thread")]
async fn an_answer_that_is_far_too_large_is_refused() {
    for said in [u32::MAX, 65 << 20] {
        let (address, _, sent) = endless(said).await;
        let error = opened(&address).await;
        let sent = *sent.lock().unwrap();
        assert!(sent < 32 << 20, "{sent} bytes were taken: {error}");
        assert!(error.to_string().contains("message length too large"), "{error:?}");
    }
}

/// An emulator's own well-known name goes to it, whatever credentials the machine has.
#[tokio::test(flavor = "multi_thread")]
async fn an_emulator_gets_no_credentials() {
    let (address, headers, _) = endless(u32::MAX).await;
    opened(&address).await;
    let headers = headers.lock().unwrap();
    assert_eq!(headers.get("authorization").unwrap(), "Bearer owner");
    assert_eq!(headers.get_all("authorization").iter().count(), 1);
    assert!(!headers.contains_key("x-goog-user-project"), "{headers:?}");
}
