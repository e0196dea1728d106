//! Locks with a lease and a fencing token: acquire, wait, list, break, release.

mod acquire;

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use chrono::{DateTime, Utc};
use serde::Serialize;
use tokio::runtime::Handle;
use tokio::task::AbortHandle;

use crate::backend::{Key, Name};
use crate::error::{Error, Result};
use crate::fence::{Fence, lock_key};
use crate::grant::{Grant, State};
use crate::lease::Standing;
use crate::leases::FoundLease;
use crate::manager::TransactionManager;
use crate::records::Records;

/// A lock that is held: renewed in the background until it is released, dropped or lost.
///
/// A lease can end while its holder sleeps, and no holder can know in time. What protects is the
/// [fencing token](DistributedLock::fencing_token): writes through
/// [`StateStore::fenced_by`](crate::StateStore::fenced_by) are refused once somebody else has the
/// lock; other resources can do the same by refusing a token lower than the highest they have seen.
#[non_exhaustive]
pub struct DistributedLock {
    /// What is locked.
    pub resource: String,
    /// Who holds it.
    pub client_id: String,
    /// The secret of this grant: who knows it may release the lock.
    pub lock_token: String,
    /// The number of this grant: it rises with every grant of the resource, and is never used again.
    pub fencing_token: u64,
    grant: Arc<Grant>,
    renewal: AbortHandle,
    runtime: Handle,
}

impl fmt::Debug for DistributedLock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DistributedLock")
            .field("resource", &self.resource)
            .field("client_id", &self.client_id)
            .field("fencing_token", &self.fencing_token)
            .finish_non_exhaustive()
    }
}

impl DistributedLock {
    /// Waits until the lock is not held any more, and says why: somebody else got it, it was broken or
    /// released, or its lease could not be renewed in time. Meant for `tokio::select!`, beside the
    /// work that the lock protects.
    pub async fn lost(&self) -> Error {
        match self.grant.over().await {
            State::Lost(reason) => self.grant.lost(reason),
            State::Held | State::Released => self.grant.lost("it was released".into()),
        }
    }

    /// Whether it is known to be lost or released. `false` is no proof: see [`DistributedLock`].
    #[must_use]
    pub fn is_lost(&self) -> bool {
        self.grant.state() != State::Held
    }

    /// How long a lease lasts without a renewal.
    #[must_use]
    pub fn lease(&self) -> Duration {
        self.grant.lease().lease
    }

    /// Gives the lock back, and says when that has not worked. Dropping it gives it back too, but
    /// cannot say so; and when the runtime ends first, the lease has to end.
    ///
    /// # Errors
    /// [`Error::LockLost`] when somebody else has it by now; what writing meets.
    pub async fn release(self) -> Result<()> {
        self.renewal.abort();
        self.grant.release().await
    }
}

impl Drop for DistributedLock {
    fn drop(&mut self) {
        self.renewal.abort();
        if self.grant.state() != State::Released {
            let grant = Arc::clone(&self.grant);
            self.runtime.spawn(async move {
                if let Err(error) = grant.release().await {
                    tracing::warn!(%error, "a lock that was dropped could not be released");
                }
            });
        }
    }
}

impl From<&DistributedLock> for Fence {
    fn from(lock: &DistributedLock) -> Self {
        Self { token: Arc::clone(&lock.grant.token) }
    }
}

/// How a lock stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum LockStatus {
    /// Somebody holds it.
    Held,
    /// Its lease has ended without a release: whoever comes gets it.
    Expired,
    /// Nobody holds it.
    Free,
    /// It was granted before the machine was started last, or by a clock that cannot be compared: who
    /// comes watches it for the whole of its lease.
    Unclear,
}

/// A lock as others see it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct LockRecord {
    /// What is locked.
    pub resource: String,
    /// How it stands.
    pub status: LockStatus,
    /// Who holds it, or held it last.
    pub client_id: String,
    /// The number of the newest grant.
    pub fencing_token: u64,
    /// How long its lease lasts.
    pub lease: Duration,
    /// How much of it is left, while it is held.
    pub left: Option<Duration>,
    /// When it was acquired, by the holder's wall clock.
    pub acquired_at: DateTime<Utc>,
    /// When the lease ends, by the holder's wall clock. Nothing is judged by it.
    pub expires_at: DateTime<Utc>,
}

