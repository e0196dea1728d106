//! Proves a whole store, or one governor: every head, every event, every saved snapshot, and the chain
//! that binds them.

mod log;
mod report;

use std::io::Write;

use crate::backend::{Kind, Revision};
use crate::chain::{Change, Hasher};
use crate::error::{Error, Result};
use crate::export::ContentHash;
use crate::keys::{Address, Name};
use crate::reader::known;
use crate::records::KnownHead;
use crate::schema;
use crate::store::StateStore;
use crate::transition::Head;
use log::Log;

pub use report::{ConsistencyReport, Problem, Rule, VerifyReport};

/// Events in memory at once.
const PAGE: usize = 1_000;
/// Problems that are named; more are only counted by the last of them.
const MOST_PROBLEMS: usize = 1_000;
/// How often it is waited for what others have committed to be seen.
const LOOKS: u32 = 5;
/// How often a state is looked at anew when a clean-up came in between: clean-ups without a pause overtake every
/// fifth look or so.
const MOST_LOOKS: u32 = 50;
/// How often in a row the counts must differ in the same way.
const LOOKS_AT_COUNTS: u32 = 3;

/// How many events, and saved snapshots, are stored and reached.
type Strays = ((u64, u64), (u64, u64));

#[derive(Clone)]
struct Proof {
    content: ContentHash,
    /// Which heads were proved, at which revision each.
    heads: Hasher,
    states: u64,
    events: u64,
    snapshots: u64,
    leftovers: u64,
    problems: Vec<Problem>,
}

impl Proof {
    fn new() -> Self {
        let (content, heads, problems) = (ContentHash::default(), Hasher::default(), Vec::new());
        Self { content, heads, states: 0, events: 0, snapshots: 0, leftovers: 0, problems }
    }

    fn problem(
        &mut self,
        rule: Rule,
        place: impl ToString,
        version: Option<u64>,
        reason: impl Into<String>,
    ) {
        let (place, mut reason) = (place.to_string(), reason.into());
        match self.problems.len() {
            MOST_PROBLEMS => reason = "and more".to_owned(),
            more if more > MOST_PROBLEMS => return,
            _ => {}
        }
        self.problems.push(Problem { rule, place, version, reason });
    }

    /// Damage is a finding; anything else ends the proof.
    fn note(&mut self, error: Error) -> Result<()> {
        match error {
            Error::Corrupt { location, reason } => {
                self.problem(Rule::Readable, location, None, reason);
            }
            Error::NewerFormat { ref location, .. } => {
                let location = location.clone();
                self.problem(Rule::Readable, location, None, error.to_string());
            }
            error => return Err(error),
        }
        Ok(())
    }
}

fn is_damage(error: &Error) -> bool {
    matches!(error, Error::Corrupt { .. } | Error::NewerFormat { .. })
}

impl StateStore {
    /// Reads and proves everything: the hash and the chain of every event, every head against its
    /// log, every saved snapshot against the event at its version, that no document stands beside
    /// a log, that locks and kept answers can be read, and the engine's own structure. Writers may go
    /// on meanwhile; what they add after a state was read is not looked at.
    ///
    /// # Errors
    /// Only what keeps it from looking (permissions, an unreachable service): damage is reported,
    /// not returned as an error.
    pub async fn verify(&self, mut progress: impl FnMut(u64) + Send) -> Result<VerifyReport> {
        let mut proof = self.prove(None, &mut progress).await?;
        match self.records.check_structure().await {
            Ok(found) => found
                .into_iter()
                .for_each(|what| proof.problem(Rule::Structure, self.location(), None, what)),
            Err(error) => proof.note(error)?,
        }
        let Proof { content, heads: _, states, events, snapshots, leftovers, problems } = proof;
        let (ok, problems) = (problems.is_empty(), problems.iter().map(ToString::to_string));
        let (problems, content_hash) = (problems.collect(), content.finish());
        Ok(VerifyReport { ok, states, events, snapshots, leftovers, problems, content_hash })
    }

    /// As [`verify`](StateStore::verify) for the states of one governor, with every rule that is broken.
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")] async fn main() -> tai_state::Result<()> {
    /// # use tai_state::*;
    /// # let store = StateStore::in_memory();
    /// let report = store.validate_consistency("orders").await?;
    /// assert!(report.ok, "{:?}", report.problems);
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    /// As [`verify`](StateStore::verify).
    pub async fn validate_consistency(
        &self,
        governor: impl AsRef<str>,
    ) -> Result<ConsistencyReport> {
        let name = Name::escape(governor.as_ref(), "governor id")?;
        let proof = self.prove(Some(&name), &mut |_| {}).await?;
        let Proof { states, events, snapshots, leftovers, problems, .. } = proof;
        let (governor_id, ok) = (name.id(), problems.is_empty());
        Ok(ConsistencyReport { governor_id, ok, states, events, snapshots, leftovers, problems })
    }

