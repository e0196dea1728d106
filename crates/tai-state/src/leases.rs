//! Reads and writes the documents of locks, with the moment by the backend's own clock.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use crate::backend::{BackendError, Key, Kind, Moment, Name, Precondition, Revision, Write};
use crate::clock::Stopwatch;
use crate::error::{Error, Result};
use crate::grant::Grant;
use crate::lease::{Lease, Standing};
use crate::lines::Lines;
use crate::patience::{self, Deadline, Tries};
use crate::reader::{Watch, lift};
use crate::records::Records;
use crate::schema;

/// A lock as it was read.
#[derive(Debug, Clone)]
pub(crate) struct FoundLease {
    pub(crate) lease: Lease,
    pub(crate) revision: Revision,
}

/// What became of writing locks.
#[derive(Debug)]
pub(crate) enum Put {
    /// Written; the revisions that they have now.
    Done(Vec<Revision>),
    /// Not now; an earlier sending of the same may have been.
    Refused,
    /// Nobody knows, and it may still be on its way.
    Unclear,
}

impl Put {
    pub(crate) fn is_done(&self) -> bool {
        matches!(self, Self::Done(_))
    }
}

/// What a handle knows of locks.
#[derive(Default)]
pub(crate) struct Locks {
    /// Who waits for a lock through this store stands in line.
    pub(crate) lines: Arc<Lines>,
    /// Grants through this store, by their lock tokens.
    grants: Mutex<HashMap<String, Weak<Grant>>>,
    /// Since when a lock whose clock cannot be compared has been seen unchanged.
    watched: Mutex<HashMap<Key, (Revision, Stopwatch)>>,
}

impl Locks {
    pub(crate) fn keep(&self, lock_token: &str, grant: &Arc<Grant>) {
        let mut grants = self.grants.lock().unwrap_or_else(PoisonError::into_inner);
        grants.retain(|_, grant| grant.strong_count() > 0);
        grants.insert(lock_token.to_owned(), Arc::downgrade(grant));
    }

    pub(crate) fn grant(&self, lock_token: &str) -> Option<Arc<Grant>> {
        let grants = self.grants.lock().unwrap_or_else(PoisonError::into_inner);
        grants.get(lock_token).and_then(Weak::upgrade)
    }

    /// How a lock stands, when it was found at this moment. One whose clock cannot be compared is
    /// judged by watching: it is free when it was seen unchanged for the whole of its lease.
    pub(crate) fn standing(&self, key: &Key, found: &FoundLease, now: &Moment) -> Standing {
        let mut watched = self.watched.lock().unwrap_or_else(PoisonError::into_inner);
        match found.lease.standing(now) {
            Standing::Watch(lease) => {
                let fresh = (found.revision, Stopwatch::start());
                let since = watched.entry(key.clone()).or_insert(fresh);
                if since.0 != found.revision {
                    *since = fresh;
                }
                match lease.saturating_sub(since.1.elapsed()) {
                    Duration::ZERO => Standing::Free,
                    left => Standing::Watch(left),
                }
            }
            standing => {
                watched.remove(key);
                standing
            }
        }
    }
}

