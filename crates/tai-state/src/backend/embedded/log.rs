//! Reads a write-ahead log, and tells a damaged one from one that merely ends in the middle of a commit.
//!
//! SQLite takes the first frame whose checksum fails for the end of its log, which is right after
//! a crash: the last commit may be incomplete, and it was not acknowledged. But when the bad frame
//! stands before commits that came later, then it was whole once, since every commit is synced before
//! the next is begun; and SQLite would pass over acknowledged commits in silence. So the log is read
//! before SQLite recovers from it.
//!
//! What cannot be told from a crash is damage to the last commit, and to the one before it when its
//! very mark of being a commit is hit.
//!
//! The format is <https://www.sqlite.org/fileformat2.html#the_write_ahead_log>.

use std::collections::{BTreeSet, HashMap};
use std::fs::File;
use std::io::{self, BufReader, Read};
use std::path::Path;

use super::lineage::{Notes, PAGE_OF_NOTES};

const HEADER: usize = 32;
const FRAME_HEADER: usize = 24;
pub(super) const PAGE: usize = 4096;
/// Checksums in the byte order of little-endian machines; one more is big-endian.
const MAGIC: u32 = 0x377f_0682;

/// How the log can be read.
#[derive(Debug, PartialEq, Eq)]
enum Verdict {
    /// To its end, or to a commit that was cut short.
    Sound,
    /// The frame at this place is bad, and commits stand behind it.
    Damaged { frame: u64 },
}

/// What a log was found to be.
#[derive(Debug)]
pub(super) struct Found {
    verdict: Verdict,
    /// Which of the logs that follow one another in this file it is: their header's bytes.
    pub(super) generation: [u8; HEADER],
    pub(super) says: Says,
}

/// What the whole commits of a log say about the file that they belong to.
#[derive(Debug, Default)]
pub(super) struct Says {
    /// It is sound, but its pages are not as large as those of a store.
    has_other_pages: bool,
    /// Where a store has its notes, it has something else.
    has_no_notes: bool,
    stores: BTreeSet<String>,
    /// The mark of the file that the log was begun on, and those of its commits.
    marks: BTreeSet<String>,
}

impl Says {
    fn note(&mut self, notes: Notes) {
        self.has_no_notes |= notes == Notes::default();
        self.stores.extend(notes.store);
        self.marks.extend(notes.commit.into_iter().chain(notes.before));
    }

    /// Why this is not the log of the file that has these notes, if it cannot be.
    pub(super) fn differs_from(&self, file: &Notes) -> Option<String> {
        if self.has_other_pages {
            return Some("its pages have another size".to_owned());
        }
        if self.has_no_notes && file.store.is_some() {
            return Some("it is not that of a store".to_owned());
        }
        if let Some(store) = &file.store
            && let Some(other) = self.stores.iter().find(|other| *other != store)
        {
            return Some(format!("it is that of the store {other}, and the file is {store}"));
        }
        let is_known = file.commit.as_ref().is_none_or(|mark| self.marks.contains(mark));
        (!is_known && !self.marks.is_empty())
            .then(|| "it does not go on from where the file stands".to_owned())
    }
}

/// The header of a log, by which it is told from the next one in the same file; `None` where there is
/// no log, or less than a header of it.
pub(super) fn generation(log: &Path) -> io::Result<Option<[u8; HEADER]>> {
    let mut header = [0; HEADER];
    let Some(mut log) = open(log)? else { return Ok(None) };
    Ok(fill(&mut log, &mut header)?.then_some(header))
}

/// Reads a log to its end; `None` where there is none.
pub(super) fn read(log: &Path) -> io::Result<Option<Found>> {
    let Some(log) = open(log)? else { return Ok(None) };
    read_from(BufReader::with_capacity(1 << 16, log)).map(Some)
}

