//! The hash chain: what one event says, and the hash that binds it to all events before it.
//!
//! The hash of an event is the SHA-256 of this object as [canonical JSON](crate::json), with the
//! hash of the event before as `prev_hash` (`null` for version 1):
//!
//! ```json
//! {"action":…,"causality":{…},"data":…,"deleted":false,"format":1,"governor_id":…,"id":…,
//!  "metadata":{"changed_by":…,"context":{…},"parent_version":…,"reason":…},
//!  "prev_hash":…,"state_id":…,"timestamp":"2026-01-02T03:04:05.000006Z","version":…}
//! ```
//!
//! The head of a state is its newest change and carries the same hash, so that head and log prove
//! one another. Golden vectors stand in `tests/golden/chain.jsonl`.

use std::fmt;
use std::io::{self, Write};

use chrono::{DateTime, SecondsFormat, Utc};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::Value;
use sha2::{Digest, Sha256};

use crate::clock_vector::VectorClockSnapshot;
use crate::error::{Error, Result};
use crate::event::Event;
use crate::id::{GovernorId, StateId};
use crate::json::{write_canonical, write_string};
use crate::keys::Address;
use crate::state::{ChangeMetadata, StateSnapshot};

/// The number of the stored format; part of every document and of every hash.
pub(crate) const FORMAT: u64 = 1;

/// A SHA-256, shown as 64 lower case hex digits.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Hash([u8; 32]);

impl Hash {
    /// The bytes.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// The hash of the canonical text of a value.
    pub(crate) fn of(value: &serde_json::Value) -> Self {
        let mut hasher = Hasher::default();
        // Taking in bytes does not fail.
        let _ = crate::json::write_canonical(value, &mut hasher);
        hasher.finish()
    }

    fn from_hex(text: &str) -> Option<Self> {
        let mut bytes = [0; 32];
        if text.len() != 64 {
            return None;
        }
        let mut digits =
            text.chars().map(|c| if c.is_ascii_uppercase() { None } else { c.to_digit(16) });
        for byte in &mut bytes {
            let (high, low) = (digits.next()??, digits.next()??);
            *byte = u8::try_from(high * 16 + low).ok()?;
        }
        Some(Self(bytes))
    }
}

impl fmt::Display for Hash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Hash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl Serialize for Hash {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Hash {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        Self::from_hex(&text)
            .ok_or_else(|| serde::de::Error::custom("not a SHA-256 in lower case hex"))
    }
}

/// Takes in bytes and ends as a [`Hash`].
#[derive(Clone, Default)]
pub(crate) struct Hasher(Sha256);

impl Hasher {
    pub(crate) fn finish(self) -> Hash {
        Hash(self.0.finalize().into())
    }
}

impl Write for Hasher {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.update(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The one spelling of a time: RFC 3339 in UTC, with the digits that a whole number of seconds,
/// milli- or microseconds needs.
pub(crate) fn format_time(time: &DateTime<Utc>) -> String {
    time.to_rfc3339_opts(SecondsFormat::AutoSi, true)
}

/// What one event says. The newest change of a state is its head.
///
/// Its `Debug` shows nothing of the data, since handles hold changes and are shown in logs.
#[derive(Clone, PartialEq)]
pub(crate) struct Change {
    pub(crate) address: Address,
    pub(crate) version: u64,
    pub(crate) id: String,
    pub(crate) action: String,
    pub(crate) timestamp: DateTime<Utc>,
    pub(crate) causality: VectorClockSnapshot,
    pub(crate) metadata: ChangeMetadata,
    pub(crate) deleted: bool,
    pub(crate) data: Value,
    pub(crate) prev_hash: Option<Hash>,
    pub(crate) hash: Hash,
}

impl fmt::Debug for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Change")
            .field("address", &self.address)
            .field("version", &self.version)
            .field("id", &self.id)
            .field("deleted", &self.deleted)
            .field("hash", &self.hash)
            .finish_non_exhaustive()
    }
}

impl Change {
    /// Stands in until the hash is computed.
    pub(crate) const NO_HASH: Hash = Hash([0; 32]);