impl LockRecord {
    fn new(records: &Records, key: &Key, found: &FoundLease, now: &crate::backend::Moment) -> Self {
        let lease = &found.lease;
        let (status, left) = match records.locks.standing(key, found, now) {
            Standing::Free if lease.held => (LockStatus::Expired, None),
            Standing::Free => (LockStatus::Free, None),
            Standing::Held(left) => (LockStatus::Held, Some(left)),
            Standing::Watch(left) => (LockStatus::Unclear, Some(left)),
        };
        Self {
            resource: key.name.id(),
            status,
            client_id: lease.client_id.clone(),
            fencing_token: lease.fencing_token,
            lease: lease.lease,
            left,
            acquired_at: lease.acquired_at,
            expires_at: lease.expires_at,
        }
    }
}

impl TransactionManager {
    /// Acquires the lock of a resource for a client, with a lease of `duration` that is renewed in the
    /// background; waits for it for `duration` at most. Who waits through one opened store stands in line;
    /// between processes chance decides.
    ///
    /// # Errors
    /// [`Error::LockHeld`] when it was not free in time; [`Error::InvalidState`] for an impossible
    /// name, or a lease shorter than 50 ms or longer than a day; what reading and writing meet.
    pub async fn acquire_lock(
        &self,
        resource: impl AsRef<str>,
        client_id: impl Into<String>,
        duration: Duration,
    ) -> Result<DistributedLock> {
        self.acquire_lock_within(resource, client_id, duration, duration).await
    }

    /// As [`acquire_lock`](TransactionManager::acquire_lock), and waits for so long at most.
    ///
    /// # Errors
    /// As [`acquire_lock`](TransactionManager::acquire_lock).
    pub async fn acquire_lock_within(
        &self,
        resource: impl AsRef<str>,
        client_id: impl Into<String>,
        lease: Duration,
        wait: Duration,
    ) -> Result<DistributedLock> {
        let mut locks = self.acquire(&[resource], client_id.into(), lease, wait).await?;
        locks.pop().ok_or_else(|| Error::refused("a lock", "it was not granted"))
    }

    /// As [`acquire_lock`](TransactionManager::acquire_lock), without waiting.
    ///
    /// # Errors
    /// As [`acquire_lock`](TransactionManager::acquire_lock).
    pub async fn try_acquire_lock(
        &self,
        resource: impl AsRef<str>,
        client_id: impl Into<String>,
        lease: Duration,
    ) -> Result<DistributedLock> {
        self.acquire_lock_within(resource, client_id, lease, Duration::ZERO).await
    }

    /// Acquires the locks of several resources in one commit: all of them or none, so that nobody
    /// holds some while waiting for others, and no deadlock is possible. They come in the order asked.
    /// Waits for `duration` at most until all are free at the same time.
    ///
    /// # Errors
    /// As [`acquire_lock`](TransactionManager::acquire_lock); [`Error::InvalidState`] when a resource is
    /// named twice.
    pub async fn acquire_locks<R: AsRef<str>>(
        &self,
        resources: &[R],
        client_id: impl Into<String>,
        duration: Duration,
    ) -> Result<Vec<DistributedLock>> {
        self.acquire(resources, client_id.into(), duration, duration).await
    }

    /// Gives a lock back, by its [`lock_token`](DistributedLock::lock_token). Once more is harmless.
    ///
    /// # Errors
    /// [`Error::LockLost`] when the token is not that of the newest grant.
    pub async fn release_lock(
        &self,
        resource: impl AsRef<str>,
        lock_token: impl AsRef<str>,
    ) -> Result<()> {
        let (resource, lock_token) = (resource.as_ref(), lock_token.as_ref());
        let key = lock_key(&self.governor, resource)?;
        if let Some(grant) = self.records.locks.grant(lock_token)
            && *grant.key() == key
            && grant.state() != State::Released
        {
            return grant.release().await;
        }
        let deadline = self.records.deadline();
        let mut tries = self.records.tries(deadline);
        let mut sent = None;
        loop {
            let keys = [key.clone()];
            let (found, _) = self.records.look_at_leases(&keys, deadline).await?;
            let found = found.into_iter().next().flatten();
            let lost = |fencing_token, reason: &str| Error::LockLost {
                resource: resource.to_owned(),
                fencing_token,
                reason: reason.to_owned(),
            };
            let Some(FoundLease { lease, revision }) = found else {
                return Err(lost(0, "it was never granted here"));
            };
            // What was sent before may have arrived, and others come after it.
            if sent.is_some_and(|token| lease.follows_a_release_of(token)) {
                return Ok(());
            }
            if lease.lock_token != lock_token {
                return Err(lost(lease.fencing_token, "the lock token is that of another grant"));
            }
            if !lease.held {
                return Ok(());
            }
            sent = Some(lease.fencing_token);
            let write = [(&key, lease.released(), Some(revision))];
            if self.records.put_leases(&write, &mut tries).await?.is_done() {
                return Ok(());
            }
            if !tries.again(false).await {
                let operation = format!("releasing the lock {resource}");
                return Err(Error::Timeout { operation, after: deadline.limit() });
            }
        }
    }

