//! `import`: take in transitions from JSON Lines.
//!
//! One thread reads and checks lines; many tasks write, each state always by the same task, so that
//! the transitions of one state keep their order and the engine has a group to commit.
//!
//! What is there already is passed over. Where the beginning of a state's history was removed, nobody can
//! tell whether a line from then was there: it is passed over too, and counted apart, since written on top
//! it would make the past the newest version. One that stands behind lines that are kept is refused.

use std::cmp::Ordering;
use std::collections::hash_map::{DefaultHasher, Entry};
use std::collections::{HashMap, HashSet};
use std::hash::{Hash, Hasher};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::atomic::{AtomicBool, AtomicU64};

use chrono::{DateTime, Utc};
use serde_json::json;
use tai_state::{
    ChangeMetadata, Error, NewTransition, StateMachinePersister, StateStore, TransitionLine,
};
use tokio::runtime::Handle;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};

use crate::args::{Global, Import};
use crate::cmd::lines::Lines;
use crate::failure::{Failure, Outcome, exit, io};
use crate::{connect, output};

/// The action of a purge, in a log from elsewhere too.
const PURGE: &str = "purge";

/// Lines that wait for one task.
const QUEUE: usize = 16;

/// Bytes of lines that may be on their way at once; in memory a line takes a few times its text.
const WAITING_BYTES: u32 = 8 << 20;

/// A line on its way to the store.
struct Item {
    number: u64,
    line: TransitionLine,
    identity: String,
    /// Given back when the line is durable.
    _room: OwnedSemaphorePermit,
}

#[derive(Default)]
struct Counts {
    applied: AtomicU64,
    known: AtomicU64,
    older: AtomicU64,
    states: AtomicU64,
    failed: AtomicBool,
}

pub(crate) async fn run(global: &Global, args: &Import) -> Outcome {
    let path =
        if args.strict { checked(global, args).await? } else { Source::Named(args.file.clone()) };
    let lines = Lines::open(path.path())?;
    let store = connect(global, true).await?;
    let counts = Arc::new(Counts::default());
    let bar = output::progress(global, "importing", None);

    let mut queues = Vec::new();
    let mut tasks = Vec::new();
    for _ in 0..args.jobs {
        let (queue, items) = mpsc::channel(QUEUE);
        queues.push(queue);
        let worker = Worker {
            store: store.clone(),
            persister: StateMachinePersister::with_defaults(store.clone()),
            counts: Arc::clone(&counts),
            acks: args.acks,
            take_older: args.take_older,
            bar: bar.clone(),
            known: HashMap::new(),
        };
        tasks.push(tokio::spawn(worker.run(items)));
    }
    let stop = Arc::clone(&counts);
    let runtime = Handle::current();
    let reading = tokio::task::spawn_blocking(move || read(lines, &queues, &stop, &runtime));
    let read = match reading.await {
        Ok(read) => read,
        Err(error) => Err(Failure::new(exit::OTHER, "other", format!("reading stopped: {error}"))),
    };
    // What was read before a bad line is taken in all the same.
    let mut failures = Vec::new();
    for task in tasks {
        match task.await {
            Ok(Ok(())) => {}
            Ok(Err((number, failure))) => failures.push((number, failure)),
            Err(error) => {
                failures.push((0, Failure::new(exit::OTHER, "other", error.to_string())));
            }
        }
    }
    bar.finish_and_clear();
    let applied = counts.applied.load(Relaxed);
    let known = counts.known.load(Relaxed);
    let older = counts.older.load(Relaxed);
    let say = |failure: Failure| {
        let failure = failure.with("applied", applied).with("already_there", known);
        let failure = failure.with("older_than_history", older);
        match failure.exit {
            exit::UNAVAILABLE if applied > 0 => failure
                .with_exit(exit::PART_WAY)
                .hint("run it again: what was taken in is passed over"),
            _ => failure,
        }
    };
    // The first of the lines that failed; others behind it are met again in the next run.
    failures.sort_by_key(|(number, _)| *number);
    if let Some((_, failure)) = failures.into_iter().next() {
        return Err(say(failure));
    }
    read.map_err(say)?;
    let states = counts.states.load(Relaxed);
    let object = json!({
        "lines": applied + known + older, "applied": applied, "already_there": known,
        "older_than_history": older, "states": states,
    });
    let mut text =
        format!("{applied} transitions of {states} states taken in, {known} were there already");
    if older > 0 {
        text.push_str(&format!(
            ", {older} are older than the history that was kept and were passed over"
        ));
    }
    if args.acks {
        eprintln!("{object}");
        return Ok(());
    }
    output::object(global.output, &object, &text)
}

