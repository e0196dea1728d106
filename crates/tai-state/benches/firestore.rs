//! What a transition costs on Firestore's emulator, as ratios within one run: our `log_transition`
//! against a bare `Commit` of the same two documents, and against the usual transaction (begin, get,
//! commit).
//!
//! `cargo bench -p tai-state --bench firestore`

#![allow(missing_docs, clippy::unwrap_used, clippy::indexing_slicing, clippy::disallowed_methods)]

use std::collections::HashMap;
use std::time::{Duration, Instant};

use googleapis_tonic_google_firestore_v1::google::firestore::v1 as proto;
use proto::batch_get_documents_request::ConsistencySelector;
use proto::batch_get_documents_response::Result as Got;
use proto::firestore_client::FirestoreClient;
use proto::precondition::ConditionType;
use proto::value::ValueType;
use proto::{BatchGetDocumentsRequest, BeginTransactionRequest, CommitRequest};
use serde_json::json;
use tai_state::testing::emulator::{Emulator, fresh_project};
use tai_state::{ChangeMetadata, FirestoreStore, StateMachinePersister, StateSnapshot};
use tonic::Request;
use tonic::transport::{Channel, Endpoint};

/// States that take turns: the emulator slows down with the past versions of one document.
const STATES: usize = 100;
const WARM_UP: usize = 300;
const ROUNDS: usize = 2_000;

type Raw = FirestoreClient<Channel>;

/// What a bare client writes: the same documents that the store writes, elsewhere.
struct Bare {
    client: Raw,
    database: String,
    governor: &'static str,
    event: proto::Document,
    head: proto::Document,
    /// By state: its version and when its head was last changed.
    known: HashMap<usize, (u64, prost_types::Timestamp)>,
    calls: u64,
}

fn request<T>(database: &str, message: T) -> Request<T> {
    let mut request = Request::new(message);
    let metadata = request.metadata_mut();
    metadata.insert("authorization", "Bearer owner".parse().unwrap());
    metadata.insert("google-cloud-resource-prefix", database.parse().unwrap());
    request.set_timeout(Duration::from_secs(10));
    request
}

impl Bare {
    fn name(&self, kind: &str, id: &str) -> String {
        format!("{}/documents/governors/{}/{kind}/{id}", self.database, self.governor)
    }

    /// The document of a version: whatever changes from one version to the next changes here too,
    /// since the emulator's indexes change with it.
    fn document(&self, template: &proto::Document, name: String, version: u64) -> proto::Document {
        let mut fields = template.fields.clone();
        let number = i64::try_from(version).unwrap();
        let changing = self.calls;
        for (key, value) in &mut fields {
            match (key.as_str(), &mut value.value_type) {
                ("version" | "from_version", Some(ValueType::IntegerValue(n))) => *n = number,
                ("hash" | "prev_hash", Some(ValueType::StringValue(text))) => {
                    *text = format!("{changing:064x}");
                }
                ("id" | "event_id", Some(ValueType::StringValue(text))) => {
                    *text = format!("{changing:036x}");
                }
                ("timestamp", Some(ValueType::TimestampValue(time))) => {
                    time.seconds += number;
                }
                ("state" | "to_state" | "from_state", Some(ValueType::MapValue(map))) => {
                    map.fields.insert("count".into(), integer(number));
                }
                ("causality", Some(ValueType::MapValue(map))) => {
                    map.fields.values_mut().for_each(|count| *count = integer(number));
                }
                _ => {}
            }
        }
        proto::Document { name, fields, ..proto::Document::default() }
    }

    fn writes(&self, state: usize, guarded: bool) -> Vec<proto::Write> {
        let known = self.known.get(&state);
        let version = known.map_or(0, |(version, _)| *version) + 1;
        let write = |document, condition| proto::Write {
            operation: Some(proto::write::Operation::Update(document)),
            current_document: guarded
                .then_some(proto::Precondition { condition_type: Some(condition) }),
            ..proto::Write::default()
        };
        let event = self.name("events", &format!("s{state}~{version:020}"));
        let head = self.name("states", &format!("s{state}"));
        let guard =
            known.map_or(ConditionType::Exists(false), |(_, t)| ConditionType::UpdateTime(*t));
        vec![
            write(self.document(&self.event, event, version), ConditionType::Exists(false)),
            write(self.document(&self.head, head, version), guard),
        ]
    }

    async fn commit(&mut self, state: usize, transaction: bytes::Bytes) {
        let guarded = transaction.is_empty();
        let (database, writes) = (self.database.clone(), self.writes(state, guarded));
        let message = CommitRequest { database, writes, transaction };
        let answer = self.client.commit(request(&self.database, message)).await.unwrap();
        self.calls += 1;
        let time = answer.into_inner().write_results[1].update_time.unwrap();
        let version = self.known.get(&state).map_or(0, |(version, _)| *version) + 1;
        self.known.insert(state, (version, time));
    }

