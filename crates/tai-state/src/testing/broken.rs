//! Backends with one fault each, to show that the conformance suite notices it.

use std::collections::hash_map::DefaultHasher;
use std::hash::{Hash, Hasher};
use std::sync::Arc;

use async_trait::async_trait;
use serde_json::Value;

use crate::backend::matching;
use crate::backend::memory::MemoryBackend;
use crate::backend::{
    Alarm, Backend, BackendError, Committed, Document, Field, Found, Identity, Key, Kind, Limits,
    Moment, Name, Operation, Page, Precondition, Query, Read, Revision, Rung, Scan, Test, Write,
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
    /// A query takes the text `1` for the number 1.
    QueryIgnoresType,
    /// The next page of a query passes over those that are equal to the last of the page before.
    QueryLosesTies,
    /// An ordered query finds those that lack the field too.
    QueryTakesFieldless,
    /// An alarm hears only what changes while somebody waits.
    ForgetsRings,
    /// Whoever gives up waiting takes the ring along.
    LosesGivenUpRings,
    /// An alarm tells one name of those that were changed together.
    RingsForFirstName,
    /// Doubles pass through a detour that keeps 53 bits of an integer.
    RoundsIntegers,
}

impl Fault {
    /// All faults.
    pub const ALL: [Fault; 14] = [
        Self::IgnoresRevision,
        Self::IgnoresAbsent,
        Self::AppliesHalf,
        Self::ReusesRevisions,
        Self::ForgetsChecks,
        Self::LivingView,
        Self::ScansBackwards,
        Self::QueryIgnoresType,
        Self::QueryLosesTies,
        Self::QueryTakesFieldless,
        Self::ForgetsRings,
        Self::LosesGivenUpRings,
        Self::RingsForFirstName,
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

    /// Compares as texts what is tested for equality.
    async fn by_text(&self, query: &Query) -> Result<Found, BackendError> {
        let text = |value: Value| value.as_str().map_or(value.to_string(), str::to_owned);
        let is_equal = |test: &(Field, Test)| matches!(test.1, Test::Equal(_));
        let (equal, others) = query.filters.iter().cloned().partition::<Vec<_>, _>(is_equal);
        let mut found = self.inner.query(&Query { filters: others, ..query.clone() }).await?;
        for (field, test) in equal {
            let Test::Equal(wanted) = test else { continue };
            let wanted = text(wanted);
            found.documents.retain(|d| value(d, &field).map(text).as_ref() == Some(&wanted));
        }
        Ok(found)
    }

    /// Adds those without the field of the order to the last page.
    async fn with_fieldless(&self, query: &Query) -> Result<Found, BackendError> {
        let mut found = self.inner.query(query).await?;
        let Some((field, _)) = query.order.as_ref().filter(|_| found.next.is_none()) else {
            return Ok(found);
        };
        let all = Query { filters: Vec::new(), order: None, after: None, ..query.clone() };
        let all = self.inner.query(&all).await?.documents;
        found.documents.extend(all.into_iter().filter(|d| value(d, field).is_none()));
        Ok(found)
    }

    async fn revision(&self, key: &Key) -> Result<Option<(Revision, Revision)>, BackendError> {
        let found = self.inner.get(std::slice::from_ref(key)).await?.pop().flatten();
        Ok(found.map(|document| (document.revision, self.spoil(document).revision)))
    }
}

fn value(document: &Document, field: &Field) -> Option<Value> {
    matching::field(&document.body.parse().ok()?, field).cloned()
}

/// An alarm with one fault.
#[derive(Debug)]
struct BrokenAlarm {
    inner: Box<dyn Alarm>,
    again: (Arc<MemoryBackend>, Name, Kind, Option<Name>),
    fault: Fault,
}

#[async_trait]
impl Alarm for BrokenAlarm {
    async fn ring(&mut self) -> Result<Rung, BackendError> {
        if self.fault == Fault::ForgetsRings {
            let (backend, governor, kind, name) = &self.again;
            self.inner = backend.watch(governor, *kind, name.as_ref()).await?;
        }
        let rung = self.inner.ring().await?;
        if self.fault == Fault::LosesGivenUpRings {
            tokio::task::yield_now().await;
        }
        Ok(match rung {
            Rung::Names(names) if self.fault == Fault::RingsForFirstName => {
                Rung::Names(names.into_iter().take(1).collect())
            }
            rung => rung,
        })
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

    async fn query(&self, query: &Query) -> Result<Found, BackendError> {
        match self.fault {
            Fault::QueryIgnoresType => self.by_text(query).await,
            Fault::QueryTakesFieldless => self.with_fieldless(query).await,
            Fault::QueryLosesTies => {
                let mut found = self.inner.query(query).await?;
                if let (Some(after), Some((field, _))) = (&query.after, &query.order) {
                    found.documents.retain(|d| value(d, field) != after.value);
                }
                Ok(found)
            }
            _ => self.inner.query(query).await,
        }
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

    async fn watch(
        &self,
        governor: &Name,
        kind: Kind,
        name: Option<&Name>,
    ) -> Result<Box<dyn Alarm>, BackendError> {
        let inner = self.inner.watch(governor, kind, name).await?;
        let again = (Arc::clone(&self.inner), governor.clone(), kind, name.cloned());
        Ok(match self.fault {
            Fault::ForgetsRings | Fault::LosesGivenUpRings | Fault::RingsForFirstName => {
                Box::new(BrokenAlarm { inner, again, fault: self.fault })
            }
            _ => inner,
        })
    }

    async fn get_at(&self, keys: &[Key]) -> Result<(Vec<Option<Document>>, Moment), BackendError> {
        self.inner.get_at(keys).await
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
    #[tokio::test(start_paused = true)]
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
                Fault::QueryIgnoresType => "a_query_finds_what_is_equal",
                Fault::QueryLosesTies => "a_query_is_ordered_and_continues",
                Fault::QueryTakesFieldless => "a_query_finds_a_range_of_one_type",
                Fault::ForgetsRings => "a_ring_waits_for_who_listens_later",
                Fault::LosesGivenUpRings => "a_wait_that_is_given_up_loses_nothing",
                Fault::RingsForFirstName => "every_change_rings",
                Fault::RoundsIntegers => "bodies_come_back_equal",
            };
            assert!(names.contains(&expected), "{fault:?} was noticed only by {names:?}");
        }
    }
}
