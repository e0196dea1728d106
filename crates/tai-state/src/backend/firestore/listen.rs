//! The alarm: a task that listens for changes and rings.
//!
//! Firestore tells what the documents of a target are, not what became of them: changes may come
//! together, and the emulator tells everything again after each. So the task remembers the revision of
//! each document and rings for those that differ. When the stream breaks it opens another and rings for
//! anything, since nobody knows what was missed.

use std::collections::{BTreeSet, HashMap};
use std::mem;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use googleapis_tonic_google_firestore_v1::google::firestore::v1 as proto;
use proto::listen_request::TargetChange as Ask;
use proto::listen_response::ResponseType;
use proto::target::{DocumentsTarget, QueryTarget, TargetType, query_target::QueryType};
use proto::target_change::TargetChangeType;
use proto::{ListenRequest, ListenResponse, Target};
use tokio::sync::{Notify, mpsc, oneshot};
use tokio::task::AbortHandle;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status, Streaming};

use super::channel::{Lent, Line, Unusable};
use super::place::Place;
use super::query;
use super::read::{failed, revision};
use super::status::Call;
use crate::backend::{Alarm, BackendError, Key, Kind, Name, Revision, Rung};

/// How long a stream may stay open by the headers that it is asked with: the service's own limit.
const STREAM_LIMIT: Duration = Duration::from_secs(24 * 60 * 60);
/// How long the first picture may take.
const FIRST_PICTURE: Duration = Duration::from_secs(30);
/// Waits between attempts to open a stream again.
const SHORTEST_WAIT: Duration = Duration::from_millis(50);
const LONGEST_WAIT: Duration = Duration::from_secs(5);
const TARGET: i32 = 1;

/// What is listened to.
#[derive(Debug, Clone)]
pub(super) struct Scope {
    pub(super) governor: Name,
    pub(super) kind: Kind,
    pub(super) name: Option<Name>,
}

/// Rings that nobody has taken yet.
#[derive(Debug, Default)]
struct Bell {
    waiting: Mutex<Waiting>,
    rung: Notify,
}

#[derive(Debug, Default)]
struct Waiting {
    names: BTreeSet<Name>,
    anything: bool,
    broken: Option<BackendError>,
    /// Whether nobody listens any more.
    is_over: bool,
}

/// Tells the holder of the alarm that the task is over, however it ends.
struct Over(Arc<Bell>);

impl Drop for Over {
    fn drop(&mut self) {
        self.0.ring(|waiting| waiting.is_over = true);
    }
}

impl Bell {
    fn ring(&self, change: impl FnOnce(&mut Waiting)) {
        change(&mut self.waiting.lock().unwrap_or_else(PoisonError::into_inner));
        self.rung.notify_one();
    }

    fn take(&self) -> Option<Result<Rung, BackendError>> {
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(error) = waiting.broken.take() {
            return Some(Err(error));
        }
        if mem::take(&mut waiting.anything) {
            waiting.names.clear();
            return Some(Ok(Rung::Anything));
        }
        let names = mem::take(&mut waiting.names);
        if names.is_empty() && waiting.is_over {
            return Some(Err(BackendError::Failed("nobody listens any more".into())));
        }
        (!names.is_empty()).then_some(Ok(Rung::Names(names)))
    }
}

/// An alarm with the task behind it.
#[derive(Debug)]
pub(super) struct Listener {
    bell: Arc<Bell>,
    task: AbortHandle,
}

impl Drop for Listener {
    fn drop(&mut self) {
        self.task.abort();
    }
}

#[async_trait]
impl Alarm for Listener {
    async fn ring(&mut self) -> Result<Rung, BackendError> {
        loop {
            if let Some(rung) = self.bell.take() {
                return rung;
            }
            self.bell.rung.notified().await;
        }
    }
}

