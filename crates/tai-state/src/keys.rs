//! How ids are spelled where documents are kept.
//!
//! [`Name`] is an id in its escaped form, which every backend can take as it is: no `/` (it divides
//! Firestore paths), no `~` (it divides a name from a version), no control character, never `.`,
//! `..` or `__…__` (reserved by Firestore). What stands in the way is written as `%` and two upper
//! case hex digits a byte, `%` itself included, so that the form is reversible. Documents are
//! ordered by the bytes of this form, on every backend.

use std::fmt;

use crate::error::{Error, Result};

/// The longest escaped id, in bytes: with `~` and a version of 20 digits it stays under the 1,500
/// bytes that Firestore allows.
pub const MAX_NAME_BYTES: usize = 1_400;

/// An id in its escaped form.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Name(String);

impl Name {
    /// Escapes an id. `role` names it in the error: `state id`, `governor id`.
    ///
    /// # Errors
    /// [`Error::InvalidState`] when it is empty or its escaped form is longer than
    /// [`MAX_NAME_BYTES`].
    pub fn escape(id: &str, role: &str) -> Result<Self> {
        if id.is_empty() {
            return Err(Error::refused(format!("the {role}"), "it is empty"));
        }
        // Longer than this it cannot fit, whatever it holds.
        if id.len() > MAX_NAME_BYTES {
            return Err(too_long(role, id.len()));
        }
        let mut escaped = String::with_capacity(id.len());
        let reserved_dots = id == "." || id == "..";
        let reserved_underscores = id.len() >= 4 && id.starts_with("__") && id.ends_with("__");
        for (index, c) in id.char_indices() {
            let hide = matches!(c, '%' | '/' | '~')
                || c.is_control()
                || reserved_dots
                || (reserved_underscores && index == 0);
            if hide {
                let mut bytes = [0; 4];
                for byte in c.encode_utf8(&mut bytes).bytes() {
                    escaped.push_str(&format!("%{byte:02X}"));
                }
            } else {
                escaped.push(c);
            }
        }
        if escaped.len() > MAX_NAME_BYTES {
            return Err(too_long(role, escaped.len()));
        }
        Ok(Self(escaped))
    }

    /// Takes an escaped form as it was stored. `None` when [`Name::escape`] would never have made
    /// it: then something else wrote it.
    #[must_use]
    pub fn from_escaped(escaped: &str) -> Option<Self> {
        let name = Self(escaped.to_owned());
        let id = name.unescape()?;
        (Self::escape(&id, "id").ok()? == name).then_some(name)
    }

    /// The escaped form.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The id itself.
    #[must_use]
    pub fn id(&self) -> String {
        // Every way to make a Name checks that it can be undone.
        self.unescape().unwrap_or_else(|| self.0.clone())
    }

    fn unescape(&self) -> Option<String> {
        let mut bytes = Vec::with_capacity(self.0.len());
        let mut rest = self.0.bytes();
        while let Some(byte) = rest.next() {
            if byte == b'%' {
                let high = char::from(rest.next()?).to_digit(16)?;
                let low = char::from(rest.next()?).to_digit(16)?;
                bytes.push(u8::try_from(high * 16 + low).ok()?);
            } else {
                bytes.push(byte);
            }
        }
        String::from_utf8(bytes).ok()
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

fn too_long(role: &str, bytes: usize) -> Error {
    Error::TooLarge {
        what: format!("the {role}"),
        size: bytes as u64,
        limit: MAX_NAME_BYTES as u64,
    }
}

/// What kind of document it is: one collection, or one table, each.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    /// The heads: the newest value of every state.
    States,
    /// The log: one document for every change.
    Events,
    /// Saved snapshots, from which replay may start.
    Snapshots,
    /// Leases and their fencing tokens.
    Locks,
    /// Answers to commands that carried an idempotency key.
    Commands,
}

impl Kind {
    /// All kinds.
    pub const ALL: [Kind; 5] =
        [Self::States, Self::Events, Self::Snapshots, Self::Locks, Self::Commands];

    /// Whether its documents are told apart by a version beside the name.
    #[must_use]
    pub fn is_versioned(self) -> bool {
        matches!(self, Self::Events | Self::Snapshots)
    }

