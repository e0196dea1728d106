//! Writers of one state within an opened store stand in line instead of colliding, and what waits goes out
//! in one commit.
//!
//! Whoever has the turn plans on the end of the line: the newest head that somebody here has planned,
//! durable or not. Then it hands its change in and gives the turn to the next, so that many changes of
//! one state are planned while one commit is under way, and are committed together by the next one. What
//! was planned on a change that then fails is never sent: it is planned again. Nobody is told of a
//! success before the commit that holds it is durable, and nobody of a conflict with something that is
//! not.
//!
//! The line is a courtesy, not a guard: who waits too long for a turn goes on without one. What keeps
//! updates from being lost is the precondition of every commit.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{OwnedMutexGuard, oneshot, watch};

use crate::backend::Revision;
use crate::chain::Hash;
use crate::error::Error;
use crate::keys::Address;
use crate::patience::{Deadline, LAST_LOOK};
use crate::proposal::{Beside, Proposal, Steps};
use crate::reader::KnownHead;
use crate::records::{Records, version_conflict};
use crate::remembered::rough_size;
use crate::settle::{Identity, Refused};
use crate::transition::{Head, Transition};

/// How long a turn is waited for: a closure that dawdles must not stop all others.
const PATIENCE: Duration = Duration::from_millis(250);
/// Changes in one commit at most, and about how many bytes of them.
const MOST_CHANGES: usize = 128;
const MOST_BYTES: usize = 2 << 20;

/// All lines of a handle, each runtime's by itself: a runtime that nobody drives must stop no other.
#[derive(Debug, Default)]
pub(crate) struct Lines(Mutex<HashMap<Spot, (Arc<Line>, usize)>>);

type Spot = (Option<tokio::runtime::Id>, Address);

/// The line of one state.
#[derive(Debug, Default)]
struct Line {
    turn: Arc<tokio::sync::Mutex<()>>,
    waiting: Mutex<Waiting>,
}

#[derive(Debug, Default)]
struct Waiting {
    entries: VecDeque<Entry>,
    /// The newest head that was planned and is not known to be durable.
    end: Option<Pending>,
    /// The newest head that was made durable from here.
    durable: Option<KnownHead>,
    is_sending: bool,
    /// The end of what is being sent.
    sent_end: Option<Pending>,
    entry_count: u64,
}

/// A head that was planned and handed in.
#[derive(Debug, Clone)]
pub(crate) struct Pending {
    pub(crate) head: Arc<Head>,
    outcome: watch::Receiver<Option<bool>>,
}

impl Pending {
    /// Waits until it is known whether it has become durable; `false` also when the deadline comes first.
    pub(crate) async fn is_durable(&mut self, deadline: Deadline) -> bool {
        let known = self.outcome.wait_for(Option::is_some);
        match tokio::time::timeout(deadline.left(), known).await {
            // Who went away without a word did not say that it is.
            Ok(outcome) => outcome.is_ok_and(|outcome| *outcome == Some(true)),
            Err(_) => false,
        }
    }
}

/// What a change is planned on.
#[derive(Debug, Clone)]
pub(crate) enum Base {
    /// A head as it was read, or none.
    Known(Option<KnownHead>),
    /// The end of the line.
    Pending(Pending),
}

impl Base {
    pub(crate) fn head(&self) -> Option<Arc<Head>> {
        match self {
            Self::Known(known) => known.as_ref().map(|known| Arc::clone(&known.head)),
            Self::Pending(pending) => Some(Arc::clone(&pending.head)),
        }
    }

    pub(crate) fn revision(&self) -> Option<Revision> {
        match self {
            Self::Known(known) => known.as_ref().map(|known| known.revision),
            Self::Pending(_) => None,
        }
    }

    fn hash(&self) -> Option<Hash> {
        self.head().map(|head| head.change.hash)
    }
}

