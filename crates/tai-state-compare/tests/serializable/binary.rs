//! Builds the command line and starts it, knowing no store but the one it is given.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;

use serde_json::Value;

/// The binary of the sources at hand. It is another package's, so that Cargo does not name it to
/// this test: Cargo is asked to build it, where it is up to date in no time.
pub(crate) fn path() -> &'static Path {
    static BUILT: OnceLock<PathBuf> = OnceLock::new();
    BUILT.get_or_init(build)
}

fn build() -> PathBuf {
    // `…/target/PROFILE/deps/serializable-…`, and `debug` is where the profile `dev` builds.
    let this = std::env::current_exe().unwrap();
    let folder = this.ancestors().nth(2).and_then(Path::file_name).and_then(|name| name.to_str());
    let profile = match folder.unwrap() {
        "debug" => "dev",
        other => other,
    };
    let target = Path::new(env!("CARGO_TARGET_TMPDIR")).parent().unwrap();
    let mut cargo = Command::new(env!("CARGO"));
    // What Cargo tells a test of its package is not for another Cargo: build scripts that look at
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
        .arg(target)
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

/// The binary on this store, in an environment that names no other store and no emulator, and from
/// which nothing gets off this machine: no credentials, and nobody to ask for any.
pub(crate) fn command(url: &str, args: &[&str]) -> Command {
    let mut command = Command::new(path());
    for name in [
        "TAI_STATE_URL",
        "TAI_STATE_OUTPUT",
        "TAI_STATE_ACTOR",
        "TAI_STATE_ALLOW_EPHEMERAL_DISK",
        "K_SERVICE",
        "FIRESTORE_EMULATOR_HOST",
        "GOOGLE_APPLICATION_CREDENTIALS",
    ] {
        command.env_remove(name);
    }
    command.env("GCE_METADATA_HOST", "127.0.0.1:1");
    command.env("HOME", concat!(env!("CARGO_TARGET_TMPDIR"), "/no-home"));
    command.arg("-u").arg(url).args(args);
    command
}

/// Runs it to its end, which must be a good one.
pub(crate) fn done(url: &str, args: &[&str]) {
    let ran = command(url, args).stdin(Stdio::null()).output().unwrap();
    assert!(ran.status.success(), "{args:?}: {ran:?}");
}
