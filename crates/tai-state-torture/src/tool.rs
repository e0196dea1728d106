//! The real binary, `tai-state`: found or built, and started in an environment that leads nowhere else.

use std::io::{BufRead, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;

use serde_json::Value;

static BINARY: OnceLock<PathBuf> = OnceLock::new();

/// Tortures this one.
pub(crate) fn use_binary(path: &Path) {
    let path = path.canonicalize().expect("--binary names a file that is there");
    let _ = BINARY.set(path);
}

/// The binary of the sources at hand. It is another package's, so Cargo is asked to build it; where
/// it is up to date that takes no time.
pub(crate) fn path() -> &'static Path {
    BINARY.get_or_init(build)
}

fn build() -> PathBuf {
    let this = std::env::current_exe().unwrap();
    // `…/target/PROFILE/tai-state-torture`, or `…/PROFILE/deps/…` for a test; `debug` is where the
    // profile `dev` builds.
    let mut folder = this.parent().unwrap();
    if folder.ends_with("deps") {
        folder = folder.parent().unwrap();
    }
    let profile = match folder.file_name().and_then(|name| name.to_str()).unwrap() {
        "debug" => "dev",
        other => other,
    };
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    // What Cargo tells a program that it runs is not for another Cargo: build scripts that look at
    // it would run again, and most would be compiled anew each time.
    for (name, _) in std::env::vars_os() {
        let told = ["CARGO_MANIFEST_", "CARGO_PKG_", "CARGO_BIN_", "CARGO_CRATE_", "OUT_DIR"];
        if name.to_str().is_some_and(|name| told.iter().any(|told| name.starts_with(told))) {
            cargo.env_remove(name);
        }
    }
    let built = cargo
        .args(["build", "--locked", "--quiet", "-p", "tai-state-cli", "--bin", "tai-state"])
        .args(["--message-format", "json-render-diagnostics", "--profile", profile, "--target-dir"])
        .arg(folder.parent().unwrap())
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .output()
        .unwrap();
    assert!(built.status.success(), "cargo could not build the command line");
    let messages = String::from_utf8(built.stdout).unwrap();
    let messages = messages.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    let executable = |message: Value| {
        (message["target"]["name"] == "tai-state")
            .then(|| message["executable"].as_str().map(PathBuf::from))
            .flatten()
    };
    messages.filter_map(executable).next_back().expect("cargo names what it built")
}

/// Takes from an environment whatever names a store or an emulator, and any way off this machine: no
/// credentials, and nobody to ask for any.
pub(crate) fn apart(command: &mut Command) {
    for name in [
        "TAI_STATE_URL",
        "TAI_STATE_OUTPUT",
        "TAI_STATE_ACTOR",
        "TAI_STATE_ALLOW_EPHEMERAL_DISK",
        "TAI_LOCK_GOVERNOR",
        "K_SERVICE",
        "FIRESTORE_EMULATOR_HOST",
        "GOOGLE_APPLICATION_CREDENTIALS",
    ] {
        command.env_remove(name);
    }
    command.env("GCE_METADATA_HOST", "127.0.0.1:1");
    command.env("HOME", "/nonexistent");
}

/// The binary on this store.
pub(crate) fn command(url: &str, args: &[&str]) -> Command {
    let mut command = Command::new(path());
    apart(&mut command);
    command.arg("-u").arg(url).args(args);
    command
}

/// What a run of the binary gave.
#[derive(Debug)]
pub(crate) struct Ran {
    /// -1 when a signal ended it.
    pub(crate) exit: i32,
    pub(crate) out: String,
    pub(crate) err: String,
}

impl Ran {
    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(&self.out).unwrap_or_else(|e| panic!("{e}: {self:?}"))
    }
}

/// Runs a command to its end.
pub(crate) fn ran(mut command: Command, input: &[u8]) -> Ran {
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let input = input.to_vec();
    let feeder = std::thread::spawn(move || {
        // A command that refuses its input early closes the pipe.
        let _ = stdin.write_all(&input);
    });
    let output = child.wait_with_output().unwrap();
    feeder.join().unwrap();
    Ran {
        exit: output.status.code().unwrap_or(-1),
        out: String::from_utf8_lossy(&output.stdout).into_owned(),
        err: String::from_utf8_lossy(&output.stderr).into_owned(),
    }
}

/// Runs the binary on this store to its end, with JSON as its output.
pub(crate) fn json(url: &str, args: &[&str]) -> Ran {
    let args: Vec<&str> = ["-o", "json"].iter().chain(args).copied().collect();
    ran(command(url, &args), b"")
}

/// Starts it with a pipe from its standard output.
pub(crate) fn started(mut command: Command) -> (Child, BufReader<std::process::ChildStdout>) {
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
    let mut child = command.spawn().unwrap();
    let out = BufReader::new(child.stdout.take().unwrap());
    (child, out)
}

/// One line of acknowledgement. A line that a kill cut off was not acknowledged.
pub(crate) fn acknowledgement(reader: &mut impl BufRead) -> Option<Value> {
    let mut line = String::new();
    reader.read_line(&mut line).unwrap();
    line.ends_with('\n').then(|| serde_json::from_str(&line).unwrap())
}

/// What the system says of the memory of a process (or of `self`), in KiB: `VmRSS` now, `VmHWM` at most.
pub(crate) fn memory(process: &str, which: &str) -> Option<u64> {
    let status = std::fs::read_to_string(format!("/proc/{process}/status")).ok()?;
    let said = status.lines().find_map(|line| line.strip_prefix(which)?.strip_prefix(':'))?;
    said.split_whitespace().next()?.parse().ok()
}
