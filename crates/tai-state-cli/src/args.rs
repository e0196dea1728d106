//! What may stand on the command line.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};

/// Durable, versioned state for state machines, with the log of every change.
///
/// An ADDRESS is GOVERNOR/STATE; the first slash divides. A POINT in time is a version (v42), an
/// RFC 3339 time, or a while ago (-15m).
#[derive(Debug, Parser)]
#[command(name = "tai-state", version, after_help = AFTER_HELP)]
pub(crate) struct Cli {
    #[command(flatten)]
    pub(crate) global: Global,
    #[command(subcommand)]
    pub(crate) command: Command,
}

const AFTER_HELP: &str = "\
Exit codes: 0 done, 1 other, 2 usage, 3 not found, 4 conflict, 5 rejected input, 6 unavailable,
7 denied, 8 integrity, 9 stopped part-way and resumable.

Examples:
  tai-state -u app.tai init
  echo '{\"status\":\"open\"}' | tai-state -u app.tai put orders/o-1 --reason 'new order'
  tai-state -u app.tai get orders/o-1 --at -15m
  tai-state -u app.tai history orders/o-1
  tai-state -u app.tai verify";

#[derive(Debug, Clone, Args)]
pub(crate) struct Global {
    /// The store: a file such as app.tai, file:///data/app.tai, mem:, firestore://PROJECT/DATABASE?prefix=p
    /// (database and prefix may be left out), firestore+emulator://HOST:PORT/PROJECT
    #[arg(short, long, global = true, env = "TAI_STATE_URL", hide_env_values = true)]
    pub(crate) url: Option<String>,
    /// How answers and errors are written. json and jsonl are a contract for programs.
    #[arg(short, long, global = true, value_enum, default_value_t = Format::Table, env = "TAI_STATE_OUTPUT", hide_env_values = true)]
    pub(crate) output: Format,
    /// No progress bars.
    #[arg(long, global = true)]
    pub(crate) no_progress: bool,
    /// Accept a file where the disk is known to be memory (Cloud Run).
    #[arg(long, global = true, env = "TAI_STATE_ALLOW_EPHEMERAL_DISK", hide_env_values = true)]
    pub(crate) allow_ephemeral_disk: bool,
    /// Accept a Firestore emulator on another machine: what goes there is not encrypted.
    #[arg(long, global = true)]
    pub(crate) allow_remote_emulator: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Format {
    /// For people.
    Table,
    /// One JSON value.
    Json,
    /// One JSON object a line.
    Jsonl,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Show all of it: a fleet of machines, a kill -9 in the middle, the recovery, the past.
    ///
    /// It makes a file of its own, whatever file --url names. Where --url names a Firestore emulator it
    /// makes a store there, which stays.
    Demo(Demo),
    /// Make a new, empty store.
    Init,
    /// Take in transitions from JSON Lines, plain or gzip.
    ///
    /// The format is one JSON object a line:
    ///
    ///   {"governor_id","state_id","action","timestamp","actor","reason"?,"data","deleted"?}
    ///
    /// The given timestamps are kept as the transitions' own (never earlier than the version before).
    /// It may be run again, also after a kill: each line has an identity made of what it says and of how
    /// many equal lines stood before it in the input; the event carries it, and a line whose event is in
    /// the state's log already is passed over. Two equal lines are two transitions. A state may begin with a
    /// deletion (not with --strict): a log that was shortened can.
    Import(Import),
    /// Write the whole log as JSON Lines, in canonical order.
    Export(Export),
    /// Show a state, as it is or as it was.
    Get(Get),
    /// Write a state.
    Put(Put),
    /// Delete a state; its history stays.
    Rm(Rm),
    /// List governors, or the states of one.
    Ls(Ls),
    /// Show the changes of a state, oldest first.
    History(History),
    /// Show what changed in a state from one point in time to another, as a JSON Patch (RFC 6902).
    Diff(Diff),
    /// Show the changes of all states of a governor, in the order of their times.
    Timeline(Timeline),
    /// Make a state what it was, as a new version on top.
    Revert(Revert),
    /// Fold the log of a state from where it begins, and show what comes out.
    Replay(Replay),
    /// Establish a state from its log, and put back its head and saved snapshots where they are damaged
    /// or missing.
    Recover(Recover),
    /// Saved snapshots, from which replay may start.
    Snapshots(Snapshots),
    /// Remove events and saved snapshots that are older than is wanted.
    ///
    /// What a state was at any time within what is kept can still be asked. Newest versions and deleted
    /// states stay. May be run again, also after a kill: it goes on.
    Cleanup(Cleanup),
    /// Erase a state with everything that it ever was. A tombstone without data stays.
    ///
    /// Not erased: answers under idempotency keys, exports, backups. May be run again, also after a kill.
    Purge(Purge),
    /// Prove the whole store: every hash, every chain, every head.
    Verify(Verify),
    /// Show figures of the store.
    Stats,
    /// Run transactions, one JSON object a line, one answer a line.
    ///
    ///   {"id":"t1","ops":[{"op":"get","state":"g/a"},{"op":"put","state":"g/b","data":{},"expect":3}]}
    ///
    /// Operations: get, put and merge (RFC 7396) with "data", append (to an array) and add (to a number)
    /// with "value", delete; each may have "expect", the version that the state must have (0 = none).
    /// All of a line is done or nothing. A line without "expect" is run again after a conflict. "id" is its idempotency key among
    /// the lines of this store: sent again, it is answered as before and not applied again. Without an id (or
    /// with null) nothing is kept. "actor" and "reason" say who and why.
    ///
    /// Exit code 0 says that each line was answered; whether it was applied says "ok" in its answer. A line
    /// that is no request is answered with its error too, and makes the exit code 5.
    Txn(Txn),
    /// Locks with leases and fencing tokens.
    Locks(Locks),
    /// What a Firestore database needs beside the documents.
    Firestore(Firestore),
    /// The process that `demo` kills.
    #[command(hide = true)]
    DemoWriter(DemoWriter),
}

#[derive(Debug, Args)]
pub(crate) struct Demo {
    /// Keep the file in this folder afterwards.
    #[arg(long)]
    pub(crate) keep: Option<PathBuf>,
    /// Kill the writer after so many acknowledged transitions.
    #[arg(long, default_value_t = 4_000)]
    pub(crate) kill_after: u64,
}

#[derive(Debug, Args)]
pub(crate) struct DemoWriter {
    /// Tasks that write at the same time.
    #[arg(long, default_value_t = 32)]
    pub(crate) tasks: usize,
    /// Machines of each task.
    #[arg(long, default_value_t = 4)]
    pub(crate) machines: usize,
    /// Seconds after which the writer ends by itself, if nobody kills it.
    #[arg(long, default_value_t = 30)]
    pub(crate) seconds: u64,
}

#[derive(Debug, Args)]
pub(crate) struct Import {
    /// The file, or - for standard input. gzip is recognised by its first bytes.
    pub(crate) file: PathBuf,
    /// Read everything first, and take in nothing if one line is wrong.
    #[arg(long)]
    pub(crate) strict: bool,
    /// Take in lines that are older than the history that is kept, where they stand behind lines that are
    /// kept: their times fall, and they are new. Without this they are refused.
    #[arg(long)]
    pub(crate) take_older: bool,
    /// Write one JSON line to standard output for each transition that is durable.
    #[arg(long)]
    pub(crate) acks: bool,
    /// States that are written at the same time.
    #[arg(long, default_value_t = 128, value_parser = clap::value_parser!(u16).range(1..=4096))]
    pub(crate) jobs: u16,
}

#[derive(Debug, Args)]
pub(crate) struct Export {
    /// Write to this file instead of standard output; gzip when it ends in .gz. The file appears
    /// when it is complete.
    #[arg(long)]
    pub(crate) out: Option<PathBuf>,
    /// Only this governor.
    #[arg(long)]
    pub(crate) governor: Option<String>,
}

#[derive(Debug, Args)]
pub(crate) struct Get {
    /// GOVERNOR/STATE
    pub(crate) address: String,
    /// As it was: v42, an RFC 3339 time, or -15m.
    #[arg(long, allow_hyphen_values = true, value_name = "POINT")]
    pub(crate) at: Option<String>,
    /// Only the data.
    #[arg(long)]
    pub(crate) raw: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Why {
    /// Who makes the change.
    #[arg(long, default_value = "tai-state", env = "TAI_STATE_ACTOR", hide_env_values = true)]
    pub(crate) actor: String,
    /// Why.
    #[arg(long, default_value = "")]
    pub(crate) reason: String,
}

#[derive(Debug, Args)]
pub(crate) struct Put {
    /// GOVERNOR/STATE
    pub(crate) address: String,
    /// A file with JSON, or - for standard input.
    #[arg(default_value = "-")]
    pub(crate) file: PathBuf,
    /// The JSON itself.
    #[arg(long, conflicts_with = "file", allow_hyphen_values = true)]
    pub(crate) data: Option<String>,
    /// Only if the state has this version; 0 = must not exist.
    #[arg(long, value_name = "VERSION")]
    pub(crate) expect: Option<u64>,
    /// What is done, as the log will call it.
    #[arg(long, default_value = "put")]
    pub(crate) action: String,
    #[command(flatten)]
    pub(crate) why: Why,
    #[command(flatten)]
    pub(crate) conditions: Conditions,
    #[command(flatten)]
    pub(crate) once: Once,
}

/// Under which conditions a command writes.
#[derive(Debug, Args)]
pub(crate) struct Conditions {
    /// Only while this grant of a lock stands: its name and fencing token. May be given several times.
    #[arg(long, value_name = "LOCK=TOKEN", value_parser = fence)]
    pub(crate) fence: Vec<(String, u64)>,
    /// The governor that the locks of --fence belong to. `locks run` sets it for its command.
    #[arg(long, value_name = "GOVERNOR", default_value = tai_state::GLOBAL_GOVERNOR, env = "TAI_LOCK_GOVERNOR", hide_env_values = true)]
    pub(crate) fence_governor: String,
}

#[derive(Debug, Args)]
pub(crate) struct Once {
    /// Sent again with the same key, the command answers as before and writes nothing.
    #[arg(long, value_name = "KEY")]
    pub(crate) idempotency_key: Option<String>,
}

#[derive(Debug, Args)]
pub(crate) struct Rm {
    /// GOVERNOR/STATE
    pub(crate) address: String,
    /// Only if the state has this version.
    #[arg(long, value_name = "VERSION")]
    pub(crate) expect: Option<u64>,
    #[command(flatten)]
    pub(crate) why: Why,
    #[command(flatten)]
    pub(crate) conditions: Conditions,
    #[command(flatten)]
    pub(crate) once: Once,
}

#[derive(Debug, Args)]
pub(crate) struct Ls {
    /// The governor; without one the governors are listed.
    pub(crate) governor: Option<String>,
    /// How many at most.
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u64).range(1..))]
    pub(crate) limit: u64,
    /// Continue after this one.
    #[arg(long)]
    pub(crate) after: Option<String>,
    /// Deleted states too.
    #[arg(long)]
    pub(crate) deleted: bool,
    /// As all of them were at one time: an RFC 3339 time, or -15m.
    #[arg(long, allow_hyphen_values = true, value_name = "TIME", requires = "governor", conflicts_with_all = ["deleted", "after"])]
    pub(crate) at: Option<String>,
}

