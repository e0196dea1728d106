//! Where documents stand in Firestore: keys to resource names and back.
//!
//! `projects/{project}/databases/{database}/documents/governors/{governor}/{kind}/{id}`, with an
//! optional prefix before the names of the collections: settings of an index or of a time to live
//! hold for a collection's name in the whole database, so those who share one need their own names.

use crate::backend::{Key, Kind, Name};

/// What Firestore counts for the name of a document beside its segments
/// (<https://firebase.google.com/docs/firestore/storage-size>).
const NAME_BYTES: u64 = 16;

/// One store's part of one database.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Place {
    project: String,
    database_id: String,
    /// `projects/{project}/databases/{database}`.
    database: String,
    prefix: String,
}

impl Place {
    pub(super) fn new(project: &str, database: &str, prefix: &str) -> Self {
        Self {
            project: project.to_owned(),
            database_id: database.to_owned(),
            database: format!("projects/{project}/databases/{database}"),
            prefix: prefix.to_owned(),
        }
    }

    pub(super) fn project(&self) -> &str {
        &self.project
    }

    pub(super) fn database_id(&self) -> &str {
        &self.database_id
    }

    /// The resource name of the database.
    pub(super) fn database(&self) -> &str {
        &self.database
    }

    /// What stands above all collections.
    pub(super) fn root(&self) -> String {
        format!("{}/documents", self.database)
    }

    /// The collection whose documents stand above all that a governor has.
    pub(super) fn governors(&self) -> String {
        format!("{}governors", self.prefix)
    }

    pub(super) fn governor(&self, governor: &Name) -> String {
        format!("{}/documents/{}governors/{governor}", self.database, self.prefix)
    }

    pub(super) fn collection(&self, kind: Kind) -> String {
        format!("{}{}", self.prefix, kind.as_str())
    }

    /// The document that says which store this is.
    pub(super) fn meta(&self) -> String {
        format!("{}/documents/{}tai_state_meta/store", self.database, self.prefix)
    }

    pub(super) fn document(&self, key: &Key) -> String {
        let id = id(key);
        format!("{}/{}{}/{id}", self.governor(&key.governor), self.prefix, key.kind.as_str())
    }

    /// The resource names between which all documents of this store stand, in the order of names:
    /// before the first and after the last.
    pub(super) fn bounds(&self) -> (String, String) {
        let governors = format!("{}/{}", self.root(), self.governors());
        // Names hold no control characters, and 375 times the last character is more than an id takes.
        (format!("{governors}/\u{1}"), format!("{governors}/{}", "\u{10ffff}".repeat(375)))
    }

    /// The name of the governor in a resource name of a document of [`governors`](Self::governors).
    pub(super) fn governor_of(&self, resource: &str) -> Option<Name> {
        Name::from_escaped(self.below_governors(resource)?)
    }

    /// The key of a document; `None` when no store of this crate would have put it there.
    pub(super) fn key(&self, resource: &str) -> Option<Key> {
        let mut segments = self.below_governors(resource)?.split('/');
        let (governor, collection, id) = (segments.next()?, segments.next()?, segments.next()?);
        if segments.next().is_some() {
            return None;
        }
        let kind_name = collection.strip_prefix(self.prefix.as_str())?;
        let kind = Kind::ALL.into_iter().find(|kind| kind.as_str() == kind_name)?;
        let (name, version) = if kind.is_versioned() {
            let (name, version) = id.split_once('~')?;
            let digits = version.len() == 20 && version.bytes().all(|byte| byte.is_ascii_digit());
            (name, digits.then(|| version.parse().ok()).flatten()?)
        } else {
            (id, 0)
        };
        let governor = Name::from_escaped(governor)?;
        Some(Key { governor, kind, name: Name::from_escaped(name)?, version })
    }

    fn below_governors<'a>(&self, resource: &'a str) -> Option<&'a str> {
        resource
            .strip_prefix(self.database.as_str())?
            .strip_prefix("/documents/")?
            .strip_prefix(self.governors().as_str())?
            .strip_prefix('/')
    }

    /// How many bytes of a document's limit its name takes.
    pub(super) fn name_bytes(resource: &str) -> u64 {
        let below = resource.split_once("/documents/").map_or(resource, |(_, below)| below);
        NAME_BYTES + below.split('/').map(|segment| segment.len() as u64 + 1).sum::<u64>()
    }
}

fn id(key: &Key) -> String {
    if key.kind.is_versioned() {
        format!("{}~{:020}", key.name, key.version)
    } else {
        key.name.as_str().to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn key(governor: &str, kind: Kind, id: &str, version: u64) -> Key {
        let name = |id| Name::escape(id, "id").unwrap();
        Key { governor: name(governor), kind, name: name(id), version }
    }

    #[test]
    fn names_by_table() {
        let place = Place::new("p", "(default)", "");
        for (key, below) in [
            (key("gov", Kind::States, "a/b", 0), "governors/gov/states/a%2Fb"),
            (key("gov", Kind::Events, "s", 7), "governors/gov/events/s~00000000000000000007"),
            (key("..", Kind::Locks, "__x__", 0), "governors/%2E%2E/locks/%5F_x__"),
        ] {
            let name = format!("projects/p/databases/(default)/documents/{below}");
            assert_eq!(place.document(&key), name);
            assert_eq!(place.key(&name), Some(key));
        }
        let prefixed = Place::new("p", "d", "app-");
        assert_eq!(
            prefixed.document(&key("g", Kind::Snapshots, "s", 1)),
            "projects/p/databases/d/documents/app-governors/g/app-snapshots/s~00000000000000000001"
        );
        assert_eq!(prefixed.meta(), "projects/p/databases/d/documents/app-tai_state_meta/store");
    }

    #[test]
    fn what_another_wrote_is_no_key() {
        let place = Place::new("p", "d", "");
        for below in [
            "governors/g/states/a~b",
            "governors/g/states/a/more/b",
            "governors/g/events/s",
            "governors/g/events/s~7",
            "governors/g/events/s~0000000000000000000x",
            "governors/g/events/s~99999999999999999999",
            "governors/g/orders/s",
            "users/g/states/s",
            "governorsx/g/states/s",
            "governors/g/states/%2f",
        ] {
            assert_eq!(
                place.key(&format!("projects/p/databases/d/documents/{below}")),
                None,
                "{below}"
            );
        }
        assert_eq!(place.key("projects/q/databases/d/documents/governors/g/states/s"), None);
    }

    proptest! {
        #[test]
        fn every_key_comes_back(
            governor in ".{1,20}", id in ".{1,20}", version in any::<u64>(), kind in 0usize..5,
            prefix in "[a-zA-Z0-9_-]{0,5}",
        ) {
            let kind = Kind::ALL[kind];
            let version = if kind.is_versioned() { version } else { 0 };
            let (place, key) = (Place::new("p", "d", &prefix), key(&governor, kind, &id, version));
            let name = place.document(&key);
            prop_assert_eq!(place.key(&name), Some(key));
            let (low, high) = place.bounds();
            prop_assert!(low < name && name < high);
        }
    }
}
