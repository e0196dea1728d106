#![doc = include_str!("../README.md")]

pub mod backend;
mod chain;
mod clock;
mod clock_vector;
mod config;
mod error;
mod event;
mod feed;
#[cfg(feature = "firestore")]
mod firestore_store;
mod history;
mod id;
pub mod json;
mod keys;
mod patience;
mod persister;
mod query;
mod reader;
mod records;
mod remembered;
mod replay;
mod schema;
mod settle;
mod state;
mod store;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
mod transaction;
mod transition;
mod url;
mod verify;
mod walk;

pub use backend::Direction;
pub use chain::Hash;
pub use clock::{Clock, ManualClock, SystemClock};
pub use clock_vector::{Causality, VectorClockSnapshot};
pub use config::{PersistenceConfig, RetryPolicy, StoreOptions};
pub use error::{BoxError, Error, Result};
pub use event::Event;
pub use feed::{Feed, FeedPosition, GovernorFeed};
#[cfg(feature = "firestore")]
pub use firestore_store::{FirestoreBuilder, FirestoreStore};
pub use history::{ExportSummary, History, TransitionLine};
pub use id::{GovernorId, StateId};
pub use keys::MAX_NAME_BYTES;
pub use persister::{NewTransition, StateMachinePersister};
pub use query::{FieldPath, Op, QueryCursor, QueryPage, StateQuery};
pub use state::{ChangeMetadata, StateSnapshot};
pub use store::{ListOptions, StatePage, StateRecord, StateStore, StoreStats};
pub use transaction::{Completed, TRANSACTION_CONTEXT, Transaction, TransactionManager};
pub use transition::{MAX_ACTION_BYTES, MAX_CAUSALITY_BYTES, MAX_METADATA_BYTES, MAX_STATE_BYTES};
pub use url::StoreUrl;
pub use verify::VerifyReport;