/// The right to plan next.
#[derive(Debug)]
pub(crate) struct Turn(#[allow(dead_code)] OwnedMutexGuard<()>);

/// What is handed in.
#[derive(Debug)]
pub(crate) struct NewEntry {
    pub(crate) steps: Vec<Transition>,
    pub(crate) beside: Beside,
    /// It must not share its commit.
    pub(crate) alone: bool,
    pub(crate) deadline: Deadline,
}

#[derive(Debug)]
struct Entry {
    number: u64,
    new: NewEntry,
    first: Identity,
    /// Where it leaves the state.
    end: Pending,
    outcome: watch::Sender<Option<bool>>,
    answer: oneshot::Sender<Result<(), Refused>>,
}

impl Entry {
    fn bytes(&self) -> usize {
        self.new.steps.iter().map(|step| 1_024 + rough_size(&step.head.change.data)).sum()
    }

    fn answer(self, answer: Result<(), Refused>) {
        let _ = self.outcome.send(Some(answer.is_ok()));
        // Who asked may have gone away; what was asked for is done all the same.
        let _ = self.answer.send(answer);
    }
}

/// What becomes of an entry.
pub(crate) struct Receipt {
    answer: oneshot::Receiver<Result<(), Refused>>,
    place: Place,
    number: u64,
    deadline: Deadline,
    /// For an answer that does not come.
    first: Option<Identity>,
}

/// A place at a line. The line is forgotten when nobody is at it any more.
#[derive(Debug)]
pub(crate) struct Place {
    lines: Arc<Lines>,
    spot: Spot,
    line: Arc<Line>,
}

impl Lines {
    /// Goes to the line of a state.
    pub(crate) fn join(self: &Arc<Self>, address: &Address) -> Place {
        let runtime = tokio::runtime::Handle::try_current().map(|handle| handle.id());
        self.join_at((runtime.ok(), address.clone()))
    }

    fn join_at(self: &Arc<Self>, spot: Spot) -> Place {
        let mut lines = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let (line, users) = lines.entry(spot.clone()).or_default();
        *users += 1;
        Place { lines: Arc::clone(self), spot, line: Arc::clone(line) }
    }
}

impl Clone for Place {
    fn clone(&self) -> Self {
        self.lines.join_at(self.spot.clone())
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut lines = self.lines.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, users)) = lines.get_mut(&self.spot) {
            *users = users.saturating_sub(1);
            if *users == 0 {
                lines.remove(&self.spot);
            }
        }
    }
}

impl Place {
    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        self.line.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for the turn, first come, first served; `None` when it takes too long.
    pub(crate) async fn turn(&self) -> Option<Turn> {
        self.turn_within(PATIENCE).await
    }

    pub(crate) async fn turn_within(&self, patience: Duration) -> Option<Turn> {
        if let Some(turn) = self.turn_now() {
            return Some(turn);
        }
        let turn = Arc::clone(&self.line.turn).lock_owned();
        tokio::time::timeout(patience, turn).await.ok().map(Turn)
    }

    /// The turn, if nobody has it or waits for it.
    pub(crate) fn turn_now(&self) -> Option<Turn> {
        Arc::clone(&self.line.turn).try_lock_owned().ok().map(Turn)
    }

    /// The end of the line; `None` when nothing is under way.
    pub(crate) fn end(&self) -> Option<Pending> {
        self.waiting().end.clone()
    }

    /// Takes what is to be sent next: one that must be alone, or as many as fit.
    fn take_batch(&self) -> Vec<Entry> {
        let mut waiting = self.waiting();
        let mut batch: Vec<Entry> = Vec::new();
        let (mut changes, mut bytes) = (0, 0);
        while let Some(entry) = waiting.entries.front() {
            let is_first = batch.is_empty();
            let stays_alone = entry.new.alone || batch.iter().any(|entry| entry.new.alone);
            changes += entry.new.steps.len();
            bytes += entry.bytes();
            if !is_first && (stays_alone || changes > MOST_CHANGES || bytes > MOST_BYTES) {
                break;
            }
            batch.extend(waiting.entries.pop_front());
        }
        waiting.sent_end = batch.last().map(|entry| entry.end.clone());
        batch
    }

    /// Notes what has become durable; whether more waits to be sent.
    fn goes_on(&self, durable: &KnownHead) -> bool {
        let mut waiting = self.waiting();
        waiting.durable = Some(durable.clone());
        waiting.is_sending = !waiting.entries.is_empty();
        if !waiting.is_sending {
            waiting.end = None;
            waiting.sent_end = None;
        }
        waiting.is_sending
    }

