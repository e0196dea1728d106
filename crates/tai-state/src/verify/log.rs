//! The log of one state, proved event by event.

use super::{Proof, Rule};
use crate::backend::Document;
use crate::chain::Change;
use crate::error::Error;
use crate::keys::Address;
use crate::replay::Link;
use crate::schema;
use crate::transition::{Head, is_purge};

/// The log of one state while it is proved. After each problem it goes on with the next event.
pub(super) struct Log<'a, Saved: Iterator<Item = Change>> {
    pub(super) address: &'a Address,
    pub(super) head: &'a Head,
    pub(super) saved: std::iter::Peekable<Saved>,
    /// Nothing at the beginning.
    pub(super) link: Option<Link>,
}

impl<Saved: Iterator<Item = Change>> Log<'_, Saved> {
    pub(super) fn next(&self) -> u64 {
        self.link.as_ref().map_or(self.head.first_version, Link::next_version)
    }

    fn place(&self) -> String {
        format!("the log of {}", self.address)
    }

    pub(super) fn unreadable(&mut self, version: u64, error: &Error, proof: &mut Proof) {
        let (place, reason) = (self.place(), error.to_string());
        proof.events += 1;
        proof.problem(Rule::Readable, place, Some(version), reason);
        self.link = Some(Link::first(version + 1));
    }

    fn gap(&self, below: u64, proof: &mut Proof) {
        let next = self.next();
        if below > next {
            let reason = match below - next {
                1 => "the event is missing".to_owned(),
                count => format!("{count} events from here on are missing"),
            };
            proof.problem(Rule::NoGap, self.place(), Some(next), reason);
        }
    }

    pub(super) fn take(&mut self, document: &Document, proof: &mut Proof) {
        let version = document.key.version;
        if version <= self.head.version() {
            self.gap(version, proof);
        }
        let change = match schema::read_change(self.address, document) {
            Ok(change) => change,
            Err(error) => return self.unreadable(version, &error, proof),
        };
        if version > self.head.version() {
            // Written meanwhile, or the head is behind: then only where the log ends matters.
            if version == self.next() {
                self.link = Some(Link::after(&change));
            }
            return;
        }
        proof.content.push(&change);
        proof.events += 1;
        if let Some(snapshot) = self.saved.next_if(|saved| saved.version == version)
            && snapshot != change
        {
            let place = format!("the saved snapshot {}", self.address);
            proof.problem(
                Rule::SnapshotIsOfLog,
                place,
                Some(version),
                "it is not what the log says",
            );
        }
        if version == self.head.first_version && version > 1 {
            let is_vouched = self
                .head
                .cut_snapshot()
                .is_some_and(|cut| self.head.snapshot_versions.contains(&cut));
            if !is_vouched && !is_purge(&change) {
                let reason =
                    "history begins here, and neither a saved snapshot nor a purge says why";
                proof.problem(Rule::CutIsVouched, self.place(), Some(version), reason);
            }
        }
        if version == self.head.version() && change != self.head.change {
            let place = format!("the head of {}", self.address);
            proof.problem(Rule::HeadIsNewest, place, Some(version), "it is not what its log says");
        }
        let first = self.head.first_version;
        let mut link = self.link.take().unwrap_or_else(|| Link::first(first));
        if link.next_version() != version {
            // The gap was told.
            link = Link::first(version);
        }
        if let Err(error) = link.push(self.address, &change) {
            let reason = match error {
                Error::Corrupt { reason, .. } => reason,
                error => error.to_string(),
            };
            proof.problem(Rule::Chain, self.place(), Some(version), reason);
            link = Link::after(&change);
        }
        self.link = Some(link);
    }

    pub(super) fn finish(&self, proof: &mut Proof) {
        self.gap(self.head.version() + 1, proof);
    }
}