/// Where lines come from: the named file, or a copy of what can be read only once.
enum Source {
    Named(PathBuf),
    Copied(tempfile::NamedTempFile),
}

impl Source {
    fn path(&self) -> &Path {
        match self {
            Self::Named(path) => path,
            Self::Copied(file) => file.path(),
        }
    }
}

/// Reads everything and refuses all if one line is wrong, also beside what the store has: the deletion of a
/// state that is not there, or a line that nobody can tell to be new.
async fn checked(global: &Global, args: &Import) -> Outcome<Source> {
    let path = &args.file;
    let is_stdin = path.as_os_str() == "-";
    let name = if is_stdin { "standard input".to_owned() } else { path.display().to_string() };
    let failed = |error: std::io::Error| io(&name, &error);
    let source = if !is_stdin && path.metadata().map_err(failed)?.is_file() {
        Source::Named(path.clone())
    } else {
        // A pipe gives its bytes once, and they are read twice.
        let mut copy = tempfile::NamedTempFile::new().map_err(failed)?;
        if is_stdin {
            std::io::copy(&mut std::io::stdin(), &mut copy).map_err(failed)?;
        } else {
            let mut once = std::fs::File::open(path).map_err(failed)?;
            std::io::copy(&mut once, &mut copy).map_err(failed)?;
        }
        Source::Copied(copy)
    };
    let mut lines = Lines::open(source.path())?;
    let refuse = |failure: Failure| failure.hint("nothing was taken in (--strict)");
    let store = match connect(global, false).await {
        Ok(store) => Some(store),
        Err(failure) if failure.exit == exit::NOT_FOUND => None,
        Err(failure) => return Err(refuse(failure)),
    };
    let mut identities = Identities::default();
    let mut states: HashMap<(String, String), Known> = HashMap::new();
    while let Some(Read { number, line, .. }) = next(&mut lines).map_err(refuse)? {
        let identity = identities.of(&line);
        let known = match states.entry((line.governor_id.clone(), line.state_id.clone())) {
            Entry::Occupied(known) => known.into_mut(),
            Entry::Vacant(place) => place.insert(match &store {
                Some(store) => look(store, &line).await?,
                None => Known::default(),
            }),
        };
        let is_new = known.place(&line, &identity, args.take_older);
        let is_new = is_new.map_err(|failure| refuse(failure.with("line", number)))?;
        if is_new != Place::New {
            continue;
        }
        if line.deleted && !known.is_alive && line.action != PURGE {
            let message = format!("line {number}: it deletes a state that does not exist");
            let failure = Failure::new(exit::NOT_FOUND, "state_not_found", message);
            return Err(refuse(failure.with("line", number)));
        }
        known.take(known.version + 1, &line);
    }
    Ok(source)
}

/// A transition of the input.
pub(crate) struct Read {
    pub(crate) number: u64,
    pub(crate) line: TransitionLine,
    pub(crate) bytes: usize,
}

/// The next transition of the input, checked as far as it can be without the store.
pub(crate) fn next(lines: &mut Lines) -> Outcome<Option<Read>> {
    let Some(line) = lines.next()? else { return Ok(None) };
    let number = line.number;
    let text = line.text.to_owned();
    let place = lines.place(number);
    let line = TransitionLine::parse(&text, &place)
        .and_then(|line| line.check(&place).map(|()| line))
        .map_err(|error| {
            Failure::from(error)
                .with("line", number)
                .hint("the lines before it were taken in; mend the line and run it again")
        })?;
    Ok(Some(Read { number, line, bytes: text.len() }))
}

