//! Money that is moved through faults is neither made nor lost.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use serde_json::json;
use tai_state::{Error, StateSnapshot, StateStore, TransactionManager};
use tokio::task::JoinSet;

use super::field::{BANK, Field};
use super::{snapshot, why};
use crate::random::Random;
use crate::run::Tally;

const ACCOUNTS: u64 = 32;
const EACH: i64 = 10_000;
/// Of each handle.
const CLIENTS: u64 = 2;

#[derive(Debug, Default)]
pub(super) struct Bank {
    moved: AtomicU64,
    unknown: AtomicU64,
    given_up: AtomicU64,
    audits: AtomicU64,
}

fn account(n: u64) -> String {
    format!("account-{n:02}")
}

fn balance(state: &StateSnapshot) -> i64 {
    state.data["balance"].as_i64().unwrap()
}

fn add(count: &AtomicU64) {
    count.fetch_add(1, Ordering::Relaxed);
}

impl Bank {
    pub(super) async fn open(direct: &StateStore) -> Arc<Self> {
        for n in 0..ACCOUNTS {
            let money = snapshot(&account(n), json!({"balance": EACH}));
            direct.save_state("bank", account(n), money, why()).await.unwrap();
        }
        Arc::default()
    }

    pub(super) fn start(
        self: &Arc<Self>,
        field: &Arc<Field>,
        handles: &[StateStore],
        random: &mut Random,
        tasks: &mut JoinSet<()>,
    ) {
        for handle in handles {
            let manager = TransactionManager::new(handle);
            for _ in 0..CLIENTS {
                let (bank, field, manager) = (Arc::clone(self), Arc::clone(field), manager.clone());
                let random = Random::new(random.next());
                tasks.spawn(async move { bank.client(&field, &manager, random).await });
            }
            let (bank, field) = (Arc::clone(self), Arc::clone(field));
            tasks.spawn(async move {
                while !field.is_over() {
                    match field.call("an audit", audit(&manager)).await {
                        Some(Ok(Ok(()))) => add(&bank.audits),
                        Some(Ok(Err(how))) => field.broken(how),
                        Some(Err(error)) => field.failed("an audit", &error).await,
                        None => {}
                    }
                }
            });
        }
    }

    async fn client(&self, field: &Field, manager: &TransactionManager, mut random: Random) {
        while !field.is_over() {
            // Half of the traffic meets on four accounts.
            let most = if random.percent(50) { 4 } else { ACCOUNTS };
            let from = random.below(most);
            let to = (from + 1 + random.below(most - 1)) % most;
            let amount = 1 + random.below(100) as i64;
            let (from, to) = (account(from), account(to));
            match field.call("a transfer", transfer(manager, &from, &to, amount)).await {
                Some(Ok(did_move)) => {
                    self.moved.fetch_add(u64::from(did_move), Ordering::Relaxed);
                    field.did(BANK);
                }
                Some(Err(error)) => {
                    let is_unknown = matches!(error, Error::OutcomeUnknown { .. });
                    add(if is_unknown { &self.unknown } else { &self.given_up });
                    field.failed("a transfer", &error).await;
                }
                None => add(&self.unknown),
            }
        }
    }

    /// What the heads say, and how many transfers the logs say.
    pub(super) async fn judge(&self, direct: &StateStore, tally: &mut Tally) {
        let load = |count: &AtomicU64| count.load(Ordering::Relaxed);
        let (moved, unknown) = (load(&self.moved), load(&self.unknown));
        tally.count("transfers", moved);
        tally.count("transfers of unknown outcome", unknown);
        tally.count("transfers given up", load(&self.given_up));
        tally.count("audits", load(&self.audits));
        match audit(&TransactionManager::new(direct)).await {
            Ok(Ok(())) => {}
            Ok(Err(how)) => tally.broken(format!("in the end: {how}")),
            Err(error) => tally.broken(format!("the last audit: {error}")),
        }
        let report = direct.validate_consistency("bank").await.unwrap();
        tally.holds(report.ok, || format!("the bank's log: {:?}", report.problems));
        let events = report.events - ACCOUNTS;
        tally.holds(events.is_multiple_of(2), || "half a transfer".to_owned());
        tally.holds((moved..=moved + unknown).contains(&(events / 2)), || {
            format!("{} transfers in the log, {moved} told, {unknown} unknown", events / 2)
        });
    }
}

/// Moves an amount if there is enough.
async fn transfer(
    manager: &TransactionManager,
    from: &str,
    to: &str,
    amount: i64,
) -> Result<bool, Error> {
    let moved = manager.execute_transaction("bank", |tx| async move {
        let (mut a, version_a) = tx.get_state("bank", from).await?;
        let (mut b, version_b) = tx.get_state("bank", to).await?;
        let (balance_a, balance_b) = (balance(&a), balance(&b));
        if balance_a < amount {
            return Ok(false);
        }
        a.data["balance"] = json!(balance_a - amount);
        b.data["balance"] = json!(balance_b + amount);
        tx.update_state("bank", from, a, version_a, why()).await?;
        tx.update_state("bank", to, b, version_b, why()).await?;
        Ok(true)
    });
    moved.await
}

/// The sum of one cut; the inner error is a broken promise.
async fn audit(manager: &TransactionManager) -> Result<Result<(), String>, Error> {
    let ids: Vec<String> = (0..ACCOUNTS).map(account).collect();
    let all = manager
        .execute_transaction("bank", |tx| {
            let ids = &ids;
            async move { tx.batch_get_states("bank", ids).await }
        })
        .await?;
    let balances: Vec<i64> = all.iter().map(balance).collect();
    let total: i64 = balances.iter().sum();
    let holds = balances.len() as u64 == ACCOUNTS
        && total == EACH * ACCOUNTS as i64
        && balances.iter().all(|balance| *balance >= 0);
    Ok(if holds { Ok(()) } else { Err(format!("an audit found {total}: {balances:?}")) })
}
