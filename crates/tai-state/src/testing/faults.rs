//! A backend between which and its caller answers are lost, and at which things happen between two calls.

use std::collections::VecDeque;
use std::fmt;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::watch;

use crate::backend::{
    Alarm, Backend, BackendError, Committed, Document, Found, Identity, Key, Kind, Limits, Moment,
    Name, Operation, Page, Query, Read, Scan, Write,
};
use crate::clock::Stopwatch;

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

/// What a backend is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Call {
    /// To get documents; the kind of the first.
    Get(Kind),
    /// A scan of this kind.
    Scan(Kind),
    /// A query.
    Query,
    /// A commit, after it was applied. Its answer is lost.
    Commit,
}

type Deed = Arc<dyn Fn() -> Pin<Box<dyn Future<Output = ()> + Send>> + Send + Sync>;

/// What happens at a call.
struct Planned {
    call: Call,
    /// So many of these calls pass before.
    passed: u32,
    again: bool,
    deed: Deed,
}

/// A backend that takes its time, counts, and has faults in its commits: the first fault that was given is met by the first commit,
/// and so on; after the last everything goes through.
#[derive(Clone)]
pub struct FaultyBackend {
    inner: Arc<dyn Backend>,
    faults: Arc<Mutex<VecDeque<CommitFault>>>,
    is_held: Arc<watch::Sender<bool>>,
    commits: Arc<AtomicU64>,
    is_down: Arc<AtomicBool>,
    is_silent: Arc<AtomicBool>,
    started: Stopwatch,
    times: Arc<Mutex<Vec<Duration>>>,
    delay: Duration,
    poison: Option<&'static str>,
    planned: Arc<Mutex<Option<Planned>>>,
    is_far: bool,
    is_blurred: bool,
    broken: Option<&'static str>,
}

impl fmt::Debug for FaultyBackend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FaultyBackend").field("inner", &self.inner).finish_non_exhaustive()
    }
}

impl FaultyBackend {
    /// Puts faults before a backend.
    pub fn new(inner: Arc<dyn Backend>, faults: impl IntoIterator<Item = CommitFault>) -> Self {
        let faults = Arc::new(Mutex::new(faults.into_iter().collect()));
        let is_held = Arc::new(watch::Sender::new(false));
        let (commits, delay, poison) = (Arc::default(), Duration::ZERO, None);
        let (planned, is_far, is_blurred, broken) = (Arc::default(), false, false, None);
        let (is_down, is_silent, times) = (Arc::default(), Arc::default(), Arc::default());
        Self {
            inner,
            faults,
            is_held,
            commits,
            is_down,
            is_silent,
            started: Stopwatch::start(),
            times,
            delay,
            poison,
            planned,
            is_far,
            is_blurred,
            broken,
        }
    }

    /// Says that its reads are not cheap, as if they went over a network.
    #[must_use]
    pub fn far(self) -> Self {
        Self { is_far: true, ..self }
    }

    /// Says that what it reads together may be of several moments.
    #[must_use]
    pub fn blurred(self) -> Self {
        Self { is_blurred: true, ..self }
    }

    /// Finds this when it looks through its own structure.
    #[must_use]
    pub fn broken(self, problem: &'static str) -> Self {
        Self { broken: Some(problem), ..self }
    }

    /// Before the next such call after `passed` of them, this happens, once.
    pub fn at<F: Future<Output = ()> + Send + 'static>(
        &self,
        call: Call,
        passed: u32,
        deed: impl Fn() -> F + Send + Sync + 'static,
    ) {
        self.plan(call, passed, false, Arc::new(move || Box::pin(deed())));
    }

    /// Before each such call this happens.
    pub fn always<F: Future<Output = ()> + Send + 'static>(
        &self,
        call: Call,
        deed: impl Fn() -> F + Send + Sync + 'static,
    ) {
        self.plan(call, 0, true, Arc::new(move || Box::pin(deed())));
    }

    fn plan(&self, call: Call, passed: u32, again: bool, deed: Deed) {
        let planned = Planned { call, passed, again, deed };
        *self.planned.lock().unwrap_or_else(PoisonError::into_inner) = Some(planned);
    }

    fn due(&self, call: Call) -> Option<Deed> {
        let mut slot = self.planned.lock().unwrap_or_else(PoisonError::into_inner);
        let planned = slot.as_mut().filter(|planned| planned.call == call)?;
        if planned.passed > 0 {
            planned.passed -= 1;
            return None;
        }
        let deed = Arc::clone(&planned.deed);
        if !planned.again {
            *slot = None;
        }
        Some(deed)
    }

    async fn come(&self, call: Call) {
        self.silence().await;
        if let Some(deed) = self.due(call) {
            deed().await;
        }
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

    /// When each commit came, counted from when this was made.
    #[must_use]
    pub fn commit_times(&self) -> Vec<Duration> {
        self.times.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// How long ago this was made.
    #[must_use]
    pub fn age(&self) -> Duration {
        self.started.elapsed()
    }

    /// From now on no commit, no query and no read of a document is carried out or answered.
    pub fn go_silent(&self) {
        self.is_silent.store(true, Ordering::SeqCst);
    }

    async fn silence(&self) {
        if self.is_silent.load(Ordering::SeqCst) {
            std::future::pending::<()>().await;
        }
    }

    /// Whether from now on each commit is refused as if the service were not there.
    pub fn go_down(&self, is_down: bool) {
        self.is_down.store(is_down, Ordering::SeqCst);
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
impl Backend for FaultyBackend {
    async fn commit(&self, writes: Vec<Write>) -> Result<Committed, BackendError> {
        self.commits.fetch_add(1, Ordering::SeqCst);
        let came = self.started.elapsed();
        self.times.lock().unwrap_or_else(PoisonError::into_inner).push(came);
        self.silence().await;
        if self.is_down.load(Ordering::SeqCst) {
            return Err(BackendError::Unavailable("it is down".into()));
        }
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
            CommitFault::None => {
                let committed = self.inner.commit(writes).await;
                match self.due(Call::Commit) {
                    Some(deed) => {
                        deed().await;
                        Err(lost())
                    }
                    None => committed,
                }
            }
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
        if let Some(key) = keys.first() {
            self.come(Call::Get(key.kind)).await;
        }
        self.inner.get_at(keys).await
    }

    fn limits(&self) -> Limits {
        let mut limits = self.inner.limits();
        limits.reads_are_cheap &= !self.is_far;
        limits.cuts_are_exact &= !self.is_blurred;
        limits
    }

    fn identity(&self) -> Identity {
        self.inner.identity()
    }

    fn location(&self) -> String {
        self.inner.location()
    }

    async fn check_structure(&self) -> Result<Vec<String>, BackendError> {
        let mut problems = self.inner.check_structure().await?;
        problems.extend(self.broken.map(str::to_owned));
        Ok(problems)
    }
}
