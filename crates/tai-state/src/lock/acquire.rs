//! Pursues locks: stands in line, waits for whoever holds them, takes them all in one commit.

use std::sync::Arc;
use std::time::Duration;

use tokio::runtime::Handle;

use super::DistributedLock;
use crate::backend::Key;
use crate::clock::{Stopwatch, jitter, random_id};
use crate::error::{Error, Result};
use crate::fence::{Token, lock_key};
use crate::grant::{Anchor, Grant};
use crate::keys::Address;
use crate::lease::{Lease, Now, Standing, Wanted};
use crate::leases::{FoundLease, Put};
use crate::manager::TransactionManager;
use crate::patience::Deadline;
use crate::reader::Watch;
use crate::records::Records;

/// Without an alarm a lock is looked at so often, give or take half of it.
const POLL: Duration = Duration::from_millis(250);
/// With an alarm it is looked at all the same, in case the alarm says nothing.
const LOOK_AGAIN: Duration = Duration::from_secs(5);
/// Those who wait elsewhere do not all come at once.
const SPREAD: Duration = Duration::from_millis(20);
/// How often a free lock is tried for when the time for waiting is over.
const LATE_TRIES: u32 = 8;

/// One who wants locks. When it is dropped on the way, what may have been granted is given back.
struct Pursuit {
    records: Arc<Records>,
    keys: Vec<Key>,
    wanted: Vec<Wanted>,
    runtime: Handle,
    /// Whether a grant may have arrived that nobody knows of.
    may_have: bool,
    /// Whether one may arrive yet.
    is_unclear: bool,
}

impl Pursuit {
    fn has_one_of(&self, found: &[Option<FoundLease>]) -> bool {
        let tokens = self.wanted.iter().map(|wanted| &wanted.lock_token);
        tokens.zip(found).any(|(token, found)| {
            found.as_ref().is_some_and(|found| found.lease.held && found.lease.lock_token == *token)
        })
    }
}

impl Drop for Pursuit {
    fn drop(&mut self) {
        if !self.may_have {
            return;
        }
        let (records, keys) = (Arc::clone(&self.records), std::mem::take(&mut self.keys));
        let wanted = std::mem::take(&mut self.wanted);
        self.runtime.spawn(async move {
            // Twice, since what was sent may still be on its way; then the lease has to end.
            for pause in [Duration::ZERO, Duration::from_secs(1)] {
                tokio::time::sleep(pause).await;
                if let Err(error) = give_back(&records, &keys, &wanted).await {
                    tracing::warn!(%error, "locks that nobody waits for could not be given back");
                }
            }
        });
    }
}

/// Releases those of the locks that were granted under these tokens.
async fn give_back(records: &Records, keys: &[Key], wanted: &[Wanted]) -> Result<()> {
    let deadline = records.deadline();
    let (found, _) = records.look_at_leases(keys, deadline).await?;
    for ((key, wanted), found) in keys.iter().zip(wanted).zip(found) {
        let ours =
            found.filter(|found| found.lease.held && found.lease.lock_token == wanted.lock_token);
        if let Some(found) = ours {
            let write = [(key, found.lease.released(), Some(found.revision))];
            records.put_leases(&write, &mut records.tries(deadline)).await?;
        }
    }
    Ok(())
}

