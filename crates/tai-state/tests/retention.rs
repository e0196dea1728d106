//! Clean-up, purge and saved snapshots: what is kept is whole, what is gone is gone and says so.

#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]

#[macro_use]
mod common;

use std::sync::Arc;
use std::time::Duration;

use chrono::{DateTime, TimeDelta, TimeZone, Utc};
use common::{Make, options, proved, snapshot, why};
use serde_json::{Value, json};
use tai_state::{
    CleanupOptions, CleanupReport, Error, ManualClock, NewTransition, PersistenceConfig,
    StateMachinePersister, StateStore,
};

const DAY: i64 = 24 * 60 * 60;

fn day(n: i64) -> DateTime<Utc> {
    Utc.timestamp_opt(1_767_225_600 + n * DAY, 0).unwrap()
}

/// One change of `s` on each of the days 1 to 60; it is day 60 now.
async fn sixty_days(make: Make<'_>, interval: u64) -> (StateStore, StateMachinePersister) {
    let clock = ManualClock::at(day(60));
    let config = PersistenceConfig {
        snapshot_interval: interval,
        snapshot_retention: 2,
        ..PersistenceConfig::default()
    };
    let store = make(options(|options| {
        options.clock = Arc::new(clock);
        options.persistence = config.clone();
    }));
    let persister = StateMachinePersister::new(store.clone(), config);
    for n in 1..=60 {
        let change = NewTransition::to("g", "s", "tick", json!({ "day": n }), why()).at(day(n));
        persister.append(change).await.unwrap();
    }
    (store, persister)
}

async fn on_day(store: &StateStore, at: DateTime<Utc>) -> Result<Value, Error> {
    Ok(store.state_at_time("g", "s", at).await?.data["day"].clone())
}

async fn the_kept_days_can_all_be_asked(make: Make<'_>) {
    let (store, persister) = sixty_days(make, 25).await;
    // Two states of which nothing is old, one of which everything is.
    persister.append(NewTransition::to("g", "new", "a", json!(1), why())).await.unwrap();
    let old = NewTransition::to("g", "gone", "a", json!(1), why()).at(day(1));
    persister.append(old).await.unwrap();
    persister.append(NewTransition::to_deleted("g", "gone", "b", why()).at(day(2))).await.unwrap();
    store.save_state("other", "s", snapshot("s", json!(0)), why()).await.unwrap();
    proved(&store).await;

    let options = CleanupOptions::older_than(Duration::from_secs(30 * DAY as u64));
    let dry = persister.cleanup("g", &options.clone().dry_run(), |_| {}).await.unwrap();
    assert_eq!(store.state_at_version("g", "s", 1).await.unwrap().data, json!({"day": 1}));
    let done = persister.cleanup_old_data("g", 30).await.unwrap();
    assert_eq!((done.events, done.snapshots, done.snapshots_saved), (29 + 1, 1, 1 + 1));
    assert_eq!((done.states, done.states_trimmed, done.cutoff), (3, 2, day(30)));
    let mut as_said = done.clone();
    as_said.dry_run = true;
    assert_eq!(as_said, dry);
    assert!(done.recovered_bytes > 30 * 200, "{done:?}");
    let report = store.verify(|_| {}).await.unwrap();
    assert!(report.ok && report.leftovers == 0, "{report:?}");

    // Exactly at the cutoff and ever after the answer is there, before it is the error that says why.
    for n in 30..=60 {
        assert_eq!(on_day(&store, day(n)).await.unwrap(), json!(n));
        assert_eq!(on_day(&store, day(n) + TimeDelta::hours(5)).await.unwrap(), json!(n));
    }
    for at in [day(30) - TimeDelta::microseconds(1), day(1)] {
        let error = on_day(&store, at).await.unwrap_err();
        assert!(matches!(error, Error::HistoryTrimmed { first_version: 30, .. }), "{error}");
    }
    for version in [1, 29] {
        let error = store.record_at_version("g", "s", version).await.unwrap_err();
        assert_eq!(error.code(), "history_trimmed");
    }
    assert_eq!(store.history("g", "s", ..).await.unwrap().next_page().await.unwrap().len(), 31);
    assert_eq!(store.history("g", "s", 3..).await.unwrap_err().code(), "history_trimmed");
    assert!(!store.exists("g", "gone").await.unwrap());
    assert_eq!(persister.load_state("g", "s").await.unwrap().0.data, json!({"day": 60}));

    // A second time there is nothing to do, and writing goes on as before.
    let again = persister.cleanup_old_data("g", 30).await.unwrap();
    assert_eq!((again.events, again.snapshots, again.recovered_bytes), (0, 0, 0));
    for n in 61..=130 {
        let change = NewTransition::to("g", "s", "tick", json!({ "day": n }), why()).at(day(n));
        assert_eq!(persister.append(change).await.unwrap().version(), n as u64);
    }
    let saved = persister.saved_snapshots("g", "s").await.unwrap();
    let versions: Vec<_> = saved.iter().map(|saved| (saved.version, saved.is_cut)).collect();
    assert_eq!(versions, [(30, true), (100, false), (125, false)]);
    proved(&store).await;
}