/// Opens an alarm; returns when everything that changes from now on will ring.
pub(super) async fn listen(line: &Arc<Line>, scope: Scope) -> Result<Listener, BackendError> {
    if scope.kind.is_versioned() {
        return Err(BackendError::Invalid(format!(
            "an alarm for {}: only kinds without versions have one",
            scope.kind.as_str()
        )));
    }
    let bell = Arc::new(Bell::default());
    let (ready, first) = oneshot::channel();
    let task = tokio::spawn(run(Arc::clone(line), scope, Arc::clone(&bell), ready)).abort_handle();
    let listener = Listener { bell, task };
    match tokio::time::timeout(FIRST_PICTURE, first).await {
        Ok(Ok(Ok(()))) => Ok(listener),
        Ok(Ok(Err(error))) => Err(error),
        Ok(Err(_)) => Err(BackendError::Failed("listening ended before it began".into())),
        Err(_) => Err(BackendError::Unavailable("listening did not begin in time".into())),
    }
}

type Ready = oneshot::Sender<Result<(), BackendError>>;

async fn run(line: Arc<Line>, scope: Scope, bell: Arc<Bell>, ready: Ready) {
    let _over = Over(Arc::clone(&bell));
    let mut picture = Picture::default();
    let mut ready = Some(ready);
    let mut wait = SHORTEST_WAIT;
    loop {
        let ended = follow(&line, &scope, &bell, &mut picture, &mut ready, &mut wait).await;
        let error = failed(Call::Query)(ended);
        if let Some(ready) = ready.take() {
            let _ = ready.send(Err(error));
            return;
        }
        if !matches!(
            error,
            BackendError::Unavailable(_)
                | BackendError::Throttled(_)
                | BackendError::Indeterminate(_)
        ) {
            bell.ring(|waiting| waiting.broken = Some(error));
            return;
        }
        tracing::debug!(%error, "the stream of changes broke, opening another");
        if matches!(error, BackendError::Throttled(_)) {
            wait = LONGEST_WAIT;
        }
        tokio::time::sleep(crate::clock::jitter(wait)).await;
        wait = (wait * 2).min(LONGEST_WAIT);
    }
}

/// What the target's documents were at the last complete picture.
#[derive(Debug, Default)]
pub(super) struct Picture {
    known: HashMap<Name, Revision>,
    seen: HashMap<Name, Revision>,
    is_complete: bool,
    /// Whether `seen` is a new picture from scratch.
    is_reset: bool,
}

impl Picture {
    /// What comes now is told from scratch.
    pub(super) fn begin(&mut self) {
        self.seen.clear();
        self.is_reset = true;
        self.is_complete = false;
    }

    /// How many documents there are by what was told.
    fn count(&self) -> usize {
        let seen = self.seen.values().filter(|revision| **revision != GONE).count();
        if self.is_reset {
            return seen;
        }
        let known = self.known.iter();
        seen + known.filter(|(name, it)| **it != GONE && !self.seen.contains_key(*name)).count()
    }

    /// Takes over what was seen, and says which documents are not as they were.
    pub(super) fn settle(&mut self) -> BTreeSet<Name> {
        let mut changed = BTreeSet::new();
        for (name, revision) in &self.seen {
            if self.known.get(name) != Some(revision) {
                changed.insert(name.clone());
            }
        }
        if mem::take(&mut self.is_reset) {
            changed.extend(self.known.keys().filter(|it| !self.seen.contains_key(*it)).cloned());
            self.known.clear();
        }
        self.known.extend(self.seen.drain());
        changed
    }
}

/// Follows one stream until it ends.
async fn follow(
    line: &Arc<Line>,
    scope: &Scope,
    bell: &Bell,
    picture: &mut Picture,
    ready: &mut Option<Ready>,
    wait: &mut Duration,
) -> Unusable {
    // A stream that is opened and never says what there is would keep its holder waiting for ever.
    let first = tokio::time::sleep(line.limit());
    tokio::pin!(first);
    let lent = match line.lend().await {
        Ok(lent) => lent,
        Err(failure) => return failure,
    };
    let ended = |status| line.stream_ended(&lent, status);
    let silent = || Status::deadline_exceeded("the stream does not say what there is");
    let opened = tokio::select! {
        opened = open(line, &lent, scope) => opened,
        () = &mut first => Err(silent()),
    };
    let (_asking, mut stream) = match opened {
        Ok(opened) => opened,
        Err(status) => return ended(status),
    };
    picture.begin();
    let mut is_current = false;
    loop {
        let answer = tokio::select! {
            answer = stream.message() => answer,
            () = &mut first, if !is_current => Err(silent()),
        };
        let answer = match answer {
            Ok(Some(answer)) => answer,
            Ok(None) => return ended(Status::unavailable("the stream ended")),
            Err(status) => return ended(status),
        };
        match take(line.place(), scope, answer, picture) {
            Err(status) => return ended(status),
            Ok(false) => {}
            Ok(true) => {
                let changed = picture.settle();
                *wait = SHORTEST_WAIT;
                if let Some(ready) = ready.take() {
                    let _ = ready.send(Ok(()));
                } else if !is_current {
                    // The first picture after a gap.
                    bell.ring(|waiting| waiting.anything = true);
                } else if !changed.is_empty() {
                    bell.ring(|waiting| waiting.names.extend(changed));
                }
                is_current = true;
            }
        }
    }
}

