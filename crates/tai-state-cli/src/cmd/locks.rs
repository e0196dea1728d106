//! `locks`: list, show and break locks, and run a command while holding one.

use std::process::ExitStatus;
use std::time::Duration;

use serde_json::{Value, json};
use tai_state::{LockRecord, StateStore, TransactionManager};
use tokio::process::{Child, Command};

use crate::args::{Global, Locks, LocksCommand, LocksRun};
use crate::failure::{Failure, Outcome, exit, io};
use crate::output::{self, Rows, time};

/// What a command that has lost its lock has left to end by itself.
const GRACE: Duration = Duration::from_secs(2);

pub(crate) async fn run(global: &Global, store: &StateStore, args: &Locks) -> Outcome {
    let manager = TransactionManager::new(store).with_lock_governor(&args.governor);
    match &args.command {
        LocksCommand::Ls => list(global, &manager).await,
        LocksCommand::Show { name } => match manager.lock_record(name).await? {
            Some(record) => output::object(global.output, &json(&record), &text(&record)),
            None => Err(never_granted(name)),
        },
        LocksCommand::Break { name } => match manager.break_lock(name).await? {
            Some(record) => output::object(
                global.output,
                &json!({"lock": record.resource, "broken": true, "held_by": record.client_id,
                    "fencing_token": record.fencing_token}),
                &format!(
                    "{} was taken from {} (fencing token {})",
                    record.resource, record.client_id, record.fencing_token
                ),
            ),
            None => output::object(
                global.output,
                &json!({"lock": name, "broken": false}),
                &format!("{name} is held by nobody"),
            ),
        },
        LocksCommand::Cleanup => {
            let freed = manager.cleanup_expired_locks().await?;
            let text = format!("{freed} locks whose leases had ended are marked as free");
            output::object(global.output, &json!({"freed": freed}), &text)
        }
        LocksCommand::Run(run) => run_under(&manager, &args.governor, run).await,
    }
}

fn never_granted(name: &str) -> Failure {
    Failure::new(exit::NOT_FOUND, "not_found", format!("the lock {name} was never granted"))
        .hint("list the locks with `tai-state locks ls`")
}

fn json(record: &LockRecord) -> Value {
    json!({
        "lock": record.resource,
        "status": record.status,
        "client_id": record.client_id,
        "fencing_token": record.fencing_token,
        "lease_ms": u64::try_from(record.lease.as_millis()).unwrap_or(u64::MAX),
        "left_ms": record.left.map(|left| u64::try_from(left.as_millis()).unwrap_or(u64::MAX)),
        "acquired_at": time(&record.acquired_at),
        "expires_at": time(&record.expires_at),
    })
}

fn status(record: &LockRecord) -> String {
    json!(record.status).as_str().unwrap_or_default().to_owned()
}

fn text(record: &LockRecord) -> String {
    format!(
        "{} is {}: {}, fencing token {}, lease {}, acquired {}",
        record.resource,
        status(record),
        record.client_id,
        record.fencing_token,
        humantime::format_duration(record.lease),
        time(&record.acquired_at)
    )
}

async fn list(global: &Global, manager: &TransactionManager) -> Outcome {
    let headings = ["LOCK", "STATUS", "CLIENT", "TOKEN", "LEASE", "ACQUIRED"];
    let mut rows = Rows::new(global.output, &headings);
    for record in manager.list_locks().await? {
        rows.push(
            &json(&record),
            &[
                record.resource.clone(),
                status(&record),
                record.client_id.clone(),
                record.fencing_token.to_string(),
                humantime::format_duration(record.lease).to_string(),
                time(&record.acquired_at),
            ],
        )?;
    }
    rows.finish()
}