async fn nothing_of_a_head_is_ever_removed(make: Make<'_>) {
    let (store, persister) = sixty_days(make, 0).await;
    let all = persister.cleanup_old_data("g", 0).await.unwrap();
    assert_eq!((all.events, all.snapshots_saved), (59, 1));
    assert_eq!(store.get_state("g", "s").await.unwrap().1, 60);
    let page = store.history("g", "s", ..).await.unwrap().next_page().await.unwrap();
    assert_eq!(page.len(), 1);
    assert!(page[0].from_state.is_none() && page[0].prev_hash.is_some());
    proved(&store).await;
    let far = CleanupOptions::before(day(10_000));
    assert_eq!(persister.cleanup("g", &far, |_| {}).await.unwrap().events, 0);
}

async fn so_many_versions_are_kept_whatever_their_age(make: Make<'_>) {
    let (store, persister) = sixty_days(make, 10).await;
    let options = CleanupOptions::before(day(500)).keep_versions(7).batch(10);
    let mut batches = Vec::new();
    let mut told = |report: &tai_state::CleanupReport| batches.push(report.events);
    let done = persister.cleanup("g", &options, &mut told).await.unwrap();
    assert_eq!(done.events, 53);
    // The first goes with the commit that lets history begin later.
    assert_eq!(batches, [1, 11, 21, 31, 41, 51, 53, 53]);
    assert_eq!(store.history("g", "s", ..).await.unwrap().next_page().await.unwrap().len(), 7);
    proved(&store).await;
}

async fn a_purge_leaves_a_tombstone_without_data(make: Make<'_>) {
    let (store, persister) = sixty_days(make, 10).await;
    let export = |store: StateStore| async move {
        let mut out = Vec::new();
        store.export(None, &mut out, |_| {}).await.unwrap();
        String::from_utf8(out).unwrap()
    };
    assert!(export(store.clone()).await.contains("\"day\":60"));
    let by = tai_state::ChangeMetadata::new("dpo", "request 17", None);
    let report = persister.purge("g", "s", by, |_| {}).await.unwrap();
    assert_eq!((report.version, report.events, report.snapshots), (61, 60, 2));
    persister.verify_purge(&report).await.unwrap();
    assert_eq!(store.get_state("g", "s").await.unwrap_err().code(), "state_not_found");
    assert_eq!(persister.load_state("g", "s").await.unwrap_err().code(), "state_not_found");
    for version in 1..=60 {
        let error = store.state_at_version("g", "s", version).await.unwrap_err();
        assert_eq!(error.code(), "history_trimmed");
    }
    let lines = export(store.clone()).await;
    assert!(!lines.contains("day") && lines.contains("request 17"), "{lines}");
    let verified = store.verify(|_| {}).await.unwrap();
    assert!(verified.ok, "{:?}", verified.problems);
    assert_eq!((verified.events, verified.snapshots, verified.leftovers), (1, 0, 0));

    // Once more changes nothing; and versions go on.
    let again = persister.purge("g", "s", why(), |_| {}).await.unwrap();
    assert_eq!((again.version, again.hash, again.events), (61, report.hash, 0));
    let version = store.save_state("g", "s", snapshot("s", json!(1)), why()).await.unwrap();
    assert_eq!(version, 62);
    persister.verify_purge(&report).await.unwrap();
    // What has come since can be purged too.
    let last = persister.purge("g", "s", why(), |_| {}).await.unwrap();
    assert_eq!((last.version, last.events), (63, 2));
    persister.verify_purge(&last).await.unwrap();
    persister.verify_purge(&report).await.unwrap();
    proved(&store).await;
    let nothing = persister.purge("g", "never", why(), |_| {}).await.unwrap_err();
    assert_eq!(nothing.code(), "state_not_found");
    // Nobody else can make what looks like a purge.
    let forged = why().with_context("tai_state.purge", true);
    let forged = persister.append(NewTransition::to_deleted("g", "s", "purge", forged)).await;
    assert_eq!(forged.unwrap_err().code(), "invalid_state");
}

