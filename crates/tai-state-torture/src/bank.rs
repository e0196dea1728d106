//! Money that is moved under contention and faults is neither made nor lost; two who must not both leave
//! do not; counters count everyone.

mod counters;
mod doctors;
mod money;

use crate::args::Tier;
use crate::engine::Engine;
use crate::run::{Run, Tally};

pub(crate) async fn run(run: &Run) -> Tally {
    let mut tally = Tally::default();
    let emulator = Engine::emulator(&mut tally, "the bank on the emulator").await;
    let is_long = run.tier == Tier::Long;
    let seconds = run.size(20, 60);
    for (_, mut random) in run.rounds(1) {
        // Three parts, each on both engines at the same time: what waits for the one lets the other go on.
        let both = tokio::join!(
            money::in_a_file(seconds, random.next()),
            money::through_faults(emulator, seconds, random.next()),
        );
        [both.0, both.1].into_iter().for_each(|part| tally.add(part));
        let rounds = if is_long { [2_500, 500] } else { [300, 60] };
        let both = tokio::join!(
            doctors::on_call(Some(Engine::File), rounds[0]),
            doctors::on_call(emulator, rounds[1]),
        );
        [both.0, both.1].into_iter().for_each(|part| tally.add(part));
        let each = if is_long { 500 } else { 100 };
        let both = tokio::join!(
            counters::on(Some(Engine::File), &[2, 8, 32], each),
            counters::on(emulator, &[8], 50.min(each)),
        );
        [both.0, both.1].into_iter().for_each(|part| tally.add(part));
    }
    tally
}