impl Records {
    /// The tries of one call that writes locks.
    pub(crate) fn tries(&self, deadline: Deadline) -> Tries<'_> {
        Tries::new(&self.options.retry, deadline)
    }

    /// The locks at these keys, and when that was.
    pub(crate) async fn look_at_leases(
        &self,
        keys: &[Key],
        deadline: Deadline,
    ) -> Result<(Vec<Option<FoundLease>>, Moment)> {
        let look = || self.backend.get_at(keys);
        let found = patience::read(&self.options.retry, deadline, look).await;
        let (documents, moment) = self.answered(found, "looking at locks", deadline)?;
        let mut leases = Vec::with_capacity(documents.len());
        for document in documents {
            leases.push(match document {
                Some(document) => Some(FoundLease {
                    lease: schema::read_lease(&document)?,
                    revision: document.revision,
                }),
                None => None,
            });
        }
        Ok((leases, moment))
    }

    /// Writes locks, each over the one that was found. Whatever is not done asks for a look; the caller's
    /// tries are those of the whole call, so that looking and writing again do not multiply them.
    pub(crate) async fn put_leases(
        &self,
        leases: &[(&Key, Lease, Option<Revision>)],
        tries: &mut Tries<'_>,
    ) -> Result<Put> {
        let mut writes = Vec::with_capacity(leases.len());
        for (key, lease, over) in leases {
            let guard = over.map_or(Precondition::Absent, Precondition::Revision);
            let body = schema::lease_body(&key.name.id(), lease)?;
            writes.push(Write::put((*key).clone(), body, guard));
        }
        loop {
            let error = match tries.once(self.backend.commit(writes.clone())).await {
                Some(Ok(committed)) => {
                    let revisions: Option<Vec<Revision>> =
                        committed.revisions.into_iter().collect();
                    return Ok(revisions.map_or(Put::Unclear, Put::Done));
                }
                Some(Err(BackendError::Conflict)) => return Ok(Put::Refused),
                None | Some(Err(BackendError::Indeterminate(_))) => return Ok(Put::Unclear),
                Some(Err(error)) => error,
            };
            let was_asked_to_wait = matches!(error, BackendError::Throttled(_));
            let may_help = was_asked_to_wait || matches!(error, BackendError::Unavailable(_));
            if !may_help || !tries.again(was_asked_to_wait).await {
                return Err(lift(error, &self.location));
            }
        }
    }

    /// All locks of a governor, ascending by name, and when that was.
    pub(crate) async fn all_leases(
        &self,
        governor: &Name,
    ) -> Result<(Vec<(Key, FoundLease)>, Moment)> {
        let (_, moment) = self.look_at_leases(&[], self.deadline()).await?;
        let mut all = Vec::new();
        let mut pages = self.reader().all(governor, Kind::Locks);
        while let Some(documents) = pages.next_page().await? {
            for document in documents {
                let lease = schema::read_lease(&document)?;
                all.push((document.key, FoundLease { lease, revision: document.revision }));
            }
        }
        Ok((all, moment))
    }

    /// An alarm for one lock.
    pub(crate) async fn watch_lock(&self, key: &Key, deadline: Deadline) -> Result<Watch> {
        let watch = || self.backend.watch(&key.governor, key.kind, Some(&key.name));
        let opened = patience::read(&self.options.retry, deadline, watch).await;
        let alarm = self.answered(opened, "watching a lock", deadline)?;
        Ok(Watch { alarm, location: self.location.clone() })
    }

    fn answered<T>(
        &self,
        answer: Option<Result<T, BackendError>>,
        operation: &str,
        deadline: Deadline,
    ) -> Result<T> {
        match answer {
            Some(answer) => answer.map_err(|error| lift(error, &self.location)),
            None => {
                let operation = format!("{operation} in {}", self.location);
                Err(Error::Timeout { operation, after: deadline.limit() })
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::Name;

    /// A lock of a clock that cannot be compared is free when it was seen unchanged for its whole lease,
    /// and is watched anew when it has changed.
    #[test]
    fn what_cannot_be_compared_is_watched() {
        let name = Name::escape("r", "id").unwrap();
        let key = Key { governor: name.clone(), kind: Kind::Locks, name, version: 0 };
        let moment = |epoch: &str| Moment { epoch: epoch.into(), micros: 0 };
        let wall = chrono::DateTime::UNIX_EPOCH;
        let lease = Duration::from_millis(60);
        let wanted = crate::lease::Wanted { client_id: "a".into(), lock_token: "t".into(), lease };
        let now = crate::lease::Now { moment: moment("before"), wall };
        let lease_of = Lease::grant(None, &wanted, &now).unwrap();
        let seen = |n| FoundLease { lease: lease_of.clone(), revision: Revision::new(n) };
        let locks = Locks::default();
        let standing = |n, epoch| locks.standing(&key, &seen(n), &moment(epoch));

        let mut left = lease;
        loop {
            match standing(1, "after") {
                Standing::Watch(now) if now <= left => left = now,
                Standing::Free => break,
                other => panic!("{other:?}"),
            }
        }
        assert!(matches!(standing(2, "after"), Standing::Watch(_)), "it was renewed");
        // Seen by its own clock, it is judged by that, and what was watched is forgotten.
        assert_eq!(standing(2, "before"), Standing::Held(lease));
        assert!(locks.watched.lock().unwrap().is_empty());
    }
}
