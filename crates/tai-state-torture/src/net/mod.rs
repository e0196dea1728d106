//! A network that is slow, silent, cut or refusing, and a service that stops or dies: what was said to
//! be done is done once, every call is back in time, and nobody storms a service that has come back.

mod append;
mod bank;
mod faults;
mod field;
mod gone;
mod herd;
mod kth;
mod locks;
mod waiters;
mod wire;

use std::sync::Arc;
use std::time::Duration;

use tai_state::testing::emulator::{Emulator, fresh_project};
use tai_state::testing::proxy::Proxy;
use tai_state::{ChangeMetadata, FirestoreStore, StateId, StateSnapshot, StateStore, StoreOptions};

use crate::args::Tier;
use crate::run::{Run, Tally};

/// What a call may take beyond its deadline, and what may pass until the first success after an outage.
pub(crate) const GRACE: Duration = Duration::from_secs(1);
const BACK: Duration = Duration::from_secs(5);

pub(crate) async fn run(run: &Run) -> Tally {
    let mut tally = Tally::default();
    let started = std::time::Instant::now();
    let part = |what: &str| println!("  {:5.1} s: {what}", started.elapsed().as_secs_f64());
    herd::jitter(&mut tally);
    part("a thousand clients");
    herd::storm(run, &mut tally).await;
    part("who waits for a lock");
    waiters::in_memory(&mut tally).await;
    let Some(emulator) = Emulator::own().await else {
        tally.skip("net: without a Firestore emulator only retries and jitter were tested");
        return tally;
    };
    let emulator = Arc::new(emulator);
    waiters::on_the_wire(&emulator, &mut tally).await;
    part("a fault at each commit");
    kth::run(run, &emulator, &mut tally).await;
    part("sendings of each call");
    wire::bounded(&emulator, &mut tally).await;
    part("a storm at the wire");
    wire::storm(run, &emulator, &mut tally).await;
    part("a line that swallows");
    wire::swallowed(&emulator, &mut tally).await;
    part("fault after fault");
    faults::run(run, &emulator, &mut tally).await;
    part("the service is gone");
    gone::run(run, &emulator, &mut tally).await;
    tally
}

fn is_short(run: &Run) -> bool {
    run.tier == Tier::Short
}

/// A store on an emulator behind a proxy, and one that speaks to the emulator itself.
struct Behind {
    proxy: Proxy,
    project: String,
    direct: StateStore,
}

impl Behind {
    async fn new(emulator: &Emulator) -> Self {
        let proxy = Proxy::start(emulator.address()).await.unwrap();
        let project = fresh_project();
        let direct = open(emulator.address(), &project, StoreOptions::default()).await;
        Self { proxy, project, direct }
    }

    async fn store(&self, options: StoreOptions) -> StateStore {
        open(self.proxy.address(), &self.project, options).await
    }
}

async fn open(address: &str, project: &str, options: StoreOptions) -> StateStore {
    let builder = FirestoreStore::builder(project).emulator(address).options(options);
    builder.connect().await.unwrap().into()
}

/// Impatient, so that a fault is long beside it.
fn options(attempts: u32, attempt: Duration, deadline: Duration) -> StoreOptions {
    let mut options = StoreOptions::default();
    options.retry.max_attempts = attempts;
    options.retry.attempt_timeout = attempt;
    options.retry.deadline = deadline;
    options
}

pub(crate) fn why() -> ChangeMetadata {
    ChangeMetadata::new("torture", "because", None)
}

pub(crate) fn snapshot(id: &str, data: serde_json::Value) -> StateSnapshot {
    StateSnapshot::new(StateId::from(id), data, why())
}

/// The most that came within 100 ms, beside the mean of the window, in hundredths.
fn busiest(times: &[Duration], window: Duration) -> u64 {
    const SLOT: Duration = Duration::from_millis(100);
    let mut times = times.to_vec();
    times.sort_unstable();
    let (mut first, mut most) = (0, 0);
    for (last, time) in times.iter().enumerate() {
        while *time - times[first] >= SLOT {
            first += 1;
        }
        most = most.max(last + 1 - first);
    }
    let mean = times.len() as f64 * SLOT.as_secs_f64() / window.as_secs_f64();
    (most as f64 / mean * 100.0) as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_busiest_tenth_of_a_second() {
        let even: Vec<Duration> = (0..1_000).map(Duration::from_millis).collect();
        assert_eq!(busiest(&even, Duration::from_secs(1)), 100);
        let at_once = vec![Duration::from_millis(500); 1_000];
        assert_eq!(busiest(&at_once, Duration::from_secs(1)), 1_000);
    }
}
