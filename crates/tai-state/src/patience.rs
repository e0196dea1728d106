//! How long a call to the port may take, and whether it is tried again: the one layer of retries.

use std::time::Duration;

use crate::backend::BackendError;
use crate::clock::Stopwatch;
use crate::config::RetryPolicy;
use crate::error::Error;

/// What a last look may take after the deadline: whoever waited so long should not be told "unknown"
/// without one.
pub(crate) const LAST_LOOK: Duration = Duration::from_millis(500);

/// That a task was not finished, because its runtime ended.
pub(crate) fn stopped(error: tokio::task::JoinError) -> Error {
    Error::Firestore { message: format!("the runtime is shutting down: {error}"), source: None }
}

/// A moment by which a call has returned.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Deadline {
    started: Stopwatch,
    limit: Duration,
}

impl Deadline {
    pub(crate) fn after(limit: Duration) -> Self {
        Self { started: Stopwatch::start(), limit }
    }

    pub(crate) fn left(self) -> Duration {
        self.limit.saturating_sub(self.started.elapsed())
    }

    pub(crate) fn is_over(self) -> bool {
        self.left().is_zero()
    }

    pub(crate) fn limit(self) -> Duration {
        self.limit
    }

    /// The time of a last look included, however late it is by now.
    pub(crate) fn with_a_last_look(self) -> Self {
        Self { limit: self.limit.saturating_add(LAST_LOOK), ..self }
    }

    /// What is left, but enough for a last look.
    pub(crate) fn for_a_last_look(self) -> Self {
        Self::after(self.left().max(LAST_LOOK))
    }
}

/// The tries of one call.
#[derive(Debug)]
pub(crate) struct Tries<'a> {
    policy: &'a RetryPolicy,
    deadline: Deadline,
    failed: u32,
}

impl<'a> Tries<'a> {
    pub(crate) fn new(policy: &'a RetryPolicy, deadline: Deadline) -> Self {
        Self { policy, deadline, failed: 0 }
    }

    pub(crate) fn failed(&self) -> u32 {
        self.failed
    }

    /// Makes one try; `None` when the deadline passed.
    pub(crate) async fn once<T>(
        &self,
        call: impl Future<Output = Result<T, BackendError>>,
    ) -> Option<Result<T, BackendError>> {
        tokio::time::timeout(self.deadline.left(), call).await.ok()
    }

    /// Waits for the next try; `false` when there is none. Who was asked to wait waits the longest.
    pub(crate) async fn again(&mut self, was_asked_to_wait: bool) -> bool {
        self.failed += 1;
        if self.failed >= self.policy.max_attempts {
            return false;
        }
        let most = if was_asked_to_wait { u32::MAX } else { self.failed };
        self.wait(most).await
    }

    /// Waits for the next try after others were faster, however often they were: each time one of them
    /// got on. `false` when the deadline passed.
    pub(crate) async fn after_race(&mut self) -> bool {
        self.failed = self.failed.saturating_add(1);
        self.wait(self.failed.min(self.policy.max_attempts)).await
    }

    async fn wait(&self, failed: u32) -> bool {
        tokio::time::sleep(self.policy.backoff(failed).min(self.deadline.left())).await;
        !self.deadline.is_over()
    }
}

/// Reads, and reads again while that may help. `None` when the deadline passed.
pub(crate) async fn read<T, Reading>(
    policy: &RetryPolicy,
    deadline: Deadline,
    reading: impl Fn() -> Reading,
) -> Option<Result<T, BackendError>>
where
    Reading: Future<Output = Result<T, BackendError>>,
{
    let mut tries = Tries::new(policy, deadline);
    loop {
        let error = match tries.once(reading()).await? {
            Ok(answer) => return Some(Ok(answer)),
            Err(error) => error,
        };
        let was_asked_to_wait = matches!(error, BackendError::Throttled(_));
        let may_help = was_asked_to_wait
            || matches!(error, BackendError::Unavailable(_) | BackendError::Indeterminate(_));
        if !may_help {
            return Some(Err(error));
        }
        tracing::debug!(%error, failed = tries.failed() + 1, "a read was not answered");
        if !tries.again(was_asked_to_wait).await {
            return if deadline.is_over() { None } else { Some(Err(error)) };
        }
    }
}
