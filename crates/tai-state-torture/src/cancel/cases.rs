//! The calls that are dropped: what stands before, what is called, and what is looked for after.

use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde_json::{Value, json};
use tai_state::{
    CleanupOptions, DistributedLock, Error, EventualConsistency, ListOptions, NewTransition, Op,
    StateMachinePersister, StateQuery, StateStore, TransactionManager,
};

use super::LEASE;
use crate::net::{snapshot, why};

pub(super) type Called = Pin<Box<dyn Future<Output = Result<(), Error>> + Send>>;

/// A governor of its own in a store.
#[derive(Debug, Clone)]
pub(super) struct Place {
    pub(super) store: StateStore,
    pub(super) governor: String,
    /// A lock that was acquired before the call.
    held: Arc<Mutex<Option<DistributedLock>>>,
}

impl Place {
    pub(super) fn new(store: &StateStore, name: &str) -> Self {
        Self { store: store.clone(), governor: name.to_owned(), held: Arc::default() }
    }

    /// One of the same name and a number.
    pub(super) fn at(&self, number: &str) -> Self {
        Self::new(&self.store, &format!("{} {number}", self.governor))
    }

    pub(super) fn manager(&self) -> TransactionManager {
        super::manager(&self.store, &self.governor)
    }

    fn persister(&self) -> StateMachinePersister {
        StateMachinePersister::with_defaults(&self.store)
    }

    pub(super) fn take(&self) -> Option<DistributedLock> {
        self.held.lock().unwrap().take()
    }

    fn keep(&self, lock: DistributedLock) {
        *self.held.lock().unwrap() = Some(lock);
    }
}

/// What must be there after a call that was dropped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Check {
    /// All or nothing.
    Whole,
    /// Whole steps, and the same again makes it whole.
    Steps,
}

pub(super) struct Case {
    pub(super) name: &'static str,
    pub(super) prepare: fn(Place) -> Called,
    pub(super) call: fn(Place) -> Called,
    pub(super) check: Check,
    /// Whether it waits for what does not come.
    pub(super) is_endless: bool,
}

fn nothing(_: Place) -> Called {
    Box::pin(async { Ok(()) })
}

/// `a` and `b` with three versions each.
fn seeded(place: Place) -> Called {
    Box::pin(async move {
        for n in 0..3 {
            for id in ["a", "b"] {
                place.store.save_state(&place.governor, id, data(id, n), why()).await?;
            }
        }
        Ok(())
    })
}

/// As [`seeded`], with a lock.
fn locked(place: Place) -> Called {
    Box::pin(async move {
        seeded(place.clone()).await?;
        place.keep(place.manager().acquire_lock("r", "me", LEASE).await?);
        Ok(())
    })
}

fn data(id: &str, n: u64) -> tai_state::StateSnapshot {
    snapshot(id, json!({ "n": n }))
}

fn counted(data: &Value) -> u64 {
    data["n"].as_u64().unwrap_or(0) + 1
}

/// Changes `a` and `b` in one transaction.
async fn both(place: &Place, key: Option<&str>) -> Result<(), Error> {
    let governor = place.governor.as_str();
    let body = |tx: tai_state::Transaction| async move {
        for id in ["a", "b"] {
            let (mut state, version) = tx.get_state(governor, id).await?;
            state.data["n"] = json!(counted(&state.data));
            tx.update_state(governor, id, state, version, why()).await?;
        }
        Ok(())
    };
    match key {
        Some(key) => place.manager().execute_once(governor, key, body).await,
        None => place.manager().execute_transaction(governor, body).await,
    }
}

/// The control: as [`both`], but by two calls.
pub(super) fn two_writes() -> Case {
    let call = |place: Place| -> Called {
        Box::pin(async move {
            for id in ["a", "b"] {
                place.store.update_state(&place.governor, id, data(id, 9), 3, why()).await?;
                // On any engine there is a point between the two.
                tokio::task::yield_now().await;
            }
            Ok(())
        })
    };
    Case { name: "two writes", prepare: seeded, call, check: Check::Whole, is_endless: false }
}

