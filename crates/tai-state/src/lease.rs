//! Every decision about a lock: who may have it, when a lease has ended, what a token is worth.
//!
//! A lease says until when its holder has a lock, by the backend's own clock: never by comparing the
//! clocks of two machines. A *fencing token* is the number of the grant: it rises with every grant of
//! a resource and is never used again, so whoever keeps the highest token that it has seen can refuse
//! those who were paused longer than their lease (M. Kleppmann, *How to do distributed locking*, 2016).

use std::fmt;
use std::time::Duration;

use chrono::{DateTime, Utc};

use crate::clock::{Moment, to_micros};
use crate::error::{Error, Result};

/// The shortest lease: below this a renewal could hardly arrive in time.
pub(crate) const SHORTEST: Duration = Duration::from_millis(50);
/// The longest lease: a day. Whoever works longer renews, which the guard does by itself.
pub(crate) const LONGEST: Duration = Duration::from_secs(24 * 60 * 60);
/// The longest name of a client, in bytes.
const MAX_CLIENT_BYTES: u64 = 512;

/// What is known of the lock of one resource. It is never deleted, since its token must not begin
/// anew.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct Lease {
    /// Who has it, or had it last.
    pub(crate) client_id: String,
    /// A secret of the grant: who knows it may release the lock.
    pub(crate) lock_token: String,
    /// The number of the grant: 1, 2, 3 …
    pub(crate) fencing_token: u64,
    /// Whether it is held, as far as nobody has looked at the clock.
    pub(crate) held: bool,
    /// Whether it was taken away from its holder.
    pub(crate) broken: bool,
    /// The newest grant before this one that ended without a release: broken, or past its lease; 0 for
    /// none. By this a holder whose release was not answered learns what became of it.
    pub(crate) lost_token: u64,
    pub(crate) lease: Duration,
    /// When the lease ends, by the backend's clock.
    pub(crate) ends: Moment,
    /// For people, by the holder's wall clock: nothing is judged by these two.
    pub(crate) acquired_at: DateTime<Utc>,
    pub(crate) expires_at: DateTime<Utc>,
}

/// Without the secret.
impl fmt::Debug for Lease {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Lease")
            .field("client_id", &self.client_id)
            .field("fencing_token", &self.fencing_token)
            .field("held", &self.held)
            .field("ends", &self.ends)
            .finish_non_exhaustive()
    }
}

/// How a lock stands at a moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Standing {
    /// It may be taken.
    Free,
    /// It is held for so long at most, if it is not renewed.
    Held(Duration),
    /// It was granted by a clock that cannot be compared with this one: whoever wants it must see it
    /// unchanged for the whole of its lease.
    Watch(Duration),
}

/// Who wants a lock.
#[derive(Clone)]
pub(crate) struct Wanted {
    pub(crate) client_id: String,
    pub(crate) lock_token: String,
    pub(crate) lease: Duration,
}

/// What the clocks say.
#[derive(Debug, Clone)]
pub(crate) struct Now {
    /// The backend's.
    pub(crate) moment: Moment,
    /// The wall's.
    pub(crate) wall: DateTime<Utc>,
}

impl Wanted {
    /// # Errors
    /// [`Error::InvalidState`] for a lease or a client that no lock takes.
    pub(crate) fn check(&self, resource: &str) -> Result<()> {
        if self.client_id.is_empty() || self.client_id.len() as u64 > MAX_CLIENT_BYTES {
            return Err(Error::refused(
                format!("the client that wants the lock {resource}"),
                format!("its name is empty or longer than {MAX_CLIENT_BYTES} bytes"),
            ));
        }
        if !(SHORTEST..=LONGEST).contains(&self.lease) {
            return Err(Error::refused(
                format!("a lease of {:?} on {resource}", self.lease),
                format!("a lease lasts from {SHORTEST:?} to {LONGEST:?}"),
            ));
        }
        Ok(())
    }
}

impl Lease {
    /// The next grant of a resource.
    ///
    /// # Errors
    /// [`Error::InvalidState`] when the tokens are used up.
    pub(crate) fn grant(before: Option<&Self>, wanted: &Wanted, now: &Now) -> Result<Self> {
        let last = before.map_or(0, |lease| lease.fencing_token);
        if last >= crate::transition::MAX_COUNTER {
            return Err(Error::refused("a lock", "its fencing tokens are used up"));
        }
        let wall = to_micros(now.wall);
        Ok(Self {
            client_id: wanted.client_id.clone(),
            lock_token: wanted.lock_token.clone(),
            fencing_token: last + 1,
            held: true,
            lease: wanted.lease,
            ends: now.moment.after(wanted.lease),
            acquired_at: wall,
            expires_at: wall.checked_add_signed(signed(wanted.lease)).unwrap_or(wall),
            broken: false,
            lost_token: before.map_or(0, |before| match before.held || before.broken {
                true => before.fencing_token,
                false => before.lost_token,
            }),
        })
    }

