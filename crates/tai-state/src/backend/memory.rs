//! The reference backend: the shortest one that keeps every promise of the port, in memory.
//!
//! It exists to be read before another backend is written, and to run tests without a disk. One
//! map under one lock; a commit checks all preconditions, then applies all writes. The map is
//! shared behind an `Arc` and copied only when a view still holds the old one, which is how a
//! view stays a cut. Nothing is durable here, and nothing is bounded.

use std::collections::BTreeMap;
use std::ops::Bound;
use std::sync::{Arc, PoisonError, RwLock};

use async_trait::async_trait;

use super::bell::{self, Bell};
use super::matching::Best;
use super::{
    Alarm, Backend, BackendError, Body, Committed, Document, Found, Identity, Key, Kind, Limits,
    Moment, Name, Operation, Page, Precondition, Query, Range, Read, Revision, Scan, Write,
    refuse_doubles, refuse_misfit, refuse_query,
};
use crate::clock::Stopwatch;

type Documents = Arc<BTreeMap<Key, (Body, Revision)>>;

/// Documents in memory.
#[derive(Debug)]
pub struct MemoryBackend {
    /// The documents and the newest revision that was given out.
    documents: RwLock<(Documents, u64)>,
    identity: Identity,
    bell: Bell,
    since: Stopwatch,
}

impl MemoryBackend {
    /// An empty store with an identity of its own.
    #[must_use]
    pub fn new() -> Self {
        let store = crate::clock::new_event_id().to_string();
        let node = format!("mem-{store}");
        let identity = Identity { store, incarnation: 1, node };
        let (bell, since) = (Bell::new(), Stopwatch::start());
        Self { documents: RwLock::default(), identity, bell, since }
    }

    fn cut(&self) -> Cut {
        Cut(Arc::clone(&self.documents.read().unwrap_or_else(PoisonError::into_inner).0))
    }
}

impl Default for MemoryBackend {
    fn default() -> Self {
        Self::new()
    }
}

/// The documents at one moment.
#[derive(Debug)]
struct Cut(Documents);

#[async_trait]
impl Read for Cut {
    async fn get(&self, keys: &[Key]) -> Result<Vec<Option<Document>>, BackendError> {
        Ok(keys.iter().map(|key| self.0.get_key_value(key).map(document)).collect())
    }

    async fn scan(&self, scan: &Scan) -> Result<Page, BackendError> {
        refuse_misfit(scan)?;
        let key = |name: &Name, version| Key {
            governor: scan.governor.clone(),
            kind: scan.kind,
            name: name.clone(),
            version,
        };
        let (start, last) = match &scan.range {
            Range::Names { after: Some(name) } => (Bound::Excluded(key(name, 0)), None),
            Range::Names { after: None } => (Bound::Unbounded, None),
            Range::Versions { name, from, to } if from <= to => {
                (Bound::Included(key(name, *from)), Some(key(name, *to)))
            }
            Range::Versions { .. } => return Ok(Page { documents: Vec::new(), next: None }),
        };
        let end = last.map_or(Bound::Unbounded, Bound::Included);
        let mut matching = self
            .0
            .range((start, end))
            .filter(|(key, _)| key.governor == scan.governor && key.kind == scan.kind)
            .map(document);
        let documents: Vec<Document> = matching.by_ref().take(scan.limit).collect();
        let next = matching.next().is_some().then(|| scan.after(&documents)).flatten();
        Ok(Page { documents, next })
    }

    async fn names(
        &self,
        governor: &Name,
        kind: Kind,
        after: Option<&Name>,
        limit: usize,
    ) -> Result<Vec<Name>, BackendError> {
        let matches = |key: &&Key| {
            key.governor == *governor && key.kind == kind && after.is_none_or(|a| key.name > *a)
        };
        Ok(self.0.keys().filter(matches).map(|key| key.name.clone()).take(limit).collect())
    }

    async fn governors(
        &self,
        after: Option<&Name>,
        limit: usize,
    ) -> Result<Vec<Name>, BackendError> {
        let mut names: Vec<Name> = self.0.keys().map(|key| key.governor.clone()).collect();
        names.dedup();
        names.retain(|name| after.is_none_or(|after| name > after));
        names.truncate(limit);
        Ok(names)
    }

