//! A counter behind a lock, whose holders are stopped for longer than their lease: behind a fence no
//! update is lost, and without one some are.

use std::collections::HashSet;
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use rustix::process::Signal;
use serde_json::Value;

use super::tree::{PATIENCE, Tree};
use crate::engine::{Engine, Store};
use crate::random::Random;
use crate::run::Tally;
use crate::tool;

/// A client: it does one section after the other, each under the lock, as long as the file is there.
/// The third descriptor keeps the pipe open as long as anything below runs.
const CLIENT: &str = r#"
exec 3>&1
RANDOM=$SEED
while [ -e "$GO" ]; do
    export PAUSE=$((RANDOM % (LONGEST + 1))) IS_DEAF=$((RANDOM % 100 < DEAF))
    "$BINARY" -o json locks run counter --ttl "$LEASE" --wait 5m -- bash -c "$SECTION"
    echo "ended $?"
done
"#;

/// Reads, thinks, and writes one more. Only the fence stands between it and a lost update: it expects no
/// version. Half of them hear no SIGTERM, so that `locks run` cannot keep them from writing too late.
/// Before that it does something outside of the store, to what keeps the newest token that it has seen and
/// takes no older one.
const SECTION: &str = r#"
[ "$IS_DEAF" = 0 ] || trap '' TERM
fence=()
[ "$IS_FENCED" = 0 ] || fence=(--fence "$TAI_LOCK_NAME=$TAI_LOCK_TOKEN")
value=$("$BINARY" -o json get --raw g/counter) || exit 20
echo "read $TAI_LOCK_TOKEN $value"
sleep "$((PAUSE / 1000)).$(printf %03d $((PAUSE % 1000)))"
exec 8>>"$RESOURCE"
flock 8
newest=$(tail -n 1 "$RESOURCE")
if [ "${newest:-0}" -lt "$TAI_LOCK_TOKEN" ]; then
    echo "$TAI_LOCK_TOKEN" >&8
    echo "outside $TAI_LOCK_TOKEN 1"
else
    echo "outside $TAI_LOCK_TOKEN 0"
fi
exec 8>&-
echo "try $TAI_LOCK_TOKEN $((value + 1))"
if error=$("$BINARY" -o json put g/counter --data $((value + 1)) "${fence[@]}" \
    --reason "token=$TAI_LOCK_TOKEN" 2>&1); then
    echo "done $TAI_LOCK_TOKEN $((value + 1))"
else
    echo "refused $TAI_LOCK_TOKEN $error"
    exit 21
fi
"#;

/// Longer than a lease and a section take, also on a busy machine.
const ANOTHER_WRITES: Duration = Duration::from_secs(10);

/// What the clients are made to do.
#[derive(Debug, Clone, Copy)]
struct Traffic {
    clients: usize,
    lease: Duration,
    /// How long a section lasts at most, by itself.
    longest: Duration,
    /// How many of a hundred sections hear no SIGTERM.
    deaf: u32,
    is_fenced: bool,
}

/// What a client says.
#[derive(Debug, Clone, PartialEq)]
enum Said {
    /// Under this token the counter was read.
    Read(u64),
    Try(u64),
    /// Whether what is outside of the store took it.
    Outside(u64, bool),
    /// Under this token this value was written: the exit code was 0.
    Done(u64, u64),
    Refused(u64, Value),
    /// What `locks run` says when it has lost the lock.
    Lost(Value),
    /// The exit code of `locks run`.
    Ended(i32),
    /// All of the client's processes have ended.
    Gone,
}

fn said(line: Option<&str>) -> Said {
    let Some(line) = line else { return Said::Gone };
    let (word, rest) = line.split_once(' ').unwrap_or((line, ""));
    let (token, rest) = rest.split_once(' ').unwrap_or((rest, ""));
    let number = |text: &str| text.parse().unwrap_or_else(|_| panic!("a client said {line:?}"));
    match word {
        "read" => Said::Read(number(token)),
        "try" => Said::Try(number(token)),
        "outside" => Said::Outside(number(token), number(rest) == 1),
        "done" => Said::Done(number(token), number(rest)),
        "refused" => Said::Refused(number(token), serde_json::from_str(rest).unwrap()),
        "ended" => Said::Ended(token.parse().unwrap()),
        _ => Said::Lost(serde_json::from_str(line).unwrap_or_else(|_| panic!("it said {line:?}"))),
    }
}