    /// As [`validate_consistency`](StateStore::validate_consistency) for one state. Documents that
    /// stand beside its log are not looked for.
    ///
    /// # Errors
    /// [`Error::StateNotFound`] when it never existed; as [`verify`](StateStore::verify).
    pub async fn validate_state(
        &self,
        governor: impl AsRef<str>,
        state: impl AsRef<str>,
    ) -> Result<ConsistencyReport> {
        let address = Address::new(governor.as_ref(), state.as_ref())?;
        let mut proof = Proof::new();
        if let Err(error) = self.verify_address(&address, &mut proof).await {
            proof.note(error)?;
        }
        if proof.states == 0 {
            return Err(crate::store::not_found(&address, String::new()));
        }
        let Proof { states, events, snapshots, leftovers, problems, .. } = proof;
        let (governor_id, ok) = (address.governor.id(), problems.is_empty());
        Ok(ConsistencyReport { governor_id, ok, states, events, snapshots, leftovers, problems })
    }

    async fn prove(
        &self,
        governor: Option<&Name>,
        progress: &mut (dyn FnMut(u64) + Send),
    ) -> Result<Proof> {
        let mut looks = 1;
        let (mut proof, mut strays) = self.prove_once(governor, progress).await?;
        // While others write and clean up, what was counted before and after may agree by chance; what
        // really stands beside the logs is there again each time.
        while looks < LOOKS_AT_COUNTS && strays.is_some() && proof.problems.is_empty() {
            let again = self.prove_once(governor, progress).await?;
            let is_same = again.1 == strays;
            (proof, strays) = again;
            looks = if is_same { looks + 1 } else { 1 };
        }
        if let Some(strays) = strays {
            let place = governor.map_or_else(|| self.location().to_owned(), Name::id);
            for (kind, (stored, reached)) in [("events", strays.0), ("saved snapshots", strays.1)] {
                if stored != reached {
                    let what = format!("{stored} {kind} are stored, the heads lead to {reached}");
                    proof.problem(Rule::NoStrays, &place, None, what);
                }
            }
        }
        Ok(proof)
    }

    /// Proves all that the heads lead to; and how many events and saved snapshots are stored and reached,
    /// if those differ.
    async fn prove_once(
        &self,
        governor: Option<&Name>,
        progress: &mut (dyn FnMut(u64) + Send),
    ) -> Result<(Proof, Option<Strays>)> {
        let mut proof = Proof::new();
        // Damage is a finding; whatever else keeps it from counting keeps it from all.
        let before = match self.counts(governor).await {
            Err(error) if !is_damage(&error) => return Err(error),
            counted => counted,
        };
        let proved = match governor {
            Some(governor) => self.verify_governor(governor, &mut proof, progress).await,
            None => self.verify_governors(&mut proof, progress).await,
        };
        if let Err(error) = proved {
            proof.note(error)?;
        }
        let after = self.counts(governor).await;
        let mut strays = None;
        match (before, after) {
            // While others write, the counts say nothing, also when they agree: as much may come as goes.
            (Ok(before), Ok(after)) if before == after && proof.problems.is_empty() => {
                let reached = (proof.events + proof.leftovers, proof.snapshots);
                if before != reached && self.is_still(governor, &proof).await? {
                    strays = Some(((before.0, reached.0), (before.1, reached.1)));
                }
            }
            (Err(error), _) | (_, Err(error)) => proof.note(error)?,
            _ => {}
        }
        Ok((proof, strays))
    }

    /// Whether every head still stands as it was proved.
    async fn is_still(&self, governor: Option<&Name>, proof: &Proof) -> Result<bool> {
        let governor = governor.map(Name::id);
        let mut walk = self.walk(governor.as_deref())?;
        let mut heads = Hasher::default();
        loop {
            match walk.next_page().await {
                Ok(Some(page)) => {
                    page.iter().for_each(|(at, known)| note_head(&mut heads, at, known.revision));
                }
                Ok(None) => return Ok(heads.finish() == proof.heads.clone().finish()),
                Err(error) if is_damage(&error) => return Ok(false),
                Err(error) => return Err(error),
            }
        }
    }

