//! Power cuts on the real binary: what may be on the disk afterwards is opened and proved.
//!
//! The binary is recorded with strace: creation, an import, transactions, log and checkpoints, a kill,
//! the reopening, a clean-up, a purge. From its system calls the disk is rebuilt at any moment (the
//! whole of it is compared with the real files, byte for byte), and cut: what was synced is there, of
//! the rest anything may be.
//!
//! What the model grants, and what not:
//!
//! * A write is safe when a later `fsync` or `fdatasync` *of that file* has ended; before that any part
//!   of it may be there, sector by sector (512 bytes), and of several any subset, the later without the
//!   earlier included. POSIX, ext4 and xfs promise no order between them. Overlapping writes in another order
//!   are more than the page cache of Linux does (there, a sector is as it was after one of them), and so
//!   is a sector that is half old and half new: disks are said to write a sector whole. Both are done all
//!   the same, since nothing should rest on them.
//! * Bytes outside of a write are not touched by it (SQLite's "powersafe overwrite"), what was never
//!   written reads as zeros, and what was synced is read back as it was: no disk that lies, and none that
//!   forgets. A file's length is changed by what is kept of its writes and truncations, in the same way.
//! * A name that is given, taken or changed is safe only when *the folder* was synced. ext4 and xfs also write
//!   it with the file's own sync, and in order; POSIX promises neither, and neither is granted. A rename
//!   is one change: both names or none.
//! * The shared-memory file (`-shm`) is not synced by anybody: after a cut it is absent or holds noise.
//! * What a user is told counts from the beginning of the write to the pipe on.

mod disk;
mod plan;
mod record;
mod truth;

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, mpsc};

use crate::random::Random;
use crate::run::{Run, Tally};
use crate::{found, strace, tool};
use disk::{Disk, Event, Image};
use plan::Planned;
use record::{Recording, STORE};

/// Where a recording that was kept stands, to look at an image again.
const RECORDING: &str = "TAI_TORTURE_RECORDING";
/// Second cuts of one recovery.
const SECOND_CUTS: u64 = 20;
/// Every so many images one is written to after it was proved.
const GOES_ON: u64 = 8;
const WORKERS: usize = 2;
const LIAR: &str = "a disk that says it has synced, and has not";

/// Who opens an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Opens {
    Library,
    Binary,
    /// The binary, which is cut a second time while it recovers.
    Twice,
    /// The library, on a disk that lied: it must find that something is missing.
    Control,
}

/// One image on its way to be opened.
struct Job {
    planned: Planned,
    image: Image,
    told: usize,
    what: &'static str,
    opens: Opens,
}

pub(crate) fn run(run: &Run) -> Tally {
    let mut tally = Tally::default();
    if !strace::is_there() {
        tally.skip("powercut needs strace, and to be allowed to trace: apt-get install strace");
        return tally;
    }
    let folder = match std::env::var_os(RECORDING) {
        Some(kept) => PathBuf::from(kept),
        None => {
            let folder =
                tempfile::Builder::new().prefix("tai-torture-powercut-").tempdir().unwrap();
            let folder = folder.keep();
            Recording::made(&folder, &mut Random::of_round(run.seed, 1 << 40));
            folder
        }
    };
    let recording = Recording::read(&folder);
    describe(&recording, &mut tally);
    let library = run.size(700, 20_000);
    let parts = [
        (Opens::Library, library, 0),
        (Opens::Binary, library * 3 / 20, 1),
        (Opens::Twice, (library / 10).div_ceil(SECOND_CUTS), 2),
        (Opens::Control, library / 20, 3),
    ];
    for (opens, size, nth) in parts {
        images(run, &recording, opens, size, run.seed.wrapping_add(nth << 32), &mut tally);
    }
    // Nine of ten: of what is lost by chance some was never told to anybody.
    tally.control(LIAR, 0, 0, library / 20 * 9 / 10);
    tally.at_least("images opened by the library", library);
    tally.at_least("images opened by the binary", library * 3 / 20);
    tally.at_least("cut a second time, during recovery", library / 10);
    tally.at_least("told to the user before a cut", 300);
    // One in each process that writes, and one more when a checkpoint has emptied it.
    tally.at_least("logs begun", 8);
    if tally.is_broken() {
        println!("  the recording and the images that failed are kept: {}", folder.display());
        println!("  {RECORDING}={} and --only N open one of them again", folder.display());
    } else if std::env::var_os(RECORDING).is_none() {
        fs::remove_dir_all(&folder).unwrap();
    }
    tally
}

