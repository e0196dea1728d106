//! What only Google's emulator can say: that the values, sizes and queries of this backend are what
//! Firestore takes.

#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]

use std::collections::BTreeSet;

use proptest::prelude::*;
use proptest::strategy::ValueTree;
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};
use serde_json::{Value, json};

use super::*;
use crate::backend::{Body, Direction, Field, Precondition, Test};
use crate::keys::Address;
use crate::testing::arbitrary_json;
use crate::testing::emulator::{Emulator, fresh_project};

async fn backend() -> Option<FirestoreBackend> {
    let emulator = Emulator::shared().await?;
    let mut config = FirestoreConfig::new(fresh_project());
    config.emulator = Some(emulator.address().to_owned());
    Some(FirestoreBackend::open(config).await.unwrap())
}

fn key(n: usize) -> Key {
    let name = |id: &str| Name::escape(id, "id").unwrap();
    Key { governor: name("g"), kind: Kind::Commands, name: name(&format!("d{n}")), version: 0 }
}

fn put(n: usize, body: &Value) -> Write {
    Write::put(key(n), Body::new(body).unwrap(), Precondition::Any)
}

async fn stored(backend: &dyn Backend, bodies: &[Value]) -> Vec<Value> {
    for (start, few) in bodies.chunks(10).enumerate() {
        let writes = few.iter().enumerate().map(|(n, body)| put(start * 10 + n, body)).collect();
        backend.commit(writes).await.unwrap_or_else(|error| panic!("{error}: {few:?}"));
    }
    let keys: Vec<Key> = (0..bodies.len()).map(key).collect();
    let found = backend.get(&keys).await.unwrap();
    found.into_iter().map(|document| document.unwrap().body.parse().unwrap()).collect()
}

/// Any JSON value, with the names and shapes that Firestore cannot hold.
fn hostile_json() -> impl Strategy<Value = Value> {
    let names = prop_oneof![
        Just(String::new()),
        Just("__x__".to_owned()),
        Just("____".to_owned()),
        Just("tai:json".to_owned()),
        Just("__type__".to_owned()),
        Just("a.b`c\\d".to_owned()),
        Just("\0".to_owned()),
        (1usize..1_600).prop_map(|n| "n".repeat(n)),
    ];
    let nested =
        (arbitrary_json(), 0usize..60, any::<bool>()).prop_map(|(inner, levels, arrays)| {
            (0..levels)
                .fold(inner, |inner, _| if arrays { json!([inner]) } else { json!({"a": inner}) })
        });
    let named =
        (names, arbitrary_json()).prop_map(|(name, value)| json!({name: value, "b": 1})).boxed();
    prop_oneof![
        arbitrary_json(),
        nested,
        named.clone(),
        prop::collection::vec(named, 0..3).prop_map(Value::from)
    ]
}

/// Any JSON value comes back equal through Firestore, and equal to what a file gives back.
#[tokio::test(flavor = "multi_thread")]
async fn any_value_comes_back_equal() {
    let Some(backend) = backend().await else { return };
    let seed = std::env::var("TAI_STATE_SEED").map_or_else(
        |_| u64::from_le_bytes(crate::clock::random_id().as_bytes()[..8].try_into().unwrap()),
        |seed| seed.parse().unwrap(),
    );
    println!("values: TAI_STATE_SEED={seed}");
    let rng = TestRng::from_seed(RngAlgorithm::ChaCha, &seed.to_le_bytes().repeat(4));
    let mut runner = TestRunner::new_with_rng(Config::default(), rng);
    let mut bodies: Vec<Value> = (0..400)
        .map(|_| hostile_json().new_tree(&mut runner).unwrap().current())
        .map(|value| json!({"state": value, "timestamp": "2026-01-01T00:00:00Z"}))
        .collect();
    // At the top of a document too.
    bodies.extend((0..100).map(|n| {
        let value = hostile_json().new_tree(&mut runner).unwrap().current();
        if value.is_object() { value } else { json!({"n": n}) }
    }));
    assert_eq!(stored(&backend, &bodies).await, bodies);
    #[cfg(feature = "embedded")]
    {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("store.tai");
        let file =
            crate::backend::embedded::EmbeddedBackend::open(&path, true, true).await.unwrap();
        assert_eq!(stored(&file, &bodies).await, bodies);
    }
}

