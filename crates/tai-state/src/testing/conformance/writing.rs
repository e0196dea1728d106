//! Behaviours about one document and one commit: bodies, preconditions, all or nothing.

use std::sync::Arc;

use serde_json::{Value, json};

use super::*;
use crate::backend::{Backend, BackendError, Key, Kind, Precondition, Write};

pub(super) async fn absent_documents_are_none_and_order_is_kept(
    backend: Arc<dyn Backend>,
) -> Outcome {
    put_any(&backend, state("b")?, 2).await?;
    put_any(&backend, state("a")?, 1).await?;
    put_any(&backend, key(Kind::Events, "a", 7)?, 7).await?;
    let keys = [
        state("b")?,
        state("none")?,
        key(Kind::Events, "a", 7)?,
        state("a")?,
        key(Kind::Events, "a", 8)?,
        key(Kind::Events, "none", 7)?,
        key(Kind::Events, "a", u64::MAX)?,
        state("b")?,
    ];
    let found = backend.get(&keys).await.map_err(|error| error.to_string())?;
    let numbers: Vec<Option<Value>> =
        found.iter().map(|d| value(d.as_ref())).collect::<Result<_, _>>()?;
    let n = |n: u64| Some(json!({"n": n}));
    ensure!(numbers == [n(2), None, n(7), n(1), None, None, None, n(2)], "{numbers:?}");
    for (asked, document) in keys.iter().zip(&found) {
        ensure!(document.as_ref().is_none_or(|d| d.key == *asked), "{asked} came with another key");
    }
    Ok(())
}

pub(super) async fn bodies_come_back_equal(backend: Arc<dyn Backend>) -> Outcome {
    let bodies = [
        json!({}),
        json!({"a": null, "b": [], "c": {}, "d": [[], [[1]]], "e": [{"f": [{}]}]}),
        json!({"i": [0, -1, 1, i64::MIN, i64::MAX, u64::MAX, 9_007_199_254_740_993_u64]}),
        json!({"d": [0.0, -0.0, 1.0, 0.1, 0.1 + 0.2, 1e308, 5e-324, 1_015.714_285_714_285_7]}),
        json!({"s": ["", "\0", "\n", "\u{202e}é\u{10ffff}", "\"\\/", "__x__", " "]}),
        json!({"": 1, "__x__": 2, "a.b": 3, "`": 4, "/": 5, "\0": 6, "é": 7, "__type__": "__vector__"}),
        json!({"nest": (0..90).fold(json!("deep"), |inner, _| json!({"k": inner}))}),
        json!({"nest": (0..90).fold(json!("deep"), |inner, _| json!([inner]))}),
        json!({"long": {"k".repeat(2_000): "v"}}),
    ];
    for (index, wanted) in bodies.iter().enumerate() {
        let key = state(&format!("s{index}"))?;
        commit(&backend, vec![put(key.clone(), wanted, Precondition::Absent)?]).await?;
        let found = value_at(&backend, key).await?;
        // Compared as text: `1` and `1.0` differ, and so do `0.0` and `-0.0`.
        let (found, wanted) = (found.map(|v| v.to_string()), wanted.to_string());
        ensure!(found.as_deref() == Some(&wanted), "{wanted} came back as {found:?}");
    }
    Ok(())
}

pub(super) async fn large_bodies_come_back_equal(backend: Arc<dyn Backend>) -> Outcome {
    let wanted = json!({"text": "x".repeat(900 * 1024)});
    commit(&backend, vec![put(state("large")?, &wanted, Precondition::Absent)?]).await?;
    ensure!(value_at(&backend, state("large")?).await? == Some(wanted), "it came back changed");
    Ok(())
}

pub(super) async fn any_overwrites(backend: Arc<dyn Backend>) -> Outcome {
    put_any(&backend, state("a")?, 1).await?;
    put_any(&backend, state("a")?, 2).await?;
    ensure!(value_at(&backend, state("a")?).await? == Some(json!({"n": 2})), "not overwritten");
    Ok(())
}

pub(super) async fn absent_refuses_what_exists(backend: Arc<dyn Backend>) -> Outcome {
    for key in [state("a")?, key(Kind::Events, "b", 1)?, key(Kind::Locks, "c", 0)?] {
        let create = || put(key.clone(), &json!({"n": 1}), Precondition::Absent);
        commit(&backend, vec![create()?]).await?;
        refused(&backend, vec![create()?]).await?;
        commit(&backend, vec![Write::delete(key.clone(), Precondition::Any)]).await?;
        commit(&backend, vec![create()?]).await?;
    }
    Ok(())
}

