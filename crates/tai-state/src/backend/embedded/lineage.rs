//! Tells whether a write-ahead log belongs to the file that it stands beside.
//!
//! SQLite folds in any log that is whole in itself. When the file has been replaced by another store, or by
//! an older copy of itself, while the log of the former one was left there, the outcome is a mixture of
//! both, or the former store over the copy. So every commit marks the file: with a mark of its own, drawn
//! at random, and the one of the commit before it. Both stand on the page of the notes, which every commit
//! writes, so the log knows the mark of the file that it was begun on, and those of all its commits.
//!
//! The file alone says one of them: the first before anything was folded in, any other afterwards, whole or
//! cut short (pages of several commits mixed, the page of the notes torn). Folding the log in is right
//! for each of these. A mark that the log does not know is that of another store or another moment.
//!
//! The page is read as it stands: SQLite cannot be asked what a file says without its log.
//! The format is <https://www.sqlite.org/fileformat2.html#b_tree_pages>.

use std::io;
use std::path::Path;

use super::file::meta;
use super::held::Held;
use super::log;
use super::tables::row_crc;

/// The page of the notes: the first table is made there, and `VACUUM` puts it there again.
pub(super) const PAGE_OF_NOTES: u32 = 3;
const TABLE_LEAF: u8 = 0x0d;
/// Another process may go on to a new log between two looks.
const LOOKS: u32 = 6;

/// What a page of notes says about the commit that wrote it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Notes {
    pub(super) store: Option<String>,
    /// Its own mark.
    pub(super) commit: Option<String>,
    /// That of the commit before it.
    pub(super) before: Option<String>,
}

impl Notes {
    /// What can be read of it: a row whose check does not hold says nothing.
    pub(super) fn of(page: &[u8]) -> Self {
        let mut notes = Self::default();
        for (name, value) in rows(page).unwrap_or_default() {
            match name.as_str() {
                meta::STORE => notes.store = Some(value),
                meta::COMMIT => {
                    let (commit, before) = value.split_once(' ').unwrap_or((&value, ""));
                    notes.commit = Some(commit.to_owned());
                    notes.before = Some(before.to_owned());
                }
                _ => {}
            }
        }
        notes
    }
}

/// Why the log is not that of this file, if it is not.
///
/// # Errors
/// When one of the two cannot be read.
pub(super) fn stranger(held: &Held, log: &Path) -> io::Result<Option<String>> {
    let mut last = None;
    for _ in 0..LOOKS {
        // The file before the log: of what another process folds in meanwhile, the log knows all.
        let generation = log::generation(log)?;
        let notes = Notes::of(&held.page(PAGE_OF_NOTES)?);
        let Some(found) = log::read(log)? else { return Ok(None) };
        if generation != Some(found.generation) {
            continue;
        }
        let Some(reason) = found.says.differs_from(&notes) else { return Ok(None) };
        let seen = Some((notes, generation));
        if seen == last {
            return Ok(Some(reason));
        }
        last = seen;
    }
    // Somebody is writing, and has looked before.
    Ok(None)
}

/// The rows of the table of notes whose checks hold; `None` if the page is no leaf of a table.
fn rows(page: &[u8]) -> Option<Vec<(String, String)>> {
    if *page.first()? != TABLE_LEAF {
        return None;
    }
    let cells = usize::from(u16::from_be_bytes([*page.get(3)?, *page.get(4)?]));
    let places = page.get(8..8 + cells * 2)?.as_chunks::<2>().0;
    Some(
        places
            .iter()
            .filter_map(|place| row(page.get(usize::from(u16::from_be_bytes(*place))..)?))
            .collect(),
    )
}

