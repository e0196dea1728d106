//! `demo`: a fleet of machines in a child process, a SIGKILL in the middle, the recovery, the past.

use std::collections::HashMap;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use serde::Deserialize;
use serde_json::{Value, json};
use tai_state::{
    ChangeMetadata, Error, NewTransition, StateMachinePersister, StateStore, StoreUrl,
};
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, Command};
use tokio::time::Instant;

use crate::args::{Demo, DemoWriter, Global};
use crate::failure::{Failure, Outcome, exit, io};
use crate::output::{self, pretty, time};
use crate::{connect, emulator_instead_of_google, url};

const GOVERNOR: &str = "orders";
const STATUSES: [&str; 5] = ["placed", "paid", "packed", "shipped", "delivered"];
/// The writer is killed after this long, however little it has done.
const LONGEST: Duration = Duration::from_secs(10);

/// What the writer says of each transition once it is durable.
#[derive(Deserialize)]
struct Ack {
    state: String,
    version: u64,
}

pub(crate) async fn run(global: &Global, args: &Demo) -> Outcome {
    let temporary = temporary().map_err(|error| io("the demo's folder", &error))?;
    let is_on_emulator = is_on_emulator(global)?;
    let there = if is_on_emulator {
        on_emulator(global, args).await?
    } else {
        in_file(global, args.keep.as_deref().unwrap_or(temporary.path()))?
    };
    let place = url(&there)?;
    let say = |text: &str| {
        if global.output == crate::args::Format::Table {
            output::line(&output::visible(text))
        } else {
            Ok(())
        }
    };

    say(&format!("1. A child process moves 128 machines with 32 tasks, in {place}"))?;
    let started = Instant::now();
    let mut child = spawn(&there)?;
    let acked = acknowledged(&mut child, args.kill_after).await?;
    child.kill().await.map_err(|error| io("the writer", &error))?;
    let wrote_for = started.elapsed();
    let transitions: u64 = acked.values().sum();
    say(&format!(
        "   {transitions} transitions of {} machines acknowledged in {:.2} s; then: kill -9",
        acked.len(),
        wrote_for.as_secs_f64()
    ))?;

    let started = Instant::now();
    let store = connect(&there, false).await?;
    let reopened = started.elapsed();
    let lost = lost(&store, &acked).await?;
    say(&format!(
        "2. Opened again in {:.1} ms. Acknowledged and lost: {lost}",
        reopened.as_secs_f64() * 1e3
    ))?;

    let started = Instant::now();
    let report = store.verify(|_| {}).await?;
    let verified = started.elapsed();
    say(&format!(
        "3. Verified in {:.0} ms: {} states, {} events, {} saved snapshots, {}\n   content hash {}",
        verified.as_secs_f64() * 1e3,
        report.states,
        report.events,
        report.snapshots,
        if report.ok { "every hash and every chain holds" } else { "NOT ok" },
        report.content_hash
    ))?;

    let machine = acked.keys().min().cloned().unwrap_or_default();
    show_history(&store, &machine, say).await?;
    if global.output != crate::args::Format::Table {
        output::line(
            &json!({
                "acknowledged": transitions, "lost": lost, "ok": report.ok, "states": report.states,
                "events": report.events, "content_hash": report.content_hash,
                "seconds_writing": wrote_for.as_secs_f64(), "seconds_opening": reopened.as_secs_f64(),
                "seconds_verifying": verified.as_secs_f64(),
            })
            .to_string(),
        )?;
    }
    if is_on_emulator || args.keep.is_some() {
        say(&format!("\nLook around: tai-state -u {place} history {GOVERNOR}/{machine}"))?;
    }
    if lost > 0 || !report.ok {
        return Err(Failure::new(exit::INTEGRITY, "corrupt", "the demo lost something"));
    }
    Ok(())
}

/// Whether the URL names an emulator. A database at Google is not for demonstrations.
fn is_on_emulator(global: &Global) -> Outcome<bool> {
    let Some(url) = global.url.as_deref().filter(|url| !url.is_empty()) else { return Ok(false) };
    let url: StoreUrl = url.parse()?;
    match &url {
        StoreUrl::FirestoreEmulator { .. } => Ok(true),
        StoreUrl::Firestore { .. } if emulator_instead_of_google(&url).is_some() => Ok(true),
        StoreUrl::Firestore { .. } => {
            Err(Failure::rejected(format!("the demo does not write to {url}: that is Google's"))
                .hint("give -u firestore+emulator://HOST:PORT/PROJECT, or -u demo.tai"))
        }
        _ => Ok(false),
    }
}

/// The store at the emulator, where there must be none yet.
async fn on_emulator(global: &Global, args: &Demo) -> Outcome<Global> {
    if args.keep.is_some() {
        return Err(Failure::usage("--keep is for a file; a store on an emulator stays anyway"));
    }
    match connect(global, false).await {
        Ok(store) => {
            let message = format!("{} is there already", store.location());
            Err(Failure::new(exit::CONFLICT, "exists", message)
                .hint("name another project, or a prefix: ?prefix=demo_"))
        }
        Err(failure) if failure.exit == exit::NOT_FOUND => Ok(global.clone()),
        Err(failure) => Err(failure),
    }
}

/// A folder of its own, which nobody else may look into.
fn temporary() -> std::io::Result<tempfile::TempDir> {
    let mut folder = tempfile::Builder::new();
    #[cfg(unix)]
    folder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o700));
    folder.tempdir()
}

