//! A history: what was asked and came back, in the order of its happening; and damaged copies.

use std::collections::{BTreeSet, HashMap, HashSet};

use adya::{Opts, Report, Workload};
use serde_json::{Value, json};

use crate::versions::{self, Deed, Log, Step, Told};

/// Line by line as the checker writes and reads it: `{"type","process","value",…}`, where the value is a list of `["append", key, value]` and `["r", key, [value, …]]`.
#[derive(Debug, Clone)]
pub(crate) struct History(Vec<Value>);

/// A read in a history: the number of its line, of its step there, and how much it saw.
#[derive(Debug, Clone, Copy)]
struct Read {
    line: usize,
    step: usize,
    length: usize,
}

impl History {
    pub(crate) fn parse(lines: &str) -> Self {
        Self(lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect())
    }

    pub(crate) fn text(&self) -> String {
        self.0.iter().map(|line| format!("{line}\n")).collect()
    }

    /// What the checker says to it, for this model.
    ///
    /// A history that it cannot read as appends and reads, or with an append twice, `adya` 0.1.0
    /// leaves unchecked and calls valid, unless these are named as anomalies.
    pub(crate) fn checked(&self, model: &str) -> Report {
        let history = adya::History::from_json(&self.text()).unwrap();
        let malformed = ["duplicate-appends", "unexpected-txn-micro-op-types"];
        let options = Opts {
            models: vec![model.into()],
            anomalies: malformed.map(String::from).to_vec(),
            ..Opts::default()
        };
        adya::check(&history, Workload::ListAppend, &options)
    }

    /// What was read and was never to be appended, which `adya` 0.1.0 does not look for.
    pub(crate) fn nobodys(&self) -> Vec<(i64, i64)> {
        let asked = self.0.iter().filter(|line| line["type"] == "invoke");
        let steps = asked.flat_map(|line| line["value"].as_array().unwrap());
        let appends = steps.filter(|step| step[0] == "append");
        let appended: HashSet<(i64, i64)> =
            appends.map(|step| (step[1].as_i64().unwrap(), step[2].as_i64().unwrap())).collect();
        let mut found = Vec::new();
        for read in self.reads() {
            let step = &self.0[read.line]["value"][read.step];
            let key = step[1].as_i64().unwrap();
            let list =
                step[2].as_array().unwrap().iter().map(|value| (key, value.as_i64().unwrap()));
            found.extend(list.filter(|element| !appended.contains(element)));
        }
        found
    }

    pub(crate) fn keys(&self) -> BTreeSet<i64> {
        let steps = self.0.iter().flat_map(|line| line["value"].as_array().unwrap());
        steps.map(|step| step[1].as_i64().unwrap()).collect()
    }

    fn reads(&self) -> impl Iterator<Item = Read> {
        self.0.iter().enumerate().filter(|(_, row)| row["type"] == "ok").flat_map(|(line, row)| {
            let steps = row["value"].as_array().unwrap().iter().enumerate();
            steps.filter(|(_, step)| step[0] == "r").map(move |(step, read)| Read {
                line,
                step,
                length: read[2].as_array().unwrap().len(),
            })
        })
    }

    /// The numbers of the lines and steps of what was appended for sure.
    fn appends(&self) -> impl Iterator<Item = (usize, usize)> {
        self.0.iter().enumerate().filter(|(_, row)| row["type"] == "ok").flat_map(|(line, row)| {
            let steps = row["value"].as_array().unwrap().iter().enumerate();
            steps.filter(|(_, step)| step[0] == "append").map(move |(step, _)| (line, step))
        })
    }

    /// A copy in which one read saw something else.
    fn with_read(&self, read: Read, change: impl FnOnce(&mut Vec<Value>)) -> Self {
        let mut copy = self.clone();
        change(copy.0[read.line]["value"][read.step][2].as_array_mut().unwrap());
        copy
    }

