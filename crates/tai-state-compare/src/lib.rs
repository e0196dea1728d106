//! Judges tai-state from outside, with programs that know nothing of it; all of it is in `tests/`.
