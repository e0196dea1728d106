//! Google's official Python client reads what the program wrote, and what it changes is noticed:
//! `tests/interop/read_ours.py` beside the crates does the work.

#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]

mod common;

use std::path::{Path, PathBuf};
use std::process::Command;

use common::{BINARY, Engine, program};
use tai_state::testing::emulator::fresh_project;

const FOLDER: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/interop");
const WANTED: &str = include_str!("../../../tests/interop/requirements.txt");

/// Google's client in a virtual environment below the target folder, kept for the next run. What is
/// in the way stands in the error.
fn python() -> Result<PathBuf, String> {
    let system =
        ["python3", "python"].into_iter().find(|name| works(name, "import venv, ensurepip"));
    let system = system.ok_or("there is no Python 3 that can make virtual environments")?;
    let below = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let wanted: String =
        WANTED.trim().chars().map(|c| if c.is_alphanumeric() { c } else { '-' }).collect();
    let kept = below.join(format!("interop-{wanted}"));
    let python = |folder: &Path| folder.join("bin/python");
    let has_client = |folder: &Path| works(python(folder), "from google.cloud import firestore");
    if has_client(&kept) {
        return Ok(python(&kept));
    }
    // Made aside, so that one that is there is whole, whoever else makes it now.
    let made = tempfile::Builder::new().prefix("interop-").tempdir_in(below).unwrap();
    done(Command::new(system).args(["-m", "venv"]).arg(made.path()))?;
    let mut install = Command::new(python(made.path()));
    install.args(["-m", "pip", "install", "--quiet", "--disable-pip-version-check"]);
    install.args(["--retries", "1", "--timeout", "15", "-r", "requirements.txt"]);
    done(install.current_dir(FOLDER))?;
    // Whatever is there does not work, or somebody was faster; then ours is as good.
    let _ = std::fs::remove_dir_all(&kept);
    let made = made.keep();
    match std::fs::rename(&made, &kept) {
        Ok(()) => Ok(python(&kept)),
        Err(_) => Ok(python(&made)),
    }
}

fn works(python: impl AsRef<std::ffi::OsStr>, program: &str) -> bool {
    let output = Command::new(python).args(["-c", program]).output();
    output.is_ok_and(|output| output.status.success())
}

/// Runs it to its end; if it fails, the error is its last line.
fn done(command: &mut Command) -> Result<(), String> {
    let output = command.output().map_err(|error| error.to_string())?;
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    let last = || text.lines().last().unwrap_or_default().to_owned();
    if output.status.success() { Ok(()) } else { Err(last()) }
}

#[test]
fn google_s_own_client_reads_ours() {
    let Some(Engine::Emulator(address)) = Engine::emulator() else { return };
    let python = match python() {
        Ok(python) => python,
        Err(missing) => {
            common::skipped(&format!("the test with Google's Python client: {missing}"));
            return;
        }
    };
    let project = fresh_project();
    std::thread::scope(|scope| {
        // Side by side in one database.
        for prefix in ["", "p_"] {
            let (python, project) = (&python, &project);
            scope.spawn(move || {
                let mut script = program(python.to_str().unwrap());
                script.args(["-B", "read_ours.py", BINARY, project, prefix]);
                script.env("FIRESTORE_EMULATOR_HOST", address).current_dir(FOLDER);
                let ran = common::run(script, b"");
                assert_eq!((ran.exit, ran.out.as_str()), (0, "ok\n"), "{prefix:?}: {}", ran.err);
            });
        }
    });
}
