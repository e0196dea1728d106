//! A disk that is full: what was acknowledged stays, reading goes on, and writing goes on within a second
//! of there being space, in the same process and on the same handle.

use std::collections::BTreeMap;
use std::fs::{self, OpenOptions};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::json;
use tai_state::{ChangeMetadata, Error, StateId, StateSnapshot, StateStore, TransactionManager};

use crate::random::Random;
use crate::run::{Run, Tally};

/// Set where this process has been started again in namespaces of its own.
const APART: &str = "TAI_TORTURE_APART";
const DISK_BYTES: u64 = 6 << 20;
/// By when writing goes on.
const SOON: Duration = Duration::from_secs(1);

/// The log is folded in whenever it has grown by so many pages.
const CHECKPOINT_FRAMES: usize = 1_000;

/// A small disk, and what fills it.
struct Disk {
    folder: tempfile::TempDir,
}

impl Disk {
    fn mounted() -> Option<Self> {
        let folder = tempfile::tempdir().unwrap();
        let size = format!("size={DISK_BYTES}");
        let mounted = Command::new("mount")
            .args(["-t", "tmpfs", "-o", &size, "none"])
            .arg(folder.path())
            .output()
            .is_ok_and(|output| output.status.success());
        mounted.then_some(Self { folder })
    }

    fn file(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Fills it to the last byte, but for this many.
    fn fill(&self, but: u64) {
        let mut filler =
            OpenOptions::new().create(true).append(true).open(self.file("filler")).unwrap();
        let block = [1; 4096];
        while filler.write_all(&block).is_ok() {}
        while filler.write_all(&block[..1]).is_ok() {}
        let size = filler.metadata().unwrap().len();
        filler.set_len(size.saturating_sub(but)).unwrap();
    }

    fn free(&self) {
        let _ = fs::remove_file(self.file("filler"));
    }

    fn empty(&self) {
        for entry in fs::read_dir(self.folder.path()).unwrap() {
            fs::remove_file(entry.unwrap().path()).unwrap();
        }
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(self.folder.path()).status();
    }
}

pub(crate) async fn run(run: &Run) -> Tally {
    let mut tally = Tally::default();
    let Some(disk) = Disk::mounted() else {
        apart(run);
        tally.skip("full-disk needs to mount a small tmpfs, as root or in a user namespace");
        return tally;
    };
    let rounds = run.size(20, 100);
    for (n, mut random) in run.rounds(rounds) {
        disk.empty();
        let mut round = Round { n, disk: &disk, told: BTreeMap::new(), next: 0 };
        round.all(&mut random, &mut tally).await;
    }
    tally.at_least("times full", rounds * 3);
    tally.at_least("acknowledged transactions", rounds * 20);
    tally.at_least("creations that met a full disk", rounds * 2);
    tally.at_least("openings that met a full disk", rounds);
    tally.at_least("checkpoints that met a full disk", rounds);
    tally
}

/// Starts this process again where it may mount: does not come back if it can.
fn apart(run: &Run) {
    use std::os::unix::process::CommandExt as _;
    if std::env::var_os(APART).is_some() {
        return;
    }
    let may = Command::new("unshare").args(["-rm", "true"]).output();
    if !may.is_ok_and(|ran| ran.status.success()) {
        return;
    }
    let mut command = Command::new("unshare");
    command.arg("-rm").arg(std::env::current_exe().unwrap()).args(std::env::args_os().skip(1));
    // A seed that is given twice would be refused.
    if !std::env::args().any(|arg| arg.starts_with("--seed")) {
        command.arg("--seed").arg(run.seed.to_string());
    }
    let error = command.env(APART, "1").exec();
    println!("  unshare: {error}");
}

/// One store that meets a full disk again and again.
struct Round<'a> {
    n: u64,
    disk: &'a Disk,
    /// The newest number that was acknowledged for each pair of states.
    told: BTreeMap<u64, u64>,
    next: u64,
}