/// All clients of a store.
#[derive(Debug)]
struct Clients<'a> {
    store: &'a Store,
    trees: Vec<Tree>,
    heard: Receiver<(usize, Said)>,
    /// All that was heard.
    log: Vec<(usize, Said)>,
    /// Who is stopped, and until when.
    stopped: Vec<(usize, Instant)>,
    stops: usize,
    go: PathBuf,
}

impl<'a> Clients<'a> {
    fn start(store: &'a Store, traffic: Traffic, random: &mut Random) -> Self {
        store.run(&["put", "g/counter", "--data", "0"]).ok();
        let go = store.path("go");
        std::fs::write(&go, "").unwrap();
        let (sender, heard) = channel();
        let trees = (0..traffic.clients)
            .map(|client| {
                let mut command = super::bash(CLIENT);
                command.env("BINARY", tool::path()).env("TAI_STATE_URL", &store.url).env("GO", &go);
                command.env("RESOURCE", store.path("resource"));
                command.env("SECTION", SECTION).env("SEED", random.below(32_768).to_string());
                command.env("LEASE", format!("{}ms", traffic.lease.as_millis()));
                command.env("LONGEST", traffic.longest.as_millis().to_string());
                command.env("DEAF", traffic.deaf.to_string());
                command.env("IS_FENCED", u8::from(traffic.is_fenced).to_string());
                let sender = sender.clone();
                Tree::start_told(command, move |line| {
                    let _ = sender.send((client, said(line)));
                })
            })
            .collect();
        Self { store, trees, heard, log: Vec::new(), stopped: Vec::new(), stops: 0, go }
    }

    /// Stops all processes of a client for so long.
    fn stop(&mut self, client: usize, how_long: Duration) {
        self.trees[client].signal_all(Signal::STOP);
        self.stopped.push((client, Instant::now() + how_long));
        self.stops += 1;
    }

    fn is_stopped(&self, client: usize) -> bool {
        self.stopped.iter().any(|(stopped, _)| *stopped == client)
    }

    /// Lets those go on whose time has come.
    fn resume(&mut self, now: Option<Instant>) {
        let is_over = |until: Instant| now.is_none_or(|now| until <= now);
        for (client, _) in self.stopped.extract_if(.., |(_, until)| is_over(*until)) {
            self.trees[client].signal_all(Signal::CONT);
        }
    }

    /// Listens until then, or until something is said that was waited for; and who said it.
    fn listen(
        &mut self,
        until: Instant,
        wanted: impl Fn(&Self, usize, &Said) -> bool,
    ) -> Option<usize> {
        loop {
            let now = Instant::now();
            self.resume(Some(now));
            if now >= until {
                return None;
            }
            let resumes = self.stopped.iter().map(|(_, until)| *until);
            let wait = resumes.chain([until]).min().unwrap().saturating_duration_since(now);
            match self.heard.recv_timeout(wait) {
                Ok((client, said)) => {
                    let is_wanted = wanted(self, client, &said);
                    self.log.push((client, said));
                    if is_wanted {
                        return Some(client);
                    }
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => panic!("all clients have ended"),
            }
        }
    }

    /// Lets all of them come to an end, and says what came of it.
    fn ended(mut self) -> Outcome {
        std::fs::remove_file(&self.go).unwrap();
        self.resume(None);
        let end = Instant::now() + PATIENCE;
        for _ in 0..self.trees.len() {
            let gone = self.listen(end, |_, _, said| *said == Said::Gone);
            assert!(gone.is_some(), "clients still run: {:?}", self.log);
        }
        Outcome::new(self.store, self.log, self.stops)
    }
}

/// What came of a run.
#[derive(Debug)]
struct Outcome {
    /// The writes as the store has them: token and value.
    written: Vec<(u64, u64)>,
    counter: u64,
    /// Writes that were answered with the exit code 0.
    done: Vec<(u64, u64)>,
    /// Writes of which nobody knows: whoever waited for the answer was killed before.
    unknown: HashSet<u64>,
    /// Writes that were refused since the lock was lost.
    refused: HashSet<u64>,
    /// Tokens that were older than what the resource outside had seen.
    too_old_outside: HashSet<u64>,
    taken_outside: usize,
    /// How often `locks run` lost the lock.
    losses: usize,
    sections: usize,
    stops: usize,
}

impl Outcome {
    /// Reads the log of both sides. What must be true in any case is looked at here: what was
    /// acknowledged is there, what was refused is not, and no two clients had the same token.
    fn new(store: &Store, log: Vec<(usize, Said)>, stops: usize) -> Self {
        let history = store.run(&["-o", "jsonl", "history", "g/counter"]).ok().lines();
        let written: Vec<(u64, u64)> = history[1..]
            .iter()
            .map(|event| {
                let reason = event["metadata"]["reason"].as_str().unwrap();
                let token = reason.strip_prefix("token=").unwrap().parse().unwrap();
                (token, event["to_state"].as_u64().unwrap())
            })
            .collect();
        let counter = store.json(&["get", "g/counter", "--raw"]).ok().json().as_u64().unwrap();
        let (mut done, mut losses, mut sections) = (Vec::new(), 0, 0);
        let (mut tokens, mut unknown, mut refused, mut too_old_outside) =
            (HashSet::new(), HashSet::new(), HashSet::new(), HashSet::new());
        let mut taken_outside = 0;
        for (client, said) in &log {
            match said {
                Said::Read(token) => {
                    assert!(tokens.insert(*token), "token {token} was granted twice: {log:?}");
                    sections += 1;
                }
                Said::Try(token) => drop(unknown.insert(*token)),
                Said::Outside(_, true) => taken_outside += 1,
                Said::Outside(token, false) => drop(too_old_outside.insert(*token)),
                Said::Done(token, value) => {
                    unknown.remove(token);
                    done.push((*token, *value));
                }
                Said::Refused(token, error) if error["code"] == "lock_lost" => {
                    unknown.remove(token);
                    refused.insert(*token);
                }
                Said::Refused(_, error) => assert_eq!(error["code"], "outcome_unknown", "{error}"),
                Said::Lost(error) => {
                    assert_eq!(error["code"], "lock_lost", "{error}");
                    losses += 1;
                }
                Said::Ended(code) => assert!([0, 4, 21].contains(code), "client {client}: {code}"),
                Said::Gone => {}
            }
        }
        for write in &done {
            let times = written.iter().filter(|other| *other == write).count();
            assert_eq!(times, 1, "{write:?} was acknowledged: {written:?}");
        }
        for (token, value) in &written {
            assert!(!refused.contains(token), "{token} was refused, and wrote {value}");
            let is_known = done.contains(&(*token, *value)) || unknown.contains(token);
            assert!(is_known, "nobody wrote {value} under token {token}");
        }
        store.verified();
        Self {
            written,
            counter,
            done,
            unknown,
            refused,
            too_old_outside,
            taken_outside,
            losses,
            sections,
            stops,
        }
    }

