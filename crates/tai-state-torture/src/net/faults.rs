//! One fault after the other, while money is moved, elements are appended and locks are held.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tai_state::testing::emulator::Emulator;
use tai_state::testing::proxy::{Code, Fault, Proxy, Rule, When};
use tokio::task::JoinSet;

use super::append::{Append, blind};
use super::bank::Bank;
use super::field::{APPEND, BANK, Field, LOCKS};
use super::locks::Locks;
use super::{Behind, is_short, options};
use crate::random::Random;
use crate::run::{Run, Tally};

/// What is done to the line, or to who stands at its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum What {
    Nothing,
    /// Each call takes so many milliseconds longer.
    Latency(u64),
    /// So many bytes a second.
    Trickle(u64),
    /// Connections stay open and new ones are accepted, but one direction is dead, or both.
    HalfOpen {
        to_server: bool,
        to_client: bool,
    },
    /// The line is cut, and what is connected anew is never answered.
    NeverAnswers,
    Resets,
    GoAways,
    /// Each call is answered UNAVAILABLE.
    Unavailable,
    /// Nobody can connect.
    Refused,
    /// Requests and answers are lost, late, doubled, and said to have failed.
    Lossy,
    /// SIGSTOP.
    Stopped,
}

const ALL: [What; 13] = [
    What::Nothing,
    What::Latency(50),
    What::Latency(500),
    What::Trickle(1024),
    What::HalfOpen { to_server: true, to_client: false },
    What::HalfOpen { to_server: false, to_client: true },
    What::NeverAnswers,
    What::Resets,
    What::GoAways,
    What::Unavailable,
    What::Refused,
    What::Lossy,
    What::Stopped,
];

impl What {
    /// How long it lasts.
    fn lasts(self, is_short: bool) -> Duration {
        Duration::from_secs(match (is_short, self) {
            (true, Self::Stopped) => 3,
            (true, _) => 2,
            (false, Self::Unavailable) => 60,
            (false, Self::Nothing) => 5,
            (false, _) => 10,
        })
    }

    fn begin(self, proxy: &Proxy, emulator: &Emulator, random: &mut Random) {
        let mut some = |method: &str, per_mille, fault| {
            let when = When::Chance { per_mille, seed: random.next() };
            proxy.inject(Rule::new(method, when, fault));
        };
        match self {
            Self::Nothing => {}
            Self::Latency(ms) => {
                proxy.inject(Rule::new("*", When::Each, Fault::Delay(Duration::from_millis(ms))));
            }
            Self::Trickle(rate) => proxy.trickle(Some(rate)),
            Self::HalfOpen { to_server, to_client } => proxy.half_open(to_server, to_client),
            Self::NeverAnswers => {
                proxy.half_open(true, true);
                proxy.cut();
            }
            Self::Resets => {
                some("*", 30, Fault::Reset);
                some("*", 30, Fault::ResetAfter);
                some("BatchGetDocuments", 30, Fault::LoseReply);
            }
            Self::GoAways => some("*", 100, Fault::GoAway),
            Self::Unavailable => {
                proxy.inject(Rule::new("*", When::Each, Fault::Answer(Code::UNAVAILABLE)));
            }
            Self::Refused => {
                proxy.refuse(true);
                proxy.cut();
            }
            Self::Lossy => {
                let late = Duration::from_millis(1_200);
                some("Commit", 30, Fault::LoseReply);
                some("Commit", 15, Fault::DropRequest);
                some("Commit", 30, Fault::Duplicate);
                some("Commit", 15, Fault::StallRequest(late));
                some("Commit", 15, Fault::Stall(late));
                for code in [
                    Code::UNAVAILABLE,
                    Code::DEADLINE_EXCEEDED,
                    Code::INTERNAL,
                    Code::UNKNOWN,
                    Code::CANCELLED,
                ] {
                    some("Commit", 20, Fault::AnswerAfter(code));
                    some("*", 10, Fault::Answer(code));
                }
                some("*", 20, Fault::Answer(Code::ABORTED));
                some("*", 10, Fault::Answer(Code::RESOURCE_EXHAUSTED));
            }
            Self::Stopped => emulator.pause().unwrap(),
        }
    }

