//! One grant of a lock while it is held: renewed in the background, lost, or released.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::watch;

use crate::backend::{Key, Moment};
use crate::clock::Stopwatch;
use crate::error::{Error, Result};
use crate::fence::Token;
use crate::lease::{Lease, Now};
use crate::leases::Put;
use crate::patience::Deadline;
use crate::records::Records;

/// After so long the backend's clock is read again: two clocks do not run at the same rate for ever.
const ANCHOR_HOLDS: Duration = Duration::from_secs(300);

/// What the backend's clock said, and since when this machine counts from there.
#[derive(Debug, Clone)]
pub(crate) struct Anchor {
    pub(crate) moment: Moment,
    /// Started before it was asked, so that what is counted from here is never too early.
    pub(crate) asked: Stopwatch,
}

impl Anchor {
    /// The backend's clock now: not earlier than it is, and later by a round trip at most.
    pub(crate) fn now(&self) -> Moment {
        self.moment.after(self.asked.elapsed())
    }
}

/// How a grant stands with its holder.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum State {
    Held,
    /// For this reason.
    Lost(String),
    Released,
}

/// A grant of a lock to this process.
#[derive(Debug)]
pub(crate) struct Grant {
    records: Arc<Records>,
    pub(crate) token: Arc<Token>,
    lease: Mutex<Lease>,
    anchor: Mutex<Anchor>,
    state: watch::Sender<State>,
    /// One write of the lock at a time.
    busy: tokio::sync::Mutex<()>,
}

impl Grant {
    pub(crate) fn new(
        records: Arc<Records>,
        token: Arc<Token>,
        lease: Lease,
        anchor: Anchor,
    ) -> Self {
        let (lease, anchor) = (Mutex::new(lease), Mutex::new(anchor));
        let (state, busy) = (watch::Sender::new(State::Held), tokio::sync::Mutex::default());
        Self { records, token, lease, anchor, state, busy }
    }

