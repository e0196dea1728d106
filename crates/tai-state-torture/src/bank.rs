//! Money that is moved under contention and faults is neither made nor lost; two who must not both leave
//! do not; counters count everyone.

mod counters;
mod doctors;
pub(crate) mod money;

use crate::args::Tier;
use crate::engine::Engine;
use crate::run::{Run, Tally};

pub(crate) async fn run(run: &Run) -> Tally {
    let mut tally = Tally::default();
    let emulator = Engine::emulator(&mut tally, "the bank on the emulator").await;
    let is_long = run.tier == Tier::Long;
    let seconds = run.size(20, 60);
    for (_, mut random) in run.rounds(1) {
        // All of it at the same time: most of it is waiting for the disk or for the emulator.
        let rounds = if is_long { [2_500, 500] } else { [300, 60] };
        let each = if is_long { 500 } else { 60 };
        // What counts on a real disk before a release counts in memory with every change.
        let file = if is_long { Engine::File } else { Engine::Memory };
        let parts = tokio::join!(
            money::in_a_file(seconds, random.next()),
            money::through_faults(emulator, seconds, random.next()),
            doctors::on_call(Some(Engine::File), rounds[0]),
            doctors::on_call(emulator, rounds[1]),
            counters::on(Some(file), &[2, 8, 32], each),
            counters::on(emulator, &[8], 50.min(each)),
        );
        for part in [parts.0, parts.1, parts.2, parts.3, parts.4, parts.5] {
            tally.add(part);
        }
    }
    tally
}