    /// The usual way: begin, get, commit with both writes.
    async fn transact(&mut self, state: usize) {
        let begin = BeginTransactionRequest { database: self.database.clone(), options: None };
        let begun = self.client.begin_transaction(request(&self.database, begin)).await.unwrap();
        let transaction = begun.into_inner().transaction;
        let get = BatchGetDocumentsRequest {
            database: self.database.clone(),
            documents: vec![self.name("states", &format!("s{state}"))],
            consistency_selector: Some(ConsistencySelector::Transaction(transaction.clone())),
            ..BatchGetDocumentsRequest::default()
        };
        let answers = self.client.batch_get_documents(request(&self.database, get)).await.unwrap();
        let mut answers = answers.into_inner();
        while answers.message().await.unwrap().is_some() {}
        self.calls += 2;
        self.commit(state, transaction).await;
    }
}

fn integer(number: i64) -> proto::Value {
    proto::Value { value_type: Some(ValueType::IntegerValue(number)) }
}

fn median(times: &mut [Duration]) -> Duration {
    times.sort_unstable();
    times[times.len() / 2]
}

#[tokio::main]
async fn main() {
    let Some(emulator) = Emulator::shared().await else { return };
    let project = fresh_project();
    let builder = FirestoreStore::builder(&project).emulator(emulator.address());
    let store = builder.connect().await.unwrap();
    // Two documents each time.
    let config = tai_state::PersistenceConfig {
        snapshot_interval: 0,
        ..tai_state::PersistenceConfig::default()
    };
    let persister = StateMachinePersister::new(store.clone(), config);
    let why = || ChangeMetadata::new("bench", "to measure", None);
    let data = |n: usize| {
        json!({"status": "open", "count": n, "owner": "ada", "tags": ["a", "b"],
               "note": "about two hundred bytes of ordinary state, as a controller would keep them"})
    };

    let mut heads: HashMap<usize, StateSnapshot> = HashMap::new();
    let log = async |state: usize, n: usize, from: Option<&StateSnapshot>| {
        let to = StateSnapshot::new(format!("s{state}").into(), data(n), why());
        persister.log_transition("ours", from, &to, "step", why()).await.unwrap().to_state
    };
    // The same two documents for the bare client: those of a second version.
    let first = log(0, 0, None).await;
    heads.insert(0, log(0, 1, Some(&first)).await);

    let endpoint = Endpoint::from_shared(format!("http://{}", emulator.address())).unwrap();
    let mut client = FirestoreClient::new(endpoint.connect().await.unwrap());
    let database = format!("projects/{project}/databases/(default)");
    let ours = format!("{database}/documents/governors/ours");
    let names = vec![format!("{ours}/events/s0~{:020}", 2), format!("{ours}/states/s0")];
    let get = BatchGetDocumentsRequest {
        database: database.clone(),
        documents: names.clone(),
        ..BatchGetDocumentsRequest::default()
    };
    let answers = client.batch_get_documents(request(&database, get)).await.unwrap();
    let mut answers = answers.into_inner();
    let mut found = HashMap::new();
    while let Some(answer) = answers.message().await.unwrap() {
        if let Some(Got::Found(document)) = answer.result {
            found.insert(document.name.clone(), document);
        }
    }
    let bare = |governor| Bare {
        client: client.clone(),
        database: database.clone(),
        governor,
        event: found[&names[0]].clone(),
        head: found[&names[1]].clone(),
        known: HashMap::new(),
        calls: 0,
    };
    let (mut committing, mut transacting) = (bare("commit"), bare("transaction"));

    let mut times: [Vec<Duration>; 3] = Default::default();
    for round in 0..WARM_UP + ROUNDS {
        let state = round % STATES;
        // Each goes first as often as the others.
        for turn in 0..3 {
            let which = (round + turn) % 3;
            let started = Instant::now();
            match which {
                0 => {
                    let to = log(state, round, heads.get(&state)).await;
                    heads.insert(state, to);
                }
                1 => committing.commit(state, bytes::Bytes::new()).await,
                _ => transacting.transact(state).await,
            }
            if round >= WARM_UP {
                times[which].push(started.elapsed());
            }
        }
    }
    let [ours, commit, transaction] = times.each_mut().map(|times| median(times));
    let of = |a: Duration, b: Duration| a.as_secs_f64() / b.as_secs_f64();
    println!("{ROUNDS} transitions of {STATES} states, one after the other, medians:");
    println!("  our log_transition          {ours:>10.1?}  1 call");
    println!(
        "  a bare Commit               {commit:>10.1?}  1 call   ours is {:.2} of it",
        of(ours, commit)
    );
    println!(
        "  begin, get, commit          {transaction:>10.1?}  {} calls  ours is {:.2} of it",
        transacting.calls / (WARM_UP + ROUNDS) as u64,
        of(ours, transaction)
    );
}
