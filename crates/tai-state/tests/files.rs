//! Files that are not a store, that may not be touched, or that have no room: each a typed error, and
//! nothing is changed.

#![cfg(unix)]
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]

mod common;

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use common::{counter, snapshot, why};
use serde_json::json;
use tai_state::{Error, StateStore, StoreOptions};

async fn code_of(path: &Path) -> String {
    match StateStore::open(path).await {
        Ok(_) => "ok".to_owned(),
        Err(error) => {
            let text = error.to_string();
            assert!(text.contains(path.file_name().unwrap().to_str().unwrap()), "{text}");
            assert!(error.hint().is_some(), "{text}");
            error.code().to_owned()
        }
    }
}

async fn store_at(path: &Path) -> Vec<u8> {
    let store = StateStore::open(path).await.unwrap();
    store.save_state("g", "s", counter(1), why()).await.unwrap();
    drop(store);
    fs::read(path).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_no_store_is_refused_and_left_alone() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let good = store_at(&at("good.tai")).await;
    let foreign = at("foreign.tai");
    rusqlite::Connection::open(&foreign).unwrap().execute_batch("CREATE TABLE t (x)").unwrap();
    let flipped = |at: usize| {
        let mut bytes = good.clone();
        bytes[at] ^= 0x10;
        bytes
    };
    for (name, bytes, code) in [
        ("empty.tai", Vec::new(), "not_a_store"),
        ("text.tai", b"hello, this is a text file\n".repeat(100), "not_a_store"),
        ("short.tai", b"x".to_vec(), "not_a_store"),
        ("foreign.tai", fs::read(&foreign).unwrap(), "not_a_store"),
        ("zeros.tai", vec![0; 8192], "corrupt"),
        ("magic.tai", flipped(3), "corrupt"),
        ("name.tai", flipped(69), "corrupt"),
        ("pages.tai", flipped(17), "corrupt"),
        ("header.tai", good[..50].to_vec(), "corrupt"),
        ("half.tai", good[..good.len() / 2 + 100].to_vec(), "corrupt"),
        ("page.tai", good[..4096].to_vec(), "corrupt"),
    ] {
        let path = at(name);
        fs::write(&path, &bytes).unwrap();
        assert_eq!(code_of(&path).await, code, "{name}");
        assert!(fs::read(&path).unwrap() == bytes, "{name} was changed");
    }
    fs::create_dir(at("directory.tai")).unwrap();
    assert_eq!(code_of(&at("directory.tai")).await, "not_a_store");
    std::os::unix::fs::symlink(at("loop.tai"), at("loop.tai")).unwrap();
    assert_eq!(code_of(&at("loop.tai")).await, "not_a_store");
    assert_eq!(code_of(&at("no/such/folder.tai")).await, "not_a_store");
    assert_eq!(code_of(Path::new("/dev/null")).await, "not_a_store");
    let pipe = at("pipe.tai");
    assert!(Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    assert_eq!(code_of(&pipe).await, "not_a_store");
    fs::write(at("orphan.tai-wal"), b"a log without its file").unwrap();
    assert_eq!(code_of(&at("orphan.tai")).await, "not_a_store");
    assert!(!at("orphan.tai").exists());
    let mut options = StoreOptions::default();
    options.create = false;
    let missing = StateStore::open_with(at("missing.tai"), options).await.unwrap_err();
    assert!(matches!(missing, Error::NotAStore { .. }), "{missing}");
    assert!(!at("missing.tai").exists(), "a mistyped name left a file behind");
}

#[tokio::test(flavor = "multi_thread")]
async fn links_are_followed_once_or_refused() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    store_at(&at("store.tai")).await;
    // A symbolic link is the file that it leads to, however it is named, with one log.
    std::os::unix::fs::symlink(at("store.tai"), at("link.tai")).unwrap();
    let (direct, linked) = (
        StateStore::open(at("store.tai")).await.unwrap(),
        StateStore::open(at("link.tai")).await.unwrap(),
    );
    for n in 1..=20 {
        let store = if n % 2 == 0 { &direct } else { &linked };
        assert_eq!(store.save_state("g", "n", counter(n), why()).await.unwrap(), n);
    }
    drop((direct, linked));
    std::os::unix::fs::symlink(at("nowhere"), at("dangling.tai")).unwrap();
    assert_eq!(code_of(&at("dangling.tai")).await, "not_a_store");
    assert!(!at("nowhere").exists());
    // A second name is a second log.
    fs::hard_link(at("store.tai"), at("twin.tai")).unwrap();
    assert_eq!(code_of(&at("twin.tai")).await, "not_a_store");
    assert_eq!(code_of(&at("store.tai")).await, "not_a_store");
    fs::remove_file(at("twin.tai")).unwrap();
    let store = StateStore::open(at("store.tai")).await.unwrap();
    assert_eq!(store.get_state("g", "n").await.unwrap().1, 20);
    // Names that mean something else to SQLite.
    for name in [":memory:", "file:x.tai?mode=memory", "a b'\"%.tai"] {
        store_at(&at(name)).await;
        let store = StateStore::open(at(name)).await.unwrap();
        assert_eq!(store.get_state("g", "s").await.unwrap().1, 1, "{name}");
    }
}

