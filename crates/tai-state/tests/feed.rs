//! Feeds: every event once and in order, on every backend, whatever happens in between.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

#[macro_use]
mod common;

use std::collections::BTreeMap;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use common::{Make, Random, counter, open, snapshot, why};
use serde_json::{Value, json};
use tai_state::backend::memory::MemoryBackend;
use tai_state::backend::{Backend, Key, Kind, Name, Precondition, Write};
use tai_state::{
    CleanupOptions, Event, FeedPosition, GovernorFeed, StateMachinePersister, StateStore,
    StoreOptions, TransactionManager,
};

on_every_backend![
    all_that_several_writers_do_arrives_in_order,
    a_feed_goes_on_where_it_was_left,
    a_feed_starts_at_any_version,
    a_feed_ahead_of_its_state_waits,
    deletions_arrive,
    a_state_that_is_not_there_yet_is_followed,
    calls_that_are_given_up_lose_nothing,
    from_now_gives_only_what_comes,
    long_histories_are_given_in_pages,
    a_feed_hears_only_its_own,
    impossible_ids_are_refused,
];

/// No event within this time is an event that never comes.
const PATIENCE: Duration = Duration::from_secs(30);

async fn save(store: &StateStore, id: &str, n: u64) -> u64 {
    store.save_state("g", id, snapshot(id, json!({"n": n})), why()).await.unwrap()
}

/// The next event of any feed, or a failed test.
macro_rules! next {
    ($feed:expr) => {
        tokio::time::timeout(PATIENCE, $feed.next()).await.expect("no event comes").unwrap()
    };
}

/// Whether a feed has nothing more to give.
macro_rules! is_silent {
    ($feed:expr) => {
        tokio::time::timeout(Duration::from_millis(300), $feed.next()).await.is_err()
    };
}

async fn log(store: &StateStore, id: &str) -> Vec<Event> {
    let mut history = store.history("g", id, ..).await.unwrap();
    let mut events = Vec::new();
    loop {
        let page = history.next_page().await.unwrap();
        if page.is_empty() {
            return events;
        }
        events.extend(page);
    }
}

async fn all_that_several_writers_do_arrives_in_order(make: Make<'_>) {
    const WRITERS: u64 = 5;
    const EACH: u64 = 40;
    let store = open(make);
    let mut feed = store.watch_governor("g").unwrap();
    let mut one = store.watch("g", "s1").unwrap();
    let mut writers = tokio::task::JoinSet::new();
    for writer in 0..WRITERS {
        let store = store.clone();
        writers.spawn(async move {
            for n in 0..EACH {
                save(&store, &format!("s{}", (writer + n) % 4), n).await;
            }
        });
    }
    // A feed can be followed in a task of its own.
    let follower = tokio::spawn(async move {
        let mut given: BTreeMap<String, Vec<Event>> = BTreeMap::new();
        for _ in 0..WRITERS * EACH {
            let event = next!(feed);
            given.entry(event.to_state.id.to_string()).or_default().push(event);
        }
        (feed, given)
    });
    writers.join_all().await;
    let (mut feed, given) = follower.await.unwrap();
    assert!(is_silent!(feed), "more events than changes");
    assert_eq!(given.len(), 4);
    for (id, events) in &given {
        assert_eq!(*events, log(&store, id).await, "{id}");
        assert_eq!(feed.position().get(id), events.len() as u64);
    }
    for event in &given["s1"] {
        assert_eq!(next!(one), *event);
    }
    assert!(is_silent!(one));
}

