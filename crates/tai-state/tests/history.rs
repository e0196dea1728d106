//! What the log, the past and replay promise, on every backend.

#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]

#[macro_use]
mod common;

use std::sync::Arc;

use chrono::{TimeDelta, TimeZone, Utc};
use common::{Make, counter, open, options, proved, snapshot, why};
use serde_json::json;
use tai_state::{
    ChangeMetadata, Clock, Error, ManualClock, NewTransition, PersistenceConfig,
    StateMachinePersister,
};

on_every_backend![
    a_leap_second_is_the_moment_before_it,
    log_transition_checks_where_it_starts,
    load_state_replays,
    saved_snapshots_shorten_the_replay,
    events_tell_before_and_after,
    the_past_can_be_read,
    time_never_goes_backwards,
    exports_are_equal_after_a_round_trip,
    verify_proves_all,
    verify_beside_writers_finds_nothing,
];

async fn log_transition_checks_where_it_starts(make: Make<'_>) {
    let store = open(make);
    let persister = StateMachinePersister::with_defaults(store.clone());
    let (one, two) = (counter(1), counter(2));
    let event = persister.log_transition("gov", None, &one, "init", why()).await.unwrap();
    assert_eq!((event.version(), event.action.as_str()), (1, "init"));
    assert!(event.from_state.is_none());
    let again = persister.log_transition("gov", None, &one, "init", why()).await.unwrap_err();
    assert!(matches!(again, Error::VersionConflict { expected: 0, actual: 1, .. }));

    // Built by hand: compared by its data.
    let event = persister.log_transition("gov", Some(&one), &two, "step", why()).await.unwrap();
    assert_eq!(event.from_state.as_ref().unwrap().data, one.data);
    let wrong = persister.log_transition("gov", Some(&one), &two, "step", why()).await.unwrap_err();
    assert!(matches!(wrong, Error::VersionConflict { actual: 2, .. }));

    // Read from the store: compared by its version, whatever the data.
    let (read, _) = store.get_state("gov", "counter").await.unwrap();
    store.save_state("gov", "counter", counter(2), why()).await.unwrap();
    let stale =
        persister.log_transition("gov", Some(&read), &one, "back", why()).await.unwrap_err();
    assert!(matches!(stale, Error::VersionConflict { expected: 2, actual: 3, .. }));
    proved(&store).await;
}

async fn load_state_replays(make: Make<'_>) {
    let store = open(make);
    let persister = StateMachinePersister::with_defaults(store.clone());
    let (one, two) = (counter(1), counter(2));
    persister.log_transition("gov", None, &one, "init", why()).await.unwrap();
    persister.log_transition("gov", Some(&one), &two, "step", why()).await.unwrap();
    let (loaded, was_recovery) = persister.load_state("gov", "counter").await.unwrap();
    assert!(was_recovery);
    assert_eq!((loaded.data, loaded.version), (two.data, 2));
    let trusting = PersistenceConfig { auto_replay: false, ..PersistenceConfig::default() };
    let persister = StateMachinePersister::new(store.clone(), trusting);
    assert!(!persister.load_state("gov", "counter").await.unwrap().1);
    store.delete_state("gov", "counter", None, why()).await.unwrap();
    let gone = persister.load_state("gov", "counter").await.unwrap_err();
    assert!(matches!(gone, Error::StateNotFound { .. }));
}

async fn saved_snapshots_shorten_the_replay(make: Make<'_>) {
    let store = open(make);
    let config = PersistenceConfig {
        snapshot_interval: 10,
        snapshot_retention: 2,
        max_replay_batch_size: 3,
        ..PersistenceConfig::default()
    };
    let persister = StateMachinePersister::new(store.clone(), config);
    for n in 0..47 {
        let to = NewTransition::to("gov", "counter", "step", json!(n), why());
        persister.append(to).await.unwrap();
        let (loaded, _) = persister.load_state("gov", "counter").await.unwrap();
        assert_eq!(loaded.data, json!(n));
    }
    let report = store.verify(|_| {}).await.unwrap();
    assert_eq!((report.ok, report.snapshots, report.events), (true, 2, 47));
}