    /// The same grant, for as long again.
    pub(crate) fn renewed(&self, now: &Now) -> Self {
        let wall = to_micros(now.wall);
        let expires_at = wall.checked_add_signed(signed(self.lease)).unwrap_or(wall);
        Self { ends: now.moment.after(self.lease), expires_at, ..self.clone() }
    }

    /// The same grant, over.
    pub(crate) fn released(&self) -> Self {
        Self { held: false, ..self.clone() }
    }

    /// The same grant, taken away: broken, or marked as free after its lease had ended.
    pub(crate) fn taken_away(&self) -> Self {
        Self { held: false, broken: true, ..self.clone() }
    }

    /// Whether an earlier grant, of which this is a successor, ended with its release.
    pub(crate) fn follows_a_release_of(&self, fencing_token: u64) -> bool {
        self.fencing_token > fencing_token && self.lost_token < fencing_token
    }

    /// How it stands.
    pub(crate) fn standing(&self, now: &Moment) -> Standing {
        if !self.held {
            return Standing::Free;
        }
        match self.ends.since(now) {
            Some(Duration::ZERO) => Standing::Free,
            // A lease cannot last much longer than it is (a holder rounds its end up by a round
            // trip): then the clock has been set back.
            Some(left) if left <= self.lease * 2 => Standing::Held(left),
            _ => Standing::Watch(self.lease),
        }
    }

    /// Whether this token is the current one. A lease that has ended is still current until somebody
    /// else gets the lock: nobody can have seen a higher token.
    ///
    /// # Errors
    /// [`Error::LockLost`] with what became of it.
    pub(crate) fn check(lease: Option<&Self>, resource: &str, fencing_token: u64) -> Result<()> {
        let reason = match lease {
            None => "it was never granted here".to_owned(),
            Some(lease) if lease.fencing_token != fencing_token => {
                format!("{} got it with fencing token {}", lease.client_id, lease.fencing_token)
            }
            Some(lease) if lease.broken => "it was taken away".to_owned(),
            Some(lease) if !lease.held => "it was released".to_owned(),
            Some(_) => return Ok(()),
        };
        Err(Error::LockLost { resource: resource.to_owned(), fencing_token, reason })
    }
}

