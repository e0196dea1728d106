//! A point in time, written the same way everywhere: `v42`, an RFC 3339 time, or `-15m`.

use chrono::{DateTime, TimeDelta, Utc};
use tai_state::{Clock, SystemClock};

use crate::failure::{Failure, Outcome};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Point {
    Version(u64),
    Time(DateTime<Utc>),
}

impl From<Point> for tai_state::PointInTime {
    fn from(point: Point) -> Self {
        match point {
            Point::Version(version) => Self::Version(version),
            Point::Time(time) => Self::Time(time),
        }
    }
}

impl Point {
    /// A point that must be a time.
    pub(crate) fn time(text: &str) -> Outcome<DateTime<Utc>> {
        match Self::parse(text)? {
            Self::Time(time) => Ok(time),
            Self::Version(_) => Err(Failure::usage(format!("{text:?} is a version, not a time"))
                .hint("write 2026-11-22T15:00:00Z or -15m")),
        }
    }

    pub(crate) fn parse(text: &str) -> Outcome<Self> {
        Self::parse_at(text, SystemClock.now())
    }

    pub(crate) fn parse_at(text: &str, now: DateTime<Utc>) -> Outcome<Self> {
        let wrong = || {
            Failure::usage(format!("{text:?} is not a point in time"))
                .hint("write v42, 2026-11-22T15:00:00Z, or -15m")
        };
        if let Some(digits) = text.strip_prefix('v') {
            return digits.parse().map(Self::Version).map_err(|_| wrong());
        }
        if let Some(ago) = text.strip_prefix('-') {
            let ago = humantime::parse_duration(ago).map_err(|_| wrong())?;
            let ago = TimeDelta::from_std(ago).map_err(|_| wrong())?;
            return now.checked_sub_signed(ago).map(Self::Time).ok_or_else(wrong);
        }
        let time = DateTime::parse_from_rfc3339(text).map_err(|_| wrong())?;
        Ok(Self::Time(time.with_timezone(&Utc)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use chrono::TimeZone;

    #[test]
    fn points_by_table() {
        let now = Utc.with_ymd_and_hms(2026, 1, 1, 12, 0, 0).unwrap();
        let at = |h, m| Point::Time(Utc.with_ymd_and_hms(2026, 1, 1, h, m, 0).unwrap());
        for (text, point) in [
            ("v42", Point::Version(42)),
            ("-15m", at(11, 45)),
            ("-1h 30m", at(10, 30)),
            ("2026-01-01T11:00:00Z", at(11, 0)),
            ("2026-01-01T11:00:00+01:00", at(10, 0)),
        ] {
            assert_eq!(Point::parse_at(text, now).unwrap(), point, "{text}");
        }
        for text in ["", "42", "v", "v-1", "-", "-x", "yesterday", "-99999999999999y", "2026-01-01"]
        {
            assert_eq!(Point::parse_at(text, now).unwrap_err().exit, 2, "{text}");
        }
    }
}
