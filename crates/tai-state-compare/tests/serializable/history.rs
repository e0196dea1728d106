//! A history: what was asked and came back, in the order of its happening; and damaged copies.

use std::collections::{BTreeSet, HashSet};

use adya::{Opts, Report, Workload};
use serde_json::{Value, json};

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

    /// Copies that no strictly serializable store can have given, each with what is wrong with it.
    /// The history must end with one transaction that reads one key alone, after others that have
    /// read all of them, after everything else.
    pub(crate) fn damaged(&self, mut below: impl FnMut(u64) -> u64) -> Vec<(&'static str, Self)> {
        let mut one_of = |count: usize| below(count as u64) as usize;
        let reads: Vec<Read> = self.reads().collect();
        let last = *reads.last().unwrap();
        // What the last transactions saw contradicts whatever is changed in the reads before them.
        let long: Vec<Read> =
            reads.iter().copied().filter(|r| r.length >= 2 && r.line < self.0.len() / 2).collect();
        let mut any_read = || long[one_of(long.len())];
        let mut copies = vec![
            ("a last read that saw nothing", self.with_read(last, Vec::clear)),
            ("a read without its first element", {
                self.with_read(any_read(), |list| drop(list.remove(0)))
            }),
            ("a read with its last two elements swapped", {
                let read = any_read();
                self.with_read(read, |list| list.swap(read.length - 2, read.length - 1))
            }),
            ("a read with an element twice", {
                self.with_read(any_read(), |list| list.push(list[0].clone()))
            }),
        ];
        let appends: Vec<(usize, usize)> = self.appends().collect();
        let mut any_append = || appends[one_of(appends.len())];
        copies.push(("an append that failed and was read", {
            let mut copy = self.clone();
            copy.0[any_append().0]["type"] = "fail".into();
            copy
        }));
        copies.push(("an append that was acknowledged and lost", {
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
        }));
        copies.push(("an append that was asked for twice", {
            let (line, step) = any_append();
            let append = self.0[line]["value"][step].clone();
            let mut copy = self.clone();
            for kind in ["invoke", "info"] {
                copy.0.push(json!({"type": kind, "process": i32::MAX, "value": [append]}));
            }
            copy
        }));
        copies
    }

    /// A copy in which one read saw what nobody appended.
    pub(crate) fn invented(&self) -> Self {
        let last = self.reads().last().unwrap();
        self.with_read(last, |list| list.push((-1).into()))
    }
}