macro_rules! cases {
    ($($name:literal: $check:ident, $prepare:ident, |$p:ident| $call:expr;)*) => {
        vec![$(Case {
            name: $name,
            prepare: $prepare,
            call: |$p: Place| -> Called { Box::pin(async move { $call.map(drop) }) },
            check: Check::$check,
            is_endless: false,
        }),*]
    };
}

pub(super) fn all() -> Vec<Case> {
    let mut all = [writes(), locks(), reads()].concat_all();
    let waits = |p: Place| -> Called {
        Box::pin(async move {
            p.manager().acquire_lock_within("r", "waits", LEASE, LEASE).await.map(drop)
        })
    };
    let listens = |p: Place| -> Called {
        Box::pin(async move {
            let mut feed = p.store.watch_governor(&p.governor)?.from_now().await?;
            feed.next().await.map(drop)
        })
    };
    for (name, call) in [("a lock that is held", waits as fn(Place) -> Called), ("watch", listens)]
    {
        all.push(Case { name, prepare: locked, call, check: Check::Whole, is_endless: true });
    }
    all
}

trait ConcatAll {
    fn concat_all(self) -> Vec<Case>;
}

impl<const N: usize> ConcatAll for [Vec<Case>; N] {
    fn concat_all(self) -> Vec<Case> {
        self.into_iter().flatten().collect()
    }
}

fn writes() -> Vec<Case> {
    cases! {
        "save, new": Whole, nothing, |p| p.store.save_state(&p.governor, "a", data("a", 1), why()).await;
        "save": Whole, seeded, |p| p.store.save_state(&p.governor, "a", data("a", 9), why()).await;
        "update": Whole, seeded, |p| p.store.update_state(&p.governor, "a", data("a", 9), 3, why()).await;
        "delete": Whole, seeded, |p| p.store.delete_state(&p.governor, "a", Some(3), why()).await;
        "save, keyed": Whole, seeded, |p| {
            let keyed = p.store.idempotency_key(format!("key of {}", p.governor)).unwrap();
            keyed.save_state(&p.governor, "a", data("a", 9), why()).await
        };
        "save, fenced": Whole, locked, |p| {
            let lock = p.take().unwrap();
            p.store.fenced_by(&lock).save_state(&p.governor, "a", data("a", 9), why()).await
        };
        "append": Whole, seeded, |p| {
            let next = NewTransition::to(&p.governor, "a", "step", json!({"n": 9}), why());
            p.persister().append(next).await
        };
        "log a transition": Whole, seeded, |p| {
            let (from, _) = p.store.get_state(&p.governor, "a").await?;
            p.persister().log_transition(&p.governor, Some(&from), &data("a", 9), "step", why()).await
        };
        "revert": Whole, seeded, |p| p.store.revert(&p.governor, "a", 1, why()).await;
        "transaction": Whole, seeded, |p| both(&p, None).await;
        "transaction, once": Whole, seeded, |p| both(&p, Some(&format!("once in {}", p.governor))).await;
        "read-write transaction": Whole, seeded, |p| {
            let writes = [("b", data("b", 9), why()), ("c", data("c", 9), why())];
            p.manager().read_write_transaction(&p.governor, &["a"], &writes).await
        };
        "repair of a copy": Whole, seeded, |p| {
            let (mut copy, _) = p.store.get_state(&p.governor, "a").await?;
            copy.causality.increment("elsewhere");
            copy.data = json!({"n": 9});
            EventualConsistency::new().repair(&p.store, &p.governor, &copy, why()).await
        };
        "recover": Whole, seeded, |p| p.persister().recover(&p.governor, "a").await;
        "clean up": Steps, seeded, |p| {
            let all = CleanupOptions::older_than(Duration::ZERO).batch(1);
            p.persister().cleanup(&p.governor, &all, |_| {}).await
        };
        "purge": Steps, seeded, |p| p.persister().purge(&p.governor, "a", why(), |_| {}).await;
        "save a snapshot": Whole, seeded, |p| p.persister().save_snapshot(&p.governor, "a").await;
        "prune snapshots": Whole, seeded, |p| p.persister().prune_snapshots(&p.governor, "a", 0).await;
        "forget answers": Whole, nothing, |p| p.manager().forget_expired_commands().await;
    }
}

