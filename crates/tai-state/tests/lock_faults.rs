//! Locks whose commits are lost, doubled, late or overtaken: granted once, given back once, never another's.

#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]

mod common;

use std::sync::Arc;
use std::time::Duration;

use common::options;
use tai_state::backend::Backend;
use tai_state::backend::memory::MemoryBackend;
use tai_state::testing::faults::{Call, CommitFault, FaultyBackend};
use tai_state::{Error, LockStatus, StateStore, TransactionManager};

const LONG: Duration = Duration::from_secs(30);
const FAULTS: [CommitFault; 5] = [
    CommitFault::None,
    CommitFault::Unavailable,
    CommitFault::LostRequest,
    CommitFault::LostAnswer,
    CommitFault::Duplicated,
];

fn memory() -> Arc<dyn Backend> {
    Arc::new(MemoryBackend::new())
}

fn faulty(backend: &Arc<dyn Backend>, fault: CommitFault) -> FaultyBackend {
    FaultyBackend::new(Arc::clone(backend), [fault])
}

/// A process of its own, as far as its locks know.
fn manager(backend: impl Backend + 'static) -> TransactionManager {
    let options = options(|options| {
        options.retry.base = Duration::from_micros(200);
        options.retry.cap = Duration::from_millis(2);
    });
    TransactionManager::new(StateStore::with_backend(Arc::new(backend), options))
}

fn sound(backend: &Arc<dyn Backend>) -> TransactionManager {
    manager(faulty(backend, CommitFault::None))
}

async fn status(manager: &TransactionManager) -> (LockStatus, String, u64) {
    let record = manager.lock_record("r").await.unwrap().unwrap();
    (record.status, record.client_id, record.fencing_token)
}

#[tokio::test]
async fn whatever_becomes_of_the_commit_a_lock_is_granted_once() {
    for fault in FAULTS {
        let backend = memory();
        let observer = sound(&backend);
        let asking = manager(faulty(&backend, fault));
        let lock = asking.try_acquire_lock("r", "me", LONG).await.unwrap();
        assert_eq!((lock.fencing_token, lock.lease()), (1, LONG), "{fault:?}");
        assert_eq!(status(&observer).await, (LockStatus::Held, "me".into(), 1));
        lock.release().await.unwrap();
        assert_eq!(status(&observer).await, (LockStatus::Free, "me".into(), 1));
        assert_eq!(observer.try_acquire_lock("r", "you", LONG).await.unwrap().fencing_token, 2);
    }
}

#[tokio::test]
async fn whatever_becomes_of_the_commit_a_holder_gives_back_once() {
    for fault in FAULTS {
        let backend = memory();
        let (observer, mine) = (sound(&backend), faulty(&backend, CommitFault::None));
        let lock = manager(mine.clone()).try_acquire_lock("r", "me", LONG).await.unwrap();
        mine.inject([fault]);
        let before = mine.commits();
        lock.release().await.unwrap();
        assert_eq!(status(&observer).await.0, LockStatus::Free, "{fault:?}");
        let is_sent_again = matches!(fault, CommitFault::Unavailable | CommitFault::LostRequest);
        assert_eq!(mine.commits() - before, 1 + u64::from(is_sent_again), "{fault:?}");
    }
    // It arrives, its answer is lost, and another comes after it.
    let backend = memory();
    let (next, mine) = (sound(&backend), faulty(&backend, CommitFault::None));
    let lock = manager(mine.clone()).try_acquire_lock("r", "me", LONG).await.unwrap();
    let taking = next.clone();
    mine.at(Call::Commit, 0, move || {
        let taking = taking.clone();
        async move { std::mem::forget(taking.try_acquire_lock("r", "next", LONG).await.unwrap()) }
    });
    lock.release().await.unwrap();
    assert_eq!(status(&next).await, (LockStatus::Held, "next".into(), 2));
}

/// Who has lost a lock to another is told so, and takes nothing from him.
#[tokio::test]
async fn a_release_that_is_too_late_takes_nothing_from_the_next() {
    let backend = memory();
    let (holder, next) = (sound(&backend), sound(&backend));
    let lock = holder.try_acquire_lock("r", "me", LONG).await.unwrap();
    next.break_lock("r").await.unwrap().unwrap();
    let second = next.try_acquire_lock("r", "next", LONG).await.unwrap();
    let late = lock.release().await.unwrap_err();
    assert!(late.to_string().contains("next has it by now"), "{late}");
    assert_eq!(status(&holder).await, (LockStatus::Held, "next".into(), 2));
    second.release().await.unwrap();
}

