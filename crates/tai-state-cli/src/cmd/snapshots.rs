//! `snapshots`: list, save and remove saved snapshots.

use serde_json::json;
use tai_state::StateMachinePersister;

use crate::args::{Global, Snapshots, SnapshotsCommand};
use crate::failure::Outcome;
use crate::output::{Rows, time};
use crate::{address, connect, output};

pub(crate) async fn run(global: &Global, args: &Snapshots) -> Outcome {
    let (SnapshotsCommand::Ls { address: at }
    | SnapshotsCommand::Create { address: at }
    | SnapshotsCommand::Prune { address: at, .. }) = &args.command;
    let (governor, state) = address(at)?;
    let persister = StateMachinePersister::with_defaults(connect(global, false).await?);
    match args.command {
        SnapshotsCommand::Ls { .. } => {
            let mut rows = Rows::new(global.output, &["VERSION", "WHEN", "BYTES", ""]);
            for saved in persister.saved_snapshots(governor, state).await? {
                let note = match (&saved.problem, saved.is_cut) {
                    (Some(problem), _) => problem.clone(),
                    (None, true) => "history begins here".to_owned(),
                    (None, false) => String::new(),
                };
                let when = saved.timestamp.as_ref().map(time).unwrap_or_default();
                let cells = [format!("v{}", saved.version), when, saved.bytes.to_string(), note];
                rows.push(&json!(saved), &cells)?;
            }
            rows.finish()
        }
        SnapshotsCommand::Create { .. } => {
            let version = persister.save_snapshot(governor, state).await?;
            let object = json!({"governor_id": governor, "state_id": state, "version": version});
            let text = format!("{governor}/{state} has a saved snapshot of v{version}");
            output::object(global.output, &object, &text)
        }
        SnapshotsCommand::Prune { keep, .. } => {
            let report = persister.prune_snapshots(governor, state, keep).await?;
            let text = format!(
                "{} saved snapshots removed, {} bytes",
                report.snapshots, report.recovered_bytes
            );
            output::object(global.output, &json!(report), &text)
        }
    }
}
