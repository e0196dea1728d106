//! Asks a store everything and compares each answer with the truth.

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::path::Path;

use serde_json::Value;
use tai_state::{Error, GovernorId, ListOptions, StateStore, StoreOptions};

use crate::run::Tally;

pub(crate) const GOVERNORS: [&str; 3] = ["a", "c", "governor/b"];

/// What each state was at each version; `null` when it was deleted.
pub(crate) type Truth = BTreeMap<(String, String), Vec<Value>>;

/// Takes the answers. An answer is right, or it says that there is damage.
struct Answers<'a> {
    what: &'a str,
    tally: &'a mut Tally,
    noticed: bool,
}

impl Answers<'_> {
    fn take<T: PartialEq + Debug>(&mut self, answer: Result<T, Error>, right: &T, asked: &str) {
        self.tally.count("questions asked", 1);
        match answer {
            Ok(found) if found == *right => {}
            Ok(found) => {
                self.tally.broken(format!("{}: WRONG ANSWER: {asked}: {found:?}", self.what));
            }
            Err(Error::Corrupt { .. }) => self.noticed = true,
            Err(error) => {
                let code = error.code();
                self.tally.broken(format!("{}: {asked}: {error} ({code})", self.what));
            }
        }
    }
}

/// Asks everything. Returns whether any damage was reported.
pub(crate) async fn asked(
    path: &Path,
    truth: &Truth,
    hashes: &[String],
    what: &str,
    tally: &mut Tally,
) -> bool {
    let mut options = StoreOptions::default();
    options.create = false;
    let store = match StateStore::open_with(path, options).await {
        Ok(store) => store,
        Err(Error::Corrupt { .. } | Error::NotAStore { .. }) => return true,
        Err(error) => {
            tally.broken(format!("{what}: opening: {error} ({})", error.code()));
            return false;
        }
    };
    let mut answers = Answers { what, tally, noticed: false };
    for ((governor, id), versions) in truth {
        of_a_state(&store, governor, id, versions, &mut answers).await;
    }
    for governor in GOVERNORS {
        let right: Vec<(String, u64)> = truth
            .iter()
            .filter(|((of, _), _)| of == governor)
            .map(|((_, id), versions)| (id.clone(), versions.len() as u64))
            .collect();
        let found = listed(&store, governor).await;
        answers.take(found, &right, &format!("the states of {governor}"));
        let absent = match store.get_state(governor, "machine-0011x").await {
            Err(Error::StateNotFound { .. }) => Ok(false),
            other => other.map(|_| true),
        };
        answers.take(absent, &false, "whether there is what there is not");
    }
    let named = |all: Vec<GovernorId>| -> Vec<String> {
        all.iter().map(ToString::to_string).filter(|id| id != "z").collect()
    };
    let governors = store.list_governors(None, 10).await.map(named);
    answers.take(governors, &GOVERNORS.map(String::from).to_vec(), "the governors");
    match store.verify(|_| {}).await {
        Ok(report) if report.ok => {
            let found = report.content_hash.to_string();
            let noticed = answers.noticed;
            let tally = answers.tally;
            tally.holds(hashes.contains(&found), || format!("{what}: verify says ok and is wrong"));
            tally.holds(!noticed, || format!("{what}: verify says ok, but reading met damage"));
            noticed
        }
        Ok(_) | Err(Error::Corrupt { .. }) => true,
        Err(error) => {
            answers.tally.broken(format!("{what}: verify: {error}"));
            false
        }
    }
}

async fn of_a_state(
    store: &StateStore,
    governor: &str,
    id: &str,
    versions: &[Value],
    answers: &mut Answers<'_>,
) {
    let newest = (versions.last().unwrap().clone(), versions.len() as u64);
    let got = match store.get_state(governor, id).await {
        Err(Error::StateNotFound { .. }) if newest.0.is_null() => Ok(newest.clone()),
        got => got.map(|(state, version)| (state.data, version)),
    };
    answers.take(got, &newest, &format!("{governor}/{id}"));
    let first = store.state_at_version(governor, id, 1).await.map(|state| state.data);
    answers.take(first, &versions[0], &format!("{governor}/{id} at v1"));
    let history = async {
        let mut history = store.history(governor, id, ..).await?;
        let mut all = Vec::new();
        loop {
            let page = history.next_page().await?;
            if page.is_empty() {
                return Ok(all);
            }
            all.extend(page.into_iter().map(|event| event.to_state.data));
        }
    };
    answers.take(history.await, &versions.to_vec(), &format!("the history of {governor}/{id}"));
}

async fn listed(store: &StateStore, governor: &str) -> Result<Vec<(String, u64)>, Error> {
    let mut options = ListOptions::default().limit(7).with_deleted();
    let mut all = Vec::new();
    loop {
        let page = store.list_states(governor, &options).await?;
        let states = page.states.into_iter();
        all.extend(states.map(|r| (r.snapshot.id.to_string(), r.snapshot.version)));
        match page.next {
            Some(next) => options = options.after(next),
            None => return Ok(all),
        }
    }
}