    /// Gives up what was planned on something that did not become durable.
    fn discard(&self) {
        let mut waiting = self.waiting();
        waiting.end = None;
        waiting.sent_end = None;
        waiting.durable = None;
        waiting.is_sending = false;
        let entries = std::mem::take(&mut waiting.entries);
        drop(waiting);
        entries.into_iter().for_each(|entry| stale(entry, false));
    }

    /// Takes back an entry that was not sent, and all that was planned on it.
    fn withdraw(&self, number: u64) -> bool {
        let mut waiting = self.waiting();
        let Some(at) = waiting.entries.iter().position(|entry| entry.number == number) else {
            return false;
        };
        let mut withdrawn = waiting.entries.split_off(at);
        let end = waiting.entries.back().map(|entry| entry.end.clone());
        waiting.end = end.or_else(|| waiting.sent_end.clone());
        drop(waiting);
        withdrawn.pop_front();
        withdrawn.into_iter().for_each(|entry| stale(entry, false));
        true
    }
}

/// It was not sent, since what it was planned on is not there: to be planned again.
fn stale(entry: Entry, alone: bool) {
    let before = entry.first.version.saturating_sub(1);
    let error = version_conflict(&entry.first.address, before, before);
    entry.answer(Err(Refused { stale: true, alone, ..Refused::from(error) }));
}

impl Receipt {
    /// Waits for the outcome. May be dropped: what was handed in happens all the same, or not at all.
    pub(crate) async fn settled(mut self) -> Result<(), Refused> {
        let patience = self.deadline.left().saturating_add(LAST_LOOK + LAST_LOOK / 2);
        let Ok(answer) = tokio::time::timeout(patience, &mut self.answer).await else {
            if self.place.withdraw(self.number) {
                let operation = format!("changing {}", self.place.spot.1);
                return Err(Error::Timeout { operation, after: self.deadline.limit() }.into());
            }
            return Err(self.lost("no answer before the deadline").into());
        };
        answer.unwrap_or_else(|_| Err(self.lost("the runtime is shutting down").into()))
    }

    fn lost(&self, reason: &str) -> Error {
        let source = Error::Firestore { message: reason.to_owned(), source: None };
        match &self.first {
            Some(first) => first.unknown(source),
            None => source,
        }
    }
}

/// Whoever sends says so when it ends before its time, as when the runtime shuts down.
struct Sending {
    place: Place,
    has_ended: bool,
}

impl Drop for Sending {
    fn drop(&mut self) {
        if !self.has_ended {
            self.place.discard();
        }
    }
}

impl Records {
    /// Hands in changes of one state that were planned on this base.
    pub(crate) fn submit(self: &Arc<Self>, place: &Place, base: Base, new: NewEntry) -> Receipt {
        let (answer, answered) = oneshot::channel();
        let mut receipt = Receipt {
            answer: answered,
            place: place.clone(),
            number: 0,
            deadline: new.deadline,
            first: None,
        };
        let is_at_home = new.steps.iter().all(|step| step.head.change.address == place.spot.1);
        let (Some(first), Some(last), true) = (new.steps.first(), new.steps.last(), is_at_home)
        else {
            let error = Error::refused(place.spot.1.to_string(), "a change of another state came");
            let _ = answer.send(Err(error.into()));
            return receipt;
        };
        let first = Identity::of(&first.head.change);
        receipt.first = Some(first.clone());
        let outcome = watch::Sender::new(None);
        let end = Pending { head: Arc::new(last.head.clone()), outcome: outcome.subscribe() };
        let mut waiting = place.waiting();
        waiting.entry_count += 1;
        let number = waiting.entry_count;
        receipt.number = number;
        let entry = Entry { number, new, first, end, outcome, answer };
        let fits = match (&waiting.end, &base) {
            (Some(end), base) => base.hash() == Some(end.head.change.hash),
            (None, Base::Known(_)) => true,
            // It has become durable meanwhile.
            (None, Base::Pending(_)) => {
                let durable = waiting.durable.as_ref();
                durable.is_some_and(|known| Some(known.head.change.hash) == base.hash())
            }
        };
        if !fits {
            let planned_on = base.head().map_or(0, |head| head.version());
            // What is durable is a conflict; what is not says nothing.
            let durable = waiting.durable.as_ref().map(|known| known.head.version());
            let newer = durable.filter(|durable| *durable > planned_on);
            drop(waiting);
            let error = version_conflict(&place.spot.1, planned_on, newer.unwrap_or(planned_on));
            entry.answer(Err(Refused { stale: newer.is_none(), ..Refused::from(error) }));
            return receipt;
        }
        waiting.end = Some(entry.end.clone());
        waiting.entries.push_back(entry);
        if !waiting.is_sending {
            waiting.is_sending = true;
            let base = match base {
                Base::Known(known) => known,
                Base::Pending(_) => waiting.durable.clone(),
            };
            drop(waiting);
            // A runtime that is shutting down drops the task, and with it what says so.
            let sending = Sending { place: place.clone(), has_ended: false };
            tokio::spawn(send_all(Arc::clone(self), sending, base));
        }
        receipt
    }
}

