//! Typed reading through the port: a backend, one of its views, its alarms.

use std::sync::Arc;
use std::time::Duration;

use chrono::{DateTime, Utc};

use crate::backend::{
    Alarm, BackendError, Cursor, Document, Key, Kind, Name, Query, Range, Read, Revision, Rung,
    Scan, refuse_query,
};
use crate::chain::Change;
use crate::config::RetryPolicy;
use crate::error::{Error, Result};
use crate::keys::Address;
use crate::patience::{self, Deadline};
use crate::schema::{self, Command};
use crate::transition::Head;

/// How many of all documents of a kind are read in one go.
const PAGE: usize = 200;

/// A head as it was read or written, with the revision that guards the next change.
#[derive(Debug, Clone)]
pub(crate) struct KnownHead {
    pub(crate) head: Arc<Head>,
    pub(crate) revision: Revision,
}

/// One cut of the store, held for a short time.
#[derive(Debug)]
pub(crate) struct View {
    pub(crate) read: Box<dyn Read>,
    pub(crate) location: String,
    pub(crate) retry: RetryPolicy,
    pub(crate) deadline: Deadline,
}

impl View {
    pub(crate) fn reader(&self) -> Reader<'_> {
        let Self { read, location, retry, deadline } = self;
        Reader { read: read.as_ref(), location, retry, limit: deadline.left() }
    }
}

/// Wakes whoever waits for changes of states.
#[derive(Debug)]
pub(crate) struct Watch {
    pub(crate) alarm: Box<dyn Alarm>,
    pub(crate) location: String,
}

impl Watch {
    /// Waits until something may have changed. May be given up without losing anything.
    pub(crate) async fn ring(&mut self) -> Result<Rung> {
        self.alarm.ring().await.map_err(|error| lift(error, &self.location))
    }

    /// Takes away what has rung by now, for whoever looks next anyway.
    pub(crate) async fn hush(&mut self) -> Result<()> {
        while let Ok(rung) = tokio::time::timeout(Duration::ZERO, self.ring()).await {
            rung?;
        }
        Ok(())
    }
}

/// Typed reading through a backend or one of its views.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Reader<'a> {
    pub(crate) read: &'a dyn Read,
    pub(crate) location: &'a str,
    pub(crate) retry: &'a RetryPolicy,
    /// How long each call may take.
    pub(crate) limit: Duration,
}

