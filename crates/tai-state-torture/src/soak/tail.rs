//! A reader that follows a governor from before the first event on: it sees each once and in order, and
//! what it sees is what the writers were told.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use serde_json::Value;
use tai_state::{Event, GovernorFeed, ListOptions, StateStore};

use super::Shared;

/// How long it may take to see what was written last.
const PATIENCE: Duration = Duration::from_secs(60);

/// What was seen of each state: the last version and its data.
#[derive(Debug, Clone, Default)]
pub(super) struct Seen {
    pub(super) states: HashMap<String, (u64, Value)>,
    pub(super) events: u64,
}

/// A change as a writer or the reader knows it: the element that was appended, or none.
type Element = Option<u64>;

/// What the writers were told and the reader has not seen yet, and the other way round.
#[derive(Debug, Default)]
pub(super) struct Matching {
    told: HashMap<(String, u64), Element>,
    seen: HashMap<(String, u64), Element>,
    pub(super) matched: u64,
}

impl Matching {
    /// A writer was told that this version is its element.
    pub(super) fn told(&mut self, state: &str, version: u64, element: Element) -> Option<String> {
        self.met(state, version, element, true)
    }

    fn seen(&mut self, state: &str, version: u64, element: Element) -> Option<String> {
        self.met(state, version, element, false)
    }

    fn met(&mut self, state: &str, version: u64, is: Element, is_told: bool) -> Option<String> {
        let (mine, other) = match is_told {
            true => (&mut self.told, &mut self.seen),
            false => (&mut self.seen, &mut self.told),
        };
        let key = (state.to_owned(), version);
        let Some(met) = other.remove(&key) else {
            return mine
                .insert(key, is)
                .map(|twice| format!("{state} v{version} is {is:?} and {twice:?}"));
        };
        self.matched += 1;
        (met != is).then(|| format!("{state} v{version} is {is:?} to one and {met:?} to another"))
    }

    /// What writers were told and nobody has seen.
    pub(super) fn unseen(&self) -> usize {
        self.told.len()
    }

    /// What was seen and no writer was told: what became of it was unknown to him.
    pub(super) fn untold(&self) -> usize {
        self.seen.len()
    }
}

impl Seen {
    /// Takes in one event, and says what is wrong with it.
    pub(super) fn event(&mut self, state: &str, version: u64, data: &Value) -> Option<String> {
        self.events += 1;
        let last = self.states.entry(state.to_owned()).or_default();
        let fault = if version != last.0 + 1 {
            Some(format!("{state} v{version} was seen after v{}", last.0))
        } else {
            not_appended(&last.1, data).then(|| format!("{state} v{version}: no append: {data}"))
        };
        *last = (version, data.clone());
        fault
    }
}

/// Whether these are lists of which the later is not the earlier with one more, or empty.
fn not_appended(before: &Value, after: &Value) -> bool {
    let Some(after) = after.as_array() else { return false };
    let none = Vec::new();
    let before = before.as_array().unwrap_or(&none);
    !after.is_empty() && after.split_last().is_none_or(|(_, rest)| rest != before)
}

fn element(event: &Event) -> Element {
    event.to_state.data.as_array().and_then(|list| list.last()?.as_u64())
}

/// Follows it until everything is over and everything was seen.
pub(super) async fn followed(
    store: StateStore,
    governor: &'static str,
    mut feed: GovernorFeed,
    shared: &Shared,
) -> Seen {
    let mut seen = Seen::default();
    let mut until = None;
    loop {
        let looked = tokio::time::timeout(Duration::from_millis(200), feed.next()).await;
        match looked {
            Ok(Ok(event)) => {
                let (state, version) = (event.to_state.id.as_str(), event.version());
                let mut faults = vec![seen.event(state, version, &event.to_state.data)];
                if event.to_state.data.is_array() {
                    let mut matching = shared.matching.lock().unwrap();
                    faults.push(matching.seen(state, version, element(&event)));
                }
                faults.into_iter().flatten().for_each(|fault| shared.wrong(fault));
                continue;
            }
            Ok(Err(error)) if error.is_transient() => {}
            Ok(Err(error)) => {
                shared.wrong(format!("the tail of {governor}: {error}"));
                return seen;
            }
            Err(_) => {}
        }
        if shared.is_written() {
            let until = *until.get_or_insert_with(|| Instant::now() + PATIENCE);
            match behind(&store, governor, &seen).await {
                None => return seen,
                Some(what) if Instant::now() > until => {
                    shared.wrong(format!("the tail of {governor} never saw {what}"));
                    return seen;
                }
                Some(_) => {}
            }
        }
    }
}

/// What the heads say that was not seen, if there is any.
async fn behind(store: &StateStore, governor: &str, seen: &Seen) -> Option<String> {
    let options = ListOptions::default().limit(1_000);
    let Ok(listed) = store.list_states(governor, &options).await else {
        return Some("the heads, which could not be read".to_owned());
    };
    listed.states.iter().find_map(|head| {
        let state = head.snapshot.id.as_str();
        let last = seen.states.get(state).cloned().unwrap_or_default();
        let is = (head.snapshot.version, head.snapshot.data.clone());
        (last != is).then(|| format!("{state} v{}: at v{}", is.0, last.0))
    })
}

/// Copies of what was seen in which an event is missing, comes twice, or is another; how many of them are
/// noticed.
pub(super) fn teeth(seen: &Seen) -> (u64, u64) {
    let Some((state, (version, data))) = seen
        .states
        .iter()
        .find(|(_, (_, data))| data.is_array())
        .map(|(s, v)| (s.clone(), v.clone()))
    else {
        return (0, 3);
    };
    let longer = |extra: &[u64]| {
        let mut list = data.as_array().cloned().unwrap_or_default();
        list.extend(extra.iter().map(|element| Value::from(*element)));
        Value::Array(list)
    };
    let caught =
        [(version + 2, longer(&[1])), (version, longer(&[])), (version + 1, longer(&[1, 2]))]
            .into_iter()
            .filter(|(version, data)| seen.clone().event(&state, *version, data).is_some());
    (caught.count() as u64, 3)
}
