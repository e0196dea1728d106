//! Nothing of what is stored, no secret of a lock and no answer under a key comes out where nobody asked for
//! it: not in a log at any level, a metric, an error or its causes, a panic, or the `Debug` of a handle.

#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]

mod common;

use std::fmt::Debug;
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use common::{every_backend, why};
use metrics::{
    Counter, Gauge, Histogram, Key as Metric, KeyName, Metadata, Recorder, SharedString, Unit,
};
use serde_json::{Value, json};
use tai_state::backend::{Backend, Body, Key, Kind, Name, Precondition, Write};
use tai_state::testing::faults::{CommitFault, FaultyBackend};
use tai_state::{
    ChangeMetadata, CleanupOptions, Error, EventualConsistency, ListOptions, NewTransition,
    StateMachinePersister, StateQuery, StateSnapshot, StateStore, StoreOptions, TransactionManager,
    TransitionLine,
};

const SECRET: &str = "cAnArYq7Zk9wTbXs2LmVv4";

/// Everything that was said, by whoever said it.
static SAID: OnceLock<Mutex<Vec<String>>> = OnceLock::new();

fn say(text: String) {
    SAID.get_or_init(Mutex::default).lock().unwrap().push(text);
}

/// All that was said until now, each text once.
fn heard() -> Vec<String> {
    let said = std::mem::take(&mut *SAID.get().unwrap().lock().unwrap());
    let said: std::collections::BTreeSet<String> = said.into_iter().collect();
    said.into_iter().collect()
}

/// Listens to every span, every event and every field, of every crate.
struct Listener;

impl tracing::Subscriber for Listener {
    fn enabled(&self, _: &tracing::Metadata<'_>) -> bool {
        true
    }

    fn new_span(&self, span: &tracing::span::Attributes<'_>) -> tracing::span::Id {
        say(format!("{span:?}"));
        tracing::span::Id::from_u64(1)
    }

    fn record(&self, _: &tracing::span::Id, values: &tracing::span::Record<'_>) {
        say(format!("{values:?}"));
    }

    fn record_follows_from(&self, _: &tracing::span::Id, _: &tracing::span::Id) {}

    fn event(&self, event: &tracing::Event<'_>) {
        say(format!("{event:?}"));
    }

    fn enter(&self, _: &tracing::span::Id) {}

    fn exit(&self, _: &tracing::span::Id) {}
}

impl Recorder for Listener {
    fn describe_counter(&self, _: KeyName, _: Option<Unit>, _: SharedString) {}
    fn describe_gauge(&self, _: KeyName, _: Option<Unit>, _: SharedString) {}
    fn describe_histogram(&self, _: KeyName, _: Option<Unit>, _: SharedString) {}

    fn register_counter(&self, key: &Metric, _: &Metadata<'_>) -> Counter {
        say(format!("{key:?}"));
        Counter::noop()
    }

    fn register_gauge(&self, key: &Metric, _: &Metadata<'_>) -> Gauge {
        say(format!("{key:?}"));
        Gauge::noop()
    }

    fn register_histogram(&self, key: &Metric, _: &Metadata<'_>) -> Histogram {
        say(format!("{key:?}"));
        Histogram::noop()
    }
}

/// The forms in which a secret could come out: as it is, its first eight characters, base64 at each of the
/// three places that it can begin at, percent-encoded, hexadecimal, as numbers, with JSON's escapes.
fn forms(secret: &str) -> Vec<String> {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let base64 = |skipped: usize| -> String {
        let bytes = [&b"\0\0"[..skipped], secret.as_bytes()].concat();
        let whole = bytes.chunks_exact(3).flat_map(|three| {
            let n = u32::from(three[0]) << 16 | u32::from(three[1]) << 8 | u32::from(three[2]);
            [18, 12, 6, 0].map(|shift| char::from(DIGITS[(n >> shift & 63) as usize]))
        });
        // What depends on the secret alone.
        whole.skip(if skipped == 0 { 0 } else { 4 }).collect()
    };
    let each = |form: fn(u8) -> String| secret.bytes().take(12).map(form).collect::<String>();
    let numbers: Vec<String> = secret.bytes().take(12).map(|byte| byte.to_string()).collect();
    let mut forms = vec![secret.to_owned(), secret.chars().take(8).collect(), numbers.join(", ")];
    forms.extend([0, 1, 2].map(base64));
    forms.push(each(|byte| format!("%{byte:02X}")));
    forms.push(each(|byte| format!("{byte:02x}")));
    forms.push(each(|byte| format!("{byte:02X}")));
    forms.push(each(|byte| format!("\\u{byte:04x}")));
    forms.push(each(|byte| format!("\\x{byte:02x}")));
    forms
}

