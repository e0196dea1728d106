//! What a store holds that opens and proves: read with the library, or with the real binary.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::Value;
use tai_state::{ChangeMetadata, GovernorId, ListOptions, StateId, StateSnapshot, StateStore};

use crate::tool;

/// What a store holds that opens and proves.
#[derive(Debug, Default)]
pub(crate) struct Found {
    pub(crate) heads: BTreeMap<String, u64>,
    pub(crate) lines: BTreeMap<String, Vec<String>>,
}

/// The log of one state.
pub(crate) struct Log<'a> {
    pub(crate) first: u64,
    pub(crate) lines: &'a [String],
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
    pub(crate) fn logs(&self) -> impl Iterator<Item = (&str, Log<'_>)> {
        self.heads.iter().map(|(state, head)| {
            let lines = self.lines.get(state).map_or(&[][..], Vec::as_slice);
            (state.as_str(), Log { first: (head + 1).saturating_sub(lines.len() as u64), lines })
        })
    }
}

/// Runs this on a thread that may wait, whatever the caller's may.
pub(crate) fn alone<T: Send, F: Future<Output = T>>(what: impl FnOnce() -> F + Send) -> T {
    std::thread::scope(|scope| {
        let deed = || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            runtime.unwrap().block_on(what())
        };
        scope.spawn(deed).join().unwrap()
    })
}

/// Opens a store with the library, proves it and reads all of it.
pub(crate) async fn read(file: &Path) -> Result<Found, String> {
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
pub(crate) async fn goes_on(file: &Path) -> Result<(), String> {
    let failed = |error: tai_state::Error| format!("it does not go on: {error}");
    for version in 1..=2 {
        let store = StateStore::open(file).await.map_err(failed)?;
        let why = ChangeMetadata::new("torture", "", None);
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
pub(crate) fn read_with_binary(file: &Path) -> Result<Found, String> {
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
