//! A thousand grants: whatever ends them, and however often the store is opened anew, tokens rise by one.

use std::time::Duration;

use rustix::process::Signal;
use tai_state::{LockStatus, StateStore, TransactionManager};

use crate::common::{Engine, Random, Store};
use crate::tree::until;
use crate::{HOLD, running};

on_every_engine!(tokens_rise_by_one);

const LOCKS: usize = 20;
/// So often the store is opened anew.
const OPENED_FOR: usize = 25;
const LONG: Duration = Duration::from_secs(30);

/// One grant, to its end, and its token.
async fn grant(store: &Store, manager: &TransactionManager, name: &str, end: u64) -> u64 {
    let lock = manager.acquire_lock_within(name, "a", LONG, LONG).await.unwrap();
    let token = lock.fencing_token;
    match end {
        0 | 1 => drop(lock),
        2 | 3 => {
            let broken = manager.break_lock(name).await.unwrap().unwrap();
            assert_eq!(broken.fencing_token, token);
        }
        4 | 5 => manager.release_lock(name, &lock.lock_token).await.unwrap(),
        6 => {
            store.run(&["locks", "break", name]).ok();
        }
        _ => lock.release().await.unwrap(),
    }
    token
}

fn tokens_rise_by_one(engine: Engine) {
    let mut random = Random::announced("grants");
    let store = engine.store();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    let mut newest = [0u64; LOCKS];
    let grants = if engine == Engine::File { 1_000 } else { 200 };
    let mut killed = 0;
    for _ in 0..grants / OPENED_FOR {
        let opened = runtime.block_on(StateStore::connect(&store.url)).unwrap();
        let manager = TransactionManager::new(&opened);
        for _ in 0..OPENED_FOR {
            let number = usize::try_from(random.below(LOCKS as u64)).unwrap();
            let name = format!("r{number}");
            let token = match random.below(40) {
                // Of a process that is killed: only the end of its lease makes it free.
                end @ (0 | 1) => {
                    killed += 1;
                    let holder = running(&store, &name, &["--ttl", "100ms"], HOLD);
                    // Its token, or on a busy machine that it has lost the lock already.
                    holder.next().unwrap();
                    holder.signal(Signal::KILL);
                    let look = || runtime.block_on(manager.lock_record(&name)).unwrap().unwrap();
                    if end == 0 {
                        let is_held = || look().status == LockStatus::Held;
                        until("the end of a lease", || (!is_held()).then_some(()));
                        runtime.block_on(manager.cleanup_expired_locks()).unwrap();
                    }
                    look().fencing_token
                }
                end => runtime.block_on(grant(&store, &manager, &name, end - 2)),
            };
            assert_eq!(token, newest[number] + 1, "{name}");
            newest[number] = token;
        }
    }
    println!("{grants} grants of {LOCKS} locks, {killed} of them to processes that were killed");
    let locks = runtime.block_on(async {
        let opened = StateStore::connect(&store.url).await.unwrap();
        TransactionManager::new(&opened).list_locks().await.unwrap()
    });
    for lock in &locks {
        let number: usize = lock.resource.strip_prefix('r').unwrap().parse().unwrap();
        assert_eq!(lock.fencing_token, newest[number], "{}", lock.resource);
    }
    assert_eq!(newest.iter().filter(|token| **token > 0).count(), locks.len());
    assert_eq!(newest.iter().sum::<u64>(), grants as u64);
}
