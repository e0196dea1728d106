//! What is told to a recorder of metrics: transactions with their attempts, conflicts, changes a commit.

#![allow(clippy::unwrap_used, clippy::indexing_slicing)]

mod common;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use common::{counter, why};
use metrics::{
    Counter, CounterFn, Gauge, Histogram, HistogramFn, Key, KeyName, Metadata, Recorder,
    SharedString, Unit,
};
use tai_state::{StateStore, TransactionManager};

/// Adds up all that it is told, by the name and labels of a metric.
#[derive(Debug, Clone, Default)]
struct Sums(Arc<Mutex<BTreeMap<String, Vec<f64>>>>);

struct Told(Sums, String);

impl Told {
    fn note(&self, value: f64) {
        self.0.0.lock().unwrap().entry(self.1.clone()).or_default().push(value);
    }
}

impl CounterFn for Told {
    fn increment(&self, value: u64) {
        self.note(value as f64);
    }

    fn absolute(&self, value: u64) {
        self.note(value as f64);
    }
}

impl HistogramFn for Told {
    fn record(&self, value: f64) {
        self.note(value);
    }
}

impl Sums {
    fn told(&self, key: &Key) -> Arc<Told> {
        let labels: Vec<String> =
            key.labels().map(|label| format!("{}={}", label.key(), label.value())).collect();
        Arc::new(Told(self.clone(), format!("{}{{{}}}", key.name(), labels.join(","))))
    }

    fn values(&self, name: &str) -> Vec<f64> {
        self.0.lock().unwrap().get(name).cloned().unwrap_or_default()
    }
}

impl Recorder for Sums {
    fn describe_counter(&self, _: KeyName, _: Option<Unit>, _: SharedString) {}
    fn describe_gauge(&self, _: KeyName, _: Option<Unit>, _: SharedString) {}
    fn describe_histogram(&self, _: KeyName, _: Option<Unit>, _: SharedString) {}

    fn register_counter(&self, key: &Key, _: &Metadata<'_>) -> Counter {
        Counter::from_arc(self.told(key))
    }

    fn register_gauge(&self, _: &Key, _: &Metadata<'_>) -> Gauge {
        Gauge::noop()
    }

    fn register_histogram(&self, key: &Key, _: &Metadata<'_>) -> Histogram {
        Histogram::from_arc(self.told(key))
    }
}

#[test]
fn transactions_are_counted_with_their_attempts() {
    let sums = Sums::default();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    metrics::with_local_recorder(&sums, || {
        runtime.block_on(async {
            let store = StateStore::in_memory();
            store.save_state("g", "s", counter(0), why()).await.unwrap();
            let manager = TransactionManager::new(&store);
            let mut runs = 0;
            let done = manager.run(|tx| {
                runs += 1;
                let (store, is_first) = (store.clone(), runs == 1);
                async move {
                    let (state, version) = tx.get_state("g", "s").await?;
                    if is_first {
                        store.save_state("g", "s", counter(1), why()).await?;
                    }
                    tx.update_state("g", "s", state, version, why()).await
                }
            });
            assert_eq!(done.await.unwrap().attempts, 2);
            manager.run(|tx| async move { tx.get_state("g", "none").await }).await.unwrap_err();
        });
    });
    assert_eq!(sums.values("tai_state_transactions_total{status=committed}"), [1.0]);
    assert_eq!(sums.values("tai_state_transactions_total{status=failed}"), [1.0]);
    assert_eq!(sums.values("tai_state_transaction_attempts{}"), [2.0, 1.0]);
    assert_eq!(sums.values("tai_state_conflicts_total{}"), [1.0]);
    assert_eq!(sums.values("tai_state_commit_changes{}"), [1.0, 1.0, 1.0]);
}