/// A handle whose file has gone, or was replaced by another, takes no more writes.
#[tokio::test(flavor = "multi_thread")]
async fn a_file_that_goes_away_takes_no_writes() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("store.tai");
    for replaced in [false, true] {
        let store = StateStore::open(&path).await.unwrap();
        store.save_state("g", "s", counter(1), why()).await.unwrap();
        for suffix in ["", "-wal", "-shm"] {
            let _ = fs::remove_file(folder.path().join(format!("store.tai{suffix}")));
        }
        let other = if replaced { Some(StateStore::open(&path).await.unwrap()) } else { None };
        for _ in 0..2 {
            let refused = store.save_state("g", "s", counter(2), why()).await.unwrap_err();
            assert_eq!(refused.code(), "storage_failed", "{refused}");
        }
        if let Some(other) = other {
            assert!(!other.exists("g", "s").await.unwrap());
            other.save_state("g", "s", counter(7), why()).await.unwrap();
            drop(store);
            assert_eq!(other.get_state("g", "s").await.unwrap().0.data, json!({"count": 7}));
        }
    }
}

/// The same for its log, whose name alone may go. What was acknowledged is saved where it can be.
#[tokio::test(flavor = "multi_thread")]
async fn a_log_that_goes_away_takes_no_writes() {
    let folder = tempfile::tempdir().unwrap();
    for how in ["removed", "removed with the shared memory", "replaced"] {
        let path = folder.path().join(format!("{how}.tai"));
        let beside = |suffix: &str| folder.path().join(format!("{how}.tai{suffix}"));
        let store = StateStore::open(&path).await.unwrap();
        store.save_state("g", "s", counter(1), why()).await.unwrap();
        if how == "replaced" {
            fs::copy(beside("-wal"), beside("-copy")).unwrap();
            fs::rename(beside("-copy"), beside("-wal")).unwrap();
        } else {
            fs::remove_file(beside("-wal")).unwrap();
        }
        if how.contains("with") {
            fs::remove_file(beside("-shm")).unwrap();
        }
        for _ in 0..2 {
            let refused = store.save_state("g", "s", counter(2), why()).await.unwrap_err();
            assert_eq!(refused.code(), "storage_failed", "{how}: {refused}");
        }
        // What is still seen there may be lost.
        assert_eq!(store.get_state("g", "s").await.unwrap_err().code(), "storage_failed", "{how}");
        drop(store);
        let store = StateStore::open(&path).await.unwrap();
        assert_eq!(store.get_state("g", "s").await.unwrap().1, 1, "{how}");
        assert!(store.verify(|_| {}).await.unwrap().ok, "{how}");
    }
}

/// A log that goes away in the middle of a commit: the change is not acknowledged, and nothing that is
/// seen in that log settles it.
#[tokio::test(flavor = "multi_thread")]
async fn a_log_that_goes_away_in_a_commit_acknowledges_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let mut unknown = 0;
    for round in 0..40 {
        let path = folder.path().join(format!("{round}.tai"));
        let log = folder.path().join(format!("{round}.tai-wal"));
        let mut options = StoreOptions::default();
        options.retry.max_attempts = 1 + round % 2;
        let store = StateStore::open_with(&path, options).await.unwrap();
        store.save_state("g", "s", counter(1), why()).await.unwrap();
        let before = fs::metadata(&log).unwrap().len();
        // As soon as something of the next commit is written.
        let removing = std::thread::spawn(move || {
            while fs::metadata(&log).unwrap().len() == before {
                std::hint::spin_loop();
            }
            fs::remove_file(&log).unwrap();
        });
        let told = store.save_state("g", "s", counter(2), why()).await;
        removing.join().unwrap();
        drop(store);
        // Where it came after the answer, there is nothing to be seen.
        unknown += u32::from(told.is_err_and(|error| error.code() == "outcome_unknown"));
        let store = StateStore::open(&path).await.unwrap();
        assert_eq!(store.get_state("g", "s").await.unwrap().1, 2);
        if unknown == 4 {
            return;
        }
    }
    panic!("the log went away in the middle of {unknown} commits only");
}