#[derive(Debug, Args)]
pub(crate) struct History {
    /// GOVERNOR/STATE
    pub(crate) address: String,
    /// The first version.
    #[arg(long, value_name = "VERSION", value_parser = version)]
    pub(crate) from: Option<u64>,
    /// The last version.
    #[arg(long, value_name = "VERSION", value_parser = version)]
    pub(crate) to: Option<u64>,
    /// From this point in time on: v42, an RFC 3339 time, or -15m.
    #[arg(long, allow_hyphen_values = true, value_name = "POINT", conflicts_with = "from")]
    pub(crate) since: Option<String>,
    /// Up to this point in time.
    #[arg(long, allow_hyphen_values = true, value_name = "POINT", conflicts_with = "to")]
    pub(crate) until: Option<String>,
}

#[derive(Debug, Args)]
pub(crate) struct Diff {
    /// GOVERNOR/STATE
    pub(crate) address: String,
    /// From which point to which, such as v3..v7, -1d..-1h or v3.. (to the newest).
    #[arg(allow_hyphen_values = true, value_name = "A..B")]
    pub(crate) range: String,
}

#[derive(Debug, Args)]
pub(crate) struct Timeline {
    /// The governor.
    pub(crate) governor: String,
    /// From this time on; without it from where the history of each state begins.
    #[arg(long, allow_hyphen_values = true, value_name = "TIME")]
    pub(crate) since: Option<String>,
    /// Up to this time.
    #[arg(long, allow_hyphen_values = true, value_name = "TIME")]
    pub(crate) until: Option<String>,
}

