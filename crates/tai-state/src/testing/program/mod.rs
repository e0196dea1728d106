//! Programs of operations on a store: drawn from bytes, run on any store, and foretold by a model.
//!
//! A [`Step`] is one call of the public interface with all that it is given. [`Runner`] makes the call
//! and says what came of it, as JSON or as the error's code; [`Model`] says what must come of it. So two
//! stores, or a store and the model, are compared by equality.

#![allow(clippy::panic, clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

mod model;
mod runner;

use chrono::{DateTime, TimeDelta, Utc};
use serde_json::{Value, json};

use super::fuzz::Input;
use crate::config::{PersistenceConfig, StoreOptions};

pub use model::Model;
pub use runner::Runner;

/// What came of a step.
pub type Answer = Result<Value, String>;

/// Names of governors and of states, by their number; some are kept under other names.
const GOVERNORS: [&str; 2] = ["g", "a/b"];
const STATES: [&str; 3] = ["s", "t~1", "__u__"];

/// Which state: the numbers of its governor and of itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct At(usize, usize);

impl At {
    fn drawn(input: &mut Input<'_>) -> Self {
        // Mostly the same, so that there is something to conflict with.
        let number = input.below(14);
        Self(usize::from(number > 11), [0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 2, 0, 1][number])
    }

    fn names(self) -> (&'static str, &'static str) {
        (GOVERNORS[self.0], STATES[self.1])
    }
}

/// The version that a caller expects: so far from the one that there is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Guess(i64);

impl Guess {
    fn drawn(input: &mut Input<'_>) -> Self {
        Self([0, 0, 0, 0, -1, 1, i64::MIN, i64::MAX][input.below(8)])
    }

    fn of(self, version: u64) -> u64 {
        version.saturating_add_signed(self.0)
    }
}

/// What a transition says that it starts from.
#[derive(Debug, Clone, PartialEq)]
pub enum From {
    /// Nothing.
    Nothing,
    /// What was read, of a version so far from the newest.
    Read(Guess),
    /// A state built by hand with these data.
    Data(Value),
    /// A state built by hand with the data that the state has.
    RightData,
}

/// A point in time: a version so far from the newest, or a second.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Point {
    /// A version.
    Version(Guess),
    /// A time.
    Time(DateTime<Utc>),
}

/// One call within a transaction.
#[derive(Debug, Clone, PartialEq)]
pub enum Inner {
    /// `get_state`.
    Get(At),
    /// `save_state`.
    Save(At, Value),
    /// `update_state`.
    Update(At, Value, Guess),
    /// `delete_state`.
    Delete(At, Option<Guess>),
}

/// One call.
#[derive(Debug, Clone, PartialEq)]
#[allow(missing_docs)]
pub enum Step {
    /// The clock goes on, or back, by so many seconds.
    Tick(i64),
    Save(At, Value),
    Update(At, Value, Guess),
    Delete(At, Option<Guess>),
    Log(At, From, Value),
    /// `append`: the data, or a deletion; what is expected; and a time of its own.
    Append(At, Option<Value>, Option<Guess>, Option<DateTime<Utc>>),
    /// A transaction; `true` when its closure fails in the end.
    Transaction(Vec<Inner>, bool),
    Revert(At, Point),
    SaveSnapshot(At),
    Prune(At, usize),
    /// Of a governor: what is older than a time, and how many versions are kept.
    Cleanup(usize, DateTime<Utc>, u64),
    Purge(At),
    Get(At),
    Record(At),
    Batch(usize),
    List(usize, usize, bool),
    /// The states whose `n` is at least so much, the greatest first, in pages.
    AtLeast(usize, i64, usize),
    /// The states whose `n` is this.
    Equal(usize, i64),
    AtPoint(At, Point),
    Event(At, Guess),
    /// The history, from a version so far from the newest on.
    History(At, Option<Guess>),
    Load(At),
    Recover(At),
    Saved(At),
}

/// When programs begin.
#[must_use]
pub fn beginning() -> DateTime<Utc> {
    DateTime::UNIX_EPOCH + TimeDelta::days(20_000)
}

fn time(input: &mut Input<'_>) -> DateTime<Utc> {
    beginning() + TimeDelta::milliseconds(i64::from(input.byte()) * 1_500 - 4_000)
}

fn data(input: &mut Input<'_>) -> Value {
    match input.below(8) {
        0 => input.json(3),
        1 => json!({"n": "text", "x": input.json(2)}),
        2 => json!({"n": f64::from(input.byte()) / 2.0}),
        _ => json!({"n": input.below(6), "x": input.byte()}),
    }
}

