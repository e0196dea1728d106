//! Behaviours about queries: what a test finds, in which order, page by page.

use std::sync::Arc;

use serde_json::{Value, json};

use super::*;
use crate::backend::{
    Backend, BackendError, Cursor, Direction, Field, Key, Kind, Precondition, Query, Read, Test,
    Write,
};

fn field(path: &[&str]) -> Field {
    Field(path.iter().map(ToString::to_string).collect())
}

fn query(filters: Vec<(Field, Test)>) -> Result<Query, String> {
    let (governor, kind, limit) = (name("gov")?, Kind::States, 100);
    Ok(Query { governor, kind, filters, order: None, after: None, limit })
}

fn by(path: &[&str], direction: Direction) -> Option<(Field, Direction)> {
    Some((field(path), direction))
}

/// All pages of a query.
async fn found(backend: &(impl Read + ?Sized), mut query: Query) -> Result<Vec<Document>, String> {
    let mut all = Vec::new();
    loop {
        let page = backend.query(&query).await.map_err(|error| format!("{query:?}: {error}"))?;
        ensure!(page.documents.len() <= query.limit, "a page is larger than its limit");
        ensure!(all.len() < 1_000, "the query does not end");
        all.extend(page.documents);
        match page.next {
            Some(next) => query.after = Some(next),
            None => return Ok(all),
        }
    }
}

/// Whether a test of the field `v` finds the states with these ids, in any order.
async fn finds(backend: &Arc<dyn Backend>, test: Test, wanted: &[&str]) -> Outcome {
    let order = match test {
        Test::Less(_) | Test::AtMost(_) | Test::Greater(_) | Test::AtLeast(_) => {
            by(&["v"], Direction::Ascending)
        }
        Test::Equal(_) | Test::OneOf(_) | Test::Contains(_) => None,
    };
    let query = Query { order, ..query(vec![(field(&["v"]), test.clone())])? };
    let mut ids = ids(&found(backend.as_ref(), query).await?);
    ids.sort();
    ensure!(ids == wanted, "{test:?} finds {ids:?}, not {wanted:?}");
    Ok(())
}

async fn put_values(backend: &Arc<dyn Backend>, values: &[(&str, Value)]) -> Outcome {
    let writes = values.iter().map(|(id, v)| put(state(id)?, &json!({"v": v}), Precondition::Any));
    commit(backend, writes.collect::<Result<_, _>>()?).await?;
    Ok(())
}

pub(super) async fn a_query_finds_what_is_equal(backend: Arc<dyn Backend>) -> Outcome {
    let values = [
        ("array", json!([1, "one"])),
        ("empty", json!("")),
        ("false", json!(false)),
        ("great", json!(9_007_199_254_740_993_u64)),
        ("half", json!(0.5)),
        ("null", Value::Null),
        ("object", json!({"v": 1})),
        ("one", json!("one")),
        ("one1", json!(1)),
        ("one2", json!(1.0)),
        ("text1", json!("1")),
        ("true", json!(true)),
        ("umlaut1", json!("\u{e9}")),
        ("umlaut2", json!("e\u{301}")),
        ("zero", json!(0)),
    ];
    put_values(&backend, &values).await?;
    commit(&backend, vec![put(state("none")?, &json!({"w": 1}), Precondition::Any)?]).await?;
    for (value, wanted) in [
        (json!(1), vec!["one1", "one2"]),
        (json!(1.0), vec!["one1", "one2"]),
        (json!(0.5), vec!["half"]),
        (json!(0), vec!["zero"]),
        (json!(-1), vec![]),
        (json!(9_007_199_254_740_993_u64), vec!["great"]),
        (json!(9_007_199_254_740_992_u64), vec![]),
        (json!("1"), vec!["text1"]),
        (json!("one"), vec!["one"]),
        (json!("On"), vec![]),
        (json!(""), vec!["empty"]),
        (json!("\u{e9}"), vec!["umlaut1"]),
        (json!(true), vec!["true"]),
        (json!(false), vec!["false"]),
        (Value::Null, vec!["null"]),
    ] {
        finds(&backend, Test::Equal(value), &wanted).await?;
    }
    // What is written later is found by what it says then, and not by what it said.
    put_values(&backend, &[("half", json!(2.5))]).await?;
    commit(&backend, vec![Write::delete(state("one1")?, Precondition::Present)]).await?;
    finds(&backend, Test::Equal(json!(0.5)), &[]).await?;
    finds(&backend, Test::Equal(json!(2.5)), &["half"]).await?;
    finds(&backend, Test::Equal(json!(1)), &["one2"]).await
}

