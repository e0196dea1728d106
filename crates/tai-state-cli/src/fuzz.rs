//! Fuzz targets of what reads the program's input: they panic only where a promise is broken.

// A broken promise ends the target: that is its whole answer.
#![allow(clippy::panic, clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::io::Cursor;

use chrono::{DateTime, Datelike};
use serde_json::{Value, json};
use tai_state::TransitionLine;
use tai_state::testing::fuzz::Target;

use crate::cmd::lines::Lines;
use crate::cmd::{import, txn};
use crate::failure::{Failure, exit};
use crate::point::Point;

/// All targets of the command line.
pub const TARGETS: &[Target] = &[
    Target { name: "import_lines", run: import_lines, mutations: 2_000 },
    Target { name: "txn_lines", run: txn_lines, mutations: 2_000 },
    Target { name: "points", run: points, mutations: 5_000 },
];

/// Runs a target by its name.
pub fn run(name: &str, bytes: &[u8]) {
    let target = TARGETS.iter().find(|target| target.name == name);
    (target.expect("a target of this name").run)(bytes);
}

/// An input of lines, plain or gzip. However the bytes come, the lines are the same.
fn lines_of(bytes: &[u8]) -> (Vec<(u64, String)>, Option<Failure>) {
    let read = |mut lines: Lines| {
        let mut found = Vec::new();
        let failure = loop {
            match lines.next() {
                Ok(Some(line)) => found.push((line.number, line.text.to_owned())),
                Ok(None) => break None,
                Err(failure) => break Some(failure),
            }
        };
        (found, failure)
    };
    let whole = read(lines(Box::new(Cursor::new(bytes.to_vec()))));
    let slow = read(lines(Box::new(ByteByByte(Cursor::new(bytes.to_vec())))));
    // How much of a damaged stream can still be unpacked depends on how it comes; a whole one does not.
    let is_damaged = |failure: &Failure| failure.to_json()["code"] == "io";
    if [&whole.1, &slow.1].into_iter().flatten().any(is_damaged) {
        let both = whole.0.len().min(slow.0.len());
        assert_eq!(whole.0[..both], slow.0[..both]);
    } else {
        assert_eq!(whole.0, slow.0);
        assert_eq!(whole.1.as_ref().map(Failure::to_json), slow.1.as_ref().map(Failure::to_json));
    }
    for (number, text) in &whole.0 {
        assert!(
            *number > 0
                && !text.bytes().all(|byte| byte.is_ascii_whitespace())
                && !text.contains('\n')
        );
    }
    if let Some(failure) = &whole.1 {
        assert!(matches!(failure.exit, exit::REJECTED | exit::OTHER), "{failure:?}");
    }
    whole
}

fn lines(reader: Box<dyn std::io::Read + Send>) -> Lines {
    Lines::of(reader, "it".into()).expect("bytes in memory")
}

/// Like a slow pipe.
struct ByteByByte(Cursor<Vec<u8>>);

impl std::io::Read for ByteByByte {
    fn read(&mut self, into: &mut [u8]) -> std::io::Result<usize> {
        let most = into.len().min(1);
        self.0.read(&mut into[..most])
    }
}

/// What `import` reads.
fn import_lines(bytes: &[u8]) {
    let (raw, broken) = lines_of(bytes);
    let mut input = lines(Box::new(Cursor::new(bytes.to_vec())));
    let mut taken = 0;
    loop {
        match import::next(&mut input) {
            Ok(Some(read)) => {
                let (number, text) = &raw[taken];
                assert_eq!((read.number, read.bytes), (*number, text.len()));
                line(&read.line);
                taken += 1;
            }
            Ok(None) => {
                assert!(broken.is_none() && taken == raw.len());
                break;
            }
            Err(failure) => {
                if taken == raw.len() {
                    assert!(broken.is_some(), "{failure:?}");
                } else {
                    // Which line it is stands in the error.
                    assert_eq!(failure.exit, exit::REJECTED, "{failure:?}");
                    assert_eq!(failure.to_json()["line"], raw[taken].0);
                }
                break;
            }
        }
    }
}

/// What was taken is written and taken again as the same, with the same identity.
fn line(line: &TransitionLine) {
    let text = serde_json::to_string(line).expect("JSON");
    let again =
        TransitionLine::parse(&text, "it").unwrap_or_else(|error| panic!("{text}: {error}"));
    assert_eq!(&again, line);
    again.check("it").expect("it was checked before");
    assert_eq!(again.identity(3), line.identity(3));
    assert_ne!(line.identity(0), line.identity(1));
}

/// What `txn` reads: a request that is one, or a refusal that names the line.
fn txn_lines(bytes: &[u8]) {
    let (raw, _) = lines_of(bytes);
    for (number, text) in raw {
        match txn::parse(&text, number) {
            Ok(request) => {
                for op in &request.ops {
                    let (_, target, _) = op.target();
                    let (governor, state) = target.split_once('/').expect("an address");
                    assert!(!governor.is_empty() && !state.is_empty());
                }
                let mut object = json!({
                    "id": request.id, "ops": request.ops, "reason": request.reason,
                });
                if let Some(actor) = &request.actor {
                    object["actor"] = json!(actor);
                }
                let again = txn::parse(&object.to_string(), number).expect("its own text");
                assert_eq!(format!("{request:?}"), format!("{again:?}"));
            }
            Err(refusal) => {
                let (id, failure) = *refusal;
                assert_eq!(failure.exit, exit::REJECTED, "{failure:?}");
                let said = failure.to_json();
                let message = said["message"].as_str().expect("a message");
                assert!(message.contains(&format!("line {number}")), "{message}");
                // The answer can be told from others by its id.
                let read = serde_json::from_str::<Value>(&text).ok();
                let known = read.and_then(|value| value.get("id").cloned()).unwrap_or(Value::Null);
                assert!(id == known || id.is_null(), "{id} is not {known}");
            }
        }
    }
}

/// Points in time.
fn points(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    let now = DateTime::UNIX_EPOCH + chrono::TimeDelta::days(20_000);
    match Point::parse_at(text, now) {
        Ok(Point::Version(version)) => {
            let again = Point::parse_at(&format!("v{version}"), now);
            assert_eq!(again.expect("a version"), Point::Version(version));
        }
        Ok(point @ Point::Time(time)) => {
            // Years of more digits can only be said as a time ago.
            if (0..=9999).contains(&time.year()) {
                let again = Point::parse_at(&crate::output::time(&time), now);
                assert_eq!(again.ok(), Some(point), "{text:?}");
            }
            assert!(!text.starts_with('-') || time <= now, "{text:?} is in the future");
        }
        Err(failure) => assert_eq!(failure.exit, exit::USAGE),
    }
}