    async fn counts(&self, governor: Option<&Name>) -> Result<(u64, u64)> {
        let reader = self.records.reader();
        let events = reader.count(governor, Kind::Events).await?;
        Ok((events, reader.count(governor, Kind::Snapshots).await?))
    }

    async fn verify_governors(
        &self,
        proof: &mut Proof,
        progress: &mut (dyn FnMut(u64) + Send),
    ) -> Result<()> {
        let mut after = None;
        loop {
            let governors = self.records.reader().governors(after.as_ref(), 100).await?;
            for governor in &governors {
                if let Err(error) = self.verify_governor(governor, proof, progress).await {
                    proof.note(error)?;
                }
                for kind in [Kind::Locks, Kind::Commands] {
                    if let Err(error) = self.verify_beside(governor, kind, proof).await {
                        proof.note(error)?;
                    }
                }
            }
            match governors.into_iter().next_back() {
                Some(last) => after = Some(last),
                None => return Ok(()),
            }
        }
    }

    async fn verify_governor(
        &self,
        governor: &Name,
        proof: &mut Proof,
        progress: &mut (dyn FnMut(u64) + Send),
    ) -> Result<()> {
        let reader = self.records.reader();
        let mut after: Option<Name> = None;
        loop {
            let addresses = reader.state_names(governor, after.as_ref(), 256).await?;
            let Some(last) = addresses.last() else { return Ok(()) };
            after = Some(last.state.clone());
            for address in &addresses {
                if let Err(error) = self.verify_address(address, proof).await {
                    proof.note(error)?;
                }
                progress(proof.events);
            }
        }
    }

    /// Reads the locks of a governor, or its kept answers: they are in no log, so that they can be read is all
    /// that can be said.
    async fn verify_beside(&self, governor: &Name, kind: Kind, proof: &mut Proof) -> Result<()> {
        let mut all = self.records.reader().all(governor, kind);
        while let Some(documents) = all.next_page().await? {
            for document in &documents {
                let read = match kind {
                    Kind::Locks => schema::read_lease(document).map(drop),
                    _ => schema::read_command(document).map(drop),
                };
                if let Err(error) = read {
                    proof.note(error)?;
                }
            }
        }
        Ok(())
    }

    /// Proves one state; anew when a clean-up came in between.
    async fn verify_address(&self, address: &Address, proof: &mut Proof) -> Result<()> {
        let mut looks = 0;
        loop {
            let found = match self.find(address).await? {
                Ok(Some(found)) => found,
                // Purged since it was listed.
                Ok(None) => return Ok(()),
                Err(reason) => {
                    proof.states += 1;
                    proof.problem(Rule::Readable, format!("the head of {address}"), None, reason);
                    return Ok(());
                }
            };
            let before = proof.clone();
            proof.states += 1;
            note_head(&mut proof.heads, address, found.revision);
            let proved = self.verify_state(address, &found, proof).await;
            let is_clean = proved.is_ok() && proof.problems.len() == before.problems.len();
            looks += 1;
            if is_clean || looks >= MOST_LOOKS {
                return proved;
            }
            match self.find(address).await? {
                Ok(Some(newer)) if notes(&newer.head) != notes(&found.head) => *proof = before,
                _ => return proved,
            }
        }
    }

    async fn find(&self, address: &Address) -> Result<Result<Option<KnownHead>, String>> {
        let found = match self.records.reader().get(&[address.head()]).await {
            Ok(found) => found.into_iter().next().flatten(),
            Err(Error::Corrupt { reason, .. }) => return Ok(Err(reason)),
            Err(error) => return Err(error),
        };
        match found.map(|document| known(address, &document)).transpose() {
            Ok(head) => Ok(Ok(head)),
            Err(Error::Corrupt { reason, .. }) => Ok(Err(reason)),
            Err(error) => Err(error),
        }
    }