pub(super) async fn a_query_finds_a_range_of_one_type(backend: Arc<dyn Backend>) -> Outcome {
    let values = [
        ("array", json!([5])),
        ("false", json!(false)),
        ("n-1", json!(-1)),
        ("n0.5", json!(0.5)),
        ("n1", json!(1)),
        ("n1.5", json!(1.5)),
        ("n10", json!(10)),
        ("null", Value::Null),
        ("object", json!({"v": 5})),
        ("t", json!("")),
        ("t10", json!("10")),
        ("tA", json!("A")),
        ("ta", json!("a")),
        ("ta0", json!("a\u{0}")),
        ("tz", json!("\u{ffff}")),
        ("tzz", json!("\u{10000}")),
        ("true", json!(true)),
    ];
    put_values(&backend, &values).await?;
    commit(&backend, vec![put(state("none")?, &json!({"w": 1}), Precondition::Any)?]).await?;
    for (test, wanted) in [
        (Test::Less(json!(1)), vec!["n-1", "n0.5"]),
        (Test::AtMost(json!(1.0)), vec!["n-1", "n0.5", "n1"]),
        (Test::Greater(json!(1)), vec!["n1.5", "n10"]),
        (Test::AtLeast(json!(1.5)), vec!["n1.5", "n10"]),
        (Test::Greater(json!(10)), vec![]),
        (Test::Less(json!("a")), vec!["t", "t10", "tA"]),
        (Test::AtLeast(json!("a")), vec!["ta", "ta0", "tz", "tzz"]),
        // By the bytes of UTF-8, not by the units of UTF-16.
        (Test::Greater(json!("\u{ffff}")), vec!["tzz"]),
        (Test::Less(json!("")), vec![]),
        (Test::AtMost(json!(true)), vec!["false", "true"]),
        (Test::Less(json!(true)), vec!["false"]),
    ] {
        finds(&backend, test, &wanted).await?;
    }
    // From both sides, the greatest first.
    let between =
        vec![(field(&["v"]), Test::Greater(json!(-1))), (field(&["v"]), Test::Less(json!(10)))];
    let between = Query { order: by(&["v"], Direction::Descending), ..query(between)? };
    let between = ids(&found(backend.as_ref(), between).await?);
    ensure!(between == ["n1.5", "n1", "n0.5"], "between: {between:?}");
    Ok(())
}

pub(super) async fn a_query_finds_one_of_several(backend: Arc<dyn Backend>) -> Outcome {
    let values = [
        ("a1", json!([1, "x", null, true])),
        ("a2", json!(["x1", 1.5, {"x": "x"}])),
        ("a3", json!([])),
        ("n1", json!(1)),
        ("n2", json!(2.0)),
        ("o", json!({"x": "x", "1": 1})),
        ("t1", json!("1")),
        ("tx", json!("x")),
        ("true", json!(true)),
    ];
    put_values(&backend, &values).await?;
    let most: Vec<Value> = (2..32).map(Value::from).collect();
    for (test, wanted) in [
        (Test::OneOf(vec![json!(1), json!("x"), json!(true)]), vec!["n1", "true", "tx"]),
        (Test::OneOf(vec![json!("1"), json!("1")]), vec!["t1"]),
        (Test::OneOf(vec![json!("none")]), vec![]),
        (Test::OneOf(most), vec!["n2"]),
        (Test::Contains(json!("x")), vec!["a1"]),
        (Test::Contains(json!(1.0)), vec!["a1"]),
        (Test::Contains(json!(1.5)), vec!["a2"]),
        (Test::Contains(json!(true)), vec!["a1"]),
        (Test::Contains(json!("none")), vec![]),
    ] {
        finds(&backend, test, &wanted).await?;
    }
    Ok(())
}

