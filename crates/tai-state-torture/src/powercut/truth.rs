//! What was true while the binary was recorded, what its user was told, and the verdict on a store.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::Value;
use tai_state::{ChangeMetadata, GovernorId, ListOptions, StateId, StateSnapshot, StateStore};

use super::record::STORE;
use crate::tool;

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
        let found = alone(|| read(&file)).expect("what was not cut can be read");
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

/// What a store holds that opens and proves.
#[derive(Debug, Default)]
pub(super) struct Found {
    heads: BTreeMap<String, u64>,
    lines: BTreeMap<String, Vec<String>>,
}

struct Log<'a> {
    first: u64,
    lines: &'a [String],
}

impl Found {
    fn take(&mut self, exported: &[u8]) {
        for line in String::from_utf8(exported.to_vec()).unwrap().lines() {
            let value: Value = serde_json::from_str(line).unwrap();
            let text = |field: &str| value[field].as_str().unwrap().to_owned();
            let state = format!("{}/{}", text("governor_id"), text("state_id"));
            self.lines.entry(state).or_default().push(line.to_owned());
        }
    }

    /// The log of each state. Its last line is of the newest version: `verify` has proved that there
    /// is no gap.
    fn logs(&self) -> impl Iterator<Item = (&str, Log<'_>)> {
        self.heads.iter().map(|(state, head)| {
            let lines = self.lines.get(state).map_or(&[][..], Vec::as_slice);
            (state.as_str(), Log { first: (head + 1).saturating_sub(lines.len() as u64), lines })
        })
    }
}

/// Runs this on a thread that may wait, whatever the caller's may.
pub(super) fn alone<T: Send, F: Future<Output = T>>(what: impl FnOnce() -> F + Send) -> T {
    std::thread::scope(|scope| {
        let deed = || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            runtime.unwrap().block_on(what())
        };
        scope.spawn(deed).join().unwrap()
    })
}

/// Opens a store with the library, proves it and reads all of it.
pub(super) async fn read(file: &Path) -> Result<Found, String> {
    let store = StateStore::open(file).await.map_err(|error| format!("refused: {error}"))?;
    let report = store.verify(|_| {}).await.map_err(|error| format!("verify: {error}"))?;
    if !report.ok {
        return Err(format!("verify: {:?}", report.problems));
    }
    let failed = |error: tai_state::Error| error.to_string();
    let mut found = Found::default();
    for governor in store.list_governors(None, 1_000).await.map_err(failed)? {
        heads(&store, &governor, &mut found).await.map_err(failed)?;
    }
    let mut lines = Vec::new();
    store.export(None, &mut lines, |_| {}).await.map_err(failed)?;
    found.take(&lines);
    Ok(found)
}

async fn heads(
    store: &StateStore,
    governor: &GovernorId,
    found: &mut Found,
) -> Result<(), tai_state::Error> {
    let mut options = ListOptions::default().limit(1_000).with_deleted();
    loop {
        let page = store.list_states(governor, &options).await?;
        for record in page.states {
            let state = format!("{governor}/{}", record.snapshot.id);
            found.heads.insert(state, record.snapshot.version);
        }
        let Some(next) = page.next else { return Ok(()) };
        options = options.after(next);
    }
}

/// A store that was cut goes on: it takes a write, and has it when it is opened again.
pub(super) async fn goes_on(file: &Path) -> Result<(), String> {
    let failed = |error: tai_state::Error| format!("it does not go on: {error}");
    for version in 1..=2 {
        let store = StateStore::open(file).await.map_err(failed)?;
        let why = ChangeMetadata::new("powercut", "", None);
        let data = StateSnapshot::new(StateId::from("state"), version.into(), why.clone());
        let got = store.save_state("after", "state", data, why).await.map_err(failed)?;
        let report = store.verify(|_| {}).await.map_err(failed)?;
        if !report.ok || got != version {
            return Err(format!("it does not go on: v{got}, {:?}", report.problems));
        }
    }
    Ok(())
}

/// The same reading with the real binary.
pub(super) fn read_with_binary(file: &Path) -> Result<Found, String> {
    let url = file.display().to_string();
    let done = |args: &[&str]| {
        let ran = tool::ran(tool::command(&url, args), b"");
        if ran.exit == 0 { Ok(ran.out) } else { Err(format!("refused: {args:?}: {ran:?}")) }
    };
    let verified = done(&["-o", "json", "verify"])?;
    if serde_json::from_str::<Value>(&verified).unwrap()["ok"] != true {
        return Err(format!("verify: {verified}"));
    }
    let mut found = Found::default();
    let exported = done(&["export"])?;
    found.take(exported.as_bytes());
    let each = |text: String| -> Vec<Value> {
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    };
    for governor in each(done(&["-o", "jsonl", "ls"])?) {
        let governor = governor["governor_id"].as_str().unwrap();
        let states = done(&["-o", "jsonl", "ls", governor, "--deleted", "--limit", "100000"])?;
        for state in each(states) {
            let address = format!("{governor}/{}", state["state_id"].as_str().unwrap());
            found.heads.insert(address, state["version"].as_u64().unwrap());
        }
    }
    // And one as a user asks for it.
    if let Some((state, _)) = found.heads.iter().find(|(state, _)| state.starts_with("bank/")) {
        done(&["get", state])?;
    }
    Ok(found)
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
