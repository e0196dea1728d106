//! A backend between which and its caller answers are lost.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::watch;

use crate::backend::{
    Alarm, Backend, BackendError, Committed, Document, Found, Identity, Key, Kind, Limits, Moment,
    Name, Operation, Page, Query, Read, Scan, Write,
};

/// What happens to one commit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum CommitFault {
    /// Nothing: it goes through.
    None,
    /// It is not applied, and the caller is told so.
    Unavailable,
    /// It is not applied, and the caller does not know.
    LostRequest,
    /// It is applied, and the caller does not know.
    LostAnswer,
    /// It arrives twice, and the caller gets the second answer.
    Duplicated,
}

/// A backend that takes its time, counts, and has faults in its commits: the first fault that was given is met by the first commit,
/// and so on; after the last everything goes through.
#[derive(Debug, Clone)]
pub struct FaultyBackend {
    inner: Arc<dyn Backend>,
    faults: Arc<Mutex<VecDeque<CommitFault>>>,
    is_held: Arc<watch::Sender<bool>>,
    commits: Arc<AtomicU64>,
    delay: Duration,
    poison: Option<&'static str>,
}

impl FaultyBackend {
    /// Puts faults before a backend.
    pub fn new(inner: Arc<dyn Backend>, faults: impl IntoIterator<Item = CommitFault>) -> Self {
        let faults = Arc::new(Mutex::new(faults.into_iter().collect()));
        let is_held = Arc::new(watch::Sender::new(false));
        let (commits, delay, poison) = (Arc::default(), Duration::ZERO, None);
        Self { inner, faults, is_held, commits, delay, poison }
    }

    /// Each commit takes so much longer.
    #[must_use]
    pub fn slowed(self, delay: Duration) -> Self {
        Self { delay, ..self }
    }

    /// Refuses each commit that holds a body with this text, as an engine refuses what it cannot keep.
    #[must_use]
    pub fn refusing(self, poison: &'static str) -> Self {
        Self { poison: Some(poison), ..self }
    }

    /// How many commits have come.
    #[must_use]
    pub fn commits(&self) -> u64 {
        self.commits.load(Ordering::SeqCst)
    }

    /// The next commits meet these.
    pub fn inject(&self, faults: impl IntoIterator<Item = CommitFault>) {
        self.faults.lock().unwrap_or_else(PoisonError::into_inner).extend(faults);
    }

    /// Commits wait from now on, before anything happens to them.
    pub fn hold(&self) {
        self.is_held.send_replace(true);
    }

    /// Commits go on.
    pub fn let_go(&self) {
        self.is_held.send_replace(false);
    }
}

#[async_trait]
impl Read for FaultyBackend {
    async fn get(&self, keys: &[Key]) -> Result<Vec<Option<Document>>, BackendError> {
        self.inner.get(keys).await
    }

    async fn scan(&self, scan: &Scan) -> Result<Page, BackendError> {
        self.inner.scan(scan).await
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
        self.inner.query(query).await
    }

    async fn count(&self, governor: Option<&Name>, kind: Kind) -> Result<u64, BackendError> {
        self.inner.count(governor, kind).await
    }
}

#[async_trait]
impl Backend for FaultyBackend {
    async fn commit(&self, writes: Vec<Write>) -> Result<Committed, BackendError> {
        self.commits.fetch_add(1, Ordering::SeqCst);
        if !self.delay.is_zero() {
            tokio::time::sleep(self.delay).await;
        }
        let is_poison = |write: &Write| match (&write.operation, self.poison) {
            (Operation::Put(body), Some(poison)) => body.as_text().contains(poison),
            _ => false,
        };
        if writes.iter().any(is_poison) {
            return Err(BackendError::Invalid("a body that it cannot keep".into()));
        }
        // The sender lives as long as this does.
        let _ = self.is_held.subscribe().wait_for(|is_held| !is_held).await;
        let fault = {
            let mut faults = self.faults.lock().unwrap_or_else(PoisonError::into_inner);
            faults.pop_front().unwrap_or(CommitFault::None)
        };
        let lost = || BackendError::Indeterminate("the answer was lost".into());
        match fault {
            CommitFault::None => self.inner.commit(writes).await,
            CommitFault::Unavailable => Err(BackendError::Unavailable("not now".into())),
            CommitFault::LostRequest => Err(lost()),
            CommitFault::LostAnswer => {
                let _ = self.inner.commit(writes).await;
                Err(lost())
            }
            CommitFault::Duplicated => {
                let _ = self.inner.commit(writes.clone()).await;
                self.inner.commit(writes).await
            }
        }
    }

    async fn view(&self) -> Result<Box<dyn Read>, BackendError> {
        self.inner.view().await
    }

    async fn watch(
        &self,
        governor: &Name,
        kind: Kind,
        name: Option<&Name>,
    ) -> Result<Box<dyn Alarm>, BackendError> {
        self.inner.watch(governor, kind, name).await
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
        self.inner.location()
    }

    async fn check_structure(&self) -> Result<Vec<String>, BackendError> {
        self.inner.check_structure().await
    }
}