/// Leases are a day at most.
fn signed(lease: Duration) -> chrono::TimeDelta {
    chrono::TimeDelta::from_std(lease).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn now(epoch: &str, micros: u64) -> Now {
        let wall = DateTime::from_timestamp(1_700_000_000, 0).unwrap();
        Now { moment: Moment { epoch: epoch.into(), micros }, wall }
    }

    fn wanted(client: &str, lease_ms: u64) -> Wanted {
        let lease = Duration::from_millis(lease_ms);
        Wanted { client_id: client.into(), lock_token: format!("{client}-t"), lease }
    }

    #[test]
    fn standings_by_table() {
        let lease = Lease::grant(None, &wanted("a", 2_000), &now("e", 7_000_000)).unwrap();
        let ms = Duration::from_millis;
        for (epoch, micros, standing) in [
            ("e", 7_000_000, Standing::Held(ms(2_000))),
            ("e", 6_900_000, Standing::Held(ms(2_100))),
            ("e", 8_500_000, Standing::Held(ms(500))),
            ("e", 8_999_999, Standing::Held(Duration::from_micros(1))),
            ("e", 9_000_000, Standing::Free),
            ("e", u64::MAX, Standing::Free),
            // The clock cannot have been here.
            ("e", 5_000_000, Standing::Held(ms(4_000))),
            ("e", 4_999_999, Standing::Watch(ms(2_000))),
            ("other", 9_000_000, Standing::Watch(ms(2_000))),
        ] {
            assert_eq!(lease.standing(&now(epoch, micros).moment), standing, "{epoch} {micros}");
            assert_eq!(lease.released().standing(&now(epoch, micros).moment), Standing::Free);
        }
        let renewed = lease.renewed(&now("e", 8_500_000));
        assert_eq!(renewed.standing(&now("e", 9_000_000).moment), Standing::Held(ms(1_500)));
        assert_eq!((renewed.fencing_token, renewed.lock_token), (1, "a-t".to_owned()));
    }

    /// What people are shown goes along with what is judged.
    #[test]
    fn a_renewal_moves_both_ends() {
        let lease = Lease::grant(None, &wanted("a", 2_000), &now("e", 7_000_000)).unwrap();
        assert_eq!(lease.expires_at - lease.acquired_at, chrono::TimeDelta::seconds(2));
        let mut later = now("f", 9_000_000);
        later.wall += chrono::TimeDelta::seconds(30);
        let renewed = lease.renewed(&later);
        assert_eq!(renewed.ends, Moment { epoch: "f".into(), micros: 11_000_000 });
        assert_eq!(renewed.acquired_at, lease.acquired_at);
        assert_eq!(renewed.expires_at - renewed.acquired_at, chrono::TimeDelta::seconds(32));
        assert!(renewed.held && !renewed.broken);
    }

    #[test]
    fn how_a_grant_ended_is_said() {
        let lease = Lease::grant(None, &wanted("a", 100), &now("e", 0)).unwrap();
        let next = Lease::grant(Some(&lease), &wanted("b", 100), &now("e", 200_000)).unwrap();
        for (lease, reason) in [
            (None, "never granted here"),
            (Some(&next), "b got it with fencing token 2"),
            (Some(&lease.taken_away()), "taken away"),
            (Some(&lease.released()), "released"),
        ] {
            let lost = Lease::check(lease, "r", 1).unwrap_err().to_string();
            assert!(lost.contains(reason), "{lost}");
        }
        assert!(!lease.taken_away().held && lease.taken_away().broken);
    }

    #[test]
    fn only_the_newest_grant_is_current() {
        let first = Lease::grant(None, &wanted("a", 100), &now("e", 0)).unwrap();
        let second = Lease::grant(Some(&first), &wanted("b", 100), &now("e", 200_000)).unwrap();
        assert!(Lease::check(Some(&first), "r", 1).is_ok());
        assert!(Lease::check(Some(&second), "r", 2).is_ok());
        for (lease, token) in [(None, 1), (Some(&second), 1), (Some(&second), 3)] {
            assert_eq!(Lease::check(lease, "r", token).unwrap_err().code(), "lock_lost");
        }
        let released = second.released();
        assert_eq!(Lease::check(Some(&released), "r", 2).unwrap_err().code(), "lock_lost");
    }

    #[test]
    fn a_successor_tells_how_a_grant_ended() {
        let grant =
            |before: &Lease| Lease::grant(Some(before), &wanted("n", 100), &now("e", 0)).unwrap();
        let first = Lease::grant(None, &wanted("a", 100), &now("e", 0)).unwrap();
        // Released, passed on, and passed on again.
        let second = grant(&first.released());
        let third = grant(&second.released());
        assert!(second.follows_a_release_of(1) && third.follows_a_release_of(1));
        assert!(third.follows_a_release_of(2) && !third.follows_a_release_of(3));
        // Past its lease, or broken.
        for lost in [first.clone(), first.taken_away()] {
            assert!(!grant(&lost).follows_a_release_of(1));
            assert!(!grant(&grant(&lost).released()).follows_a_release_of(1));
        }
    }

    #[test]
    fn refuses_what_no_lock_takes() {
        for wanted in [wanted("a", 0), wanted("a", 86_400_001), wanted("", 1_000)] {
            assert_eq!(wanted.check("r").unwrap_err().code(), "invalid_state");
        }
        let name = |bytes| wanted(&"c".repeat(bytes), 1_000).check("r");
        assert!(name(512).is_ok() && name(513).is_err());
        for (lease_ms, is_taken) in
            [(49, false), (50, true), (86_400_000, true), (86_400_001, false)]
        {
            assert_eq!(wanted("a", lease_ms).check("r").is_ok(), is_taken, "{lease_ms}");
        }
        let mut last = Lease::grant(None, &wanted("a", 100), &now("e", 0)).unwrap();
        last.fencing_token = crate::transition::MAX_COUNTER - 1;
        let newest = Lease::grant(Some(&last), &wanted("b", 100), &now("e", 0)).unwrap();
        assert_eq!(newest.fencing_token, crate::transition::MAX_COUNTER);
        last.fencing_token = crate::transition::MAX_COUNTER;
        assert!(Lease::grant(Some(&last), &wanted("b", 100), &now("e", 0)).is_err());
    }

    proptest! {
        /// Whatever happens to a lock, its token only rises, by one with each grant.
        #[test]
        fn tokens_rise_for_ever(steps in prop::collection::vec((0u8..3, 0u64..500_000), 1..80)) {
            let mut lease: Option<Lease> = None;
            let (mut clock, mut grants) = (0, 0);
            for (step, pause) in steps {
                clock += pause;
                let now = now("e", clock);
                match (step, &lease) {
                    (0, Some(held)) => lease = Some(held.released()),
                    (1, Some(held)) if held.held => lease = Some(held.renewed(&now)),
                    (_, before) => {
                        let free = before.as_ref().is_none_or(|l| l.standing(&now.moment) == Standing::Free);
                        if free {
                            let next = Lease::grant(before.as_ref(), &wanted("c", 200), &now).unwrap();
                            grants += 1;
                            prop_assert_eq!(next.fencing_token, grants);
                            lease = Some(next);
                        }
                    }
                }
                prop_assert_eq!(lease.as_ref().map_or(0, |lease| lease.fencing_token), grants);
            }
        }
    }
}