    /// The hash that this change must have.
    pub(crate) fn expected_hash(&self) -> Hash {
        // A buffer between: hashing many short pieces is slower than hashing one long one.
        let mut text = Vec::with_capacity(512);
        // Writing to memory does not fail.
        let _ = self.write_hashed(&mut text);
        let mut hasher = Hasher::default();
        let _ = hasher.write_all(&text);
        hasher.finish()
    }

    fn write_hashed(&self, out: &mut Vec<u8>) -> io::Result<()> {
        out.extend_from_slice(b"{\"action\":");
        write_string(&self.action, out)?;
        out.extend_from_slice(b",\"causality\":{");
        for (index, (node, count)) in self.causality.iter().enumerate() {
            if index > 0 {
                out.push(b',');
            }
            write_string(node, out)?;
            write!(out, ":{count}")?;
        }
        out.extend_from_slice(b"},\"data\":");
        write_canonical(&self.data, out)?;
        write!(out, ",\"deleted\":{},\"format\":{FORMAT},\"governor_id\":", self.deleted)?;
        write_string(&self.address.governor.id(), out)?;
        out.extend_from_slice(b",\"id\":");
        write_string(&self.id, out)?;
        out.extend_from_slice(b",\"metadata\":{\"changed_by\":");
        write_string(&self.metadata.changed_by, out)?;
        out.extend_from_slice(b",\"context\":{");
        for (index, (key, value)) in self.metadata.context.iter().enumerate() {
            if index > 0 {
                out.push(b',');
            }
            write_string(key, out)?;
            out.push(b':');
            write_canonical(value, out)?;
        }
        out.extend_from_slice(b"},\"parent_version\":");
        match self.metadata.parent_version {
            Some(version) => write!(out, "{version}")?,
            None => out.extend_from_slice(b"null"),
        }
        out.extend_from_slice(b",\"reason\":");
        write_string(&self.metadata.reason, out)?;
        out.extend_from_slice(b"},\"prev_hash\":");
        match &self.prev_hash {
            Some(hash) => write!(out, "\"{hash}\"")?,
            None => out.extend_from_slice(b"null"),
        }
        out.extend_from_slice(b",\"state_id\":");
        write_string(&self.address.state.id(), out)?;
        write!(
            out,
            ",\"timestamp\":\"{}\",\"version\":{}}}",
            format_time(&self.timestamp),
            self.version
        )
    }

    /// Checks the hash against the content.
    ///
    /// # Errors
    /// [`Error::Corrupt`] naming the version.
    pub(crate) fn check(&self, what: &str) -> Result<()> {
        if self.hash == self.expected_hash() {
            return Ok(());
        }
        Err(Error::corrupt(
            format!("{what} {} v{}", self.address, self.version),
            "its content does not have the hash that stands with it",
        ))
    }

    pub(crate) fn snapshot(&self) -> StateSnapshot {
        StateSnapshot {
            id: StateId::new(self.address.state.id()),
            data: self.data.clone(),
            version: self.version,
            timestamp: self.timestamp,
            metadata: self.metadata.clone(),
            causality: self.causality.clone(),
        }
    }

    /// Its identity, its action, and the state that it made.
    pub(crate) fn into_parts(self) -> (String, String, StateSnapshot) {
        let state = StateSnapshot {
            id: StateId::new(self.address.state.id()),
            data: self.data,
            version: self.version,
            timestamp: self.timestamp,
            metadata: self.metadata,
            causality: self.causality,
        };
        (self.id, self.action, state)
    }

