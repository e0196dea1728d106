//! `recover`: establish a state from its log, and put right what is not what the log says.

use serde_json::{Value, json};
use tai_state::StateMachinePersister;

use crate::args::{Global, Recover};
use crate::failure::Outcome;
use crate::{address, connect, output};

pub(crate) async fn run(global: &Global, args: &Recover) -> Outcome {
    let (governor, state) = address(&args.address)?;
    let persister = StateMachinePersister::with_defaults(connect(global, false).await?);
    let (found, report) = persister.recover(governor, state).await?;
    let mut object = json!(report);
    if let Some(fields) = object.as_object_mut() {
        fields.insert("deleted".into(), found.is_none().into());
        fields.insert("data".into(), found.map_or(Value::Null, |found| found.data));
    }
    let mut text = format!(
        "{governor}/{state}  v{}  from {} and {} events ({} bytes, {:.1} ms)\nhead: {}",
        report.version,
        json!(report.base),
        report.events_replayed,
        report.bytes_read,
        report.elapsed.as_secs_f64() * 1e3,
        json!(report.head),
    );
    for passed in &report.passed_over {
        text.push_str(&format!(
            "\nthe saved snapshot v{} was passed over: {}",
            passed.version, passed.reason
        ));
    }
    for version in &report.disputed {
        text.push_str(&format!(
            "\nthe saved snapshot v{version} said something else about since when history is kept"
        ));
    }
    text.push_str(if report.repaired { "\nrepaired" } else { "\nnothing to repair" });
    output::object(global.output, &object, &text)
}