async fn events_tell_before_and_after(make: Make<'_>) {
    let store = open(make);
    for n in 1..=3 {
        store.save_state("gov", "counter", counter(n), why()).await.unwrap();
    }
    store.delete_state("gov", "counter", None, why()).await.unwrap();
    let mut history = store.history("gov", "counter", ..).await.unwrap();
    let events = history.next_page().await.unwrap();
    assert!(history.next_page().await.unwrap().is_empty());
    let counts: Vec<_> = events.iter().map(|e| e.to_state.data["count"].as_u64()).collect();
    assert_eq!(counts, [Some(1), Some(2), Some(3), None]);
    for pair in events.windows(2) {
        assert_eq!(pair[1].from_state.as_ref(), Some(&pair[0].to_state));
        assert_eq!(pair[1].prev_hash, Some(pair[0].hash));
        assert_ne!(pair[1].id, pair[0].id);
    }
    assert!(events[3].deleted && events[3].action == "delete");
    for event in &events {
        assert_eq!(store.event("gov", "counter", event.version()).await.unwrap(), *event);
    }
    let mut middle = store.history("gov", "counter", 2..4).await.unwrap();
    assert_eq!(middle.next_page().await.unwrap(), events[1..3]);
    for version in [0, 5, u64::MAX] {
        let missing = store.event("gov", "counter", version).await.unwrap_err();
        assert!(matches!(missing, Error::StateNotFound { .. }), "{missing}");
    }
    let mut nothing = store.history("gov", "counter", 9..).await.unwrap();
    assert!(nothing.next_page().await.unwrap().is_empty());
}

async fn the_past_can_be_read(make: Make<'_>) {
    let start = Utc.with_ymd_and_hms(2026, 1, 1, 15, 0, 0).unwrap();
    let clock = ManualClock::at(start);
    let store = make(options(|o| o.clock = Arc::new(clock.clone())));
    // Versions 1 to 9, two of them at the same time each.
    for n in 1..=9u64 {
        store.save_state("gov", "counter", counter(n), why()).await.unwrap();
        if n % 2 == 0 {
            clock.advance(TimeDelta::minutes(1));
        }
    }
    store.delete_state("gov", "counter", None, why()).await.unwrap();
    for n in 1..=9 {
        let then = store.state_at_version("gov", "counter", n).await.unwrap();
        assert_eq!((then.data, then.version), (json!({"count": n}), n));
    }
    for (seconds, version) in [(0, 2), (59, 2), (60, 4), (61, 4), (180, 8)] {
        let at = start + TimeDelta::seconds(seconds);
        assert_eq!(store.state_at_time("gov", "counter", at).await.unwrap().version, version);
    }
    let early = store.state_at_time("gov", "counter", start - TimeDelta::seconds(1)).await;
    assert!(matches!(early, Err(Error::StateNotFound { .. })));
    let late = store.state_at_time("gov", "counter", start + TimeDelta::hours(1)).await;
    assert!(late.unwrap_err().to_string().contains("deleted"));
    assert!(store.state_at_version("gov", "counter", 10).await.is_err());
}

async fn time_never_goes_backwards(make: Make<'_>) {
    let clock = ManualClock::at(Utc.with_ymd_and_hms(2026, 1, 1, 0, 0, 0).unwrap());
    let store = make(options(|o| o.clock = Arc::new(clock.clone())));
    for n in 0..5 {
        store.save_state("gov", "counter", counter(n), why()).await.unwrap();
        clock.advance(TimeDelta::hours(-1));
    }
    let mut history = store.history("gov", "counter", ..).await.unwrap();
    let events = history.next_page().await.unwrap();
    assert!(events.iter().all(|event| event.timestamp == events[0].timestamp));
    assert!(clock.now() < events[0].timestamp);
    proved(&store).await;
}