/// Sends what is handed in at a line, commit after commit, until nothing waits.
async fn send_all(records: Arc<Records>, mut sending: Sending, mut base: Option<KnownHead>) {
    let mut records = Some(records);
    while let Some(held) = &records {
        let mut batch = sending.place.take_batch();
        let Some(deadline) = batch.iter().map(|entry| entry.new.deadline).max_by_key(|d| d.left())
        else {
            // What waited was taken back.
            return;
        };
        let transitions: Vec<Transition> =
            batch.iter_mut().flat_map(|entry| std::mem::take(&mut entry.new.steps)).collect();
        let last = batch.last().map(|entry| Arc::clone(&entry.end.head));
        let beside = match batch.as_mut_slice() {
            [only] => std::mem::take(&mut only.new.beside),
            _ => Beside::default(),
        };
        let changes = transitions.len();
        let groups = [Steps { base: base.take(), transitions }];
        let proposal = Proposal { groups: &groups, guards: &[], beside: &beside };
        let refused = match held.try_commit(proposal, deadline).await {
            Ok(newest) => {
                metrics::histogram!("tai_state_commit_changes").record(changes as f64);
                let newest = newest.into_iter().next().flatten();
                // Others may have gone on from there already, or cleaned up: what waits was planned on the
                // whole head, with its notes.
                base = newest.filter(|known| Some(&known.head) == last.as_ref());
                None
            }
            Err(refused) => Some(refused),
        };
        // First what comes next: who plans again must not plan on this.
        sending.has_ended = match &base {
            Some(newest) => !sending.place.goes_on(newest),
            None => {
                sending.place.discard();
                true
            }
        };
        // Whoever is answered may close the store: then nobody else must hold it.
        if sending.has_ended {
            records = None;
        }
        match refused {
            Some(refused) => refuse(batch, refused),
            None => batch.into_iter().for_each(|entry| entry.answer(Ok(()))),
        }
    }
}

/// Tells each of a batch what became of the commit.
fn refuse(batch: Vec<Entry>, refused: Refused) {
    let is_shared = batch.len() > 1;
    if !is_shared {
        if let Some(entry) = batch.into_iter().next() {
            entry.answer(Err(refused));
        }
        return;
    }
    for entry in batch {
        let first = &entry.first;
        let error = match &refused.error {
            Error::VersionConflict { actual, .. } => {
                version_conflict(&first.address, first.version - 1, *actual)
            }
            Error::OutcomeUnknown { source, .. } => {
                let reason = source.as_ref().map_or_else(String::new, ToString::to_string);
                first.unknown(Error::Firestore { message: reason, source: None })
            }
            // It was surely not applied, and may be later.
            Error::Timeout { operation, after } => {
                Error::Timeout { operation: operation.clone(), after: *after }
            }
            Error::Firestore { message, .. } => {
                Error::Firestore { message: message.clone(), source: None }
            }
            // It may be the fault of another in the same commit.
            _ => {
                stale(entry, true);
                continue;
            }
        };
        let heads = refused.heads.clone();
        entry.answer(Err(Refused { heads, ..Refused::from(error) }));
    }
}