    /// The name of the collection.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::States => "states",
            Self::Events => "events",
            Self::Snapshots => "snapshots",
            Self::Locks => "locks",
            Self::Commands => "commands",
        }
    }
}

/// Where a document stands.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Key {
    /// The governor.
    pub governor: Name,
    /// The kind.
    pub kind: Kind,
    /// The name within governor and kind.
    pub name: Name,
    /// The version for [versioned](Kind::is_versioned) kinds, 0 for the others.
    pub version: u64,
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}/{}", self.governor, self.kind.as_str(), self.name)?;
        if self.kind.is_versioned() {
            write!(f, "~{:020}", self.version)?;
        }
        Ok(())
    }
}

/// The address of a state, with both halves checked and escaped.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Address {
    pub(crate) governor: Name,
    pub(crate) state: Name,
}

impl Address {
    pub(crate) fn new(governor: &str, state: &str) -> Result<Self> {
        Ok(Self {
            governor: Name::escape(governor, "governor id")?,
            state: Name::escape(state, "state id")?,
        })
    }

    pub(crate) fn head(&self) -> Key {
        self.key(Kind::States, 0)
    }

    pub(crate) fn event(&self, version: u64) -> Key {
        self.key(Kind::Events, version)
    }

    pub(crate) fn snapshot(&self, version: u64) -> Key {
        self.key(Kind::Snapshots, version)
    }

    fn key(&self, kind: Kind, version: u64) -> Key {
        Key { governor: self.governor.clone(), kind, name: self.state.clone(), version }
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.governor, self.state)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn escapes_by_table() {
        let long = "x".repeat(1_400);
        for (id, escaped) in [
            ("counter", "counter"),
            ("a/b", "a%2Fb"),
            ("a~1", "a%7E1"),
            ("100%", "100%25"),
            ("%2F", "%252F"),
            (".", "%2E"),
            ("..", "%2E%2E"),
            ("...", "..."),
            ("__x__", "%5F_x__"),
            ("____", "%5F___"),
            ("__", "__"),
            ("___", "___"),
            ("__x", "__x"),
            ("a\0b\nc\u{85}", "a%00b%0Ac%C2%85"),
            ("\u{202e}rtl é", "\u{202e}rtl é"),
            (&long, &long),
        ] {
            let name = Name::escape(id, "state id").unwrap();
            assert_eq!(name.as_str(), escaped);
            assert_eq!(name.id(), id);
            assert_eq!(Name::from_escaped(escaped), Some(name));
        }
    }

    /// Errors and reports name documents so, and people look for them.
    #[test]
    fn are_shown_as_they_are_stored() {
        let address = Address::new("a/b", "c").unwrap();
        assert_eq!(address.to_string(), "a%2Fb/c");
        assert_eq!(address.head().to_string(), "a%2Fb/states/c");
        assert_eq!(address.event(7).to_string(), "a%2Fb/events/c~00000000000000000007");
    }

    #[test]
    fn refuses_what_cannot_be_kept() {
        assert_eq!(Name::escape("", "state id").unwrap_err().code(), "invalid_state");
        for long in ["x".repeat(1_401), "/".repeat(467), "x".repeat(10_000)] {
            assert_eq!(Name::escape(&long, "state id").unwrap_err().code(), "too_large");
        }
        for foreign in ["a/b", "a~b", "%2f", "%41", "%", "%2", "__x__", "..", "", "%FF"] {
            assert_eq!(Name::from_escaped(foreign), None, "{foreign}");
        }
    }

    proptest! {
        #[test]
        fn reversible_and_injective(a in any::<String>(), b in any::<String>()) {
            prop_assume!(!a.is_empty() && !b.is_empty());
            let (escaped_a, escaped_b) = (Name::escape(&a, "id"), Name::escape(&b, "id"));
            if let (Ok(escaped_a), Ok(escaped_b)) = (escaped_a, escaped_b) {
                prop_assert_eq!(escaped_a.id(), a.clone());
                prop_assert_eq!(escaped_a == escaped_b, a == b);
                prop_assert!(!escaped_a.as_str().contains(['/', '~']));
            }
        }
    }
}