/// That it is deleted does not mean that nothing of it is left.
async fn a_deleted_state_can_be_purged(make: Make<'_>) {
    let (store, persister) = sixty_days(make, 10).await;
    store.delete_state("g", "s", None, why()).await.unwrap();
    let report = persister.purge("g", "s", why(), |_| {}).await.unwrap();
    assert_eq!((report.version, report.events, report.snapshots), (62, 61, 2));
    persister.verify_purge(&report).await.unwrap();
    let error = store.state_at_version("g", "s", 60).await.unwrap_err();
    assert_eq!(error.code(), "history_trimmed");
    proved(&store).await;
}

/// History that begins where it is to begin is left alone, and a dry run says so.
async fn what_is_not_older_is_left_alone(make: Make<'_>) {
    let (store, persister) = sixty_days(make, 25).await;
    for at in [day(0), day(1), day(2) - TimeDelta::microseconds(1)] {
        let options = CleanupOptions::before(at);
        let dry = persister.cleanup("g", &options.clone().dry_run(), |_| {}).await.unwrap();
        let done = persister.cleanup("g", &options, |_| {}).await.unwrap();
        for report in [dry, done] {
            assert_eq!((report.states, report.states_trimmed, report.events), (1, 0, 0));
            assert_eq!((report.snapshots, report.snapshots_saved), (0, 0));
            assert_eq!(report.recovered_bytes, 0);
        }
    }
    assert_eq!(store.history("g", "s", ..).await.unwrap().next_page().await.unwrap().len(), 60);
    proved(&store).await;
}

/// Wherever the cut falls among the saved snapshots, a dry run counts what is then done.
async fn a_dry_run_counts_what_is_done(make: Make<'_>) {
    let (store, persister) = sixty_days(make, 25).await;
    for (n, snapshots, saved) in [(24, 0, 1), (25, 1, 0), (26, 1, 1), (50, 1, 0), (55, 1, 1)] {
        let options = CleanupOptions::before(day(n));
        let mut dry = persister.cleanup("g", &options.clone().dry_run(), |_| {}).await.unwrap();
        let done = persister.cleanup("g", &options, |_| {}).await.unwrap();
        assert_eq!((done.snapshots, done.snapshots_saved), (snapshots, saved), "{n}");
        assert!(dry.dry_run && !done.dry_run && done.recovered_bytes > 0);
        dry.dry_run = false;
        assert_eq!(dry, done, "{n}");
    }
    proved(&store).await;
}

/// A clean-up that ends on its way leaves events that are nowhere in the history. The next one, whose cut is a
/// later one, removes them first, and counts them.
async fn what_was_left_is_counted(make: Make<'_>) {
    let (store, persister) = sixty_days(make, 25).await;
    let stopped = persister.clone();
    let cleaning = tokio::spawn(async move {
        let options = CleanupOptions::before(day(30)).batch(7);
        let stop = |report: &CleanupReport| assert!(report.events == 0, "stopped");
        stopped.cleanup("g", &options, stop).await
    });
    assert!(cleaning.await.unwrap_err().is_panic());
    // The first event went with the cut.
    let report = store.verify(|_| {}).await.unwrap();
    assert!(report.ok && report.leftovers == 28, "{report:?}");
    let options = CleanupOptions::before(day(50)).batch(7);
    let mut dry = persister.cleanup("g", &options.clone().dry_run(), |_| {}).await.unwrap();
    let done = persister.cleanup("g", &options, |_| {}).await.unwrap();
    assert_eq!(done.events, 28 + 20);
    dry.dry_run = false;
    assert_eq!(dry, done);
    let report = store.verify(|_| {}).await.unwrap();
    assert!(report.ok && report.leftovers == 0, "{report:?}");
}

async fn two_clean_ups_add_up(make: Make<'_>) {
    let (store, persister) = sixty_days(make, 25).await;
    for n in 1..=4 {
        let change = NewTransition::to("other", "s", "tick", json!(n), why()).at(day(n));
        persister.append(change).await.unwrap();
    }
    let options = CleanupOptions::before(day(55));
    let one = persister.cleanup("g", &options, |_| {}).await.unwrap();
    let mut two = persister.cleanup("other", &options, |_| {}).await.unwrap();
    assert_eq!((one.events, one.snapshots, one.snapshots_saved, one.states), (54, 2, 1, 1));
    assert_eq!((two.events, two.snapshots, two.snapshots_saved, two.states), (3, 0, 1, 1));
    two.problems.push("a problem".into());
    let sum = one.clone().and(two.clone());
    assert_eq!((sum.events, sum.snapshots, sum.snapshots_saved), (57, 2, 2));
    assert_eq!((sum.states, sum.states_trimmed), (2, 2));
    assert_eq!(sum.recovered_bytes, one.recovered_bytes + two.recovered_bytes);
    assert_eq!(two.clone().and(one).snapshots, 2);
    assert_eq!((sum.problems, sum.cutoff), (two.problems, day(55)));
    proved(&store).await;
}

