//! Idempotency keys: a command that was answered gets the first answer again, and does nothing more.
//!
//! The answer is kept in the commit that it answers for, under *must not exist*: so of two senders of
//! one key one is refused, and finds the answer of the other. An answer that is there counts, however
//! old it is: no clock decides whether a command runs again, only whether its answer may be removed.

use std::sync::Arc;

use chrono::Utc;
use serde_json::json;

use crate::backend::{Kind, Precondition, Write};
use crate::chain::{Change, Hash};
use crate::clock::new_event_id;
use crate::conditions::{CommandKey, Conditions};
use crate::error::{Error, Result};
use crate::keys::{Address, Name};
use crate::patience::Deadline;
use crate::proposal::{Beside, NewCommand};
use crate::reader::lift;
use crate::records::Records;
use crate::schema::{self, Answered, Command};
use crate::transition::{Expect, Head, Request, Wish};

/// The largest answer that is kept, in bytes of JSON.
pub const MAX_ANSWER_BYTES: u64 = 512 * 1024;

/// One command, as it is asked.
#[derive(Debug, Clone)]
pub(crate) struct Asked {
    pub(crate) key: CommandKey,
    /// What tells it from another under the same key; where nobody can tell, nothing.
    pub(crate) request: Option<Hash>,
    /// The identity of this attempt to answer it.
    id: String,
}

impl Asked {
    pub(crate) fn new(key: &CommandKey, request: &Request) -> Self {
        Self::of(key, Some(fingerprint(request)))
    }

    pub(crate) fn of(key: &CommandKey, request: Option<Hash>) -> Self {
        Self { key: key.clone(), request, id: new_event_id().to_string() }
    }

    /// # Errors
    /// [`Error::InvalidState`] when the answer that is there is the one to something else.
    pub(crate) fn check(&self, there: &Command) -> Result<()> {
        match (self.request, there.request) {
            (Some(asked), Some(answered)) if asked != answered => Err(self.reused()),
            _ => Ok(()),
        }
    }

    fn reused(&self) -> Error {
        let subject = format!("the idempotency key {:?}", self.key.text());
        Error::refused(subject, "it was used for another request")
    }
}

/// What a request asks for, whoever asks and whenever: not its identity, not who and why.
fn fingerprint(request: &Request) -> Hash {
    let wish = match &request.wish {
        Wish::Put(data) => json!({ "put": data }),
        Wish::Delete => json!("delete"),
        Wish::Purge => json!("purge"),
    };
    let expect = match &request.expect {
        Expect::Any => json!("any"),
        Expect::Version(version) => json!(version),
        Expect::Data(data) => json!({ "data": data }),
    };
    let Address { governor, state } = &request.address;
    Hash::of(&json!([governor.as_str(), state.as_str(), request.action, wish, expect]))
}

impl Records {
    /// What a commit holds beside one change.
    pub(crate) fn beside(
        &self,
        conditions: &Conditions,
        asked: Option<&Asked>,
        change: &Change,
    ) -> Result<Beside> {
        let answer = || Answered::Event {
            governor: change.address.governor.id(),
            state: change.address.state.id(),
            version: change.version,
        };
        let command = asked.map(|asked| self.new_command(asked, answer())).transpose()?;
        Ok(Beside { fences: conditions.fences.clone(), command })
    }

    /// The answer to a command, to be kept.
    pub(crate) fn new_command(&self, asked: &Asked, answer: Answered) -> Result<NewCommand> {
        let now = self.options().clock.now();
        let ttl = chrono::TimeDelta::from_std(self.options().idempotency_ttl);
        let expires_at = ttl.ok().and_then(|ttl| now.checked_add_signed(ttl));
        let command = Command {
            id: asked.id.clone(),
            request: asked.request,
            answer,
            // What cannot be said lasts as long as times do.
            expires_at: expires_at.unwrap_or(schema::LAST_TIME).min(schema::LAST_TIME),
        };
        let key = asked.key.0.clone();
        let body = schema::command_body(&asked.key.text(), &command, now)?;
        let size = body.as_text().len() as u64;
        if size > MAX_ANSWER_BYTES {
            return Err(Error::TooLarge {
                what: format!("the answer under the idempotency key {:?}", asked.key.text()),
                size,
                limit: MAX_ANSWER_BYTES,
            });
        }
        let write = Write::put(key.clone(), body, Precondition::Absent);
        Ok(NewCommand { key, command, write })
    }

    /// The change that answered a command before, and the one before that.
    pub(crate) async fn answer_to(
        &self,
        asked: &Asked,
        deadline: Deadline,
    ) -> Result<Option<(Change, Option<Arc<Head>>)>> {
        let found = self.reader_within(deadline.left()).command(&asked.key.0).await?;
        let Some(there) = found else { return Ok(None) };
        asked.check(&there)?;
        let Answered::Event { governor, state, version } = &there.answer else {
            return Err(asked.reused());
        };
        let address = Address::new(governor, state)?;
        let versions: Vec<u64> = (version.saturating_sub(1).max(1)..=*version).collect();
        let mut found = self.reader_within(deadline.left()).changes_at(&address, &versions).await?;
        let Some(change) = found.pop().flatten() else {
            let known = self.reader_within(deadline.left()).head(&address).await?;
            return Err(Error::HistoryTrimmed {
                governor: governor.clone(),
                state: state.clone(),
                asked: format!("v{version}, which answered this command"),
                first_version: known.map_or(version + 1, |known| known.head.first_version),
            });
        };
        let before = found.pop().flatten().map(|change| Arc::new(Head::new(change)));
        Ok(Some((change, before)))
    }

    /// Removes answers that may be forgotten, page by page; says how many.
    pub(crate) async fn forget_answers(&self) -> Result<u64> {
        let governor = Name::escape(crate::fence::GLOBAL_GOVERNOR, "governor id")?;
        let now = self.options().clock.now().with_timezone(&Utc);
        let mut forgotten = 0;
        let mut all = self.reader().all(&governor, Kind::Commands);
        while let Some(documents) = all.next_page().await? {
            let mut old = Vec::new();
            for document in &documents {
                let is_old = match schema::read_command(document) {
                    Ok(command) => command.expires_at < now,
                    // When it may be forgotten is not known; `verify` tells of it.
                    Err(Error::Corrupt { location, reason }) => {
                        tracing::warn!(location, reason, "an answer is damaged, and stays");
                        false
                    }
                    Err(error) => return Err(error),
                };
                if is_old {
                    let guard = Precondition::Revision(document.revision);
                    old.push(Write::delete(document.key.clone(), guard));
                }
            }
            let count = old.len() as u64;
            if count > 0 {
                // Nothing is lost when another removes them at the same time.
                match self.backend.commit(old).await {
                    Ok(_) => forgotten += count,
                    Err(crate::backend::BackendError::Conflict) => {}
                    Err(error) => return Err(lift(error, self.location())),
                }
            }
        }
        Ok(forgotten)
    }
}
