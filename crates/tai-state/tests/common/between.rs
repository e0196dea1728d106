//! A backend at which something happens between two calls.

use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use tai_state::backend::{
    Alarm, Backend, BackendError, Committed, Document, Found, Identity, Key, Kind, Limits, Moment,
    Name, Page, Query, Read, Scan, Write,
};

/// What a backend is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Call {
    Get(Kind),
    Scan(Kind),
    Query,
    /// After it was applied; its answer is lost.
    Commit,
}

type Deed = Arc<dyn Fn() -> Pin<Box<dyn Future<Output = ()> + Send>> + Send + Sync>;

/// A backend at which something happens before it answers one call.
#[derive(Clone)]
pub(crate) struct Between {
    inner: Arc<dyn Backend>,
    deed: Arc<Mutex<Option<(Call, u32, bool, Deed)>>>,
    /// Whether a read counts as a round trip.
    is_far: bool,
}

impl std::fmt::Debug for Between {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Between")
    }
}

impl Between {
    pub(crate) fn new(inner: &Arc<dyn Backend>) -> Self {
        Self { inner: Arc::clone(inner), deed: Arc::default(), is_far: false }
    }

    pub(crate) fn far(inner: &Arc<dyn Backend>) -> Self {
        Self { is_far: true, ..Self::new(inner) }
    }

    /// Before the next such call after `passed` of them, this happens, once.
    pub(crate) fn at<F: Future<Output = ()> + Send + 'static>(
        &self,
        call: Call,
        passed: u32,
        deed: impl Fn() -> F + Send + Sync + 'static,
    ) {
        let deed: Deed = Arc::new(move || Box::pin(deed()));
        *self.deed.lock().unwrap() = Some((call, passed, false, deed));
    }

    /// Before each such call this happens.
    pub(crate) fn always<F: Future<Output = ()> + Send + 'static>(
        &self,
        call: Call,
        deed: impl Fn() -> F + Send + Sync + 'static,
    ) {
        let deed: Deed = Arc::new(move || Box::pin(deed()));
        *self.deed.lock().unwrap() = Some((call, 0, true, deed));
    }

    fn take(&self, call: Call) -> Option<Deed> {
        let mut deed = self.deed.lock().unwrap();
        match &mut *deed {
            Some((at, 0, true, again)) if *at == call => Some(Arc::clone(again)),
            Some((at, 0, false, _)) if *at == call => deed.take().map(|(_, _, _, deed)| deed),
            Some((at, passed, _, _)) if *at == call => {
                *passed -= 1;
                None
            }
            _ => None,
        }
    }

    async fn come(&self, call: Call) {
        if let Some(deed) = self.take(call) {
            deed().await;
        }
    }
}

#[async_trait]
impl Read for Between {
    async fn get(&self, keys: &[Key]) -> Result<Vec<Option<Document>>, BackendError> {
        if let Some(key) = keys.first() {
            self.come(Call::Get(key.kind)).await;
        }
        self.inner.get(keys).await
    }

    async fn scan(&self, scan: &Scan) -> Result<Page, BackendError> {
        self.come(Call::Scan(scan.kind)).await;
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
        self.come(Call::Query).await;
        self.inner.query(query).await
    }

    async fn count(&self, governor: Option<&Name>, kind: Kind) -> Result<u64, BackendError> {
        self.inner.count(governor, kind).await
    }
}

#[async_trait]
impl Backend for Between {
    async fn commit(&self, writes: Vec<Write>) -> Result<Committed, BackendError> {
        let committed = self.inner.commit(writes).await;
        if let Some(deed) = self.take(Call::Commit) {
            deed().await;
            return Err(BackendError::Indeterminate("the answer was lost".into()));
        }
        committed
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
        let mut limits = self.inner.limits();
        limits.reads_are_cheap &= !self.is_far;
        limits
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
