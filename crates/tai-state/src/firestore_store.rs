//! [`FirestoreStore`]: the store that is known to be on Firestore.

use std::ops::Deref;
use std::sync::Arc;

use crate::backend::firestore::{FirestoreBackend, FirestoreConfig};
use crate::config::StoreOptions;
use crate::error::Result;
use crate::store::StateStore;

/// A [`StateStore`] on Google Cloud Firestore or its emulator: it has all the store's methods, and is
/// accepted wherever a store is. A cheap clone.
///
/// ```no_run
/// # async fn example() -> tai_state::Result<()> {
/// use tai_state::FirestoreStore;
/// let store = FirestoreStore::new("my-project").await?;
/// let (state, version) = store.get_state("governor1", "counter").await?;
/// # Ok(()) }
/// ```
#[derive(Debug, Clone)]
pub struct FirestoreStore {
    store: StateStore,
}

impl FirestoreStore {
    /// Opens the store in the database `(default)` of a project, and makes one where there is none.
    ///
    /// With the environment variable `FIRESTORE_EMULATOR_HOST` (`host:port`) that is the emulator's;
    /// else it is Google's, with Application Default Credentials: the key file that
    /// `GOOGLE_APPLICATION_CREDENTIALS` names, the account of `gcloud auth application-default login`,
    /// workload identity, or the metadata server. It never falls back to anything else, and a project
    /// whose name begins with `demo-` never reaches Google.
    ///
    /// # Errors
    /// [`PermissionDenied`](crate::Error::PermissionDenied) without emulator and credentials, naming
    /// the ways out, within 5 s; [`NotAStore`](crate::Error::NotAStore) when there is no such
    /// database; [`Firestore`](crate::Error::Firestore) when the emulator does not answer.
    pub async fn new(project: impl Into<String>) -> Result<Self> {
        Self::builder(project).connect().await
    }

    /// Opens it with settings of one's own.
    pub fn builder(project: impl Into<String>) -> FirestoreBuilder {
        FirestoreBuilder {
            config: FirestoreConfig::new(project),
            is_given: false,
            options: StoreOptions::default(),
        }
    }
}

impl Deref for FirestoreStore {
    type Target = StateStore;

    fn deref(&self) -> &StateStore {
        &self.store
    }
}

impl From<FirestoreStore> for StateStore {
    fn from(store: FirestoreStore) -> Self {
        store.store
    }
}

impl From<&FirestoreStore> for StateStore {
    fn from(store: &FirestoreStore) -> Self {
        store.store.clone()
    }
}

impl From<Arc<FirestoreStore>> for StateStore {
    fn from(store: Arc<FirestoreStore>) -> Self {
        store.store.clone()
    }
}

/// Settings of a [`FirestoreStore`] before it is opened.
#[derive(Debug, Clone)]
pub struct FirestoreBuilder {
    config: FirestoreConfig,
    /// Whether it was said where the store is, so that the environment is not asked.
    is_given: bool,
    options: StoreOptions,
}

impl FirestoreBuilder {
    /// The database; `(default)` unless named.
    #[must_use]
    pub fn database(mut self, database: impl Into<String>) -> Self {
        self.config.database = database.into();
        self
    }

    /// What stands before the names of the collections, for a database that is shared.
    #[must_use]
    pub fn prefix(mut self, prefix: impl Into<String>) -> Self {
        self.config.prefix = prefix.into();
        self
    }

    /// Uses the emulator at `host:port`, whatever the environment says.
    #[must_use]
    pub fn emulator(mut self, host: impl Into<String>) -> Self {
        self.config.emulator = Some(host.into());
        self.is_given = true;
        self
    }

    /// Uses Google, whatever the environment says.
    #[must_use]
    pub fn on_google(mut self) -> Self {
        self.config.emulator = None;
        self.is_given = true;
        self
    }

    /// The settings of the handle.
    #[must_use]
    pub fn options(mut self, options: StoreOptions) -> Self {
        self.options = options;
        self
    }

    /// Opens the store.
    ///
    /// # Errors
    /// As [`FirestoreStore::new`].
    pub async fn connect(self) -> Result<FirestoreStore> {
        let Self { mut config, is_given, options } = self;
        if !is_given {
            let host = std::env::var("FIRESTORE_EMULATOR_HOST");
            config.emulator = host.ok().filter(|host| !host.is_empty());
        }
        config.create = options.create;
        config.allow_remote_emulator = options.allow_remote_emulator;
        // Always before the deadline of the whole call, whose end says nothing about the connection: a
        // line that is dead without a word must be given up at some time.
        let attempt = options.retry.attempt_timeout;
        config.attempt_timeout = attempt.min(options.retry.deadline.mul_f64(0.8));
        let backend = FirestoreBackend::open(config).await?;
        Ok(FirestoreStore { store: StateStore::with_backend(Arc::new(backend), options) })
    }
}
