//! Where the file of a handle is, and whether the handle may go on using it.

use std::io::ErrorKind;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::held::{FileId, Held};
use super::rows::RowError;
use super::writer::keep_log;

/// Why a handle ends when its file is not under its name any more.
pub(super) const REPLACED: &str =
    "the file or its log (-wal) was removed or replaced while it was open";

/// Why a handle ends when its log is shorter than it knows it to be.
pub(super) const CUT: &str = "the log (-wal) was cut off while it was open";

/// Shared by the connections of a handle.
#[derive(Debug)]
pub(super) struct Place {
    pub(super) path: PathBuf,
    /// As the user named it.
    pub(super) location: String,
    /// The log, and which file it is: SQLite keeps it open as long as a connection is.
    log: PathBuf,
    log_id: Option<FileId>,
    /// Set for ever when a sync failed.
    failed: AtomicBool,
    /// Set for ever when the file or its log was not what it had been.
    replaced: AtomicBool,
    /// Nobody waits for an answer any more: a shared flag, since SQLite's busy handler owns its part.
    pub(super) closing: Arc<AtomicBool>,
    /// Last, so that it is closed after the connections.
    held: Held,
}

impl Place {
    pub(super) fn new(path: PathBuf, location: String, held: Held) -> Self {
        let log = super::file::sidecar(&path, "-wal");
        Self {
            log_id: FileId::at(&log),
            path,
            location,
            log,
            failed: AtomicBool::new(false),
            replaced: AtomicBool::new(false),
            closing: Arc::default(),
            held,
        }
    }

    /// Looks whether the file and its log are still those that were opened. While a connection is open,
    /// SQLite neither removes the log nor puts another in its place, so whoever did was somebody else.
    pub(super) fn is_ours(&self) -> bool {
        let is_ours = self.held.is_at(&self.path)
            && (!cfg!(unix) || (self.log_id.is_some() && FileId::at(&self.log) == self.log_id));
        if !is_ours {
            self.replaced.store(true, Ordering::Release);
        }
        is_ours
    }

    /// Whether only the log's name is gone. Nobody can have opened the file since, or there would be
    /// a new log: what is acknowledged stands in the log that is still open here, and can be folded in.
    pub(super) fn can_be_saved(&self) -> bool {
        let is_gone = self.log.symlink_metadata().is_err_and(|e| e.kind() == ErrorKind::NotFound);
        self.is_replaced() && is_gone && self.held.is_at(&self.path)
    }

    /// Whether it was found to be replaced. Nothing that is read there counts.
    pub(super) fn is_replaced(&self) -> bool {
        self.replaced.load(Ordering::Acquire)
    }

    pub(super) fn has_failed(&self) -> bool {
        self.failed.load(Ordering::Acquire)
    }

    pub(super) fn poison(&self, reason: &str) {
        tracing::error!(reason, location = %self.location, "the storage failed; this handle writes no more");
        self.failed.store(true, Ordering::Release);
    }

    /// A log that was cut off under us takes no more, and what is read there does not count.
    pub(super) fn note(&self, error: &RowError) {
        if let RowError::Sqlite(error) = error
            && super::is_cut_log(error)
        {
            self.replaced.store(true, Ordering::Release);
            self.poison(CUT);
        }
    }

    /// What closing a connection must not do to the log of a file that failed.
    pub(super) fn before_closing(&self, conn: &rusqlite::Connection) {
        if self.has_failed() && !self.can_be_saved() {
            keep_log(conn, true);
        }
    }
}