fn describe(recording: &Recording, tally: &mut Tally) {
    let count = |is: fn(&Event) -> bool| recording.events.iter().filter(|event| is(event)).count();
    tally.count("processes recorded", count(|event| matches!(event, Event::Start)) as u64);
    tally.count(
        "writes, truncations and names",
        count(|event| {
            matches!(event, Event::Write { .. } | Event::Truncate { .. } | Event::Name(_))
        }) as u64,
    );
    let is_sync = |event: &Event| matches!(event, Event::Sync { .. } | Event::SyncFolder { .. });
    tally.count("syncs", count(is_sync) as u64);
    let is_header =
        |event: &Event| matches!(event, Event::Write { at: 0, data, .. } if data.len() == 32);
    tally.count("logs begun", count(is_header) as u64);
    tally.count("told to the user before a cut", recording.told.len() as u64);
    tally.count("files rebuilt byte for byte", recording.rebuilt);
}

/// Makes images in the order of their cuts, and has them opened by workers.
fn images(run: &Run, recording: &Recording, opens: Opens, size: u64, seed: u64, tally: &mut Tally) {
    let shared = PathBuf::from("/dev/shm");
    let place = if shared.is_dir() { shared } else { std::env::temp_dir() };
    let place = tempfile::tempdir_in(place).unwrap();
    let (sender, jobs) = mpsc::sync_channel::<Job>(WORKERS * 2);
    let jobs = Mutex::new(jobs);
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..WORKERS)
            .map(|_| {
                scope.spawn(|| {
                    let mut tally = Tally::default();
                    loop {
                        let job = jobs.lock().unwrap().recv();
                        let Ok(job) = job else { return tally };
                        opened(job, recording, place.path(), &mut tally);
                    }
                })
            })
            .collect();
        let planned = if opens == Opens::Control {
            control_plan(recording, seed, size)
        } else {
            plan::all(&recording.events, seed, size)
        };
        let chosen = run.rounds(size).map(|(n, _)| n).collect::<Vec<_>>();
        let mut disk = Disk::default();
        disk.lies = opens == Opens::Control;
        let (mut taken, mut told) = (0, 0);
        for mut planned in planned {
            while taken < planned.cut {
                disk.take(&recording.events, taken);
                told += usize::from(matches!(recording.events[taken], Event::Told));
                taken += 1;
            }
            if chosen.len() != size as usize && !chosen.contains(&planned.n) {
                continue;
            }
            let (kept, what) = planned.kept(&disk, &recording.events);
            let image = disk.image(&recording.events, &kept);
            if sender.send(Job { planned, image, told, what, opens }).is_err() {
                break;
            }
        }
        drop(sender);
        for worker in workers {
            tally.add(worker.join().unwrap());
        }
    });
}

/// A fair sample: at moments when the process at work had told its user something, with everything
/// lost or a part of it.
fn control_plan(recording: &Recording, seed: u64, size: u64) -> Vec<Planned> {
    let mut moments = Vec::new();
    let mut has_told = false;
    for (at, event) in recording.events.iter().enumerate() {
        match event {
            Event::Start => has_told = false,
            Event::Told => has_told = true,
            _ => {}
        }
        if has_told {
            moments.push(at + 1);
        }
    }
    let one = |n| {
        let mut random = Random::of_round(seed, n);
        let cut = moments[random.below(moments.len() as u64) as usize];
        let kind = if n % 2 == 0 { plan::Kind::Nothing } else { plan::Kind::Drawn };
        Planned { n, cut, kind, random }
    };
    let mut planned: Vec<Planned> = (0..size).map(one).collect();
    planned.sort_by_key(|planned| planned.cut);
    planned
}

/// Writes an image into a folder, and noise where the shared memory was.
fn laid_out(image: &Image, folder: &Path, random: &mut Random) {
    fs::create_dir(folder).unwrap();
    for (name, bytes) in image {
        fs::write(folder.join(name), bytes).unwrap();
    }
    if image.contains_key(STORE) && random.percent(50) {
        let noise: Vec<u8> = (0..4_096).flat_map(|_| random.next().to_le_bytes()).collect();
        fs::write(folder.join(format!("{STORE}-shm")), noise).unwrap();
    }
}