fn open(log: &Path) -> io::Result<Option<File>> {
    match File::open(log) {
        Ok(file) => Ok(Some(file)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// Why the log cannot be trusted, if it cannot.
///
/// # Errors
/// When it cannot be read.
pub(super) fn damage(log: &Path) -> io::Result<Option<String>> {
    let mut last = None;
    // Another process may be writing: what it has half written looks bad until it is whole. Only
    // what stays bad at the same place is.
    for _ in 0..3 {
        let Some(found) = read(log)? else { return Ok(None) };
        match found.verdict {
            Verdict::Sound => return Ok(None),
            Verdict::Damaged { frame } if last.is_none_or(|last| last == frame) => {
                last = Some(frame);
            }
            Verdict::Damaged { .. } => return Ok(None),
        }
    }
    Ok(last.map(|frame| {
        format!("frame {frame} of its write-ahead log is bad, and commits stand behind it")
    }))
}

fn read_from(mut log: impl Read) -> io::Result<Found> {
    let mut generation = [0; HEADER];
    let mut says = Says::default();
    if !fill(&mut log, &mut generation)? {
        return Ok(Found { verdict: Verdict::Sound, generation, says });
    }
    let header = generation;
    let word = |bytes: &[u8], at: usize| {
        let bytes = bytes.get(at..at + 4).and_then(|bytes| <[u8; 4]>::try_from(bytes).ok());
        bytes.map(u32::from_be_bytes).unwrap_or_default()
    };
    let big_endian = word(&header, 0) == MAGIC + 1;
    let mut seed = sum((0, 0), header.get(..24).unwrap_or_default(), big_endian);
    let is_log =
        word(&header, 0) | 1 == MAGIC | 1 && seed == (word(&header, 24), word(&header, 28));
    says.has_other_pages = is_log && word(&header, 8) as usize != PAGE;
    let is_sound = is_log && !says.has_other_pages;
    let mut salts = is_sound.then(|| (word(&header, 16), word(&header, 20)));
    let mut first_bad = if is_sound { None } else { Some(0) };
    let mut commits_behind = 0;
    // Without a header nothing says which log it is, nor in which order its bytes are: each is counted.
    let mut without_header: HashMap<(u32, u32), u64> = HashMap::new();
    let mut frame = [0; FRAME_HEADER + PAGE];
    let mut number = 0u64;
    // Of a commit that is not whole yet.
    let mut under_way = Vec::new();
    while fill(&mut log, &mut frame)? {
        number += 1;
        let (head, page) = frame.split_at(FRAME_HEADER);
        let its_salts = (word(head, 8), word(head, 12));
        // Without a header the first frame says which log it is.
        let is_current = *salts.get_or_insert(its_salts) == its_salts;
        let its_sum = (word(head, 16), word(head, 20));
        let sum_of = |big_endian| {
            sum(sum(seed, head.get(..8).unwrap_or_default(), big_endian), page, big_endian)
        };
        let follows = its_sum == sum_of(big_endian);
        let is_commit = word(head, 4) != 0;
        if !is_sound && is_commit && (follows || its_sum == sum_of(!big_endian)) {
            *without_header.entry(its_salts).or_default() += 1;
        }
        if first_bad.is_none() && !(is_current && follows) {
            first_bad = Some(number);
            // Its own commit counts, if that is what it was.
            commits_behind += u64::from(is_current && is_commit);
        } else if first_bad.is_some() && is_current && follows {
            commits_behind += u64::from(is_commit);
        }
        if first_bad.is_none() {
            if word(head, 0) == PAGE_OF_NOTES {
                under_way.push(Notes::of(page));
            }
            if is_commit {
                under_way.drain(..).for_each(|notes| says.note(notes));
            }
        }
        // Each frame is seeded by what the one before it says, so that frames behind a bad one can
        // be told from remains of an older log.
        seed = its_sum;
    }
    let commits_behind = without_header.into_values().max().unwrap_or_default().max(commits_behind);
    let verdict = match first_bad {
        // One commit may have been under way.
        Some(frame) if commits_behind >= 2 => Verdict::Damaged { frame },
        _ => Verdict::Sound,
    };
    Ok(Found { verdict, generation, says })
}

/// SQLite's checksum over pairs of words.
fn sum((mut a, mut b): (u32, u32), bytes: &[u8], big_endian: bool) -> (u32, u32) {
    let word = |bytes: [u8; 4]| {
        if big_endian { u32::from_be_bytes(bytes) } else { u32::from_le_bytes(bytes) }
    };
    let (pairs, _) = bytes.as_chunks::<8>();
    for [p, q, r, s, t, u, v, w] in pairs {
        a = a.wrapping_add(word([*p, *q, *r, *s])).wrapping_add(b);
        b = b.wrapping_add(word([*t, *u, *v, *w])).wrapping_add(a);
    }
    (a, b)
}

/// Reads exactly so many bytes; `false` at the end of the log.
fn fill(log: &mut impl Read, into: &mut [u8]) -> io::Result<bool> {
    match log.read_exact(into) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(false),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rusqlite::Connection;

    /// A log of `commits` commits, as SQLite writes it; each is a few frames.
    fn log(commits: u32) -> Vec<u8> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.db");
        let conn = Connection::open(&path).unwrap();
        conn.pragma_update(None, "journal_mode", "WAL").unwrap();
        conn.execute_batch("CREATE TABLE t (x)").unwrap();
        for _ in 1..commits {
            conn.execute("INSERT INTO t VALUES (randomblob(6000))", []).unwrap();
        }
        std::fs::read(folder.path().join("a.db-wal")).unwrap()
    }

    fn verdict(log: &[u8]) -> Verdict {
        read_from(log).unwrap().verdict
    }

    fn frames(log: &[u8]) -> usize {
        (log.len() - HEADER) / (FRAME_HEADER + PAGE)
    }

    fn commit_frames(log: &[u8]) -> Vec<usize> {
        let at = |frame: usize| HEADER + frame * (FRAME_HEADER + PAGE);
        (0..frames(log)).filter(|frame| log[at(*frame) + 4..at(*frame) + 8] != [0; 4]).collect()
    }

    #[test]
    fn a_log_is_sound_wherever_it_ends() {
        let whole = log(6);
        assert!(commit_frames(&whole).len() == 6 && frames(&whole) > 12);
        for end in (0..whole.len()).step_by(509).chain([whole.len()]) {
            assert_eq!(verdict(&whole[..end]), Verdict::Sound, "cut at {end}");
        }
        // What is left of an older log behind the current one is no damage: its salts differ.
        let mut older = whole.clone();
        older.extend_from_slice(&log(6)[HEADER..]);
        assert_eq!(verdict(&older), Verdict::Sound);
    }

    #[test]
    fn every_flipped_bit_before_the_last_two_commits_is_noticed() {
        let whole = log(8);
        let commits = commit_frames(&whole);
        let end_of = |commit: usize| HEADER + (commits[commit] + 1) * (FRAME_HEADER + PAGE);
        let near_a_header =
            |at: usize| (at - HEADER.min(at)) % (FRAME_HEADER + PAGE) < FRAME_HEADER;
        for at in (0..end_of(5)).filter(|at| *at < 200 || at % 97 == 0 || near_a_header(*at)) {
            let mut flipped = whole.clone();
            flipped[at] ^= 0x04;
            let verdict = verdict(&flipped);
            assert!(matches!(verdict, Verdict::Damaged { .. }), "byte {at}: {verdict:?}");
        }
    }

    #[test]
    fn every_damage_to_the_beginning_is_noticed() {
        let whole = log(8);
        for at in 0..HEADER + FRAME_HEADER {
            for bit in 0..8 {
                let mut flipped = whole.clone();
                flipped[at] ^= 1 << bit;
                assert!(matches!(verdict(&flipped), Verdict::Damaged { .. }), "{at} {bit}");
            }
        }
        for size in [32, 40, 44, 56, 512, 4096, 8192] {
            let mut zeroed = whole.clone();
            zeroed[..size].fill(0);
            assert!(matches!(verdict(&zeroed), Verdict::Damaged { .. }), "{size}");
        }
    }

    /// A power cut may keep some of the last commit's frames and lose others.
    #[test]
    fn a_torn_last_commit_is_no_damage() {
        let whole = log(5);
        let commits = commit_frames(&whole);
        for frame in commits[3] + 1..frames(&whole) {
            for sector in 0..8 {
                let mut torn = whole.clone();
                let at = HEADER + frame * (FRAME_HEADER + PAGE) + sector * 512;
                torn[at..at + 512].fill(0);
                assert_eq!(verdict(&torn), Verdict::Sound, "frame {frame}, sector {sector}");
            }
        }
    }
}
