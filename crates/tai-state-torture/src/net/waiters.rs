//! Fifty who wait for one lock: a release wakes them, one gets it, and nobody looks more than twice.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use tai_state::backend::memory::MemoryBackend;
use tai_state::backend::{Backend, Kind};
use tai_state::testing::emulator::Emulator;
use tai_state::testing::faults::{Call, FaultyBackend};
use tai_state::{StateStore, StoreOptions, TransactionManager};
use tokio::sync::{Barrier, mpsc};
use tokio::task::JoinSet;

use super::Behind;
use crate::run::Tally;

const WAITERS: u64 = 50;
const LOOKS: u64 = 2;
/// So many of them are counted.
const RELEASES: usize = 15;
/// In hundredths: who waits looks every few seconds in any case, whoever is woken or not.
const IN_ANY_CASE: u64 = 20;
const LEASE: Duration = Duration::from_secs(60);
/// So long a holder counts who looks: far longer than those who were woken need, and shorter than the time
/// after which one looks in any case.
const HOLDS: Duration = Duration::from_millis(150);

/// Handles like those of as many processes, in one memory.
pub(super) async fn in_memory(tally: &mut Tally) {
    let inner: Arc<dyn Backend> = Arc::new(MemoryBackend::new());
    let looks = Arc::new(AtomicU64::new(0));
    let handles = (0..=WAITERS).map(|_| {
        let backend = FaultyBackend::new(Arc::clone(&inner), []).far();
        let looks = Arc::clone(&looks);
        backend.always(Call::Get(Kind::Locks), move || {
            looks.fetch_add(1, Ordering::SeqCst);
            std::future::ready(())
        });
        StateStore::with_backend(Arc::new(backend), StoreOptions::default())
    });
    let handles = handles.collect();
    queue("in memory", handles, Arc::new(move || looks.load(Ordering::SeqCst)), tally).await;
}

pub(super) async fn on_the_wire(emulator: &Arc<Emulator>, tally: &mut Tally) {
    let behind = Arc::new(Behind::new(emulator).await);
    let mut handles = Vec::new();
    for _ in 0..=WAITERS {
        handles.push(behind.store(StoreOptions::default()).await);
    }
    let counted = Arc::clone(&behind);
    let looks = move || counted.proxy.usage().calls.get("BatchGetDocuments").copied().unwrap_or(0);
    queue("on the wire", handles, Arc::new(looks), tally).await;
}

async fn queue(
    what: &str,
    mut handles: Vec<StateStore>,
    looks: Arc<dyn Fn() -> u64 + Send + Sync>,
    tally: &mut Tally,
) {
    let first = TransactionManager::new(handles.pop().unwrap());
    let lock = first.acquire_lock("r", "first", LEASE).await.unwrap();
    let token = lock.fencing_token;
    let all_wait = Arc::new(Barrier::new(handles.len() + 1));
    let is_held = Arc::new(AtomicBool::new(true));
    let mut tasks = JoinSet::new();
    let (tells, mut told) = mpsc::unbounded_channel();
    for (number, handle) in handles.into_iter().enumerate() {
        let (all_wait, is_held) = (Arc::clone(&all_wait), Arc::clone(&is_held));
        let (looks, tells) = (Arc::clone(&looks), tells.clone());
        tasks.spawn(async move {
            let manager = TransactionManager::new(handle);
            all_wait.wait().await;
            let acquire = manager.acquire_lock_within("r", format!("c{number}"), LEASE, LEASE);
            let lock = acquire.await.unwrap();
            let was_held = is_held.swap(true, Ordering::SeqCst);
            // How many looks this hold brings: those of who is woken by the release before it.
            tokio::time::sleep(HOLDS).await;
            let seen = looks();
            is_held.store(false, Ordering::SeqCst);
            let token = lock.fencing_token;
            lock.release().await.unwrap();
            let _ = tells.send((token, seen, was_held));
        });
    }
    all_wait.wait().await;
    // They have looked, opened their alarms and looked again.
    let mut before = 0;
    while before != looks() {
        before = looks();
        tokio::time::sleep(HOLDS * 4).await;
    }
    is_held.store(false, Ordering::SeqCst);
    lock.release().await.unwrap();
    let mut held = Vec::new();
    while held.len() < RELEASES {
        held.extend(told.recv().await);
    }
    drop(tasks);
    held.sort_unstable();
    let mut most = 0u64;
    for (index, (given, seen, was_held)) in held.into_iter().enumerate() {
        let index = index as u64;
        tally.count("releases with waiters", 1);
        tally.holds(!was_held, || format!("{what}: token {given} while another held the lock"));
        tally.holds(given == token + index + 1, || {
            format!("{what}: token {given} after {} releases", index + 1)
        });
        let waiters = WAITERS - index;
        let share = (seen - before).saturating_mul(100) / waiters;
        most = most.max(share);
        before = seen;
    }
    println!("  {WAITERS} waiters {what}: at most {most} % looks each after a release");
    tally.highest(&format!("hundredths of a look of each waiter after a release, {what}"), most);
    tally.holds(most <= LOOKS * 100 + IN_ANY_CASE, || {
        format!("{what}: {most} % looks of each waiter")
    });
}
