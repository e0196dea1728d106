#![doc = include_str!("../README.md")]

pub mod backend;
mod chain;
mod clock;
mod clock_vector;
mod command;
mod conditions;
mod config;
mod conflict;
mod error;
mod event;
mod eventual;
mod export;
mod feed;
mod fence;
#[cfg(feature = "firestore")]
mod firestore_store;
mod fold;
mod grant;
mod history;
mod id;
pub mod json;
mod keys;
mod lease;
mod leases;
mod lines;
mod lock;
mod manager;
mod patience;
mod persister;
mod proposal;
mod purge;
mod query;
mod reader;
mod records;
mod recovery;
mod remembered;
mod replay;
mod retention;
mod revise;
mod saved;
mod schema;
mod settle;
mod state;
mod store;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
mod timeline;
mod transaction;
mod transaction_log;
mod transition;
mod trim;
mod url;
mod verify;
mod walk;

pub use backend::Direction;
pub use chain::Hash;
pub use clock::{Clock, ManualClock, SystemClock};
pub use clock_vector::{Causality, VectorClockSnapshot};
pub use command::MAX_ANSWER_BYTES;
pub use config::{PersistenceConfig, RetryPolicy, StoreOptions};
pub use conflict::{
    CausalityAwareResolver, ConflictResolver, FieldMergeResolver, HighestVersionResolver,
    LastWriteWinsResolver, ResolveWith,
};
pub use error::{BoxError, Error, Result};
pub use event::Event;
pub use eventual::{
    CONFLICT_CONTEXT, CONFLICT_LOST, CONFLICT_RESOLVED, ConsistencyStatistics, EventualConsistency,
    Freshness, REPAIRED, Repair, RepairOutcome,
};
pub use export::{ExportSummary, TransitionLine};
pub use feed::{Feed, FeedPosition, GovernorFeed};
pub use fence::{Fence, GLOBAL_GOVERNOR};
#[cfg(feature = "firestore")]
pub use firestore_store::{FirestoreBuilder, FirestoreStore};
pub use fold::LoggedEvent;
pub use history::{History, PointInTime};
pub use id::{GovernorId, StateId};
pub use keys::MAX_NAME_BYTES;
pub use lock::{DistributedLock, LockRecord, LockStatus};
pub use manager::{Completed, TransactionManager};
pub use persister::{NewTransition, Replayed, StateMachinePersister};
pub use purge::PurgeReport;
pub use query::{FieldPath, Op, QueryCursor, QueryPage, StateQuery};
pub use recovery::{HeadCondition, PassedOver, RecoveryBase, RecoveryReport};
pub use retention::{CleanupOptions, CleanupReport};
pub use saved::{PruneReport, SavedSnapshot};
pub use state::{ChangeMetadata, StateSnapshot};
pub use store::{ListOptions, StatePage, StateRecord, StateStore, StoreStats};
pub use timeline::{ConsistentCut, Timeline};
pub use transaction::{TRANSACTION_CONTEXT, Transaction};
pub use transaction_log::{TouchedState, TransactionRecord, TransactionStatus};
pub use transition::{MAX_ACTION_BYTES, MAX_CAUSALITY_BYTES, MAX_METADATA_BYTES, MAX_STATE_BYTES};
pub use url::StoreUrl;
pub use verify::{ConsistencyReport, Problem, Rule, VerifyReport};
