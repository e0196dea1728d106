//! What a file that cannot be opened is refused as, and with which reason.

use std::fs::File;
use std::io;
use std::path::Path;

use super::file::sidecar;
use super::rows::RowError;
use crate::error::Error;

pub(super) fn not_a_store(location: &str, reason: &str) -> Error {
    Error::NotAStore { location: location.to_owned(), reason: reason.to_owned() }
}

pub(super) fn damaged(location: &str, reason: &str) -> Error {
    Error::corrupt(format!("the file {location}"), reason)
}

/// A log that was left beside another file. Nothing was touched.
pub(super) fn not_its_log(path: &Path, location: &str, reason: &str) -> Error {
    let (log, shared) = (sidecar(path, "-wal"), sidecar(path, "-shm"));
    let (log, shared) = (log.display(), shared.display());
    let reason = format!(
        "the write-ahead log {log} beside it is not its own: {reason}. Put back the file that the log belongs \
         to; or, if this is a backup that was restored, remove {log} and {shared}"
    );
    damaged(location, &reason)
}

/// Whether SQLite says that what it reads is not as it was written.
pub(super) fn is_damage(error: &rusqlite::Error) -> bool {
    use rusqlite::ErrorCode::{DatabaseCorrupt, NotADatabase};
    matches!(error.sqlite_error_code(), Some(DatabaseCorrupt | NotADatabase))
}

pub(super) fn opening(location: &str, error: RowError) -> Error {
    use rusqlite::ErrorCode::{CannotOpen, SystemIoFailure};
    if let RowError::Sqlite(error) = &error
        && !super::is_full(error)
    {
        let (location, reason) = (location.to_owned(), error.to_string());
        match error.sqlite_error_code() {
            Some(CannotOpen) => {
                if let Some(error) = too_many_files() {
                    let reason = format!("{reason}: {error}");
                    return Error::Storage { location, reason };
                }
                // The file itself could be opened, so it is the folder: its log cannot be made.
                let reason = format!("{reason}: may files be made in its folder?");
                return Error::PermissionDenied { location, reason };
            }
            Some(SystemIoFailure) => return Error::Storage { location, reason },
            _ => {}
        }
    }
    crate::reader::lift(super::port_error(error, location), location)
}

pub(super) fn io_error(location: &str, error: &io::Error) -> Error {
    match error.kind() {
        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => {
            Error::PermissionDenied { location: location.to_owned(), reason: error.to_string() }
        }
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
            Error::StorageFull { location: location.to_owned() }
        }
        _ if is_too_many_files(error) => {
            Error::Storage { location: location.to_owned(), reason: error.to_string() }
        }
        _ => not_a_store(location, &error.to_string()),
    }
}

/// How many files SQLite wants at once for one connection: the file, its log, the shared memory, and
/// the folder that is synced.
const FILES_AT_ONCE: usize = 4;

/// Whether this process, or the machine, has no more files to give; SQLite does not say why it could not
/// open one.
fn too_many_files() -> Option<io::Error> {
    // Not the store's file: closing it would take its locks away.
    let opened: io::Result<Vec<File>> =
        (0..FILES_AT_ONCE).map(|_| File::open(std::env::temp_dir())).collect();
    opened.err().filter(is_too_many_files)
}

fn is_too_many_files(error: &io::Error) -> bool {
    // ENFILE and EMFILE, the same numbers on all systems of this kind.
    cfg!(unix) && matches!(error.raw_os_error(), Some(23 | 24))
}

/// As [`io_error`], for a file or folder that is there: what else happens is the disk's fault.
pub(super) fn failing(location: &str, error: &io::Error) -> Error {
    match io_error(location, error) {
        Error::NotAStore { location, reason } => Error::Storage { location, reason },
        typed => typed,
    }
}