async fn run_under(manager: &TransactionManager, governor: &str, args: &LocksRun) -> Outcome {
    let client = args.client.clone().unwrap_or_else(|| {
        let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
        format!("{}:{}", host.trim(), std::process::id())
    });
    let lock = manager.acquire_lock_within(&args.name, client, args.ttl, args.wait).await?;
    let Some((program, arguments)) = args.command.split_first() else {
        return Err(Failure::usage("no command was given"));
    };
    let failed = |error: std::io::Error| io("the command", &error);
    let mut asked = Asked::listen().map_err(failed)?;
    let started = Command::new(program)
        .args(arguments)
        .env("TAI_LOCK_GOVERNOR", governor)
        .env("TAI_LOCK_NAME", &args.name)
        .env("TAI_LOCK_TOKEN", lock.fencing_token.to_string())
        .spawn();
    let mut child = match started {
        Ok(child) => child,
        Err(error) => {
            lock.release().await?;
            return Err(io(&program.to_string_lossy(), &error));
        }
    };
    let ended = tokio::select! {
        status = asked.wait(&mut child) => Ok(status),
        lost = lock.lost() => Err(lost),
    };
    match ended {
        Ok(Err(error)) => {
            end(&mut child).await.map_err(failed)?;
            Err(failed(error))
        }
        Ok(Ok(status)) => {
            // Also who held it to the end must learn that somebody else had it meanwhile.
            lock.release().await?;
            match code(status) {
                0 => Ok(()),
                code => Err(Failure::passed_on(code)),
            }
        }
        Err(lost) => {
            end(&mut child).await.map_err(failed)?;
            Err(Failure::from(lost))
        }
    }
}

/// Who asks this process to end. It listens before the command starts, which may be what asks, and at
/// once: unheard, that would end this process, and leave the command and the lock behind.
#[cfg(unix)]
struct Asked {
    terminate: tokio::signal::unix::Signal,
    hang_up: tokio::signal::unix::Signal,
    interrupt: tokio::signal::unix::Signal,
}

#[cfg(unix)]
impl Asked {
    fn listen() -> std::io::Result<Self> {
        use tokio::signal::unix::{SignalKind, signal};
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            hang_up: signal(SignalKind::hangup())?,
            interrupt: signal(SignalKind::interrupt())?,
        })
    }

    /// Waits for the command. Who asks this process to end asks the command; the terminal's Ctrl-C
    /// reaches both by itself.
    async fn wait(&mut self, child: &mut Child) -> std::io::Result<ExitStatus> {
        loop {
            tokio::select! {
                status = child.wait() => return status,
                _ = self.terminate.recv() => ask_to_end(child),
                _ = self.hang_up.recv() => ask_to_end(child),
                _ = self.interrupt.recv() => {}
            }
        }
    }
}

#[cfg(not(unix))]
struct Asked;

#[cfg(not(unix))]
impl Asked {
    fn listen() -> std::io::Result<Self> {
        Ok(Self)
    }

    async fn wait(&mut self, child: &mut Child) -> std::io::Result<ExitStatus> {
        child.wait().await
    }
}

#[cfg(unix)]
fn ask_to_end(child: &Child) {
    use rustix::process::{Pid, Signal, kill_process};
    let pid = child.id().and_then(|id| i32::try_from(id).ok()).and_then(Pid::from_raw);
    if let Some(pid) = pid {
        // It may have ended just now.
        let _ = kill_process(pid, Signal::TERM);
    }
}

#[cfg(not(unix))]
fn ask_to_end(_: &Child) {}

/// Ends the command: by asking, then by force.
async fn end(child: &mut Child) -> std::io::Result<()> {
    ask_to_end(child);
    if tokio::time::timeout(GRACE, child.wait()).await.is_err() {
        child.kill().await?;
    }
    Ok(())
}

fn code(status: ExitStatus) -> u8 {
    #[cfg(unix)]
    if let Some(signal) = std::os::unix::process::ExitStatusExt::signal(&status) {
        return u8::try_from(128 + signal).unwrap_or(exit::OTHER);
    }
    status.code().and_then(|code| u8::try_from(code).ok()).unwrap_or(exit::OTHER)
}
