//! What the workloads have in common: a clock on every call, an end, and what they have got done.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use tai_state::Error;
use tokio::sync::watch;

use super::{BACK, GRACE};
use crate::run::Tally;

/// The workloads, as places in [`Field::done`].
pub(super) const BANK: usize = 0;
pub(super) const APPEND: usize = 1;
pub(super) const LOCKS: usize = 2;
const NAMES: [&str; 3] = ["bank", "append", "locks"];

#[derive(Debug)]
pub(super) struct Field {
    /// By when a call without a time of its own is back.
    pub(super) deadline: Duration,
    pub(super) attempt: Duration,
    is_over: AtomicBool,
    /// What answers may be another store than the one that was opened; and how often a call was told so.
    is_replaced: AtomicBool,
    told_so: AtomicU64,
    /// How often each workload has succeeded.
    done: watch::Sender<[u64; 3]>,
    calls: AtomicU64,
    longest: AtomicU64,
    broken: Mutex<Vec<String>>,
    /// What is going on.
    now: Mutex<String>,
}

impl Field {
    pub(super) fn new(deadline: Duration, attempt: Duration) -> Self {
        Self {
            deadline,
            attempt,
            is_over: AtomicBool::new(false),
            is_replaced: AtomicBool::new(false),
            told_so: AtomicU64::new(0),
            done: watch::Sender::new([0; 3]),
            calls: AtomicU64::new(0),
            longest: AtomicU64::new(0),
            broken: Mutex::default(),
            now: Mutex::new("in peace".to_owned()),
        }
    }

    pub(super) fn is_over(&self) -> bool {
        self.is_over.load(Ordering::SeqCst)
    }

    pub(super) fn end(&self) {
        self.is_over.store(true, Ordering::SeqCst);
    }

    /// From now on what answers may be another store.
    pub(super) fn replaced(&self) {
        self.is_replaced.store(true, Ordering::SeqCst);
    }

    /// How many calls were told that it is.
    pub(super) fn told_so(&self) -> u64 {
        self.told_so.load(Ordering::SeqCst)
    }

    pub(super) fn now(&self, what: &str) {
        what.clone_into(&mut self.now.lock().unwrap());
    }

    pub(super) fn broken(&self, how: impl std::fmt::Display) {
        let now = self.now.lock().unwrap().clone();
        self.broken.lock().unwrap().push(format!("{now}: {how}"));
    }

    pub(super) fn did(&self, workload: usize) {
        self.done.send_modify(|done| done[workload] += 1);
    }

    /// Makes a call, which must be back by the deadline and a second more. `None` when it was not.
    pub(super) async fn call<T>(
        &self,
        what: &str,
        call: impl Future<Output = Result<T, Error>>,
    ) -> Option<Result<T, Error>> {
        self.within(what, self.deadline, call).await
    }

    pub(super) async fn within<T>(
        &self,
        what: &str,
        limit: Duration,
        call: impl Future<Output = Result<T, Error>>,
    ) -> Option<Result<T, Error>> {
        self.calls.fetch_add(1, Ordering::Relaxed);
        let started = Instant::now();
        let answer = tokio::time::timeout(limit + GRACE, call).await;
        let over = started.elapsed().saturating_sub(limit).as_millis();
        self.longest.fetch_max(u64::try_from(over).unwrap(), Ordering::Relaxed);
        if answer.is_err() {
            self.broken(format!("{what} was not back {GRACE:?} after {limit:?}"));
        }
        answer.ok()
    }

    /// An error that a fault may cause; another is a broken promise. A breath, so that what fails at once
    /// does not fail a thousand times.
    pub(super) async fn failed(&self, what: &str, error: &Error) {
        let is_replaced =
            self.is_replaced.load(Ordering::SeqCst) && matches!(error, Error::StoreReplaced { .. });
        self.told_so.fetch_add(u64::from(is_replaced), Ordering::SeqCst);
        let is_fair = error.is_transient()
            || is_replaced
            || matches!(error, Error::OutcomeUnknown { .. } | Error::LockLost { .. });
        if !is_fair {
            self.broken(format!("{what}: {error}"));
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }

    pub(super) fn done(&self) -> [u64; 3] {
        *self.done.borrow()
    }

    /// Waits until every workload has succeeded again, and says after how long.
    pub(super) async fn back_again(&self) -> Duration {
        let started = Instant::now();
        let before = self.done();
        let mut done = self.done.subscribe();
        let all = done.wait_for(|now| (0..3).all(|n| now[n] > before[n]));
        if tokio::time::timeout(BACK, all).await.is_err() {
            let now = self.done();
            for n in (0..3).filter(|n| now[*n] == before[*n]) {
                self.broken(format!("{} has not succeeded {BACK:?} after the end of it", NAMES[n]));
            }
        }
        started.elapsed()
    }

    pub(super) fn judge(&self, tally: &mut Tally) {
        tally.count("calls against the clock", self.calls.load(Ordering::Relaxed));
        let longest = self.longest.load(Ordering::Relaxed);
        tally.highest("ms at most beyond a deadline", longest);
        for how in self.broken.lock().unwrap().drain(..) {
            tally.broken(how);
        }
    }
}