    /// Updates that are not in the counter, though they were written.
    fn lost_updates(&self) -> usize {
        self.written.len().saturating_sub(usize::try_from(self.counter).unwrap())
    }

    /// How often a write was accepted after one under a newer token.
    fn falls(&self) -> usize {
        self.written.windows(2).filter(|pair| pair[1].0 <= pair[0].0).count()
    }

    fn said(&self, what: &str) {
        println!(
            "{what}: {} sections, {} stops, {} acknowledged, {} refused, {} unknown, {} locks lost; \
             {} written, the counter is {}: {} lost updates, {} writes under an older token",
            self.sections,
            self.stops,
            self.done.len(),
            self.refused.len(),
            self.unknown.len(),
            self.losses,
            self.written.len(),
            self.counter,
            self.lost_updates(),
            self.falls(),
        );
    }

    /// Nothing is lost: the values are 1, 2, 3 …, all that was acknowledged and at most what nobody
    /// knows of, and tokens only rise.
    fn nothing_is_lost(&self, what: &str, tally: &mut Tally) {
        let values: Vec<u64> = self.written.iter().map(|(_, value)| *value).collect();
        let all: Vec<u64> = (1..=self.written.len() as u64).collect();
        tally.holds(values == all && self.counter == self.written.len() as u64, || {
            format!("{what}: an update is lost: {:?}", self.written)
        });
        let (least, most) = (self.done.len(), self.done.len() + self.unknown.len());
        tally.holds((least..=most).contains(&self.written.len()), || {
            format!("{what}: {} were written, {least} to {most} were asked for", self.written.len())
        });
        tally.holds(self.falls() == 0, || {
            format!("{what}: written under an older token: {:?}", self.written)
        });
        // Both sides of the fence agree: a newer holder had been there.
        let outside = self.done.iter().find(|(token, _)| self.too_old_outside.contains(token));
        tally.holds(outside.is_none(), || {
            format!("{what}: {outside:?} was too old for a resource outside, and was written")
        });
        tally.count("deeds outside of the store under a token", self.taken_outside as u64);
        tally.count("of older tokens refused outside", self.too_old_outside.len() as u64);
        tally.count("sections under a lock", self.sections as u64);
        tally.count("holders stopped", self.stops as u64);
        tally.count("locks lost while stopped", self.losses as u64);
        tally.count("fenced writes acknowledged", self.done.len() as u64);
        tally.count("fenced writes refused", self.refused.len() as u64);
    }
}

/// Five clients, of whom every five seconds one is stopped, for up to three leases.
pub(crate) fn behind_a_fence(engine: Engine, seconds: u64, mut random: Random) -> Tally {
    let mut tally = Tally::default();
    let what = format!("5 clients on {}", engine.name());
    let traffic = Traffic {
        clients: 5,
        lease: Duration::from_secs(2),
        longest: Duration::from_secs(2),
        deaf: 50,
        is_fenced: true,
    };
    let store = engine.store();
    let mut clients = Clients::start(&store, traffic, &mut random);
    let (every, end) = (Duration::from_secs(5), Instant::now() + Duration::from_secs(seconds));
    let mut next = Instant::now() + every;
    while next < end {
        clients.listen(next, |_, _, _| false);
        next += every;
        let how_long = Duration::from_millis(500 + random.below(5_501));
        // Every other time whoever comes; else who has read, or is about to write, so that it is
        // late for sure.
        if clients.stops.is_multiple_of(2) {
            let writes = clients.stops % 4 == 2;
            let begins = |clients: &Clients<'_>, client, said: &Said| {
                let is_there = if writes {
                    matches!(said, Said::Try(_))
                } else {
                    matches!(said, Said::Read(_))
                };
                is_there && !clients.is_stopped(client)
            };
            let Some(client) = clients.listen(end, begins) else { break };
            clients.stop(client, how_long.max(traffic.lease * 3 / 2));
        } else {
            let awake = (0..traffic.clients).filter(|client| !clients.is_stopped(*client));
            let awake: Vec<usize> = awake.collect();
            let one = usize::try_from(random.below(awake.len() as u64)).unwrap();
            clients.stop(awake[one], how_long);
        }
    }
    clients.listen(end, |_, _, _| false);
    let outcome = clients.ended();
    outcome.said(&what);
    outcome.nothing_is_lost(&what, &mut tally);
    let is_enough = outcome.done.len() as u64 >= seconds / 6 && outcome.losses > 0;
    tally.count("runs with enough writes and somebody late", u64::from(is_enough));
    tally
}