/// What is small as text and large as fields, or too much for the indexes, is kept all the same.
#[tokio::test(flavor = "multi_thread")]
async fn large_values_come_back_equal() {
    let Some(backend) = backend().await else { return };
    let text = "é".repeat(450 << 10);
    for value in [
        json!(text),
        json!({"a": &text[..400 << 10], "b": [&text[..400 << 10]]}),
        Value::Array(vec![json!([]); 290_000]),
        Value::Array(vec![json!({}); 290_000]),
        Value::Array(vec![json!(1); 450_000]),
        Value::Object((0..60_000).map(|n| (format!("f{n}"), json!(n))).collect()),
    ] {
        let body = json!({"state": value, "version": 1});
        assert_eq!(stored(&backend, std::slice::from_ref(&body)).await, [body]);
    }
}

/// The emulator and the local check draw the line at the same byte, for flat documents.
#[tokio::test(flavor = "multi_thread")]
async fn the_largest_document() {
    let Some(backend) = backend().await else { return };
    let name_bytes = Place::name_bytes(&backend.line.place().document(&key(0)));
    let body =
        |bytes: usize| json!({"a": "x".repeat(bytes / 2), "b": "x".repeat(bytes - bytes / 2)});
    let fields = value::to_fields(&body(0).to_string(), name_bytes).unwrap();
    let rest = value::MAX_DOCUMENT_BYTES - value::document_bytes(&fields, name_bytes);
    let rest = usize::try_from(rest).unwrap();
    backend.commit(vec![put(0, &body(rest))]).await.unwrap();
    let refused = backend.commit(vec![put(1, &body(rest + 1))]).await.unwrap_err();
    assert!(matches!(refused, BackendError::TooLarge { .. }), "{refused}");
    // The emulator itself would take four bytes more; and not one beyond.
    for (more, takes) in [(4, true), (5, false)] {
        let fields = value::to_fields(&body(rest + more).to_string(), name_bytes).unwrap();
        let name = backend.line.place().document(&key(2));
        let document = proto::Document { name, fields, ..proto::Document::default() };
        let write = proto::Write {
            operation: Some(proto::write::Operation::Update(document)),
            ..proto::Write::default()
        };
        let message = proto::CommitRequest {
            database: backend.line.place().database().to_owned(),
            writes: vec![write],
            ..proto::CommitRequest::default()
        };
        let sent = backend.line.call(
            || message.clone(),
            |mut client, request| async move { client.commit(request).await.map(drop) },
        );
        assert_eq!(sent.await.is_ok(), takes, "{more} bytes more");
    }
}

/// A commit that is too large is refused before it is sent, with what it was and what it may be.
#[tokio::test(flavor = "multi_thread")]
async fn the_largest_commit() {
    let Some(backend) = backend().await else { return };
    let large = json!({"a": "x".repeat(1_000_000)});
    backend.commit((0..4).map(|n| put(n, &large)).collect()).await.unwrap();
    match backend.commit((0..5).map(|n| put(n, &large)).collect()).await.unwrap_err() {
        BackendError::TooLarge { size, limit, .. } => assert!(size > 5_000_000 && limit == 4 << 20),
        other => panic!("{other}"),
    }
    let small = json!({"a": 1});
    backend.commit((0..MOST_WRITES).map(|n| put(n, &small)).collect()).await.unwrap();
    match backend.commit((0..=MOST_WRITES).map(|n| put(n, &small)).collect()).await.unwrap_err() {
        BackendError::TooLarge { size, limit, .. } => assert_eq!((size, limit), (501, 500)),
        other => panic!("{other}"),
    }
}

