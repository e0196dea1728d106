//! Bytes as a recipe: read from the front, and zeros once they are used up.

use serde_json::{Map, Number, Value};

/// What is left of the bytes.
#[derive(Debug, Clone)]
pub struct Input<'a>(&'a [u8]);

/// Texts in which something is not as it seems.
const TEXTS: [&str; 20] = [
    "",
    "a",
    "b",
    "n",
    "é",
    "\u{10ffff}",
    "\0",
    "\"\\\u{8}\n",
    "a.b",
    "`",
    "%2F",
    "~1",
    "__x__",
    "tai:json",
    "id",
    "state",
    "2026-01-01T00:00:00Z",
    "1e400",
    ".",
    "..",
];

/// Numbers at whose neighbours something changes.
const EDGES: [u64; 8] =
    [0, 1, i64::MAX as u64, 1 << 63, u64::MAX, 1 << 53, (1 << 53) + 1, u32::MAX as u64];

impl<'a> Input<'a> {
    /// All of them.
    #[must_use]
    pub fn new(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }

    /// Whether they are used up.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The next one.
    pub fn byte(&mut self) -> u8 {
        let Some((first, rest)) = self.0.split_first() else { return 0 };
        self.0 = rest;
        *first
    }

    /// One of `0..end`, for an `end` up to 256.
    pub fn below(&mut self, end: usize) -> usize {
        usize::from(self.byte()) % end
    }

    /// The next eight, as a number.
    pub fn number(&mut self) -> u64 {
        u64::from_be_bytes(std::array::from_fn(|_| self.byte()))
    }

    /// So many, or as many as there are.
    pub fn take(&mut self, count: usize) -> &'a [u8] {
        let (taken, rest) = self.0.split_at(count.min(self.0.len()));
        self.0 = rest;
        taken
    }

    /// All that is left.
    pub fn rest(&mut self) -> &'a [u8] {
        std::mem::take(&mut self.0)
    }

    /// A number that is often a special one.
    pub fn edge(&mut self) -> u64 {
        match self.below(10) {
            8 => self.number(),
            9 => u64::from(self.byte()),
            special => EDGES[special],
        }
    }

    /// A text that is often a special one.
    pub fn text(&mut self) -> String {
        match self.below(TEXTS.len() + 4) {
            own if own >= TEXTS.len() => {
                let length = self.below(40);
                String::from_utf8_lossy(self.take(length)).into_owned()
            }
            special => TEXTS[special].to_owned(),
        }
    }

    /// A JSON value, nested at most so deep.
    pub fn json(&mut self, depth: usize) -> Value {
        let most = if depth == 0 { 7 } else { 11 };
        match self.below(most) {
            0 => Value::Null,
            1 => Value::Bool(self.byte() > 127),
            2 => Value::from(i64::from_ne_bytes(self.edge().to_ne_bytes())),
            3 => Value::from(self.edge()),
            4 => Number::from_f64(f64::from_bits(self.number())).map_or(Value::Null, Value::Number),
            5 => Value::from(f64::from(self.byte()) / 8.0 - 16.0),
            6 => Value::String(self.text()),
            7 | 8 => (0..self.below(5)).map(|_| self.json(depth - 1)).collect(),
            9 => {
                // Deep and narrow.
                let levels = self.below(depth.min(255) + 1);
                let inner = self.json(0);
                (0..levels).fold(inner, |inner, level| match level % 3 {
                    0 => Value::Array(vec![inner]),
                    _ => Value::Object(Map::from_iter([("d".to_owned(), inner)])),
                })
            }
            _ => {
                let fields = (0..self.below(5)).map(|_| (self.text(), self.json(depth - 1)));
                Value::Object(fields.collect())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_used_up_gives_zeros() {
        let mut input = Input::new(&[7]);
        assert_eq!((input.byte(), input.byte(), input.number()), (7, 0, 0));
        assert_eq!((input.take(3), input.json(3)), (&[][..], Value::Null));
    }
}
