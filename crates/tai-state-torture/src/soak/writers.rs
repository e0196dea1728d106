//! Who writes while it soaks: processes that append and are killed, holders of a lock, and who tidies up.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use rustix::process::Signal;
use serde_json::{Value, json};
use tai_state::{CleanupOptions, Error, StateMachinePersister, StateStore, TransactionManager};

use super::{KEYS, LISTS, Shared};
use crate::bank::money;
use crate::engine::{Store, snapshot, why};
use crate::locks;
use crate::process::{ANSWER, Asked, Process};
use crate::random::Random;

/// A lock's lease, and how often somebody forgets to give it back.
const LEASE: Duration = Duration::from_secs(1);
const FORGOTTEN: u64 = 10;
/// So many versions are kept of each state, so that whoever follows is never too late.
const KEPT: u64 = 150;
const SAVED_AT_ONCE: usize = 6;

/// Appends by a process; of a hundred transactions so many end with the death of it.
pub(super) fn appends(
    url: &str,
    client: u64,
    kills: u64,
    mut random: Random,
    asked: &Arc<Asked>,
    shared: &Shared,
) {
    let mut number = 0u64;
    while !shared.is_over() {
        let process = Process::start(url, 1, asked);
        shared.note_process(client, process.id());
        loop {
            if shared.is_over() {
                break;
            }
            let key = format!("l{}", random.below(KEYS));
            let state = format!("{LISTS}/{key}");
            number += 1;
            let element = (!random.percent(3)).then_some((client << 32) | number);
            let op = match element {
                Some(element) => json!({"op": "append", "state": state, "value": element}),
                None => json!({"op": "put", "state": state, "data": []}),
            };
            let is_killed = random.percent(kills);
            let within =
                if is_killed { Duration::from_micros(random.below(5_000)) } else { ANSWER };
            let Some(answer) = process.ask(&[op], within) else {
                if !is_killed {
                    shared.wrong(format!("writer {client} got no answer"));
                }
                shared.kills.fetch_add(1, Ordering::Relaxed);
                break;
            };
            match answer["results"][0]["version"].as_u64() {
                Some(version) => {
                    shared.appended.fetch_add(1, Ordering::Relaxed);
                    let told = shared.matching.lock().unwrap().told(&key, version, element);
                    told.into_iter().for_each(|fault| shared.wrong(fault));
                }
                None if answer["outcome"] == "unknown" => {
                    shared.given_up.fetch_add(1, Ordering::Relaxed);
                }
                None if answer["retryable"] == true => {}
                None => shared.wrong(format!("an append: {answer}")),
            }
        }
    }
}

/// A counter behind a lock, fenced: each grant adds one.
pub(super) async fn holds(store: StateStore, mut random: Random, shared: Arc<Shared>) {
    let manager = TransactionManager::new(&store);
    while !shared.is_over() {
        let wait = Duration::from_secs(2);
        let newest = shared.newest_token();
        let lock = match manager.acquire_lock_within("soak", "holder", LEASE, wait).await {
            Ok(lock) => lock,
            Err(error) if error.is_transient() => continue,
            Err(error) => return shared.wrong(format!("a lock: {error}")),
        };
        shared.granted(lock.fencing_token, newest);
        let fenced = store.fenced_by(&lock);
        let read = match store.get_state("held", "n").await {
            Ok((state, _)) => state.data.as_u64().unwrap_or(0),
            Err(Error::StateNotFound { .. }) => 0,
            Err(_) => continue,
        };
        // It expects no version: only the fence stands between it and a lost update.
        let new = snapshot("n", (read + 1).into());
        match fenced.save_state("held", "n", new, why()).await {
            Ok(_) => drop(shared.fenced.fetch_add(1, Ordering::Relaxed)),
            Err(Error::LockLost { .. }) => {}
            Err(Error::OutcomeUnknown { .. }) => {
                shared.fenced_unknown.fetch_add(1, Ordering::Relaxed);
            }
            Err(error) if error.is_transient() => {}
            Err(error) => shared.wrong(format!("a fenced write: {error}")),
        }
        if !random.percent(FORGOTTEN) {
            // Lost meanwhile is as good as released.
            let _ = lock.release().await;
        } else {
            tokio::time::sleep(Duration::from_millis(random.below(100))).await;
        }
    }
}

