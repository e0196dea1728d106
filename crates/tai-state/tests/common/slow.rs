//! Backends that take their time, and backends that lose answers.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use tai_state::backend::*;

/// A backend whose commits take a while.
#[derive(Debug)]
pub(crate) struct Slow {
    pub(crate) inner: Arc<dyn Backend>,
    pub(crate) commit: Duration,
}

#[async_trait]
impl Read for Slow {
    async fn get(&self, keys: &[Key]) -> Result<Vec<Option<Document>>, BackendError> {
        self.inner.get(keys).await
    }
    async fn scan(&self, scan: &Scan) -> Result<Page, BackendError> {
        self.inner.scan(scan).await
    }
    async fn names(
        &self,
        g: &Name,
        k: Kind,
        a: Option<&Name>,
        l: usize,
    ) -> Result<Vec<Name>, BackendError> {
        self.inner.names(g, k, a, l).await
    }
    async fn governors(&self, a: Option<&Name>, l: usize) -> Result<Vec<Name>, BackendError> {
        self.inner.governors(a, l).await
    }
    async fn query(&self, query: &Query) -> Result<Found, BackendError> {
        self.inner.query(query).await
    }
    async fn count(&self, g: Option<&Name>, k: Kind) -> Result<u64, BackendError> {
        self.inner.count(g, k).await
    }
}

/// One cut, in which the state `slow` takes 50 ms to be read.
#[derive(Debug)]
struct SlowView(Box<dyn Read>);

#[async_trait]
impl Read for SlowView {
    async fn get(&self, keys: &[Key]) -> Result<Vec<Option<Document>>, BackendError> {
        if keys.iter().any(|key| key.name.as_str() == "slow") {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        self.0.get(keys).await
    }
    async fn scan(&self, scan: &Scan) -> Result<Page, BackendError> {
        self.0.scan(scan).await
    }
    async fn names(
        &self,
        g: &Name,
        k: Kind,
        a: Option<&Name>,
        l: usize,
    ) -> Result<Vec<Name>, BackendError> {
        self.0.names(g, k, a, l).await
    }
    async fn governors(&self, a: Option<&Name>, l: usize) -> Result<Vec<Name>, BackendError> {
        self.0.governors(a, l).await
    }
    async fn query(&self, query: &Query) -> Result<Found, BackendError> {
        self.0.query(query).await
    }
    async fn count(&self, g: Option<&Name>, k: Kind) -> Result<u64, BackendError> {
        self.0.count(g, k).await
    }
}

#[async_trait]
impl Backend for Slow {
    async fn commit(&self, writes: Vec<Write>) -> Result<Committed, BackendError> {
        tokio::time::sleep(self.commit).await;
        self.inner.commit(writes).await
    }
    async fn view(&self) -> Result<Box<dyn Read>, BackendError> {
        Ok(Box::new(SlowView(self.inner.view().await?)))
    }
    async fn watch(
        &self,
        g: &Name,
        k: Kind,
        n: Option<&Name>,
    ) -> Result<Box<dyn Alarm>, BackendError> {
        self.inner.watch(g, k, n).await
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

/// Commits whose answers are lost at once, from a moment on.
#[derive(Debug)]
pub(crate) struct Lossy {
    pub(crate) inner: Arc<dyn Backend>,
    pub(crate) lose: Arc<AtomicBool>,
    pub(crate) commits: Arc<AtomicU64>,
}

#[async_trait]
impl Read for Lossy {
    async fn get(&self, keys: &[Key]) -> Result<Vec<Option<Document>>, BackendError> {
        self.inner.get(keys).await
    }
    async fn scan(&self, scan: &Scan) -> Result<Page, BackendError> {
        self.inner.scan(scan).await
    }
    async fn names(
        &self,
        g: &Name,
        k: Kind,
        a: Option<&Name>,
        l: usize,
    ) -> Result<Vec<Name>, BackendError> {
        self.inner.names(g, k, a, l).await
    }
    async fn governors(&self, a: Option<&Name>, l: usize) -> Result<Vec<Name>, BackendError> {
        self.inner.governors(a, l).await
    }
    async fn query(&self, query: &Query) -> Result<Found, BackendError> {
        self.inner.query(query).await
    }
    async fn count(&self, g: Option<&Name>, k: Kind) -> Result<u64, BackendError> {
        self.inner.count(g, k).await
    }
}

#[async_trait]
impl Backend for Lossy {
    async fn commit(&self, writes: Vec<Write>) -> Result<Committed, BackendError> {
        self.commits.fetch_add(1, Ordering::SeqCst);
        if self.lose.load(Ordering::SeqCst) {
            tokio::time::sleep(Duration::from_millis(1)).await;
            return Err(BackendError::Indeterminate("lost".into()));
        }
        self.inner.commit(writes).await
    }
    async fn view(&self) -> Result<Box<dyn Read>, BackendError> {
        self.inner.view().await
    }
    async fn watch(
        &self,
        g: &Name,
        k: Kind,
        n: Option<&Name>,
    ) -> Result<Box<dyn Alarm>, BackendError> {
        self.inner.watch(g, k, n).await
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
