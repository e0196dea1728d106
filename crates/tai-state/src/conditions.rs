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
        // One document stands once in a commit. Of two grants of one resource the older cannot stand
        // any more; the newer one says so when it is checked.
        let Fence { token } = fence;
        match conditions.fences.iter_mut().find(|other| other.key == token.key) {
            Some(other) if other.fencing_token == token.fencing_token => {}
            Some(other) => {
                if token.fencing_token < other.fencing_token {
                    *other = token;
                }
            }
            None => conditions.fences.push(token),
        }
        conditions
    }
}