/// Every few seconds a process that holds the lock is killed: its lease has to end.
pub(super) fn holders_die(store: &Store, mut random: Random, shared: &Shared) {
    while !shared.is_over() {
        let newest = shared.newest_token();
        let holder =
            locks::running(store, "soak", &["--ttl", "500ms", "--wait", "20s"], locks::HOLD);
        // Its token, or that it waited in vain.
        let said = holder.next().unwrap_or_default();
        if let Ok(token) = said.parse::<u64>() {
            shared.granted(token, newest);
            shared.holders_killed.fetch_add(1, Ordering::Relaxed);
        }
        holder.signal_all(Signal::KILL);
        drop(holder);
        shared.waits(Duration::from_millis(2_000 + random.below(2_000)));
    }
}

/// Cleans up, saves snapshots and removes them again.
pub(super) async fn tidies(store: StateStore, mut random: Random, shared: Arc<Shared>) {
    let persister = StateMachinePersister::with_defaults(&store);
    let manager = TransactionManager::new(&store);
    let options = CleanupOptions::older_than(Duration::from_secs(3)).keep_versions(KEPT);
    let mut turn = 0;
    while !shared.is_over() {
        tokio::time::sleep(Duration::from_millis(500)).await;
        turn += 1;
        for state in 0..SAVED_AT_ONCE {
            let (governor, state) = match state % 2 {
                0 => (LISTS, format!("l{}", random.below(KEYS))),
                _ => (money::BANK, money::account(random.below(money::ACCOUNTS))),
            };
            match persister.save_snapshot(governor, &state).await {
                Ok(_) => drop(shared.snapshots.fetch_add(1, Ordering::Relaxed)),
                Err(error) => shared.allowed("a snapshot", Err(error)),
            }
            if random.percent(30) {
                let pruned = persister.prune_snapshots(governor, &state, 1).await;
                shared.allowed("pruning", pruned.map(drop));
            }
        }
        if turn % 6 == 0 {
            for governor in [LISTS, money::BANK, "held"] {
                match persister.cleanup(governor, &options, |_| {}).await {
                    Ok(report) => {
                        shared.cleaned.fetch_add(report.events, Ordering::Relaxed);
                    }
                    Err(error) => shared.allowed("a clean-up", Err(error)),
                }
            }
            shared.allowed("clean-up of locks", manager.cleanup_expired_locks().await.map(drop));
            shared.cleanups.fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// Loads a state from its log again and again, which compares it with the head.
pub(super) async fn replays(store: StateStore, mut random: Random, shared: Arc<Shared>) {
    let persister = StateMachinePersister::with_defaults(&store);
    while !shared.is_over() {
        tokio::time::sleep(Duration::from_millis(100)).await;
        let (governor, state) = match random.percent(50) {
            true => (LISTS, format!("l{}", random.below(KEYS))),
            false => (money::BANK, money::account(random.below(money::ACCOUNTS))),
        };
        // Its whole log up to the head, and what the log says is what the head says.
        let mut last: Option<(u64, Value)> = None;
        let each = |event: tai_state::LoggedEvent| {
            last = Some((event.to_state.version, event.to_state.data));
            Ok(())
        };
        match persister.replay(governor, &state, each).await {
            Ok(replayed) => {
                let head = replayed.state.map(|state| (state.version, state.data));
                if head != last {
                    shared.wrong(format!("{governor}/{state}: {head:?}, its log says {last:?}"));
                }
                shared.replays.fetch_add(1, Ordering::Relaxed);
            }
            Err(Error::StateNotFound { .. } | Error::HistoryTrimmed { .. }) => {}
            Err(error) => shared.allowed("a replay", Err(error)),
        }
    }
}
