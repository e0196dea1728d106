//! The command line of the harness.

use std::path::PathBuf;

use clap::{Parser, Subcommand, ValueEnum};

use crate::run::{Run, Tally};

/// Does to tai-state what machines, networks and people do, and counts what it loses.
///
/// Exit codes: 0 all promises held, 1 one was broken, 2 usage, 3 the run proves nothing (its control
/// was not caught, or there was too little traffic).
#[derive(Debug, Parser)]
#[command(name = "tai-state-torture", version)]
pub(crate) struct Args {
    /// The run's seed; a fresh one is drawn and printed when it is not given.
    #[arg(long, global = true)]
    pub(crate) seed: Option<u64>,
    /// How much is done.
    #[arg(long, global = true, value_enum, default_value = "short")]
    pub(crate) tier: Tier,
    /// So many rounds (or images, or seconds: what the tier counts) instead of the tier's.
    #[arg(long, global = true)]
    pub(crate) size: Option<u64>,
    /// Only the round of this number, to look at a failure.
    #[arg(long, global = true)]
    pub(crate) only: Option<u64>,
    /// The `tai-state` to torture, instead of the one that is built from the sources at hand.
    #[arg(long, global = true)]
    pub(crate) binary: Option<PathBuf>,
    /// Append the figures to this file, of which `page` makes docs/torture.md.
    #[arg(long, global = true)]
    pub(crate) record: Option<PathBuf>,
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// How much is done: with every change, or before a release.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub(crate) enum Tier {
    /// With every change; all subcommands together stay under twelve minutes on two cores.
    Short,
    /// Before a release.
    Long,
}

impl Tier {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Short => "short",
            Self::Long => "long",
        }
    }
}

#[derive(Debug, Clone, Subcommand)]
pub(crate) enum Command {
    #[command(flatten)]
    Harm(Harm),
    /// The writer of a control: it acknowledges too early.
    #[command(hide = true)]
    HastyWriter { file: PathBuf },
    /// One step of `volume`, in a process of its own.
    #[command(hide = true)]
    VolumeStep { step: String, url: String, events: u64 },
    /// Name all subcommands that do harm, one a line.
    Harms,
    /// Write docs/torture.md anew from what was recorded.
    Page {
        /// Only say whether it is up to date.
        #[arg(long)]
        check: bool,
    },
}

/// What is done to the store.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Subcommand)]
pub(crate) enum Harm {
    /// SIGKILL at random moments, creation included.
    Kill,
    /// Damage to the file and to its log.
    Corrupt,
    /// The tests elsewhere that draw their cases: only runs them and keeps what they say.
    Drawn,
    /// Money moved under contention and faults; counters that must count.
    Bank,
    /// Lists appended to by transactions, judged by two checkers.
    Append,
    /// Holders that are stopped, killed, or have a wrong clock.
    Locks,
    /// All of it at once, for as long as is wanted.
    Soak,
    /// A network that is slow, silent, cut or refusing, and a service that stops or dies.
    Net,
    /// Every call dropped at every point, and a runtime that ends in the middle of one.
    Cancel,
    /// Power cuts at every sync of the real binary, and again while it recovers.
    Powercut,
    /// A write, sync or other call that fails, for the n-th of every kind.
    Eio,
    /// A disk that is full, while the process goes on.
    FullDisk,
    /// Long logs, and the memory that they take.
    Volume,
}

impl Harm {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Kill => "kill",
            Self::Corrupt => "corrupt",
            Self::Drawn => "drawn",
            Self::Bank => "bank",
            Self::Append => "append",
            Self::Locks => "locks",
            Self::Soak => "soak",
            Self::Net => "net",
            Self::Cancel => "cancel",
            Self::Powercut => "powercut",
            Self::Eio => "eio",
            Self::FullDisk => "full-disk",
            Self::Volume => "volume",
        }
    }

    pub(crate) async fn done_to(self, run: &Run) -> Tally {
        match self {
            Self::Kill => crate::kill::run(run),
            Self::Corrupt => crate::corrupt::run(run).await,
            Self::Drawn => crate::drawn::run(run),
            Self::Bank => crate::bank::run(run).await,
            Self::Append => crate::append::run(run).await,
            Self::Locks => crate::locks::run(run).await,
            Self::Soak => crate::soak::run(run).await,
            Self::Net => crate::net::run(run).await,
            Self::Cancel => crate::cancel::run(run).await,
            Self::Powercut => crate::powercut::run(run),
            Self::Eio => crate::eio::run(run),
            Self::FullDisk => crate::full_disk::run(run).await,
            Self::Volume => crate::volume::run(run).await,
        }
    }
}