/// Where the secrets come out, with what stands before them.
fn leaks(said: &[String], secrets: &[String]) -> Vec<String> {
    let forms: Vec<String> = secrets.iter().flat_map(|secret| forms(secret)).collect();
    let excerpt = |text: &String| {
        let at = forms.iter().find_map(|form| text.find(form.as_str()))?;
        let before: Vec<char> = text[..at].chars().rev().take(200).collect();
        let before: String = before.into_iter().rev().collect();
        let leak: String = text[at..].chars().take(40).collect();
        Some(format!("{text:.60} … {before}{leak}"))
    };
    said.iter().filter_map(excerpt).collect()
}

/// An error with everything that can be got out of it, and what a panic over it says.
fn told(error: &dyn std::error::Error) {
    say(format!("{error}\n{error:?}\n{error:#?}"));
    let mut cause = error.source();
    while let Some(below) = cause {
        say(format!("{below}\n{below:?}"));
        cause = below.source();
    }
}

fn failed<T>(result: Result<T, Error>) -> Error {
    let error = result.err().unwrap();
    told(&error);
    let text = format!("{error:?}");
    let _ = std::panic::catch_unwind(move || panic!("{text}"));
    error
}

fn shown(handle: &dyn Debug) {
    say(format!("{handle:?}\n{handle:#?}"));
}

fn secret(n: u64) -> StateSnapshot {
    StateSnapshot::new("s".into(), json!({ "of": [SECRET, n], SECRET: n }), reasoned())
}

fn reasoned() -> ChangeMetadata {
    why().with_context("context", json!(SECRET))
}

fn options() -> StoreOptions {
    let mut options = StoreOptions::default();
    options.retry.base = Duration::from_micros(100);
    options.retry.cap = Duration::from_millis(1);
    options.retry.max_attempts = 3;
    options
}