    async fn verify_state(
        &self,
        address: &Address,
        known: &KnownHead,
        proof: &mut Proof,
    ) -> Result<()> {
        let head = known.head.as_ref();
        let saved = self.saved(address, head, proof).await?;
        proof.leftovers += self.leftovers(address, head).await?;
        let mut log = Log { address, head, saved: saved.into_iter().peekable(), link: None };
        let mut next = Some(head.first_version);
        while let Some(from) = next {
            let reader = self.records.reader();
            let page = reader.versions(address, Kind::Events, from, u64::MAX, PAGE).await;
            let (documents, after) = match page {
                Ok(page) => page,
                Err(error) if is_damage(&error) => {
                    // One damaged row spoils the page: go on one by one.
                    let to = from.saturating_add(PAGE as u64 - 1).min(head.version());
                    for version in from..=to {
                        match reader.get(&[address.event(version)]).await {
                            Ok(found) => found.iter().flatten().for_each(|d| log.take(d, proof)),
                            Err(error) if is_damage(&error) => {
                                log.unreadable(version, &error, proof);
                            }
                            Err(error) => return Err(error),
                        }
                    }
                    next = (to < head.version()).then_some(to + 1);
                    continue;
                }
                Err(error) => return Err(error),
            };
            documents.iter().for_each(|document| log.take(document, proof));
            next = after;
        }
        log.finish(proof);
        if log.next() > head.version() + 1 {
            // As a rule somebody has written in between.
            let mut is_same = true;
            for look in 0..LOOKS {
                let newest = self.find(address).await?.ok().flatten();
                is_same = newest.is_some_and(|newest| newest.revision == known.revision);
                if !is_same {
                    break;
                }
                self.wait(look).await;
            }
            if is_same {
                let newest = log.next() - 1;
                let reason = format!("it is older than its log, which ends with v{newest}");
                let place = format!("the head of {address}");
                proof.problem(Rule::HeadIsNewest, place, Some(head.version()), reason);
            }
        }
        Ok(())
    }

    /// The saved snapshots that can be read, ascending.
    async fn saved(
        &self,
        address: &Address,
        head: &Head,
        proof: &mut Proof,
    ) -> Result<Vec<Change>> {
        let mut saved = Vec::new();
        for version in &head.snapshot_versions {
            let place = || format!("the saved snapshot {address}");
            match self.records.reader().saved(address, *version).await {
                Ok(Some((snapshot, kept_since))) => {
                    proof.snapshots += 1;
                    // A clean-up may be seen here before it is seen in the head.
                    if head.is_disputed_by(*version, kept_since)
                        && !self.becomes(address, |newest| notes(newest) != notes(head)).await?
                    {
                        let first = head.first_version;
                        let reason = format!(
                            "it says that history is kept since v{kept_since}, the head says v{first}"
                        );
                        proof.problem(Rule::CutIsVouched, place(), Some(*version), reason);
                    }
                    saved.push(snapshot);
                }
                Ok(None) => {
                    let is_dropped = |newest: &Head| !newest.snapshot_versions.contains(version);
                    // One that came and went with the changes of others was dropped together with its name.
                    if self.becomes(address, is_dropped).await? {
                        continue;
                    }
                    proof.problem(Rule::SnapshotExists, place(), Some(*version), "it is missing");
                }
                Err(error) if is_damage(&error) => {
                    proof.snapshots += 1;
                    proof.problem(Rule::Readable, place(), Some(*version), error.to_string());
                }
                Err(error) => return Err(error),
            }
        }
        Ok(saved)
    }

    /// Whether that is so of the head by now, since others have written or cleaned up: on Google's emulator
    /// that is visible a little later.
    async fn becomes(&self, address: &Address, is_so: impl Fn(&Head) -> bool) -> Result<bool> {
        for look in 0..LOOKS {
            let newest = self.find(address).await?.ok().flatten();
            if newest.is_some_and(|newest| is_so(&newest.head)) {
                return Ok(true);
            }
            self.wait(look).await;
        }
        Ok(false)
    }

    async fn wait(&self, look: u32) {
        // Where a commit is seen whole at once, there is nothing to wait for.
        if !self.records.reads_are_cheap() {
            tokio::time::sleep(self.records.options().retry.backoff(look + 1)).await;
        }
    }

    /// How many events were given up and still stand.
    async fn leftovers(&self, address: &Address, head: &Head) -> Result<u64> {
        let (end, mut count) = (head.first_version, 0);
        let mut next = (head.oldest_version < end).then_some(head.oldest_version);
        while let Some(from) = next {
            let reader = self.records.reader();
            let (documents, after) =
                reader.versions(address, Kind::Events, from, end - 1, PAGE).await?;
            count += documents.len() as u64;
            next = after;
        }
        Ok(count)
    }
}

fn note_head(heads: &mut Hasher, address: &Address, revision: Revision) {
    // Hashing does not fail.
    let _ = writeln!(heads, "{address} {}", revision.token());
}

/// What a clean-up changes.
fn notes(head: &Head) -> (&[u64], u64, u64) {
    (&head.snapshot_versions, head.first_version, head.oldest_version)
}
