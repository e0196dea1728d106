//! Folds the whole log of a state, page by page: while one page is proved, the next is read.

use std::sync::Arc;

use serde::Serialize;

use crate::backend::{Document, Kind};
use crate::chain::{Change, Hash};
use crate::error::{Error, Result};
use crate::history::trimmed;
use crate::keys::Address;
use crate::patience::stopped;
use crate::records::{KnownHead, Records};
use crate::replay::Link;
use crate::schema;
use crate::state::StateSnapshot;

/// One event of a log that is folded, without the state before it.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[non_exhaustive]
pub struct LoggedEvent {
    /// The identity of the change.
    pub id: String,
    /// What was done.
    pub action: String,
    /// The state after it; its data is `null` after a deletion.
    pub to_state: StateSnapshot,
    /// Whether it deleted the state.
    pub deleted: bool,
    /// The hash of the event.
    pub hash: Hash,
}

impl From<Change> for LoggedEvent {
    fn from(change: Change) -> Self {
        let Change { deleted, hash, .. } = change;
        let (id, action, to_state) = change.into_parts();
        Self { id, action, to_state, deleted, hash }
    }
}

impl Records {
    /// Gives every event up to the head's to `each`, proved.
    pub(crate) async fn fold_all(
        self: &Arc<Self>,
        address: &Address,
        known: &KnownHead,
        batch: usize,
        each: &mut (dyn FnMut(LoggedEvent) -> Result<()> + Send),
    ) -> Result<()> {
        let mut link = Link::first(known.head.first_version);
        let folded = self.fold_kept(address, known, batch, &mut link, each).await;
        if matches!(folded, Err(Error::Corrupt { .. })) {
            // What is missing may have been cleaned up since the head was read.
            let next = link.next_version();
            match self.head(address).await? {
                Some(newer) if newer.head.first_version > next => {
                    return Err(trimmed(address, &newer, &format!("v{next}")));
                }
                _ => {}
            }
        }
        folded
    }

    async fn fold_kept(
        self: &Arc<Self>,
        address: &Address,
        known: &KnownHead,
        batch: usize,
        link: &mut Link,
        each: &mut (dyn FnMut(LoggedEvent) -> Result<()> + Send),
    ) -> Result<()> {
        let (first, last) = (known.head.first_version, known.head.version());
        let mut next = Some(self.read_ahead(address, first, last, batch));
        while let Some(page) = next.take() {
            let (documents, after) = page.await.map_err(stopped)??;
            next = after.map(|from| self.read_ahead(address, from, last, batch));
            for change in decoded(address, documents).await? {
                link.push(address, &change)?;
                each(change.into())?;
            }
        }
        if link.next_version() <= last {
            let place = format!("the log of {address} at v{}", link.next_version());
            return Err(Error::corrupt(place, "the event is missing"));
        }
        if link.hash() != Some(known.head.change.hash) {
            let place = format!("the head of {address}");
            return Err(Error::corrupt(place, "it is not what its log says"));
        }
        Ok(())
    }

    fn read_ahead(
        self: &Arc<Self>,
        address: &Address,
        from: u64,
        to: u64,
        batch: usize,
    ) -> tokio::task::JoinHandle<Result<(Vec<Document>, Option<u64>)>> {
        let (records, address) = (Arc::clone(self), address.clone());
        tokio::spawn(async move {
            records.reader().versions(&address, Kind::Events, from, to, batch).await
        })
    }
}

/// Reads and proves documents, half of them elsewhere where there are many.
async fn decoded(address: &Address, mut documents: Vec<Document>) -> Result<Vec<Change>> {
    let decode = |address: &Address, documents: &[Document]| -> Result<Vec<Change>> {
        documents.iter().map(|document| schema::read_change(address, document)).collect()
    };
    if documents.len() < 64 {
        return decode(address, &documents);
    }
    let rest = documents.split_off(documents.len() / 2);
    let elsewhere = address.clone();
    let rest = tokio::spawn(async move { decode(&elsewhere, &rest) });
    let mut changes = decode(address, &documents)?;
    changes.extend(rest.await.map_err(stopped)??);
    Ok(changes)
}
