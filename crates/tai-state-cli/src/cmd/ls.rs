//! `ls`: list governors, or the states of one.

use serde_json::json;
use tai_state::{GovernorId, ListOptions, StateRecord, StateStore};

use crate::args::{Global, Ls};
use crate::failure::Outcome;
use crate::output::{Rows, state_json, time};
use crate::point::Point;

/// States on one page of the store, whatever was asked for.
const PAGE: usize = 500;

pub(crate) async fn run(global: &Global, store: &StateStore, args: &Ls) -> Outcome {
    let most = usize::try_from(args.limit).unwrap_or(usize::MAX);
    match &args.governor {
        None => governors(global, store, args, most).await,
        Some(governor) if args.at.is_some() => then(global, store, args, governor, most).await,
        Some(governor) => states(global, store, args, governor, most).await,
    }
}

const HEADINGS: [&str; 5] = ["STATE", "VERSION", "CHANGED", "ACTION", "BY"];

fn push(rows: &mut Rows, record: &StateRecord) -> Outcome {
    let snapshot = &record.snapshot;
    let action = if record.deleted { "(deleted)".to_owned() } else { record.action.clone() };
    rows.push(
        &state_json(record),
        &[
            snapshot.id.to_string(),
            format!("v{}", snapshot.version),
            time(&snapshot.timestamp),
            action,
            snapshot.metadata.changed_by.clone(),
        ],
    )
}

/// All states as they were at one time.
async fn then(
    global: &Global,
    store: &StateStore,
    args: &Ls,
    governor: &str,
    most: usize,
) -> Outcome {
    let at = Point::time(args.at.as_deref().unwrap_or_default())?;
    let mut cut = store.consistent_cut(governor, at)?;
    let mut rows = Rows::new(global.output, &HEADINGS);
    let mut left = most;
    while left > 0 {
        let page = cut.next_page().await?;
        if page.is_empty() {
            break;
        }
        page.iter().take(left).try_for_each(|record| push(&mut rows, record))?;
        left -= page.len().min(left);
    }
    rows.finish()
}

async fn governors(global: &Global, store: &StateStore, args: &Ls, most: usize) -> Outcome {
    let mut rows = Rows::new(global.output, &["GOVERNOR"]);
    let after = args.after.as_deref().map(GovernorId::from);
    for governor in store.list_governors(after.as_ref(), most).await? {
        rows.push(&json!({"governor_id": governor}), &[governor.to_string()])?;
    }
    rows.finish()
}

async fn states(
    global: &Global,
    store: &StateStore,
    args: &Ls,
    governor: &str,
    most: usize,
) -> Outcome {
    let mut rows = Rows::new(global.output, &HEADINGS);
    let mut options = ListOptions::default();
    options.include_deleted = args.deleted;
    options.after = args.after.as_deref().map(Into::into);
    let mut left = most;
    while left > 0 {
        options.limit = left.min(PAGE);
        let page = store.list_states(governor, &options).await?;
        left -= page.states.len().min(left);
        page.states.iter().try_for_each(|record| push(&mut rows, record))?;
        match page.next {
            Some(next) => options.after = Some(next),
            None => break,
        }
    }
    rows.finish()
}
