//! The exact checker: a history with versions, judged in one pass.
//!
//! Every write has a value of its own and every change a version, so who wrote what, who read it and who
//! came next is known, not searched for. What remains is one graph that must have no cycle.

use std::collections::{BTreeMap, HashMap};

/// One step of a transaction that was told which version it met or made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Step {
    /// It saw this version with this value; version 0 has none.
    Read { key: u64, version: u64, value: Option<u64> },
    /// It wrote this value; which version it made is known of those that were acknowledged.
    Write { key: u64, version: Option<u64>, value: u64 },
}

/// What the client was told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Told {
    /// It was done.
    Done,
    /// Nothing was done.
    Refused,
    /// Nothing, or nothing certain.
    Unknown,
}

/// A transaction: when it was asked for, when the client was told, and what.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Deed {
    pub(crate) asked: u64,
    pub(crate) ended: u64,
    pub(crate) told: Told,
    pub(crate) steps: Vec<Step>,
}

/// What the store's log says in the end: for each key the values of versions 1, 2, 3 …
pub(crate) type Log = BTreeMap<u64, Vec<u64>>;

/// So many faults say what it is.
const FAULTS: usize = 10;

/// What no strictly serializable store can have done. Linear, but for sorting.
pub(crate) fn faults(deeds: &[Deed], log: &Log) -> Vec<String> {
    let mut faults = Faults::default();
    let (writers, places) = writers(deeds, log, &mut faults);
    let mut happened: Vec<bool> = deeds.iter().map(|deed| deed.told == Told::Done).collect();
    writers.values().for_each(|n| happened[*n] = true);
    for (n, deed) in deeds.iter().enumerate() {
        told_true(n, deed, log, &places, &mut faults);
    }
    // An order that does not exist would hide behind what is wrong already.
    if faults.0.is_empty() {
        never_older(deeds, &mut faults);
        in_one_order(deeds, &happened, &writers, log, &mut faults);
    }
    faults.0
}

#[derive(Debug, Default)]
struct Faults(Vec<String>);

impl Faults {
    fn is(&mut self, fault: impl FnOnce() -> String) {
        if self.0.len() < FAULTS {
            self.0.push(fault());
        }
    }
}

/// Who made each version of each key.
type Writers = HashMap<(u64, u64), usize>;
/// Which version each value of each key is.
type Places = HashMap<(u64, u64), u64>;

/// Each value of the log was asked for by exactly one, and stands there once.
fn writers(deeds: &[Deed], log: &Log, faults: &mut Faults) -> (Writers, Places) {
    let mut asked: HashMap<(u64, u64), usize> = HashMap::new();
    for (n, deed) in deeds.iter().enumerate() {
        for step in &deed.steps {
            if let Step::Write { key, value, .. } = step
                && asked.insert((*key, *value), n).is_some()
            {
                faults.is(|| format!("key {key}: {value} was asked for twice"));
            }
        }
    }
    let mut writers = HashMap::new();
    let mut places = Places::new();
    for (key, values) in log {
        for (version, value) in (1..).zip(values) {
            match asked.get(&(*key, *value)) {
                Some(n) => drop(writers.insert((*key, version), *n)),
                None => faults.is(|| format!("key {key} v{version}: nobody wrote {value}")),
            }
            if let Some(before) = places.insert((*key, *value), version) {
                faults.is(|| format!("key {key}: {value} is v{before} and v{version}"));
            }
        }
    }
    (writers, places)
}

/// What a client was told is what the log says.
fn told_true(n: usize, deed: &Deed, log: &Log, places: &Places, faults: &mut Faults) {
    let at = |key: u64, version: u64| {
        let index = usize::try_from(version).ok().and_then(|version| version.checked_sub(1));
        index.and_then(|index| log.get(&key)?.get(index)).copied()
    };
    let (mut there, mut writes) = (0, 0);
    for step in &deed.steps {
        match step {
            Step::Read { key, version, value } if deed.told == Told::Done => {
                if at(*key, *version) != *value {
                    let is = at(*key, *version);
                    faults
                        .is(|| format!("key {key} v{version} is {is:?} and was read as {value:?}"));
                }
            }
            Step::Read { .. } => {}
            Step::Write { key, version, value } => {
                writes += 1;
                let made = places.get(&(*key, *value)).copied();
                there += u64::from(made.is_some());
                match deed.told {
                    Told::Done if made.is_none() => {
                        faults.is(|| format!("key {key}: {value} was acknowledged and is lost"));
                    }
                    Told::Done if version.is_some() && made != *version => faults.is(|| {
                        format!("key {key}: {value} is {made:?}, acknowledged as {version:?}")
                    }),
                    Told::Refused if made.is_some() => {
                        faults.is(|| format!("key {key}: {value} was refused and is {made:?}"));
                    }
                    _ => {}
                }
            }
        }
    }
    if there != 0 && there != writes && deed.told != Told::Refused {
        faults.is(|| format!("deed {n}: {there} of its {writes} writes are there"));
    }
}