async fn exports_are_equal_after_a_round_trip(make: Make<'_>) {
    let source = open(make);
    for id in ["a", "é/x", "__b__", "c~1"] {
        for n in 0..5 {
            source
                .save_state(id, id, snapshot(id, json!({"n": n, "z": [0.1, u64::MAX]})), why())
                .await
                .unwrap();
        }
    }
    source.delete_state("a", "a", None, ChangeMetadata::new("op", "", None)).await.unwrap();
    let mut lines = Vec::new();
    let summary = source.export(None, &mut lines, |_| {}).await.unwrap();
    assert_eq!((summary.states, summary.transitions), (4, 21));
    assert_eq!(summary.content_hash.to_string(), proved(&source).await);

    let target = open(make);
    let persister = StateMachinePersister::with_defaults(&target);
    for line in std::str::from_utf8(&lines).unwrap().lines() {
        let line = tai_state::TransitionLine::parse(line, "line").unwrap();
        let who = ChangeMetadata::new(&line.actor, &line.reason, None);
        let transition = if line.deleted {
            NewTransition::to_deleted(&line.governor_id, &line.state_id, &line.action, who)
        } else {
            NewTransition::to(
                &line.governor_id,
                &line.state_id,
                &line.action,
                line.data.clone(),
                who,
            )
        };
        persister.append(transition.at(line.timestamp)).await.unwrap();
    }
    let mut again = Vec::new();
    let copied = target.export(None, &mut again, |_| {}).await.unwrap();
    assert!(lines == again, "the export changed");
    assert_eq!(copied.content_hash, summary.content_hash);
    assert_ne!(source.identity().store, target.identity().store);
}

async fn verify_proves_all(make: Make<'_>) {
    let store = open(make);
    let empty = store.verify(|_| {}).await.unwrap();
    assert!(empty.ok && empty.states == 0);
    // SHA-256 of nothing.
    assert!(empty.content_hash.to_string().starts_with("e3b0c44298fc1c14"));
    for n in 0..250 {
        store.save_state("gov", format!("s{}", n % 3), counter(n), why()).await.unwrap();
    }
    let mut seen = 0;
    let report = store.verify(|events| seen = events).await.unwrap();
    assert!(report.ok);
    assert_eq!((report.states, report.events, seen), (3, 250, 250));
    assert_ne!(report.content_hash, empty.content_hash);
}

/// What retention removes while it looks is no damage.
async fn verify_beside_writers_finds_nothing(make: Make<'_>) {
    let config = PersistenceConfig {
        snapshot_interval: 3,
        snapshot_retention: 1,
        ..PersistenceConfig::default()
    };
    let store = make(options(|o| o.persistence = config));
    // On the emulator a query costs as much as there are documents.
    let each = if store.location().starts_with("firestore") { 40 } else { 2_000 };
    let mut tasks = tokio::task::JoinSet::new();
    for task in 0..8 {
        let store = store.clone();
        tasks.spawn(async move {
            for n in 0..each {
                let id = format!("s{}-{}", task, n % 20);
                store.save_state("gov", &id, counter(n), why()).await.unwrap();
                tokio::task::yield_now().await;
            }
        });
    }
    let mut proofs_beside = 0;
    loop {
        let report = store.verify(|_| {}).await.unwrap();
        assert!(report.ok, "{:?}", report.problems);
        if tasks.is_empty() {
            assert_eq!(report.events, 8 * each);
            break;
        }
        proofs_beside += 1;
        while tasks.try_join_next().map(Result::unwrap).is_some() {}
    }
    println!("{proofs_beside} proofs beside the writers");
    assert!(proofs_beside > 0);
}

/// A time that neither engine keeps exactly is folded before it is stored, and when it is asked for.
async fn a_leap_second_is_the_moment_before_it(make: Make<'_>) {
    let store = open(make);
    let persister = StateMachinePersister::with_defaults(store.clone());
    let time = |text: &str| chrono::DateTime::parse_from_rfc3339(text).unwrap().to_utc();
    let append = async |n: u64, at: &str| {
        let to = tai_state::NewTransition::to("g", "s", "step", json!(n), why()).at(time(at));
        persister.append(to).await.unwrap()
    };
    append(1, "2026-06-30T23:59:58Z").await;
    let leap = append(2, "2026-06-30T23:59:60.5Z").await;
    assert_eq!(leap.timestamp, time("2026-06-30T23:59:59.999999Z"));
    append(3, "2026-07-01T00:00:00Z").await;
    for (asked, version) in [
        ("2026-06-30T23:59:59Z", 1),
        ("2026-06-30T23:59:60Z", 2),
        ("2026-06-30T23:59:60.9Z", 2),
        ("2026-07-01T00:00:01Z", 3),
    ] {
        let found = store.state_at_time("g", "s", time(asked)).await.unwrap();
        assert_eq!(found.version, version, "{asked}");
    }
}