/// Does what a store can do, well and badly, and says everything that comes of it.
async fn everything(name: &str, backend: &Arc<dyn Backend>, secrets: &mut Vec<String>) {
    let wrongs = [json!(SECRET), json!([SECRET]), json!({ SECRET: SECRET })];
    // There each look takes a while, and what is read is judged by the same code.
    let wrongs = if name == "emulator" { &wrongs[..1] } else { &wrongs[..] };
    let store = StateStore::with_backend(Arc::clone(backend), options());
    let persister = StateMachinePersister::with_defaults(store.clone());
    let manager = TransactionManager::new(&store);
    for n in 1..=12 {
        store.save_state("g", "s", secret(n), reasoned()).await.unwrap();
    }
    shown(&store);
    shown(&persister);
    shown(&manager);

    // Conflicts, and what is refused.
    failed(store.update_state("g", "s", secret(1), 3, reasoned()).await);
    failed(store.get_state("g", "absent").await);
    failed(store.state_at_version("g", "s", 99).await);
    let huge = json!([SECRET.repeat(60_000)]);
    failed(store.save_state("g", "s", StateSnapshot::new("s".into(), huge, why()), why()).await);
    let deep = (0..200).fold(json!(SECRET), |inner, _| json!([inner]));
    failed(store.save_state("g", "s", StateSnapshot::new("s".into(), deep, why()), why()).await);
    let wide = why().with_context("x", json!(SECRET.repeat(4_000)));
    failed(store.save_state("g", "s", secret(1), wide).await);
    for text in
        [format!("{{\"a\":\"{SECRET}\",\"a\":1}}"), format!("[\"{SECRET}\""), SECRET.to_owned()]
    {
        failed(tai_state::json::parse(&text, "a text"));
    }
    for line in [
        json!({"governor_id": "g", "state_id": "s", "action": "a", "timestamp": SECRET, "actor": "me", "data": 1}),
        json!({"governor_id": "g", "state_id": "s", "action": "a", "timestamp": 1, "actor": [SECRET], "data": 1}),
        json!({"governor_id": "g", "state_id": "s", "deleted": SECRET}),
        json!(SECRET),
    ] {
        failed(TransitionLine::parse(&line.to_string(), "a line"));
    }

    // Transactions, keys and their answers.
    let held = manager
        .run(|transaction| async move {
            transaction.get_state("g", "s").await?;
            transaction.idempotency_key::<Value>("k1").await?;
            transaction.save_state("g", "t", secret(1), reasoned()).await?;
            transaction.answer(&json!({ "answer": SECRET })).await?;
            shown(&transaction);
            Ok(())
        })
        .await;
    held.unwrap();
    let again: Result<_, Error> = manager
        .run(|transaction| async move {
            let first: Option<u64> = transaction.idempotency_key("k1").await?;
            Ok(first)
        })
        .await;
    failed(again);
    let lost: Result<_, Error> = manager
        .run(|transaction| {
            let faster = store.clone();
            async move {
                let (state, _) = transaction.get_state("g", "s").await?;
                faster.save_state("g", "s", secret(50), reasoned()).await?;
                transaction.save_state("g", "s", state, reasoned()).await
            }
        })
        .await;
    failed(lost);
    shown(&manager.transaction_log());
    let keyed = store.idempotency_key("k2").unwrap();
    shown(&keyed);
    keyed.save_state("g", "u", secret(1), reasoned()).await.unwrap();
    failed(keyed.save_state("g", "u", secret(2), reasoned()).await);

    // Locks: what a client holds alone.
    let lock = manager.acquire_lock("l", "me", Duration::from_secs(60)).await.unwrap();
    secrets.push(lock.lock_token.clone());
    shown(&lock);
    shown(&store.fenced_by(&lock));
    shown(&manager.list_locks().await.unwrap());
    let waited = Duration::from_millis(20);
    failed(manager.acquire_lock_within("l", "other", Duration::from_secs(60), waited).await);
    manager.break_lock("l").await.unwrap();
    failed(store.fenced_by(&lock).save_state("g", "s", secret(1), reasoned()).await);
    failed(lock.release().await);

    // The past, feeds, queries, copies.
    let mut history = store.history("g", "s", ..).await.unwrap();
    history.next().await.unwrap();
    shown(&history);
    let mut feed = store.watch("g", "s").unwrap();
    feed.next().await.unwrap();
    shown(&feed);
    let mut feed = store.watch_governor("g").unwrap();
    feed.next().await.unwrap();
    shown(&feed);
    let mut timeline = store.timeline("g", None, None).await.unwrap();
    timeline.next_page().await.unwrap();
    shown(&timeline);
    let mut cut = store.consistent_cut("g", chrono::DateTime::UNIX_EPOCH).unwrap();
    cut.next_page().await.unwrap();
    shown(&cut);
    store.list_states("g", &ListOptions::default()).await.unwrap();
    let _ = store.query_states("g", &StateQuery::new()).await;
    let copies = EventualConsistency::new();
    let (mut copy, _) = store.get_state("g", "s").await.unwrap();
    copy.data = json!({ "other": SECRET });
    copy.causality.increment("elsewhere");
    shown(&copies.observe("g", &copy));
    let _ =
        copies.repair(&store, "g", &copy, reasoned()).await.map(drop).map_err(|error| told(&error));
    shown(&copies);

    // Faults of every kind at every commit of a write, a clean-up and a purge.
    for fault in [
        CommitFault::Unavailable,
        CommitFault::LostRequest,
        CommitFault::LostAnswer,
        CommitFault::Duplicated,
    ] {
        for often in [1, 2, 9] {
            let faults = vec![fault; often];
            let faulty = FaultyBackend::new(Arc::clone(backend), faults);
            shown(&faulty);
            let store = StateStore::with_backend(Arc::new(faulty), options());
            let to = NewTransition::to("g", "s", "write", json!(SECRET), reasoned());
            let persister = StateMachinePersister::with_defaults(store);
            if let Err(error) = persister.append(to).await {
                told(&error);
            }
            let keep = CleanupOptions::older_than(Duration::ZERO).keep_versions(4);
            if let Err(error) = persister.cleanup("g", &keep, |_| {}).await {
                told(&error);
            }
            shown(&persister);
        }
    }

    // What is stored is damaged: by a body that says other things, and by one that is none.
    let escaped = |text: &str| Name::escape(text, "an id").unwrap();
    let version = persister.load_state("g", "s").await.unwrap().0.version;
    for (kind, version) in [(Kind::States, 0), (Kind::Events, version), (Kind::Snapshots, version)]
    {
        let key = Key { governor: escaped("g"), name: escaped("s"), kind, version };
        let document = backend.get(std::slice::from_ref(&key)).await.unwrap().pop().flatten();
        let Some(document) = document else { continue };
        shown(&document);
        let whole: Value = serde_json::from_str(document.body.as_text()).unwrap();
        let fields: Vec<String> = whole.as_object().unwrap().keys().cloned().collect();
        for field in fields {
            for wrong in wrongs {
                let mut damaged = whole.clone();
                damaged[&field] = wrong.clone();
                let body = Body::from_text(damaged.to_string());
                let put = Write::put(key.clone(), body, Precondition::Any);
                shown(&put);
                backend.commit(vec![put]).await.unwrap();
                let fresh = StateStore::with_backend(Arc::clone(backend), options());
                let persister = StateMachinePersister::with_defaults(fresh.clone());
                let _ = fresh.get_state("g", "s").await.map_err(|error| told(&error));
                let _ = persister.load_state("g", "s").await.map_err(|error| told(&error));
                let page = async { fresh.history("g", "s", ..).await?.next_page().await };
                let _ = page.await.map_err(|error| told(&error));
                if let Ok(report) = fresh.verify(|_| {}).await {
                    shown(&report);
                }
            }
        }
        let body = Body::from_text(document.body.as_text().to_owned());
        backend.commit(vec![Write::put(key, body, Precondition::Any)]).await.unwrap();
    }
    let report = persister.recover("g", "s").await.unwrap().1;
    shown(&report);
    shown(&persister.purge("g", "s", reasoned(), |_| {}).await.unwrap());
}

