//! What was true while the binary was recorded, what its user was told, and the verdict on a store.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::record::STORE;
use crate::found::{self, Found};

/// A version of a state, `governor/state`.
type Version = (String, u64);

/// What a line of output told the user.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Told {
    /// The store was made.
    Made,
    /// These versions are durable, and were made together.
    Wrote(Vec<Version>),
    /// This state's past is gone.
    Purged(String),
}

/// All that could be found at any moment of the recording.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(super) struct Truth {
    /// The states that each transaction writes.
    pub(super) writes: BTreeMap<String, Vec<String>>,
    /// What the log says of each version of each state.
    lines: BTreeMap<String, BTreeMap<u64, BTreeSet<String>>>,
    /// The first version of each state that is kept at last.
    first: BTreeMap<String, u64>,
}

impl Truth {
    /// Takes in what a folder holds.
    pub(super) fn learn(&mut self, folder: &Path) {
        let file = folder.join(STORE);
        let found = found::alone(|| found::read(&file)).expect("what was not cut can be read");
        for (state, log) in found.logs() {
            self.first.insert(state.to_owned(), log.first);
            let lines = self.lines.entry(state.to_owned()).or_default();
            for (line, version) in log.lines.iter().zip(log.first..) {
                lines.entry(version).or_default().insert(line.clone());
            }
        }
    }
}

/// Reads a line of output.
pub(super) fn told(line: &Value, session: &str, truth: &Truth) -> Option<Told> {
    if session == "create" {
        return line.get("store").map(|_| Told::Made);
    }
    if let Some(state) = session.strip_prefix("purge ") {
        return Some(Told::Purged(state.to_owned()));
    }
    if line["ok"] == true {
        let states = &truth.writes[line["id"].as_str()?];
        let versions = line["results"].as_array()?.iter().map(|result| result["version"].as_u64());
        let wrote = states.iter().cloned().zip(versions.map(Option::unwrap)).collect();
        return Some(Told::Wrote(wrote));
    }
    let (governor, state) = (line["governor_id"].as_str()?, line["state_id"].as_str()?);
    Some(Told::Wrote(vec![(format!("{governor}/{state}"), line["version"].as_u64()?)]))
}

/// Whether all is there that the user was told by then, nothing is half there, and nothing is there that
/// never was. `all` is what is told later too: it says which versions belong together.
pub(super) fn judge(truth: &Truth, all: &[Told], told: usize, found: &Found) -> Result<(), String> {
    let is_there = |(state, version): &&Version| found.heads.get(state) >= Some(version);
    for (n, told_then) in all.iter().enumerate() {
        let Told::Wrote(versions) = told_then else { continue };
        let there = versions.iter().filter(is_there).count();
        if there < versions.len() && n < told {
            return Err(format!("acknowledged and lost: {versions:?}"));
        }
        if there != 0 && there != versions.len() {
            return Err(format!("half a transaction: {there} of {versions:?}"));
        }
    }
    let mut sum = 0;
    for (state, log) in found.logs() {
        let known = truth.lines.get(state);
        for (line, version) in log.lines.iter().zip(log.first..) {
            let known = known.and_then(|known| known.get(&version));
            if known.is_none_or(|known| !known.contains(line)) {
                return Err(format!("{state} v{version} never was: {line}"));
            }
        }
        if truth.first.get(state).is_none_or(|first| log.first > *first) {
            return Err(format!("{state} begins with v{}", log.first));
        }
        if let Some(last) = log.lines.last().filter(|_| state.starts_with("bank/")) {
            sum += serde_json::from_str::<Value>(last).unwrap()["data"].as_i64().unwrap();
        }
    }
    if sum != 0 {
        return Err(format!("the accounts sum to {sum}"));
    }
    let purged = all[..told].iter().filter_map(|told| match told {
        Told::Purged(state) => Some(state),
        _ => None,
    });
    for state in purged {
        let has_data = |line: &String| !line.contains("\"data\":null");
        if found.lines.get(state).is_some_and(|lines| lines.iter().any(has_data)) {
            return Err(format!("{state} was purged and is back"));
        }
    }
    Ok(())
}
