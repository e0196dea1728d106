//! Calls over a whole store, which is small and their own, dropped at every point: they have changed nothing,
//! and the next calls work.

use std::pin::Pin;

use serde_json::json;
use tai_state::{Error, StateMachinePersister, StateStore};
use tokio::time::timeout;

use super::{Engine, MOST_POLLS, Polled, SOON, polled};
use crate::net::{snapshot, why};
use crate::random::Random;
use crate::run::Tally;

type Told<'a> = Pin<Box<dyn Future<Output = Result<(), Error>> + Send + 'a>>;
type Call = for<'a> fn(&'a StateStore) -> Told<'a>;

const CALLS: [(&str, Call); 3] = [
    ("prove all", |store| Box::pin(async { store.verify(|_| {}).await.map(drop) })),
    ("statistics", |store| Box::pin(async { store.get_stats().await.map(drop) })),
    ("export all", |store| {
        Box::pin(async { store.export(None, &mut Vec::new(), |_| {}).await.map(drop) })
    }),
];

pub(super) async fn run(
    round: u64,
    engine: &Engine,
    every: u64,
    random: &mut Random,
    tally: &mut Tally,
) {
    let store = engine.another().open().await.unwrap();
    let mut events = 0;
    for governor in ["g", "h"] {
        for id in ["a", "b", "a", "b", "a"] {
            store.save_state(governor, id, snapshot(id, json!(events)), why()).await.unwrap();
            events += 1;
        }
        let persister = StateMachinePersister::with_defaults(&store);
        persister.save_snapshot(governor, "a").await.unwrap();
    }
    for (name, call) in CALLS {
        let mut polls = 0;
        loop {
            let what = format!("round {round}, {}, {name}, {polls} polls", engine.name());
            let has_ended = match polled(call(&store), polls, random.percent(50)).await {
                Polled::Ended(told) => {
                    tally.holds(told.is_ok(), || format!("{what}: {told:?}"));
                    true
                }
                Polled::Dropped => false,
                Polled::Asleep => return tally.broken(format!("{what}: not woken")),
            };
            tally.count("calls dropped", u64::from(!has_ended));
            tally.count("of them after their first poll", u64::from(!has_ended && polls > 0));
            let save = store.save_state("g", "next", snapshot("next", json!(polls)), why());
            let saved = timeout(SOON, save).await;
            tally
                .holds(matches!(saved, Ok(Ok(_))), || format!("{what}: the next write: {saved:?}"));
            events += 1;
            match timeout(SOON, store.verify(|_| {})).await {
                Ok(Ok(report)) => tally.holds(report.ok && report.events == events, || {
                    format!("{what}: {events} events were written: {report:?}")
                }),
                other => tally.broken(format!("{what}: it cannot be proved: {other:?}")),
            }
            if has_ended {
                break;
            }
            if polls > MOST_POLLS {
                return tally.broken(format!("{what}: no end"));
            }
            polls += if polls < 3 { 1 } else { 1 + random.below(every * 2 - 1) };
        }
        tally.count("calls over a whole store", 1);
    }
}
