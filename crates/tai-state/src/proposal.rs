//! What one commit is to hold: the changes of states, and the conditions under which they count.

use std::sync::Arc;

use crate::backend::{Key, Limits, Operation, Precondition, Write};
use crate::chain::Change;
use crate::error::{Error, Result};
use crate::fence::Token;
use crate::keys::Address;
use crate::reader::KnownHead;
use crate::schema::{self, Command};
use crate::transition::Transition;

/// The changes of one state within a commit, and what they were planned on.
#[derive(Debug, Clone)]
pub(crate) struct Steps {
    pub(crate) base: Option<KnownHead>,
    pub(crate) transitions: Vec<Transition>,
}

impl Steps {
    pub(crate) fn first(&self) -> Option<&Change> {
        self.transitions.first().map(|step| &step.head.change)
    }
}

/// A state that was read and not written; the commit holds only if it stays as it was.
#[derive(Debug, Clone)]
pub(crate) struct Guard {
    pub(crate) address: Address,
    pub(crate) seen: Option<KnownHead>,
}

impl Guard {
    pub(crate) fn condition(&self) -> (Key, Precondition) {
        let holds = match &self.seen {
            Some(known) => Precondition::Revision(known.revision),
            None => Precondition::Absent,
        };
        (self.address.head(), holds)
    }
}

/// The answer to a command, to be kept in the same commit.
#[derive(Debug, Clone)]
pub(crate) struct NewCommand {
    pub(crate) key: Key,
    pub(crate) command: Command,
    pub(crate) write: Write,
}

/// What a commit holds beside the changes of states.
#[derive(Debug, Clone, Default)]
pub(crate) struct Beside {
    /// Grants that must still stand.
    pub(crate) fences: Vec<Arc<Token>>,
    /// The answer to a command.
    pub(crate) command: Option<NewCommand>,
}

impl Beside {
    pub(crate) fn is_empty(&self) -> bool {
        self.fences.is_empty() && self.command.is_none()
    }
}

/// One commit.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Proposal<'a> {
    pub(crate) groups: &'a [Steps],
    pub(crate) guards: &'a [Guard],
    pub(crate) beside: &'a Beside,
}

impl Proposal<'_> {
    /// The list of writes. What a reader of half a commit must not miss comes first, heads come last:
    /// see [`Backend::commit`](crate::backend::Backend::commit).
    pub(crate) fn writes(&self, limits: &Limits) -> Result<Vec<Write>> {
        let mut writes = Vec::new();
        let mut heads = Vec::new();
        for group in self.groups {
            let base = group.base.as_ref().map(|known| (&known.head.change, known.revision));
            let (logged, head) = schema::writes(&group.transitions, base, limits.repeat_before)?;
            writes.extend(logged);
            heads.push(head);
        }
        // After the events that it names.
        writes.extend(self.beside.command.iter().map(|command| command.write.clone()));
        for (key, holds) in self.guards.iter().map(Guard::condition) {
            writes.push(Write::check(key, holds));
        }
        writes.append(&mut self.fence_checks());
        writes.append(&mut heads);
        refuse_large(&writes, limits)?;
        Ok(writes)
    }

    /// The checks of the grants, at the revisions at which they were last seen to stand.
    pub(crate) fn fence_checks(&self) -> Vec<Write> {
        let check = |token: &Arc<Token>| {
            let holds = token.seen().map_or(Precondition::Present, Precondition::Revision);
            Write::check(token.key.clone(), holds)
        };
        self.beside.fences.iter().map(check).collect()
    }
}

/// Refuses what no engine takes, before anything is sent.
fn refuse_large(writes: &[Write], limits: &Limits) -> Result<()> {
    refuse_many(writes.len(), limits)?;
    let size = writes.iter().map(write_bytes).sum();
    if size > limits.commit_bytes {
        let what = "the commit".to_owned();
        return Err(Error::TooLarge { what, size, limit: limits.commit_bytes });
    }
    Ok(())
}

/// Refuses more writes than one commit takes.
pub(crate) fn refuse_many(writes: usize, limits: &Limits) -> Result<()> {
    if writes <= limits.commit_writes {
        return Ok(());
    }
    let what = "the number of documents in one commit".to_owned();
    Err(Error::TooLarge { what, size: writes as u64, limit: limits.commit_writes as u64 })
}

fn write_bytes(write: &Write) -> u64 {
    match &write.operation {
        Operation::Put(body) => body.as_text().len() as u64,
        _ => 0,
    }
}
