//! How lost races are counted, and when a log that runs ahead of its head is told from one.

use super::*;

#[test]
fn races_on_one_head_are_no_races() {
    let mut race = Race::default();
    let mut lose = |revision: Option<u64>| {
        race.lost(revision.map(Revision::new));
        (race.races, race.failed, race.is_stuck())
    };
    // Each on a newer head: somebody else was faster.
    for n in 1..=20 {
        assert_eq!(lose(Some(u64::from(n))), (n, 1, false));
    }
    // None is a head like any other.
    assert_eq!(lose(None), (21, 1, false));
    assert_eq!(lose(None), (22, 2, STUCK_AFTER <= 2));
    assert_eq!(lose(Some(1)), (23, 1, false));
    for failed in 2..=STUCK_AFTER {
        assert_eq!(lose(Some(1)), (22 + failed, failed, failed == STUCK_AFTER));
    }
}
