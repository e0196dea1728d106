//! The alarm of a file: this handle's commits are heard at once, those of others are looked for.
//!
//! SQLite tells nobody that another connection has committed, but `PRAGMA data_version` shows it.
//! While somebody waits, the writer's thread is asked to look ten times a second: on its connection
//! the number moves for the commits of others only.

use std::sync::{Arc, Mutex, PoisonError, Weak, mpsc};
use std::time::Duration;

use async_trait::async_trait;
use tokio::time::{Instant, timeout_at};

use super::writer::Message;
use crate::backend::bell::Listener;
use crate::backend::{Alarm, BackendError, Rung};

/// How often it is looked, however many wait.
pub(crate) const PERIOD: Duration = Duration::from_millis(100);

/// When the writer's thread is to look next: shared by all alarms of a handle.
#[derive(Debug, Clone)]
pub(crate) struct Looks(Arc<Mutex<Instant>>);

impl Looks {
    pub(crate) fn new() -> Self {
        Self(Arc::new(Mutex::new(Instant::now())))
    }

    fn next(&self) -> Instant {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether it is time; then the next look is a period away.
    fn is_due(&self) -> bool {
        let mut next = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        let is_due = now >= *next;
        if is_due {
            *next = now + PERIOD;
        }
        is_due
    }
}

#[derive(Debug)]
pub(crate) struct FileAlarm {
    pub(crate) listener: Listener,
    pub(crate) looks: Looks,
    /// Weak, so that an alarm does not keep the file open.
    pub(crate) writer: Weak<mpsc::Sender<Message>>,
}

#[async_trait]
impl Alarm for FileAlarm {
    async fn ring(&mut self) -> Result<Rung, BackendError> {
        loop {
            if let Ok(rung) = timeout_at(self.looks.next(), self.listener.ring()).await {
                return rung;
            }
            // What the look finds rings for all who listen. When the writer is gone, its bell is too.
            if self.looks.is_due()
                && let Some(writer) = self.writer.upgrade()
            {
                let _ = writer.send(Message::Look);
            }
        }
    }
}