impl TransactionManager {
    pub(super) async fn acquire<R: AsRef<str>>(
        &self,
        resources: &[R],
        client_id: String,
        lease: Duration,
        wait: Duration,
    ) -> Result<Vec<DistributedLock>> {
        let mut pursuit = self.pursuit(resources, client_id, lease)?;
        let waiting = Deadline::after(wait);
        // A look must have its time, however short the wait; all of them together have no more.
        let retry = &self.records.options().retry;
        let by = Deadline::after(wait.saturating_add(retry.attempt_timeout));
        // First come, first served; who wants several waits for no line, so that nobody waits for
        // one who waits for him.
        let place = match pursuit.keys.as_slice() {
            [key] if !wait.is_zero() => Some(self.records.locks.lines.join(&place_of(key))),
            _ => None,
        };
        let turn = match &place {
            Some(place) => place.turn_within(waiting.left()).await,
            None => None,
        };
        let mut alarm: Option<Watch> = None;
        let (mut late_tries, mut unclear) = (0, 0);
        loop {
            let asked = Stopwatch::start();
            // What rang before a look is seen by it.
            if let Some(watch) = &mut alarm
                && watch.hush().await.is_err()
            {
                alarm = None;
            }
            let deadline = Deadline::after(by.left().min(retry.deadline));
            let (found, moment) = self.records.look_at_leases(&pursuit.keys, deadline).await?;
            let anchor = Anchor { moment, asked };
            pursuit.may_have &= pursuit.is_unclear || pursuit.has_one_of(&found);
            let Some((held_by, key, left)) = self.who_holds(&pursuit, &found, &anchor) else {
                if let Some(locks) = self.take(&mut pursuit, &found, anchor, deadline).await? {
                    return Ok(locks);
                }
                // Somebody was faster: the next look says who.
                late_tries += u32::from(waiting.is_over());
                if late_tries > LATE_TRIES {
                    return Err(held("others", pursuit.keys.first(), 0));
                }
                // Who lost a race is rung for by the winner; looking before that tells nothing.
                let is_watched = pursuit.keys.len() == 1 && !pursuit.is_unclear;
                if let Some(watch) = alarm.as_mut().filter(|_| is_watched && !waiting.is_over()) {
                    let most = waiting.left().min(LOOK_AGAIN);
                    if matches!(tokio::time::timeout(most, watch.ring()).await, Ok(Err(_))) {
                        alarm = None;
                    }
                }
                // Who gets no answer does not hammer, and once the waiting is over not for long.
                let pause = match pursuit.is_unclear {
                    true => {
                        unclear += 1;
                        if by.is_over() || (waiting.is_over() && unclear >= retry.max_attempts) {
                            let resource = pursuit.keys.first().map(|key| key.name.id());
                            let operation =
                                format!("acquiring the lock {}", resource.unwrap_or_default());
                            return Err(Error::Timeout { operation, after: by.limit() });
                        }
                        retry.backoff(unclear)
                    }
                    false => jitter(self.spread()),
                };
                tokio::time::sleep(pause.min(by.left())).await;
                continue;
            };
            if waiting.is_over() || (place.is_some() && turn.is_none()) {
                return Err(held(&held_by.client_id, Some(&key), held_by.fencing_token));
            }
            if alarm.is_none() {
                match self.records.watch_lock(&key, waiting).await {
                    // What changed before it rang for us is seen by looking once more.
                    Ok(opened) => {
                        alarm = Some(opened);
                        continue;
                    }
                    Err(error) => tracing::warn!(%error, "a lock is looked at by turns"),
                }
            }
            let rest = left.min(waiting.left());
            match &mut alarm {
                Some(watch) => {
                    let rung = tokio::time::timeout(rest.min(LOOK_AGAIN), watch.ring()).await;
                    // One that broke, or that rings for another of several, is opened anew.
                    if matches!(rung, Ok(Err(_))) || pursuit.keys.len() > 1 {
                        alarm = None;
                    }
                }
                None => tokio::time::sleep((POLL / 2 + jitter(POLL)).min(rest)).await,
            }
            tokio::time::sleep(jitter(self.spread())).await;
        }
    }

    /// Over what those who are woken together spread.
    fn spread(&self) -> Duration {
        if self.records.reads_are_cheap() { SPREAD / 10 } else { SPREAD }
    }

    fn pursuit<R: AsRef<str>>(
        &self,
        resources: &[R],
        client_id: String,
        lease: Duration,
    ) -> Result<Pursuit> {
        let (mut keys, mut wanted) = (Vec::new(), Vec::new());
        for resource in resources {
            let resource = resource.as_ref();
            let key = lock_key(&self.governor, resource)?;
            if keys.contains(&key) {
                return Err(Error::refused(
                    format!("the lock {resource}"),
                    "it is asked for twice",
                ));
            }
            let lock_token = random_id().to_string();
            let want = Wanted { client_id: client_id.clone(), lock_token, lease };
            want.check(resource)?;
            keys.push(key);
            wanted.push(want);
        }
        let runtime = Handle::current();
        let records = Arc::clone(&self.records);
        Ok(Pursuit { records, keys, wanted, runtime, may_have: false, is_unclear: false })
    }

