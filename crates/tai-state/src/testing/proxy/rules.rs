//! Which call meets which fault.

use std::collections::HashSet;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

/// A gRPC status code.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Code(pub u32);

/// From gRPC's `doc/statuscodes.md`.
#[allow(missing_docs)]
impl Code {
    pub const OK: Self = Self(0);
    pub const CANCELLED: Self = Self(1);
    pub const UNKNOWN: Self = Self(2);
    pub const INVALID_ARGUMENT: Self = Self(3);
    pub const DEADLINE_EXCEEDED: Self = Self(4);
    pub const NOT_FOUND: Self = Self(5);
    pub const ALREADY_EXISTS: Self = Self(6);
    pub const PERMISSION_DENIED: Self = Self(7);
    pub const RESOURCE_EXHAUSTED: Self = Self(8);
    pub const FAILED_PRECONDITION: Self = Self(9);
    pub const ABORTED: Self = Self(10);
    pub const INTERNAL: Self = Self(13);
    pub const UNAVAILABLE: Self = Self(14);
    pub const UNAUTHENTICATED: Self = Self(16);
}

/// What happens to a call. *Forwarded* without more means that the server gets it also if the client
/// has given up meanwhile.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Fault {
    /// It is not forwarded and never answered: only the client's deadline ends it.
    DropRequest,
    /// It is forwarded; when the server has answered, the stream is reset instead (HTTP/2's
    /// `INTERNAL_ERROR`, without a status).
    LoseReply,
    /// It is forwarded, and the answer held back for so long.
    Stall(Duration),
    /// It is held back for so long and then forwarded: a late landing.
    StallRequest(Duration),
    /// It is not forwarded; the answer is this status.
    Answer(Code),
    /// As [`Fault::Answer`], with a message.
    AnswerWith {
        /// The status.
        code: Code,
        /// What it says.
        message: String,
    },
    /// It is forwarded; when the server has answered, the client gets this status instead.
    AnswerAfter(Code),
    /// It is forwarded; the client gets so many messages of the answer and then this status.
    AnswerPart {
        /// So many messages.
        messages: u64,
        /// The status, whatever else the answer holds.
        code: Code,
    },
    /// It is forwarded so much later, unless the client has given up by then.
    Delay(Duration),
    /// It is forwarded twice, one after the other, and the second answer given. A call whose request
    /// is a stream passes as it is.
    Duplicate,
    /// It is not forwarded, and the client's connection ends.
    Reset,
    /// It is forwarded; when the server has answered, the client's connection ends.
    ResetAfter,
    /// It passes, and with its answer comes a GOAWAY: what is under way on the connection finishes,
    /// new calls need another one.
    GoAway,
}

/// When a rule meets a call.
#[derive(Clone)]
#[non_exhaustive]
pub enum When {
    /// Once: at this call since the rule was added, counted from 1.
    Nth(u64),
    /// At each call.
    Each,
    /// At each so-many-th call.
    Every(u64),
    /// In so many of 1000 calls, drawn from the seed (SplitMix64), so that a run can be had again.
    Chance {
        /// So many of 1000.
        per_mille: u32,
        /// Where the drawing begins.
        seed: u64,
    },
    /// At each call for whose request this is true. It is given the request's body as it is on the
    /// wire, each message behind gRPC's five bytes; of a stream of requests nothing.
    Matching(Arc<dyn Fn(&[u8]) -> bool + Send + Sync>),
    /// At the first call with a body; whoever sends the same bytes again passes.
    First,
}

impl fmt::Debug for When {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Nth(n) => f.debug_tuple("Nth").field(n).finish(),
            Self::Each => f.write_str("Each"),
            Self::Every(n) => f.debug_tuple("Every").field(n).finish(),
            Self::Chance { per_mille, seed } => {
                f.debug_struct("Chance").field("per_mille", per_mille).field("seed", seed).finish()
            }
            Self::Matching(_) => f.write_str("Matching(..)"),
            Self::First => f.write_str("First"),
        }
    }
}

/// A fault, and the calls that it meets.
#[derive(Debug, Clone)]
pub struct Rule {
    method: String,
    when: When,
    fault: Fault,
}