#[tokio::test(flavor = "multi_thread")]
async fn no_secret_comes_out() {
    tracing::subscriber::set_global_default(Listener).unwrap();
    metrics::set_global_recorder(Listener).unwrap();
    std::panic::set_hook(Box::new(|panic| say(format!("{panic}"))));
    let folder = tempfile::tempdir().unwrap();
    let mut secrets = vec![SECRET.to_owned()];
    let mut names = Vec::new();
    for (name, backend) in every_backend(folder.path()).await {
        everything(name, &backend, &mut secrets).await;
        shown(&backend);
        names.push(name);
    }
    drop(std::panic::take_hook());
    let said = heard();
    println!("{} texts of {names:?} were searched for {} secrets", said.len(), secrets.len());
    let found = leaks(&said, &secrets);
    let first: Vec<&String> = found.iter().take(5).collect();
    assert!(found.is_empty(), "{} leaks, such as {first:#?}", found.len());

    // The controls: logs, metrics, panics and errors were heard, and lies are found in each form.
    for heard in ["a lock was granted", "lost a race", "tai_state_", "panicked", "is damaged", "h2"]
    {
        let is_heard = said.iter().any(|text| text.contains(heard));
        assert!(is_heard || (heard == "h2" && names.len() < 3), "{heard} was not heard");
    }
    tracing::trace!(data = ?secret(1).data, "a lie");
    metrics::counter!("a_lie", "label" => SECRET).increment(1);
    told(&Error::InvalidState { subject: "g/s".into(), reason: format!("it is {SECRET}") });
    let lies = heard();
    assert!(leaks(&lies, &secrets).len() >= 3, "{lies:?}");
    for form in forms(SECRET) {
        assert!(!leaks(&[format!("before {form} behind")], &secrets).is_empty(), "{form}");
    }
    assert!(
        forms(SECRET).contains(&"Y0FuQXJZcTdaazl3VGJYczJMbVZ2".to_owned()),
        "{:?}",
        forms(SECRET)
    );
    assert!(leaks(&["nothing of the kind".into()], &secrets).is_empty());
    // Where it belongs it is, and nowhere beside.
    for entry in std::fs::read_dir(folder.path()).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        assert!(name.starts_with("bare.tai"), "{name}");
    }
}
