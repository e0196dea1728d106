//! What must come of a step: the whole behaviour of a store, without commits, files or networks.

use std::collections::BTreeMap;

use chrono::{DateTime, Utc};
use serde_json::{Value, json};

use super::{Answer, At, From, GOVERNORS, Guess, Inner, Point, STATES, Step, beginning, told};
use crate::keys::Name;

/// A version of a state.
#[derive(Debug, Clone, PartialEq)]
struct Version {
    action: &'static str,
    at: DateTime<Utc>,
    /// `None` when it is a deletion.
    data: Option<Value>,
    is_purge: bool,
}

/// A state with its history.
#[derive(Debug, Clone, Default, PartialEq)]
struct State {
    /// Version 1 first, those that were cleaned up included.
    versions: Vec<Version>,
    /// The oldest that is kept.
    first: u64,
    saved: Vec<u64>,
}

/// What a store must be after the steps so far.
#[derive(Debug, Clone, PartialEq)]
pub struct Model {
    now: DateTime<Utc>,
    states: BTreeMap<At, State>,
}

impl Default for Model {
    fn default() -> Self {
        Self { now: beginning(), states: BTreeMap::new() }
    }
}

/// What a change asks for.
enum Wish {
    Put(Value),
    Delete,
    Purge,
}

enum Expect {
    Any,
    Version(u64),
    Data(Value),
}

fn not_found<T>() -> Result<T, String> {
    Err("state_not_found".into())
}

fn trimmed<T>() -> Result<T, String> {
    Err("history_trimmed".into())
}

impl State {
    fn newest(&self) -> u64 {
        self.versions.len() as u64
    }

    fn version(&self, version: u64) -> &Version {
        &self.versions[version as usize - 1]
    }

    fn head(&self) -> &Version {
        self.version(self.newest())
    }

    fn told(&self, version: u64) -> Value {
        let it = self.version(version);
        told(version, it.action, it.at, it.data.is_none(), it.data.as_ref().unwrap_or(&Value::Null))
    }

    /// With the version before it, as an event has it.
    fn event(&self, version: u64) -> Value {
        let before = version - 1;
        let kept = before >= self.first && before > 0 && self.version(before).data.is_some();
        json!({"event": self.told(version), "from": kept.then_some(before)})
    }

    /// Drops what is too much beside the saved snapshot at the cut.
    fn keep_saved(&mut self, most: usize) {
        let cut = (self.first > 1).then_some(self.first);
        let mut others: Vec<u64> =
            self.saved.iter().copied().filter(|saved| Some(*saved) != cut).collect();
        others.truncate(others.len().saturating_sub(most));
        self.saved.retain(|saved| !others.contains(saved));
    }

    /// The version that counts at a point.
    fn at(&self, point: Point) -> Result<u64, String> {
        let version = match point {
            Point::Version(guess) => {
                let version = guess.of(self.newest());
                if version == 0 || version > self.newest() {
                    return not_found();
                }
                if version < self.first {
                    return trimmed();
                }
                version
            }
            Point::Time(time) => match self.until(time) {
                Some(version) => version,
                None if self.first > 1 => return trimmed(),
                None => return not_found(),
            },
        };
        match self.version(version).data {
            Some(_) => Ok(version),
            None => not_found(),
        }
    }

    /// The newest kept version that is not later.
    fn until(&self, time: DateTime<Utc>) -> Option<u64> {
        (self.first.max(1)..=self.newest()).rev().find(|v| self.version(*v).at <= time)
    }
}

impl Model {
    /// By the clock.
    #[must_use]
    pub fn now(&self) -> DateTime<Utc> {
        self.now
    }

    /// Sets the clock.
    pub fn set(&mut self, now: DateTime<Utc>) {
        self.now = now;
    }

