//! The alarm of an engine that hears of its own commits: every commit is told to all who listen.

use std::collections::BTreeSet;
use std::sync::Arc;

use async_trait::async_trait;
use tokio::sync::broadcast::{self, error::RecvError, error::TryRecvError};

use super::{Alarm, BackendError, Key, Kind, Name, Operation, Rung, Write};

/// Commits that are kept for a slow listener; who is further behind is told "anything".
const KEPT: usize = 256;

/// What was changed; `None` for anything.
type Told = Option<Arc<[Key]>>;

/// Tells listeners of commits.
#[derive(Debug, Clone)]
pub(crate) struct Bell(broadcast::Sender<Told>);

impl Bell {
    pub(crate) fn new() -> Self {
        Self(broadcast::Sender::new(KEPT))
    }

    /// Whether anybody listens. Ask after the commit can be seen: who comes later sees it anyway.
    #[cfg(feature = "embedded")]
    pub(crate) fn has_listeners(&self) -> bool {
        self.0.receiver_count() > 0
    }

    /// These documents were changed, and everybody can see it.
    pub(crate) fn changed(&self, keys: Vec<Key>) {
        if !keys.is_empty() {
            // Nobody listens any more: that is no error.
            let _ = self.0.send(Some(keys.into()));
        }
    }

    /// Something was changed.
    #[cfg(feature = "embedded")]
    pub(crate) fn anything(&self) {
        let _ = self.0.send(None);
    }

    /// Listens from now on.
    pub(crate) fn listen(
        &self,
        governor: &Name,
        kind: Kind,
        name: Option<&Name>,
    ) -> Result<Listener, BackendError> {
        if kind.is_versioned() {
            let what = kind.as_str();
            return Err(BackendError::Invalid(format!("{what} have versions: watch their states")));
        }
        let (governor, name) = (governor.clone(), name.cloned());
        Ok(Listener { heard: self.0.subscribe(), governor, kind, name })
    }
}

/// The documents of unversioned kinds that these writes change.
pub(crate) fn changes(writes: &[Write]) -> impl Iterator<Item = Key> {
    let changed =
        |write: &&Write| write.operation != Operation::Check && !write.key.kind.is_versioned();
    writes.iter().filter(changed).map(|write| write.key.clone())
}

/// Hears of the commits to certain documents.
#[derive(Debug)]
pub(crate) struct Listener {
    heard: broadcast::Receiver<Told>,
    governor: Name,
    kind: Kind,
    name: Option<Name>,
}

impl Listener {
    /// What it means for this listener; `None` when it is about others.
    fn mine(&self, told: &Told) -> Option<Rung> {
        let Some(keys) = told else { return Some(Rung::Anything) };
        let mine = |key: &&Key| {
            key.governor == self.governor
                && key.kind == self.kind
                && self.name.as_ref().is_none_or(|name| key.name == *name)
        };
        let names: BTreeSet<Name> = keys.iter().filter(mine).map(|key| key.name.clone()).collect();
        (!names.is_empty()).then_some(Rung::Names(names))
    }
}

#[async_trait]
impl Alarm for Listener {
    async fn ring(&mut self) -> Result<Rung, BackendError> {
        let mut rung = loop {
            match self.heard.recv().await {
                Ok(told) => {
                    if let Some(rung) = self.mine(&told) {
                        break rung;
                    }
                }
                Err(RecvError::Lagged(_)) => {
                    // Whoever looks at everything needs nothing of what was told until now.
                    self.heard = self.heard.resubscribe();
                    return Ok(Rung::Anything);
                }
                Err(RecvError::Closed) => {
                    return Err(BackendError::Failed("the store was closed".into()));
                }
            }
        };
        // From here on nothing waits, so nothing that was taken can be lost.
        loop {
            let more = match self.heard.try_recv() {
                Ok(told) => self.mine(&told),
                Err(TryRecvError::Lagged(_)) => Some(Rung::Anything),
                Err(TryRecvError::Empty | TryRecvError::Closed) => return Ok(rung),
            };
            rung = match (rung, more) {
                (rung, None) => rung,
                (Rung::Names(mut names), Some(Rung::Names(more))) => {
                    names.extend(more);
                    Rung::Names(names)
                }
                _ => Rung::Anything,
            };
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    async fn ring(listener: &mut Listener) -> Result<Rung, BackendError> {
        tokio::time::timeout(Duration::from_secs(1), listener.ring()).await.unwrap()
    }

    fn key(id: &str) -> Key {
        let name = |id| Name::escape(id, "id").unwrap();
        Key { governor: name("g"), kind: Kind::States, name: name(id), version: 0 }
    }

    /// Whoever is too far behind looks at everything, and hears of what comes then.
    #[tokio::test(start_paused = true)]
    async fn who_falls_behind_is_told_anything() {
        let bell = Bell::new();
        let a = key("a");
        let mut listener = bell.listen(&a.governor, a.kind, Some(&a.name)).unwrap();
        bell.changed(vec![a.clone()]);
        for _ in 0..KEPT {
            bell.changed(vec![key("b")]);
        }
        assert_eq!(ring(&mut listener).await.unwrap(), Rung::Anything);
        bell.changed(vec![key("b"), a.clone()]);
        assert_eq!(
            ring(&mut listener).await.unwrap(),
            Rung::Names(BTreeSet::from([a.name.clone()]))
        );
        drop(bell);
        assert!(matches!(ring(&mut listener).await, Err(BackendError::Failed(_))));
    }

    #[tokio::test(start_paused = true)]
    async fn rings_are_told_together() {
        let bell = Bell::new();
        let a = key("a");
        let mut listener = bell.listen(&a.governor, a.kind, None).unwrap();
        bell.changed(vec![a.clone()]);
        bell.changed(vec![key("b"), key("c")]);
        let names = ["a", "b", "c"].map(|id| key(id).name);
        assert_eq!(ring(&mut listener).await.unwrap(), Rung::Names(BTreeSet::from(names)));
    }
}