async fn a_purge_that_left_something_is_found_out(make: Make<'_>) {
    let (_, persister) = sixty_days(make, 10).await;
    let report = persister.purge("g", "s", why(), |_| {}).await.unwrap();
    let mut wrong = report.clone();
    wrong.version += 1;
    assert_eq!(persister.verify_purge(&wrong).await.unwrap_err().code(), "corrupt");
    let (_, whole) = sixty_days(make, 10).await;
    assert_eq!(whole.verify_purge(&report).await.unwrap_err().code(), "corrupt");
}

async fn snapshots_are_saved_and_pruned_by_hand(make: Make<'_>) {
    let (store, persister) = sixty_days(make, 7).await;
    let versions = async || {
        let saved = persister.saved_snapshots("g", "s").await.unwrap();
        assert!(saved.iter().all(|saved| saved.bytes > 100 && saved.problem.is_none()));
        saved.iter().map(|saved| saved.version).collect::<Vec<_>>()
    };
    assert_eq!(versions().await, [49, 56]);
    assert_eq!(persister.save_snapshot("g", "s").await.unwrap(), 60);
    assert_eq!(persister.save_snapshot("g", "s").await.unwrap(), 60);
    assert_eq!(versions().await, [49, 56, 60]);
    assert_eq!(persister.recover("g", "s").await.unwrap().1.events_replayed, 0);
    proved(&store).await;
    let pruned = persister.prune_snapshots("g", "s", 1).await.unwrap();
    assert_eq!((pruned.snapshots, versions().await), (2, vec![60]));
    assert!(pruned.recovered_bytes > 200);
    assert_eq!(persister.prune_snapshots("g", "s", 1).await.unwrap().snapshots, 0);
    persister.cleanup_old_data("g", 10).await.unwrap();
    assert_eq!(persister.prune_snapshots("g", "s", 0).await.unwrap().snapshots, 1);
    assert_eq!(versions().await, [50]);
    proved(&store).await;
    for missing in [
        persister.saved_snapshots("g", "x").await.map(drop),
        persister.save_snapshot("g", "x").await.map(drop),
        persister.prune_snapshots("g", "x", 0).await.map(drop),
    ] {
        assert_eq!(missing.unwrap_err().code(), "state_not_found");
    }
}

/// Writers of the same state, two clean-ups and readers at the same time: everybody gets what is
/// theirs, and nobody takes what is being removed for damage.
async fn cleaning_up_under_load_disturbs_nobody(make: Make<'_>) {
    let (store, persister) = sixty_days(make, 10).await;
    let is_slow =
        !store.identity().node.starts_with("mem") && store.location().contains("firestore");
    let rounds = if is_slow { 15 } else { 150 };
    let mut tasks = tokio::task::JoinSet::new();
    for task in 0..3 {
        let persister = persister.clone();
        tasks.spawn(async move {
            for n in 0..rounds {
                let to = json!({ "day": 60, "task": task, "n": n });
                let change = NewTransition::to("g", "s", "write", to, why());
                persister.append(change).await.unwrap();
            }
        });
    }
    for keep in [5, 9] {
        let persister = persister.clone();
        tasks.spawn(async move {
            for _ in 0..rounds / 3 {
                let options = CleanupOptions::before(day(500)).keep_versions(keep).batch(3);
                let report = persister.cleanup("g", &options, |_| {}).await.unwrap();
                assert!(report.problems.is_empty(), "{:?}", report.problems);
            }
        });
    }
    let reader = persister.clone();
    let verified = store.clone();
    tasks.spawn(async move {
        for _ in 0..rounds / 3 {
            let (state, was_recovery) = reader.load_state("g", "s").await.unwrap();
            assert!(was_recovery && state.data["day"] == 60);
            let report = verified.verify(|_| {}).await.unwrap();
            assert!(report.ok, "{:?}", report.problems);
        }
    });
    while let Some(done) = tasks.join_next().await {
        done.unwrap();
    }
    assert_eq!(store.get_state("g", "s").await.unwrap().1, 60 + 3 * rounds);
    proved(&store).await;
}

on_every_backend!(
    the_kept_days_can_all_be_asked,
    nothing_of_a_head_is_ever_removed,
    so_many_versions_are_kept_whatever_their_age,
    a_purge_leaves_a_tombstone_without_data,
    a_deleted_state_can_be_purged,
    what_is_not_older_is_left_alone,
    a_dry_run_counts_what_is_done,
    two_clean_ups_add_up,
    what_was_left_is_counted,
    a_purge_that_left_something_is_found_out,
    snapshots_are_saved_and_pruned_by_hand,
    cleaning_up_under_load_disturbs_nobody,
);