impl<'a> Reader<'a> {
    /// Calls the port, and again while that may help.
    async fn call<T, Reading>(self, call: impl Fn(&'a dyn Read) -> Reading) -> Result<T>
    where
        Reading: Future<Output = Result<T, BackendError>>,
    {
        let deadline = Deadline::after(self.limit);
        match patience::read(self.retry, deadline, || call(self.read)).await {
            Some(answer) => answer.map_err(|error| lift(error, self.location)),
            None => {
                let operation = format!("reading from {}", self.location);
                Err(Error::Timeout { operation, after: deadline.limit() })
            }
        }
    }

    pub(crate) async fn get(self, keys: &[Key]) -> Result<Vec<Option<Document>>> {
        self.call(|read| read.get(keys)).await
    }

    /// The answer under an idempotency key.
    pub(crate) async fn command(self, key: &Key) -> Result<Option<Command>> {
        let found = self.get(std::slice::from_ref(key)).await?;
        found.first().and_then(Option::as_ref).map(schema::read_command).transpose()
    }

    /// All documents of a governor in an unversioned kind, ascending by name.
    pub(crate) fn all(self, governor: &Name, kind: Kind) -> All<'a> {
        let range = Range::Names { after: None };
        let scan = Scan { governor: governor.clone(), kind, range, limit: PAGE };
        All { reader: self, next: Some(scan) }
    }

    pub(crate) async fn heads(self, addresses: &[Address]) -> Result<Vec<Option<KnownHead>>> {
        let keys: Vec<Key> = addresses.iter().map(Address::head).collect();
        let found = self.get(&keys).await?;
        addresses
            .iter()
            .zip(found)
            .map(|(address, document)| document.map(|d| known(address, &d)).transpose())
            .collect()
    }

    pub(crate) async fn head(self, address: &Address) -> Result<Option<KnownHead>> {
        Ok(self.heads(std::slice::from_ref(address)).await?.pop().flatten())
    }

    /// The changes at these versions, as far as their events exist.
    pub(crate) async fn changes_at(
        self,
        address: &Address,
        versions: &[u64],
    ) -> Result<Vec<Option<Change>>> {
        let keys: Vec<Key> = versions.iter().map(|version| address.event(*version)).collect();
        let found = self.get(&keys).await?;
        found
            .into_iter()
            .map(|document| document.map(|d| schema::read_change(address, &d)).transpose())
            .collect()
    }

    /// The newest change that is not later than a time.
    pub(crate) async fn newest_until(
        self,
        address: &Address,
        time: &DateTime<Utc>,
    ) -> Result<Option<Change>> {
        let query = schema::newest_until(address, time);
        let found = self.call(|read| read.query(&query)).await?;
        let document = found.documents.into_iter().next();
        document.map(|document| schema::read_change(address, &document)).transpose()
    }

    /// A saved snapshot, and since which version history was kept when it was saved.
    pub(crate) async fn saved(
        self,
        address: &Address,
        version: u64,
    ) -> Result<Option<(Change, u64)>> {
        let found = self.get(&[address.snapshot(version)]).await?;
        let document = found.into_iter().next().flatten();
        document.map(|document| schema::read_saved(address, &document)).transpose()
    }

    /// The first changes in `from..=to`, at most `limit`.
    pub(crate) async fn changes(
        self,
        address: &Address,
        from: u64,
        to: u64,
        limit: usize,
    ) -> Result<Vec<Change>> {
        let (documents, _) = self.versions(address, Kind::Events, from, to, limit).await?;
        documents.iter().map(|document| schema::read_change(address, document)).collect()
    }

    /// The first documents of a versioned kind in `from..=to`, at most `limit`, and from which version there
    /// are more.
    pub(crate) async fn versions(
        self,
        address: &Address,
        kind: Kind,
        from: u64,
        to: u64,
        limit: usize,
    ) -> Result<(Vec<Document>, Option<u64>)> {
        let scan = Scan {
            governor: address.governor.clone(),
            kind,
            range: Range::Versions { name: address.state.clone(), from, to },
            limit,
        };
        let page = self.call(|read| read.scan(&scan)).await?;
        let next = match page.next.map(|next| next.range) {
            Some(Range::Versions { from, .. }) => Some(from),
            _ => None,
        };
        Ok((page.documents, next))
    }

    /// The heads of a governor after a name, and the name to continue after.
    pub(crate) async fn states(
        self,
        governor: &Name,
        after: Option<Name>,
        limit: usize,
    ) -> Result<(Vec<(Address, KnownHead)>, Option<Name>)> {
        let scan = Scan {
            governor: governor.clone(),
            kind: Kind::States,
            range: Range::Names { after },
            limit,
        };
        let page = self.call(|read| read.scan(&scan)).await?;
        let mut heads = Vec::with_capacity(page.documents.len());
        for document in &page.documents {
            let address = Address { governor: governor.clone(), state: document.key.name.clone() };
            let head = known(&address, document)?;
            heads.push((address, head));
        }
        let next = match page.next.map(|scan| scan.range) {
            Some(Range::Names { after }) => after,
            _ => None,
        };
        Ok((heads, next))
    }

    /// The states of a governor after one, whether or not their heads can be read.
    pub(crate) async fn state_names(
        self,
        governor: &Name,
        after: Option<&Name>,
        limit: usize,
    ) -> Result<Vec<Address>> {
        let names = self.call(|read| read.names(governor, Kind::States, after, limit)).await?;
        let address = |state| Address { governor: governor.clone(), state };
        Ok(names.into_iter().map(address).collect())
    }

    /// The heads that a query over states finds, and where to continue.
    pub(crate) async fn query(self, query: &Query) -> Result<(Vec<KnownHead>, Option<Cursor>)> {
        let subject = || format!("a query of the states of {}", query.governor);
        refuse_query(query).map_err(|error| match error {
            BackendError::Invalid(reason) => Error::refused(subject(), format!("it is {reason}")),
            error => lift(error, self.location),
        })?;
        let found = self.call(|read| read.query(query)).await?;
        let mut heads = Vec::with_capacity(found.documents.len());
        for document in &found.documents {
            let (governor, state) = (query.governor.clone(), document.key.name.clone());
            heads.push(known(&Address { governor, state }, document)?);
        }
        Ok((heads, found.next))
    }

    pub(crate) async fn governors(self, after: Option<&Name>, limit: usize) -> Result<Vec<Name>> {
        self.call(|read| read.governors(after, limit)).await
    }

    pub(crate) async fn count(self, governor: Option<&Name>, kind: Kind) -> Result<u64> {
        self.call(|read| read.count(governor, kind)).await
    }
}

/// A reading of all documents of a kind, as they stand when each page is read.
pub(crate) struct All<'a> {
    reader: Reader<'a>,
    next: Option<Scan>,
}

impl All<'_> {
    /// The next documents, perhaps none of them; `None` after the last.
    pub(crate) async fn next_page(&mut self) -> Result<Option<Vec<Document>>> {
        let Some(scan) = self.next.take() else { return Ok(None) };
        let page = self.reader.call(|read| read.scan(&scan)).await?;
        self.next = page.next;
        Ok(Some(page.documents))
    }
}

pub(crate) fn known(address: &Address, document: &Document) -> Result<KnownHead> {
    let head = Arc::new(schema::read_head(address, document)?);
    Ok(KnownHead { head, revision: document.revision })
}

/// What a backend's error means to a caller of the crate.
pub(crate) fn lift(error: BackendError, location: &str) -> Error {
    let location = location.to_owned();
    match error {
        BackendError::Conflict => {
            Error::Firestore { message: "a precondition did not hold".into(), source: None }
        }
        BackendError::Unavailable(message) | BackendError::Indeterminate(message) => {
            Error::Firestore { message, source: None }
        }
        BackendError::Throttled(message) => Error::Firestore { message, source: None },
        BackendError::NoDatabase(reason) => Error::NotAStore { location, reason },
        BackendError::NeedsIndex(reason) => Error::MissingIndex { location, reason },
        BackendError::Replaced { expected, found } => {
            Error::StoreReplaced { location, expected, found }
        }
        BackendError::Denied(reason) => Error::PermissionDenied { location, reason },
        BackendError::Invalid(reason) => Error::InvalidState { subject: location, reason },
        BackendError::TooLarge { what, size, limit } => Error::TooLarge { what, size, limit },
        BackendError::Corrupt { location, reason } => Error::Corrupt { location, reason },
        BackendError::Full => Error::StorageFull { location },
        BackendError::Failed(reason) => Error::Storage { location, reason },
        BackendError::Moved(to) => Error::Moved { location, to },
    }
}