/// A page ends when it is full of bytes, and the next goes on where it ended: by names, by versions, by
/// a query in either direction.
#[tokio::test(flavor = "multi_thread")]
async fn pages_that_are_full_have_no_gaps() {
    const COUNT: usize = 25;
    let Some(backend) = backend().await else { return };
    let governor = key(0).governor;
    let name = |n: usize| Name::escape(&format!("s{n:02}"), "id").unwrap();
    let head = |n: usize| Key { kind: Kind::States, name: name(n), ..key(0) };
    let event = |n: usize| Key { kind: Kind::Events, name: name(0), version: n as u64, ..key(0) };
    for n in 0..COUNT {
        let body = Body::new(&json!({"n": n, "filler": "x".repeat(900_000)})).unwrap();
        let write = |key| Write::put(key, body.clone(), Precondition::Absent);
        backend.commit(vec![write(head(n)), write(event(n))]).await.unwrap();
    }
    let scan = |kind, range| Scan { governor: governor.clone(), kind, range, limit: 100 };
    let versions = |to| super::super::Range::Versions { name: name(0), from: 0, to };
    for (scan, wanted) in [
        (
            scan(Kind::States, super::super::Range::Names { after: None }),
            (0..COUNT).map(head).collect::<Vec<_>>(),
        ),
        // So few that they are asked for by name, and so many that they are not.
        (scan(Kind::Events, versions(COUNT as u64)), (0..COUNT).map(event).collect()),
        (scan(Kind::Events, versions(5_000)), (0..COUNT).map(event).collect()),
    ] {
        let (mut next, mut found, mut pages) = (Some(scan.clone()), Vec::new(), 0);
        while let Some(scan) = next {
            let page = backend.scan(&scan).await.unwrap();
            found.extend(page.documents.into_iter().map(|document| document.key));
            (next, pages) = (page.next, pages + 1);
        }
        assert_eq!(found, wanted, "{scan:?}");
        assert!(pages > 2, "{pages} pages: {scan:?}");
    }
    for direction in [Direction::Ascending, Direction::Descending] {
        let mut query = Query {
            governor: governor.clone(),
            kind: Kind::States,
            filters: Vec::new(),
            order: Some((Field(vec!["n".into()]), direction)),
            after: None,
            limit: 100,
        };
        let mut found = Vec::new();
        loop {
            let page = backend.query(&query).await.unwrap();
            found.extend(page.documents.into_iter().map(|document| document.key));
            query.after = page.next;
            if query.after.is_none() {
                break;
            }
        }
        let mut wanted: Vec<Key> = (0..COUNT).map(head).collect();
        if direction == Direction::Descending {
            wanted.reverse();
        }
        assert_eq!(found, wanted, "{direction:?}");
    }
}

/// A document that no store wrote is named, not passed over.
#[tokio::test(flavor = "multi_thread")]
async fn foreign_documents_are_named() {
    let Some(backend) = backend().await else { return };
    let place = backend.line.place();
    for (below, odd) in [
        ("governors/g/states/a~b", json!({"n": 1})),
        ("governors/__id7__/states/s", json!({"n": 1})),
    ] {
        let name = format!("{}/documents/{below}", place.database());
        let fields = value::to_fields(&odd.to_string(), 0).unwrap();
        let document = proto::Document { name, fields, ..proto::Document::default() };
        let write = proto::Write {
            operation: Some(proto::write::Operation::Update(document)),
            ..proto::Write::default()
        };
        let message = proto::CommitRequest {
            database: place.database().to_owned(),
            writes: vec![write],
            ..proto::CommitRequest::default()
        };
        let sent = backend.line.call(
            || message.clone(),
            |mut client, request| async move { client.commit(request).await.map(drop) },
        );
        assert!(sent.await.is_ok(), "{below}");
    }
    let governor = key(0).governor;
    let all = Scan {
        governor: governor.clone(),
        kind: Kind::States,
        range: super::super::Range::Names { after: None },
        limit: 10,
    };
    assert!(matches!(backend.scan(&all).await, Err(BackendError::Corrupt { .. })));
    assert!(matches!(
        backend.names(&governor, Kind::States, None, 10).await,
        Err(BackendError::Corrupt { .. })
    ));
    assert!(matches!(backend.governors(None, 10).await, Err(BackendError::Corrupt { .. })));
}

/// Governors are found by a list that goes on by tokens, page by page, whatever the page.
#[tokio::test(flavor = "multi_thread")]
async fn many_governors() {
    let Some(backend) = backend().await else { return };
    let name = |n: usize| Name::escape(&format!("g{n:04}"), "id").unwrap();
    let keys: Vec<Key> = (0..700).map(|n| Key { governor: name(n), ..key(0) }).collect();
    for keys in keys.chunks(350) {
        let body = Body::new(&json!({})).unwrap();
        let write = |key: &Key| Write::put(key.clone(), body.clone(), Precondition::Absent);
        backend.commit(keys.iter().map(write).collect()).await.unwrap();
    }
    let wanted: Vec<Name> = (0..700).map(name).collect();
    for limit in [150, 299, 300, 301, 1_000] {
        let mut found: Vec<Name> = Vec::new();
        loop {
            let page = backend.governors(found.last(), limit).await.unwrap();
            assert!(page.len() <= limit);
            if page.is_empty() {
                break;
            }
            found.extend(page);
        }
        assert_eq!(found, wanted, "by {limit}");
    }
    // From the middle, by a reader that has seen no list yet.
    let fresh = Reader::new(Arc::clone(&backend.line));
    assert_eq!(fresh.governors(Some(&wanted[650]), 10).await.unwrap(), wanted[651..661]);
}

