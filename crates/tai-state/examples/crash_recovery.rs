//! A process is killed in mid-write, and nothing that was acknowledged is lost:
//! `cargo run -p tai-state --example crash_recovery [-- URL]`.
//!
//! URL is a file or `firestore+emulator://127.0.0.1:8080/demo-app`; without one a temporary file.

use std::io::{BufRead, BufReader, Write};
use std::process::{Command, Stdio};

use serde_json::json;
use tai_state::{ChangeMetadata, Error, StateMachinePersister, StateSnapshot, StateStore};

type AnyResult<T> = Result<T, Box<dyn std::error::Error>>;

/// What the child does: counts visitors until it is killed, and says each version that is acknowledged.
async fn count_visitors(url: &str) -> AnyResult<()> {
    let store = StateStore::connect(url).await?;
    let persister = StateMachinePersister::with_defaults(&store);
    let mut door = match store.get_state("museum", "door").await {
        Ok((door, _)) => Some(door),
        Err(Error::StateNotFound { .. }) => None,
        Err(error) => return Err(error.into()),
    };
    loop {
        let visitors = door.as_ref().and_then(|door| door.data.get("visitors")?.as_u64());
        let why = ChangeMetadata::new("sensor", "somebody came in", None);
        let data = json!({"visitors": visitors.unwrap_or(0) + 1});
        let next = StateSnapshot::new("door".into(), data, why.clone());
        let event = persister.log_transition("museum", door.as_ref(), &next, "enter", why).await?;
        writeln!(std::io::stdout(), "{}", event.version())?; // durable before this is said
        door = Some(event.to_state);
    }
}

/// Starts this program again as the child, kills it after so many acknowledgements, and returns the last.
fn kill_in_mid_write(url: &str, acknowledgements: usize) -> AnyResult<u64> {
    let mut command = Command::new(std::env::current_exe()?);
    let mut child = command.args(["count", url]).stdout(Stdio::piped()).spawn()?;
    let mut said = BufReader::new(child.stdout.take().ok_or("the child has no output")?).lines();
    let before: Vec<String> = said.by_ref().take(acknowledgements).collect::<Result<_, _>>()?;
    child.kill()?; // SIGKILL: it gets no chance to tidy up
    child.wait()?;
    let rest: Vec<String> = said.collect::<Result<_, _>>()?; // said before it died
    Ok(before.iter().chain(&rest).next_back().ok_or("the child could not write")?.parse()?)
}

pub(crate) async fn run(url: &str) -> AnyResult<()> {
    let acknowledged = kill_in_mid_write(url, 250)?;
    println!("killed; the last acknowledged version was {acknowledged}");

    // There is nothing to repair or to replay by hand: open it and read. The report is for the curious.
    let store = StateStore::connect(url).await?;
    let persister = StateMachinePersister::with_defaults(&store);
    let (door, report) = persister.recover("museum", "door").await?;
    let door = door.ok_or("nobody deletes the door")?;
    println!("the store has v{}: {}", door.version, door.data);
    let (replayed, base) = (report.events_replayed, report.base);
    println!("replayed {replayed} events on {base:?}; the head was {:?}", report.head);

    // The write that was under way is there as a whole or not at all; all before it are there.
    assert!((acknowledged..=acknowledged + 1).contains(&door.version));
    assert_eq!(door.data, json!({"visitors": door.version}));
    let proof = store.verify(|_| {}).await?;
    assert!(proof.ok, "{:?}", proof.problems);
    println!("all {} events are proved", proof.events);
    Ok(())
}

#[tokio::main]
async fn main() -> AnyResult<()> {
    let folder = tempfile::tempdir()?; // for a store in a file, gone at the end
    let file = folder.path().join("museum.tai").display().to_string();
    let mut given = std::env::args().skip(1);
    match (given.next(), given.next()) {
        (Some(word), Some(url)) if word == "count" => count_visitors(&url).await,
        (url, _) => run(&url.or(std::env::var("TAI_STATE_URL").ok()).unwrap_or(file)).await,
    }
}
