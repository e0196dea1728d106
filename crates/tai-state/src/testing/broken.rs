//! Backends with one fault each, to show that the conformance suite notices it.

use std::collections::hash_map::DefaultHasher;
use std::hash::{Hash, Hasher};
use std::sync::Arc;

use async_trait::async_trait;
use chrono::{DateTime, Utc};

use crate::backend::memory::MemoryBackend;
use crate::backend::{
    Backend, BackendError, Committed, Document, Identity, Key, Kind, Limits, Name, Operation, Page,
    Precondition, Read, Revision, Scan, Write,
};

/// What is wrong with a [`BrokenBackend`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Fault {
    /// A stale revision is taken for a current one.
    IgnoresRevision,
    /// *Must not exist* is not looked at.
    IgnoresAbsent,
    /// The writes before the one that is refused stay.
    AppliesHalf,
    /// A document that gets its old body back gets its old revision back.
    ReusesRevisions,
    /// A guard on a document that is not written is not looked at.
    ForgetsChecks,
    /// A view shows what is committed after it was taken.
    LivingView,
    /// A scan shows the newest first.
    ScansBackwards,
    /// Doubles pass through a detour that keeps 53 bits of an integer.
    RoundsIntegers,
}

impl Fault {
    /// All faults.
    pub const ALL: [Fault; 8] = [
        Self::IgnoresRevision,
        Self::IgnoresAbsent,
        Self::AppliesHalf,
        Self::ReusesRevisions,
        Self::ForgetsChecks,
        Self::LivingView,
        Self::ScansBackwards,
        Self::RoundsIntegers,
    ];
}

/// A backend in memory with one fault.
#[derive(Debug, Clone)]
pub struct BrokenBackend {
    inner: Arc<MemoryBackend>,
    fault: Fault,
}

impl BrokenBackend {
    /// An empty store with this fault.
    #[must_use]
    pub fn new(fault: Fault) -> Self {
        Self { inner: Arc::new(MemoryBackend::new()), fault }
    }

    fn spoil(&self, mut document: Document) -> Document {
        if self.fault == Fault::ReusesRevisions {
            let mut hash = DefaultHasher::new();
            document.body.as_text().hash(&mut hash);
            document.revision = Revision::new(hash.finish());
        }
        if self.fault == Fault::RoundsIntegers {
            let rounded = document.body.as_text().replace("9007199254740993", "9007199254740992");
            document.body = crate::backend::Body::from_text(rounded);
        }
        document
    }

    async fn revision(&self, key: &Key) -> Result<Option<(Revision, Revision)>, BackendError> {
        let found = self.inner.get(std::slice::from_ref(key)).await?.pop().flatten();
        Ok(found.map(|document| (document.revision, self.spoil(document).revision)))
    }
}

#[async_trait]
impl Read for BrokenBackend {
    async fn get(&self, keys: &[Key]) -> Result<Vec<Option<Document>>, BackendError> {
        let found = self.inner.get(keys).await?;
        Ok(found.into_iter().map(|document| document.map(|d| self.spoil(d))).collect())
    }

    async fn scan(&self, scan: &Scan) -> Result<Page, BackendError> {
        let mut page = self.inner.scan(scan).await?;
        if self.fault == Fault::ScansBackwards {
            page.documents.reverse();
        }
        Ok(page)
    }

    async fn names(
        &self,
        governor: &Name,
        kind: Kind,
        after: Option<&Name>,
        limit: usize,
    ) -> Result<Vec<Name>, BackendError> {
        self.inner.names(governor, kind, after, limit).await
    }

    async fn governors(
        &self,
        after: Option<&Name>,
        limit: usize,
    ) -> Result<Vec<Name>, BackendError> {
        self.inner.governors(after, limit).await
    }

    async fn count(&self, governor: Option<&Name>, kind: Kind) -> Result<u64, BackendError> {
        self.inner.count(governor, kind).await
    }
}

#[async_trait]
impl Backend for BrokenBackend {
    async fn commit(&self, mut writes: Vec<Write>) -> Result<Committed, BackendError> {
        for write in &mut writes {
            write.precondition = match (self.fault, write.precondition) {
                (Fault::IgnoresRevision, Precondition::Revision(_)) => Precondition::Present,
                (Fault::IgnoresAbsent, Precondition::Absent) => Precondition::Any,
                (Fault::ForgetsChecks, _) if write.operation == Operation::Check => {
                    Precondition::Any
                }
                (Fault::ReusesRevisions, Precondition::Revision(wanted)) => {
                    match self.revision(&write.key).await? {
                        Some((real, shown)) if shown == wanted => Precondition::Revision(real),
                        _ => return Err(BackendError::Conflict),
                    }
                }
                (_, precondition) => precondition,
            };
        }
        if self.fault == Fault::AppliesHalf {
            let mut revisions = Vec::new();
            for write in writes {
                revisions.extend(self.inner.commit(vec![write]).await?.revisions);
            }
            return Ok(Committed { revisions });
        }
        let keys: Vec<Key> = writes.iter().map(|write| write.key.clone()).collect();
        let mut committed = self.inner.commit(writes).await?;
        if self.fault == Fault::ReusesRevisions {
            let found = self.get(&keys).await?;
            committed.revisions =
                found.into_iter().map(|document| document.map(|d| d.revision)).collect();
        }
        Ok(committed)
    }

    async fn view(&self) -> Result<Box<dyn Read>, BackendError> {
        match self.fault {
            Fault::LivingView => Ok(Box::new(self.clone())),
            _ => self.inner.view().await,
        }
    }

    async fn now(&self) -> Result<DateTime<Utc>, BackendError> {
        self.inner.now().await
    }

    fn limits(&self) -> Limits {
        self.inner.limits()
    }

    fn identity(&self) -> Identity {
        self.inner.identity()
    }

    fn location(&self) -> String {
        format!("broken: {:?}", self.fault)
    }

    async fn check_structure(&self) -> Result<Vec<String>, BackendError> {
        self.inner.check_structure().await
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::conformance;

    /// Each fault fails the suite, and in the behaviours that are about it.
    #[tokio::test]
    async fn the_suite_has_teeth() {
        for fault in Fault::ALL {
            let failures =
                conformance::failures(|| async { Arc::new(BrokenBackend::new(fault)) as _ }).await;
            let names: Vec<&str> = failures.iter().map(|(name, _)| *name).collect();
            let expected = match fault {
                Fault::IgnoresRevision => "a_stale_revision_is_refused",
                Fault::IgnoresAbsent => "absent_refuses_what_exists",
                Fault::AppliesHalf => "a_refused_commit_applies_nothing",
                Fault::ReusesRevisions => "every_put_moves_the_revision",
                Fault::ForgetsChecks => "a_check_guards_what_is_not_written",
                Fault::LivingView => "a_view_is_one_cut",
                Fault::ScansBackwards => "names_are_scanned_in_order",
                Fault::RoundsIntegers => "bodies_come_back_equal",
            };
            assert!(names.contains(&expected), "{fault:?} was noticed only by {names:?}");
        }
    }
}
