//! What a client sees through the proxy, and what the server behind it gets.

#![cfg(feature = "firestore")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

#[path = "common/grpc.rs"]
mod grpc;

use std::time::Duration;

use bytes::Bytes;
use grpc::{Answer, Client, Upstream, channel, field, message, nothing, soon, trailers, whole};
use http_body_util::BodyExt;
use hyper::body::{Body, Frame};
use tai_state::testing::proxy::{Code, Fault, Proxy, Rule, Usage, When};
use tokio::net::TcpStream;

/// A server, a proxy before it with a rule for the first `Commit`, and a client.
async fn with(fault: Fault) -> (Upstream, Proxy, Client) {
    let upstream = Upstream::start().await;
    let proxy = Proxy::start(&upstream.address).await.unwrap();
    proxy.inject(Rule::new("Commit", When::Nth(1), fault));
    let client = Client::connect(&proxy).await;
    (upstream, proxy, client)
}

async fn without_faults() -> (Upstream, Proxy, Client) {
    let all = with(Fault::Reset).await;
    all.1.clear_rules();
    all
}

/// The status and the number of landings of the call that came first.
fn first(proxy: &Proxy) -> (Option<u32>, u32) {
    let call = proxy.calls().remove(0);
    (call.grpc_status, call.forwarded)
}

#[tokio::test]
async fn what_passes_is_what_was_sent() {
    let (upstream, proxy, client) = without_faults().await;
    let body = whole(b"sent");
    let answer = client.send("Commit", body).await.unwrap();
    assert_eq!(answer.headers()["x-header"], "kept");
    let body = answer.into_body().collect().await.unwrap();
    assert_eq!(body.trailers().unwrap()["x-trailer"], "kept");
    assert_eq!(body.to_bytes(), message(b"answer 1"));
    let got = upstream.got.borrow().clone();
    assert_eq!(got, [("Commit".to_owned(), Bytes::from(message(b"sent")))]);
    let headers = upstream.headers.lock().unwrap().clone();
    assert_eq!(
        (&headers["te"], &headers["x-request"]),
        (&"trailers".parse().unwrap(), &"kept".parse().unwrap())
    );
    assert!(!headers.contains_key("content-length"));

    // A status alone comes in the headers, and ends the stream there.
    let answer = client.send("Fail", nothing()).await.unwrap();
    assert_eq!(answer.headers()["grpc-message"], "no%20such");
    assert!(answer.body().is_end_stream());
    let calls = proxy.calls();
    let seen: Vec<_> = calls.iter().map(|call| (call.method.as_str(), call.grpc_status)).collect();
    assert_eq!(seen, [("Commit", Some(0)), ("Fail", Some(5))]);
    assert!(calls[0].at <= calls[1].at);
    assert!(calls.iter().all(|call| call.fault.is_none() && call.forwarded == 1));
}

#[tokio::test]
async fn a_stream_passes_both_ways_before_it_ends() {
    let (mut upstream, proxy, client) = without_faults().await;
    let (sender, body) = channel();
    let mut answer = soon(client.send("Listen", body)).await.unwrap().into_body();
    for text in ["one", "two"] {
        sender.send(Ok(Frame::data(text.into()))).await.unwrap();
        let echo = soon(answer.frame()).await.unwrap().unwrap();
        assert_eq!(echo.into_data().unwrap(), text);
    }
    // Another call passes beside it.
    assert_eq!(client.call("Commit", b"x").await.unwrap(), Answer::nth(2));
    // The client's end of it is the server's.
    sender.send(Ok(trailers(0))).await.unwrap();
    drop(sender);
    assert!(soon(answer.frame()).await.unwrap().unwrap().is_trailers());
    assert!(soon(answer.frame()).await.is_none());
    soon(upstream.given_up.wait_for(|count| *count == 1)).await.unwrap();
    assert_eq!(first(&proxy), (Some(0), 1));
}