/// Who begins after another was told sees nothing older than that one.
fn never_older(deeds: &[Deed], faults: &mut Faults) {
    let done: Vec<&Deed> = deeds.iter().filter(|deed| deed.told == Told::Done).collect();
    let mut begins = done.clone();
    begins.sort_by_key(|deed| deed.asked);
    let mut ends = done;
    ends.sort_by_key(|deed| deed.ended);
    let mut ends = ends.into_iter().peekable();
    let mut newest: HashMap<u64, u64> = HashMap::new();
    for deed in begins {
        while let Some(over) = ends.next_if(|over| over.ended < deed.asked) {
            for (key, version) in over.steps.iter().filter_map(met) {
                let is = newest.entry(key).or_default();
                *is = version.max(*is);
            }
        }
        for step in &deed.steps {
            let Some((key, version)) = met(step) else { continue };
            let known = newest.get(&key).copied().unwrap_or(0);
            let least = known + u64::from(matches!(step, Step::Write { .. }));
            if version < least {
                faults.is(|| format!("key {key}: v{version} after v{known} was known: {step:?}"));
            }
        }
    }
}

/// The key and version that a step met or made.
fn met(step: &Step) -> Option<(u64, u64)> {
    match step {
        Step::Read { key, version, .. } => Some((*key, *version)),
        Step::Write { key, version, .. } => version.map(|version| (*key, version)),
    }
}

/// There is an order of all deeds that explains what each saw, and in which nobody who began after
/// another was told stands before that one.
fn in_one_order(
    deeds: &[Deed],
    happened: &[bool],
    writers: &Writers,
    log: &Log,
    faults: &mut Faults,
) {
    let mut graph = Graph::new(deeds.len());
    for (key, values) in log {
        for version in 2..=values.len() as u64 {
            let pair = (writers.get(&(*key, version - 1)), writers.get(&(*key, version)));
            if let (Some(before), Some(after)) = pair {
                graph.edge(*before, *after);
            }
        }
    }
    for (n, deed) in deeds.iter().enumerate() {
        for step in &deed.steps {
            let (Step::Read { key, version, .. }, Told::Done) = (step, deed.told) else { continue };
            if let Some(writer) = writers.get(&(*key, *version)) {
                graph.edge(*writer, n);
            }
            if let Some(next) = writers.get(&(*key, *version + 1)) {
                graph.edge(n, *next);
            }
        }
    }
    // Of time only a chain: an end, the ends after it, and from the last of them who begins then.
    let mut ends: Vec<usize> = (0..deeds.len()).filter(|n| deeds[*n].told == Told::Done).collect();
    ends.sort_by_key(|n| deeds[*n].ended);
    let marks: Vec<usize> = ends.iter().map(|_| graph.node()).collect();
    for (index, n) in ends.iter().enumerate() {
        graph.edge(*n, marks[index]);
        if let Some(next) = marks.get(index + 1) {
            graph.edge(marks[index], *next);
        }
    }
    for (n, deed) in deeds.iter().enumerate().filter(|(n, _)| happened[*n]) {
        let over = ends.partition_point(|end| deeds[*end].ended < deed.asked);
        if let Some(last) = over.checked_sub(1) {
            graph.edge(marks[last], n);
        }
    }
    if let Some(cycle) = graph.cycle() {
        let cycle: Vec<&Deed> = cycle.iter().filter_map(|n| deeds.get(*n)).collect();
        faults.is(|| format!("a cycle of {}: {cycle:?}", cycle.len()));
    }
}

/// Who must come before whom.
#[derive(Debug)]
struct Graph(Vec<Vec<usize>>);

impl Graph {
    fn new(nodes: usize) -> Self {
        Self(vec![Vec::new(); nodes])
    }

    fn node(&mut self) -> usize {
        self.0.push(Vec::new());
        self.0.len() - 1
    }

    fn edge(&mut self, from: usize, to: usize) {
        if from != to {
            self.0[from].push(to);
        }
    }

