//! Answers queries by reading every document of one governor and kind, page by page: the time grows
//! with their number, the memory does not.

use rusqlite::Connection;

use super::rows::{self, Rows};
use crate::backend::matching::Best;
use crate::backend::{Found, Query, Range, Scan, refuse_query};

/// Documents in memory at once beside the page that is gathered, fewer when they are large.
const PAGE: usize = 256;
/// Names in memory at once.
const NAMES: usize = 1_024;

pub(crate) fn query(conn: &Connection, query: &Query) -> Rows<Found> {
    refuse_query(query)?;
    let mut best = Best::new(query, rows::PAGE_BYTES);
    // Without an order documents are gathered by key, and what stands before the cursor need not be
    // read again.
    let after = query.after.as_ref().filter(|_| query.order.is_none()).map(|after| &after.key);
    if !query.kind.is_versioned() {
        read(conn, query, Range::Names { after: after.map(|key| key.name.clone()) }, &mut best)?;
        return Ok(best.finish());
    }
    if let Some(key) = after {
        let (name, from) = (key.name.clone(), key.version.saturating_add(1));
        read(conn, query, Range::Versions { name, from, to: u64::MAX }, &mut best)?;
    }
    let mut last = after.map(|key| key.name.clone());
    while !best.is_done() {
        let names = rows::owners(conn, &query.governor, last.as_ref(), NAMES)?;
        let Some(newest) = names.last().cloned() else { break };
        for name in names {
            let range = Range::Versions { name, from: 0, to: u64::MAX };
            read(conn, query, range, &mut best)?;
            if best.is_done() {
                break;
            }
        }
        last = Some(newest);
    }
    Ok(best.finish())
}

fn read(conn: &Connection, query: &Query, range: Range, best: &mut Best<'_>) -> Rows<()> {
    let governor = query.governor.clone();
    let mut next = Some(Scan { governor, kind: query.kind, range, limit: PAGE });
    while let Some(scan) = next {
        let page = rows::scan(conn, &scan)?;
        for document in page.documents {
            best.take(document)?;
            if best.is_done() {
                return Ok(());
            }
        }
        next = page.next;
    }
    Ok(())
}