impl Rule {
    /// A rule for a method, named as in its service (`Commit`); `*` is each method.
    pub fn new(method: impl Into<String>, when: When, fault: Fault) -> Self {
        Self { method: method.into(), when, fault }
    }
}

/// A rule at work.
pub(super) struct Active {
    rule: Rule,
    calls: u64,
    random: u64,
    bodies: HashSet<Vec<u8>>,
}

impl Active {
    pub(super) fn new(rule: Rule) -> Self {
        let random = match rule.when {
            When::Chance { seed, .. } => seed,
            _ => 0,
        };
        Self { rule, calls: 0, random, bodies: HashSet::new() }
    }

    /// Counts a call, if it is one of its method, and says what happens to it.
    pub(super) fn meets(&mut self, method: &str, request: &[u8]) -> Option<Fault> {
        if self.rule.method != method && self.rule.method != "*" {
            return None;
        }
        self.calls += 1;
        let met = match &self.rule.when {
            When::Nth(n) => self.calls == *n,
            When::Each => true,
            When::Every(n) => self.calls.checked_rem(*n) == Some(0),
            When::Chance { per_mille, .. } => {
                split_mix(&mut self.random) % 1000 < u64::from(*per_mille)
            }
            When::Matching(matches) => matches(request),
            When::First => self.bodies.insert(request.to_vec()),
        };
        met.then(|| self.rule.fault.clone())
    }
}

/// SplitMix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators, 2014).
fn split_mix(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut drawn = *state;
    drawn = (drawn ^ (drawn >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    drawn = (drawn ^ (drawn >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    drawn ^ (drawn >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// At which of twelve calls, counted from 1, a rule meets. Every third body is new.
    fn met(when: When) -> Vec<u8> {
        let mut active = Active::new(Rule::new("Commit", when, Fault::Reset));
        let calls = (1..=12).filter(|n| active.meets("Commit", &[n / 3]).is_some());
        calls.collect()
    }

    #[test]
    fn a_rule_meets_the_calls_that_it_says() {
        assert_eq!(met(When::Nth(5)), [5]);
        assert_eq!(met(When::Nth(0)), [0; 0]);
        assert_eq!(met(When::Each), Vec::from_iter(1..=12));
        assert_eq!(met(When::Every(5)), [5, 10]);
        assert_eq!(met(When::Every(0)), [0; 0]);
        assert_eq!(met(When::First), [1, 3, 6, 9, 12]);
        assert_eq!(met(When::Matching(Arc::new(|body| body == [2]))), [6, 7, 8]);
    }

    #[test]
    fn calls_of_other_methods_are_not_counted() {
        let mut second = Active::new(Rule::new("Commit", When::Nth(2), Fault::Reset));
        let mut any = Active::new(Rule::new("*", When::Nth(2), Fault::Reset));
        let calls = ["Commit", "GetDocument", "Commit"];
        assert_eq!(calls.map(|method| second.meets(method, b"").is_some()), [false, false, true]);
        assert_eq!(calls.map(|method| any.meets(method, b"").is_some()), [false, true, false]);
    }

    #[test]
    fn chance_is_the_seeds_and_about_as_often_as_said() {
        let drawn = |per_mille, seed| {
            let when = When::Chance { per_mille, seed };
            let mut active = Active::new(Rule::new("*", when, Fault::Reset));
            Vec::from_iter((0..4000).map(|_| active.meets("Commit", b"").is_some()))
        };
        assert_eq!(drawn(250, 7), drawn(250, 7));
        assert_ne!(drawn(250, 7), drawn(250, 8));
        let often = drawn(250, 7).into_iter().filter(|met| *met).count();
        assert!((850..1150).contains(&often), "{often}");
        assert!(drawn(0, 7).into_iter().all(|met| !met));
        assert!(drawn(1000, 7).into_iter().all(|met| met));
    }

    #[test]
    fn the_generator_is_the_published_one() {
        // The first outputs for the seed 1234567, as other implementations give them.
        let mut state = 1_234_567;
        let drawn = [split_mix(&mut state), split_mix(&mut state)];
        assert_eq!(drawn, [6_457_827_717_110_365_317, 3_203_168_211_198_807_973]);
    }
}
