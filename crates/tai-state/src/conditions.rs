//! What a handle adds to every commit that is made through it.

use std::sync::Arc;

use crate::error::Result;
use crate::fence::{Fence, GLOBAL_GOVERNOR, Token};
use crate::keys::{Key, Kind, Name};

/// Conditions of a handle; none for an ordinary one.
#[derive(Debug, Clone, Default)]
pub(crate) struct Conditions {
    /// Grants that must still stand.
    pub(crate) fences: Vec<Arc<Token>>,
    /// Under which key the answer is kept.
    pub(crate) key: Option<CommandKey>,
}

/// An idempotency key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct CommandKey(pub(crate) Key);

impl CommandKey {
    pub(crate) fn new(key: &str) -> Result<Self> {
        Ok(Self(Key {
            governor: Name::escape(GLOBAL_GOVERNOR, "governor id")?,
            kind: Kind::Commands,
            name: Name::escape(key, "idempotency key")?,
            version: 0,
        }))
    }

    pub(crate) fn text(&self) -> String {
        self.0.name.id()
    }
}

impl Conditions {
    pub(crate) fn is_empty(&self) -> bool {
        self.fences.is_empty() && self.key.is_none()
    }

    /// With one more grant.
    pub(crate) fn fenced_by(&self, fence: Fence) -> Self {
        let mut conditions = self.clone();
        // Two grants of one resource both stay: they cannot both stand, and the commit says so.
        let is_same = |other: &Arc<Token>| {
            other.key == fence.token.key && other.fencing_token == fence.token.fencing_token
        };
        if !conditions.fences.iter().any(is_same) {
            conditions.fences.push(fence.token);
        }
        conditions
    }
}
