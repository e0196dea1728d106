//! Takes steps on a store.

use std::sync::Arc;

use serde_json::{Value, json};

use super::{Answer, At, From, GOVERNORS, Guess, Inner, Point, STATES, Step, told};
use crate::clock::SystemClock;
use crate::error::{Error, Result};
use crate::event::Event;
use crate::manager::TransactionManager;
use crate::persister::{NewTransition, StateMachinePersister};
use crate::query::{Op, StateQuery};
use crate::retention::CleanupOptions;
use crate::state::{ChangeMetadata, StateSnapshot};
use crate::store::{ListOptions, StateRecord, StateStore};
use crate::transaction::Transaction;
use crate::{Direction, PointInTime};

/// A store under test.
#[derive(Debug, Clone)]
pub struct Runner {
    store: StateStore,
    persister: StateMachinePersister,
    manager: TransactionManager,
}

fn why() -> ChangeMetadata {
    ChangeMetadata::new("who", "why", None)
}

fn snapshot(at: At, data: &Value) -> StateSnapshot {
    StateSnapshot::new(at.names().1.into(), data.clone(), why())
}

fn said(error: Error) -> String {
    match error {
        Error::VersionConflict { expected, actual, .. } => {
            format!("version_conflict {expected} {actual}")
        }
        Error::Corrupt { .. } | Error::Storage { .. } => format!("{} {error}", error.code()),
        error => error.code().to_owned(),
    }
}

fn event(event: &Event) -> Value {
    let state = &event.to_state;
    let it = told(state.version, &event.action, state.timestamp, event.deleted, &state.data);
    assert_eq!((event.timestamp, &event.metadata), (state.timestamp, &state.metadata));
    json!({"event": it, "from": event.from_state.as_ref().map(|from| from.version)})
}

fn record(record: &StateRecord) -> Value {
    let it = &record.snapshot;
    told(it.version, &record.action, it.timestamp, record.deleted, &it.data)
}

impl Runner {
    /// On a store with [`options`](super::options).
    #[must_use]
    pub fn new(store: StateStore) -> Self {
        let config = super::options(Arc::new(SystemClock)).persistence;
        let persister = StateMachinePersister::new(&store, config);
        let manager = TransactionManager::new(&store);
        Self { store, persister, manager }
    }

    /// The store.
    #[must_use]
    pub fn store(&self) -> &StateStore {
        &self.store
    }

    /// Takes a step; the clock is not moved, since several stores may share it.
    ///
    /// # Errors
    /// The code of the error that it was.
    pub async fn step(&self, step: &Step) -> Answer {
        self.run(step).await.map_err(said)
    }

    async fn newest(&self, at: At) -> Result<u64> {
        let (governor, state) = at.names();
        let record = self.store.record(governor, state).await?;
        Ok(record.map_or(0, |record| record.snapshot.version))
    }

    async fn guessed(&self, at: At, guess: Guess) -> Result<u64> {
        Ok(guess.of(self.newest(at).await?))
    }

    async fn point(&self, at: At, point: Point) -> Result<PointInTime> {
        Ok(match point {
            Point::Version(guess) => self.guessed(at, guess).await?.into(),
            Point::Time(time) => time.into(),
        })
    }

