//! `stats`: figures of the store.

use serde_json::json;
use tai_state::StateStore;

use crate::args::Global;
use crate::failure::Outcome;
use crate::output;

pub(crate) async fn run(global: &Global, store: &StateStore) -> Outcome {
    let stats = store.get_stats().await?;
    let text = format!(
        "governors        {}\nstates           {}\ndeleted states   {}\nevents           {}\n\
         saved snapshots  {}\nhighest version  {}",
        stats.total_governors,
        stats.total_states,
        stats.deleted_states,
        stats.total_events,
        stats.total_snapshots,
        stats.max_version
    );
    output::object(global.output, &json!(stats), &text)
}