/// An index that a query needs on the service, where the emulator needs none.
fn needed_index(query: &Query) -> Option<(String, Vec<(String, &'static str)>)> {
    let (Field(by), direction) = query.order.as_ref()?;
    let direction = match direction {
        Direction::Ascending => "ASCENDING",
        Direction::Descending => "DESCENDING",
    };
    let equal = query.filters.iter().filter(|(_, test)| matches!(test, Test::Equal(_)));
    let mut fields: Vec<_> = equal.map(|(Field(path), _)| (path.join("."), "ASCENDING")).collect();
    fields.push((by.join("."), direction));
    (fields.len() > 1).then(|| (query.kind.as_str().to_owned(), fields))
}

/// Every query that this crate itself asks has its index in what is shipped, and no field that a query
/// needs by itself is exempt. The emulator would not notice.
#[test]
fn shipped_indexes_serve_all_queries() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../deploy/firestore.indexes.json");
    let shipped: Value = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
    let address = Address::new("g", "s").unwrap();
    let asked = [crate::schema::newest_until(&address, &SystemClock.now())];
    let mut needed = BTreeSet::new();
    for query in &asked {
        needed.extend(needed_index(query));
    }
    let text = |value: &Value| value.as_str().unwrap().to_owned();
    let has: BTreeSet<_> = shipped["indexes"]
        .as_array()
        .unwrap()
        .iter()
        .map(|index| {
            assert_eq!(index["queryScope"], "COLLECTION");
            let fields = index["fields"].as_array().unwrap().iter().map(|field| {
                let order = match field["order"].as_str().unwrap() {
                    "ASCENDING" => "ASCENDING",
                    _ => "DESCENDING",
                };
                (text(&field["fieldPath"]), order)
            });
            (text(&index["collectionGroup"]), fields.collect::<Vec<_>>())
        })
        .collect();
    assert_eq!(has, needed);
    // What users query stays indexed.
    let exempt = |kind: &str, path: &str| {
        shipped["fieldOverrides"]
            .as_array()
            .unwrap()
            .iter()
            .any(|field| field["collectionGroup"] == kind && field["fieldPath"] == path)
    };
    assert!(!exempt("states", "state") && exempt("events", "to_state"));
}

/// A token and a line without encryption never meet: whoever is spoken to in the clear is an emulator, and
/// gets its own well-known name.
#[test]
fn no_token_goes_over_plain_text() {
    for host in ["127.0.0.1:1", "localhost:1", "[::1]:1", "10.0.0.1:1", "emulator.example:443"] {
        for project in ["some-project", "demo-x"] {
            let mut config = FirestoreConfig::new(project);
            config.emulator = Some(host.to_owned());
            config.allow_remote_emulator = true;
            assert!(!target(&config, "there").unwrap().tls, "{host}");
            assert!(matches!(auth(&config, "there"), Ok(Auth::Emulator)), "{host}");
        }
    }
    let google = target(&FirestoreConfig::new("some-project"), "there").unwrap();
    assert!(google.tls && google.host.ends_with(".googleapis.com") && google.port == 443);
    // On another machine only when that is allowed.
    for (host, is_here) in [("127.0.0.1:1", true), ("10.0.0.1:1", false), ("h.example:1", false)] {
        let mut config = FirestoreConfig::new("demo-x");
        config.emulator = Some(host.to_owned());
        assert_eq!(target(&config, "there").is_ok(), is_here, "{host}");
    }
}

/// Everything that is said to whoever listens, on this thread.
#[cfg(feature = "gcp-auth")]
#[derive(Default)]
struct Overheard(std::sync::Mutex<Vec<String>>);

#[cfg(feature = "gcp-auth")]
impl tracing::Subscriber for Overheard {
    fn enabled(&self, _: &tracing::Metadata<'_>) -> bool {
        true
    }

