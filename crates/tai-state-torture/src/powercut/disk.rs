//! What a disk holds: what was synced, and what a power cut may keep of the rest.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

/// What a sector is on the disks that promise least.
pub(super) const SECTOR: u64 = 512;

/// A file, whatever names it has.
pub(super) type Node = usize;

/// One thing that happened, in the order of the trace.
#[derive(Debug, Clone)]
pub(super) enum Event {
    Write {
        node: Node,
        at: u64,
        data: Arc<[u8]>,
    },
    Truncate {
        node: Node,
        len: u64,
    },
    Name(Naming),
    /// A file was synced. It covers what ended before it began: the events before this one.
    Sync {
        node: Node,
        begun: usize,
    },
    /// The folder was synced.
    SyncFolder {
        begun: usize,
    },
    /// The user was told something: the next of the list of those.
    Told,
    /// A process starts.
    Start,
}

/// A change of the folder.
#[derive(Debug, Clone)]
pub(super) enum Naming {
    Given { name: String, node: Node },
    Taken { name: String, node: Node },
    Renamed { from: String, to: String, node: Node },
}

impl Naming {
    fn apply(&self, names: &mut BTreeMap<String, Node>) {
        let mut take = |name: &String, node: &Node| {
            if names.get(name) == Some(node) {
                names.remove(name);
            }
        };
        match self {
            Self::Given { name, node } => {
                names.insert(name.clone(), *node);
            }
            Self::Taken { name, node } => take(name, node),
            Self::Renamed { from, to, node } => {
                take(from, node);
                names.insert(to.clone(), *node);
            }
        }
    }
}

/// What is kept of one event: all of it, or these bytes of a write.
pub(super) type Kept = (usize, Option<Vec<Range<usize>>>);

/// A folder's files as they are read back after the cut.
pub(super) type Image = BTreeMap<String, Vec<u8>>;

#[derive(Debug, Clone, Default)]
struct File {
    synced: Vec<u8>,
    since: Vec<usize>,
}

/// The disk after some of the events.
#[derive(Debug, Clone, Default)]
pub(super) struct Disk {
    files: Vec<File>,
    names: BTreeMap<String, Node>,
    since: Vec<usize>,
    /// For the control: a disk that says "synced" and has done nothing.
    pub(super) lies: bool,
}

impl Disk {
    /// A disk on which this is safe.
    pub(super) fn of(image: &Image) -> Self {
        let files = image.values().map(|bytes| File { synced: bytes.clone(), since: Vec::new() });
        let names = image.keys().cloned().zip(0..).collect();
        Self { files: files.collect(), names, ..Self::default() }
    }

    pub(super) fn names(&self) -> &BTreeMap<String, Node> {
        &self.names
    }

    pub(super) fn take(&mut self, events: &[Event], at: usize) {
        match &events[at] {
            Event::Write { node, .. } | Event::Truncate { node, .. } => {
                if self.files.len() <= *node {
                    self.files.resize(node + 1, File::default());
                }
                self.files[*node].since.push(at);
            }
            Event::Name(_) => self.since.push(at),
            Event::Sync { node, begun } if !self.lies => self.sync(events, *node, *begun),
            Event::SyncFolder { begun } if !self.lies => self.sync_folder(events, *begun),
            // What earlier processes have left is there: each is judged by what it does itself.
            Event::Start if self.lies => self.sync_all(events),
            _ => {}
        }
    }

    fn sync(&mut self, events: &[Event], node: Node, before: usize) {
        let Some(file) = self.files.get_mut(node) else { return };
        let covered = file.since.partition_point(|at| *at < before);
        for at in file.since.drain(..covered) {
            change(&mut file.synced, &events[at], None);
        }
    }

    fn sync_folder(&mut self, events: &[Event], before: usize) {
        let covered = self.since.partition_point(|at| *at < before);
        for at in self.since.drain(..covered) {
            if let Event::Name(naming) = &events[at] {
                naming.apply(&mut self.names);
            }
        }
    }

    /// Everything is safe, as after an orderly shutdown.
    pub(super) fn sync_all(&mut self, events: &[Event]) {
        for node in 0..self.files.len() {
            self.sync(events, node, usize::MAX);
        }
        self.sync_folder(events, usize::MAX);
    }

    /// What a power cut may lose.
    pub(super) fn unsynced(&self) -> Vec<usize> {
        let mut all: Vec<usize> = self.files.iter().flat_map(|file| &file.since).copied().collect();
        all.extend(&self.since);
        all.sort_unstable();
        all
    }

