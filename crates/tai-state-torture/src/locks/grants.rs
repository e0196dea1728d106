//! Grants without end: whatever ends them, and however often the store is opened anew, tokens rise by one.

use std::time::Duration;

use rustix::process::Signal;
use tai_state::{
    CleanupOptions, LockStatus, StateMachinePersister, StateStore, TransactionManager,
};

use super::tree::until;
use super::{HOLD, running};
use crate::engine::{Engine, Store, snapshot, why};
use crate::random::Random;
use crate::run::Tally;

const LOCKS: usize = 20;
/// So often the store is opened anew.
const OPENED_FOR: u64 = 25;
/// So often a file is copied, removed, and the copy put in its place.
const RESTORED_AFTER: u64 = 5 * OPENED_FOR;
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

/// The file as it stands, all handles closed, under another name; then as if nothing had been.
fn restored(store: &Store) {
    let copy = store.path("copy");
    std::fs::create_dir(&copy).unwrap();
    let parts = || {
        let entries = std::fs::read_dir(store.folder.path()).unwrap().map(Result::unwrap);
        entries.filter(|entry| entry.file_name().to_string_lossy().starts_with("store.tai"))
    };
    for part in parts() {
        std::fs::copy(part.path(), copy.join(part.file_name())).unwrap();
    }
    parts().for_each(|part| std::fs::remove_file(part.path()).unwrap());
    for part in std::fs::read_dir(&copy).unwrap().map(Result::unwrap) {
        std::fs::rename(part.path(), store.path(part.file_name().to_str().unwrap())).unwrap();
    }
    std::fs::remove_dir(&copy).unwrap();
}

/// All that may take away what is old; locks are never that.
async fn cleaned_up(opened: &StateStore, manager: &TransactionManager) {
    manager.cleanup_expired_locks().await.unwrap();
    opened.save_state("g", "s", snapshot("s", 1.into()), why()).await.unwrap();
    let persister = StateMachinePersister::with_defaults(opened);
    persister.cleanup("g", &CleanupOptions::older_than(Duration::ZERO), |_| {}).await.unwrap();
}

/// What the newest tokens were, and how the grants before them ended.
struct Grants<'a> {
    store: &'a Store,
    runtime: &'a tokio::runtime::Handle,
    newest: [u64; LOCKS],
    killed: u64,
}

impl Grants<'_> {
    fn token(&mut self, name: &str, manager: &TransactionManager, end: u64) -> u64 {
        // Of a process that is killed: only the end of its lease makes it free.
        if end >= 2 {
            return self.runtime.block_on(grant(self.store, manager, name, end - 2));
        }
        self.killed += 1;
        let holder = running(self.store, name, &["--ttl", "100ms"], HOLD);
        // Its token, or on a busy machine that it has lost the lock already.
        holder.next().unwrap();
        holder.signal(Signal::KILL);
        let look = || self.runtime.block_on(manager.lock_record(name)).unwrap().unwrap();
        if end == 0 {
            let is_held = || look().status == LockStatus::Held;
            until("the end of a lease", || (!is_held()).then_some(()));
            self.runtime.block_on(manager.cleanup_expired_locks()).unwrap();
        }
        look().fencing_token
    }
}

pub(crate) fn tokens_rise_by_one(
    engine: Engine,
    many: u64,
    mut random: Random,
    runtime: &tokio::runtime::Handle,
) -> Tally {
    let mut tally = Tally::default();
    let store = engine.store();
    let mut grants = Grants { store: &store, runtime, newest: [0; LOCKS], killed: 0 };
    for round in 0..many / OPENED_FOR {
        let opened = runtime.block_on(store.open());
        let manager = TransactionManager::new(&opened);
        for _ in 0..OPENED_FOR {
            let number = usize::try_from(random.below(LOCKS as u64)).unwrap();
            let name = format!("r{number}");
            let token = grants.token(&name, &manager, random.below(40));
            let before = grants.newest[number];
            tally.holds(token == before + 1, || {
                format!("{name} on {}: token {token} after {before}", engine.name())
            });
            grants.newest[number] = token;
        }
        runtime.block_on(cleaned_up(&opened, &manager));
        drop((manager, opened));
        tally.count("times opened anew, with a clean-up before", 1);
        if engine == Engine::File && ((round + 1) * OPENED_FOR).is_multiple_of(RESTORED_AFTER) {
            restored(&store);
            tally.count("times put back from a copy", 1);
        }
    }
    let Grants { newest, killed, .. } = grants;
    tally.count("grants", many);
    tally.count("of them to processes that were killed", killed);
    let locks = runtime.block_on(async {
        let opened = store.open().await;
        TransactionManager::new(&opened).list_locks().await.unwrap()
    });
    for lock in &locks {
        let number: usize = lock.resource.strip_prefix('r').unwrap().parse().unwrap();
        tally.holds(lock.fencing_token == newest[number], || {
            format!("{}: token {}, not {}", lock.resource, lock.fencing_token, newest[number])
        });
    }
    let granted = newest.iter().filter(|token| **token > 0).count();
    tally.holds(granted == locks.len() && newest.iter().sum::<u64>() == many, || {
        format!("{} locks of {granted}, {newest:?} of {many} grants", locks.len())
    });
    store.verified();
    tally
}