fn read(
    mut lines: Lines,
    queues: &[mpsc::Sender<Item>],
    counts: &Counts,
    runtime: &Handle,
) -> Outcome {
    let room = Arc::new(Semaphore::new(WAITING_BYTES as usize));
    let mut identities = Identities::default();
    while let Some(Read { number, line, bytes }) = next(&mut lines)? {
        if counts.failed.load(Relaxed) {
            return Ok(());
        }
        let identity = identities.of(&line);
        let mut hasher = DefaultHasher::new();
        (&line.governor_id, &line.state_id).hash(&mut hasher);
        let at = usize::try_from(hasher.finish() % queues.len() as u64).unwrap_or(0);
        let Some(queue) = queues.get(at) else { return Ok(()) };
        let bytes = u32::try_from(bytes).unwrap_or(WAITING_BYTES).min(WAITING_BYTES);
        let Ok(room) = runtime.block_on(Arc::clone(&room).acquire_many_owned(bytes)) else {
            return Ok(());
        };
        // A task that ended has failed, and says so itself.
        if queue.blocking_send(Item { number, line, identity, _room: room }).is_err() {
            return Ok(());
        }
    }
    Ok(())
}

/// How often each line was seen, by a hash of it: a collision only makes a count larger, the same in every
/// run.
#[derive(Default)]
struct Identities(HashMap<u64, u64>);

impl Identities {
    /// The identity of a line's event: equal lines have different ones.
    fn of(&mut self, line: &TransitionLine) -> String {
        let mut hasher = DefaultHasher::new();
        line.identity(0).hash(&mut hasher);
        let count = self.0.entry(hasher.finish()).or_default();
        let identity = line.identity(*count);
        *count += 1;
        identity
    }
}

/// What becomes of a line.
#[derive(Debug, PartialEq, Eq)]
enum Place {
    New,
    /// There is an event for it.
    Known,
    /// Its event may be one of those that were removed.
    Older,
}

/// What a worker knows of a state.
#[derive(Default)]
struct Known {
    version: u64,
    /// Whether there is one, and its newest version is no deletion.
    is_alive: bool,
    /// The version of each event that was there before, by its identity, and (`false`) by the identity that its
    /// line would have if it were exported: so that a store also knows its own export. Of several equal
    /// lines that may be another one.
    ids: HashMap<String, (u64, bool)>,
    /// Versions that a line was found for.
    met: HashSet<u64>,
    /// The first event that was kept, where earlier ones were removed: its version and time. Times never fall
    /// in a log, so what was removed is not later.
    kept_since: Option<(u64, DateTime<Utc>)>,
    /// The newest version whose own line was met, or that a line became. The lines of a state keep their
    /// order: what comes behind a line whose event is kept was not removed, whatever its time is.
    reached: u64,
}

impl Known {
    /// Whether there is an event for this line: its own, or one like it that no other line was found for.
    fn meets(&mut self, identity: &str) -> bool {
        let Some((version, is_its_own)) = self.ids.remove(identity) else { return false };
        let is_met = self.met.insert(version);
        if is_its_own {
            self.reached = self.reached.max(version);
        }
        is_met || is_its_own
    }

    /// What becomes of a line.
    ///
    /// # Errors
    /// When nobody can tell: it is older than all that is kept, and stands behind what is. Written on top it
    /// would make the past the newest version; passed over, it may be lost.
    fn place(&mut self, line: &TransitionLine, identity: &str, take_older: bool) -> Outcome<Place> {
        if self.meets(identity) {
            return Ok(Place::Known);
        }
        let Some((first, since)) = self.kept_since else { return Ok(Place::New) };
        let is_behind = self.reached >= first;
        match line.timestamp.cmp(&since) {
            Ordering::Greater => Ok(Place::New),
            Ordering::Equal if is_behind => Ok(Place::New),
            Ordering::Less if is_behind && take_older => Ok(Place::New),
            Ordering::Less if is_behind => {
                let (time, since) = (line.timestamp.to_rfc3339(), since.to_rfc3339());
                let message = format!(
                    "{}/{} of {time} is older than the history that is kept (since {since}), and stands behind \
                     lines that are kept",
                    line.governor_id, line.state_id
                );
                Err(Failure::new(exit::REJECTED, "older_than_history", message).hint(
                    "sort the lines of a state by time, so that old ones are passed over; or, if its clock was set \
                     back and they are new, give --take-older",
                ))
            }
            Ordering::Less | Ordering::Equal => Ok(Place::Older),
        }
    }

