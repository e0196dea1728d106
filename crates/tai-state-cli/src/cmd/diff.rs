//! `diff`: what changed in a state from one point in time to another.

use serde_json::Value;
use tai_state::PointInTime;

use crate::args::{Diff, Format, Global};
use crate::failure::{Failure, Outcome};
use crate::output::{self, compact, pretty};
use crate::point::Point;
use crate::{address, connect};

pub(crate) async fn run(global: &Global, args: &Diff) -> Outcome {
    let (governor, state) = address(&args.address)?;
    let (from, to) = args.range.split_once("..").ok_or_else(|| {
        Failure::usage(format!("{:?} is not a range", args.range)).hint("write v3..v7 or -1d..")
    })?;
    let from: PointInTime = Point::parse(from)?.into();
    let store = connect(global, false).await?;
    let to: PointInTime = match to {
        // Whoever asks up to the newest means the one that is there when it is read.
        "" => {
            let newest = store.record(governor, state).await?;
            let none = || {
                Failure::from(tai_state::Error::StateNotFound {
                    governor: governor.to_owned(),
                    state: state.to_owned(),
                    at: String::new(),
                })
            };
            newest.ok_or_else(none)?.snapshot.version.into()
        }
        to => Point::parse(to)?.into(),
    };
    let patch = store.diff(governor, state, from, to).await?;
    match (global.output, &patch) {
        (Format::Table, patch) => output::line(&pretty(patch)),
        (Format::Jsonl, Value::Array(operations)) => {
            operations.iter().try_for_each(|operation| output::line(&compact(operation)))
        }
        (_, patch) => output::line(&compact(patch)),
    }
}
