//! Does to tai-state what machines, networks and people do, and counts what it loses.
//!
//! Every subcommand is one kind of harm. It has a seed, a control that must fail, a least amount of
//! traffic, and ends with one line of figures. See `docs/torture.md`.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::disallowed_methods
)]

mod append;
mod args;
mod bank;
mod cancel;
mod corrupt;
mod drawn;
mod eio;
mod engine;
mod found;
mod full_disk;
mod kill;
mod locks;
mod net;
mod page;
mod powercut;
mod process;
mod random;
mod record;
mod run;
mod soak;
mod strace;
mod tool;
mod versions;
mod volume;

use std::process::ExitCode;

use clap::Parser as _;

use args::{Args, Command};
use run::Run;

fn main() -> ExitCode {
    let args = Args::parse();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    let harm = match &args.command {
        Command::Harms => {
            use clap::Subcommand as _;
            for harm in args::Harm::augment_subcommands(clap::Command::new("")).get_subcommands() {
                println!("{}", harm.get_name());
            }
            return ExitCode::SUCCESS;
        }
        Command::Page { check } => return page::write(*check),
        Command::HastyWriter { file } => {
            runtime.block_on(kill::hasty_writer(file));
            return ExitCode::SUCCESS;
        }
        Command::VolumeStep { step, url, events } => {
            runtime.block_on(volume::step(step, url, *events));
            return ExitCode::SUCCESS;
        }
        Command::Harm(harm) => *harm,
    };
    let run = Run::new(&args, harm);
    let verdict = run.judge(|run| runtime.block_on(harm.done_to(run)));
    // What still hangs must not keep the verdict back.
    runtime.shutdown_background();
    verdict
}