    async fn run(&self, step: &Step) -> Result<Value> {
        let store = &self.store;
        match step {
            Step::Tick(_) => Ok(Value::Null),
            Step::Save(at, data) => {
                let (governor, state) = at.names();
                Ok(store.save_state(governor, state, snapshot(*at, data), why()).await?.into())
            }
            Step::Update(at, data, guess) => {
                let (governor, state) = at.names();
                let expected = self.guessed(*at, *guess).await?;
                let new = snapshot(*at, data);
                Ok(store.update_state(governor, state, new, expected, why()).await?.into())
            }
            Step::Delete(at, guess) => {
                let (governor, state) = at.names();
                let expected = match guess {
                    Some(guess) => Some(self.guessed(*at, *guess).await?),
                    None => None,
                };
                Ok(store.delete_state(governor, state, expected, why()).await?.into())
            }
            Step::Log(at, from, data) => self.log(*at, from, data).await,
            Step::Append(at, data, guess, time) => {
                let (governor, state) = at.names();
                let mut new = match data {
                    Some(data) => NewTransition::to(governor, state, "append", data.clone(), why()),
                    None => NewTransition::to_deleted(governor, state, "append", why()),
                };
                if let Some(guess) = guess {
                    new = new.expecting(self.guessed(*at, *guess).await?);
                }
                if let Some(time) = time {
                    new = new.at(*time);
                }
                Ok(event(&self.persister.append(new).await?))
            }
            Step::Transaction(steps, fails) => self.transaction(steps, *fails).await,
            Step::Revert(at, point) => {
                let (governor, state) = at.names();
                let point = self.point(*at, *point).await?;
                let done = store.revert(governor, state, point, why()).await?;
                let to = done.metadata.context.get("reverted_to");
                Ok(json!({"event": event(&done), "reverted_to": to}))
            }
            Step::SaveSnapshot(at) => {
                let (governor, state) = at.names();
                Ok(self.persister.save_snapshot(governor, state).await?.into())
            }
            Step::Prune(at, keep) => {
                let (governor, state) = at.names();
                let pruned = self.persister.prune_snapshots(governor, state, *keep).await?;
                Ok(pruned.snapshots.into())
            }
            Step::Cleanup(governor, cutoff, keep) => {
                let options = CleanupOptions::before(*cutoff).keep_versions(*keep);
                // What is said before must come true.
                let dry = options.clone().dry_run();
                let told = self.persister.cleanup(GOVERNORS[*governor], &dry, |_| {}).await?;
                let done = self.persister.cleanup(GOVERNORS[*governor], &options, |_| {}).await?;
                assert_eq!(
                    (told.states, told.events, told.snapshots, told.snapshots_saved),
                    (done.states, done.events, done.snapshots, done.snapshots_saved),
                    "a dry run said something else"
                );
                assert!(done.problems.is_empty(), "{:?}", done.problems);
                Ok(json!({
                    "states": done.states, "events": done.events, "snapshots": done.snapshots,
                    "saved": done.snapshots_saved,
                }))
            }
            Step::Purge(at) => {
                let (governor, state) = at.names();
                let done = self.persister.purge(governor, state, why(), |_| {}).await?;
                self.persister.verify_purge(&done).await?;
                let (version, events) = (done.version, done.events);
                Ok(json!({"version": version, "events": events, "snapshots": done.snapshots}))
            }
            Step::Batch(..) | Step::List(..) | Step::AtLeast(..) | Step::Equal(..) => {
                self.many(step).await
            }
            _ => self.read(step).await,
        }
    }

    async fn log(&self, at: At, from: &From, data: &Value) -> Result<Value> {
        let (governor, state) = at.names();
        let from = match from {
            From::Nothing => None,
            From::Data(data) => Some(snapshot(at, data)),
            From::RightData => {
                let record = self.store.record(governor, state).await?;
                Some(snapshot(at, &record.map_or(Value::Null, |record| record.snapshot.data)))
            }
            From::Read(guess) => {
                let mut read = snapshot(at, &Value::Null);
                read.version = self.guessed(at, *guess).await?;
                Some(read)
            }
        };
        let to = snapshot(at, data);
        let done = self.persister.log_transition(governor, from.as_ref(), &to, "log", why());
        Ok(event(&done.await?))
    }

    async fn read(&self, step: &Step) -> Result<Value> {
        let store = &self.store;
        match step {
            Step::Get(at) => {
                let (governor, state) = at.names();
                let (read, version) = store.get_state(governor, state).await?;
                let found = store.record(governor, state).await?.expect("it was read");
                assert_eq!((&read, version), (&found.snapshot, read.version));
                Ok(record(&found))
            }
            Step::Record(at) => {
                let (governor, state) = at.names();
                let found = store.record(governor, state).await?;
                Ok(found.map_or(Value::Null, |it| json!([record(&it), it.first_version])))
            }
            Step::AtPoint(at, point) => {
                let (governor, state) = at.names();
                let point = self.point(*at, *point).await?;
                let found = store.record_at(governor, state, point).await;
                let short = match point {
                    PointInTime::Version(version) => {
                        store.state_at_version(governor, state, version).await
                    }
                    PointInTime::Time(time) => store.state_at_time(governor, state, time).await,
                };
                let same = |found: &Result<StateRecord>| match found {
                    Ok(found) => Ok(found.snapshot.clone()),
                    Err(error) => Err(error.code()),
                };
                assert_eq!(short.map_err(|error| error.code()), same(&found));
                Ok(record(&found?))
            }
            Step::Event(at, guess) => {
                let (governor, state) = at.names();
                let version = self.guessed(*at, *guess).await?;
                Ok(event(&store.event(governor, state, version).await?))
            }
            Step::History(at, guess) => {
                let (governor, state) = at.names();
                let mut history = match guess {
                    None => store.history(governor, state, ..).await?,
                    Some(guess) => {
                        let from = self.guessed(*at, *guess).await?;
                        store.history(governor, state, from..).await?
                    }
                };
                let mut told = Vec::new();
                while let Some(next) = history.next().await? {
                    told.push(event(&next));
                }
                Ok(Value::Array(told))
            }
            Step::Load(at) => {
                let (governor, state) = at.names();
                let (read, _) = self.persister.load_state(governor, state).await?;
                let found = store.record(governor, state).await?.expect("it was read");
                assert_eq!(read, found.snapshot);
                Ok(record(&found))
            }
            Step::Recover(at) => {
                let (governor, state) = at.names();
                let (read, report) = self.persister.recover(governor, state).await?;
                assert!(!report.repaired && report.passed_over.is_empty(), "{report:?}");
                let found = store.record(governor, state).await?.expect("it was read");
                Ok(read.map_or(Value::Null, |_| record(&found)))
            }
            Step::Saved(at) => {
                let (governor, state) = at.names();
                let saved = self.persister.saved_snapshots(governor, state).await?;
                assert!(saved.iter().all(|saved| saved.problem.is_none()), "{saved:?}");
                Ok(saved.iter().map(|saved| saved.version).collect())
            }
            other => panic!("{other:?} is no reading of one state"),
        }
    }