pub(super) async fn present_refuses_what_does_not(backend: Arc<dyn Backend>) -> Outcome {
    let update = || put(state("a")?, &json!({"n": 2}), Precondition::Present);
    refused(&backend, vec![update()?]).await?;
    ensure!(value_at(&backend, state("a")?).await?.is_none(), "it was created");
    put_any(&backend, state("a")?, 1).await?;
    commit(&backend, vec![update()?]).await?;
    Ok(())
}

pub(super) async fn a_stale_revision_is_refused(backend: Arc<dyn Backend>) -> Outcome {
    let old = put_any(&backend, state("a")?, 1).await?;
    let new = put_any(&backend, state("a")?, 2).await?;
    let guarded = |revision| put(state("a")?, &json!({"n": 3}), Precondition::Revision(revision));
    refused(&backend, vec![guarded(old)?]).await?;
    ensure!(value_at(&backend, state("a")?).await? == Some(json!({"n": 2})), "it was written");
    commit(&backend, vec![guarded(new)?]).await?;
    refused(&backend, vec![guarded(new)?]).await?;
    commit(&backend, vec![Write::delete(state("a")?, Precondition::Any)]).await?;
    refused(&backend, vec![guarded(new)?]).await
}

pub(super) async fn every_put_moves_the_revision(backend: Arc<dyn Backend>) -> Outcome {
    let mut seen = Vec::new();
    // Older bodies come back: first in place, then after a deletion.
    for (round, n) in [1, 2, 1, 2, 2, 1, 1].into_iter().enumerate() {
        let revision = put_any(&backend, state("a")?, n).await?;
        ensure!(!seen.contains(&revision), "round {round}: {revision:?} was given before");
        seen.push(revision);
        if round >= 3 {
            commit(&backend, vec![Write::delete(state("a")?, Precondition::Any)]).await?;
        }
    }
    // The body that stands there may keep its revision, and what was told must be what is read.
    for _ in 0..2 {
        let told = put_any(&backend, state("b")?, 1).await?;
        let shown = read(backend.as_ref(), state("b")?).await?.map(|document| document.revision);
        ensure!(shown == Some(told), "told {told:?}, shown {shown:?}");
    }
    Ok(())
}

pub(super) async fn a_commit_tells_the_revisions(backend: Arc<dyn Backend>) -> Outcome {
    put_any(&backend, state("kept")?, 1).await?;
    put_any(&backend, state("gone")?, 1).await?;
    let writes = vec![
        put(key(Kind::Events, "new", 1)?, &json!({"n": 1}), Precondition::Absent)?,
        Write::delete(state("gone")?, Precondition::Present),
        Write::check(state("kept")?, Precondition::Present),
        put(state("new")?, &json!({"n": 1}), Precondition::Absent)?,
    ];
    let keys: Vec<Key> = writes.iter().map(|write| write.key.clone()).collect();
    let told = commit(&backend, writes).await?.revisions;
    let found = backend.get(&keys).await.map_err(|error| error.to_string())?;
    let shown: Vec<_> = found.iter().map(|d| d.as_ref().map(|d| d.revision)).collect();
    ensure!(told == shown, "told {told:?}, shown {shown:?}");
    ensure!(
        shown.iter().map(Option::is_some).eq([true, false, true, true]),
        "wrong documents: {shown:?}"
    );
    Ok(())
}

pub(super) async fn deleting_honours_preconditions(backend: Arc<dyn Backend>) -> Outcome {
    commit(&backend, vec![Write::delete(state("a")?, Precondition::Any)]).await?;
    commit(&backend, vec![Write::delete(state("a")?, Precondition::Absent)]).await?;
    refused(&backend, vec![Write::delete(state("a")?, Precondition::Present)]).await?;
    let old = put_any(&backend, state("a")?, 1).await?;
    let new = put_any(&backend, state("a")?, 2).await?;
    let at =
        |revision| Ok::<_, String>(Write::delete(state("a")?, Precondition::Revision(revision)));
    refused(&backend, vec![at(old)?]).await?;
    refused(&backend, vec![Write::delete(state("a")?, Precondition::Absent)]).await?;
    commit(&backend, vec![at(new)?]).await?;
    ensure!(value_at(&backend, state("a")?).await?.is_none(), "it is still there");
    Ok(())
}

