//! Runs what is kept of a target: its corpus, its regressions, and mutations of them.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use super::Target;

/// A small generator whose whole run is its seed: SplitMix64 (Steele, Lea and Flood, 2014).
#[derive(Debug, Clone)]
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, end: usize) -> usize {
        (self.next() % end.max(1) as u64) as usize
    }
}

/// Runs every file of `corpus/NAME` and `regressions/NAME` in `root`, and then mutations of them: as many
/// as the target says, or `TAI_STATE_ROUNDS`. The seed is printed; `TAI_STATE_SEED` sets it.
///
/// # Panics
/// When the target does, when there is no corpus, and when `TAI_STATE_SEED` is no number.
pub fn replay(target: &Target, root: &Path) {
    let kept = files(&root.join("corpus").join(target.name));
    assert!(!kept.is_empty(), "there is no corpus of {} in {}", target.name, root.display());
    let regressions = files(&root.join("regressions").join(target.name));
    let inputs: Vec<(PathBuf, Vec<u8>)> = kept
        .into_iter()
        .chain(regressions)
        .map(|path| {
            let bytes = std::fs::read(&path).expect("a file of the corpus");
            (path, bytes)
        })
        .collect();
    for (path, bytes) in &inputs {
        run(target, bytes, || format!("{}", path.display()));
    }
    let number = |name| std::env::var(name).ok().map(|text| text.parse().expect("a number"));
    let seed = number("TAI_STATE_SEED").unwrap_or_else(|| {
        u64::from_ne_bytes(crate::clock::random_id().as_bytes()[..8].try_into().expect("8 bytes"))
    });
    let rounds = number("TAI_STATE_ROUNDS").map_or(target.mutations, |rounds| rounds as usize);
    println!("{}: {} inputs, {rounds} mutations, TAI_STATE_SEED={seed}", target.name, inputs.len());
    let mut random = Random(seed);
    for round in 0..rounds {
        let mutated = mutated(&mut random, &inputs);
        run(target, &mutated, || {
            let name = format!("tai-state-{}-{seed}-{round}", target.name);
            let path = std::env::temp_dir().join(name);
            let kept = std::fs::write(&path, &mutated);
            format!("TAI_STATE_SEED={seed}, round {round}, kept as {} ({kept:?})", path.display())
        });
    }
}

fn run(target: &Target, bytes: &[u8], which: impl FnOnce() -> String) {
    if let Err(panic) = catch_unwind(AssertUnwindSafe(|| (target.run)(bytes))) {
        eprintln!("the fuzz target {} fails on {}", target.name, which());
        std::panic::resume_unwind(panic);
    }
}

/// The files of a folder, in the order of their names.
fn files(folder: &Path) -> Vec<PathBuf> {
    let Ok(entries) = std::fs::read_dir(folder) else { return Vec::new() };
    let mut files: Vec<PathBuf> = entries
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.is_file())
        .collect();
    files.sort();
    files
}

/// One of the inputs with a few changes.
fn mutated(random: &mut Random, inputs: &[(PathBuf, Vec<u8>)]) -> Vec<u8> {
    let mut bytes = inputs[random.below(inputs.len())].1.clone();
    for _ in 0..=random.below(4) {
        let at = random.below(bytes.len() + 1);
        let end = (at + random.below(9)).min(bytes.len());
        match random.below(7) {
            0 if at < bytes.len() => bytes[at] ^= 1 << random.below(8),
            1 if at < bytes.len() => bytes[at] = random.next() as u8,
            2 => drop(bytes.drain(at..end)),
            3 => bytes.insert(at, random.next() as u8),
            4 => bytes.truncate(at),
            5 => {
                let repeated = bytes[at..end].to_vec();
                drop(bytes.splice(at..at, repeated));
            }
            _ => {
                let other = &inputs[random.below(inputs.len())].1;
                let from = random.below(other.len() + 1);
                let to = (from + random.below(33)).min(other.len());
                drop(bytes.splice(at..end, other[from..to].iter().copied()));
            }
        }
    }
    bytes
}