/// Opens one image and judges it.
fn opened(mut job: Job, recording: &Recording, place: &Path, tally: &mut Tally) {
    let n = job.planned.n;
    let folder = place.join(format!("{:?}-{n}", job.opens));
    if job.opens == Opens::Twice {
        cut_again(&mut job, recording, &folder, tally);
        return;
    }
    laid_out(&job.image, &folder, &mut job.planned.random);
    let verdict = verdict(&job, recording, &folder);
    fs::remove_dir_all(&folder).unwrap();
    match job.opens {
        Opens::Control => {
            tally.control(LIAR, u64::from(verdict.is_err()), 1, 0);
            return;
        }
        Opens::Binary => tally.count("images opened by the binary", 1),
        _ => tally.count("images opened by the library", 1),
    }
    tally.count(job.what, 1);
    if let Err(why) = verdict {
        failed(&job, &job.image, recording, &why, tally);
    }
}

fn verdict(job: &Job, recording: &Recording, folder: &Path) -> Result<(), String> {
    let file = folder.join(STORE);
    if !file.exists() {
        // Whoever was not told that there is a store makes it now, whatever was left of the first try.
        if job.told > 0 {
            return Err("the store is gone".to_owned());
        }
        let made = tool::json(&file.display().to_string(), &["init"]);
        return if made.exit == 0 { Ok(()) } else { Err(format!("it cannot be made: {made:?}")) };
    }
    let found = match job.opens {
        Opens::Binary => found::read_with_binary(&file)?,
        _ => found::alone(|| found::read(&file))?,
    };
    truth::judge(&recording.truth, &recording.told, job.told, &found)?;
    if job.planned.n.is_multiple_of(GOES_ON) {
        found::alone(|| found::goes_on(&file))?;
    }
    Ok(())
}

/// Records the recovery of an image, and cuts that too.
fn cut_again(job: &mut Job, recording: &Recording, folder: &Path, tally: &mut Tally) {
    laid_out(&job.image, folder, &mut job.planned.random);
    let file = folder.join(STORE);
    // A store that is not there is made; that is cut often enough elsewhere, but nothing forbids it.
    let verb = if file.exists() { "verify" } else { "init" };
    let trace = folder.with_extension("trace");
    let command = tool::command(&file.display().to_string(), &["-o", "json", verb]);
    let traced = strace::under(&trace, &["--seccomp-bpf", "-e", strace::CHANGES], &command);
    let ran = tool::ran(traced, b"");
    if ran.exit != 0 {
        failed(job, &job.image, recording, &format!("the recovery: {ran:?}"), tally);
    }
    let events = record::replayed(folder, &job.image, &trace);
    fs::remove_dir_all(folder).unwrap();
    fs::remove_file(&trace).unwrap();
    let mut disk = Disk::of(&job.image);
    let seed = job.planned.random.next();
    let mut taken = 0;
    tally.count("recoveries recorded", 1);
    for mut planned in plan::all(&events, seed, SECOND_CUTS) {
        while taken < planned.cut {
            disk.take(&events, taken);
            taken += 1;
        }
        let (kept, _) = planned.kept(&disk, &events);
        let image = disk.image(&events, &kept);
        laid_out(&image, folder, &mut planned.random);
        planned.n = job.planned.n;
        let again = Job { planned, image, told: job.told, what: job.what, opens: Opens::Library };
        let verdict = verdict(&again, recording, folder);
        fs::remove_dir_all(folder).unwrap();
        tally.count("cut a second time, during recovery", 1);
        if let Err(why) = verdict {
            failed(&again, &again.image, recording, &format!("cut twice: {why}"), tally);
        }
    }
}

/// Keeps what failed.
fn failed(job: &Job, image: &Image, recording: &Recording, why: &str, tally: &mut Tally) {
    let n = job.planned.n;
    let mut kept = recording.folder.join(format!("image-{:?}-{n}", job.opens));
    while kept.exists() {
        kept.as_mut_os_string().push("x");
    }
    laid_out(image, &kept, &mut Random::of_round(0, 0));
    let (cut, kind) = (job.planned.cut, job.planned.kind);
    tally.broken(format!(
        "image {n} ({:?}), {}, {kind:?}, after event {cut}: {why}; kept: {}",
        job.opens,
        job.what,
        kept.display()
    ));
}
