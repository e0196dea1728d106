//! `put`: write a state.

use std::io::Read;

use serde_json::json;
use tai_state::{ChangeMetadata, NewTransition, StateMachinePersister, json};

use crate::args::{Global, Put};
use crate::failure::{self, Failure, Outcome};
use crate::{address, connect, fenced, once, output};

/// More text than this holds no state that could be kept.
const MOST_BYTES: u64 = 16 << 20;

pub(crate) async fn run(global: &Global, args: &Put) -> Outcome {
    let (governor, state) = address(&args.address)?;
    let (text, subject) = match &args.data {
        Some(data) => (data.clone(), "--data".to_owned()),
        None => read(args)?,
    };
    let data = json::parse(&text, &subject)?;
    let store = fenced(connect(global, false).await?, &args.conditions)?;
    let store = once(store, &args.once)?;
    let metadata = ChangeMetadata::new(&args.why.actor, &args.why.reason, args.expect);
    let mut transition = NewTransition::to(governor, state, &args.action, data, metadata);
    if let Some(version) = args.expect {
        transition = transition.expecting(version);
    }
    let event = StateMachinePersister::with_defaults(store).append(transition).await?;
    let object = json!({
        "governor_id": governor, "state_id": state, "version": event.version(), "hash": event.hash,
    });
    let text = format!("{governor}/{state} is at v{}", event.version());
    output::object(global.output, &object, &text).map_err(|failure| failure.though(&text))
}

fn read(args: &Put) -> Outcome<(String, String)> {
    let is_stdin = args.file.as_os_str() == "-";
    let subject =
        if is_stdin { "standard input".to_owned() } else { args.file.display().to_string() };
    let failed = |error: std::io::Error| failure::io(&subject, &error);
    let reader: Box<dyn Read> = if is_stdin {
        Box::new(std::io::stdin())
    } else {
        Box::new(std::fs::File::open(&args.file).map_err(failed)?)
    };
    let mut bytes = Vec::new();
    reader.take(MOST_BYTES + 1).read_to_end(&mut bytes).map_err(failed)?;
    if bytes.len() as u64 > MOST_BYTES {
        return Err(Failure::rejected(format!("{subject}: more than {MOST_BYTES} bytes of JSON")));
    }
    let text = String::from_utf8(bytes)
        .map_err(|error| Failure::rejected(format!("{subject}: not UTF-8: {error}")))?;
    Ok((text, subject))
}