    /// The event as users see it. `before` is the change before this one, if there was one.
    pub(crate) fn event(&self, before: Option<&Change>) -> Event {
        Event {
            id: self.id.clone(),
            governor_id: GovernorId::new(self.address.governor.id()),
            action: self.action.clone(),
            from_state: before.filter(|b| !b.deleted).map(Change::snapshot),
            to_state: self.snapshot(),
            timestamp: self.timestamp,
            causality: self.causality.clone(),
            metadata: self.metadata.clone(),
            deleted: self.deleted,
            prev_hash: self.prev_hash,
            hash: self.hash,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hashes_are_sha_256() {
        let mut hasher = Hasher::default();
        hasher.write_all(b"abc").unwrap();
        // FIPS 180-2, appendix B.1.
        assert_eq!(
            hasher.finish().to_string(),
            "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
        );
    }

    /// The golden vectors: each line is what is hashed, as JSON, and the hash that it must have. They
    /// were computed by another program (`tests/golden/chain.py`), so that a mistake here cannot
    /// agree with itself. A change of this file is a change of the stored format.
    #[test]
    fn golden_vectors() {
        let lines = include_str!("../tests/golden/chain.jsonl");
        let mut count = 0;
        for line in lines.lines() {
            let vector: Value = crate::json::parse(line, "golden").unwrap();
            let hashed = &vector["hashed"];
            let text = |key: &str| hashed[key].as_str().unwrap().to_owned();
            let change = Change {
                address: Address::new(&text("governor_id"), &text("state_id")).unwrap(),
                version: hashed["version"].as_u64().unwrap(),
                id: text("id"),
                action: text("action"),
                timestamp: text("timestamp").parse().unwrap(),
                causality: serde_json::from_value(hashed["causality"].clone()).unwrap(),
                metadata: serde_json::from_value(hashed["metadata"].clone()).unwrap(),
                deleted: hashed["deleted"].as_bool().unwrap(),
                data: hashed["data"].clone(),
                prev_hash: serde_json::from_value(hashed["prev_hash"].clone()).unwrap(),
                hash: Change::NO_HASH,
            };
            let mut written = Vec::new();
            change.write_hashed(&mut written).unwrap();
            assert_eq!(String::from_utf8(written).unwrap(), crate::json::canonical(hashed));
            assert_eq!(
                change.expected_hash().to_string(),
                vector["hash"].as_str().unwrap(),
                "{line}"
            );
            count += 1;
        }
        assert_eq!(count, 6);
    }

    /// What is hashed is canonical JSON also where there are several of a thing.
    #[test]
    fn several_nodes_and_entries_are_hashed_as_canonical_json() {
        let metadata = serde_json::json!({
            "changed_by": "a", "context": {"x": 1, "y": [2], "z": null}, "parent_version": 3, "reason": "b",
        });
        let causality = serde_json::json!({"n1": 4, "n2": 5, "n3": 6});
        let change = Change {
            address: Address::new("g", "s").unwrap(),
            version: 7,
            id: "i".into(),
            action: "act".into(),
            timestamp: DateTime::UNIX_EPOCH,
            causality: serde_json::from_value(causality.clone()).unwrap(),
            metadata: serde_json::from_value(metadata.clone()).unwrap(),
            deleted: false,
            data: serde_json::json!({"k": [1, 2], "l": {}}),
            prev_hash: Some(Change::NO_HASH),
            hash: Change::NO_HASH,
        };
        let mut written = Vec::new();
        change.write_hashed(&mut written).unwrap();
        let wanted = serde_json::json!({
            "action": "act", "causality": causality, "data": change.data, "deleted": false, "format": 1,
            "governor_id": "g", "id": "i", "metadata": metadata, "prev_hash": "0".repeat(64),
            "state_id": "s", "timestamp": "1970-01-01T00:00:00Z", "version": 7,
        });
        assert_eq!(String::from_utf8(written).unwrap(), crate::json::canonical(&wanted));
    }

    #[test]
    fn hex_is_read_strictly() {
        let hex = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        let hash = Hash::from_hex(hex).unwrap();
        assert_eq!((hash.to_string().as_str(), &hash.as_bytes()[..2]), (hex, &[0xba, 0x78][..]));
        assert_eq!(format!("{hash:?}"), hex);
        for bad in ["", "ba", &hex.to_uppercase(), &format!("{hex}00"), &hex.replace('b', "g")] {
            assert_eq!(Hash::from_hex(bad), None);
        }
    }
}