async fn a_feed_goes_on_where_it_was_left(make: Make<'_>) {
    let mut random = Random::announced("a_feed_goes_on_where_it_was_left");
    let store = open(make);
    let (mut written, mut given) = (0, Vec::new());
    let mut kept = String::from("{}");
    let mut kept_one = 0;
    let mut one = Vec::new();
    for _ in 0..8 {
        for _ in 0..random.below(8) {
            save(&store, &format!("s{}", random.below(3)), written).await;
            written += 1;
        }
        // What follows is dropped in the middle of what there is, each time.
        let position: FeedPosition = serde_json::from_str(&kept).unwrap();
        let mut feed = store.watch_governor("g").unwrap().from_position(position);
        for _ in 0..random.below(written - given.len() as u64 + 1) {
            given.push(next!(feed));
        }
        kept = serde_json::to_string(feed.position()).unwrap();
        let newest = store.record("g", "s0").await.unwrap().map_or(0, |r| r.snapshot.version);
        let mut feed = store.watch("g", "s0").unwrap().from_version(kept_one);
        for _ in 0..random.below(newest - kept_one + 1) {
            one.push(next!(feed));
        }
        kept_one = feed.version();
        drop(feed);
    }
    save(&store, "s0", written).await;
    written += 1;
    let position: FeedPosition = serde_json::from_str(&kept).unwrap();
    let mut feed = store.watch_governor("g").unwrap().from_position(position);
    while (given.len() as u64) < written {
        given.push(next!(feed));
    }
    assert!(is_silent!(feed));
    for id in ["s0", "s1", "s2"] {
        if feed.position().get(id) > 0 {
            let of_id: Vec<Event> =
                given.iter().filter(|event| event.to_state.id == id).cloned().collect();
            assert_eq!(of_id, log(&store, id).await, "{id}");
        }
    }
    let mut rest = store.watch("g", "s0").unwrap().from_version(kept_one);
    let log = log(&store, "s0").await;
    while one.len() < log.len() {
        one.push(next!(rest));
    }
    assert_eq!(one, log);
}

async fn a_feed_starts_at_any_version(make: Make<'_>) {
    let store = open(make);
    for n in 1..=6 {
        save(&store, "s", n).await;
    }
    let log = log(&store, "s").await;
    for version in 0..6 {
        let mut feed = store.watch("g", "s").unwrap().from_version(version);
        assert_eq!(feed.version(), version);
        for wanted in &log[version as usize..] {
            // The state before an event comes with it also when it was not given out itself.
            assert_eq!(next!(feed), *wanted);
            assert_eq!(feed.version(), wanted.version());
        }
    }
    // One that has begun begins anew, whatever it had read ahead.
    let mut feed = store.watch("g", "s").unwrap();
    assert_eq!(next!(feed).version(), 1);
    let mut feed = feed.from_version(4);
    assert_eq!(next!(feed).version(), 5);
    let mut feed = feed.from_version(0);
    assert_eq!(next!(feed).version(), 1);
    let mut feed = feed.from_version(6);
    assert!(is_silent!(feed));
    save(&store, "s", 7).await;
    assert_eq!(next!(feed).version(), 7);
}

async fn a_feed_ahead_of_its_state_waits(make: Make<'_>) {
    let store = open(make);
    save(&store, "s", 1).await;
    let mut feed = store.watch("g", "s").unwrap().from_version(3);
    let mut position = FeedPosition::new();
    position.set("s", 3);
    let mut all = store.watch_governor("g").unwrap().from_position(position);
    for n in 2..=5 {
        assert!(n > 3 || is_silent!(feed), "at {n}");
        save(&store, "s", n).await;
    }
    for version in 4..=5 {
        assert_eq!(next!(feed).version(), version);
        assert_eq!(next!(all).version(), version);
    }
    assert!(is_silent!(feed));
    let mut never = store.watch("g", "s").unwrap().from_version(u64::MAX);
    assert!(is_silent!(never));
}

async fn deletions_arrive(make: Make<'_>) {
    let store = open(make);
    let mut one = store.watch("g", "s").unwrap();
    let mut all = store.watch_governor("g").unwrap();
    save(&store, "s", 1).await;
    store.delete_state("g", "s", None, why()).await.unwrap();
    save(&store, "s", 2).await;
    for (version, deleted, data) in
        [(1, false, json!({"n": 1})), (2, true, Value::Null), (3, false, json!({"n": 2}))]
    {
        let event = next!(one);
        assert_eq!(
            (event.version(), event.deleted, &event.to_state.data),
            (version, deleted, &data)
        );
        assert_eq!(next!(all), event);
    }
}

