//! `export`: write the whole log as JSON Lines, in canonical order.

use std::fs::File;
use std::io::{BufWriter, ErrorKind, IsTerminal, Read, Write};
use std::path::Path;

use flate2::Compression;
use flate2::write::GzEncoder;
use serde_json::json;
use tai_state::{ExportSummary, StateStore};

use crate::args::{Export, Format, Global};
use crate::failure::{Failure, Outcome, exit, io};
use crate::output;

/// How every SQLite database begins, and so every store that is a file.
const MAGIC: &[u8] = b"SQLite format 3\0";

pub(crate) async fn run(global: &Global, store: &StateStore, args: &Export) -> Outcome {
    let governor = args.governor.as_deref();
    let bar = output::progress(global, "exporting", None);
    let count = |transitions| bar.set_position(transitions);
    let summary = match &args.out {
        None => {
            let out = std::io::stdout();
            let is_terminal = out.is_terminal();
            let out = Shown { out, is_terminal, rest: Vec::new() };
            let mut out = BufWriter::new(Noting { out, reader_left: false });
            let summary = match store.export(governor, &mut out, count).await {
                Ok(summary) => out.flush().map(|()| summary).map_err(|e| io("standard output", &e)),
                Err(error) => Err(error.into()),
            };
            match summary {
                Err(_) if out.get_ref().reader_left => return Err(Failure::reader_left()),
                summary => summary?,
            }
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

/// Standard output. On a terminal the same JSON values are written with escapes, so that nothing steers it;
/// anybody else gets the canonical bytes, whose hash is told.
struct Shown<Out> {
    out: Out,
    is_terminal: bool,
    /// The beginning of a character that is not complete yet.
    rest: Vec<u8>,
}

impl<Out: Write> Write for Shown<Out> {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        if !self.is_terminal {
            return self.out.write(bytes);
        }
        self.rest.extend_from_slice(bytes);
        let whole = match std::str::from_utf8(&self.rest) {
            Ok(_) => self.rest.len(),
            Err(error) => error.valid_up_to(),
        };
        let rest = self.rest.split_off(whole);
        let text = String::from_utf8(std::mem::replace(&mut self.rest, rest));
        let text = text.map_err(std::io::Error::other)?;
        self.out.write_all(output::harmless(&text).as_bytes())?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.out.flush()
    }
}

/// Standard output, and whether its reader went away.
struct Noting {
    out: Shown<std::io::Stdout>,
    reader_left: bool,
}

impl Write for Noting {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let written = self.out.write(bytes);
        self.reader_left |=
            written.as_ref().is_err_and(|error| error.kind() == ErrorKind::BrokenPipe);
        written
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.out.flush()
    }
}

/// A file appears under its name when it is complete and synced. What is no file, such as a pipe, is written
/// to; and a store is not overwritten by what is exported from it or from another.
async fn to_file(
    store: &StateStore,
    governor: Option<&str>,
    path: &Path,
    count: impl FnMut(u64) + Send,
) -> Outcome<ExportSummary> {
    let failed = |error: std::io::Error| io(&path.display().to_string(), &error);
    // Of a link that leads to a file or nowhere the link is replaced: nothing is made where it leads.
    match path.metadata() {
        Ok(there) if there.is_file() => refuse_store(path)?,
        Ok(there) if there.is_dir() => return Err(failed(ErrorKind::IsADirectory.into())),
        Ok(_) => {
            let mut there = File::options().write(true).open(path).map_err(failed)?;
            return written(store, governor, path, &mut there, count).await;
        }
        Err(_) => refuse_store(path)?,
    }
    let parent = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let mut file = tempfile::NamedTempFile::new_in(parent).map_err(failed)?;
    let summary = written(store, governor, path, &mut file, count).await?;
    file.as_file().sync_all().map_err(failed)?;
    file.persist(path).map_err(|error| failed(error.error))?;
    Ok(summary)
}

/// Writes all of it, packed if the name says so.
async fn written(
    store: &StateStore,
    governor: Option<&str>,
    path: &Path,
    out: &mut (impl Write + Send),
    count: impl FnMut(u64) + Send,
) -> Outcome<ExportSummary> {
    let failed = |error: std::io::Error| io(&path.display().to_string(), &error);
    let mut out = BufWriter::new(out);
    let summary = if path.extension().is_some_and(|extension| extension == "gz") {
        let mut packed = GzEncoder::new(&mut out, Compression::default());
        let summary = store.export(governor, &mut packed, count).await?;
        packed.finish().map_err(failed)?;
        summary
    } else {
        store.export(governor, &mut out, count).await?
    };
    out.flush().map_err(failed)?;
    Ok(summary)
}

/// No export has the names or the beginning of a store's files; whoever names one has mistaken a name.
fn refuse_store(path: &Path) -> Outcome {
    let failed = |error: std::io::Error| io(&path.display().to_string(), &error);
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let mut is_part = ["-wal", "-shm", "-journal"].iter().any(|end| {
        let of = name.strip_suffix(end).map(|of| path.with_file_name(of));
        of.is_some_and(|of| begins_like_a_store(&of).unwrap_or(false))
    });
    is_part |= match begins_like_a_store(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => false,
        begins => begins.map_err(failed)?,
    };
    if is_part {
        let message =
            format!("{}: a store stands there, or beside it, and would be lost", path.display());
        return Err(Failure::new(exit::CONFLICT, "exists", message).hint("give another name"));
    }
    Ok(())
}

fn begins_like_a_store(path: &Path) -> std::io::Result<bool> {
    let mut first = Vec::new();
    File::open(path)?.take(MAGIC.len() as u64).read_to_end(&mut first)?;
    Ok(first == MAGIC)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_terminal_gets_the_same_values_without_what_steers_it() {
        let line = "{\"data\":\"é\u{9b}31m\u{7f}\u{202e}\u{1f600}\"}\n";
        let written = |is_terminal, at_once: usize| {
            let mut shown = Shown { out: Vec::new(), is_terminal, rest: Vec::new() };
            for part in line.as_bytes().chunks(at_once) {
                shown.write_all(part).unwrap();
            }
            String::from_utf8(shown.out).unwrap()
        };
        for at_once in 1..=line.len() {
            assert_eq!(written(false, at_once), line);
            let text = written(true, at_once);
            assert!(
                !text.chars().any(|c| c.is_control() && c != '\n' || c == '\u{202e}'),
                "{text:?}"
            );
            let value = |text: &str| serde_json::from_str::<serde_json::Value>(text).unwrap();
            assert_eq!(value(&text), value(line));
        }
    }
}