pub(super) async fn all_filters_of_a_query_must_hold(backend: Arc<dyn Backend>) -> Outcome {
    for (id, open, size, tags) in [
        ("a", true, 1, json!(["x"])),
        ("b", true, 2, json!(["x", "y"])),
        ("c", true, 3, json!(["y"])),
        ("d", false, 3, json!(["x"])),
    ] {
        let value = json!({"open": open, "size": size, "tags": tags});
        commit(&backend, vec![put(state(id)?, &value, Precondition::Any)?]).await?;
    }
    let (open, size, tags) = (field(&["open"]), field(&["size"]), field(&["tags"]));
    for (filters, wanted) in [
        (vec![(open.clone(), Test::Equal(json!(true)))], vec!["a", "b", "c"]),
        (
            vec![
                (open.clone(), Test::Equal(json!(true))),
                (tags.clone(), Test::Contains(json!("x"))),
            ],
            vec!["a", "b"],
        ),
        (
            vec![(open.clone(), Test::Equal(json!(true))), (size.clone(), Test::AtLeast(json!(2)))],
            vec!["b", "c"],
        ),
        (vec![(open.clone(), Test::Equal(json!(true))), (open, Test::Equal(json!(false)))], vec![]),
    ] {
        let order = by(&["size"], Direction::Ascending);
        let found = ids(&found(backend.as_ref(), Query { order, ..query(filters)? }).await?);
        ensure!(found == wanted, "{found:?}, not {wanted:?}");
    }
    Ok(())
}

pub(super) async fn a_query_is_ordered_and_continues(backend: Arc<dyn Backend>) -> Outcome {
    let values = [
        ("a", json!(2)),
        ("b", json!(1)),
        ("c", json!(2.0)),
        ("d", json!(0.5)),
        ("e", json!(2)),
        ("f", json!(1)),
        ("g", json!(10)),
    ];
    put_values(&backend, &values).await?;
    commit(&backend, vec![put(state("none")?, &json!({"w": 1}), Precondition::Any)?]).await?;
    let up = ["d", "b", "f", "a", "c", "e", "g"];
    let down: Vec<&str> = up.iter().rev().copied().collect();
    for limit in 1..=8 {
        for (order, wanted) in [
            (by(&["v"], Direction::Ascending), up.to_vec()),
            (by(&["v"], Direction::Descending), down.clone()),
            (None, vec!["a", "b", "c", "d", "e", "f", "g", "none"]),
        ] {
            let query = Query { order: order.clone(), limit, ..query(Vec::new())? };
            let found = ids(&found(backend.as_ref(), query).await?);
            ensure!(found == wanted, "by {limit}, {order:?}: {found:?}");
        }
    }
    // The document at which a page ended may be gone or be another; the next page starts behind the
    // place where it was.
    let order = by(&["v"], Direction::Ascending);
    let mut rest = Query { order, limit: 3, ..query(Vec::new())? };
    rest.after = backend.query(&rest).await.map_err(|error| error.to_string())?.next;
    ensure!(rest.after.is_some(), "there is no next page");
    commit(&backend, vec![Write::delete(state("f")?, Precondition::Present)]).await?;
    let behind = ids(&found(backend.as_ref(), rest.clone()).await?);
    ensure!(behind == ["a", "c", "e", "g"], "after one that was deleted: {behind:?}");
    put_values(&backend, &[("f", json!(3))]).await?;
    let behind = ids(&found(backend.as_ref(), rest).await?);
    ensure!(behind == ["a", "c", "e", "f", "g"], "after one that was moved: {behind:?}");
    Ok(())
}

