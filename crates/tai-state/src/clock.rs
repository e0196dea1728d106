//! Time and randomness: the only file that asks the machine for either.
//!
//! Wall time is a payload of a change, never an order: order is the version. Everything that needs
//! the time takes a [`Clock`], so that a test can stop it, set it back or let it jump.

// The one place that the ban in clippy.toml points to.
#![allow(clippy::disallowed_methods)]

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
#[cfg(not(target_os = "linux"))]
use std::time::Instant;

use chrono::{DateTime, SubsecRound, TimeDelta, Utc};
use uuid::Uuid;

/// Where the time of a change comes from.
pub trait Clock: Send + Sync + fmt::Debug + 'static {
    /// The wall time now.
    fn now(&self) -> DateTime<Utc>;
}

/// The machine's clock.
#[derive(Debug, Clone, Copy, Default)]
pub struct SystemClock;

impl Clock for SystemClock {
    fn now(&self) -> DateTime<Utc> {
        Utc::now()
    }
}

/// A clock that moves when it is told to. Clones share the time.
///
/// ```
/// use chrono::{TimeDelta, Utc, TimeZone};
/// use tai_state::{Clock, ManualClock};
///
/// let clock = ManualClock::at(Utc.with_ymd_and_hms(2026, 1, 1, 15, 0, 0).unwrap());
/// clock.advance(TimeDelta::hours(-1));
/// assert_eq!(clock.now(), Utc.with_ymd_and_hms(2026, 1, 1, 14, 0, 0).unwrap());
/// ```
#[derive(Debug, Clone)]
pub struct ManualClock(Arc<Mutex<DateTime<Utc>>>);

impl ManualClock {
    /// A clock that stands at `time`.
    #[must_use]
    pub fn at(time: DateTime<Utc>) -> Self {
        Self(Arc::new(Mutex::new(time)))
    }

    /// Sets the time, backwards too.
    pub fn set(&self, time: DateTime<Utc>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = time;
    }

    /// Moves the time by `by`, which may be negative. A move out of the calendar does nothing.
    pub fn advance(&self, by: TimeDelta) {
        let mut time = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(moved) = time.checked_add_signed(by) {
            *time = moved;
        }
    }
}

impl Clock for ManualClock {
    fn now(&self) -> DateTime<Utc> {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A moment by a backend's own clock, by which leases are judged. It has nothing to do with wall time,
/// and only moments of one epoch can be compared: a clock that begins anew begins a new one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Moment {
    /// Since when the clock counts: a boot of the machine, a service's own time.
    pub epoch: String,
    /// Microseconds since then.
    pub micros: u64,
}

impl Moment {
    /// How much later it is than another; `None` for a moment of another epoch.
    #[must_use]
    pub fn since(&self, earlier: &Self) -> Option<Duration> {
        let micros = self.micros.saturating_sub(earlier.micros);
        (self.epoch == earlier.epoch).then(|| Duration::from_micros(micros))
    }

    /// The moment so much later.
    #[must_use]
    pub fn after(&self, by: Duration) -> Self {
        let by = u64::try_from(by.as_micros()).unwrap_or(u64::MAX);
        Self { epoch: self.epoch.clone(), micros: self.micros.saturating_add(by) }
    }
}

/// The clock of the machine that all its processes share, and that no setting of the time moves: what
/// Linux counts since the boot, sleep included. Where it cannot be had, each process has a clock of
/// its own, whose moments others cannot compare with theirs.
#[cfg(feature = "embedded")]
#[derive(Debug)]
pub(crate) struct MachineClock {
    epoch: String,
    #[cfg_attr(target_os = "linux", allow(dead_code))]
    own: Stopwatch,
    is_shared: bool,
}

#[cfg(feature = "embedded")]
impl MachineClock {
    pub(crate) fn new() -> Self {
        let own = Stopwatch::start();
        #[cfg(target_os = "linux")]
        if let Ok(boot) = std::fs::read_to_string("/proc/sys/kernel/random/boot_id") {
            return Self { epoch: format!("boot-{}", boot.trim()), own, is_shared: true };
        }
        Self { epoch: format!("process-{}", random_id()), own, is_shared: false }
    }

    pub(crate) fn now(&self) -> Moment {
        #[cfg(target_os = "linux")]
        if self.is_shared {
            let micros = u64::try_from(since_boot().as_micros()).unwrap_or(u64::MAX);
            return Moment { epoch: self.epoch.clone(), micros };
        }
        Moment { epoch: self.epoch.clone(), micros: self.own.micros() }
    }
}

/// What Linux counts since the boot, sleep included; no setting of the time moves it.
#[cfg(target_os = "linux")]
fn since_boot() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    let nanos = u32::try_from(time.tv_nsec).unwrap_or(0);
    Duration::new(time.tv_sec.unsigned_abs(), nanos)
}

/// The time in whole microseconds, which is what both backends keep.
/// A leap second, which neither keeps, is the last microsecond before it.
pub(crate) fn to_micros(time: DateTime<Utc>) -> DateTime<Utc> {
    if time.timestamp_subsec_nanos() >= 1_000_000_000 {
        let last = DateTime::from_timestamp(time.timestamp(), 999_999_000);
        return last.unwrap_or(time);
    }
    time.trunc_subsecs(6)
}

/// The identity of a change, chosen once before it is first sent: a UUIDv7.
pub(crate) fn new_event_id() -> Uuid {
    Uuid::now_v7()
}

/// A random identity.
pub(crate) fn random_id() -> Uuid {
    Uuid::new_v4()
}

/// A uniformly distributed part of `most`: full jitter.
pub(crate) fn jitter(most: Duration) -> Duration {
    let share = f64::from((Uuid::new_v4().as_u128() >> 96) as u32) / f64::from(u32::MAX);
    most.mul_f64(share)
}

/// Time since it was started, whatever the wall clock does. On Linux it goes on while the machine sleeps,
/// as the clocks by which leases are judged do.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Stopwatch(
    #[cfg(target_os = "linux")] Duration,
    #[cfg(not(target_os = "linux"))] Instant,
);

impl Stopwatch {
    #[cfg(target_os = "linux")]
    pub(crate) fn start() -> Self {
        Self(since_boot())
    }

    #[cfg(not(target_os = "linux"))]
    pub(crate) fn start() -> Self {
        Self(Instant::now())
    }

    #[cfg(target_os = "linux")]
    pub(crate) fn elapsed(self) -> Duration {
        since_boot().saturating_sub(self.0)
    }

    #[cfg(not(target_os = "linux"))]
    pub(crate) fn elapsed(self) -> Duration {
        self.0.elapsed()
    }

    pub(crate) fn micros(self) -> u64 {
        u64::try_from(self.elapsed().as_micros()).unwrap_or(u64::MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn jitter_stays_below_and_spreads() {
        let most = Duration::from_millis(100);
        let drawn: Vec<_> = (0..200).map(|_| jitter(most)).collect();
        assert!(drawn.iter().all(|d| *d <= most));
        assert!(drawn.iter().any(|d| *d < most / 3));
        assert!(drawn.iter().any(|d| *d > most * 2 / 3));
    }

    #[test]
    fn event_ids_rise() {
        let ids: Vec<_> = (0..100).map(|_| new_event_id()).collect();
        assert!(ids.windows(2).all(|pair| pair[0] < pair[1]));
    }
}
