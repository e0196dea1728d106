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

/// How much is done: with every change, before a release, or for a night.
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

#[derive(Debug, Clone, Copy, Subcommand)]
pub(crate) enum Command {
    #[command(flatten)]
    Harm(Harm),
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
    /// Power cuts at every sync of the real binary, and again while it recovers.
    Powercut,
    /// A write, sync or other call that fails, for the n-th of every kind.
    Eio,
    /// A disk that is full, while the process goes on.
    FullDisk,
}

impl Harm {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Kill => "kill",
            Self::Powercut => "powercut",
            Self::Eio => "eio",
            Self::FullDisk => "full-disk",
        }
    }

    pub(crate) async fn done_to(self, run: &Run) -> Tally {
        match self {
            Self::Kill => crate::kill::run(run),
            Self::Powercut => crate::powercut::run(run),
            Self::Eio => crate::eio::run(run),
            Self::FullDisk => crate::full_disk::run(run).await,
        }
    }
}
