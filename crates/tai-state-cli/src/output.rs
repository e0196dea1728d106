//! All that is written to standard output: tables for people, JSON for programs.

use std::fmt::Write as _;
use std::io::{self, IsTerminal, Write};
use std::time::Duration;

use chrono::{DateTime, SecondsFormat, Utc};
use comfy_table::{Table, presets};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde_json::{Value, json};
use tai_state::{Event, StateRecord};

use crate::args::{Format, Global};
use crate::failure::{Failure, Outcome};

/// Text in which nothing steers a terminal: control characters and the marks that turn the
/// direction of writing are shown as escapes.
pub(crate) fn visible(text: &str) -> String {
    let mut shown = String::with_capacity(text.len());
    for c in text.chars() {
        if steers(c) {
            let _ = write!(shown, "\\u{{{:x}}}", u32::from(c));
        } else {
            shown.push(c);
        }
    }
    shown
}

/// The same in one line: what is shown beside other things must not look like another line of them.
pub(crate) fn visible_line(text: &str) -> String {
    visible(text).replace('\n', "\\n")
}

/// Control characters but the newline, and marks that turn the direction of writing, end lines, or take no
/// room, so that two texts look like one.
fn steers(c: char) -> bool {
    (c.is_control() && c != '\n')
        || matches!(
            c,
            '\u{ad}'
                | '\u{34f}'
                | '\u{61c}'
                | '\u{115f}'..='\u{1160}'
                | '\u{17b4}'..='\u{17b5}'
                | '\u{180b}'..='\u{180f}'
                | '\u{200b}'..='\u{200f}'
                | '\u{2028}'..='\u{202e}'
                | '\u{2060}'..='\u{206f}'
                | '\u{3164}'
                | '\u{feff}'
                | '\u{ffa0}'
                | '\u{fff0}'..='\u{fffb}'
                | '\u{1d173}'..='\u{1d17a}'
                | '\u{e0000}'..='\u{e0fff}'
        )
}

/// How much of the data a table shows.
const SHOWN_CHARS: usize = 60;

/// Data in one cell of a table.
pub(crate) fn short(data: &Value) -> String {
    let text = data.to_string();
    match text.char_indices().nth(SHOWN_CHARS) {
        Some((at, _)) => format!("{}…", text.get(..at).unwrap_or_default()),
        None => text,
    }
}

pub(crate) fn time(time: &DateTime<Utc>) -> String {
    time.to_rfc3339_opts(SecondsFormat::AutoSi, true)
}

/// A state as programs get it.
pub(crate) fn state_json(record: &StateRecord) -> Value {
    let snapshot = &record.snapshot;
    let mut object = json!({
        "governor_id": record.governor_id,
        "state_id": snapshot.id,
        "version": snapshot.version,
        "timestamp": time(&snapshot.timestamp),
        "data": snapshot.data,
        "metadata": snapshot.metadata,
        "causality": snapshot.causality,
        "hash": record.hash,
    });
    mark_deleted(&mut object, record.deleted);
    object
}

/// An event as programs get it. `from_state` and `to_state` are the data before and after.
pub(crate) fn event_json(event: &Event) -> Value {
    let mut object = json!({
        "id": event.id,
        "governor_id": event.governor_id,
        "state_id": event.to_state.id,
        "version": event.version(),
        "action": event.action,
        "timestamp": time(&event.timestamp),
        "from_state": event.from_state.as_ref().map(|state| &state.data),
        "to_state": event.to_state.data,
        "metadata": event.metadata,
        "causality": event.causality,
        "hash": event.hash,
    });
    mark_deleted(&mut object, event.deleted);
    object
}

fn mark_deleted(object: &mut Value, deleted: bool) {
    if let Value::Object(fields) = object
        && deleted
    {
        fields.insert("deleted".into(), true.into());
    }
}

/// Writes a line and flushes, so that a reader has it before anything else happens. A reader that
/// went away is no error of ours: the command ends.
pub(crate) fn line(text: &str) -> Outcome {
    let mut out = Patient(io::stdout().lock());
    match out
        .write_all(text.as_bytes())
        .and_then(|()| out.write_all(b"\n"))
        .and_then(|()| out.flush())
    {
        Ok(()) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Err(Failure::reader_left()),
        Err(error) => Err(Failure::unsaid(&error)),
    }
}