    fn end(self, proxy: &Proxy, emulator: &Emulator) {
        proxy.clear_rules();
        proxy.trickle(None);
        proxy.half_open(false, false);
        proxy.refuse(false);
        if self == Self::Stopped {
            emulator.resume().unwrap();
        }
    }
}

pub(super) async fn run(run: &Run, emulator: &Arc<Emulator>, tally: &mut Tally) {
    let is_short = is_short(run);
    let (attempt, deadline) = match is_short {
        true => (Duration::from_millis(500), Duration::from_millis(1_500)),
        false => (Duration::from_secs(1), Duration::from_secs(4)),
    };
    // Faults come in rounds; each round has them all, in an order of its own.
    let rounds = run.size(1, 3);
    for (n, mut random) in run.rounds(rounds) {
        round(n, is_short, (attempt, deadline), &mut random, emulator, tally).await;
    }
    tally.at_least("transfers", 100 * rounds);
    tally.at_least("audits", 20 * rounds);
    tally.at_least("elements appended", 100 * rounds);
    tally.at_least("fenced writes", 20 * rounds);
    let behind = Behind::new(emulator).await;
    let wrong = blind(&behind, options(8, attempt, deadline), 20).await;
    tally.control("a client takes what it does not know for not done", wrong, 20, 18);
}

async fn round(
    n: u64,
    is_short: bool,
    (attempt, deadline): (Duration, Duration),
    random: &mut Random,
    emulator: &Arc<Emulator>,
    tally: &mut Tally,
) {
    let behind = Behind::new(emulator).await;
    let options = options(8, attempt, deadline);
    let handles = [behind.store(options.clone()).await, behind.store(options).await];
    let field = Arc::new(Field::new(deadline, attempt));
    let (bank, append) = (Bank::open(&behind.direct).await, Arc::<Append>::default());
    let locks = Arc::<Locks>::default();
    let mut tasks = JoinSet::new();
    bank.start(&field, &handles, random, &mut tasks);
    append.start(&field, &handles, random, &mut tasks);
    locks.start(&field, &handles, random, &mut tasks);
    let mut order = ALL.to_vec();
    for last in (1..order.len()).rev() {
        order.swap(last, random.below(last as u64 + 1) as usize);
    }
    let started = Instant::now();
    for what in order {
        field.now(&format!("round {n}, {what:?}"));
        let (from, before) = (started.elapsed(), field.done());
        what.begin(&behind.proxy, emulator, random);
        tokio::time::sleep(what.lasts(is_short)).await;
        let during = field.done();
        what.end(&behind.proxy, emulator);
        let back = field.back_again().await;
        tally.count("faults", 1);
        tally.highest("ms at most from healing to success of all three", back.as_millis() as u64);
        let did = |workload: usize| during[workload] - before[workload];
        println!(
            "  {:5.1} s: {what:?}: {} transfers, {} appends, {} fenced writes; back in {} ms",
            from.as_secs_f64(),
            did(BANK),
            did(APPEND),
            did(LOCKS),
            back.as_millis()
        );
    }
    field.now(&format!("round {n}, in the end"));
    field.end();
    while let Some(ended) = tasks.join_next().await {
        tally.holds(ended.is_ok(), || format!("round {n}: a task panicked"));
    }
    field.judge(tally);
    tally.count("calls at the wire", behind.proxy.usage().calls.values().sum());
    bank.judge(&behind.direct, tally).await;
    append.judge(&behind.direct, tally).await;
    locks.judge(&behind.direct, tally).await;
    let report = behind.direct.verify(|_| {}).await.unwrap();
    tally.holds(report.ok, || format!("round {n}: verify: {:?}", report.problems));
    tally.count("events proved", report.events);
}