#[tokio::test]
async fn what_a_client_gives_up_is_given_up_at_the_server() {
    let (mut upstream, proxy, client) = without_faults().await;
    let answer = soon(client.send("Write", nothing())).await.unwrap();
    drop(answer);
    soon(upstream.given_up.wait_for(|count| *count == 1)).await.unwrap();

    let call = client.start("Hold");
    upstream.has_got(2).await;
    call.abort();
    soon(upstream.given_up.wait_for(|count| *count == 2)).await.unwrap();
    assert_eq!(proxy.calls()[1].grpc_status, None);
    assert_eq!(client.call("Commit", b"x").await.unwrap(), Answer::nth(3));

    // The end of the connection too, also of a request that goes on.
    let (_sender, body) = channel();
    let _answer = soon(client.send("Listen", body)).await.unwrap();
    proxy.cut();
    soon(upstream.given_up.wait_for(|count| *count == 3)).await.unwrap();
}

#[tokio::test]
async fn a_dropped_request_is_never_answered() {
    let (upstream, proxy, client) = with(Fault::DropRequest).await;
    let dropped = client.start("Commit");
    while proxy.calls().is_empty() {
        tokio::task::yield_now().await;
    }
    assert_eq!(client.call("Commit", b"x").await.unwrap(), Answer::nth(1));
    assert!(!dropped.is_finished());
    dropped.abort();
    assert_eq!(upstream.got(), ["Commit"]);
    assert_eq!(first(&proxy), (None, 0));
    assert_eq!(proxy.calls()[0].fault, Some(Fault::DropRequest));
}

#[tokio::test]
async fn a_lost_reply_is_a_reset_stream_and_the_connection_lives() {
    let (upstream, proxy, client) = with(Fault::LoseReply).await;
    let error = client.call("Commit", b"x").await.unwrap_err();
    assert!(!error.is_closed() && format!("{error:?}").contains("INTERNAL_ERROR"), "{error:?}");
    assert_eq!((upstream.got().len(), first(&proxy)), (1, (None, 1)));
    assert_eq!(client.call("Commit", b"x").await.unwrap(), Answer::nth(2));
}

#[tokio::test]
async fn an_answer_can_be_given_without_the_server_or_in_its_place() {
    let (upstream, proxy, client) = with(Fault::Answer(Code::UNAVAILABLE)).await;
    assert_eq!(client.call("Commit", b"x").await.unwrap(), Answer::status(14));
    assert_eq!((upstream.got().len(), first(&proxy)), (0, (Some(14), 0)));

    let message = "Größe: 100%\n".to_owned();
    let (upstream, _proxy, client) = with(Fault::AnswerWith { code: Code::ABORTED, message }).await;
    let answer = client.send("Commit", nothing()).await.unwrap();
    assert_eq!(answer.headers()["content-type"], "application/grpc");
    assert_eq!(answer.headers()["grpc-status"], "10");
    assert_eq!(answer.headers()["grpc-message"], "Gr%C3%B6%C3%9Fe: 100%25%0A");
    assert!(answer.body().is_end_stream());
    assert_eq!(upstream.got().len(), 0);

    let (upstream, proxy, client) = with(Fault::AnswerAfter(Code::DEADLINE_EXCEEDED)).await;
    assert_eq!(client.call("Commit", b"x").await.unwrap(), Answer::status(4));
    assert_eq!((upstream.got().len(), first(&proxy)), (1, (Some(4), 1)));
    assert_eq!(client.call("Commit", b"x").await.unwrap(), Answer::nth(2));
}

#[tokio::test]
async fn a_stalled_answer_is_the_servers_and_comes_late_or_never() {
    let time = Duration::from_millis(50);
    let (upstream, proxy, client) = with(Fault::Stall(time)).await;
    let from = tokio::time::Instant::now();
    assert_eq!(client.call("Commit", b"x").await.unwrap(), Answer::nth(1));
    assert!(from.elapsed() >= time);
    assert_eq!((upstream.got().len(), first(&proxy)), (1, (Some(0), 1)));

    let (mut upstream, proxy, client) = with(Fault::Stall(Duration::from_secs(3600))).await;
    let stalled = client.start("Commit");
    upstream.has_got(1).await;
    assert_eq!(client.call("Commit", b"x").await.unwrap(), Answer::nth(2));
    assert!(!stalled.is_finished());
    assert_eq!(first(&proxy), (None, 1));
}