    /// Takes a step, and says what must come of it.
    ///
    /// # Errors
    /// The code of the error that it must be.
    pub fn step(&mut self, step: &Step) -> Answer {
        match step {
            Step::Tick(seconds) => {
                self.now += chrono::TimeDelta::seconds(*seconds);
                Ok(Value::Null)
            }
            Step::Save(at, data) => self.put(*at, "save", data, Expect::Any),
            Step::Update(at, data, guess) => {
                let expect = self.expect(*at, Some(*guess));
                self.put(*at, "update", data, expect)
            }
            Step::Delete(at, guess) => {
                let expect = self.expect(*at, *guess);
                self.change(*at, "delete", Wish::Delete, expect, None, false).map(Value::from)
            }
            Step::Log(at, from, data) => {
                let expect = match from {
                    From::Nothing => Expect::Version(0),
                    // What was never stored was built by hand.
                    From::Read(guess) => match guess.of(self.newest(*at)) {
                        0 => Expect::Data(Value::Null),
                        version => Expect::Version(version),
                    },
                    From::Data(data) => Expect::Data(data.clone()),
                    From::RightData => Expect::Data(self.data(*at)),
                };
                let version =
                    self.change(*at, "log", Wish::Put(data.clone()), expect, None, false)?;
                Ok(self.states[at].event(version))
            }
            Step::Append(at, data, guess, time) => {
                let expect = self.expect(*at, *guess);
                let wish = data.clone().map_or(Wish::Delete, Wish::Put);
                let may_begin = time.is_some() && matches!(expect, Expect::Version(0));
                let version = self.change(*at, "append", wish, expect, *time, may_begin)?;
                Ok(self.states[at].event(version))
            }
            Step::Transaction(steps, fails) => self.transaction(steps, *fails),
            Step::Revert(at, point) => {
                let Some(state) = self.states.get(at) else { return not_found() };
                let (then, newest) = (state.at(*point)?, state.newest());
                let data = state.version(then).data.clone().expect("it was looked at");
                let expect = Expect::Version(newest);
                let version = self.change(*at, "revert", Wish::Put(data), expect, None, false)?;
                let event = self.states[at].event(version);
                Ok(json!({"event": event, "reverted_to": then}))
            }
            Step::Cleanup(governor, cutoff, keep) => {
                Ok(self.cleanup(*governor, *cutoff, *keep, usize::MAX))
            }
            Step::Purge(at) => self.purge(*at),
            Step::SaveSnapshot(at) => {
                let Some(state) = self.states.get_mut(at) else { return not_found() };
                let newest = state.newest();
                if !state.saved.contains(&newest) {
                    state.saved.push(newest);
                }
                Ok(newest.into())
            }
            Step::Prune(at, keep) => {
                let Some(state) = self.states.get_mut(at) else { return not_found() };
                let before = state.saved.len();
                state.keep_saved(*keep);
                Ok((before - state.saved.len()).into())
            }
            Step::Batch(..) | Step::List(..) | Step::AtLeast(..) | Step::Equal(..) => {
                Ok(self.many(step))
            }
            _ => self.read(step),
        }
    }

    /// What a step says that reads one state.
    fn read(&self, step: &Step) -> Answer {
        let state = |at: &At| self.states.get(at);
        match step {
            Step::Get(at) | Step::Load(at) => match state(at) {
                Some(state) if state.head().data.is_some() => Ok(state.told(state.newest())),
                _ => not_found(),
            },
            Step::Record(at) => Ok(match state(at) {
                Some(state) => json!([state.told(state.newest()), state.first]),
                None => Value::Null,
            }),
            Step::Recover(at) => match state(at) {
                Some(state) if state.head().data.is_some() => Ok(state.told(state.newest())),
                Some(_) => Ok(Value::Null),
                None => not_found(),
            },
            Step::AtPoint(at, point) => match state(at) {
                Some(state) => Ok(state.told(state.at(*point)?)),
                None => not_found(),
            },
            Step::Event(at, guess) => match state(at) {
                Some(state) => match guess.of(state.newest()) {
                    version if version == 0 || version > state.newest() => not_found(),
                    version if version < state.first => trimmed(),
                    version => Ok(state.event(version)),
                },
                None => not_found(),
            },
            Step::History(at, guess) => match state(at) {
                Some(state) => {
                    let from = guess.map_or(state.first, |guess| guess.of(state.newest()).max(1));
                    if from < state.first {
                        return trimmed();
                    }
                    Ok((from..=state.newest()).map(|version| state.event(version)).collect())
                }
                None => not_found(),
            },
            Step::Saved(at) => match state(at) {
                Some(state) => Ok(json!(state.saved)),
                None => not_found(),
            },
            other => panic!("{other:?} is no reading of one state"),
        }
    }

