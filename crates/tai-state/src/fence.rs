//! The token of a lock as a condition of commits: what a paused holder writes is refused.

use std::sync::{Arc, Mutex, PoisonError};

use crate::backend::{Key, Kind, Name, Revision};
use crate::error::Result;

/// The governor under which locks and idempotency keys stand, unless a manager was given another.
pub const GLOBAL_GOVERNOR: &str = "global";

/// A grant of a lock, as a condition of writes: see [`StateStore::fenced_by`](crate::StateStore::fenced_by).
///
/// Made from a [`DistributedLock`](crate::DistributedLock), or, where another process holds the lock
/// and has passed on its token, from the resource and the token.
#[derive(Debug, Clone)]
pub struct Fence {
    pub(crate) token: Arc<Token>,
}

impl Fence {
    /// The grant with this fencing token, of a resource of the default governor.
    ///
    /// # Errors
    /// [`Error::InvalidState`](crate::Error::InvalidState) for a resource that has no possible name.
    pub fn new(resource: impl AsRef<str>, fencing_token: u64) -> Result<Self> {
        Self::of_governor(GLOBAL_GOVERNOR, resource, fencing_token)
    }

    /// The grant with this fencing token, of a resource of this governor.
    ///
    /// # Errors
    /// As [`new`](Fence::new).
    pub fn of_governor(
        governor: impl AsRef<str>,
        resource: impl AsRef<str>,
        fencing_token: u64,
    ) -> Result<Self> {
        let key = lock_key(governor.as_ref(), resource.as_ref())?;
        Ok(Self { token: Arc::new(Token::new(key, fencing_token, None, None)) })
    }

    /// What is locked.
    #[must_use]
    pub fn resource(&self) -> String {
        self.token.key.name.id()
    }

    /// The number of the grant.
    #[must_use]
    pub fn fencing_token(&self) -> u64 {
        self.token.fencing_token
    }
}

/// Where the lock of a resource stands.
pub(crate) fn lock_key(governor: &str, resource: &str) -> Result<Key> {
    Ok(Key {
        governor: Name::escape(governor, "governor id")?,
        kind: Kind::Locks,
        name: Name::escape(resource, "name of the resource")?,
        version: 0,
    })
}

/// One grant, and the revision at which it was last seen to stand. Renewals move the revision; who
/// finds that it has moved looks whether the token still stands.
#[derive(Debug)]
pub(crate) struct Token {
    pub(crate) key: Key,
    pub(crate) fencing_token: u64,
    /// Of which store, where that is known.
    pub(crate) store: Option<String>,
    seen: Mutex<Option<Revision>>,
}

impl Token {
    pub(crate) fn new(
        key: Key,
        fencing_token: u64,
        store: Option<String>,
        seen: Option<Revision>,
    ) -> Self {
        Self { key, fencing_token, store, seen: Mutex::new(seen) }
    }

    pub(crate) fn seen(&self) -> Option<Revision> {
        *self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn see(&self, revision: Revision) {
        *self.seen.lock().unwrap_or_else(PoisonError::into_inner) = Some(revision);
    }
}
