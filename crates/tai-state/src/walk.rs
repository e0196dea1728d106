//! Goes through all states of a store, governor by governor, in canonical order, page by page.

use std::collections::VecDeque;

use crate::error::Result;
use crate::keys::{Address, Name};
use crate::records::{KnownHead, Reader};
use crate::store::StateStore;

/// Heads or governors in memory at once.
const PAGE: usize = 256;

/// Where the walk stands.
#[derive(Debug)]
pub(crate) struct Walk<'a> {
    reader: Reader<'a>,
    /// Governors still to come, and whether more must be asked for.
    governors: VecDeque<Name>,
    more_after: Option<Option<Name>>,
    current: Option<(Name, Option<Name>)>,
    seen: u64,
}

impl StateStore {
    /// All states, or those of one governor.
    pub(crate) fn walk(&self, governor: Option<&str>) -> Result<Walk<'_>> {
        let reader = self.records.reader();
        let (governors, more_after) = match governor {
            Some(governor) => (VecDeque::from([Name::escape(governor, "governor id")?]), None),
            None => (VecDeque::new(), Some(None)),
        };
        Ok(Walk { reader, governors, more_after, current: None, seen: 0 })
    }
}

impl Walk<'_> {
    /// The next heads of one governor; `None` at the end. Never empty.
    pub(crate) async fn next_page(&mut self) -> Result<Option<Vec<(Address, KnownHead)>>> {
        loop {
            let Some((governor, after)) = self.current.take() else {
                match self.next_governor().await? {
                    Some(governor) => self.current = Some((governor, None)),
                    None => return Ok(None),
                }
                continue;
            };
            let is_first = after.is_none();
            let (page, next) = self.reader.states(&governor, after, PAGE).await?;
            self.seen += u64::from(is_first && !page.is_empty());
            if let Some(next) = next {
                self.current = Some((governor, Some(next)));
            }
            if !page.is_empty() {
                return Ok(Some(page));
            }
        }
    }

    /// How many governors with states were entered so far.
    pub(crate) fn governors_seen(&self) -> u64 {
        self.seen
    }

    async fn next_governor(&mut self) -> Result<Option<Name>> {
        if self.governors.is_empty()
            && let Some(after) = self.more_after.take()
        {
            let names = self.reader.governors(after.as_ref(), PAGE).await?;
            if names.len() == PAGE {
                self.more_after = Some(names.last().cloned());
            }
            self.governors = names.into();
        }
        Ok(self.governors.pop_front())
    }
}