fn locks() -> Vec<Case> {
    cases! {
        "acquire": Whole, seeded, |p| p.manager().acquire_lock("r", "gone", LEASE).await;
        "try to acquire": Whole, seeded, |p| p.manager().try_acquire_lock("r", "gone", LEASE).await;
        "acquire three": Whole, seeded, |p| p.manager().acquire_locks(&["q", "r", "s"], "gone", LEASE).await;
        "release": Whole, locked, |p| p.take().unwrap().release().await;
        "release by token": Whole, locked, |p| {
            let lock = p.take().unwrap();
            let token = lock.lock_token.clone();
            p.keep(lock);
            p.manager().release_lock("r", token).await
        };
        "break": Whole, locked, |p| p.manager().break_lock("r").await;
        "clean up locks": Whole, locked, |p| p.manager().cleanup_expired_locks().await;
        "list locks": Whole, locked, |p| p.manager().list_locks().await;
        "lock record": Whole, locked, |p| p.manager().lock_record("r").await;
    }
}

fn reads() -> Vec<Case> {
    cases! {
        "get": Whole, seeded, |p| p.store.get_state(&p.governor, "a").await;
        "batch get": Whole, seeded, |p| p.store.batch_get_states(&p.governor, &["a", "b"]).await;
        "list": Whole, seeded, |p| p.store.list_states(&p.governor, &ListOptions::default()).await;
        "list governors": Whole, seeded, |p| p.store.list_governors(None, 10).await;
        "query": Whole, seeded, |p| {
            let query = StateQuery::new().filter("n", Op::Equal, 2);
            p.store.query_states(&p.governor, &query).await
        };
        "count": Whole, seeded, |p| p.store.count_states(&p.governor).await;
        "at a version": Whole, seeded, |p| p.store.state_at_version(&p.governor, "a", 2).await;
        "at a time": Whole, seeded, |p| {
            p.store.state_at_time(&p.governor, "a", data("a", 0).timestamp).await
        };
        "history": Whole, seeded, |p| {
            let mut history = p.store.history(&p.governor, "a", ..).await?;
            history.next_page().await
        };
        "diff": Whole, seeded, |p| p.store.diff(&p.governor, "a", 1, 3).await;
        "timeline": Whole, seeded, |p| {
            let mut timeline = p.store.timeline(&p.governor, None, None).await?;
            timeline.next_page().await
        };
        "consistent cut": Whole, seeded, |p| {
            let (state, _) = p.store.get_state(&p.governor, "b").await?;
            p.store.consistent_cut(&p.governor, state.timestamp)?.next_page().await
        };
        "export": Whole, seeded, |p| {
            p.store.export(Some(&p.governor), &mut Vec::new(), |_| {}).await
        };
        "load": Whole, seeded, |p| p.persister().load_state(&p.governor, "a").await;
        "replay": Whole, seeded, |p| p.persister().replay(&p.governor, "a", |_| Ok(())).await;
        "prove": Whole, seeded, |p| p.store.validate_consistency(&p.governor).await;
        "prove one state": Whole, seeded, |p| p.store.validate_state(&p.governor, "a").await;
        "events between": Whole, seeded, |p| {
            let (state, _) = p.store.get_state(&p.governor, "a").await?;
            let to = state.timestamp;
            let mut events = p.store.events_between(&p.governor, "a", to - Duration::from_secs(60), to).await?;
            events.next_page().await
        };
        "one event": Whole, seeded, |p| p.store.event(&p.governor, "a", 2).await;
        "compare a copy": Whole, seeded, |p| {
            let (copy, _) = p.store.get_state(&p.governor, "a").await?;
            EventualConsistency::new().check(&p.store, &p.governor, &copy).await
        };
        "purge, and look after it": Steps, seeded, |p| {
            let purge = p.persister().purge(&p.governor, "b", why(), |_| {}).await?;
            p.persister().verify_purge(&purge).await
        };
        "saved snapshots": Whole, seeded, |p| p.persister().saved_snapshots(&p.governor, "a").await;
        "an audit": Whole, seeded, |p| {
            let governor = p.governor.as_str();
            let cut = |tx: tai_state::Transaction| async move {
                tx.batch_get_states(governor, &["a", "b"]).await
            };
            p.manager().run(cut).await
        };
    }
}