    /// All locks that were ever granted, ascending by name.
    ///
    /// # Errors
    /// What reading meets.
    pub async fn list_locks(&self) -> Result<Vec<LockRecord>> {
        let governor = Name::escape(&self.governor, "governor id")?;
        let (all, now) = self.records.all_leases(&governor).await?;
        Ok(all
            .iter()
            .map(|(key, found)| LockRecord::new(&self.records, key, found, &now))
            .collect())
    }

    /// The lock of a resource; `None` when it was never granted.
    ///
    /// # Errors
    /// What reading meets.
    pub async fn lock_record(&self, resource: impl AsRef<str>) -> Result<Option<LockRecord>> {
        let key = lock_key(&self.governor, resource.as_ref())?;
        let keys = [key.clone()];
        let (found, now) = self.records.look_at_leases(&keys, self.records.deadline()).await?;
        let found = found.into_iter().next().flatten();
        Ok(found.map(|found| LockRecord::new(&self.records, &key, &found, &now)))
    }

    /// Takes a lock away from whoever holds it, and says whose it was; `None` when nobody held it. The
    /// holder's fenced writes fail from then on; what it does elsewhere is not stopped by this.
    ///
    /// # Errors
    /// What reading and writing meet.
    pub async fn break_lock(&self, resource: impl AsRef<str>) -> Result<Option<LockRecord>> {
        let key = lock_key(&self.governor, resource.as_ref())?;
        let deadline = self.records.deadline();
        let mut tries = self.records.tries(deadline);
        let mut sent: Option<LockRecord> = None;
        loop {
            let keys = [key.clone()];
            let (found, now) = self.records.look_at_leases(&keys, deadline).await?;
            let found = found.into_iter().next().flatten();
            // What was sent before may have arrived.
            let broke = |record: &LockRecord| {
                found.as_ref().is_some_and(|found| {
                    let lease = &found.lease;
                    (lease.broken && lease.fencing_token == record.fencing_token)
                        || lease.fencing_token > record.fencing_token
                })
            };
            if sent.as_ref().is_some_and(broke) {
                return Ok(sent);
            }
            let Some(found) = found.filter(|found| found.lease.held) else { return Ok(None) };
            sent = Some(LockRecord::new(&self.records, &key, &found, &now));
            let write = [(&key, found.lease.taken_away(), Some(found.revision))];
            if self.records.put_leases(&write, &mut tries).await?.is_done() {
                return Ok(sent);
            }
            if !tries.again(false).await {
                let operation = format!("breaking the lock {}", key.name.id());
                return Err(Error::Timeout { operation, after: deadline.limit() });
            }
        }
    }

    /// Marks locks as free whose leases have ended without a release; returns how many. Nothing
    /// depends on it: whoever wants such a lock gets it anyway. Fencing tokens stay.
    ///
    /// # Errors
    /// What reading and writing meet.
    pub async fn cleanup_expired_locks(&self) -> Result<u64> {
        let governor = Name::escape(&self.governor, "governor id")?;
        let (all, now) = self.records.all_leases(&governor).await?;
        let mut freed = 0;
        for (key, found) in all {
            let is_over = self.records.locks.standing(&key, &found, &now) == Standing::Free;
            if found.lease.held && is_over {
                // Not as released: its holder must not take it for his own release.
                let write = [(&key, found.lease.taken_away(), Some(found.revision))];
                // One that was taken meanwhile stays with whoever took it.
                let mut tries = self.records.tries(self.records.deadline());
                let done = self.records.put_leases(&write, &mut tries).await?;
                freed += u64::from(done.is_done());
            }
        }
        Ok(freed)
    }
}
