//! Settings: plain values that a service may read from its own configuration.

use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::clock::{Clock, SystemClock};

/// When snapshots are saved, how many are kept, and how states are loaded.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PersistenceConfig {
    /// A snapshot is saved with every change whose version this divides; 0 = never.
    pub snapshot_interval: u64,
    /// How many of the newest saved snapshots of a state are kept.
    pub snapshot_retention: usize,
    /// Whether loading a state replays its log from the newest saved snapshot and compares the
    /// result with the head, or trusts the head.
    pub auto_replay: bool,
    /// How many events are in memory at once while replaying.
    pub max_replay_batch_size: usize,
}

impl Default for PersistenceConfig {
    fn default() -> Self {
        Self {
            snapshot_interval: 100,
            snapshot_retention: 5,
            auto_replay: true,
            max_replay_batch_size: 1_000,
        }
    }
}

/// How conflicts and failures that surely changed nothing are tried again: exponential backoff with
/// full jitter (a uniformly distributed part of `min(cap, base · 2ⁿ)`).
///
/// `max_attempts` bounds how often one commit is sent and how often a transaction loses against others (it
/// may run more often: what its own process's line sends back does not count). A change that
/// expects nothing (`save_state`) cannot conflict; when another writer was faster it is planned again
/// until the `deadline`, whatever `max_attempts` says. So is `batch_get_states` where a cut must be confirmed
/// (on Firestore's emulator).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RetryPolicy {
    /// How often at most, the first try included.
    pub max_attempts: u32,
    /// The longest wait before the second try.
    pub base: Duration,
    /// The longest wait before any later one.
    pub cap: Duration,
    /// By when a call has returned, at most a second later; nothing is tried again after it.
    pub deadline: Duration,
    /// How long one try over a network may take before it counts as lost.
    pub attempt_timeout: Duration,
}

impl Default for RetryPolicy {
    fn default() -> Self {
        Self {
            max_attempts: 8,
            base: Duration::from_millis(10),
            cap: Duration::from_secs(1),
            deadline: Duration::from_secs(60),
            attempt_timeout: Duration::from_secs(10),
        }
    }
}

impl RetryPolicy {
    /// One try, no second.
    #[must_use]
    pub fn none() -> Self {
        Self { max_attempts: 1, ..Self::default() }
    }

    /// The wait after `failed` tries, spread with full jitter.
    #[must_use]
    pub fn backoff(&self, failed: u32) -> Duration {
        let factor = 2u32.saturating_pow(failed.saturating_sub(1));
        crate::clock::jitter(self.base.saturating_mul(factor).min(self.cap))
    }
}

/// Settings of a store's handle.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct StoreOptions {
    /// When snapshots are saved by the store's own verbs.
    pub persistence: PersistenceConfig,
    /// How failures that surely changed nothing are tried again.
    pub retry: RetryPolicy,
    /// Where the time of a change comes from.
    pub clock: Arc<dyn Clock>,
    /// The node that changes are counted under in vector clocks; by default the store's own.
    pub node: Option<String>,
    /// Whether a file that does not exist may be created.
    pub create: bool,
    /// Whether a file is accepted where the disk is known to be memory (Cloud Run).
    pub allow_ephemeral_disk: bool,
    /// Whether an emulator may be elsewhere than on this machine: what goes there is not encrypted.
    pub allow_remote_emulator: bool,
    /// How many bytes of heads a handle may remember, so that a write in the steady state needs
    /// no read before it.
    pub cache_bytes: usize,
    /// For how long the answer to a command with an idempotency key is kept at least. It answers for as
    /// long as it is there; [`forget_expired_commands`](crate::TransactionManager::forget_expired_commands)
    /// removes it, and on Firestore a time-to-live policy can.
    pub idempotency_ttl: Duration,
    /// For the control of tests: a commit that is refused is taken for a conflict without looking
    /// whether it was our own that had been applied before.
    #[cfg(feature = "testing")]
    #[doc(hidden)]
    pub never_settle: bool,
    /// For the control of tests: what a transaction only read is not looked at when it commits.
    #[cfg(feature = "testing")]
    #[doc(hidden)]
    pub never_check_reads: bool,
}

impl StoreOptions {
    pub(crate) fn settles(&self) -> bool {
        #[cfg(feature = "testing")]
        return !self.never_settle;
        #[cfg(not(feature = "testing"))]
        true
    }

    pub(crate) fn checks_reads(&self) -> bool {
        #[cfg(feature = "testing")]
        return !self.never_check_reads;
        #[cfg(not(feature = "testing"))]
        true
    }
}

impl Default for StoreOptions {
    fn default() -> Self {
        Self {
            persistence: PersistenceConfig::default(),
            retry: RetryPolicy::default(),
            clock: Arc::new(SystemClock),
            node: None,
            create: true,
            allow_ephemeral_disk: false,
            allow_remote_emulator: false,
            cache_bytes: 16 << 20,
            idempotency_ttl: Duration::from_secs(24 * 60 * 60),
            #[cfg(feature = "testing")]
            never_settle: false,
            #[cfg(feature = "testing")]
            never_check_reads: false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn backoff_grows_to_the_cap() {
        let policy = RetryPolicy::default();
        for failed in [1, 2, 5, 20, u32::MAX] {
            assert!(policy.backoff(failed) <= policy.cap);
        }
        assert!((0..50).all(|_| policy.backoff(1) <= policy.base));
        assert!((0..50).any(|_| policy.backoff(20) > policy.base * 10));
    }
}