async fn a_state_that_is_not_there_yet_is_followed(make: Make<'_>) {
    let store = open(make);
    let mut one = store.watch("g", "later").unwrap();
    let mut all = store.watch_governor("g").unwrap();
    assert!(is_silent!(one) && is_silent!(all));
    let writer = {
        let store = store.clone();
        tokio::spawn(async move { save(&store, "later", 1).await })
    };
    assert_eq!(next!(one).version(), 1);
    assert_eq!(next!(all).to_state.id, "later");
    writer.await.unwrap();
}

async fn calls_that_are_given_up_lose_nothing(make: Make<'_>) {
    const CHANGES: u64 = 60;
    let store = open(make);
    let mut random = Random::announced("calls_that_are_given_up_lose_nothing");
    let writer = {
        let store = store.clone();
        tokio::spawn(async move {
            for n in 1..=CHANGES {
                save(&store, &format!("s{}", n % 3), n).await;
            }
        })
    };
    let mut all = store.watch_governor("g").unwrap();
    let mut one = store.watch("g", "s1").unwrap();
    let (mut from_all, mut from_one) = (Vec::new(), Vec::new());
    let following = async {
        while from_all.len() < CHANGES as usize || from_one.len() < CHANGES as usize / 3 {
            let wait = Duration::from_micros(random.below(1_500));
            if let Ok(event) = tokio::time::timeout(wait, all.next()).await {
                from_all.push(event.unwrap());
            }
            if let Ok(event) = tokio::time::timeout(wait, one.next()).await {
                from_one.push(event.unwrap());
            }
        }
    };
    tokio::time::timeout(PATIENCE, following).await.expect("an event was lost");
    writer.await.unwrap();
    assert_eq!(from_one, log(&store, "s1").await);
    for id in ["s0", "s1", "s2"] {
        let of_id: Vec<Event> =
            from_all.iter().filter(|event| event.to_state.id == id).cloned().collect();
        assert_eq!(of_id, log(&store, id).await);
    }
}

async fn from_now_gives_only_what_comes(make: Make<'_>) {
    let store = open(make);
    for n in 1..=3 {
        save(&store, "s", n).await;
        save(&store, "t", n).await;
    }
    let mut one = store.watch("g", "s").unwrap().from_now().await.unwrap();
    let mut all = store.watch_governor("g").unwrap().from_now().await.unwrap();
    let mut unborn = store.watch("g", "new").unwrap().from_now().await.unwrap();
    assert_eq!(one.version(), 3);
    assert_eq!(all.position().iter().collect::<Vec<_>>(), [("s", 3), ("t", 3)]);
    // What changes before the first call is not missed.
    save(&store, "s", 4).await;
    save(&store, "new", 1).await;
    assert_eq!(next!(one).version(), 4);
    assert_eq!(next!(unborn).version(), 1);
    let mut given = [next!(all), next!(all)].map(|e| (e.to_state.id.to_string(), e.version()));
    given.sort();
    assert_eq!(given, [("new".to_owned(), 1), ("s".to_owned(), 4)]);
}

/// More events of a state, and more states, than are read at once.
async fn long_histories_are_given_in_pages(make: Make<'_>) {
    let store = open(make);
    let manager = TransactionManager::new(store.clone());
    let mut steps = 0;
    for _ in 0..4 {
        manager
            .execute_transaction("g", |tx| {
                Box::pin(async move {
                    for n in 0..150 {
                        tx.save_state("g", "long", counter(n), why()).await?;
                    }
                    Ok(())
                })
            })
            .await
            .unwrap();
        steps += 150;
    }
    for page in 0..3 {
        manager
            .execute_transaction("g", move |tx| {
                Box::pin(async move {
                    for n in 0..110 {
                        let id = format!("s{page}-{n:03}");
                        tx.save_state("g", &id, snapshot(&id, json!(n)), why()).await?;
                    }
                    Ok(())
                })
            })
            .await
            .unwrap();
        steps += 110;
    }
    let mut one = store.watch("g", "long").unwrap();
    for wanted in log(&store, "long").await {
        assert_eq!(next!(one), wanted);
    }
    let mut all = store.watch_governor("g").unwrap();
    let mut versions: BTreeMap<String, u64> = BTreeMap::new();
    for _ in 0..steps {
        let event = next!(all);
        let last = versions.entry(event.to_state.id.to_string()).or_default();
        *last += 1;
        assert_eq!(event.version(), *last);
    }
    assert_eq!((versions.len(), versions["long"]), (331, 600));
    assert!(is_silent!(all));
}