    /// A cycle, if there is one: what can be put in order is taken away, and of what remains each node has
    /// one before it that remains too.
    fn cycle(&self) -> Option<Vec<usize>> {
        let mut before = vec![0usize; self.0.len()];
        self.0.iter().flatten().for_each(|to| before[*to] += 1);
        let mut free: Vec<usize> = (0..self.0.len()).filter(|n| before[*n] == 0).collect();
        while let Some(n) = free.pop() {
            for to in &self.0[n] {
                before[*to] -= 1;
                if before[*to] == 0 {
                    free.push(*to);
                }
            }
        }
        let remains = |n: usize| before[n] > 0;
        let mut one_before = vec![None; self.0.len()];
        for from in (0..self.0.len()).filter(|n| remains(*n)) {
            self.0[from]
                .iter()
                .filter(|to| remains(**to))
                .for_each(|to| one_before[*to] = Some(from));
        }
        let mut path = vec![(0..self.0.len()).find(|n| remains(*n))?];
        let mut place: HashMap<usize, usize> = HashMap::new();
        loop {
            let last = path[path.len() - 1];
            if let Some(from) = place.insert(last, path.len() - 1) {
                let mut cycle = path.split_off(from);
                cycle.pop();
                cycle.reverse();
                return Some(cycle);
            }
            path.push(one_before[last]?);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(key: u64, version: u64, value: Option<u64>) -> Step {
        Step::Read { key, version, value }
    }

    fn write(key: u64, version: u64, value: u64) -> Step {
        Step::Write { key, version: Some(version), value }
    }

    fn done(asked: u64, ended: u64, steps: Vec<Step>) -> Deed {
        Deed { asked, ended, told: Told::Done, steps }
    }

    /// Two keys, three writers, a reader of both; 10 and 11 are of one transaction.
    fn sound() -> (Vec<Deed>, Log) {
        let deeds = vec![
            done(0, 1, vec![read(1, 0, None), write(1, 1, 10), write(2, 1, 11)]),
            done(2, 5, vec![read(1, 1, Some(10)), write(1, 2, 20)]),
            Deed {
                asked: 3,
                ended: 4,
                told: Told::Unknown,
                steps: vec![Step::Write { key: 2, version: None, value: 30 }],
            },
            Deed {
                asked: 3,
                ended: 4,
                told: Told::Refused,
                steps: vec![Step::Write { key: 2, version: None, value: 40 }],
            },
            done(6, 7, vec![read(1, 2, Some(20)), read(2, 2, Some(30))]),
        ];
        (deeds, Log::from([(1, vec![10, 20]), (2, vec![11, 30])]))
    }

    fn caught(word: &str, change: impl FnOnce(&mut Vec<Deed>, &mut Log)) {
        let (mut deeds, mut log) = sound();
        change(&mut deeds, &mut log);
        let found = faults(&deeds, &log);
        assert!(found.iter().any(|fault| fault.contains(word)), "{word}: {found:?}");
    }

    #[test]
    fn what_is_sound_passes() {
        let (deeds, mut log) = sound();
        assert_eq!(faults(&deeds, &log), Vec::<String>::new());
        // What is unknown may also not have happened.
        log.insert(2, vec![11]);
        assert_eq!(faults(&deeds[..4], &log), Vec::<String>::new());
        assert!(faults(&[], &Log::new()).is_empty());
    }

    #[test]
    fn what_is_damaged_is_caught() {
        caught("acknowledged and is lost", |_, log| log.get_mut(&1).unwrap().truncate(1));
        caught("nobody wrote", |_, log| log.get_mut(&1).unwrap().push(99));
        caught("is v2 and v3", |_, log| log.get_mut(&2).unwrap().push(30));
        caught("was refused and is", |_, log| log.get_mut(&2).unwrap().push(40));
        caught("asked for twice", |deeds, _| deeds.push(deeds[0].clone()));
        caught("1 of its 2 writes", |deeds, log| {
            deeds[0].told = Told::Unknown;
            log.insert(2, vec![30]);
        });
        caught("acknowledged as", |deeds, _| deeds[1].steps[1] = write(1, 3, 20));
        caught("was read as", |deeds, _| deeds[4].steps[0] = read(1, 2, Some(10)));
        caught("was read as", |deeds, _| deeds[4].steps[0] = read(1, 2, None));
        caught("was read as", |deeds, _| deeds[4].steps[0] = read(1, 7, Some(20)));
        // A reader who began after the write was acknowledged, and saw what was before.
        caught("was known", |deeds, _| deeds[4].steps[0] = read(1, 1, Some(10)));
        caught("was known", |deeds, log| {
            // It wrote below what had been read before it began.
            deeds.push(done(8, 9, vec![Step::Write { key: 2, version: Some(2), value: 50 }]));
            deeds[2].steps[0] = Step::Write { key: 2, version: None, value: 30 };
            log.insert(2, vec![11, 50, 30]);
            deeds[4].steps[1] = read(2, 3, Some(30));
        });
    }

    /// Two who were under way at the same time, each of whom saw nothing of the other.
    #[test]
    fn a_write_skew_is_a_cycle() {
        let log = Log::from([(1, vec![10]), (2, vec![20])]);
        let skew = [
            done(0, 9, vec![read(2, 0, None), write(1, 1, 10)]),
            done(0, 9, vec![read(1, 0, None), write(2, 1, 20)]),
        ];
        let found = faults(&skew, &log);
        assert!(found[0].starts_with("a cycle of 2"), "{found:?}");
        let one_saw = [skew[0].clone(), done(0, 9, vec![read(1, 1, Some(10)), write(2, 1, 20)])];
        assert!(faults(&one_saw, &log).is_empty());
    }

    /// Without its client's time each key is in order; with it, a reader saw the later write alone.
    #[test]
    fn time_between_keys_counts() {
        let log = Log::from([(1, vec![10]), (2, vec![20])]);
        let mut deeds = vec![
            done(0, 1, vec![write(1, 1, 10)]),
            done(2, 3, vec![write(2, 1, 20)]),
            done(0, 9, vec![read(1, 0, None), read(2, 1, Some(20))]),
        ];
        let found = faults(&deeds, &log);
        assert!(found[0].starts_with("a cycle"), "{found:?}");
        // Begun before the first had been acknowledged, the second may have come first.
        deeds[1].asked = 0;
        assert!(faults(&deeds, &log).is_empty());
    }
}