/// POSIX takes a process's locks away when it closes any descriptor of the file: opening a store a
/// second time and closing it again must leave the first one's in place.
#[cfg(target_os = "linux")]
#[tokio::test(flavor = "multi_thread")]
async fn a_second_handle_takes_no_locks_away() {
    use std::os::unix::fs::MetadataExt;
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("store.tai");
    let first = StateStore::open(&path).await.unwrap();
    first.save_state("g", "s", counter(1), why()).await.unwrap();
    let inode = format!(":{} ", fs::metadata(&path).unwrap().ino());
    let pid = format!(" {} ", std::process::id());
    // SQLite's SHARED lock: 510 bytes from here on, held as long as a connection is open.
    let shared = format!(" {} ", 0x4000_0002);
    // The kernel lists the machine's locks in portions. While others come and go, one may be told
    // twice or be passed over, so a lock is gone only when many lists are without it.
    let held = || {
        (0..50).any(|_| {
            let all = fs::read_to_string("/proc/locks").unwrap();
            let ours = |line: &str| [&inode, &pid, &shared].iter().all(|part| line.contains(*part));
            all.lines().any(ours)
        })
    };
    assert!(held(), "SQLite holds no lock: the test shows nothing");
    for _ in 0..3 {
        let second = StateStore::open(&path).await.unwrap();
        second.save_state("g", "s", counter(2), why()).await.unwrap();
        drop(second);
        assert!(held());
    }
    drop(first);
    assert!(!held());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_file_is_private_and_leaves_nothing_beside_it() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("new.tai");
    store_at(&path).await;
    assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
}

/// Two that make the same file: one makes it, both use it.
#[tokio::test(flavor = "multi_thread")]
async fn racing_creations_make_one_store() {
    let folder = tempfile::tempdir().unwrap();
    for round in 0..10 {
        let path = folder.path().join(format!("{round}.tai"));
        let mut tasks = tokio::task::JoinSet::new();
        for n in 0..6 {
            let path = path.clone();
            tasks.spawn(async move {
                let store = StateStore::open(&path).await.unwrap();
                store.save_state("g", format!("s{n}"), counter(n), why()).await.unwrap();
                store.identity().store
            });
        }
        let identities = tasks.join_all().await;
        assert!(identities.windows(2).all(|pair| pair[0] == pair[1]));
        let store = StateStore::open(&path).await.unwrap();
        assert_eq!(store.get_stats().await.unwrap().total_states, 6);
    }
}

/// Permissions mean nothing to root, so this runs the test again as somebody else.
#[test]
fn files_that_may_not_be_touched() {
    const INNER: &str = "TAI_STATE_TEST_UNPRIVILEGED";
    if let Some(folder) = std::env::var_os(INNER) {
        return unprivileged(&PathBuf::from(folder));
    }
    let folder = tempfile::tempdir().unwrap();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    for name in ["readonly.tai", "secret.tai"] {
        runtime.block_on(store_at(&folder.path().join(name)));
    }
    let set = |name: &str, mode| {
        fs::set_permissions(folder.path().join(name), Permissions::from_mode(mode)).unwrap();
    };
    set("readonly.tai", 0o444);
    set("secret.tai", 0o000);
    set("", 0o555);
    let mut again = Command::new(std::env::current_exe().unwrap());
    again
        .args(["--exact", "files_that_may_not_be_touched", "--nocapture"])
        .env(INNER, folder.path());
    let is_root = fs::read_to_string("/proc/self/status")
        .is_ok_and(|status| status.lines().any(|line| line.starts_with("Uid:\t0\t")));
    // The test program itself may stand in a folder that only root can enter.
    let copy = tempfile::tempdir().unwrap();
    if is_root {
        use std::os::unix::process::CommandExt;
        let program = copy.path().join("test");
        fs::copy(std::env::current_exe().unwrap(), &program).unwrap();
        fs::set_permissions(copy.path(), Permissions::from_mode(0o755)).unwrap();
        fs::set_permissions(&program, Permissions::from_mode(0o755)).unwrap();
        again = Command::new(program);
        again.args(["--exact", "files_that_may_not_be_touched", "--nocapture"]);
        again.env(INNER, folder.path()).current_dir("/").uid(65_534).gid(65_534);
    }
    let output = again.output().unwrap();
    set("", 0o755);
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success() && text.contains("1 passed"), "{text}");
    assert!(text.contains("refused 3 of 3"), "{text}");
}