    /// Looks at every document.
    async fn query(&self, query: &Query) -> Result<Found, BackendError> {
        refuse_query(query)?;
        let mut best = Best::new(query, usize::MAX);
        let of = |key: &Key| key.governor == query.governor && key.kind == query.kind;
        for found in self.0.iter().filter(|(key, _)| of(key)) {
            best.take(document(found))?;
            if best.is_done() {
                break;
            }
        }
        Ok(best.finish())
    }

    async fn count(&self, governor: Option<&Name>, kind: Kind) -> Result<u64, BackendError> {
        let counted = |key: &&Key| key.kind == kind && governor.is_none_or(|g| key.governor == *g);
        Ok(self.0.keys().filter(counted).count() as u64)
    }
}

fn document((key, (body, revision)): (&Key, &(Body, Revision))) -> Document {
    Document { key: key.clone(), body: body.clone(), revision: *revision }
}

#[async_trait]
impl Read for MemoryBackend {
    async fn get(&self, keys: &[Key]) -> Result<Vec<Option<Document>>, BackendError> {
        self.cut().get(keys).await
    }

    async fn scan(&self, scan: &Scan) -> Result<Page, BackendError> {
        self.cut().scan(scan).await
    }

    async fn names(
        &self,
        governor: &Name,
        kind: Kind,
        after: Option<&Name>,
        limit: usize,
    ) -> Result<Vec<Name>, BackendError> {
        self.cut().names(governor, kind, after, limit).await
    }

    async fn governors(
        &self,
        after: Option<&Name>,
        limit: usize,
    ) -> Result<Vec<Name>, BackendError> {
        self.cut().governors(after, limit).await
    }

    async fn query(&self, query: &Query) -> Result<Found, BackendError> {
        self.cut().query(query).await
    }

    async fn count(&self, governor: Option<&Name>, kind: Kind) -> Result<u64, BackendError> {
        self.cut().count(governor, kind).await
    }
}

#[async_trait]
impl Backend for MemoryBackend {
    async fn commit(&self, writes: Vec<Write>) -> Result<Committed, BackendError> {
        refuse_doubles(&writes)?;
        let mut guard = self.documents.write().unwrap_or_else(PoisonError::into_inner);
        let (documents, newest) = &mut *guard;
        for write in &writes {
            let found = documents.get(&write.key).map(|(_, revision)| *revision);
            let holds = match write.precondition {
                Precondition::Any => true,
                Precondition::Absent => found.is_none(),
                Precondition::Present => found.is_some(),
                Precondition::Revision(wanted) => found == Some(wanted),
            };
            if !holds {
                return Err(BackendError::Conflict);
            }
        }
        let changed = bell::changes(&writes).collect();
        *newest += 1;
        let revision = Revision::new(*newest);
        let documents = Arc::make_mut(documents);
        let apply = |write: Write| match write.operation {
            Operation::Put(body) => {
                documents.insert(write.key, (body, revision));
                Some(revision)
            }
            Operation::Delete => {
                documents.remove(&write.key);
                None
            }
            Operation::Check => documents.get(&write.key).map(|(_, revision)| *revision),
        };
        let revisions = writes.into_iter().map(apply).collect();
        drop(guard);
        self.bell.changed(changed);
        Ok(Committed { revisions })
    }

    async fn view(&self) -> Result<Box<dyn Read>, BackendError> {
        Ok(Box::new(self.cut()))
    }

    async fn watch(
        &self,
        governor: &Name,
        kind: Kind,
        name: Option<&Name>,
    ) -> Result<Box<dyn Alarm>, BackendError> {
        Ok(Box::new(self.bell.listen(governor, kind, name)?))
    }

    async fn get_at(&self, keys: &[Key]) -> Result<(Vec<Option<Document>>, Moment), BackendError> {
        let found = self.get(keys).await?;
        let moment = Moment { epoch: self.identity.store.clone(), micros: self.since.micros() };
        Ok((found, moment))
    }

    fn limits(&self) -> Limits {
        Limits {
            commit_bytes: 9 << 20,
            commit_writes: 500,
            reads_are_cheap: true,
            cuts_are_exact: true,
            repeat_before: 0,
        }
    }

    fn identity(&self) -> Identity {
        self.identity.clone()
    }

    fn location(&self) -> String {
        "mem:".to_owned()
    }

    async fn check_structure(&self) -> Result<Vec<String>, BackendError> {
        Ok(Vec::new())
    }
}
