//! The `tai-state` command line: all of it but its `main`, so that tests reach what reads its input.

#![forbid(unsafe_code)]

mod args;
mod cmd;
mod failure;
#[cfg(feature = "testing")]
pub mod fuzz;
mod output;
mod point;

use std::process::ExitCode;

use clap::Parser;
use tai_state::{Error, StateStore, StoreOptions, StoreUrl};

use crate::args::{Cli, Command, Conditions, Format, Global, Once};
use crate::failure::{Failure, Outcome, exit};

/// Runs the command that the program was called with.
#[must_use]
pub fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            let code = u8::try_from(error.exit_code()).unwrap_or(exit::USAGE);
            // What asks for help is answered; anything else may quote an argument that steers a terminal.
            if !error.use_stderr() {
                let _ = error.print();
            } else if wants_json() {
                misused(&error).with_exit(code).report(Format::Json);
            } else {
                eprint!("{}", output::visible(&error.to_string()));
            }
            return ExitCode::from(code);
        }
    };
    let format = cli.global.output;
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return ended(Err(failure::io("the runtime", &error)), format),
    };
    let outcome = runtime.block_on(run(cli));
    ended(outcome, format)
}

/// Whether errors are read by a program, when the command line that would say so cannot be understood.
fn wants_json() -> bool {
    let args: Vec<String> =
        std::env::args_os().skip(1).map(|arg| arg.to_string_lossy().into_owned()).collect();
    let ours = args.split(|arg| arg == "--").next().unwrap_or_default();
    let after = ours.iter().skip(1).map(Some).chain([None]);
    let said = ours.iter().zip(after).filter_map(|(arg, next)| match arg.as_str() {
        "-o" | "--output" => next.map(String::as_str),
        arg => arg.strip_prefix("--output=").or_else(|| arg.strip_prefix("-o")),
    });
    let environment = std::env::var("TAI_STATE_OUTPUT").ok();
    let said = said.last().or(environment.as_deref());
    said.is_some_and(|format| matches!(format.trim_start_matches('='), "json" | "jsonl"))
}

/// What clap says, in one line and with its hints apart.
fn misused(error: &clap::Error) -> Failure {
    let text = error.to_string();
    let mut parts =
        text.split("\n\n").map(|part| part.split_whitespace().collect::<Vec<_>>().join(" "));
    let message = parts.next().unwrap_or_default();
    let failure = Failure::usage(message.strip_prefix("error: ").unwrap_or(&message));
    match parts.filter(|part| !part.is_empty()).collect::<Vec<_>>().join("; ") {
        hint if hint.is_empty() => failure,
        hint => failure.hint(hint),
    }
}

fn ended(outcome: Outcome, format: Format) -> ExitCode {
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        // Like every tool of the shell: `tai-state … | head` is no failure.
        Err(failure) if failure.is_reader_left() => ExitCode::SUCCESS,
        Err(failure) => {
            failure.report(format);
            ExitCode::from(failure.exit)
        }
    }
}

async fn run(cli: Cli) -> Outcome {
    let global = cli.global;
    if !matches!(cli.command, Command::Firestore(_) | Command::DemoWriter(_)) {
        say_who_answers(&global);
    }
    match cli.command {
        Command::Demo(args) => cmd::demo::run(&global, &args).await,
        Command::DemoWriter(args) => cmd::demo::write(&connect(&global, true).await?, &args).await,
        Command::Init => cmd::init::run(&global).await,
        Command::Import(args) => cmd::import::run(&global, &args).await,
        Command::Export(args) => {
            cmd::export::run(&global, &connect(&global, false).await?, &args).await
        }
        Command::Get(args) => cmd::get::run(&global, &args).await,
        Command::Put(args) => cmd::put::run(&global, &args).await,
        Command::Rm(args) => cmd::rm::run(&global, &args).await,
        Command::Ls(args) => cmd::ls::run(&global, &connect(&global, false).await?, &args).await,
        Command::History(args) => cmd::history::run(&global, &args).await,
        Command::Diff(args) => cmd::diff::run(&global, &args).await,
        Command::Timeline(args) => cmd::timeline::run(&global, &args).await,
        Command::Revert(args) => cmd::revert::run(&global, &args).await,
        Command::Replay(args) => cmd::replay::run(&global, &args).await,
        Command::Recover(args) => cmd::recover::run(&global, &args).await,
        Command::Snapshots(args) => cmd::snapshots::run(&global, &args).await,
        Command::Cleanup(args) => cmd::cleanup::run(&global, &args).await,
        Command::Purge(args) => cmd::purge::run(&global, &args).await,
        Command::Verify(args) => {
            cmd::verify::run(&global, &connect(&global, false).await?, &args).await
        }
        Command::Stats => cmd::stats::run(&global, &connect(&global, false).await?).await,
        Command::Txn(args) => {
            let store = fenced(connect(&global, false).await?, &args.conditions)?;
            cmd::txn::run(&store, &args).await.map_err(Failure::part_way)
        }
        Command::Locks(args) => {
            cmd::locks::run(&global, &connect(&global, false).await?, &args).await
        }
        Command::Firestore(args) => cmd::firestore::run(&global, &args),
    }
}

