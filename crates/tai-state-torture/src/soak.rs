//! stub
use crate::run::{Run, Tally};
pub(crate) async fn run(_run: &Run) -> Tally {
    Tally::default()
}