    /// What a step says that looks at the states of a governor.
    fn many(&self, step: &Step) -> Value {
        let of = |governor: usize| {
            let mut states: Vec<(At, &State)> = self
                .states
                .iter()
                .filter(|(at, _)| at.0 == governor)
                .map(|(at, state)| (*at, state))
                .collect();
            states.sort_by_key(|(at, _)| Name::escape(STATES[at.1], "id").expect("an id"));
            states
        };
        let told = |state: &State| state.told(state.newest());
        let n = |state: &State| state.head().data.as_ref().and_then(|data| data.get("n")?.as_f64());
        match step {
            Step::Batch(governor) => (0..STATES.len())
                .filter_map(|number| self.states.get(&At(*governor, number)))
                .filter(|state| state.head().data.is_some())
                .map(told)
                .collect(),
            Step::List(governor, _, with_deleted) => of(*governor)
                .into_iter()
                .filter(|(_, state)| *with_deleted || state.head().data.is_some())
                .map(|(at, state)| json!([STATES[at.1], told(state), state.first]))
                .collect(),
            Step::Equal(governor, wanted) => of(*governor)
                .into_iter()
                .filter(|(_, state)| n(state) == Some(*wanted as f64))
                .map(|(at, _)| STATES[at.1])
                .collect(),
            Step::AtLeast(governor, least, _) => {
                let mut found: Vec<(f64, &str)> = of(*governor)
                    .into_iter()
                    .filter_map(|(at, state)| Some((n(state)?, STATES[at.1])))
                    .filter(|(n, _)| *n >= *least as f64)
                    .collect();
                // Backwards: of equal ones the last name comes first.
                found.reverse();
                found.sort_by(|(a, _), (b, _)| b.total_cmp(a));
                found.into_iter().map(|(_, id)| id).collect()
            }
            other => panic!("{other:?} looks at no governor"),
        }
    }

    fn newest(&self, at: At) -> u64 {
        self.states.get(&at).map_or(0, State::newest)
    }

    fn data(&self, at: At) -> Value {
        self.states.get(&at).and_then(|state| state.head().data.clone()).unwrap_or(Value::Null)
    }

    fn expect(&self, at: At, guess: Option<Guess>) -> Expect {
        guess.map_or(Expect::Any, |guess| Expect::Version(guess.of(self.newest(at))))
    }

    fn put(&mut self, at: At, action: &'static str, data: &Value, expect: Expect) -> Answer {
        self.change(at, action, Wish::Put(data.clone()), expect, None, false).map(Value::from)
    }

    fn change(
        &mut self,
        at: At,
        action: &'static str,
        wish: Wish,
        expect: Expect,
        time: Option<DateTime<Utc>>,
        may_begin: bool,
    ) -> Result<u64, String> {
        let actual = self.newest(at);
        let alive = self.states.get(&at).is_some_and(|state| state.head().data.is_some());
        let (holds, expected) = match expect {
            Expect::Any => (true, 0),
            Expect::Version(0) => (!alive, 0),
            Expect::Version(version) => (version == actual, version),
            Expect::Data(data) => (alive && self.data(at) == data, 0),
        };
        if !holds {
            return Err(format!("version_conflict {expected} {actual}"));
        }
        let (data, is_purge) = match wish {
            Wish::Put(data) => (Some(data), false),
            Wish::Delete if alive || (may_begin && actual == 0) => (None, false),
            Wish::Purge if actual > 0 => (None, true),
            _ => return not_found(),
        };
        let state = self.states.entry(at).or_insert_with(|| State { first: 1, ..State::default() });
        let wanted = time.unwrap_or(self.now);
        let before = state.versions.last().map(|before| before.at);
        let time = before.map_or(wanted, |before| wanted.max(before));
        state.versions.push(Version { action, at: time, data, is_purge });
        let version = state.newest();
        if is_purge {
            state.first = version;
            state.saved.clear();
        } else if version.is_multiple_of(3) {
            state.saved.push(version);
            state.keep_saved(2);
        }
        Ok(version)
    }