    /// Shows copies that no strictly serializable store can have given, each with what is wrong with
    /// it, and one after the other: a history is large. It must end with one transaction that reads one
    /// key alone, after others that have read all of them, after everything else.
    pub(crate) fn damaged(
        &self,
        mut below: impl FnMut(u64) -> u64,
        mut show: impl FnMut(&'static str, Self),
    ) {
        let mut one_of = |count: usize| below(count as u64) as usize;
        let reads: Vec<Read> = self.reads().collect();
        // What the last transactions saw contradicts whatever is changed in the reads before them.
        let long: Vec<Read> =
            reads.iter().copied().filter(|r| r.length >= 2 && r.line < self.0.len() / 2).collect();
        let mut any_read = || long[one_of(long.len())];
        show(
            "a read without its first element",
            self.with_read(any_read(), |list| drop(list.remove(0))),
        );
        show("a read with its last two elements swapped", {
            let read = any_read();
            self.with_read(read, |list| list.swap(read.length - 2, read.length - 1))
        });
        show(
            "a read with an element twice",
            self.with_read(any_read(), |list| list.push(list[0].clone())),
        );
        let appends: Vec<(usize, usize)> = self.appends().collect();
        let mut any_append = || appends[one_of(appends.len())];
        show("an append that failed and was read", {
            let mut copy = self.clone();
            copy.0[any_append().0]["type"] = "fail".into();
            copy
        });
        show("an append that was acknowledged and lost", {
            let (line, step) = any_append();
            let append = &self.0[line]["value"][step];
            let mut copy = self.clone();
            for read in &reads {
                let step = &mut copy.0[read.line]["value"][read.step];
                if step[1] == append[1] {
                    step[2].as_array_mut().unwrap().retain(|value| *value != append[2]);
                }
            }
            copy
        });
        show("an append that was asked for twice", {
            let (line, step) = any_append();
            let append = self.0[line]["value"][step].clone();
            let mut copy = self.clone();
            for kind in ["invoke", "info"] {
                copy.0.push(json!({"type": kind, "process": i32::MAX, "value": [append]}));
            }
            copy
        });
    }

    /// A copy in which the very last read saw nothing. Only the real-time order speaks against it: without
    /// that order the read came before all else.
    pub(crate) fn late(&self) -> Self {
        let last = self.reads().last().unwrap();
        self.with_read(last, Vec::clear)
    }

    /// What the exact checker says to it. The length of a list is its version; the longest that anybody
    /// read is the log. What was appended after the last read of a key says nothing.
    pub(crate) fn faults(&self) -> Vec<String> {
        let mut log = Log::new();
        // The last line in which each key was asked for, by one who then read it.
        let mut read_last: HashMap<u64, usize> = HashMap::new();
        let asked = self.asked();
        for read in self.reads() {
            let step = &self.0[read.line]["value"][read.step];
            let (key, list) = (unsigned(&step[1]), list(&step[2]));
            let last = read_last.entry(key).or_default();
            *last = asked[&read.line].max(*last);
            let longest = log.entry(key).or_default();
            if longest.len() < list.len() {
                *longest = list;
            }
        }
        let mut faults = Vec::new();
        let places: HashMap<(u64, u64), u64> = log
            .iter()
            .flat_map(|(key, list)| (1..).zip(list).map(|(at, value)| ((*key, *value), at)))
            .collect();
        let mut deeds = Vec::new();
        for (line, from) in self.rows(&asked) {
            let row = &self.0[line];
            let told = match row["type"].as_str() {
                Some("ok") => Told::Done,
                Some("fail") => Told::Refused,
                _ => Told::Unknown,
            };
            let mut steps = Vec::new();
            for step in row["value"].as_array().unwrap() {
                let key = unsigned(&step[1]);
                if step[0] == "append" {
                    let value = unsigned(&step[2]);
                    let version = places.get(&(key, value)).copied();
                    let could_be_read = read_last.get(&key).is_some_and(|last| *last > line);
                    if told == Told::Refused || version.is_some() || could_be_read {
                        steps.push(Step::Write { key, version, value });
                    }
                } else if told == Told::Done {
                    let list = list(&step[2]);
                    if !log[&key].starts_with(&list) {
                        faults.push(format!("key {key}: {list:?} is no beginning of its log"));
                    }
                    let value = list.last().copied();
                    steps.push(Step::Read { key, version: list.len() as u64, value });
                }
            }
            deeds.push(Deed { asked: from as u64, ended: line as u64, told, steps });
        }
        faults.truncate(5);
        faults.extend(versions::faults(&deeds, &log));
        faults
    }

    /// For each line that ends a transaction the line in which it was asked for.
    fn asked(&self) -> HashMap<usize, usize> {
        let mut open = HashMap::new();
        let mut asked = HashMap::new();
        for (line, row) in self.0.iter().enumerate() {
            let process = row["process"].as_i64().unwrap();
            if row["type"] == "invoke" {
                open.insert(process, line);
            } else if let Some(from) = open.remove(&process) {
                asked.insert(line, from);
            }
        }
        asked
    }

    /// The lines that end a transaction, and those in which it was asked for.
    fn rows(&self, asked: &HashMap<usize, usize>) -> impl Iterator<Item = (usize, usize)> {
        let mut rows: Vec<(usize, usize)> = asked.iter().map(|(end, from)| (*end, *from)).collect();
        rows.sort_unstable();
        rows.into_iter()
    }

    /// A copy in which one read saw what nobody appended.
    pub(crate) fn invented(&self) -> Self {
        let last = self.reads().last().unwrap();
        self.with_read(last, |list| list.push((-1).into()))
    }
}

/// Elements are positive where anybody appended them; another is one that nobody did.
fn unsigned(value: &Value) -> u64 {
    value.as_i64().unwrap().cast_unsigned()
}

fn list(value: &Value) -> Vec<u64> {
    value.as_array().unwrap().iter().map(unsigned).collect()
}