impl Round<'_> {
    async fn all(&mut self, random: &mut Random, tally: &mut Tally) {
        self.creation(random, tally).await;
        self.checkpoint(tally).await;
        // Another store, since this one fills the disk.
        self.disk.empty();
        self.told.clear();
        let file = self.disk.file("store.tai");
        let store = StateStore::open(&file).await.unwrap();
        for _ in 0..3 {
            self.filled(&store, random, tally).await;
        }
        drop(store);
        self.opening(&file, random, tally).await;
        let store = StateStore::open(&file).await.unwrap();
        self.judge(&store, "opened again", tally).await;
        let report = store.verify(|_| {}).await.unwrap();
        tally.holds(report.ok, || format!("round {}: verify: {:?}", self.n, report.problems));
        self.control(&store, tally).await;
    }

    /// A disk on which there is no room for a store: typed, nothing left behind, and there is one as
    /// soon as there is room.
    async fn creation(&self, random: &mut Random, tally: &mut Tally) {
        let file = self.disk.file("store.tai");
        let mut refused = 0;
        for but in [0, 4096, 1 + random.below(80_000)] {
            self.disk.fill(but);
            match StateStore::open(&file).await {
                Ok(store) => drop(store),
                Err(error) => {
                    refused += 1;
                    self.is_full(&error, "creation", tally);
                }
            }
            self.disk.free();
            let left: Vec<_> = fs::read_dir(self.disk.folder.path())
                .unwrap()
                .map(|entry| entry.unwrap().file_name().into_string().unwrap())
                .filter(|name| !name.starts_with("store.tai"))
                .collect();
            tally.holds(left.is_empty(), || format!("round {}: left behind: {left:?}", self.n));
        }
        tally.count("creations that met a full disk", refused);
        let store = StateStore::open(&file).await;
        tally.holds(store.is_ok(), || format!("round {}: not made with room: {store:?}", self.n));
    }

    fn is_full(&self, error: &Error, when: &str, tally: &mut Tally) {
        tally.holds(error.code() == "storage_full", || {
            format!("round {}, {when}: {}: {error}", self.n, error.code())
        });
        tally.count("answers that the disk is full", 1);
    }

    /// Writes until the disk is full, reads, makes room and writes on.
    async fn filled(&mut self, store: &StateStore, random: &mut Random, tally: &mut Tally) {
        self.disk.fill(100_000 + random.below(300_000));
        let mut tries = 0;
        let error = loop {
            tries += 1;
            assert!(tries < 5_000, "the disk never filled");
            let size = 1 + random.below(20_000);
            match self.write(store, size, tally).await {
                Ok(()) => {}
                Err(error) => break error,
            }
        };
        tally.count("times full", 1);
        self.is_full(&error, "writing", tally);
        // Once more: it is as full as before, and says so again.
        if let Err(error) = self.write(store, 20_000, tally).await {
            self.is_full(&error, "writing again", tally);
        }
        self.judge(store, "while it is full", tally).await;
        self.disk.free();
        let freed = Instant::now();
        let after = self.write(store, 10, tally).await;
        let took = freed.elapsed();
        tally.highest(
            "ms at most until a write held after there was space",
            took.as_millis() as u64,
        );
        tally.holds(after.is_ok() && took < SOON, || {
            format!("round {}: {took:?} after there was space: {after:?}", self.n)
        });
    }

    /// Two states in one transaction, with equal numbers.
    async fn write(
        &mut self,
        store: &StateStore,
        size: u64,
        tally: &mut Tally,
    ) -> Result<(), Error> {
        let (pair, number) = (self.next % 4, self.next);
        let text = "x".repeat(size as usize);
        let manager = TransactionManager::new(store);
        let done = manager
            .run(|transaction| {
                let text = &text;
                async move {
                    for side in ["left", "right"] {
                        let why = ChangeMetadata::new("full-disk", "", None);
                        let data = json!({"number": number, "text": text});
                        let state = StateId::from(format!("{pair}"));
                        let data = StateSnapshot::new(state, data, why.clone());
                        transaction.save_state(side, &pair.to_string(), data, why).await?;
                    }
                    Ok(())
                }
            })
            .await;
        done?;
        self.next += 1;
        self.told.insert(pair, number);
        tally.count("acknowledged transactions", 1);
        Ok(())
    }

    /// The log has room, and the file that it is to be folded into has none: the log goes on until it
    /// would have to grow.
    async fn checkpoint(&mut self, tally: &mut Tally) {
        let file = self.disk.file("store.tai");
        let store = StateStore::open(&file).await.unwrap();
        let log = self.disk.file("store.tai-wal");
        self.log_renewed(&store, &log, tally).await;
        self.disk.fill(0);
        let error = loop {
            if let Err(error) = self.write(&store, 1_500, tally).await {
                break error;
            }
        };
        self.is_full(&error, "checkpoint", tally);
        let tried = frames(&log) >= CHECKPOINT_FRAMES;
        tally.count("checkpoints that met a full disk", u64::from(tried));
        self.judge(&store, "after a checkpoint without room", tally).await;
        self.disk.free();
        let freed = Instant::now();
        let after = self.write(&store, 10, tally).await;
        tally.holds(after.is_ok() && freed.elapsed() < SOON, || {
            format!("round {}: after a checkpoint without room: {after:?}", self.n)
        });
        // And the log is folded in after all.
        self.log_renewed(&store, &log, tally).await;
        self.judge(&store, "after the checkpoint", tally).await;
        let report = store.verify(|_| {}).await.unwrap();
        tally.holds(report.ok, || format!("round {}: verify: {:?}", self.n, report.problems));
    }

    /// Writes until the log has been folded in and begins anew, over what it was.
    async fn log_renewed(&mut self, store: &StateStore, log: &Path, tally: &mut Tally) {
        let mut before = None;
        for _ in 0..1_000 {
            self.write(store, 10, tally).await.unwrap();
            let now = salts(log);
            if before.is_some_and(|before| before != now) {
                return;
            }
            before = Some(now);
        }
        tally.broken(format!("round {}: the log is never folded in", self.n));
    }

    /// Opening a store with no room at all: it opens, or says that the disk is full; it is not damaged,
    /// and opens when there is room.
    async fn opening(&mut self, file: &Path, random: &mut Random, tally: &mut Tally) {
        self.disk.fill(random.below(2) * 4096);
        match StateStore::open(file).await {
            Ok(store) => {
                self.judge(&store, "opened while it is full", tally).await;
                let refused = self.write(&store, 100_000, tally).await;
                tally.holds(refused.is_err(), || "a full disk took a write".to_owned());
            }
            Err(error) => self.is_full(&error, "opening", tally),
        }
        tally.count("openings that met a full disk", 1);
        self.disk.free();
    }

    async fn found(store: &StateStore, side: &str, pair: u64) -> Option<u64> {
        let found = store.get_state(side, &pair.to_string()).await.ok()?;
        found.0.data["number"].as_u64()
    }

    /// Everything acknowledged is there, and no half of anything.
    async fn judge(&self, store: &StateStore, when: &str, tally: &mut Tally) {
        for lost in self.lost(store).await {
            tally.broken(format!("round {}, {when}: {lost}", self.n));
        }
        tally.count("times read", 1);
    }

    async fn lost(&self, store: &StateStore) -> Vec<String> {
        let mut lost = Vec::new();
        for (pair, number) in &self.told {
            let left = Self::found(store, "left", *pair).await;
            let right = Self::found(store, "right", *pair).await;
            // Nothing that was refused with "full" may be there.
            if left != Some(*number) || right != Some(*number) {
                lost.push(format!(
                    "{pair}: {number} was acknowledged, found {left:?} and {right:?}"
                ));
            }
        }
        lost
    }

    /// What would be seen if a refused write had been acknowledged.
    async fn control(&mut self, store: &StateStore, tally: &mut Tally) {
        const WHAT: &str = "a write that was refused, taken for acknowledged";
        self.told.insert(0, self.next);
        tally.control(WHAT, u64::from(!self.lost(store).await.is_empty()), 1, 1);
    }
}

/// What tells a log from the one before it in the same file.
fn salts(log: &Path) -> [u8; 8] {
    let bytes = fs::read(log).unwrap();
    bytes[16..24].try_into().unwrap()
}

/// How many frames are of the current log.
fn frames(log: &Path) -> usize {
    let bytes = fs::read(log).unwrap();
    let salts = &bytes[16..24];
    bytes[32..].chunks(24 + 4096).take_while(|frame| frame.get(8..16) == Some(salts)).count()
}