/// One row: name, value, check.
fn row(cell: &[u8]) -> Option<(String, String)> {
    let (size, rest) = varint(cell)?;
    let (_, rest) = varint(rest)?;
    let record = rest.get(..size)?;
    let (header, rest) = varint(record)?;
    let types = record.get(record.len() - rest.len()..header)?;
    let (name, types) = varint(types)?;
    let (value, types) = varint(types)?;
    let (crc, types) = varint(types)?;
    if !types.is_empty() {
        return None;
    }
    let (name, rest) = text(name, record.get(header..)?)?;
    let (value, rest) = text(value, rest)?;
    let crc = match crc {
        8 => 0,
        9 => 1,
        1..=6 => {
            let width = [1, 2, 3, 4, 6, 8].get(crc - 1)?;
            rest.get(..*width)?.iter().fold(0u64, |sum, byte| (sum << 8) | u64::from(*byte))
        }
        _ => return None,
    };
    (crc == u64::from(row_crc(&[&name, &value]))).then_some((name, value))
}

fn text(kind: usize, from: &[u8]) -> Option<(String, &[u8])> {
    let length = kind.checked_sub(13).filter(|twice| twice % 2 == 0)? / 2;
    let (text, rest) = from.split_at_checked(length)?;
    Some((String::from_utf8(text.to_vec()).ok()?, rest))
}

