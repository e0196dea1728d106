//! The past of a whole governor: all its states at one time, and all its events in the order of time.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};

use chrono::{DateTime, Utc};
use tokio::task::JoinSet;

use crate::chain::{Change, format_time};
use crate::error::{Error, Result};
use crate::event::Event;
use crate::history::trimmed;
use crate::keys::{Address, Name};
use crate::patience::stopped;
use crate::records::KnownHead;
use crate::store::{StateRecord, StateStore};

/// States, or events, of one page.
const PAGE: usize = 256;
/// Questions that are asked at the same time where each is a round trip.
const AT_ONCE: usize = 16;
/// Events that are read ahead, of all states together and of one of them.
const READ_AHEAD: usize = 4_096;

/// All states of a governor at one time, page by page or one by one.
#[derive(Debug)]
pub struct ConsistentCut {
    store: StateStore,
    governor: Name,
    time: DateTime<Utc>,
    after: Option<Option<Name>>,
    /// What was read and not given out yet.
    ready: VecDeque<StateRecord>,
}

/// All events of a governor in the order of their times, page by page or one by one.
#[derive(Debug)]
pub struct Timeline {
    store: StateStore,
    tracks: Vec<Track>,
    /// The next event of each state that has one.
    next: BinaryHeap<Reverse<(DateTime<Utc>, String, usize)>>,
    ahead: usize,
    /// What was taken and not given out yet: a call that is given up or fails loses nothing.
    ready: Vec<Event>,
    /// A page that is given out one by one.
    given: VecDeque<Event>,
}

/// What is still to come of one state.
#[derive(Debug)]
struct Track {
    address: Address,
    next: u64,
    last: u64,
    before: Option<Change>,
    read: VecDeque<Change>,
}

impl StateStore {
    /// All states of a governor as they were at one time: each with its newest version that is not later.
    ///
    /// Times are those of the writers' clocks. What a transaction changed has one time, so a cut shows it
    /// whole or not at all, as long as no state's time had to be held back by a later one before it.
    /// A time that has just passed may still get changes, from writers whose clocks are behind, or whose
    /// commit is under way.
    ///
    /// # Errors
    /// [`Error::InvalidState`] for a time that has not come yet.
    pub fn consistent_cut(
        &self,
        governor: impl AsRef<str>,
        time: DateTime<Utc>,
    ) -> Result<ConsistentCut> {
        let governor = Name::escape(governor.as_ref(), "governor id")?;
        if time > self.records.options().clock.now() {
            let subject = format!("the states of {governor} at {}", format_time(&time));
            return Err(Error::refused(subject, "that time has not come yet"));
        }
        Ok(ConsistentCut {
            store: self.clone(),
            governor,
            time,
            after: Some(None),
            ready: VecDeque::new(),
        })
    }

    /// All events of a governor's states in the order of their times, from one time to another, both
    /// included; of equal times in the order of the states' ids and versions. Without `since` from where
    /// the history of each state begins.
    ///
    /// An event is in memory for each state that has one to come, and the state before it.
    ///
    /// # Errors
    /// [`Error::HistoryTrimmed`] when what is kept of a state begins later than `since`.
    pub async fn timeline(
        &self,
        governor: impl AsRef<str>,
        since: Option<DateTime<Utc>>,
        until: Option<DateTime<Utc>>,
    ) -> Result<Timeline> {
        let governor = Name::escape(governor.as_ref(), "governor id")?;
        let mut tracks = Vec::new();
        let mut after = Some(None);
        while let Some(from) = after.take() {
            let (page, next) = self.records.reader().states(&governor, from, PAGE).await?;
            after = next.map(Some);
            let concerned = page.into_iter().filter(|(_, known)| {
                since.is_none_or(|since| known.head.change.timestamp >= since)
            });
            let store = self.clone();
            let found = self
                .ask(concerned, move |(address, known)| {
                    let store = store.clone();
                    async move { store.track(address, &known, since, until).await }
                })
                .await?;
            tracks.extend(found.into_iter().flatten());
        }
        let ahead = (READ_AHEAD / tracks.len().max(1)).clamp(1, PAGE);
        let mut timeline = Timeline {
            store: self.clone(),
            tracks,
            next: BinaryHeap::new(),
            ahead,
            ready: Vec::new(),
            given: VecDeque::new(),
        };
        timeline.begin().await?;
        Ok(timeline)
    }

    async fn track(
        &self,
        address: Address,
        known: &KnownHead,
        since: Option<DateTime<Utc>>,
        until: Option<DateTime<Utc>>,
    ) -> Result<Option<Track>> {
        let (next, last) = self.versions_between(&address, known, since, until).await?;
        if next > last {
            return Ok(None);
        }
        let before = if next > known.head.first_version {
            Some(self.change_at(&address, known, next - 1).await?)
        } else {
            None
        };
        Ok(Some(Track { address, next, last, before, read: VecDeque::new() }))
    }

    /// Asks something of each, several at once where each is a round trip; answers in the order asked.
    async fn ask<T, A, Answer>(
        &self,
        of: impl IntoIterator<Item = T>,
        question: impl Fn(T) -> Answer,
    ) -> Result<Vec<A>>
    where
        A: Send + 'static,
        Answer: Future<Output = Result<A>> + Send + 'static,
    {
        let at_once = if self.records.reads_are_cheap() { 1 } else { AT_ONCE };
        let mut answers: Vec<(usize, A)> = Vec::new();
        let mut asked = JoinSet::new();
        for (number, item) in of.into_iter().enumerate() {
            while asked.len() >= at_once {
                take(&mut asked, &mut answers).await?;
            }
            let answer = question(item);
            asked.spawn(async move { answer.await.map(|answer| (number, answer)) });
        }
        while !asked.is_empty() {
            take(&mut asked, &mut answers).await?;
        }
        answers.sort_unstable_by_key(|(number, _)| *number);
        Ok(answers.into_iter().map(|(_, answer)| answer).collect())
    }
}