/// Standard output that waits where it says that it would have to: others may have set it not to block, for
/// a reader that is only slow.
struct Patient(io::StdoutLock<'static>);

impl Patient {
    fn until_ready<T>(
        &mut self,
        mut deed: impl FnMut(&mut io::StdoutLock<'static>) -> io::Result<T>,
    ) -> io::Result<T> {
        loop {
            match deed(&mut self.0) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.wait(error)?,
                done => return done,
            }
        }
    }

    #[cfg(unix)]
    fn wait(&self, _: io::Error) -> io::Result<()> {
        use rustix::event::{PollFd, PollFlags, poll};
        let waited = poll(&mut [PollFd::new(&self.0, PollFlags::OUT)], None);
        waited.map(drop).or_else(|error| match error {
            rustix::io::Errno::INTR => Ok(()),
            error => Err(error.into()),
        })
    }

    #[cfg(not(unix))]
    fn wait(&self, error: io::Error) -> io::Result<()> {
        Err(error)
    }
}

impl Write for Patient {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.until_ready(|out| out.write(bytes))
    }

    fn flush(&mut self) -> io::Result<()> {
        self.until_ready(Write::flush)
    }
}

/// Writes rows as one of the formats. For `json` they are one array.
pub(crate) struct Rows {
    format: Format,
    table: Table,
    first: bool,
}

impl Rows {
    pub(crate) fn new(format: Format, headings: &[&str]) -> Self {
        let mut table = Table::new();
        table.load_style(presets::NOTHING).set_header(headings);
        Self { format, table, first: true }
    }

    pub(crate) fn push(&mut self, object: &Value, cells: &[String]) -> Outcome {
        match self.format {
            Format::Table => {
                self.table.add_row(cells.iter().map(|cell| visible_line(cell)));
                Ok(())
            }
            Format::Jsonl => line(&compact(object)),
            Format::Json => {
                let start = if std::mem::take(&mut self.first) { "[" } else { "," };
                line(&format!("{start}{}", compact(object)))
            }
        }
    }

    pub(crate) fn finish(self) -> Outcome {
        match self.format {
            Format::Table if self.table.is_empty() => Ok(()),
            Format::Table => line(&self.table.trim_fmt()),
            Format::Jsonl => Ok(()),
            Format::Json if self.first => line("[]"),
            Format::Json => line("]"),
        }
    }
}

/// Writes one object: as JSON, or as the text for people.
pub(crate) fn object(format: Format, object: &Value, text: &str) -> Outcome {
    match format {
        Format::Table => line(&visible(text)),
        Format::Json | Format::Jsonl => line(&compact(object)),
    }
}

/// JSON for people.
pub(crate) fn pretty(value: &Value) -> String {
    harmless(&serde_json::to_string_pretty(value).unwrap_or_else(|_| value.to_string()))
}

/// JSON in one line.
pub(crate) fn compact(value: &Value) -> String {
    harmless(&value.to_string())
}

/// The same JSON value in another text: what would steer a terminal can only stand in strings, and there
/// it has an escape.
pub(crate) fn harmless(text: &str) -> String {
    let mut shown = String::with_capacity(text.len());
    for c in text.chars() {
        if steers(c) {
            for unit in c.encode_utf16(&mut [0; 2]) {
                let _ = write!(shown, "\\u{unit:04x}");
            }
        } else {
            shown.push(c);
        }
    }
    shown
}

/// A progress bar on standard error; off a terminal one plain line every ten seconds.
pub(crate) fn progress(global: &Global, what: &'static str, total: Option<u64>) -> ProgressBar {
    let bar = match total {
        Some(total) => ProgressBar::new(total),
        None => ProgressBar::no_length(),
    };
    let template = match total {
        Some(_) => "{msg} {wide_bar} {human_pos}/{human_len} {per_sec} {eta}",
        None => "{msg} {spinner} {human_pos} {per_sec}",
    };
    if let Ok(style) = ProgressStyle::with_template(template) {
        bar.set_style(style);
    }
    bar.set_message(what);
    if global.no_progress {
        bar.set_draw_target(ProgressDrawTarget::hidden());
    } else if !io::stderr().is_terminal() {
        bar.set_draw_target(ProgressDrawTarget::hidden());
        let watched = bar.clone();
        tokio::spawn(async move {
            let mut ticks = tokio::time::interval(Duration::from_secs(10));
            ticks.tick().await;
            while !watched.is_finished() {
                ticks.tick().await;
                if !watched.is_finished() {
                    eprintln!("{what}: {} so far", watched.position());
                }
            }
        });
    }
    bar
}