    fn new_span(&self, span: &tracing::span::Attributes<'_>) -> tracing::span::Id {
        self.0.lock().unwrap().push(format!("{span:?}"));
        tracing::span::Id::from_u64(1)
    }

    fn record(&self, _: &tracing::span::Id, values: &tracing::span::Record<'_>) {
        self.0.lock().unwrap().push(format!("{values:?}"));
    }

    fn record_follows_from(&self, _: &tracing::span::Id, _: &tracing::span::Id) {}

    fn event(&self, event: &tracing::Event<'_>) {
        self.0.lock().unwrap().push(format!("{event:?}"));
    }

    fn enter(&self, _: &tracing::span::Id) {}

    fn exit(&self, _: &tracing::span::Id) {}
}

/// Answers every request for a token; returns its address and what it was asked.
#[cfg(feature = "gcp-auth")]
async fn token_server(
    status: &'static str,
    body: &'static str,
) -> (String, tokio::sync::mpsc::UnboundedReceiver<String>) {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (told, asked) = tokio::sync::mpsc::unbounded_channel();
    tokio::spawn(async move {
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut request = Vec::new();
            // The body stands behind the empty line and is a JSON object or a form.
            while !String::from_utf8_lossy(&request).contains("CANARY") {
                let mut part = [0; 4096];
                match stream.read(&mut part).await {
                    Ok(0) | Err(_) => break,
                    Ok(read) => request.extend_from_slice(&part[..read]),
                }
            }
            let _ = told.send(String::from_utf8_lossy(&request).into_owned());
            let length = body.len();
            let answer = format!(
                "HTTP/1.1 {status}\r\ncontent-type: application/json\r\ncontent-length: {length}\r\nconnection: close\r\n\r\n{body}"
            );
            let _ = stream.write_all(answer.as_bytes()).await;
        }
    });
    (format!("http://{address}/token"), asked)
}

/// No secret comes out: not in a log at any level, not in an error, not in a `Debug` output.
#[cfg(feature = "gcp-auth")]
#[tokio::test]
async fn secrets_stay_inside() {
    use google_cloud_auth::credentials::user_account;
    let Some(emulator) = Emulator::shared().await else { return };
    let overheard = Arc::new(Overheard::default());
    let _listening = tracing::subscriber::set_default(Arc::clone(&overheard));
    // Without this the library would panic for want of cryptography.
    let _ = auth::google::Google::find();
    for (status, body) in [
        ("200 OK", r#"{"access_token":"CANARY-token","expires_in":3600,"token_type":"Bearer"}"#),
        ("400 Bad Request", r#"{"error":"invalid_grant","error_description":"CANARY-echo"}"#),
        ("200 OK", "CANARY-garbage"),
    ] {
        let (token_uri, mut asked) = token_server(status, body).await;
        let user = json!({
            "type": "authorized_user", "client_id": "id", "client_secret": "CANARY-secret",
            "refresh_token": "CANARY-refresh", "quota_project_id": "q",
        });
        let credentials =
            user_account::Builder::new(user).with_token_uri(token_uri).build().unwrap();
        let auth = Auth::Google(auth::google::Google::with(credentials));
        let (host, port) = emulator.address().rsplit_once(':').unwrap();
        let target = Target { host: host.into(), port: port.parse().unwrap(), tls: false };
        let place = Place::new(&fresh_project(), "(default)", "");
        let line = Arc::new(Line::new(target, auth, place, Duration::from_secs(10)));
        let reader = Reader::new(Arc::clone(&line));
        let key = Key { kind: Kind::States, ..key(0) };
        let error = reader.get(&[key]).await.unwrap_err();
        // The control: the secrets were used.
        assert!(asked.recv().await.unwrap().contains("CANARY-refresh"));
        let lifted = lift(error, "here");
        let mut said = vec![format!("{line:?} {reader:?} {lifted} {lifted:?}")];
        said.append(&mut overheard.0.lock().unwrap());
        assert!(
            said.iter().any(|line| line.contains("h2"))
                || status != "200 OK"
                || body.contains("garbage"),
            "nothing was overheard"
        );
        for line in &said {
            assert!(!line.contains("CANARY") && !line.contains("Q0FOQVJZ"), "{line}");
        }
    }
}
