//! A thousand clients whose service was away for a while, and how they spread when it is back.

use std::sync::Arc;
use std::time::Duration;

use serde_json::json;
use tai_state::backend::memory::MemoryBackend;
use tai_state::testing::faults::FaultyBackend;
use tai_state::{RetryPolicy, StateStore, StoreOptions};
use tokio::task::JoinSet;

use super::{busiest, is_short, snapshot, why};
use crate::run::{Run, Tally};

const CLIENTS: u64 = 1_000;
/// What healing may bring within 100 ms, in hundredths of the mean; and what it brings at least where nobody
/// waits a part that is drawn.
pub(super) const MOST: u64 = 300;
const HERD: u64 = 1_000;

/// Drawn of each wait.
const DRAWS: usize = 5_000;

pub(super) async fn storm(run: &Run, tally: &mut Tally) {
    let away = Duration::from_secs(if is_short(run) { 3 } else { 60 });
    let (mut spread, at_once) = tokio::join!(after(away, true), after(away, false));
    // A machine that stood still has gathered them itself; a herd comes each time.
    for _ in 0..2 {
        if spread > MOST {
            spread = after(away, true).await;
        }
    }
    tally.highest("hundredths of the mean in the busiest 100 ms of 1,000 clients", spread);
    tally.holds(spread <= MOST, || format!("1,000 clients: {spread} % of the mean at once"));
    println!("  1,000 clients, {away:?} away: {spread} % of the mean, {at_once} % without jitter");
    tally.control("clients that wait without jitter", u64::from(at_once >= HERD), 1, 1);
}

/// The busiest 100 ms after so long a storm.
async fn after(away: Duration, with_jitter: bool) -> u64 {
    let backend = FaultyBackend::new(Arc::new(MemoryBackend::new()), []).far();
    backend.go_down(true);
    let mut options = StoreOptions::default();
    options.retry.max_attempts = if with_jitter { u32::MAX } else { 1 };
    options.retry.deadline = away * 2;
    let policy = options.retry.clone();
    let store = StateStore::with_backend(Arc::new(backend.clone()), options);
    let mut tasks = JoinSet::new();
    for client in 0..CLIENTS {
        let (store, policy) = (store.clone(), policy.clone());
        tasks.spawn(async move {
            let id = format!("s{client}");
            let mut wait = policy.base;
            while store.save_state("g", &id, snapshot(&id, json!(1)), why()).await.is_err() {
                assert!(!with_jitter, "a client gave up");
                tokio::time::sleep(wait).await;
                wait = (wait * 2).min(policy.cap);
            }
        });
    }
    tokio::time::sleep(away).await;
    backend.go_down(false);
    let healed = backend.age();
    while let Some(done) = tasks.join_next().await {
        done.unwrap();
    }
    let times: Vec<Duration> =
        backend.commit_times().into_iter().filter(|time| *time >= healed).collect();
    // Everybody comes within the longest wait; that is the window.
    busiest(&times, policy.cap)
}

/// The distance of Kolmogorov and Smirnov of a sample from the uniform distribution on 0..1, as a
/// probability: how often a sample that is uniform is at least so far from it (Marsaglia, Tsang, Wang
/// 2003; the limit of it, with Stephens' correction for the size).
fn likelihood(mut sample: Vec<f64>) -> f64 {
    sample.sort_by(f64::total_cmp);
    let n = sample.len() as f64;
    let distance = sample.iter().enumerate().fold(0.0f64, |most, (index, x)| {
        let (below, above) = (index as f64 / n, (index + 1) as f64 / n);
        most.max(x - below).max(above - x)
    });
    let scaled = (n.sqrt() + 0.12 + 0.11 / n.sqrt()) * distance;
    if scaled < 0.2 {
        return 1.0;
    }
    let terms = (1..=100i32).map(|k| {
        let sign = if k % 2 == 1 { 1.0 } else { -1.0 };
        sign * (-2.0 * f64::from(k).powi(2) * scaled.powi(2)).exp()
    });
    (2.0 * terms.sum::<f64>()).clamp(0.0, 1.0)
}

/// Whether waits are uniform parts of what they may be. One sample in a hundred that is uniform looks as if
/// it were not; three in a row do once in a million.
fn is_uniform(draw: impl Fn() -> f64) -> bool {
    (0..3).any(|_| likelihood((0..DRAWS).map(|_| draw()).collect()) > 0.01)
}

/// Waits are uniform parts of `min(cap, base · 2ⁿ)`.
pub(super) fn jitter(tally: &mut Tally) {
    let policy = RetryPolicy::default();
    let mut noticed = [0; 2];
    let tried = [1, 2, 3, 5, 7, 8, 20, u32::MAX];
    for failed in tried {
        let most = policy.cap.min(policy.base * 2u32.saturating_pow(failed - 1));
        let share = || policy.backoff(failed).as_secs_f64() / most.as_secs_f64();
        tally.count("waits drawn", DRAWS as u64);
        tally.holds(is_uniform(share), || format!("the wait after {failed} tries is not uniform"));
        // A half that is certain and a half that is drawn; and the smaller of two draws.
        noticed[0] += u64::from(!is_uniform(|| 0.5 + share() / 2.0));
        noticed[1] += u64::from(!is_uniform(|| share().min(share())));
    }
    let of = tried.len() as u64;
    tally.control("half of the wait is certain", noticed[0], of, of);
    tally.control("the smaller of two waits", noticed[1], of, of);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_likelihood_is_that_of_the_tables() {
        // A sample as even as can be is at the distance 1 / 2n.
        let even = |n: usize| (0..n).map(|i| (i as f64 + 0.5) / n as f64).collect::<Vec<_>>();
        assert!(likelihood(even(1_000)) > 0.999);
        // Critical distances for large n: 1.36 / √n at 5 %, 1.63 / √n at 1 %.
        for (critical, expected) in [(1.358, 0.05), (1.628, 0.01)] {
            let n = 10_000;
            let shift = critical / (n as f64).sqrt();
            let shifted = even(n).into_iter().map(|x| (x + shift).min(1.0)).collect();
            let found = likelihood(shifted);
            assert!((found / expected - 1.0).abs() < 0.1, "{found} instead of {expected}");
        }
    }
}
