//! Reads input line by line, plain or gzip, with every limit checked before memory is taken.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::path::Path;

use flate2::bufread::MultiGzDecoder;

use crate::failure::{self, Failure, Outcome};

/// The longest line: more than any state that can be kept, with its escapes.
const MOST_BYTES: usize = 8 << 20;

/// Lines of a file or of standard input.
pub(crate) struct Lines {
    reader: Box<dyn BufRead + Send>,
    name: String,
    number: u64,
    buffer: Vec<u8>,
}

/// One line, and its number from 1.
pub(crate) struct Line<'a> {
    pub(crate) number: u64,
    pub(crate) text: &'a str,
}

impl Lines {
    pub(crate) fn open(path: &Path) -> Outcome<Self> {
        let is_stdin = path.as_os_str() == "-";
        let name = if is_stdin { "standard input".to_owned() } else { path.display().to_string() };
        let failed = |error: io::Error| failure::io(&name, &error);
        let plain: Box<dyn Read + Send> = if is_stdin {
            Box::new(io::stdin())
        } else {
            Box::new(File::open(path).map_err(failed)?)
        };
        Self::of(plain, name)
    }

    /// Lines of what gives bytes; `name` stands for it in errors.
    pub(crate) fn of(mut plain: Box<dyn Read + Send>, name: String) -> Outcome<Self> {
        let failed = |error: io::Error| failure::io(&name, &error);
        // A slow pipe may give one byte at a time.
        let mut first = Vec::with_capacity(2);
        plain.by_ref().take(2).read_to_end(&mut first).map_err(failed)?;
        let is_gzip = first == [0x1f, 0x8b];
        let plain = BufReader::with_capacity(1 << 16, io::Cursor::new(first).chain(plain));
        let reader: Box<dyn BufRead + Send> = if is_gzip {
            Box::new(BufReader::with_capacity(1 << 16, MultiGzDecoder::new(plain)))
        } else {
            Box::new(plain)
        };
        Ok(Self { reader, name, number: 0, buffer: Vec::new() })
    }

    /// The next line that is not blank; `None` at the end.
    pub(crate) fn next(&mut self) -> Outcome<Option<Line<'_>>> {
        loop {
            self.buffer.clear();
            self.number += 1;
            let mut limited = self.reader.by_ref().take(MOST_BYTES as u64 + 1);
            let read = limited.read_until(b'\n', &mut self.buffer).map_err(|error| {
                failure::io(&format!("{}, line {}", self.name, self.number), &error)
                    .with("line", self.number)
                    .hint("the lines before it were taken in; run it again with the whole input")
            })?;
            if read == 0 {
                return Ok(None);
            }
            if read > MOST_BYTES {
                let message =
                    format!("{}: longer than {MOST_BYTES} bytes", self.place(self.number));
                return Err(Failure::rejected(message).with("line", self.number));
            }
            if !self.buffer.iter().all(u8::is_ascii_whitespace) {
                break;
            }
        }
        let at = format!("{}, line {}", self.name, self.number);
        match std::str::from_utf8(&self.buffer) {
            Ok(text) => {
                Ok(Some(Line { number: self.number, text: text.trim_end_matches(['\n', '\r']) }))
            }
            Err(error) => {
                Err(Failure::rejected(format!("{at}: not UTF-8: {error}"))
                    .with("line", self.number))
            }
        }
    }

    /// Where a line stands, for errors.
    pub(crate) fn place(&self, number: u64) -> String {
        format!("{}, line {number}", self.name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn all(bytes: &[u8]) -> Outcome<Vec<(u64, String)>> {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(bytes).unwrap();
        let mut lines = Lines::open(file.path())?;
        let mut found = Vec::new();
        while let Some(line) = lines.next()? {
            found.push((line.number, line.text.to_owned()));
        }
        Ok(found)
    }

    #[test]
    fn numbers_count_blank_lines() {
        let found = all(b"a\r\n\n  \nb").unwrap();
        assert_eq!(found, [(1, "a".to_owned()), (4, "b".to_owned())]);
        assert!(all(b"").unwrap().is_empty());
    }

    #[test]
    fn a_line_that_does_not_end_is_refused() {
        let long = vec![b'x'; MOST_BYTES + 10];
        assert_eq!(all(&long).unwrap_err().exit, failure::exit::REJECTED);
        assert_eq!(all(b"\xff\xfe").unwrap_err().exit, failure::exit::REJECTED);
    }
}