#[tokio::test]
async fn what_is_forwarded_for_a_fault_lands_though_the_client_is_gone() {
    for fault in [Fault::LoseReply, Fault::ResetAfter, Fault::Duplicate] {
        let duplicated = fault == Fault::Duplicate;
        let (mut upstream, proxy, client) = with(Fault::Reset).await;
        proxy.clear_rules();
        proxy.inject(Rule::new("Hold", When::Each, fault));
        let call = client.start("Hold");
        upstream.has_got(1).await;
        call.abort();
        let _ = call.await;
        // What comes after the giving up, on the same ways, has arrived: so has that.
        client.call("Other", b"x").await.unwrap();
        client.leave().await;
        assert_eq!(*upstream.given_up.borrow(), 0);
        upstream.release.send_replace(true);
        upstream.has_got(if duplicated { 3 } else { 2 }).await;
        // It was read to its end, and was not reset before.
        let another = Client::connect(&proxy).await;
        another.call("Commit", b"x").await.unwrap();
        assert_eq!(*upstream.given_up.borrow(), 0);
    }
}

#[tokio::test]
async fn a_stalled_request_lands_late_also_without_its_client() {
    let time = Duration::from_millis(50);
    let (mut upstream, proxy, client) = with(Fault::StallRequest(time)).await;
    let from = tokio::time::Instant::now();
    let call = client.start("Commit");
    assert_eq!(client.call("Other", b"x").await.unwrap(), Answer::nth(1));
    assert_eq!(soon(call).await.unwrap().unwrap(), Answer::nth(2));
    assert!(from.elapsed() >= time);

    proxy.clear_rules();
    proxy.inject(Rule::new("Commit", When::Each, Fault::StallRequest(time)));
    let call = client.start("Commit");
    while proxy.calls().len() < 3 {
        tokio::task::yield_now().await;
    }
    call.abort();
    client.leave().await;
    upstream.has_got(3).await;
    assert_eq!(upstream.got()[2], "Commit");
    assert_eq!(*upstream.given_up.borrow(), 0);
}

#[tokio::test]
async fn a_delayed_request_lands_late_unless_its_client_is_gone() {
    let time = Duration::from_millis(50);
    let (upstream, proxy, client) = with(Fault::Delay(time)).await;
    let from = tokio::time::Instant::now();
    let call = client.start("Commit");
    assert_eq!(client.call("Other", b"x").await.unwrap(), Answer::nth(1));
    assert_eq!(soon(call).await.unwrap().unwrap(), Answer::nth(2));
    assert!(from.elapsed() >= time);

    // Long enough for a busy machine to see that the client gives up.
    let time = Duration::from_millis(300);
    proxy.inject(Rule::new("Commit", When::Each, Fault::Delay(time)));
    let call = client.start("Commit");
    while proxy.calls().len() < 3 {
        tokio::task::yield_now().await;
    }
    call.abort();
    // One that came later and has landed shows that the first will not.
    assert_eq!(client.call("Commit", b"y").await.unwrap(), Answer::nth(3));
    assert_eq!(upstream.got(), ["Other", "Commit", "Commit"]);
    assert_eq!(proxy.calls()[2].forwarded, 0);
}

#[tokio::test]
async fn a_duplicate_lands_twice_and_the_second_answer_counts() {
    let (upstream, proxy, client) = with(Fault::Duplicate).await;
    let commit = field(2, &field(1, b"document"));
    assert_eq!(client.call("Commit", &commit).await.unwrap(), Answer::nth(2));
    let got = upstream.got.borrow().clone();
    assert_eq!((got.len(), &got[0]), (2, &got[1]));
    assert_eq!(first(&proxy), (Some(0), 2));
    assert_eq!((proxy.usage().calls["Commit"], proxy.usage().writes), (1, 2));
}