/// The side that asks (to close it would end the stream), and the side that answers.
type Opened = (mpsc::Sender<ListenRequest>, Streaming<ListenResponse>);

async fn open(line: &Arc<Line>, lent: &Lent, scope: &Scope) -> Result<Opened, Status> {
    let place = line.place();
    let target_type = match &scope.name {
        Some(name) => {
            let key = Key {
                governor: scope.governor.clone(),
                kind: scope.kind,
                name: name.clone(),
                version: 0,
            };
            TargetType::Documents(DocumentsTarget { documents: vec![place.document(&key)] })
        }
        None => TargetType::Query(QueryTarget {
            parent: place.governor(&scope.governor),
            query_type: Some(QueryType::StructuredQuery(query::all(place, scope.kind))),
        }),
    };
    let target = Target { target_id: TARGET, target_type: Some(target_type), ..Target::default() };
    let ask = ListenRequest {
        database: place.database().to_owned(),
        target_change: Some(Ask::AddTarget(target)),
        ..ListenRequest::default()
    };
    let (asking, asked) = mpsc::channel(1);
    // The channel is empty and has room for one.
    let _ = asking.try_send(ask);
    let request = line.request(ReceiverStream::new(asked), STREAM_LIMIT).await;
    let request = request.map_err(|failure| failure.status)?;
    Ok((asking, lent.client().listen(request).await?.into_inner()))
}

/// Takes one answer in; `true` when the picture is complete.
pub(super) fn take(
    place: &Place,
    scope: &Scope,
    answer: ListenResponse,
    picture: &mut Picture,
) -> Result<bool, Status> {
    let name = |resource: &str| {
        let key = place.key(resource)?;
        (key.governor == scope.governor && key.kind == scope.kind).then_some(key.name)
    };
    match answer.response_type {
        Some(ResponseType::TargetChange(change)) => {
            match TargetChangeType::try_from(change.target_change_type) {
                Ok(TargetChangeType::Remove) => {
                    let cause = change.cause.unwrap_or_default();
                    return Err(Status::new(Code::from_i32(cause.code), cause.message));
                }
                Ok(TargetChangeType::Reset) => {
                    picture.begin();
                }
                Ok(TargetChangeType::Current) => picture.is_complete = true,
                // With a time and for all targets: what was told so far belongs together.
                Ok(TargetChangeType::NoChange) => {
                    return Ok(picture.is_complete && change.read_time.is_some());
                }
                _ => {}
            }
        }
        Some(ResponseType::DocumentChange(change)) => {
            if let Some(document) = change.document
                && let Some(name) = name(&document.name)
            {
                let revision = revision(document.update_time.as_ref());
                picture.seen.insert(name, revision.unwrap_or_else(|| Revision::new(0)));
            }
        }
        Some(ResponseType::DocumentDelete(gone)) => {
            picture.seen.extend(name(&gone.document).map(|name| (name, GONE)));
        }
        Some(ResponseType::DocumentRemove(gone)) => {
            picture.seen.extend(name(&gone.document).map(|name| (name, GONE)));
        }
        // How many documents there are: when that is not what was told, something was missed, and only
        // a new stream says what.
        Some(ResponseType::Filter(filter))
            if usize::try_from(filter.count).ok() != Some(picture.count()) =>
        {
            return Err(Status::unavailable("the stream has lost documents"));
        }
        Some(ResponseType::Filter(_)) | None => {}
    }
    Ok(false)
}

/// The revision of a document that is not there: no document has it.
const GONE: Revision = Revision::new(0);
