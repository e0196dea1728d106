//! `export`: write the whole log as JSON Lines, in canonical order.

use std::io::{BufWriter, Write};
use std::path::Path;

use flate2::Compression;
use flate2::write::GzEncoder;
use serde_json::json;
use tai_state::{ExportSummary, StateStore};

use crate::args::{Export, Format, Global};
use crate::failure::{Outcome, io};
use crate::output;

pub(crate) async fn run(global: &Global, store: &StateStore, args: &Export) -> Outcome {
    let governor = args.governor.as_deref();
    let bar = output::progress(global, "exporting", None);
    let count = |transitions| bar.set_position(transitions);
    let summary = match &args.out {
        None => {
            let mut out = BufWriter::new(std::io::stdout());
            let summary = store.export(governor, &mut out, count).await?;
            out.flush().map_err(|error| io("standard output", &error))?;
            summary
        }
        Some(path) => to_file(store, governor, path, count).await?,
    };
    bar.finish_and_clear();
    let text = format!(
        "{} states, {} transitions, content hash {}",
        summary.states, summary.transitions, summary.content_hash
    );
    match (&args.out, global.output) {
        // The lines are the data; what is said about them goes beside.
        (None, Format::Table) => eprintln!("{text}"),
        (None, _) => eprintln!("{}", json!(summary)),
        (Some(_), format) => output::object(format, &json!(summary), &text)?,
    }
    Ok(())
}

/// The file appears under its name when it is complete and synced.
async fn to_file(
    store: &StateStore,
    governor: Option<&str>,
    path: &Path,
    count: impl FnMut(u64) + Send,
) -> Outcome<ExportSummary> {
    let failed = |error: std::io::Error| io(&path.display().to_string(), &error);
    let parent = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let file = tempfile::NamedTempFile::new_in(parent).map_err(failed)?;
    let mut out = BufWriter::new(file);
    let summary = if path.extension().is_some_and(|extension| extension == "gz") {
        let mut packed = GzEncoder::new(&mut out, Compression::default());
        let summary = store.export(governor, &mut packed, count).await?;
        packed.finish().map_err(failed)?;
        summary
    } else {
        store.export(governor, &mut out, count).await?
    };
    let file = out.into_inner().map_err(|error| failed(error.into_error()))?;
    file.as_file().sync_all().map_err(failed)?;
    file.persist(path).map_err(|error| failed(error.error))?;
    Ok(summary)
}