async fn take<A: 'static>(
    asked: &mut JoinSet<Result<(usize, A)>>,
    answers: &mut Vec<(usize, A)>,
) -> Result<()> {
    if let Some(answer) = asked.join_next().await {
        answers.push(answer.map_err(stopped)??);
    }
    Ok(())
}

impl ConsistentCut {
    /// The next states that existed then, by id; empty at the end.
    ///
    /// # Errors
    /// [`Error::HistoryTrimmed`] when what is kept of one of them begins later; what reading meets.
    pub async fn next_page(&mut self) -> Result<Vec<StateRecord>> {
        if !self.ready.is_empty() {
            return Ok(std::mem::take(&mut self.ready).into());
        }
        while let Some(from) = self.after.clone() {
            let reader = self.store.records.reader();
            let (page, next) = reader.states(&self.governor, from, PAGE).await?;
            let (store, time) = (self.store.clone(), self.time);
            let found = self
                .store
                .ask(page, move |(address, known)| {
                    let store = store.clone();
                    async move { store.then(&address, &known, time).await }
                })
                .await?;
            self.after = next.map(Some);
            let existing: Vec<StateRecord> = found.into_iter().flatten().collect();
            if !existing.is_empty() {
                return Ok(existing);
            }
        }
        Ok(Vec::new())
    }
}

impl ConsistentCut {
    /// The next state that existed then; `None` at the end.
    ///
    /// # Errors
    /// As [`next_page`](ConsistentCut::next_page).
    pub async fn next(&mut self) -> Result<Option<StateRecord>> {
        if self.ready.is_empty() {
            self.ready = self.next_page().await?.into();
        }
        Ok(self.ready.pop_front())
    }
}

impl StateStore {
    async fn then(
        &self,
        address: &Address,
        known: &KnownHead,
        time: DateTime<Utc>,
    ) -> Result<Option<StateRecord>> {
        let first = known.head.first_version;
        match self.newest_until(address, known, time).await? {
            Some(change) if change.deleted => Ok(None),
            Some(change) => Ok(Some(StateRecord::new(&change, first))),
            None if first > 1 => Err(trimmed(address, known, &format_time(&time))),
            None => Ok(None),
        }
    }
}

impl Timeline {
    async fn begin(&mut self) -> Result<()> {
        let (store, ahead) = (self.store.clone(), self.ahead);
        let places =
            self.tracks.iter().map(|track| (track.address.clone(), track.next, track.last));
        let places: Vec<_> = places.collect();
        let read = self
            .store
            .ask(places, move |(address, from, to)| {
                let store = store.clone();
                async move { store.events_of(&address, from, to, ahead).await }
            })
            .await?;
        for (index, changes) in read.into_iter().enumerate() {
            self.fill(index, changes);
        }
        Ok(())
    }

    fn fill(&mut self, index: usize, changes: Vec<Change>) {
        let Some(track) = self.tracks.get_mut(index) else { return };
        track.next += changes.len() as u64;
        track.read = changes.into();
        if let Some(first) = track.read.front() {
            self.next.push(Reverse((first.timestamp, order(first), index)));
        }
    }

    /// The next event, the oldest first; `None` at the end.
    ///
    /// # Errors
    /// As [`next_page`](Timeline::next_page).
    pub async fn next(&mut self) -> Result<Option<Event>> {
        if self.given.is_empty() {
            self.given = self.next_page().await?.into();
        }
        Ok(self.given.pop_front())
    }

    /// The next events, the oldest first; empty at the end.
    ///
    /// # Errors
    /// What reading meets; [`Error::Corrupt`] for a gap.
    pub async fn next_page(&mut self) -> Result<Vec<Event>> {
        if !self.given.is_empty() {
            return Ok(std::mem::take(&mut self.given).into());
        }
        while self.ready.len() < PAGE {
            let Some(Reverse((_, _, index))) = self.next.peek() else { break };
            let index = *index;
            let Some(track) = self.tracks.get_mut(index) else { break };
            let refill = if track.read.len() == 1 && track.next <= track.last {
                let (from, to) = (track.next, track.last);
                Some(self.store.events_of(&track.address, from, to, self.ahead).await?)
            } else {
                None
            };
            let Some(change) = track.read.pop_front() else { break };
            self.next.pop();
            self.ready.push(change.event(track.before.as_ref()));
            track.before = Some(change);
            match (refill, track.read.front()) {
                (Some(changes), _) => self.fill(index, changes),
                (None, Some(first)) => {
                    self.next.push(Reverse((first.timestamp, order(first), index)));
                }
                (None, None) => track.before = None,
            }
        }
        Ok(std::mem::take(&mut self.ready))
    }
}

/// The order of events of one time, the same on every engine.
fn order(change: &Change) -> String {
    format!("{}~{:020}", change.address.state, change.version)
}

impl StateStore {
    /// The first events of a range, without a gap.
    async fn events_of(
        &self,
        address: &Address,
        from: u64,
        to: u64,
        limit: usize,
    ) -> Result<Vec<Change>> {
        let changes = self.records.reader().changes(address, from, to, limit).await?;
        let is_whole =
            changes.iter().zip(from..).all(|(change, version)| change.version == version);
        if changes.is_empty() || !is_whole {
            self.refuse_trimmed(address, from).await?;
            return Err(crate::history::missing(address, from));
        }
        Ok(changes)
    }
}