async fn a_feed_hears_only_its_own(make: Make<'_>) {
    let store = open(make);
    let mut one = store.watch("g", "s").unwrap();
    let mut all = store.watch_governor("g").unwrap();
    for (governor, id) in [("g2", "s"), ("g", "s2"), ("h", "s"), ("g", "s")] {
        store.save_state(governor, id, snapshot(id, json!(id)), why()).await.unwrap();
    }
    let event = next!(one);
    assert_eq!((event.governor_id.as_str(), event.to_state.id.as_str()), ("g", "s"));
    for _ in 0..2 {
        assert_eq!(next!(all).governor_id, "g");
    }
    assert!(is_silent!(one) && is_silent!(all));
}

async fn impossible_ids_are_refused(make: Make<'_>) {
    let store = open(make);
    assert_eq!(store.watch("g", "").unwrap_err().code(), "invalid_state");
    assert_eq!(store.watch_governor("").unwrap_err().code(), "invalid_state");
    // An id of any kind is followed.
    let odd = "../~%2F\u{0}";
    save(&store, odd, 1).await;
    let mut feed = store.watch("g", odd).unwrap();
    assert_eq!((next!(feed).to_state.id.as_str(), feed.version()), (odd, 1));
    let mut all = store.watch_governor("g").unwrap();
    next!(all);
    assert_eq!(all.position().get(odd), 1);
}

/// Another handle on the same file, and then another process, are heard as well.
#[tokio::test(flavor = "multi_thread")]
async fn other_handles_and_processes_wake_a_feed() {
    const INNER: &str = "TAI_STATE_TEST_FEED_WRITER";
    if let Some(path) = std::env::var_os(INNER) {
        let store = StateStore::open(path).await.unwrap();
        for n in 1..=20 {
            save(&store, "s", n).await;
        }
        println!("wrote 20");
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("shared.tai");
    let store = StateStore::open(&path).await.unwrap();
    let mut one = store.watch("g", "s").unwrap();
    let mut all = store.watch_governor("g").unwrap();
    // Both wait before anything is there.
    assert!(is_silent!(one) && is_silent!(all));
    let other = StateStore::open(&path).await.unwrap();
    let writer = tokio::spawn(async move {
        for n in 1..=20 {
            save(&other, "s", n).await;
        }
    });
    for version in 1..=20 {
        assert_eq!((next!(one).version(), next!(all).version()), (version, version));
    }
    writer.await.unwrap();

    let child = tokio::task::spawn_blocking(move || {
        Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "other_handles_and_processes_wake_a_feed", "--nocapture"])
            .env(INNER, path)
            .output()
            .unwrap()
    });
    for version in 21..=40 {
        // One that waits only for a moment each time hears it too.
        let moments = async {
            loop {
                let moment = Duration::from_millis(7);
                if let Ok(event) = tokio::time::timeout(moment, one.next()).await {
                    break event.unwrap();
                }
            }
        };
        let event = tokio::time::timeout(PATIENCE, moments).await.expect("no event comes");
        assert_eq!((event.version(), next!(all).version()), (version, version));
    }
    let output = child.await.unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success() && text.contains("wrote 20"), "{text}");
}