/// One after the other, clients are stopped in their section until another has written; they hear no
/// SIGTERM, and go on to write what is out of date by then.
fn late_writers(engine: Engine, is_fenced: bool, random: &mut Random) -> Outcome {
    let traffic = Traffic {
        clients: 3,
        lease: Duration::from_millis(400),
        longest: Duration::from_millis(800),
        deaf: 100,
        is_fenced,
    };
    let store = engine.store();
    let mut clients = Clients::start(&store, traffic, random);
    let patience = Instant::now() + PATIENCE;
    for _ in 0..2 {
        let late = loop {
            let reads = |_: &Clients<'_>, _, said: &Said| matches!(said, Said::Read(_));
            let late = clients.listen(patience, reads).expect("nobody has read for long");
            clients.stop(late, PATIENCE);
            let writes = |_: &Clients<'_>, client, said: &Said| {
                client != late && matches!(said, Said::Done(..))
            };
            // Who is stopped in the middle of a commit keeps the file to itself: then another one is.
            if clients.listen(Instant::now() + ANOTHER_WRITES, writes).is_some() {
                break late;
            }
            clients.resume(None);
        };
        clients.resume(None);
        let ends =
            |_: &Clients<'_>, client, said: &Said| client == late && matches!(said, Said::Ended(_));
        clients.listen(patience, ends).expect("the late one has not ended for long");
    }
    clients.ended()
}

/// The same late writers, with the fence and without: it is the fence that keeps the counter.
pub(crate) fn late(engine: Engine, mut random: Random) -> Tally {
    let mut tally = Tally::default();
    let what = format!("late writers on {}", engine.name());
    let fenced = late_writers(engine, true, &mut random);
    fenced.said(&format!("{what}, with a fence"));
    fenced.nothing_is_lost(&what, &mut tally);
    tally.count(
        "runs of late writers of whom one was refused",
        u64::from(!fenced.refused.is_empty()),
    );
    let mut runs = 0;
    let lost = (1..=5).any(|run| {
        runs = run;
        let without = late_writers(engine, false, &mut random);
        without.said(&format!("{what}, without a fence, run {run}"));
        tally.holds(without.refused.is_empty(), || format!("{what}: refused without a fence"));
        without.lost_updates() > 0 && without.falls() > 0
    });
    tally.control("no fence: an update is lost in one of 5 runs", u64::from(lost), runs, 1);
    tally
}