#[tokio::test]
async fn another_process_gives_a_lock_back_by_its_token() {
    for fault in FAULTS {
        let backend = memory();
        let holder = sound(&backend);
        let lock = holder.try_acquire_lock("r", "me", LONG).await.unwrap();
        let other = faulty(&backend, fault);
        manager(other.clone()).release_lock("r", &lock.lock_token).await.unwrap();
        assert_eq!(status(&holder).await.0, LockStatus::Free, "{fault:?}");
        let is_sent_again = matches!(fault, CommitFault::Unavailable | CommitFault::LostRequest);
        assert_eq!(other.commits(), 1 + u64::from(is_sent_again), "{fault:?}");
        // Once more is harmless, and sends nothing.
        manager(other.clone()).release_lock("r", &lock.lock_token).await.unwrap();
        assert_eq!(other.commits(), 1 + u64::from(is_sent_again), "{fault:?}");
    }
}

/// The release arrives, its answer is lost, and another has the lock before anybody looks.
#[tokio::test]
async fn a_release_that_is_overtaken_has_worked() {
    let backend = memory();
    let (holder, next) = (sound(&backend), sound(&backend));
    let lock = holder.try_acquire_lock("r", "me", LONG).await.unwrap();
    let other = faulty(&backend, CommitFault::None);
    let taking = next.clone();
    other.at(Call::Commit, 0, move || {
        let taking = taking.clone();
        async move { std::mem::forget(taking.try_acquire_lock("r", "next", LONG).await.unwrap()) }
    });
    manager(other).release_lock("r", &lock.lock_token).await.unwrap();
    assert_eq!(status(&next).await, (LockStatus::Held, "next".into(), 2));
    std::mem::forget(lock);
}

#[tokio::test]
async fn whatever_becomes_of_the_commit_a_lock_is_broken_once() {
    for fault in FAULTS {
        let backend = memory();
        let holder = sound(&backend);
        let lock = holder.try_acquire_lock("r", "me", LONG).await.unwrap();
        let other = faulty(&backend, fault);
        let broken = manager(other.clone()).break_lock("r").await.unwrap().unwrap();
        let said = (broken.client_id.as_str(), broken.fencing_token, broken.status);
        assert_eq!(said, ("me", 1, LockStatus::Held), "{fault:?}");
        assert_eq!(status(&holder).await.0, LockStatus::Free, "{fault:?}");
        let is_sent_again = matches!(fault, CommitFault::Unavailable | CommitFault::LostRequest);
        assert_eq!(other.commits(), 1 + u64::from(is_sent_again), "{fault:?}");
        assert_eq!(manager(other).break_lock("r").await.unwrap(), None);
        match lock.release().await.unwrap_err() {
            Error::LockLost { resource, fencing_token: 1, reason } => {
                assert!(resource == "r" && reason.contains("taken away"), "{resource}: {reason}");
            }
            other => panic!("{other}"),
        }
    }
}

/// The next grant stands for itself: who broke the one before it takes nothing from it.
#[tokio::test]
async fn a_break_that_is_overtaken_breaks_nothing_else() {
    let backend = memory();
    let (holder, next) = (sound(&backend), sound(&backend));
    let lock = holder.try_acquire_lock("r", "me", LONG).await.unwrap();
    let other = faulty(&backend, CommitFault::None);
    let taking = next.clone();
    other.at(Call::Commit, 0, move || {
        let taking = taking.clone();
        async move { std::mem::forget(taking.try_acquire_lock("r", "next", LONG).await.unwrap()) }
    });
    let broken = manager(other.clone()).break_lock("r").await.unwrap().unwrap();
    assert_eq!((broken.client_id.as_str(), broken.fencing_token), ("me", 1));
    assert_eq!(status(&next).await, (LockStatus::Held, "next".into(), 2));
    assert_eq!(other.commits(), 1);
    std::mem::forget(lock);
}

/// A process knows its own grants as long as they live, however many come after them.
#[tokio::test]
async fn a_lock_given_back_by_its_token_is_over_at_once() {
    let holder = sound(&memory());
    let first = holder.try_acquire_lock("r", "me", LONG).await.unwrap();
    let second = holder.try_acquire_lock("s", "me", LONG).await.unwrap();
    holder.release_lock("r", &first.lock_token).await.unwrap();
    assert!(first.is_lost() && !second.is_lost());
    match first.lost().await {
        Error::LockLost { resource, reason, .. } => {
            assert_eq!((resource.as_str(), reason.as_str()), ("r", "it was released"));
        }
        other => panic!("{other}"),
    }
}