/// A feed does not keep a file open whose store is gone, but for what it needs itself.
#[tokio::test(flavor = "multi_thread")]
async fn a_feed_keeps_its_store_open_and_lets_it_go() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.tai");
    let store = StateStore::open(&path).await.unwrap();
    let mut feed = store.watch("g", "s").unwrap();
    assert!(is_silent!(feed));
    save(&store, "s", 1).await;
    drop(store);
    assert_eq!(next!(feed).version(), 1);
    drop(feed);
    let names: Vec<_> =
        std::fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(names, ["a.tai"]);
}

/// Cleans up the events before a version, by another handle.
async fn trim(backend: &Arc<MemoryBackend>, first_version: u64) {
    let store = StateStore::with_backend(backend.clone(), StoreOptions::default());
    let newest = store.get_state("g", "s").await.unwrap().1;
    let options =
        CleanupOptions::older_than(Duration::ZERO).keep_versions(newest - first_version + 1);
    let persister = StateMachinePersister::with_defaults(store);
    persister.cleanup("g", &options, |_| {}).await.unwrap();
}

/// What was cleaned up is said, with the version from which the history is kept; from there the feed
/// goes on.
#[tokio::test]
async fn what_was_cleaned_up_is_said() {
    let backend = Arc::new(MemoryBackend::new());
    let store = StateStore::with_backend(backend.clone(), StoreOptions::default());
    for n in 1..=6 {
        save(&store, "s", n).await;
    }
    let complete = log(&store, "s").await;
    trim(&backend, 4).await;
    for version in 0..3 {
        let mut feed = store.watch("g", "s").unwrap().from_version(version);
        for _ in 0..2 {
            let error = feed.next().await.unwrap_err();
            assert_eq!(error.code(), "history_trimmed", "{error}");
            assert!(error.to_string().contains("since version 4"), "{error}");
        }
        let mut feed = feed.from_version(3);
        let first = next!(feed);
        assert_eq!((first.version(), first.from_state), (4, None));
        assert_eq!(next!(feed), complete[4]);
    }
    let mut all: GovernorFeed = store.watch_governor("g").unwrap();
    assert_eq!(all.next().await.unwrap_err().code(), "history_trimmed");
    let mut position = all.position().clone();
    position.set("s", 3);
    all = all.from_position(position);
    assert_eq!(next!(all).version(), 4);
    // The last event that was seen may be gone, as long as the next is there.
    let mut feed = store.watch("g", "s").unwrap().from_version(4);
    trim(&backend, 5).await;
    assert_eq!(next!(feed).version(), 5);
}

/// Events that go while a feed is between two pages of them, after it has read the head.
#[tokio::test]
async fn a_cleanup_in_the_middle_is_no_damage() {
    for first_version in [257, 258, 300] {
        let backend = Arc::new(MemoryBackend::new());
        let store = StateStore::with_backend(backend.clone(), StoreOptions::default());
        for n in 1..=400 {
            save(&store, "s", n).await;
        }
        let mut feed = store.watch("g", "s").unwrap();
        for version in 1..=256 {
            assert_eq!(next!(feed).version(), version);
        }
        trim(&backend, first_version).await;
        let after = tokio::time::timeout(PATIENCE, feed.next()).await.unwrap();
        match after {
            Ok(event) => assert_eq!((event.version(), first_version), (257, 257)),
            Err(error) => {
                assert_eq!((error.code(), first_version > 257), ("history_trimmed", true));
            }
        }
    }
}

/// An event that is missing from the log is damage, and is not passed over.
#[tokio::test]
async fn a_gap_is_not_passed_over() {
    let backend = Arc::new(MemoryBackend::new());
    let store = StateStore::with_backend(backend.clone(), StoreOptions::default());
    for n in 1..=5 {
        save(&store, "s", n).await;
    }
    let name = |id| Name::escape(id, "id").unwrap();
    let gone = Key { governor: name("g"), kind: Kind::Events, name: name("s"), version: 3 };
    backend.commit(vec![Write::delete(gone, Precondition::Present)]).await.unwrap();
    let mut feed = store.watch("g", "s").unwrap();
    let error = feed.next().await.unwrap_err();
    assert_eq!(error.code(), "corrupt");
    assert!(error.to_string().contains("v3"), "{error}");
}