#[tokio::test]
async fn a_reset_ends_the_connection_before_or_after_the_call_lands() {
    for (fault, landed) in [(Fault::Reset, 0), (Fault::ResetAfter, 1)] {
        let (upstream, proxy, client) = with(fault).await;
        let beside = client.start("Hold");
        client.call("Commit", b"x").await.unwrap_err();
        soon(beside).await.unwrap().unwrap_err();
        client.ended().await;
        assert_eq!(upstream.got().iter().filter(|method| *method == "Commit").count(), landed);
        assert_eq!(proxy.calls().last().unwrap().grpc_status, None);
        let again = Client::connect(&proxy).await;
        assert_eq!(again.call("Commit", b"x").await.unwrap().status.as_deref(), Some("0"));
    }
}

#[tokio::test]
async fn after_a_goaway_calls_under_way_finish_and_the_connection_ends() {
    let (mut upstream, proxy, client) = with(Fault::GoAway).await;
    let beside = client.start("Hold");
    upstream.has_got(1).await;
    assert_eq!(client.call("Commit", b"x").await.unwrap(), Answer::nth(2));
    // The client learns of it soon after the answer, and then makes no more calls here.
    soon(async { while client.call("Commit", b"x").await.is_ok() {} }).await;
    let landed = upstream.got().len();
    assert!(!beside.is_finished());
    upstream.release.send_replace(true);
    assert_eq!(soon(beside).await.unwrap().unwrap().status.as_deref(), Some("0"));
    client.ended().await;
    let again = Client::connect(&proxy).await;
    assert_eq!(again.call("Commit", b"x").await.unwrap(), Answer::nth(landed + 1));
}

#[tokio::test]
async fn a_part_of_an_answer_ends_with_the_status() {
    let (mut upstream, proxy, client) = without_faults().await;
    let code = Code::UNAVAILABLE;
    proxy.inject(Rule::new("RunQuery", When::Nth(1), Fault::AnswerPart { messages: 2, code }));
    let part = client.call("RunQuery", b"x").await.unwrap();
    let two = [message(&field(3, b"time")), message(&field(1, b"document"))].concat();
    assert_eq!((part.status.as_deref(), part.body), (Some("14"), Bytes::from(two)));
    assert_eq!(proxy.calls()[0].grpc_status, Some(14));
    assert_eq!(client.call("RunQuery", b"x").await.unwrap().status.as_deref(), Some("0"));

    // Of a stream too.
    proxy.inject(Rule::new("Listen", When::Each, Fault::AnswerPart { messages: 1, code }));
    let (sender, body) = channel();
    let mut answer = soon(client.send("Listen", body)).await.unwrap().into_body();
    sender.send(Ok(Frame::data(message(b"one").into()))).await.unwrap();
    assert_eq!(soon(answer.frame()).await.unwrap().unwrap().into_data().unwrap(), message(b"one"));
    let end = soon(answer.frame()).await.unwrap().unwrap().into_trailers().unwrap();
    assert_eq!(end["grpc-status"], "14");
    drop(sender);
    soon(upstream.given_up.wait_for(|count| *count == 1)).await.unwrap();

    // And of one that would not end: the server learns of it.
    proxy.inject(Rule::new("Write", When::Each, Fault::AnswerPart { messages: 0, code }));
    let end = soon(client.send("Write", nothing())).await.unwrap().into_body().collect();
    assert_eq!(soon(end).await.unwrap().trailers().unwrap()["grpc-status"], "14");
    soon(upstream.given_up.wait_for(|count| *count == 2)).await.unwrap();

    // A status alone is replaced.
    proxy.inject(Rule::new("Fail", When::Each, Fault::AnswerPart { messages: 1, code }));
    let answer = client.send("Fail", nothing()).await.unwrap();
    assert!(!answer.headers().contains_key("grpc-status"));
    let end = answer.into_body().collect().await.unwrap().trailers().unwrap().clone();
    assert_eq!((&end["grpc-status"], end["grpc-message"].is_empty()), (&14.into(), true));
}