/// SQLite's number of one to nine bytes; what would not fit a page is none.
fn varint(from: &[u8]) -> Option<(usize, &[u8])> {
    let mut number = 0usize;
    for (at, byte) in from.iter().take(4).enumerate() {
        number = (number << 7) | usize::from(byte & 0x7f);
        if byte & 0x80 == 0 {
            return Some((number, from.get(at + 1..)?));
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::PathBuf;

    use rusqlite::Connection;

    use super::super::file::sidecar;
    use super::super::tests::{open, put};
    use super::*;
    use crate::backend::{Backend as _, Read as _};
    use crate::clock::random_id;

    /// A store's file, and its log if there is one, as a kill would leave them.
    #[derive(Clone)]
    struct Left {
        file: Vec<u8>,
        log: Vec<u8>,
    }

    impl Left {
        fn of(path: &Path) -> Self {
            Self { file: fs::read(path).unwrap(), log: fs::read(wal(path)).unwrap_or_default() }
        }

        fn put_at(&self, path: &Path) {
            fs::write(path, &self.file).unwrap();
            fs::write(wal(path), &self.log).unwrap();
        }
    }

    fn wal(path: &Path) -> PathBuf {
        sidecar(path, "-wal")
    }

    /// So many commits of its own, and what stands there before the handle is closed.
    async fn commits(path: &Path, names: impl IntoIterator<Item = String>) -> Left {
        let backend = open(path).await.unwrap();
        for name in names {
            backend.commit(vec![put(&name)]).await.unwrap();
        }
        let left = Left::of(path);
        drop(backend);
        left
    }

    fn named(what: &str, count: usize) -> impl Iterator<Item = String> {
        (0..count).map(move |n| format!("{what}{n}"))
    }

    async fn states(path: &Path) -> usize {
        let backend = open(path).await.unwrap();
        assert_eq!(backend.check_structure().await.unwrap(), Vec::<String>::new());
        let key = put("a").key;
        let names = backend.names(&key.governor, key.kind, None, 10_000);
        names.await.unwrap().len()
    }

    /// It is refused, nothing is touched, and without the log the file is what it was.
    async fn is_refused(file: &[u8], log: &[u8], what: &str) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("k.tai");
        Left { file: file.to_vec(), log: log.to_vec() }.put_at(&path);
        let refused = open(&path).await.map(|_| ()).expect_err(what);
        assert_eq!(refused.code(), "corrupt", "{what}: {refused}");
        assert!(refused.to_string().contains("k.tai-wal"), "{what}: {refused}");
        assert!(fs::read(&path).unwrap() == file, "{what}: the file was changed");
        assert!(fs::read(wal(&path)).unwrap() == log, "{what}: the log was changed");
        fs::remove_file(wal(&path)).unwrap();
        drop(open(&path).await.expect(what));
    }

    #[tokio::test]
    async fn a_log_of_another_file_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.tai");
        let base = commits(&path, named("base", 3)).await;
        let backup = fs::read(&path).unwrap();
        let first = commits(&path, named("first", 3)).await;
        let middle = fs::read(&path).unwrap();
        let last = commits(&path, named("last", 3)).await;
        let newest = fs::read(&path).unwrap();
        let other = folder.path().join("b.tai");
        commits(&other, named("base", 3)).await;
        let other = fs::read(&other).unwrap();
        is_refused(&other, &last.log, "another store").await;
        is_refused(&backup, &last.log, "an older copy").await;
        is_refused(&newest, &first.log, "a newer copy").await;
        is_refused(&newest, &base.log, "a much newer copy").await;
        // As many commits on the same backup, but not the same.
        let branch = folder.path().join("c.tai");
        fs::write(&branch, &backup).unwrap();
        let branched = commits(&branch, named("else", 3)).await;
        let on = commits(&branch, named("more", 3)).await;
        is_refused(&middle, &on.log, "a log begun on another branch").await;
        is_refused(&fs::read(&branch).unwrap(), &last.log, "a file of another branch").await;
        // What belongs together.
        for (left, expected) in [(&first, 6), (&last, 9), (&branched, 6), (&on, 9)] {
            let path = folder.path().join("d.tai");
            left.put_at(&path);
            assert_eq!(states(&path).await, expected);
        }
    }

    #[tokio::test]
    async fn a_log_of_another_program_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.tai");
        commits(&path, named("a", 3)).await;
        for size in [4096, 1024] {
            let other = folder.path().join(format!("{size}.db"));
            let conn = Connection::open(&other).unwrap();
            conn.pragma_update(None, "page_size", size).unwrap();
            conn.pragma_update(None, "journal_mode", "WAL").unwrap();
            conn.execute_batch("CREATE TABLE t (x); CREATE TABLE u (x); CREATE TABLE v (x)")
                .unwrap();
            let log = fs::read(wal(&other)).unwrap();
            is_refused(&fs::read(&path).unwrap(), &log, &format!("pages of {size}")).await;
        }
    }

    /// What is refused for another reason keeps its log too, which is all that there is of its last commits.
    #[tokio::test]
    async fn a_file_that_is_refused_keeps_its_log() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.tai");
        let backend = open(&path).await.unwrap();
        backend.commit(vec![put("a")]).await.unwrap();
        let other = Connection::open(&path).unwrap();
        other.execute_batch("DROP INDEX state_by_hash").unwrap();
        let left = Left::of(&path);
        drop((other, backend));
        let path = folder.path().join("b.tai");
        left.put_at(&path);
        assert_eq!(open(&path).await.unwrap_err().code(), "corrupt");
        let now = Left::of(&path);
        assert!(now.file == left.file && now.log == left.log);
    }

    /// It is met when the log is folded in, and is no failure of the disk.
    #[tokio::test]
    async fn a_file_that_was_cut_off_is_damaged() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.tai");
        commits(&path, named(&"long".repeat(200), 600)).await;
        let mut left = commits(&path, named("a", 3)).await;
        assert!(left.file.len() > 400_000, "{}", left.file.len());
        left.file.truncate(16 * 4096);
        left.put_at(&path);
        let refused = open(&path).await.unwrap_err();
        assert_eq!(refused.code(), "corrupt", "{refused}");
        let now = Left::of(&path);
        assert!(now.file == left.file && now.log == left.log);
    }

    /// A kill or a power cut while the log is folded in leaves pages of several commits, and torn ones;
    /// whatever they are, the log makes them whole.
    #[tokio::test]
    async fn a_file_that_the_log_is_half_folded_into_is_its_own() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.tai");
        commits(&path, named("a", 40)).await;
        let base = fs::read(&path).unwrap();
        let backend = open(&path).await.unwrap();
        let mut files = vec![base];
        let mut reader = None;
        for n in 0..4 {
            // Several at once, so that the revision leaps.
            for name in named(&format!("b{n}-"), 20) {
                backend.commit(vec![put(&name), put(&format!("{name}'"))]).await.unwrap();
            }
            // A reading that lasts keeps the log from being begun anew.
            let next = Connection::open(&path).unwrap();
            next.execute_batch("BEGIN; SELECT count(*) FROM meta").unwrap();
            drop(reader.replace(next));
            let fold = Connection::open(&path).unwrap();
            fold.query_row("PRAGMA wal_checkpoint(PASSIVE)", [], |_| Ok(())).unwrap();
            files.push(fs::read(&path).unwrap());
        }
        let left = Left::of(&path);
        drop((reader, backend));
        let whole = left.file.len();
        files.iter_mut().for_each(|file| file.resize(whole, 0));
        let half = folder.path().join("half.tai");
        for round in 0..60 {
            let mut drawn = random_id().as_u128();
            let mut file = Vec::with_capacity(whole);
            // Pages, and sectors of the pages that are rewritten most.
            let piece = if round % 2 == 0 { 4096 } else { 512 };
            for at in (0..whole).step_by(piece) {
                // The first page is written by every one that grows; its header stays whole.
                let from = if at < 4096 {
                    files.len() - 1
                } else {
                    (drawn % files.len() as u128) as usize
                };
                drawn = drawn.rotate_right(7) ^ random_id().as_u128();
                file.extend_from_slice(&files[from][at..at + piece]);
            }
            Left { file, ..left.clone() }.put_at(&half);
            assert_eq!(states(&half).await, 40 + 4 * 40, "round {round}");
            let _ = fs::remove_file(wal(&half));
        }
    }

    /// Where others write and fold at the same time, nobody is refused.
    #[tokio::test(flavor = "multi_thread")]
    async fn a_file_that_is_written_meanwhile_is_its_own() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.tai");
        let backend = open(&path).await.unwrap();
        let fold = Connection::open(&path).unwrap();
        let mut opened = 0;
        for n in 0..150 {
            backend.commit(vec![put(&format!("s{}", n % 7))]).await.unwrap();
            let opening = tokio::spawn({
                let path = path.clone();
                async move { open(&path).await.map(|_| ()) }
            });
            let how = if n % 3 == 0 { "PASSIVE" } else { "RESTART" };
            let _ = fold.query_row(&format!("PRAGMA wal_checkpoint({how})"), [], |_| Ok(()));
            backend.commit(vec![put("t")]).await.unwrap();
            opening.await.unwrap().unwrap();
            opened += 1;
        }
        assert_eq!(opened, 150);
    }

    #[tokio::test]
    async fn the_notes_are_read_as_sqlite_reads_them() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.tai");
        let mut seen = Vec::new();
        for n in 0..3 {
            commits(&path, [format!("s{n}")]).await;
            let held = Held::open(&path, &fs::metadata(&path).unwrap()).unwrap();
            let notes = Notes::of(&held.page(PAGE_OF_NOTES).unwrap());
            drop(held);
            let conn = Connection::open(&path).unwrap();
            let value = |name: &str| {
                let sql = "SELECT value FROM meta WHERE name = ?1";
                conn.query_row(sql, [name], |row| row.get::<_, String>(0)).unwrap()
            };
            let commit = notes.commit.clone().unwrap();
            assert_eq!(notes.store.clone().unwrap(), value(meta::STORE));
            assert_eq!(format!("{commit} {}", notes.before.clone().unwrap()), value(meta::COMMIT));
            seen.push(notes);
            conn.execute_batch("VACUUM").unwrap();
        }
        assert_eq!(seen[1].before, seen[0].commit);
        assert_eq!(seen[2].before, seen[1].commit);
    }

    #[test]
    fn any_bytes_can_be_a_page() {
        for round in 0..2_000u32 {
            let mut page: Vec<u8> = (0..64)
                .flat_map(|_| random_id().into_bytes())
                .take(1 + round as usize % 700)
                .collect();
            page[0] = TABLE_LEAF;
            assert_eq!(Notes::of(&page), Notes::default());
        }
        assert_eq!(Notes::of(&[]), Notes::default());
    }
}