pub(super) async fn a_query_orders_texts_by_their_bytes(backend: Arc<dyn Backend>) -> Outcome {
    let texts = ["\u{10000}", "b", "", "\u{ffff}", "a", "B", "é", "aa", "10", "9"];
    for (at, text) in texts.iter().enumerate() {
        put_values(&backend, &[(format!("s{at}").as_str(), json!(text))]).await?;
    }
    let mut wanted = texts.to_vec();
    wanted.sort_unstable();
    let order = by(&["v"], Direction::Ascending);
    let found = found(backend.as_ref(), Query { order, limit: 4, ..query(Vec::new())? }).await?;
    let mut shown = Vec::new();
    for document in &found {
        shown.push(value(Some(document))?.and_then(|v| v.get("v").cloned()));
    }
    ensure!(shown == wanted.iter().map(|t| Some(json!(t))).collect::<Vec<_>>(), "{shown:?}");
    Ok(())
}

pub(super) async fn a_query_reaches_fields_of_any_name(backend: Arc<dyn Backend>) -> Outcome {
    let names = ["a.b", "a`b", "é", "0", "a b", "a\\b", "a/b", "*", "'", "-", "[]", "plain", "_"];
    for (at, odd) in names.iter().enumerate() {
        let value = json!({*odd: at, "in": {*odd: {"deep": at}}});
        commit(&backend, vec![put(state(&format!("s{at:02}"))?, &value, Precondition::Any)?])
            .await?;
    }
    // What a path would find if its parts were joined or split.
    let decoy = json!({"a": {"b": 0}, "in.plain.deep": 11});
    commit(&backend, vec![put(state("decoy")?, &decoy, Precondition::Any)?]).await?;
    for (at, odd) in names.iter().enumerate() {
        for path in [&[*odd][..], &["in", odd, "deep"]] {
            let equal = query(vec![(field(path), Test::Equal(json!(at)))])?;
            let range = Query {
                order: by(path, Direction::Descending),
                ..query(vec![(field(path), Test::AtLeast(json!(0)))])?
            };
            for query in [equal, range] {
                let found = ids(&found(backend.as_ref(), query).await?);
                ensure!(found == [format!("s{at:02}")], "{path:?}: {found:?}");
            }
        }
    }
    Ok(())
}

pub(super) async fn a_query_sees_only_its_own(backend: Arc<dyn Backend>) -> Outcome {
    let value = json!({"v": 1});
    let mut writes = Vec::new();
    for governor in ["go", "gov", "gov2"] {
        for kind in Kind::ALL {
            let (governor, name) = (name(governor)?, name("a")?);
            let key = Key { governor, kind, name, version: u64::from(kind.is_versioned()) };
            writes.push(put(key, &value, Precondition::Absent)?);
        }
    }
    // Events of a state that is not there any more, and of one that never was.
    writes.push(put(key(Kind::Events, "a", 2)?, &value, Precondition::Absent)?);
    writes.push(put(key(Kind::Events, "gone", 1)?, &value, Precondition::Absent)?);
    writes.push(put(key(Kind::Events, "never", 7)?, &value, Precondition::Absent)?);
    writes.push(put(state("gone")?, &value, Precondition::Absent)?);
    commit(&backend, writes).await?;
    commit(&backend, vec![Write::delete(state("gone")?, Precondition::Present)]).await?;
    for kind in Kind::ALL {
        for order in [None, by(&["v"], Direction::Ascending), by(&["v"], Direction::Descending)] {
            for limit in [1, 2, 100] {
                let filters = vec![(field(&["v"]), Test::Equal(json!(1)))];
                // Firestore may not order by a field that is tested for equality.
                let filters = if order.is_none() { filters } else { Vec::new() };
                let query = Query { kind, order: order.clone(), limit, ..query(filters)? };
                let mut found: Vec<Key> = found(backend.as_ref(), query)
                    .await?
                    .into_iter()
                    .map(|document| document.key)
                    .collect();
                found.sort();
                let wanted = match kind {
                    Kind::Events => vec![
                        key(kind, "a", 1)?,
                        key(kind, "a", 2)?,
                        key(kind, "gone", 1)?,
                        key(kind, "never", 7)?,
                    ],
                    kind => vec![key(kind, "a", u64::from(kind.is_versioned()))?],
                };
                ensure!(found == wanted, "{kind:?} {order:?} by {limit}: {found:?}");
            }
        }
    }
    let nobody = Query { governor: name("nobody")?, ..query(Vec::new())? };
    ensure!(found(backend.as_ref(), nobody).await?.is_empty(), "an unknown governor has states");
    Ok(())
}