#[tokio::test]
async fn the_first_sending_of_each_body_meets_the_fault() {
    let (upstream, proxy, client) = without_faults().await;
    proxy.inject(Rule::new("Commit", When::First, Fault::LoseReply));
    for body in [b"one", b"two"] {
        client.call("Commit", body).await.unwrap_err();
        assert_eq!(client.call("Commit", body).await.unwrap().status.as_deref(), Some("0"));
    }
    assert_eq!(upstream.got().len(), 4);
    // Of two rules the first decides, and the other counts all the same.
    proxy.clear_rules();
    proxy.inject(Rule::new("Commit", When::Nth(2), Fault::Answer(Code::ABORTED)));
    proxy.inject(Rule::new("*", When::Every(2), Fault::Answer(Code::INTERNAL)));
    let mut seen = Vec::new();
    for _ in 0..4 {
        seen.push(client.call("Commit", b"x").await.unwrap().status.unwrap());
    }
    assert_eq!(seen, ["0", "10", "0", "13"]);
}

#[tokio::test]
async fn documents_are_counted_as_they_would_be_billed() {
    let (_upstream, proxy, client) = without_faults().await;
    let (update, delete, transform, verify) =
        (field(1, b"document"), field(2, b"name"), field(6, b"transform"), field(5, b"name"));
    let guarded = [field(3, b"mask"), update.clone(), field(4, b"precondition")].concat();
    let writes = [&update, &guarded, &delete, &transform, &verify].map(|write| field(2, write));
    let commit = [field(1, b"database"), writes.concat(), field(3, b"transaction")].concat();
    let usage = |reads, writes, deletes| (reads, writes, deletes);
    let counted = || {
        let Usage { reads, writes, deletes, .. } = proxy.usage();
        proxy.reset_usage();
        (reads, writes, deletes)
    };
    client.call("Commit", &commit).await.unwrap();
    assert_eq!(counted(), usage(0, 3, 1));
    client
        .call("BatchGetDocuments", &[field(1, b"db"), field(2, b"a"), field(2, b"b")].concat())
        .await
        .unwrap();
    assert_eq!(counted(), usage(2, 0, 0));
    for method in ["GetDocument", "RunAggregationQuery", "ListCollectionIds"] {
        client.call(method, &commit).await.unwrap();
        assert_eq!(counted(), usage(1, 0, 0));
    }
    client.call("RunQuery", b"x").await.unwrap();
    assert_eq!(counted(), usage(2, 0, 0));
    client.call("ListDocuments", b"x").await.unwrap();
    assert_eq!(counted(), usage(2, 0, 0));
    client.call("UpdateDocument", b"x").await.unwrap();
    client.call("DeleteDocument", b"x").await.unwrap();
    assert_eq!(counted(), usage(0, 1, 1));

    // Nothing found costs one; what does not get to the server costs nothing, and is a call.
    proxy.inject(Rule::new(
        "RunQuery",
        When::Nth(1),
        Fault::AnswerPart { messages: 0, code: Code::OK },
    ));
    client.call("RunQuery", b"x").await.unwrap();
    proxy.inject(Rule::new("Commit", When::Each, Fault::Answer(Code::ABORTED)));
    client.call("Commit", &commit).await.unwrap();
    let calls = proxy.usage().calls;
    assert_eq!(Vec::from_iter(calls), [("Commit".to_owned(), 1), ("RunQuery".to_owned(), 1)]);
    assert_eq!((proxy.calls().len(), counted()), (2, usage(2, 0, 0)));
    assert_eq!((proxy.usage(), proxy.calls()), (Usage::default(), Vec::new()));
}