fn point(input: &mut Input<'_>) -> Point {
    match input.below(2) {
        0 => Point::Version(Guess::drawn(input)),
        _ => Point::Time(time(input)),
    }
}

fn maybe<T>(input: &mut Input<'_>, draw: impl FnOnce(&mut Input<'_>) -> T) -> Option<T> {
    (input.byte() > 127).then(|| draw(input))
}

impl Inner {
    fn drawn(input: &mut Input<'_>) -> Self {
        let at = At::drawn(input);
        match input.below(6) {
            0 => Self::Get(at),
            1 | 2 => Self::Save(at, data(input)),
            3 | 4 => Self::Update(at, data(input), Guess::drawn(input)),
            _ => Self::Delete(at, maybe(input, Guess::drawn)),
        }
    }
}

impl Step {
    /// The steps that finish what was given up, and give up nothing more.
    #[must_use]
    pub fn finishing() -> Vec<Self> {
        let of = |governor| Self::Cleanup(governor, DateTime::<Utc>::MIN_UTC, u64::MAX);
        (0..GOVERNORS.len()).map(of).collect()
    }

    /// The step that the next bytes are the recipe of.
    #[must_use]
    pub fn drawn(input: &mut Input<'_>) -> Self {
        let what = input.below(44);
        let at = At::drawn(input);
        match what {
            0..=4 => Self::Save(at, data(input)),
            5..=8 => Self::Update(at, data(input), Guess::drawn(input)),
            9 | 10 => Self::Delete(at, maybe(input, Guess::drawn)),
            11..=13 => {
                let from = match input.below(5) {
                    0 => From::Nothing,
                    1 => From::Data(data(input)),
                    2 => From::RightData,
                    _ => From::Read(Guess::drawn(input)),
                };
                Self::Log(at, from, data(input))
            }
            14..=16 => {
                let data = (input.below(5) > 0).then(|| data(input));
                Self::Append(at, data, maybe(input, Guess::drawn), maybe(input, time))
            }
            17..=20 => {
                let steps = (0..input.below(5)).map(|_| Inner::drawn(input)).collect();
                Self::Transaction(steps, input.below(6) == 0)
            }
            21 => Self::Revert(at, point(input)),
            22 => Self::SaveSnapshot(at),
            23 => Self::Prune(at, input.below(3)),
            24 | 41 | 42 => Self::Cleanup(at.0, time(input), input.below(4) as u64),
            25 => Self::Purge(at),
            26 => Self::Get(at),
            27 => Self::Record(at),
            28 => Self::Batch(at.0),
            29 => Self::List(at.0, 1 + input.below(4), input.byte() > 127),
            30 => Self::AtLeast(at.0, input.below(6) as i64, 1 + input.below(3)),
            31 => Self::Equal(at.0, input.below(6) as i64),
            32 => Self::AtPoint(at, point(input)),
            33 => Self::Event(at, Guess::drawn(input)),
            34 | 43 => Self::History(at, maybe(input, Guess::drawn)),
            35 => Self::Load(at),
            36 => Self::Recover(at),
            37 => Self::Saved(at),
            _ => Self::Tick(i64::from(input.byte()) - 64),
        }
    }
}

/// The settings that programs are run with: snapshots are saved often.
#[must_use]
pub fn options(clock: std::sync::Arc<dyn crate::clock::Clock>) -> StoreOptions {
    let persistence = PersistenceConfig {
        snapshot_interval: 3,
        snapshot_retention: 2,
        ..PersistenceConfig::default()
    };
    StoreOptions { persistence, clock, node: Some("n".to_owned()), ..StoreOptions::default() }
}

/// A folder for the file of a program: in memory where there is such a place, since what is tested here
/// is not the disk.
///
/// # Errors
/// What making a folder meets.
#[cfg(feature = "embedded")]
pub fn folder() -> std::io::Result<tempfile::TempDir> {
    let memory = std::path::Path::new("/dev/shm");
    tempfile::tempdir_in(memory).or_else(|_| tempfile::tempdir())
}

/// A version as it is told, by a store and by the model.
fn told(version: u64, action: &str, time: DateTime<Utc>, deleted: bool, data: &Value) -> Value {
    let micros = time.timestamp_micros();
    json!({"v": version, "do": action, "at": micros, "deleted": deleted, "data": data})
}