/// What people are shown after a release is the end that the last renewal had set.
#[tokio::test]
async fn a_release_keeps_the_renewed_end() {
    let backend = memory();
    let (holder, observer) = (sound(&backend), sound(&backend));
    let lock = holder.try_acquire_lock("r", "me", Duration::from_millis(120)).await.unwrap();
    let end = async || observer.lock_record("r").await.unwrap().unwrap().expires_at;
    let granted = end().await;
    while end().await == granted {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let renewed = end().await;
    lock.release().await.unwrap();
    assert!(renewed > granted && end().await >= renewed);
}

#[tokio::test]
async fn more_locks_than_a_page_are_listed_once_each() {
    let holder = sound(&memory());
    let names: Vec<String> = (0..405).map(|n| format!("r{n:03}")).collect();
    let locks = holder.acquire_locks(&names, "me", LONG).await.unwrap();
    let listed = holder.list_locks().await.unwrap();
    assert_eq!(
        listed.iter().map(|lock| &lock.resource).collect::<Vec<_>>(),
        names.iter().collect::<Vec<_>>()
    );
    assert!(listed.iter().all(|lock| lock.status == LockStatus::Held));
    drop(locks);
}

/// Granted, but later than the lease lasts: nobody may believe it, and nobody keeps it.
#[tokio::test]
async fn a_grant_that_took_longer_than_its_lease_is_given_back() {
    let backend = memory();
    let slow = FaultyBackend::new(Arc::clone(&backend), []).slowed(Duration::from_millis(70));
    let asking = manager(slow);
    let late = asking.try_acquire_lock("r", "late", Duration::from_millis(60)).await.unwrap_err();
    assert!(matches!(late, Error::LockHeld { .. }), "{late}");
    let observer = sound(&backend);
    let given_back = async {
        // Not only past its lease: released.
        while status(&observer).await.0 != LockStatus::Free {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(10), given_back).await.unwrap();
}

/// Who gives up what may have been granted gives back its own grant, and nobody else's.
#[tokio::test(start_paused = true)]
async fn who_gives_up_takes_nothing_from_others() {
    let backend = memory();
    let next = sound(&backend);
    let held = faulty(&backend, CommitFault::LostRequest);
    held.hold();
    let asking = manager(held.clone());
    let waiting =
        tokio::spawn(async move { asking.acquire_lock("r", "gone", LONG).await.map(drop) });
    while held.commits() == 0 {
        tokio::task::yield_now().await;
    }
    let lock = next.try_acquire_lock("r", "next", LONG).await.unwrap();
    held.let_go();
    tokio::time::sleep(Duration::from_secs(1)).await;
    waiting.abort();
    assert!(waiting.await.unwrap_err().is_cancelled());
    // It is given back twice, a second apart.
    tokio::time::sleep(Duration::from_secs(5)).await;
    assert_eq!(status(&next).await, (LockStatus::Held, "next".into(), 1));
    lock.release().await.unwrap();
}

/// In one process first come is first served.
#[tokio::test]
async fn who_waits_in_one_process_stands_in_line() {
    let waiting = sound(&memory());
    let lock = waiting.try_acquire_lock("r", "first", LONG).await.unwrap();
    let (order, mut got) = tokio::sync::mpsc::unbounded_channel();
    let mut tasks = tokio::task::JoinSet::new();
    for n in 0..7 {
        let (waiting, order) = (waiting.clone(), order.clone());
        let mut turn = Box::pin(async move {
            let lock = waiting.acquire_lock("r", format!("w{n}"), LONG).await.unwrap();
            order.send(n).unwrap();
            lock.release().await.unwrap();
        });
        // Once, so that it stands behind those before it.
        let poll = std::future::poll_fn(|context| {
            std::task::Poll::Ready(turn.as_mut().poll(context).is_pending())
        });
        assert!(poll.await);
        tasks.spawn(turn);
    }
    lock.release().await.unwrap();
    tasks.join_all().await;
    let served: Vec<i32> = std::iter::from_fn(|| got.try_recv().ok()).collect();
    assert_eq!(served, [0, 1, 2, 3, 4, 5, 6]);
}