#[tokio::test]
async fn connections_can_be_refused_and_cut_and_sent_elsewhere() {
    let (upstream, proxy, client) = without_faults().await;
    assert_eq!(client.call("Commit", b"x").await.unwrap(), Answer::nth(1));
    proxy.refuse(true);
    // Those that are open stay.
    assert_eq!(client.call("Commit", b"x").await.unwrap(), Answer::nth(2));
    assert!(nobody_answers(&proxy).await);
    proxy.cut();
    client.ended().await;

    proxy.refuse(false);
    let client = Client::connect(&proxy).await;
    assert_eq!(client.call("Commit", b"x").await.unwrap(), Answer::nth(3));
    let other = Upstream::start().await;
    proxy.set_upstream(&other.address);
    assert_eq!(client.call("Commit", b"x").await.unwrap(), Answer::nth(4));
    let client = Client::connect(&proxy).await;
    assert_eq!(client.call("Commit", b"x").await.unwrap(), Answer::nth(1));
    assert_eq!((upstream.got().len(), other.got().len()), (4, 1));

    // A server that goes takes the connections with it, and its port refuses the next.
    drop(other);
    client.ended().await;
    assert!(nobody_answers(&proxy).await);
}

/// Whether a new connection ends at once.
async fn nobody_answers(proxy: &Proxy) -> bool {
    match Client::try_connect(proxy).await {
        Ok(client) => client.call("Commit", b"x").await.is_err(),
        Err(_) => true,
    }
}

#[tokio::test]
async fn all_ends_with_the_proxy() {
    let (mut upstream, proxy, client) = with(Fault::StallRequest(Duration::from_secs(3600))).await;
    let late = client.start("Commit");
    while proxy.calls().is_empty() {
        tokio::task::yield_now().await;
    }
    let address = proxy.address().to_owned();
    drop(proxy);
    soon(late).await.unwrap().unwrap_err();
    client.ended().await;
    while TcpStream::connect(&address).await.is_ok() {
        tokio::task::yield_now().await;
    }
    // What is held back is gone too: no connection is left that could carry it.
    soon(upstream.open.wait_for(|count| *count == 0)).await.unwrap();
    assert_eq!(upstream.got().len(), 0);
}

/// The real one, as far as it can be asked without a client for it.
#[cfg(unix)]
#[tokio::test]
async fn the_emulator_answers_through_the_proxy() {
    use tai_state::testing::emulator::{Emulator, fresh_project};
    let Some(emulator) = Emulator::shared().await else { return };
    let proxy = Proxy::start(emulator.address()).await.unwrap();
    let mut client = Client::connect(&proxy).await;
    let database = format!("projects/{}/databases/(default)", fresh_project());
    client.database.clone_from(&database);
    let name = format!("{database}/documents/a/b");
    let absent = field(4, &[8, 0]); // Precondition { exists: false }
    let write = [field(1, &field(1, name.as_bytes())), absent].concat();
    let commit = [field(1, database.as_bytes()), field(2, &write)].concat();
    let get = [field(1, database.as_bytes()), field(2, name.as_bytes())].concat();

    // Twice, so that the second finds what the first has made.
    proxy.inject(Rule::new("Commit", When::Nth(1), Fault::Duplicate));
    let refused = client.call("Commit", &commit).await.unwrap();
    assert_eq!(refused.status, Some(Code::ALREADY_EXISTS.0.to_string()), "{refused:?}");
    let found = client.call("BatchGetDocuments", &get).await.unwrap();
    assert_eq!(found.status.as_deref(), Some("0"), "{found:?}");
    let contains = |bytes: &[u8]| bytes.windows(name.len()).any(|part| part == name.as_bytes());
    assert!(contains(&found.body));
    let Usage { reads, writes, .. } = proxy.usage();
    assert_eq!((reads, writes), (1, 2));

    // A stream: AddTarget { documents: [name] } brings the document.
    let target = [field(3, &field(2, name.as_bytes())), vec![5 << 3, 1]].concat();
    let target = field(2, &target);
    let (sender, body) = channel();
    let listen = message(&[field(1, database.as_bytes()), target].concat());
    let open = client.send("Listen", body);
    let (answer, _) = tokio::join!(soon(open), sender.send(Ok(Frame::data(listen.into()))));
    let mut answer = answer.unwrap().into_body();
    let mut heard = Vec::new();
    while !contains(&heard) {
        let frame = soon(answer.frame()).await.expect("it ended").unwrap();
        heard.extend(frame.into_data().expect("it ended with a status"));
    }
}