fn unprivileged(folder: &Path) {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let mut refused = 0;
    for name in ["readonly.tai", "secret.tai", "new.tai"] {
        let code = runtime.block_on(code_of(&folder.join(name)));
        assert_eq!(code, "permission_denied", "{name}");
        refused += 1;
    }
    println!("refused {refused} of 3");
}

/// A small disk that fills up: nothing acknowledged is lost, reading goes on, and writing goes on as
/// soon as there is space again, on the same handle.
#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk() {
    let folder = tempfile::tempdir().unwrap();
    let disk = folder.path().join("disk");
    fs::create_dir(&disk).unwrap();
    let mounted = Command::new("mount")
        .args(["-t", "tmpfs", "-o", "size=6m", "none"])
        .arg(&disk)
        .output()
        .is_ok_and(|output| output.status.success());
    if !mounted {
        // Past the test runner, which keeps what a test prints as long as it passes.
        let line =
            b"\nSKIPPED: a_full_disk needs to mount a small tmpfs, which is not allowed here\n";
        std::io::Write::write_all(&mut std::io::stderr(), line).unwrap();
        return;
    }
    // In a task, so that the disk is unmounted whatever happens.
    let full = disk.clone();
    let outcome = tokio::spawn(async move { fill(&full).await }).await;
    let _ = Command::new("umount").arg(&disk).status();
    outcome.unwrap();
}

async fn fill(disk: &Path) {
    let path = disk.join("store.tai");
    let store = StateStore::open(&path).await.unwrap();
    let mut acknowledged = 0u64;
    for round in 0..5 {
        let filler = disk.join("filler");
        let mut refused = None;
        for _ in 0..2_000 {
            // Three quarters of the disk go to the filler, so that each round is short.
            if !filler.exists() {
                let _ = fs::write(&filler, vec![1; 3 << 20]);
            }
            let data = snapshot("s", json!({"n": acknowledged, "filler": "x".repeat(20_000)}));
            match store.save_state("g", "s", data, why()).await {
                Ok(version) => acknowledged = version,
                Err(error) => {
                    refused = Some(error);
                    break;
                }
            }
        }
        let error = refused.unwrap_or_else(|| panic!("the disk never filled"));
        assert_eq!(error.code(), "storage_full", "round {round}: {error}");
        assert_eq!(store.get_state("g", "s").await.unwrap().1, acknowledged);
        fs::remove_file(&filler).unwrap();
        if fs::metadata(&path).unwrap().len() > 2 << 20 {
            break;
        }
        let version = store.save_state("g", "s", counter(round), why()).await.unwrap();
        assert_eq!(version, acknowledged + 1, "a refused change made a version");
        acknowledged = version;
    }
    assert!(store.verify(|_| {}).await.unwrap().ok);
    drop(store);
    let store = StateStore::open(&path).await.unwrap();
    assert!(store.get_state("g", "s").await.unwrap().1 >= acknowledged);
    assert!(store.verify(|_| {}).await.unwrap().ok);
}

/// What a container gets that a single file is mounted into.
#[cfg(target_os = "linux")]
#[tokio::test(flavor = "multi_thread")]
async fn a_file_that_is_mounted_by_itself_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    for name in ["here", "there", "whole"] {
        fs::create_dir(at(name)).unwrap();
    }
    store_at(&at("here/a.tai")).await;
    fs::write(at("there/a.tai"), b"").unwrap();
    let bind = |from: &str, to: &str| {
        let mount = Command::new("mount").arg("--bind").args([at(from), at(to)]).output();
        mount.is_ok_and(|output| output.status.success())
    };
    let (file, whole) = (bind("here/a.tai", "there/a.tai"), bind("here", "whole"));
    if !file || !whole {
        let line = b"\nSKIPPED: a_file_that_is_mounted_by_itself needs to mount, which is not allowed here\n";
        std::io::Write::write_all(&mut std::io::stderr(), line).unwrap();
    }
    let codes = [code_of(&at("there/a.tai")).await, code_of(&at("whole/a.tai")).await];
    for name in ["there/a.tai", "whole"] {
        let _ = Command::new("umount").arg(at(name)).status();
    }
    if file && whole {
        assert_eq!(codes, ["not_a_store", "ok"]);
    }
    assert_eq!(code_of(&at("here/a.tai")).await, "ok");
}