/// Makes a folder that nobody else may look into; one that is there stays as it is.
fn made(folder: &Path) -> std::io::Result<()> {
    let mut builder = std::fs::DirBuilder::new();
    #[cfg(unix)]
    std::os::unix::fs::DirBuilderExt::mode(&mut builder, 0o700);
    builder.recursive(true).create(folder)
}

fn in_file(global: &Global, folder: &Path) -> Outcome<Global> {
    made(folder).map_err(|error| io("the demo's folder", &error))?;
    let file = folder.join("demo.tai");
    if file.exists() {
        let message = format!("{} is there already", file.display());
        return Err(Failure::new(exit::CONFLICT, "exists", message));
    }
    let url = Some(format!("file:{}", file.display()));
    Ok(Global { url, allow_ephemeral_disk: true, ..global.clone() })
}

fn spawn(global: &Global) -> Outcome<Child> {
    let failed = |error: std::io::Error| io("the writer", &error);
    let mut writer = Command::new(std::env::current_exe().map_err(failed)?);
    writer.arg("--url").arg(url(global)?);
    let allowed = [
        ("--allow-ephemeral-disk", global.allow_ephemeral_disk),
        ("--allow-remote-emulator", global.allow_remote_emulator),
    ];
    writer.args(allowed.iter().filter(|(_, is_allowed)| *is_allowed).map(|(flag, _)| flag));
    writer
        .arg("demo-writer")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .map_err(failed)
}

/// Reads acknowledgements until there are enough, and returns the highest version of each machine.
async fn acknowledged(child: &mut Child, enough: u64) -> Outcome<HashMap<String, u64>> {
    let mut acked = HashMap::new();
    let Some(out) = child.stdout.take() else { return Ok(acked) };
    let mut lines = BufReader::new(out).lines();
    let deadline = Instant::now() + LONGEST;
    for _ in 0..enough {
        let Ok(line) = tokio::time::timeout_at(deadline, lines.next_line()).await else { break };
        let Some(line) = line.map_err(|error| io("the writer", &error))? else {
            return Err(Failure::new(exit::OTHER, "other", "the writer ended by itself"));
        };
        let ack: Ack = serde_json::from_str(&line)
            .map_err(|error| Failure::new(exit::OTHER, "other", format!("{line:?}: {error}")))?;
        let highest = acked.entry(ack.state).or_insert(0);
        *highest = ack.version.max(*highest);
    }
    Ok(acked)
}

async fn lost(store: &StateStore, acked: &HashMap<String, u64>) -> Outcome<u64> {
    let mut lost = 0;
    for (state, version) in acked {
        let found = store.record(GOVERNOR, state).await?;
        let has = found.map_or(0, |record| record.snapshot.version);
        lost += version.saturating_sub(has);
    }
    Ok(lost)
}

async fn show_history(store: &StateStore, machine: &str, say: impl Fn(&str) -> Outcome) -> Outcome {
    let (newest, version) = store.get_state(GOVERNOR, machine).await?;
    say(&format!("4. {GOVERNOR}/{machine} is at v{version}; its last changes:"))?;
    let from = version.saturating_sub(4).max(1);
    let mut history = store.history(GOVERNOR, machine, from..).await?;
    loop {
        let page = history.next_page().await?;
        if page.is_empty() {
            break;
        }
        for event in page {
            say(&format!(
                "   v{:<4} {}  {:<9} {}",
                event.version(),
                time(&event.timestamp),
                event.action,
                event.to_state.data
            ))?;
        }
    }
    let before = store.state_at_version(GOVERNOR, machine, from).await?;
    let diff = json_patch::diff(&before.data, &newest.data);
    say(&format!("5. What changed from v{from} to v{version}, as a JSON Patch:"))?;
    for line in pretty(&json!(diff)).lines() {
        say(&format!("   {line}"))?;
    }
    let then = before.timestamp;
    let past = store.state_at_time(GOVERNOR, machine, then).await?;
    say(&format!("6. And what was it at {}? v{}: {}", time(&then), past.version, past.data))
}

/// The process that is killed: tasks that move their machines and say so when it is durable.
pub(crate) async fn write(store: &StateStore, args: &DemoWriter) -> Outcome {
    let until = Instant::now() + Duration::from_secs(args.seconds);
    let mut tasks = tokio::task::JoinSet::new();
    for task in 0..args.tasks {
        let persister = StateMachinePersister::with_defaults(store);
        let machines = args.machines;
        tasks.spawn(async move {
            let mut step = 0usize;
            while Instant::now() < until {
                let machine = format!("order-{:03}", task * machines + step % machines.max(1));
                let round = step / machines.max(1);
                let status = STATUSES.get(round % STATUSES.len()).copied().unwrap_or_default();
                let data: Value = json!({
                    "status": status, "lap": round / STATUSES.len(), "items": [{"sku": task, "count": round}],
                });
                let who = ChangeMetadata::new(format!("worker-{task}"), "demo", None);
                let transition = NewTransition::to(GOVERNOR, &machine, status, data, who);
                let event = persister.append(transition).await?;
                let ack = json!({"state": machine, "version": event.version()});
                if output::line(&ack.to_string()).is_err() {
                    break;
                }
                step += 1;
            }
            Ok::<(), Error>(())
        });
    }
    while let Some(done) = tasks.join_next().await {
        done.unwrap_or(Ok(()))?;
    }
    Ok(())
}