    /// Who stands in the way, and for how long at most, if he does not renew.
    fn who_holds(
        &self,
        pursuit: &Pursuit,
        found: &[Option<FoundLease>],
        anchor: &Anchor,
    ) -> Option<(Lease, Key, Duration)> {
        let mut first: Option<(Lease, Key, Duration)> = None;
        for ((key, wanted), found) in pursuit.keys.iter().zip(&pursuit.wanted).zip(found) {
            let Some(found) = found else { continue };
            // A grant of ours that was not answered.
            if found.lease.lock_token == wanted.lock_token {
                continue;
            }
            let left = match self.records.locks.standing(key, found, &anchor.moment) {
                Standing::Free => continue,
                Standing::Held(left) | Standing::Watch(left) => left,
            };
            // Waiting for one is not enough while another is held for longer.
            if first.as_ref().is_none_or(|(_, _, longest)| left > *longest) {
                first = Some((found.lease.clone(), key.clone(), left));
            }
        }
        first
    }

    /// Takes all locks, which were found free; `None` when somebody was faster, or it took longer than
    /// the lease.
    async fn take(
        &self,
        pursuit: &mut Pursuit,
        found: &[Option<FoundLease>],
        anchor: Anchor,
        deadline: Deadline,
    ) -> Result<Option<Vec<DistributedLock>>> {
        let sent = Stopwatch::start();
        let now = Now { moment: anchor.now(), wall: self.records.options().clock.now() };
        let mut leases = Vec::with_capacity(found.len());
        for ((key, wanted), found) in pursuit.keys.iter().zip(&pursuit.wanted).zip(found) {
            let before = found.as_ref().map(|found| &found.lease);
            let lease = match before {
                Some(ours) if ours.lock_token == wanted.lock_token && ours.held => {
                    ours.renewed(&now)
                }
                before => Lease::grant(before, wanted, &now)?,
            };
            leases.push((key, lease, found.as_ref().map(|found| found.revision)));
        }
        pursuit.may_have = true;
        let put = self.records.put_leases(&leases, &mut self.records.tries(deadline)).await?;
        let revisions = match put {
            Put::Done(revisions) => revisions,
            put => {
                pursuit.is_unclear |= matches!(put, Put::Unclear);
                return Ok(None);
            }
        };
        // What took longer than the lease may be another's by now; what was granted is looked at anew.
        if leases.iter().any(|(_, lease, _)| sent.elapsed() >= lease.lease) {
            return Ok(None);
        }
        let mut locks = Vec::with_capacity(leases.len());
        for ((key, lease, _), revision) in leases.into_iter().zip(revisions) {
            let store = Some(self.records.identity().store);
            let token = Token::new(key.clone(), lease.fencing_token, store, Some(revision));
            let (records, anchor) = (Arc::clone(&self.records), anchor.clone());
            let grant = Arc::new(Grant::new(records, Arc::new(token), lease.clone(), anchor));
            self.records.locks.keep(&lease.lock_token, &grant);
            let renewal = tokio::spawn(Arc::clone(&grant).keep(sent)).abort_handle();
            tracing::debug!(resource = %key.name, token = lease.fencing_token, "a lock was granted");
            locks.push(DistributedLock {
                resource: key.name.id(),
                client_id: lease.client_id,
                lock_token: lease.lock_token,
                fencing_token: lease.fencing_token,
                grant,
                renewal,
                runtime: pursuit.runtime.clone(),
            });
        }
        pursuit.may_have = false;
        Ok(Some(locks))
    }
}

fn held(by: &str, key: Option<&Key>, fencing_token: u64) -> Error {
    let resource = key.map_or_else(String::new, |key| key.name.id());
    Error::LockHeld { resource, held_by: by.to_owned(), fencing_token }
}

/// Where those stand who wait for a lock.
fn place_of(key: &Key) -> Address {
    Address { governor: key.governor.clone(), state: key.name.clone() }
}
