//! Queries over the data of states, on every backend.

#![allow(clippy::unwrap_used, clippy::indexing_slicing)]

#[macro_use]
mod common;

use common::{Make, open, snapshot, why};
use serde_json::{Value, json};
use tai_state::Direction::{Ascending, Descending};
use tai_state::{FieldPath, Op, QueryCursor, StateQuery, StateStore};

on_every_backend![
    filters_are_on_the_data_and_all_must_hold,
    an_order_is_kept_page_by_page,
    deleted_states_are_never_found,
    names_with_dots_are_reached,
    a_range_brings_its_order,
    bad_queries_are_refused_with_a_reason,
    states_are_counted,
    every_page_size_gives_the_same_answer,
];

async fn save(store: &StateStore, id: &str, data: Value) {
    store.save_state("g", id, snapshot(id, data), why()).await.unwrap();
}

async fn ids(store: &StateStore, query: &StateQuery) -> Vec<String> {
    let page = store.query_states("g", query).await.unwrap();
    assert_eq!(page.next, None);
    page.states.iter().map(|found| found.snapshot.id.to_string()).collect()
}

/// All pages, each cursor kept as JSON on the way.
async fn all_pages(store: &StateStore, query: &StateQuery) -> Vec<String> {
    let (mut query, mut found) = (query.clone(), Vec::new());
    loop {
        let page = store.query_states("g", &query).await.unwrap();
        found.extend(page.states.iter().map(|found| found.snapshot.id.to_string()));
        assert!(found.len() < 1_000);
        let Some(next) = page.next else { return found };
        let kept = serde_json::to_string(&next).unwrap();
        let again: QueryCursor = serde_json::from_str(&kept).unwrap();
        assert_eq!(again, next);
        query = query.after(again);
    }
}

async fn filters_are_on_the_data_and_all_must_hold(make: Make<'_>) {
    let store = open(make);
    for (id, status, total) in
        [("o1", "open", 10), ("o2", "paid", 20), ("o3", "open", 30), ("o4", "void", 40)]
    {
        save(&store, id, json!({"status": status, "sum": {"total": total}, "tags": [id, "all"]}))
            .await;
    }
    // Another governor's, and what stands beside the data in the document.
    store.save_state("h", "o9", snapshot("o9", json!({"status": "open"})), why()).await.unwrap();
    save(&store, "scalar", json!(7)).await;

    let query = StateQuery::new;
    let open = query().filter("status", Op::Equal, "open");
    assert_eq!(ids(&store, &open).await, ["o1", "o3"]);
    let large = open.clone().filter("sum.total", Op::Greater, 10);
    assert_eq!(ids(&store, &large).await, ["o3"]);
    let some = query().filter("status", Op::OneOf, json!(["paid", "void", "none"]));
    assert_eq!(ids(&store, &some).await, ["o2", "o4"]);
    let tagged = query().filter("tags", Op::Contains, "o2");
    assert_eq!(ids(&store, &tagged).await, ["o2"]);
    let none = query().filter("version", Op::Equal, 1);
    assert!(ids(&store, &none).await.is_empty(), "a field beside the data was found");
    let whole = query().filter(FieldPath::of([""; 0]), Op::Equal, 7);
    assert_eq!(ids(&store, &whole).await, ["scalar"]);
    assert_eq!(ids(&store, &query()).await, ["o1", "o2", "o3", "o4", "scalar"]);

    let page = store.query_states("g", &large).await.unwrap();
    let record = store.record("g", "o3").await.unwrap().unwrap();
    assert_eq!(page.states, [record]);
    assert!(store.query_states("nobody", &open).await.unwrap().states.is_empty());
}

async fn an_order_is_kept_page_by_page(make: Make<'_>) {
    let store = open(make);
    for (id, count) in [("a", 2), ("b", 1), ("c", 2), ("d", 3)] {
        save(&store, id, json!({"count": count})).await;
    }
    save(&store, "without", json!({})).await;
    for limit in 1..6 {
        let up = StateQuery::new().order_by("count", Ascending).limit(limit);
        assert_eq!(all_pages(&store, &up).await, ["b", "a", "c", "d"]);
        let down = StateQuery::new().order_by("count", Descending).limit(limit);
        assert_eq!(all_pages(&store, &down).await, ["d", "c", "a", "b"]);
        let by_id = StateQuery::new().limit(limit);
        assert_eq!(all_pages(&store, &by_id).await, ["a", "b", "c", "d", "without"]);
    }
    // What an order meets may be null, also at the end of a page.
    save(&store, "e", json!({"count": null})).await;
    let nulls = StateQuery::new().filter("count", Op::Equal, Value::Null).limit(1);
    assert_eq!(all_pages(&store, &nulls).await, ["e"]);
}

