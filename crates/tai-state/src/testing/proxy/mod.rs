//! A proxy before a gRPC server that counts what passes, and loses, delays and repeats calls.
//!
//! It speaks HTTP/2 without TLS, as the Firestore emulator does, and knows gRPC's framing and the few
//! fields of Firestore's messages that say what a call costs. Each connection of a client has a
//! connection of its own to the server; what passes is what the other side sent, bodies, trailers and
//! cancellations as they come. A call of one request is read whole before it is forwarded; `Listen`
//! and `Write`, whose requests are streams, are passed on piece by piece.
//!
//! ```no_run
//! # async fn example() -> std::io::Result<()> {
//! use tai_state::testing::proxy::{Fault, Proxy, Rule, When};
//!
//! let proxy = Proxy::start("127.0.0.1:8080").await?;
//! proxy.inject(Rule::new("Commit", When::First, Fault::LoseReply));
//! // A client of `proxy.address()` loses the first answer to each commit that it sends.
//! assert_eq!(proxy.usage().writes, 0);
//! # Ok(())
//! # }
//! ```

mod link;
mod meter;
mod narrow;
mod rules;
mod wire;

use std::collections::BTreeMap;
use std::fmt;
use std::future::Future;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::net::TcpListener;
use tokio::sync::mpsc::UnboundedSender;
use tokio::task::JoinSet;

pub use meter::{Call, Usage};
pub use rules::{Code, Fault, Rule, When};

/// A running proxy. Dropping it ends all its connections and all that it still held back.
pub struct Proxy {
    address: String,
    shared: Arc<Shared>,
}

impl Proxy {
    /// Starts a proxy before the server at `upstream`, a `host:port`.
    ///
    /// # Errors
    ///
    /// No port can be had. Whether the server is there shows only when a client connects.
    pub async fn start(upstream: &str) -> io::Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let address = listener.local_addr()?.to_string();
        let shared = Arc::new(Shared {
            upstream: Mutex::new(upstream.to_owned()),
            refusing: AtomicBool::new(false),
            rules: Mutex::default(),
            meter: meter::Meter::default(),
            links: Mutex::default(),
            width: Arc::default(),
            tasks: Mutex::new(Some(JoinSet::new())),
        });
        shared.spawn(accept(listener, Arc::clone(&shared)));
        Ok(Self { address, shared })
    }

    /// Where clients connect: `127.0.0.1:port`.
    #[must_use]
    pub fn address(&self) -> &str {
        &self.address
    }

    /// Adds a rule. A call has the fault of the first rule that meets it, in the order in which they
    /// were added; every rule counts every call of its method from now on.
    pub fn inject(&self, rule: Rule) {
        lock(&self.shared.rules).push(rules::Active::new(rule));
    }

    /// Forgets all rules. What is held back stays held back.
    pub fn clear_rules(&self) {
        lock(&self.shared.rules).clear();
    }

    /// Whether new connections are closed at once, as if the server were not there. Those that are
    /// open stay; [`Proxy::cut`] ends them.
    pub fn refuse(&self, refusing: bool) {
        self.shared.refusing.store(refusing, Ordering::SeqCst);
    }

    /// Ends all connections without a word. What has been forwarded may still be carried out.
    pub fn cut(&self) {
        for orders in lock(&self.shared.links).values() {
            let _ = orders.send(link::Order::Cut);
        }
    }

    /// Lets no more than so many bytes a second pass in each direction of each connection.
    pub fn trickle(&self, bytes_per_second: Option<u64>) {
        self.shared.width.rate.store(bytes_per_second.unwrap_or(0), Ordering::SeqCst);
    }

    /// Whether what clients send, and what they are sent, does not pass though all connections stay open
    /// and new ones are accepted. What waits passes when it is over.
    pub fn half_open(&self, to_server: bool, to_client: bool) {
        self.shared.width.is_dead_to_server.store(to_server, Ordering::SeqCst);
        self.shared.width.is_dead_to_client.store(to_client, Ordering::SeqCst);
    }

    /// Sends connections that are made from now on to another server.
    pub fn set_upstream(&self, upstream: &str) {
        upstream.clone_into(&mut lock(&self.shared.upstream));
    }

    /// What has passed since the start or the last [`Proxy::reset_usage`].
    #[must_use]
    pub fn usage(&self) -> Usage {
        self.shared.meter.usage()
    }

    /// The calls since the start or the last [`Proxy::reset_usage`], in the order of their arrival.
    #[must_use]
    pub fn calls(&self) -> Vec<Call> {
        self.shared.meter.calls()
    }

    /// Begins [`Proxy::usage`] and [`Proxy::calls`] anew.
    pub fn reset_usage(&self) {
        self.shared.meter.reset();
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        // Taken out first: what ends with the tasks must not find the lock held.
        let tasks = lock(&self.shared.tasks).take();
        drop(tasks);
    }
}

impl fmt::Debug for Proxy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Proxy").field("address", &self.address).finish_non_exhaustive()
    }
}

/// What the connections of a proxy have in common.
struct Shared {
    upstream: Mutex<String>,
    refusing: AtomicBool,
    rules: Mutex<Vec<rules::Active>>,
    meter: meter::Meter,
    links: Mutex<BTreeMap<u64, UnboundedSender<link::Order>>>,
    width: Arc<narrow::Width>,
    /// None once the proxy is dropped.
    tasks: Mutex<Option<JoinSet<()>>>,
}

impl Shared {
    /// Runs something that ends with the proxy.
    fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        if let Some(tasks) = &mut *lock(&self.tasks) {
            while tasks.try_join_next().is_some() {}
            tasks.spawn(task);
        }
    }

    /// The fault of a call with this request.
    fn fault(&self, method: &str, request: &[u8]) -> Option<Fault> {
        let mut fault = None;
        for rule in lock(&self.rules).iter_mut() {
            // Each rule counts, also where another has already decided.
            let met = rule.meets(method, request);
            fault = fault.or(met);
        }
        fault
    }
}

async fn accept(listener: TcpListener, shared: Arc<Shared>) {
    for number in 0.. {
        match listener.accept().await {
            Ok(_) if shared.refusing.load(Ordering::SeqCst) => {}
            Ok((client, _)) => shared.spawn(link::run(Arc::clone(&shared), number, client)),
            Err(_) => tokio::task::yield_now().await,
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