/// SQLite would play it back over the file.
#[tokio::test(flavor = "multi_thread")]
async fn a_rollback_journal_is_refused_and_left_alone() {
    let folder = tempfile::tempdir().unwrap();
    let (path, journal) = (folder.path().join("a.tai"), folder.path().join("a.tai-journal"));
    let older = store_at(&path).await;
    let store = StateStore::open(&path).await.unwrap();
    store.save_state("g", "s", counter(2), why()).await.unwrap();
    drop(store);
    let newer = fs::read(&path).unwrap();
    fs::write(&journal, rollback_to(&older)).unwrap();
    assert_eq!(code_of(&path).await, "corrupt");
    assert!(fs::read(&path).unwrap() == newer && journal.exists());
    // Empty ones are left behind by some settings of other programs.
    fs::write(&journal, b"").unwrap();
    assert_eq!(StateStore::open(&path).await.unwrap().get_state("g", "s").await.unwrap().1, 2);
}

/// A journal that SQLite takes for that of a commit that was cut short:
/// <https://www.sqlite.org/fileformat2.html#the_rollback_journal>.
fn rollback_to(file: &[u8]) -> Vec<u8> {
    let pages = u32::try_from(file.len() / 4096).unwrap();
    let nonce = 12_345u32;
    let mut journal = vec![0xd9, 0xd5, 0x05, 0xf9, 0x20, 0xa1, 0x63, 0xd7];
    for word in [pages, nonce, pages, 512, 4096] {
        journal.extend(word.to_be_bytes());
    }
    journal.resize(512, 0);
    for (number, page) in (1u32..).zip(file.chunks(4096)) {
        // Every two hundredth byte from the end, the first page's beginning left out.
        let sum = (1..=20).fold(nonce, |sum, n| sum.wrapping_add(u32::from(page[4096 - n * 200])));
        journal.extend(number.to_be_bytes());
        journal.extend(page);
        journal.extend(sum.to_be_bytes());
    }
    journal
}

/// A process that has too many files open is told so, wherever it is met.
#[test]
fn too_many_open_files() {
    const INNER: &str = "TAI_STATE_TEST_FEW_FILES";
    if let Some(path) = std::env::var_os(INNER) {
        return with_few_files(Path::new(&path));
    }
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.tai");
    tokio::runtime::Runtime::new().unwrap().block_on(store_at(&path));
    let mut again = Command::new("sh");
    again.args(["-c", "ulimit -n 64; exec \"$0\" --exact too_many_open_files --nocapture"]);
    again.arg(std::env::current_exe().unwrap()).env(INNER, &path);
    let output = again.output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success() && text.contains("1 passed"), "{text}");
    assert!(text.contains("told 3 times at least"), "{text}");
}

fn with_few_files(path: &Path) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let (mut told, mut opened) = (0, 0);
    for spare in 0..8 {
        let mut taken: Vec<fs::File> =
            std::iter::from_fn(|| fs::File::open("/dev/null").ok()).collect();
        taken.truncate(taken.len() - spare);
        match runtime.block_on(StateStore::open(path)) {
            Ok(_) => opened += 1,
            Err(error) => {
                drop(taken);
                let text = error.to_string();
                assert_eq!(error.code(), "storage_failed", "{spare} to spare: {text}");
                assert!(text.contains("Too many open files"), "{spare} to spare: {text}");
                told += 1;
            }
        }
    }
    assert!(told >= 3 && opened >= 1, "{told} told, {opened} opened");
    println!("told 3 times at least");
}

#[tokio::test(flavor = "multi_thread")]
async fn cloud_run_is_refused_unless_told_otherwise() {
    const INNER: &str = "K_SERVICE";
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("cloud.tai");
    if std::env::var_os(INNER).is_some() {
        let refused = StateStore::open(&path).await.unwrap_err();
        assert_eq!(refused.code(), "invalid_state", "{refused}");
        assert!(refused.to_string().contains("firestore://"), "{refused}");
        assert!(!path.exists());
        let mut options = StoreOptions::default();
        options.allow_ephemeral_disk = true;
        StateStore::open_with(&path, options).await.unwrap();
        println!("refused as it must be");
        return;
    }
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "cloud_run_is_refused_unless_told_otherwise", "--nocapture"])
        .env(INNER, "my-service")
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success() && text.contains("refused as it must be"), "{text}");
}

/// What no row shows, a file's list of free pages that does not hold, is found by a proof.
#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_list_of_free_pages_is_found() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.tai");
    let mut bytes = store_at(&path).await;
    // The number of free pages (https://www.sqlite.org/fileformat.html, "Free Page List").
    bytes[36..40].copy_from_slice(&7u32.to_be_bytes());
    fs::write(&path, bytes).unwrap();
    let store = StateStore::open(&path).await.unwrap();
    let report = store.verify(|_| {}).await.unwrap();
    assert!(!report.ok, "{report:?}");
    assert_eq!(store.get_state("g", "s").await.unwrap().0.data, json!({"count": 1}));
}