pub(super) async fn a_query_that_nobody_can_answer_is_refused(
    backend: Arc<dyn Backend>,
) -> Outcome {
    let v = || field(&["v"]);
    let (order, governor) = (by(&["v"], Direction::Ascending), name("other")?);
    let cursor = |key, value| Some(Cursor { key, value });
    let elsewhere = Key { governor, ..state("a")? };
    let test = |test| query(vec![(v(), test)]);
    let ordered =
        |test| Ok::<_, String>(Query { order: order.clone(), ..query(vec![(v(), test)])? });
    let many = || Test::OneOf((0..6).map(Value::from).collect());
    let misfits = [
        Query { limit: 0, ..query(Vec::new())? },
        query(vec![(Field(Vec::new()), Test::Equal(json!(1)))])?,
        query(vec![(field(&["v", ""]), Test::Equal(json!(1)))])?,
        Query { order: by(&[], Direction::Ascending), ..query(Vec::new())? },
        test(Test::Equal(json!([1])))?,
        test(Test::Equal(json!({})))?,
        test(Test::OneOf(vec![json!(1), json!([])]))?,
        test(Test::OneOf(Vec::new()))?,
        test(Test::OneOf(vec![json!(1), Value::Null]))?,
        test(Test::OneOf((0..31).map(Value::from).collect()))?,
        query(vec![(v(), many()), (field(&["w"]), many())])?,
        test(Test::Contains(Value::Null))?,
        query(vec![(v(), Test::Contains(json!(1))), (v(), Test::Contains(json!(2)))])?,
        test(Test::Less(json!(1)))?,
        ordered(Test::Less(Value::Null))?,
        ordered(Test::AtLeast(json!([])))?,
        Query { order: by(&["w"], Direction::Ascending), ..ordered(Test::Greater(json!(1)))? },
        Query { after: cursor(elsewhere, None), ..query(Vec::new())? },
        Query { after: cursor(key(Kind::Locks, "a", 0)?, None), ..query(Vec::new())? },
        Query { after: cursor(state("a")?, Some(json!(1))), ..query(Vec::new())? },
        Query { after: cursor(state("a")?, None), ..ordered(Test::Less(json!(1)))? },
    ];
    for misfit in misfits {
        match backend.query(&misfit).await {
            Err(BackendError::Invalid(_)) => {}
            other => return Err(format!("{misfit:?} was answered {other:?}")),
        }
    }
    Ok(())
}

pub(super) async fn a_query_in_a_view_sees_its_cut(backend: Arc<dyn Backend>) -> Outcome {
    put_values(&backend, &[("a", json!(1)), ("b", json!(2))]).await?;
    let view = backend.view().await.map_err(|error| format!("view: {error}"))?;
    read(view.as_ref(), state("a")?).await?;
    put_values(&backend, &[("a", json!(3)), ("c", json!(0))]).await?;
    commit(&backend, vec![Write::delete(state("b")?, Precondition::Present)]).await?;
    let query = || {
        let order = by(&["v"], Direction::Descending);
        Ok::<_, String>(Query { order, limit: 1, ..query(Vec::new())? })
    };
    let in_view = ids(&found(view.as_ref(), query()?).await?);
    ensure!(in_view == ["b", "a"], "the view finds {in_view:?}");
    drop(view);
    let now = ids(&found(backend.as_ref(), query()?).await?);
    ensure!(now == ["a", "c"], "the newest are not found: {now:?}");
    Ok(())
}