    fn transaction(&mut self, steps: &[Inner], fails: bool) -> Answer {
        let mut within = self.clone();
        let mut results = Vec::new();
        for step in steps {
            // What is deleted counts as absent to whoever asks within a transaction.
            let seen = |model: &Self, at: &At| match model.states.get(at) {
                Some(state) if state.head().data.is_some() => state.newest(),
                _ => 0,
            };
            let result = match step {
                Inner::Get(at) => match seen(&within, at) {
                    0 => Value::Null,
                    version => json!([version, within.data(*at)]),
                },
                Inner::Save(at, data) => within.put(*at, "save", data, Expect::Any)?,
                Inner::Update(at, data, guess) => {
                    let expect = Expect::Version(guess.of(seen(&within, at)));
                    within.put(*at, "update", data, expect)?
                }
                Inner::Delete(at, guess) => {
                    let expected = guess.map(|guess| guess.of(seen(&within, at)));
                    let expect = expected.map_or(Expect::Any, Expect::Version);
                    within.change(*at, "delete", Wish::Delete, expect, None, false)?.into()
                }
            };
            results.push(result);
        }
        if fails {
            return Err("invalid_state".into());
        }
        *self = within;
        Ok(Value::Array(results))
    }

    /// What a store may be when it is left in the middle of a step: a clean-up goes state by state.
    #[must_use]
    pub fn within(&self, step: &Step) -> Vec<Self> {
        let Step::Cleanup(governor, cutoff, keep) = step else { return Vec::new() };
        let upto = |most: usize| {
            let mut model = self.clone();
            model.cleanup(*governor, *cutoff, *keep, most);
            model
        };
        (1..STATES.len()).map(upto).collect()
    }

    /// Of so many states at most, in the order of their names.
    fn cleanup(&mut self, governor: usize, cutoff: DateTime<Utc>, keep: u64, most: usize) -> Value {
        let (mut states, mut events, mut snapshots, mut saved) = (0, 0, 0, 0);
        let of_governor = self.states.iter_mut().filter(|(at, _)| at.0 == governor);
        let mut of_governor: Vec<(&At, &mut State)> = of_governor.collect();
        of_governor.sort_by_key(|(at, _)| Name::escape(STATES[at.1], "id").expect("an id"));
        for (_, state) in of_governor.into_iter().take(most) {
            states += 1;
            let most = (state.newest() + 1).saturating_sub(keep.max(1));
            let Some(found) = state.until(cutoff) else { continue };
            let first = found.min(most);
            if first <= state.first {
                continue;
            }
            events += first - state.first;
            state.first = first;
            let before = state.saved.len();
            state.saved.retain(|version| *version >= first);
            snapshots += before - state.saved.len();
            if !state.saved.contains(&first) {
                state.saved.insert(0, first);
                saved += 1;
            }
        }
        json!({"states": states, "events": events, "snapshots": snapshots, "saved": saved})
    }

    fn purge(&mut self, at: At) -> Answer {
        let Some(state) = self.states.get(&at) else { return not_found() };
        let (mut events, snapshots) = (0, state.saved.len());
        let mut removed = 0;
        if !state.head().is_purge {
            events = state.newest() + 1 - state.first;
            removed = snapshots;
            self.change(at, "purge", Wish::Purge, Expect::Any, None, false)?;
        }
        let state = &self.states[&at];
        Ok(json!({"version": state.first, "events": events, "snapshots": removed}))
    }

    /// Which governors there are, in the order of their names.
    #[must_use]
    pub fn governors(&self) -> Vec<&'static str> {
        let mut governors: Vec<&str> = self.states.keys().map(|at| GOVERNORS[at.0]).collect();
        governors.dedup();
        governors.sort_by_key(|id| Name::escape(id, "id").expect("an id"));
        governors
    }

    /// All steps that read everything.
    #[must_use]
    pub fn questions() -> Vec<Step> {
        let mut steps = Vec::new();
        for governor in 0..GOVERNORS.len() {
            steps.extend([Step::List(governor, 2, true), Step::Batch(governor)]);
            for state in 0..STATES.len() {
                let at = At(governor, state);
                steps.extend([Step::Record(at), Step::History(at, None), Step::Saved(at)]);
            }
        }
        steps
    }

    /// How many versions there are of all states, those included that were cleaned up.
    #[must_use]
    pub fn changes(&self) -> u64 {
        self.states.values().map(State::newest).sum()
    }
}