#[derive(Debug, Args)]
pub(crate) struct Revert {
    /// GOVERNOR/STATE
    pub(crate) address: String,
    /// As it was: v42, an RFC 3339 time, or -15m.
    #[arg(long, allow_hyphen_values = true, value_name = "POINT")]
    pub(crate) to: String,
    #[command(flatten)]
    pub(crate) why: Why,
    #[command(flatten)]
    pub(crate) conditions: Conditions,
}

#[derive(Debug, Args)]
pub(crate) struct Replay {
    /// GOVERNOR/STATE
    pub(crate) address: String,
    /// Up to this point in time.
    #[arg(long, allow_hyphen_values = true, value_name = "POINT")]
    pub(crate) to: Option<String>,
    /// Compare with the head and with every saved snapshot, and name everything that does not fit.
    #[arg(long, conflicts_with = "to")]
    pub(crate) verify: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Recover {
    /// GOVERNOR/STATE
    pub(crate) address: String,
}

#[derive(Debug, Args)]
pub(crate) struct Snapshots {
    #[command(subcommand)]
    pub(crate) command: SnapshotsCommand,
}

#[derive(Debug, Subcommand)]
pub(crate) enum SnapshotsCommand {
    /// List those of a state that are kept.
    Ls {
        /// GOVERNOR/STATE
        address: String,
    },
    /// Save one of the newest version.
    Create {
        /// GOVERNOR/STATE
        address: String,
    },
    /// Remove the oldest of a state. The one where its history begins stays.
    Prune {
        /// GOVERNOR/STATE
        address: String,
        /// How many are kept.
        #[arg(long, default_value_t = 1)]
        keep: usize,
    },
}

#[derive(Debug, Args)]
#[command(group(clap::ArgGroup::new("age").required(true).args(["older_than", "before"])))]
pub(crate) struct Cleanup {
    /// The governor; without one all of them.
    pub(crate) governor: Option<String>,
    /// How long history is kept, such as 30d.
    #[arg(long, value_name = "DURATION", value_parser = humantime::parse_duration)]
    pub(crate) older_than: Option<std::time::Duration>,
    /// Since when history is kept: an RFC 3339 time.
    #[arg(long, allow_hyphen_values = true, value_name = "TIME")]
    pub(crate) before: Option<String>,
    /// So many newest versions of each state are kept, however old.
    #[arg(long, default_value_t = 1, value_name = "VERSIONS", value_parser = clap::value_parser!(u64).range(1..))]
    pub(crate) keep_last: u64,
    /// Only say what would be removed.
    #[arg(long)]
    pub(crate) dry_run: bool,
    /// How many events one commit removes at most.
    #[arg(long, default_value_t = 400, value_parser = clap::value_parser!(u16).range(1..=400))]
    pub(crate) batch: u16,
    #[command(flatten)]
    pub(crate) conditions: Conditions,
}

#[derive(Debug, Args)]
pub(crate) struct Purge {
    /// GOVERNOR/STATE
    pub(crate) address: String,
    /// It cannot be undone.
    #[arg(long)]
    pub(crate) yes: bool,
    #[command(flatten)]
    pub(crate) why: Why,
    #[command(flatten)]
    pub(crate) conditions: Conditions,
}

#[derive(Debug, Args)]
pub(crate) struct Verify {
    /// Only the states of this governor, with every rule that is broken.
    #[arg(long)]
    pub(crate) governor: Option<String>,
}

#[derive(Debug, Args)]
pub(crate) struct Txn {
    /// The file, or - for standard input.
    #[arg(default_value = "-")]
    pub(crate) file: PathBuf,
    /// Transactions that run at the same time; with more than one, answers come as they are ready.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=4096))]
    pub(crate) concurrency: u16,
    /// Who makes the changes.
    #[arg(long, default_value = "tai-state", env = "TAI_STATE_ACTOR", hide_env_values = true)]
    pub(crate) actor: String,
    #[command(flatten)]
    pub(crate) conditions: Conditions,
}

#[derive(Debug, Args)]
pub(crate) struct Locks {
    /// The governor that the locks belong to.
    #[arg(long, default_value = tai_state::GLOBAL_GOVERNOR)]
    pub(crate) governor: String,
    #[command(subcommand)]
    pub(crate) command: LocksCommand,
}

#[derive(Debug, Subcommand)]
pub(crate) enum LocksCommand {
    /// List all locks that were ever granted, and how they stand.
    Ls,
    /// Show one.
    Show {
        /// What is locked.
        name: String,
    },
    /// Take a lock away from whoever holds it. Its fenced writes fail from then on; what it does
    /// elsewhere goes on.
    Break {
        /// What is locked.
        name: String,
    },
    /// Mark locks as free whose leases have ended without a release.
    Cleanup,
    /// Run a command while holding a lock.
    ///
    /// The command finds TAI_LOCK_NAME, TAI_LOCK_TOKEN (the fencing token) and TAI_LOCK_GOVERNOR in its
    /// environment, for `put --fence "$TAI_LOCK_NAME=$TAI_LOCK_TOKEN"` and the like. The lease is renewed while it runs.
    /// When the lock is lost it gets SIGTERM and, two seconds later, SIGKILL, and the exit code is 4.
    /// Else its own exit code is passed on (128 + the signal that ended it).
    Run(LocksRun),
}

#[derive(Debug, Args)]
pub(crate) struct LocksRun {
    /// What is locked.
    pub(crate) name: String,
    /// How long the lease lasts without a renewal, such as 30s.
    #[arg(long, default_value = "30s", value_parser = humantime::parse_duration)]
    pub(crate) ttl: std::time::Duration,
    /// How long the lock is waited for, such as 1m; 0s: not at all.
    #[arg(long, default_value = "1m", value_parser = humantime::parse_duration)]
    pub(crate) wait: std::time::Duration,
    /// Who holds it, as others see it; by default the host and the process.
    #[arg(long)]
    pub(crate) client: Option<String>,
    /// The command and its arguments, after `--`.
    #[arg(last = true, required = true, value_name = "COMMAND")]
    pub(crate) command: Vec<std::ffi::OsString>,
}

#[derive(Debug, Args)]
pub(crate) struct Firestore {
    #[command(subcommand)]
    pub(crate) command: FirestoreCommand,
}

#[derive(Debug, Subcommand)]
pub(crate) enum FirestoreCommand {
    /// Print the index settings as firestore.indexes.json. No store is opened.
    ///
    /// Deploy it with `firebase deploy --only firestore:indexes` or with deploy/terraform, which
    /// reads the same file; docs/firestore.md says why each field is in it.
    Indexes {
        /// What stands before the names of the collections, as in the store's URL (?prefix=p).
        /// Without it, that of --url is taken, if there is one.
        #[arg(long)]
        prefix: Option<String>,
    },
}

/// `42` or `v42`.
fn version(text: &str) -> Result<u64, String> {
    let digits = text.strip_prefix('v').unwrap_or(text);
    digits.parse().map_err(|_| format!("{text:?} is not a version such as v42"))
}

/// `NAME=TOKEN`; the last equals sign divides.
fn fence(text: &str) -> Result<(String, u64), String> {
    let parts = text.rsplit_once('=').and_then(|(name, token)| {
        let token = token.parse().ok().filter(|token| *token > 0)?;
        (!name.is_empty()).then(|| (name.to_owned(), token))
    });
    parts.ok_or_else(|| format!("{text:?} is no lock and token such as migration=7"))
}
