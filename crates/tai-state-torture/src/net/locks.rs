//! Locks that are acquired, written under and released through faults: no fenced write is lost, and
//! tokens rise.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde_json::json;
use tai_state::{Error, StateStore, TransactionManager};
use tokio::task::JoinSet;

use super::field::{Field, LOCKS};
use super::{snapshot, why};
use crate::random::Random;
use crate::run::Tally;

/// Of each handle.
const TASKS: u64 = 2;
const RESOURCES: u64 = 2;
const LEASE: Duration = Duration::from_secs(2);
const WAIT: Duration = Duration::from_secs(1);

#[derive(Debug, Default)]
pub(super) struct Locks {
    written: AtomicU64,
    unknown: AtomicU64,
    grants: AtomicU64,
    lost: AtomicU64,
    /// The highest token that was seen of each resource, and all of them.
    tokens: Mutex<BTreeMap<String, Vec<u64>>>,
}

impl Locks {
    pub(super) fn start(
        self: &Arc<Self>,
        field: &Arc<Field>,
        handles: &[StateStore],
        random: &mut Random,
        tasks: &mut JoinSet<()>,
    ) {
        for (number, handle) in handles.iter().enumerate() {
            for task in 0..TASKS {
                let (locks, field) = (Arc::clone(self), Arc::clone(field));
                let (store, mut random) = (handle.clone(), Random::new(random.next()));
                let client = format!("client-{number}-{task}");
                tasks.spawn(async move {
                    while !field.is_over() {
                        let resource = format!("r{}", random.below(RESOURCES));
                        locks.one(&field, &store, &client, &resource).await;
                    }
                });
            }
        }
    }

    fn highest(&self, resource: &str) -> u64 {
        let tokens = self.tokens.lock().unwrap();
        tokens.get(resource).and_then(|tokens| tokens.iter().max().copied()).unwrap_or(0)
    }

    /// Acquires, adds one to a number under the lock, releases.
    async fn one(&self, field: &Field, store: &StateStore, client: &str, resource: &str) {
        let manager = TransactionManager::new(store);
        let before = self.highest(resource);
        let acquire = manager.acquire_lock_within(resource, client, LEASE, WAIT);
        let lock = match field.within("acquiring a lock", WAIT + field.attempt, acquire).await {
            Some(Ok(lock)) => lock,
            Some(Err(error)) => return field.failed("acquiring a lock", &error).await,
            None => return,
        };
        self.grants.fetch_add(1, Ordering::Relaxed);
        let token = lock.fencing_token;
        if token <= before {
            field.broken(format!("{resource} was granted with token {token} after {before}"));
        }
        self.tokens.lock().unwrap().entry(resource.to_owned()).or_default().push(token);
        let fenced = store.fenced_by(&lock);
        let write = async {
            let count = match fenced.get_state("locked", resource).await {
                Ok((state, _)) => state.data["count"].as_u64().unwrap(),
                Err(Error::StateNotFound { .. }) => 0,
                Err(error) => return Err(error),
            };
            // Whoever writes blindly what it has counted needs the fence.
            let data = json!({"count": count + 1, "token": token});
            fenced.save_state("locked", resource, snapshot(resource, data), why()).await
        };
        // Two calls.
        match field.within("a fenced write", 2 * field.deadline, write).await {
            Some(Ok(_)) => {
                self.written.fetch_add(1, Ordering::Relaxed);
                field.did(LOCKS);
            }
            Some(Err(error)) => {
                let (is_lost, is_unknown) = (
                    matches!(error, Error::LockLost { .. }),
                    matches!(error, Error::OutcomeUnknown { .. }),
                );
                self.lost.fetch_add(u64::from(is_lost), Ordering::Relaxed);
                self.unknown.fetch_add(u64::from(is_unknown), Ordering::Relaxed);
                field.failed("a fenced write", &error).await;
            }
            None => {
                self.unknown.fetch_add(1, Ordering::Relaxed);
            }
        }
        if let Some(Err(error)) = field.call("releasing a lock", lock.release()).await {
            field.failed("releasing a lock", &error).await;
        }
    }

    pub(super) async fn judge(&self, direct: &StateStore, tally: &mut Tally) {
        let load = |count: &AtomicU64| count.load(Ordering::Relaxed);
        let (written, unknown) = (load(&self.written), load(&self.unknown));
        tally.count("locks granted", load(&self.grants));
        tally.count("fenced writes", written);
        tally.count("fenced writes refused, the lock being lost", load(&self.lost));
        for (resource, mut tokens) in self.tokens.lock().unwrap().clone() {
            tokens.sort_unstable();
            tally.holds(tokens.windows(2).all(|pair| pair[0] < pair[1]), || {
                format!("a token of {resource} was given twice")
            });
        }
        let mut sum = 0;
        for resource in 0..RESOURCES {
            let resource = format!("r{resource}");
            let Ok(mut history) = direct.history("locked", &resource, ..).await else { continue };
            let mut token = 0;
            while let Some(event) = history.next().await.unwrap() {
                sum += 1;
                let (data, version) = (&event.to_state.data, event.version());
                // Each was counted on the one before, under a token that is not older.
                tally.holds(data["count"] == json!(version), || {
                    format!("a fenced write of {resource} was lost: v{version} is {data}")
                });
                let next = data["token"].as_u64().unwrap();
                tally
                    .holds(next >= token, || format!("an older token wrote {resource} v{version}"));
                token = next;
            }
        }
        tally.holds((written..=written + unknown).contains(&sum), || {
            format!("{sum} fenced writes in the log, {written} told, {unknown} unknown")
        });
    }
}