/// Opens the store that was named. Only `init`, `import` and the demo make one: a mistyped name must
/// not leave a file behind.
async fn connect(global: &Global, create: bool) -> Outcome<StateStore> {
    let url = url(global)?;
    let parsed: StoreUrl = url.parse()?;
    let mut options = StoreOptions::default();
    options.create = create;
    options.allow_ephemeral_disk = global.allow_ephemeral_disk;
    options.allow_remote_emulator = global.allow_remote_emulator;
    let opened = StateStore::connect_with(url, options).await;
    opened.map_err(|error| {
        let is_missing = match &parsed {
            StoreUrl::File { path } => !create && path.symlink_metadata().is_err(),
            // No store, or no such database: Firestore has nothing else that could stand there.
            StoreUrl::Firestore { .. } | StoreUrl::FirestoreEmulator { .. } => {
                matches!(error, Error::NotAStore { .. })
            }
            _ => false,
        };
        let failure = Failure::from(error);
        if is_missing { failure.with_exit(exit::NOT_FOUND) } else { failure }
    })
}

/// The store under the conditions that a command was given.
fn fenced(store: StateStore, conditions: &Conditions) -> Outcome<StateStore> {
    conditions.fence.iter().try_fold(store, |store, (lock, token)| {
        let governor = &conditions.fence_governor;
        Ok(store.fenced_by(tai_state::Fence::of_governor(governor, lock, *token)?))
    })
}

/// The store for one write, which is done once if it has a key.
fn once(store: StateStore, once: &Once) -> Outcome<StateStore> {
    match &once.idempotency_key {
        Some(key) => Ok(store.idempotency_key(key)?),
        None => Ok(store),
    }
}

/// Where a store of Google's own is looked for on an emulator, because the environment says so.
fn emulator_instead_of_google(url: &StoreUrl) -> Option<String> {
    let is_google = matches!(url, StoreUrl::Firestore { .. });
    std::env::var("FIRESTORE_EMULATOR_HOST").ok().filter(|host| is_google && !host.is_empty())
}

/// A note for people: nobody shall take an emulator for Google. Programs that want to know find the
/// `location` in what `init` answers; their standard error holds errors only.
fn say_who_answers(global: &Global) {
    let url = global.url.as_deref().and_then(|url| url.parse::<StoreUrl>().ok());
    if let (Some(url), Format::Table) = (url, global.output)
        && let Some(host) = emulator_instead_of_google(&url)
    {
        // What an address may say before an `@` is nothing to show.
        let host = host.rsplit('@').next().unwrap_or_default();
        let text = format!(
            "note: {url} is looked for on the emulator at {host}, not at Google (FIRESTORE_EMULATOR_HOST)"
        );
        eprintln!("{}", output::visible_line(&text));
    }
}

fn url(global: &Global) -> Outcome<&str> {
    global.url.as_deref().filter(|url| !url.is_empty()).ok_or_else(|| {
        Failure::usage("no store was named: give --url or set TAI_STATE_URL").hint(
            "for example: -u app.tai, -u file:///data/app.tai, \
             -u firestore+emulator://127.0.0.1:8080/demo-app",
        )
    })
}

/// Splits GOVERNOR/STATE at the first slash.
fn address(text: &str) -> Outcome<(&str, &str)> {
    match text.split_once('/') {
        Some((governor, state)) if !governor.is_empty() && !state.is_empty() => {
            Ok((governor, state))
        }
        _ => Err(Failure::rejected(format!("{text:?} is not an address: write GOVERNOR/STATE"))),
    }
}