    /// What is found when this much of what was unsynced has reached the disk, in this order.
    pub(super) fn image(&self, events: &[Event], kept: &[Kept]) -> Image {
        let mut names = self.names.clone();
        for (at, _) in kept {
            if let Event::Name(naming) = &events[*at] {
                naming.apply(&mut names);
            }
        }
        let content = |node: Node| {
            let mut bytes =
                self.files.get(node).map(|file| file.synced.clone()).unwrap_or_default();
            for (at, part) in kept {
                match &events[*at] {
                    Event::Write { node: of, .. } | Event::Truncate { node: of, .. }
                        if *of == node =>
                    {
                        change(&mut bytes, &events[*at], part.as_deref());
                    }
                    _ => {}
                }
            }
            bytes
        };
        names.into_iter().map(|(name, node)| (name, content(node))).collect()
    }
}

/// Does to a file's content what an event did, or a part of it.
fn change(bytes: &mut Vec<u8>, event: &Event, part: Option<&[Range<usize>]>) {
    match event {
        Event::Truncate { len, .. } => bytes.resize(*len as usize, 0),
        Event::Write { at, data, .. } => {
            let whole = 0..data.len();
            let ranges = part.unwrap_or(std::slice::from_ref(&whole)).iter();
            for range in ranges.filter(|range| !range.is_empty()) {
                let place = *at as usize + range.start..*at as usize + range.end;
                if bytes.len() < place.end {
                    // A hole reads as zeros.
                    bytes.resize(place.end, 0);
                }
                bytes[place].copy_from_slice(&data[range.clone()]);
            }
        }
        _ => {}
    }
}

/// Where a write is cut by the sectors of the disk, as ranges of its own bytes.
pub(super) fn sectors(at: u64, len: usize) -> Vec<Range<usize>> {
    let mut ranges = Vec::new();
    let mut start = 0;
    while start < len {
        let room = SECTOR - (at + start as u64) % SECTOR;
        let end = len.min(start + room as usize);
        ranges.push(start..end);
        start = end;
    }
    ranges
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(node: Node, at: u64, bytes: &[u8]) -> Event {
        Event::Write { node, at, data: bytes.into() }
    }

    fn given(name: &str, node: Node) -> Event {
        Event::Name(Naming::Given { name: name.to_owned(), node })
    }

    fn disk(events: &[Event], lies: bool) -> Disk {
        let mut disk = Disk { lies, ..Disk::default() };
        (0..events.len()).for_each(|at| disk.take(events, at));
        disk
    }

    #[test]
    fn a_name_is_safe_only_with_its_folder_and_bytes_only_with_their_file() {
        let mut events =
            vec![given("a", 0), write(0, 0, b"one"), Event::Sync { node: 0, begun: 2 }];
        assert!(disk(&events, false).image(&events, &[]).is_empty());
        events.extend([Event::SyncFolder { begun: 3 }, write(0, 1, b"NE")]);
        let cut = disk(&events, false);
        assert_eq!(cut.unsynced(), [4]);
        assert_eq!(cut.image(&events, &[])["a"], b"one");
        assert_eq!(cut.image(&events, &[(4, None)])["a"], b"oNE");
        assert_eq!(cut.image(&events, &[(4, Some(sectors(511, 2)[1..].to_vec()))])["a"], b"onE");
        assert!(disk(&events, true).image(&events, &[]).is_empty());
        // A sync covers only what was there when it began.
        events.extend([write(0, 3, b"!"), Event::Sync { node: 0, begun: 5 }]);
        assert_eq!(disk(&events, false).unsynced(), [5]);
    }

    #[test]
    fn a_lost_removal_brings_the_file_back() {
        let mut events = vec![given("a", 0), write(0, 0, b"x"), Event::Sync { node: 0, begun: 2 }];
        events.push(Event::SyncFolder { begun: 3 });
        events.push(Event::Name(Naming::Taken { name: "a".into(), node: 0 }));
        events.push(given("a", 1));
        let cut = disk(&events, false);
        assert_eq!(cut.image(&events, &[])["a"], b"x");
        assert!(cut.image(&events, &[(4, None)]).is_empty());
        assert_eq!(cut.image(&events, &[(5, None)])["a"], b"");
    }

    #[test]
    fn sectors_lie_where_the_disk_has_them() {
        assert_eq!(sectors(500, 600), [0..12, 12..524, 524..600]);
    }
}