pub(super) async fn a_refused_commit_applies_nothing(backend: Arc<dyn Backend>) -> Outcome {
    put_any(&backend, state("taken")?, 1).await?;
    let bad = || put(state("taken")?, &json!({"n": 2}), Precondition::Absent);
    let good = |id: &str| put(state(id)?, &json!({"n": 2}), Precondition::Absent);
    let delete = || Ok::<_, String>(Write::delete(state("taken2")?, Precondition::Any));
    put_any(&backend, state("taken2")?, 1).await?;
    // The one that is refused stands first, in the middle, and last.
    refused(&backend, vec![bad()?, good("x")?, good("y")?, delete()?]).await?;
    refused(&backend, vec![good("x")?, bad()?, delete()?, good("y")?]).await?;
    refused(&backend, vec![good("x")?, delete()?, good("y")?, bad()?]).await?;
    for id in ["x", "y"] {
        ensure!(value_at(&backend, state(id)?).await?.is_none(), "{id} was created");
    }
    for id in ["taken", "taken2"] {
        let found = value_at(&backend, state(id)?).await?;
        ensure!(found == Some(json!({"n": 1})), "{id} is {found:?}");
    }
    Ok(())
}

pub(super) async fn preconditions_are_judged_before_any_write(
    backend: Arc<dyn Backend>,
) -> Outcome {
    // `b` must be absent and is, whatever `a` becomes.
    put_any(&backend, state("a")?, 1).await?;
    let writes = vec![
        Write::delete(state("a")?, Precondition::Present),
        put(state("b")?, &json!({"n": 1}), Precondition::Absent)?,
        put(key(Kind::Events, "b", 1)?, &json!({"n": 1}), Precondition::Absent)?,
    ];
    commit(&backend, writes).await?;
    ensure!(value_at(&backend, state("a")?).await?.is_none(), "a is still there");
    ensure!(value_at(&backend, state("b")?).await?.is_some(), "b is not there");
    Ok(())
}

pub(super) async fn a_check_guards_what_is_not_written(backend: Arc<dyn Backend>) -> Outcome {
    let old = put_any(&backend, state("read")?, 1).await?;
    let new = put_any(&backend, state("read")?, 2).await?;
    let guarded = |revision| {
        Ok::<_, String>(vec![
            put(state("written")?, &json!({"n": 1}), Precondition::Any)?,
            Write::check(state("read")?, Precondition::Revision(revision)),
        ])
    };
    refused(&backend, guarded(old)?).await?;
    ensure!(value_at(&backend, state("written")?).await?.is_none(), "it was written");
    commit(&backend, guarded(new)?).await?;
    let read = read(backend.as_ref(), state("read")?).await?;
    ensure!(read.as_ref().map(|d| d.revision) == Some(new), "the check moved the revision");
    ensure!(value(read.as_ref())? == Some(json!({"n": 2})), "the check changed the body");
    Ok(())
}

pub(super) async fn a_check_for_absence_creates_nothing(backend: Arc<dyn Backend>) -> Outcome {
    let absent = || Ok::<_, String>(vec![Write::check(state("a")?, Precondition::Absent)]);
    commit(&backend, absent()?).await?;
    ensure!(value_at(&backend, state("a")?).await?.is_none(), "the check created it");
    put_any(&backend, state("a")?, 1).await?;
    refused(&backend, absent()?).await
}

pub(super) async fn a_document_stands_once_in_a_commit(backend: Arc<dyn Backend>) -> Outcome {
    let twice = vec![
        put(state("a")?, &json!({"n": 1}), Precondition::Any)?,
        put(state("b")?, &json!({"n": 1}), Precondition::Any)?,
        Write::check(state("a")?, Precondition::Any),
    ];
    match backend.commit(twice).await {
        Err(BackendError::Invalid(_)) => {}
        other => return Err(format!("it was answered {other:?}")),
    }
    ensure!(value_at(&backend, state("b")?).await?.is_none(), "half of it was applied");
    Ok(())
}

pub(super) async fn an_empty_commit_is_no_error(backend: Arc<dyn Backend>) -> Outcome {
    ensure!(commit(&backend, Vec::new()).await?.revisions.is_empty(), "revisions of nothing");
    Ok(())
}

pub(super) async fn many_writes_are_one_commit(backend: Arc<dyn Backend>) -> Outcome {
    let most = backend.limits().commit_writes.min(500);
    let all: Vec<Write> = (0..most)
        .map(|n| put(state(&format!("s{n:04}"))?, &json!({"n": n}), Precondition::Absent))
        .collect::<Result<_, String>>()?;
    let told = commit(&backend, all).await?.revisions;
    ensure!(told.len() == most && told.iter().all(Option::is_some), "revisions are missing");
    let found = pages(backend.as_ref(), names(Kind::States, None, 1_000)?).await?;
    ensure!(found.len() == most, "{} of {most} are there", found.len());
    Ok(())
}