async fn deleted_states_are_never_found(make: Make<'_>) {
    let store = open(make);
    for id in ["a", "b", "c"] {
        save(&store, id, json!({"n": 1})).await;
    }
    save(&store, "null", Value::Null).await;
    store.delete_state("g", "b", None, why()).await.unwrap();
    let all = FieldPath::of([""; 0]);
    for (query, wanted) in [
        (StateQuery::new(), vec!["a", "c", "null"]),
        (StateQuery::new().filter("n", Op::Equal, 1), vec!["a", "c"]),
        (StateQuery::new().order_by("n", Descending), vec!["c", "a"]),
        (StateQuery::new().filter(all, Op::Equal, Value::Null), vec!["null"]),
    ] {
        for limit in [1, 2, 10] {
            assert_eq!(all_pages(&store, &query.clone().limit(limit)).await, wanted, "{query:?}");
        }
    }
    // A state that comes back is found again.
    save(&store, "b", json!({"n": 1})).await;
    assert_eq!(ids(&store, &StateQuery::new().filter("n", Op::Equal, 1)).await, ["a", "b", "c"]);
}

async fn names_with_dots_are_reached(make: Make<'_>) {
    let store = open(make);
    save(&store, "dotted", json!({"a.b": {"c": 1}})).await;
    save(&store, "nested", json!({"a": {"b": {"c": 1}}})).await;
    let find =
        async |path: FieldPath| ids(&store, &StateQuery::new().filter(path, Op::Equal, 1)).await;
    assert_eq!(find("a.b.c".into()).await, ["nested"]);
    assert_eq!(find(FieldPath::of(["a.b", "c"])).await, ["dotted"]);
    assert_eq!(find(FieldPath::of(vec!["a".to_owned(), "b".into(), "c".into()])).await, ["nested"]);
}

async fn a_range_brings_its_order(make: Make<'_>) {
    let store = open(make);
    for (id, n) in [("a", json!(3)), ("b", json!(1.5)), ("c", json!("2")), ("d", json!(2))] {
        save(&store, id, json!({"n": n})).await;
    }
    let between = StateQuery::new().filter("n", Op::AtLeast, 1).filter("n", Op::Less, 3);
    assert_eq!(all_pages(&store, &between.clone().limit(1)).await, ["b", "d"]);
    let down = between.order_by("n", Descending);
    assert_eq!(all_pages(&store, &down.limit(1)).await, ["d", "b"]);
    let most = StateQuery::new().filter("n", Op::AtMost, "2");
    assert_eq!(ids(&store, &most).await, ["c"]);
}

async fn bad_queries_are_refused_with_a_reason(make: Make<'_>) {
    let store = open(make);
    for id in ["a", "b"] {
        save(&store, id, json!({"n": 1})).await;
    }
    let query = StateQuery::new;
    let by_n = query().order_by("n", Ascending).limit(1);
    let of_another = store.query_states("g", &by_n).await.unwrap().next.unwrap();
    for (bad, reason) in [
        (query().limit(0), "a limit of 0"),
        (query().filter("", Op::Equal, 1), "an empty path"),
        (query().filter("a..b", Op::Equal, 1), "an empty path"),
        (query().filter("n", Op::Equal, json!({})), "an array or an object"),
        (query().filter("n", Op::OneOf, "x"), "an array of values"),
        (query().filter("n", Op::OneOf, json!([])), "no or more than 30"),
        (query().filter("n", Op::OneOf, vec![0; 31]), "no or more than 30"),
        (query().filter("n", Op::Less, Value::Null), "null"),
        (query().filter("n", Op::Less, 1).filter("m", Op::Less, 1), "a range on a field"),
        (query().filter("n", Op::Less, 1).order_by("m", Ascending), "a range on a field"),
        (query().after(of_another), "a cursor of another query"),
    ] {
        let refused = store.query_states("g", &bad).await.unwrap_err();
        assert_eq!(refused.code(), "invalid_state", "{bad:?}");
        assert!(refused.to_string().contains(reason), "{refused}");
        assert!(refused.to_string().contains("g"), "{refused}");
    }
    assert_eq!(store.query_states("", &query()).await.unwrap_err().code(), "invalid_state");
}

async fn states_are_counted(make: Make<'_>) {
    let store = open(make);
    assert_eq!(store.count_states("g").await.unwrap(), 0);
    for n in 0..40 {
        save(&store, &format!("s{n}"), json!(n)).await;
    }
    store.delete_state("g", "s7", None, why()).await.unwrap();
    store.save_state("h", "s", snapshot("s", json!(1)), why()).await.unwrap();
    assert_eq!(store.count_states("g").await.unwrap(), 39);
    assert_eq!(store.count_states("h").await.unwrap(), 1);
}

/// Large states: a page may end before its limit, and still nothing is lost.
async fn every_page_size_gives_the_same_answer(make: Make<'_>) {
    let store = open(make);
    let mut wanted = Vec::new();
    for n in 0..12 {
        let id = format!("s{n:02}");
        save(&store, &id, json!({"n": n % 3, "text": "x".repeat(800 * 1024)})).await;
        wanted.push((n % 3, id));
    }
    wanted.sort();
    let wanted: Vec<String> = wanted.into_iter().map(|(_, id)| id).collect();
    for limit in [2, 100] {
        let query = StateQuery::new().order_by("n", Ascending).limit(limit);
        assert_eq!(all_pages(&store, &query).await, wanted);
    }
}
