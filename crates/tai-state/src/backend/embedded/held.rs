//! The file that this process holds, told from any other that may come to stand under its name.
//!
//! POSIX takes all locks of a process on a file away when the process closes *any* descriptor of that
//! file, those of SQLite included. So a file that is open here is never opened and closed beside
//! SQLite: its header is read through one descriptor that all handles of this process share, and that
//! is closed after the last of them.

use std::collections::HashMap;
use std::fs::{File, Metadata};
use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use super::log::PAGE;

/// Which file it is: device and number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct FileId(u64, u64);

impl FileId {
    /// Of the file under this path, if there is one.
    pub(crate) fn at(path: &Path) -> Option<Self> {
        path.metadata().ok().map(|found| id_of(&found))
    }
}

/// The files that are open in this process.
static OPEN: Mutex<Option<HashMap<FileId, Arc<File>>>> = Mutex::new(None);

/// A share of the one descriptor of a file. Drop it after the last connection.
#[derive(Debug)]
pub(crate) struct Held {
    id: FileId,
    /// `None` only while it is being dropped.
    file: Option<Arc<File>>,
}

impl Held {
    /// Opens the file for reading and writing, or shares what is open already.
    pub(crate) fn open(path: &Path, found: &Metadata) -> io::Result<Self> {
        let mut guard = OPEN.lock().unwrap_or_else(PoisonError::into_inner);
        let open = guard.get_or_insert_default();
        let id = id_of(found);
        if let Some(file) = open.get(&id).filter(|_| cfg!(unix)) {
            return Ok(Self { id, file: Some(Arc::clone(file)) });
        }
        // Opening for writing now tells a read-only file from one that fails later.
        let file = Arc::new(File::options().read(true).write(true).open(path)?);
        let id = id_of(&file.metadata()?);
        if let Some(other) = open.get(&id) {
            // The name came to mean another open file just now: this descriptor must stay open.
            std::mem::forget(file);
            return Ok(Self { id, file: Some(Arc::clone(other)) });
        }
        open.insert(id, Arc::clone(&file));
        Ok(Self { id, file: Some(file) })
    }

    /// The first 100 bytes, fewer if the file is shorter.
    pub(crate) fn header(&self) -> io::Result<Vec<u8>> {
        self.bytes(0, 100)
    }

    /// A page of the file alone, whatever its log says; less if the file is shorter.
    pub(crate) fn page(&self, number: u32) -> io::Result<Vec<u8>> {
        self.bytes(u64::from(number.saturating_sub(1)) * PAGE as u64, PAGE)
    }

    fn bytes(&self, from: u64, length: usize) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; length];
        let mut read = 0;
        while let Some(rest) = bytes.get_mut(read..).filter(|rest| !rest.is_empty()) {
            let Some(file) = &self.file else { break };
            match read_at(file, rest, from + read as u64)? {
                0 => break,
                more => read += more,
            }
        }
        bytes.truncate(read);
        Ok(bytes)
    }

    /// Whether the file under this path is still the one that is held.
    pub(crate) fn is_at(&self, path: &Path) -> bool {
        !cfg!(unix) || FileId::at(path) == Some(self.id)
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        // Under the lock, or another opening could take its locks just before this closes.
        let mut guard = OPEN.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(file) = self.file.take() else { return };
        // One is ours, one is the table's.
        if Arc::strong_count(&file) <= 2
            && let Some(open) = guard.as_mut()
        {
            open.remove(&self.id);
        }
        drop(file);
    }
}

#[cfg(unix)]
fn id_of(found: &Metadata) -> FileId {
    use std::os::unix::fs::MetadataExt;
    FileId(found.dev(), found.ino())
}

/// How many names (hard links) the file has.
#[cfg(unix)]
pub(crate) fn names_of(found: &Metadata) -> u64 {
    std::os::unix::fs::MetadataExt::nlink(found)
}

/// Whether it is the file that is mounted, and not a folder that it is in: a second name for it.
#[cfg(target_os = "linux")]
pub(crate) fn is_mounted_alone(path: &Path) -> bool {
    use rustix::fs::{AtFlags, CWD, StatxFlags, statx};
    // `None` where the system cannot tell (before Linux 5.8).
    let mount = |path: &Path| {
        let found = statx(CWD, path, AtFlags::empty(), StatxFlags::MNT_ID).ok()?;
        let is_told = found.stx_mask & StatxFlags::MNT_ID.bits() != 0;
        is_told.then_some(found.stx_mnt_id)
    };
    match (mount(path), path.parent().and_then(mount)) {
        (Some(file), Some(folder)) => file != folder,
        _ => false,
    }
}

#[cfg(not(target_os = "linux"))]
pub(crate) fn is_mounted_alone(_: &Path) -> bool {
    false
}

#[cfg(unix)]
fn read_at(file: &File, into: &mut [u8], offset: u64) -> io::Result<usize> {
    std::os::unix::fs::FileExt::read_at(file, into, offset)
}

// Elsewhere locks belong to a handle, and closing another takes none away; a file that is open cannot
// be removed or replaced.
#[cfg(not(unix))]
fn id_of(_: &Metadata) -> FileId {
    FileId(0, 0)
}

#[cfg(not(unix))]
pub(crate) fn names_of(_: &Metadata) -> u64 {
    1
}

#[cfg(not(unix))]
fn read_at(mut file: &File, into: &mut [u8], offset: u64) -> io::Result<usize> {
    use std::io::{Read, Seek, SeekFrom};
    file.seek(SeekFrom::Start(offset))?;
    file.read(into)
}