    pub(crate) fn lease(&self) -> Lease {
        self.lease.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn set_lease(&self, lease: Lease) {
        *self.lease.lock().unwrap_or_else(PoisonError::into_inner) = lease;
    }

    fn anchor(&self) -> Anchor {
        self.anchor.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(crate) fn key(&self) -> &Key {
        &self.token.key
    }

    fn resource(&self) -> String {
        self.key().name.id()
    }

    pub(crate) fn state(&self) -> State {
        self.state.borrow().clone()
    }

    /// Waits until it is not held any more.
    pub(crate) async fn over(&self) -> State {
        let mut state = self.state.subscribe();
        // The sender lives as long as this does.
        let over = state.wait_for(|state| *state != State::Held).await;
        over.map_or(State::Released, |state| state.clone())
    }

    pub(crate) fn lost(&self, reason: String) -> Error {
        let (resource, fencing_token) = (self.resource(), self.token.fencing_token);
        Error::LockLost { resource, fencing_token, reason }
    }

    fn end(&self, how: State) {
        self.state.send_if_modified(|state| {
            let is_first = *state == State::Held;
            if is_first {
                *state = how;
            }
            is_first
        });
    }

    /// Renews the lease until it is lost or the task is ended. `granted` was started before the grant
    /// was sent.
    pub(crate) async fn keep(self: Arc<Self>, granted: Stopwatch) {
        let lease = self.lease().lease;
        // Renewed at a third, it survives two renewals that fail.
        let (pause, again) = (lease / 3, lease / 15);
        let mut held_since = granted;
        let mut wait = pause;
        loop {
            let left = lease.saturating_sub(held_since.elapsed());
            tokio::time::sleep(wait.min(left)).await;
            let left = lease.saturating_sub(held_since.elapsed());
            if left.is_zero() {
                // A machine that slept, or a backend that could not be reached: nobody may have got it,
                // but nothing says so.
                self.end(State::Lost("its lease ended before it was renewed".into()));
                return;
            }
            let started = Stopwatch::start();
            match tokio::time::timeout(left, self.renew()).await {
                Ok(Ok(())) => {
                    held_since = started;
                    wait = pause;
                }
                Ok(Err(Error::LockLost { reason, .. })) => {
                    tracing::warn!(resource = self.resource(), reason, "a lock is lost");
                    self.end(State::Lost(reason));
                    return;
                }
                Ok(Err(error)) => {
                    tracing::warn!(resource = self.resource(), %error, "a lease was not renewed");
                    wait = again;
                }
                Err(_) => wait = Duration::ZERO,
            }
        }
    }

    /// Renews the lease once.
    async fn renew(&self) -> Result<()> {
        let _one_at_a_time = self.busy.lock().await;
        if self.state() == State::Released {
            return Err(self.lost("it was released".into()));
        }
        let deadline = self.records.deadline();
        let mut anchor = self.anchor();
        let mut look = anchor.asked.elapsed() > ANCHOR_HOLDS || self.token.seen().is_none();
        let mut tries = self.records.tries(deadline);
        loop {
            if look {
                anchor = self.look(deadline).await?;
            }
            let now = Now { moment: anchor.now(), wall: self.records.options().clock.now() };
            let lease = self.lease().renewed(&now);
            let write = [(self.key(), lease.clone(), self.token.seen())];
            if let Put::Done(revisions) = self.records.put_leases(&write, &mut tries).await? {
                revisions.first().into_iter().for_each(|revision| self.token.see(*revision));
                self.set_lease(lease);
                return Ok(());
            }
            // Refused, or not answered: an earlier renewal of ours may have arrived.
            look = true;
            if !tries.again(false).await {
                let operation = format!("renewing the lock {}", self.resource());
                return Err(Error::Timeout { operation, after: deadline.limit() });
            }
        }
    }

    /// Looks whether the grant still stands, and reads the clock.
    async fn look(&self, deadline: Deadline) -> Result<Anchor> {
        let asked = Stopwatch::start();
        let keys = [self.key().clone()];
        let (found, moment) = self.records.look_at_leases(&keys, deadline).await?;
        let found = found.into_iter().next().flatten();
        let lease = found.as_ref().map(|found| &found.lease);
        Lease::check(lease, &self.resource(), self.token.fencing_token)?;
        if let Some(found) = found {
            self.token.see(found.revision);
        }
        let anchor = Anchor { moment, asked };
        *self.anchor.lock().unwrap_or_else(PoisonError::into_inner) = anchor.clone();
        Ok(anchor)
    }

    /// Gives the lock back. Once more is harmless.
    ///
    /// # Errors
    /// [`Error::LockLost`] when another has it by now.
    pub(crate) async fn release(&self) -> Result<()> {
        let _one_at_a_time = self.busy.lock().await;
        if self.state() == State::Released {
            return Ok(());
        }
        let deadline = self.records.deadline();
        let mut tries = self.records.tries(deadline);
        loop {
            let lease = self.lease().released();
            let write = [(self.key(), lease, self.token.seen())];
            if self.records.put_leases(&write, &mut tries).await?.is_done() {
                break;
            }
            let keys = [self.key().clone()];
            let (found, _) = self.records.look_at_leases(&keys, deadline).await?;
            match found.into_iter().next().flatten() {
                // Our own release had arrived, and others came after it.
                Some(found) if found.lease.follows_a_release_of(self.token.fencing_token) => {
                    break;
                }
                Some(found) if found.lease.fencing_token != self.token.fencing_token => {
                    let reason = format!("{} has it by now", found.lease.client_id);
                    self.end(State::Lost(reason.clone()));
                    return Err(self.lost(reason));
                }
                Some(found) if found.lease.broken => {
                    let reason = "it was taken away".to_owned();
                    self.end(State::Lost(reason.clone()));
                    return Err(self.lost(reason));
                }
                Some(found) if found.lease.held => self.token.see(found.revision),
                // Our own release had arrived.
                _ => break,
            }
            if !tries.again(false).await {
                let operation = format!("releasing the lock {}", self.resource());
                return Err(Error::Timeout { operation, after: deadline.limit() });
            }
        }
        self.state.send_replace(State::Released);
        Ok(())
    }
}
