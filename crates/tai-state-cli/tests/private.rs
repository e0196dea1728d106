//! What the tool makes is for its owner's eyes alone, whatever the umask says; links are not followed when
//! something is made.

#![cfg(unix)]
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]

mod common;

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;

use common::{BINARY, Store, bash, run};

fn mode(path: &Path) -> u32 {
    fs::symlink_metadata(path).unwrap().permissions().mode() & 0o7777
}

#[test]
fn files_are_0600_and_folders_0700_under_any_umask() {
    for umask in ["000", "022", "077"] {
        let folder = tempfile::tempdir().unwrap();
        // The second `locks run` looks at the store's folder while the store is open.
        let script = format!(
            "set -e; umask {umask}; cd {folder}; export TMPDIR={folder}/tmp; mkdir tmp; t={BINARY}; u='-u store.tai'
             $t $u init >&2
             echo 1 | $t $u put g/s >&2
             $t $u locks run nightly -- stat -c '%n %a' store.tai store.tai-wal store.tai-shm
             $t $u export --out plain.jsonl >&2; $t $u export --out packed.jsonl.gz >&2
             $t -u other.tai import plain.jsonl >&2
             $t -u strict.tai import --strict - < plain.jsonl >&2
             $t -u '' demo --kill-after 10 --keep deep/kept -o json >&2",
            folder = folder.path().display()
        );
        let ran = run(bash(&script), b"").ok();
        assert_eq!(ran.out, "store.tai 600\nstore.tai-wal 600\nstore.tai-shm 600\n", "{umask}");
        let at = |name: &str| mode(&folder.path().join(name));
        for file in [
            "store.tai",
            "plain.jsonl",
            "packed.jsonl.gz",
            "other.tai",
            "strict.tai",
            "deep/kept/demo.tai",
        ] {
            assert_eq!(at(file), 0o600, "{file} under umask {umask}");
        }
        for made in ["deep", "deep/kept"] {
            assert_eq!(at(made) | 0o700, 0o700, "{made} under umask {umask}");
        }
        assert_eq!(fs::read_dir(folder.path().join("tmp")).unwrap().count(), 0, "{umask}");
    }
}

/// While a file is being made it is as private as afterwards: every name that appears, as the system was
/// asked for it.
#[test]
fn temporary_files_are_private_from_their_first_moment() {
    let store = Store::new();
    let folder = store.folder.path().display().to_string();
    let watched = format!(
        "umask 000; cd {folder}; mkdir tmp; export TMPDIR=$PWD/tmp
         command -v strace >/dev/null || exit 77
         strace -f -qq -e trace=open,openat,mkdir,mkdirat -o trace {BINARY} -u store.tai init >&2
         echo '{{\"governor_id\":\"g\",\"state_id\":\"s\",\"action\":\"a\",\"actor\":\"me\",\"timestamp\":\"2026-01-01T00:00:00Z\",\"data\":1}}' |
         strace -f -qq -e trace=open,openat,mkdir,mkdirat -A -o trace {BINARY} -u store.tai import --strict - >&2
         strace -f -qq -e trace=open,openat,mkdir,mkdirat -A -o trace {BINARY} -u store.tai export --out x.jsonl >&2
         strace -f -qq -e trace=mkdir,mkdirat -A -o trace {BINARY} demo --kill-after 10 -o json >&2
         grep -E 'O_CREAT|mkdir' trace"
    );
    let ran = run(bash(&watched), b"");
    if ran.exit == 77 {
        return common::skipped("a test of modes at creation: strace is not installed");
    }
    assert_eq!(ran.exit, 0, "{ran:?}");
    let mut made = std::collections::HashSet::new();
    for line in ran.out.lines() {
        // A file that is there keeps its mode, whatever mode it is opened with.
        if !made.insert(line.split('"').nth(1).unwrap()) {
            continue;
        }
        let mode = line.rsplit_once(')').unwrap().0.rsplit_once(' ').unwrap().1;
        let wanted = if line.contains("mkdir") { "0700" } else { "0600" };
        assert!(mode == wanted, "{line}");
    }
    assert!(made.len() >= 6, "{}", ran.out);
}

#[test]
fn what_is_made_follows_no_link() {
    let store = Store::made();
    let victim = store.folder.path().join("victim");
    fs::write(&victim, "untouched").unwrap();
    let link = |name: &str, to: &Path| {
        let path = store.folder.path().join(name);
        symlink(to, &path).unwrap();
        path.display().to_string()
    };
    // An export takes the link's place.
    let out = link("out.jsonl", &victim);
    store.run(&["export", "--out", &out]).ok();
    assert!(!fs::symlink_metadata(&out).unwrap().is_symlink());
    // A store is not made where a link leads.
    let nowhere = store.folder.path().join("nowhere");
    let dangling = link("dangling.tai", &nowhere);
    let mut command = common::tool();
    command.args(["-u", &dangling, "init"]);
    assert_ne!(run(command, b"").exit, 0);
    assert!(!nowhere.exists());
    let taken = link("taken.tai", &victim);
    let mut command = common::tool();
    command.args(["-u", &taken, "init"]);
    assert_ne!(run(command, b"").exit, 0);
    // Beside a link there is no log to be led astray by.
    let store_link = link("link.tai", &store.file);
    let mut command = common::tool();
    command.args(["-u", &store_link, "put", "g/s", "--data", "1"]);
    run(command, b"").ok();
    assert!(!store.folder.path().join("link.tai-wal").exists());
    assert_eq!(fs::read_to_string(&victim).unwrap(), "untouched");
}