    /// Notes that the line became this version.
    fn take(&mut self, version: u64, line: &TransitionLine) {
        (self.version, self.reached, self.is_alive) = (version, version, !line.deleted);
    }
}

struct Worker {
    store: StateStore,
    persister: StateMachinePersister,
    counts: Arc<Counts>,
    acks: bool,
    take_older: bool,
    bar: indicatif::ProgressBar,
    known: HashMap<(String, String), Known>,
}

impl Worker {
    async fn run(mut self, mut items: mpsc::Receiver<Item>) -> Result<(), (u64, Failure)> {
        while let Some(item) = items.recv().await {
            let number = item.number;
            if let Err(failure) = self.take(item).await {
                self.counts.failed.store(true, Relaxed);
                let failure = failure.context(&format!("line {number}")).with("line", number);
                return Err((number, failure.part_way()));
            }
            self.bar.inc(1);
        }
        Ok(())
    }

    async fn take(&mut self, item: Item) -> Outcome {
        let Item { number, line, identity, _room: room } = item;
        loop {
            let address = (line.governor_id.clone(), line.state_id.clone());
            let known = match self.known.entry(address) {
                Entry::Occupied(known) => known.into_mut(),
                Entry::Vacant(place) => {
                    self.counts.states.fetch_add(1, Relaxed);
                    place.insert(look(&self.store, &line).await?)
                }
            };
            match known.place(&line, &identity, self.take_older)? {
                Place::New => {}
                Place::Known => {
                    self.counts.known.fetch_add(1, Relaxed);
                    return Ok(());
                }
                Place::Older => {
                    self.counts.older.fetch_add(1, Relaxed);
                    return Ok(());
                }
            }
            let transition =
                transition(&line).at(line.timestamp).with_id(&identity).expecting(known.version);
            match self.persister.append(transition).await {
                Ok(event) => {
                    known.take(event.version(), &line);
                    self.counts.applied.fetch_add(1, Relaxed);
                    drop(room);
                    if self.acks {
                        output::line(&output::compact(&json!({
                            "line": number, "governor_id": line.governor_id,
                            "state_id": line.state_id, "version": event.version(),
                        })))?;
                    }
                    return Ok(());
                }
                // Somebody else writes this state too, perhaps the same import: look again what is
                // there before writing it twice.
                Err(Error::VersionConflict { .. }) => {
                    let reached = known.reached;
                    *known = Known { reached, ..look(&self.store, &line).await? };
                }
                Err(error) => return Err(error.into()),
            }
        }
    }
}

fn transition(line: &TransitionLine) -> NewTransition {
    let TransitionLine { governor_id, state_id, action, actor, reason, data, .. } = line;
    let metadata = ChangeMetadata::new(actor, reason, None);
    if line.deleted {
        NewTransition::to_deleted(governor_id, state_id, action, metadata)
    } else {
        NewTransition::to(governor_id, state_id, action, data.clone(), metadata)
    }
}

/// What the store has of a line's state already.
async fn look(store: &StateStore, line: &TransitionLine) -> Outcome<Known> {
    let mut known = Known::default();
    let mut equal: HashMap<String, u64> = HashMap::new();
    let mut history = match store.history(&line.governor_id, &line.state_id, ..).await {
        Ok(history) => history,
        Err(Error::StateNotFound { .. }) => return Ok(known),
        Err(error) => return Err(error.into()),
    };
    loop {
        let page = history.next_page().await?;
        let Some(last) = page.last() else { return Ok(known) };
        let first = page.first().filter(|event| known.version == 0 && event.version() > 1);
        if let Some(first) = first {
            known.kept_since = Some((first.version(), first.timestamp));
        }
        known.version = last.version();
        for event in page {
            let line = TransitionLine::from(&event);
            let count = equal.entry(line.identity(0)).or_default();
            known.ids.entry(line.identity(*count)).or_insert((event.version(), false));
            *count += 1;
            known.is_alive = !line.deleted;
            known.ids.insert(event.id, (event.to_state.version, true));
        }
    }
}