    async fn many(&self, step: &Step) -> Result<Value> {
        let store = &self.store;
        match step {
            Step::Batch(governor) => {
                let found = store.batch_get_states(GOVERNORS[*governor], &STATES).await?;
                let mut told = Vec::new();
                for state in found {
                    let at = store.record(GOVERNORS[*governor], state.id.as_str()).await?;
                    told.push(at.as_ref().map_or(Value::Null, record));
                }
                Ok(Value::Array(told))
            }
            Step::List(governor, limit, with_deleted) => {
                let mut options = ListOptions::default().limit(*limit);
                if *with_deleted {
                    options = options.with_deleted();
                }
                let mut told = Vec::new();
                loop {
                    let page = store.list_states(GOVERNORS[*governor], &options).await?;
                    assert!(page.states.len() <= *limit);
                    let shown = |it: &StateRecord| {
                        json!([it.snapshot.id.as_str(), record(it), it.first_version])
                    };
                    told.extend(page.states.iter().map(shown));
                    let Some(next) = page.next else { return Ok(Value::Array(told)) };
                    options = options.after(next);
                }
            }
            Step::AtLeast(governor, least, limit) => {
                let query = StateQuery::new()
                    .filter("n", Op::AtLeast, *least)
                    .order_by("n", Direction::Descending);
                self.pages(*governor, query.limit(*limit)).await
            }
            Step::Equal(governor, wanted) => {
                let query = StateQuery::new().filter("n", Op::Equal, *wanted);
                self.pages(*governor, query.limit(2)).await
            }
            other => panic!("{other:?} looks at no governor"),
        }
    }

    async fn pages(&self, governor: usize, mut query: StateQuery) -> Result<Value> {
        let mut told = Vec::new();
        loop {
            let page = self.store.query_states(GOVERNORS[governor], &query).await?;
            told.extend(page.states.iter().map(|it| Value::from(it.snapshot.id.as_str())));
            let Some(next) = page.next else { return Ok(Value::Array(told)) };
            query = query.after(next);
        }
    }

    async fn transaction(&self, steps: &[Inner], fails: bool) -> Result<Value> {
        let run = |transaction: Transaction| async move {
            let mut results = Vec::new();
            for step in steps {
                results.push(within(&transaction, step).await?);
            }
            match fails {
                true => Err(Error::refused("the transaction", "it was to fail")),
                false => Ok(Value::Array(results)),
            }
        };
        self.manager.execute_transaction("g", run).await
    }
}

async fn within(transaction: &Transaction, step: &Inner) -> Result<Value> {
    let guessed = async |at: &At, guess: Guess| -> Result<u64> {
        let (governor, state) = at.names();
        match transaction.get_state(governor, state).await {
            Ok((_, version)) => Ok(guess.of(version)),
            Err(Error::StateNotFound { .. }) => Ok(guess.of(0)),
            Err(error) => Err(error),
        }
    };
    match step {
        Inner::Get(at) => {
            let (governor, state) = at.names();
            match transaction.get_state(governor, state).await {
                Ok((read, version)) => Ok(json!([version, read.data])),
                Err(Error::StateNotFound { .. }) => Ok(Value::Null),
                Err(error) => Err(error),
            }
        }
        Inner::Save(at, data) => {
            let (governor, state) = at.names();
            Ok(transaction.save_state(governor, state, snapshot(*at, data), why()).await?.into())
        }
        Inner::Update(at, data, guess) => {
            let (governor, state) = at.names();
            let (new, expected) = (snapshot(*at, data), guessed(at, *guess).await?);
            Ok(transaction.update_state(governor, state, new, expected, why()).await?.into())
        }
        Inner::Delete(at, guess) => {
            let (governor, state) = at.names();
            let expected = match guess {
                Some(guess) => Some(guessed(at, *guess).await?),
                None => None,
            };
            Ok(transaction.delete_state(governor, state, expected, why()).await?.into())
        }
    }
}
