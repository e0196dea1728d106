//! Proves a whole store: every head, every event, every saved snapshot, and the chain that binds
//! them.

use serde::Serialize;

use crate::backend::Kind;
use crate::chain::Hash;
use crate::error::{Error, Result};
use crate::history::ContentHash;
use crate::keys::{Address, Name};
use crate::records::KnownHead;
use crate::replay::Replay;
use crate::store::StateStore;

/// Events in memory at once.
const PAGE: usize = 1_000;
/// Problems that are named; more are only counted by the last of them.
const MOST_PROBLEMS: usize = 1_000;

/// What a proof found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct VerifyReport {
    /// Whether everything holds.
    pub ok: bool,
    /// States, deleted ones included.
    pub states: u64,
    /// Events.
    pub events: u64,
    /// Saved snapshots.
    pub snapshots: u64,
    /// What does not hold, each with its place.
    pub problems: Vec<String>,
    /// The hash of all that the log says, as [`StateStore::export`] computes it. Says nothing when
    /// there are problems.
    pub content_hash: Hash,
}

struct Proof {
    content: ContentHash,
    states: u64,
    events: u64,
    snapshots: u64,
    problems: Vec<String>,
}

impl Proof {
    fn problem(&mut self, problem: impl ToString) {
        match self.problems.len() {
            MOST_PROBLEMS => self.problems.push("and more".to_owned()),
            more if more > MOST_PROBLEMS => {}
            _ => self.problems.push(problem.to_string()),
        }
    }

    /// Damage is a finding; anything else ends the proof.
    fn note(&mut self, error: Error) -> Result<()> {
        if !is_damage(&error) {
            return Err(error);
        }
        self.problem(error);
        Ok(())
    }
}

fn is_damage(error: &Error) -> bool {
    matches!(error, Error::Corrupt { .. } | Error::NewerFormat { .. })
}

impl StateStore {
    /// Reads and proves everything: the hash and the chain of every event, every head against its
    /// log, every saved snapshot against the event at its version, that no document stands beside
    /// a log, and the engine's own structure. Writers may go on meanwhile; what they add after
    /// a state was read is not looked at.
    ///
    /// # Errors
    /// Only what keeps it from looking (permissions, an unreachable service): damage is reported,
    /// not returned as an error.
    pub async fn verify(&self, mut progress: impl FnMut(u64) + Send) -> Result<VerifyReport> {
        let mut proof = Proof {
            content: ContentHash::default(),
            states: 0,
            events: 0,
            snapshots: 0,
            problems: Vec::new(),
        };
        // Damage is a finding; whatever else keeps it from counting keeps it from all.
        let before = match self.counts().await {
            Err(error) if !is_damage(&error) => return Err(error),
            counted => counted,
        };
        if let Err(error) = self.verify_states(&mut proof, &mut progress).await {
            proof.note(error)?;
        }
        let after = self.counts().await;
        match (before, after) {
            // While others write, the counts say nothing.
            (Ok(before), Ok(after)) if before == after && proof.problems.is_empty() => {
                let (events, snapshots) = before;
                if events != proof.events {
                    let reached = proof.events;
                    proof.problem(format!(
                        "{events} events are stored, the heads lead to {reached}"
                    ));
                }
                if snapshots != proof.snapshots {
                    let reached = proof.snapshots;
                    proof.problem(format!(
                        "{snapshots} saved snapshots are stored, the heads lead to {reached}"
                    ));
                }
            }
            (Err(error), _) | (_, Err(error)) => proof.note(error)?,
            _ => {}
        }
        match self.records.check_structure().await {
            Ok(found) => found.into_iter().for_each(|problem| proof.problem(problem)),
            Err(error) => proof.note(error)?,
        }
        let Proof { content, states, events, snapshots, problems } = proof;
        let ok = problems.is_empty();
        let content_hash = content.finish();
        Ok(VerifyReport { ok, states, events, snapshots, problems, content_hash })
    }

    async fn counts(&self) -> Result<(u64, u64)> {
        let reader = self.records.reader();
        Ok((reader.count(None, Kind::Events).await?, reader.count(None, Kind::Snapshots).await?))
    }

    async fn verify_states(
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
            let heads = match reader.heads(&addresses).await {
                Ok(heads) => heads,
                // One damaged head spoils all of them: go on one by one.
                Err(error) if is_damage(&error) => Vec::new(),
                Err(error) => return Err(error),
            };
            let mut heads = heads.into_iter();
            for address in &addresses {
                let head = match heads.next() {
                    Some(head) => Ok(head),
                    None => reader.head(address).await,
                };
                let outcome = match head {
                    Ok(Some(head)) => {
                        proof.states += 1;
                        self.verify_state(address, &head, proof).await
                    }
                    // Purged since it was listed.
                    Ok(None) => Ok(()),
                    Err(error) => Err(error),
                };
                if let Err(error) = outcome {
                    proof.note(error)?;
                }
                progress(proof.events);
            }
        }
    }

    async fn still_lists(&self, address: &Address, version: u64) -> Result<bool> {
        let head = self.records.reader().head(address).await?;
        Ok(head.is_some_and(|known| known.head.snapshot_versions.contains(&version)))
    }

    async fn verify_state(
        &self,
        address: &Address,
        known: &KnownHead,
        proof: &mut Proof,
    ) -> Result<()> {
        let reader = self.records.reader();
        let head = &known.head;
        let mut saved = Vec::new();
        for version in &head.snapshot_versions {
            match reader.snapshot(address, *version).await? {
                Some(snapshot) => saved.push(snapshot),
                // Retention may have removed it since the head was read; then the head says so now.
                None if !self.still_lists(address, *version).await? => {}
                None => {
                    proof.problem(format!("the saved snapshot {address} v{version} is missing"));
                }
            }
        }
        proof.snapshots += saved.len() as u64;
        let mut replay = Replay::from_first(head.first_version);
        let mut saved = saved.into_iter().peekable();
        while replay.next_version() <= head.version() {
            let from = replay.next_version();
            let (changes, _) = reader.changes(address, from, head.version(), PAGE).await?;
            if changes.is_empty() {
                return Err(Error::corrupt(
                    format!("the log of {address} at v{from}"),
                    "the event is missing",
                ));
            }
            for change in changes {
                proof.content.push(&change);
                proof.events += 1;
                if let Some(snapshot) = saved.next_if(|saved| saved.version == change.version)
                    && snapshot != change
                {
                    proof.problem(format!(
                        "the saved snapshot {address} v{} is not what the log says",
                        change.version
                    ));
                }
                replay.push(change)?;
            }
        }
        if replay.last() != Some(&head.change) {
            proof.problem(format!("the head of {address} is not what its log says"));
        }
        Ok(())
    }
}
