//! Behaviours about many documents and many writers: scans, lists, views, races.

use std::collections::BTreeSet;
use std::sync::Arc;

use serde_json::{Value, json};

use super::*;
use crate::backend::{Backend, BackendError, Key, Kind, Name, Precondition, Scan, Write};

pub(super) async fn names_are_scanned_in_order(backend: Arc<dyn Backend>) -> Outcome {
    let unordered = ["b", "a", "é", "Z", "a0", "a!", "a/", "a~", "z", "\u{10ffff}", "\u{ffff}"];
    for id in unordered {
        put_any(&backend, state(id)?, 1).await?;
    }
    let mut wanted: Vec<Name> = unordered.iter().map(|id| name(id)).collect::<Result<_, _>>()?;
    wanted.sort_by(|a, b| a.as_str().as_bytes().cmp(b.as_str().as_bytes()));
    for limit in [100, 3, 1] {
        let found = pages(backend.as_ref(), names(Kind::States, None, limit)?).await?;
        let found: Vec<Name> = found.into_iter().map(|document| document.key.name).collect();
        ensure!(found == wanted, "by {limit}: {found:?}");
    }
    let governor = name("gov")?;
    let mut found: Vec<Name> = Vec::new();
    loop {
        let page = backend.names(&governor, Kind::States, found.last(), 4).await;
        let page = page.map_err(|error| error.to_string())?;
        ensure!(page.len() <= 4, "a page of names is larger than its limit");
        if page.is_empty() {
            break;
        }
        found.extend(page);
    }
    ensure!(found == wanted, "names: {found:?}");
    Ok(())
}

pub(super) async fn pages_have_no_gaps_and_no_doubles(backend: Arc<dyn Backend>) -> Outcome {
    for n in 0..25 {
        put_any(&backend, state(&format!("s{n:02}"))?, n).await?;
    }
    for n in [0, 7, 8, 24] {
        let gone = state(&format!("s{n:02}"))?;
        commit(&backend, vec![Write::delete(gone, Precondition::Present)]).await?;
    }
    for limit in [1, 5, 7, 21, 100] {
        let found = pages(backend.as_ref(), names(Kind::States, None, limit)?).await?;
        let found = ids(&found);
        let distinct: BTreeSet<&String> = found.iter().collect();
        ensure!(found.len() == 21 && distinct.len() == 21, "by {limit}: {found:?}");
    }
    // After a name that is deleted, that never was, and the last.
    for (after, count) in [("s07", 15), ("s05x", 16), ("s23", 0), ("zzz", 0), ("!", 21)] {
        let found = pages(backend.as_ref(), names(Kind::States, Some(after), 4)?).await?;
        ensure!(found.len() == count, "after {after}: {:?}", ids(&found));
    }
    Ok(())
}

pub(super) async fn a_scan_sees_only_its_own(backend: Arc<dyn Backend>) -> Outcome {
    for governor in ["go", "gov", "gov2"] {
        for kind in Kind::ALL {
            let (governor, name) = (name(governor)?, name("a")?);
            let key = Key { governor, kind, name, version: u64::from(kind.is_versioned()) };
            put_any(&backend, key, 1).await?;
        }
    }
    put_any(&backend, key(Kind::Events, "aa", 1)?, 1).await?;
    for kind in [Kind::States, Kind::Locks, Kind::Commands] {
        let found = pages(backend.as_ref(), names(kind, None, 10)?).await?;
        ensure!(found.len() == 1, "{kind:?}: {found:?}");
        ensure!(
            found.iter().all(|d| d.key.kind == kind && d.key.governor.id() == "gov"),
            "{kind:?}"
        );
    }
    let found = pages(backend.as_ref(), versions("a", 0, u64::MAX, 10)?).await?;
    ensure!(ids(&found) == ["a"], "{found:?}");
    let nobody = Scan { governor: name("nobody")?, ..names(Kind::States, None, 10)? };
    ensure!(pages(backend.as_ref(), nobody).await?.is_empty(), "an unknown governor has states");
    Ok(())
}

pub(super) async fn versions_are_scanned_in_their_range(backend: Arc<dyn Backend>) -> Outcome {
    for version in [3, 1, 2, 10, 9, 11, 100, i64::MAX as u64] {
        put_any(&backend, key(Kind::Events, "a", version)?, version).await?;
    }
    for (from, to, wanted) in [
        (0, u64::MAX, vec![1, 2, 3, 9, 10, 11, 100, i64::MAX as u64]),
        (2, 10, vec![2, 3, 9, 10]),
        (4, 8, vec![]),
        (100, 100, vec![100]),
        (5, 4, vec![]),
        (101, u64::MAX, vec![i64::MAX as u64]),
    ] {
        for limit in [1, 3, 100] {
            let found = pages(backend.as_ref(), versions("a", from, to, limit)?).await?;
            let found: Vec<u64> = found.iter().map(|document| document.key.version).collect();
            ensure!(found == wanted, "{from}..={to} by {limit}: {found:?}");
        }
    }
    Ok(())
}

pub(super) async fn a_scan_must_fit_its_kind(backend: Arc<dyn Backend>) -> Outcome {
    let misfits = [
        names(Kind::Events, None, 1)?,
        Scan { kind: Kind::States, ..versions("a", 0, 1, 1)? },
        names(Kind::States, None, 0)?,
    ];
    for misfit in misfits {
        match backend.scan(&misfit).await {
            Err(BackendError::Invalid(_)) => {}
            other => return Err(format!("{misfit:?} was answered {other:?}")),
        }
    }
    Ok(())
}

pub(super) async fn governors_are_listed_in_order(backend: Arc<dyn Backend>) -> Outcome {
    for id in ["c", "a", "b/", "b", "é"] {
        let key = Key { governor: name(id)?, ..state("s")? };
        put_any(&backend, key, 1).await?;
    }
    let mut found = Vec::new();
    loop {
        let page = backend.governors(found.last(), 2).await.map_err(|error| error.to_string())?;
        ensure!(page.len() <= 2, "a page is larger than its limit");
        if page.is_empty() {
            break;
        }
        found.extend(page);
    }
    let found: Vec<String> = found.iter().map(Name::id).collect();
    ensure!(found == ["a", "b", "b/", "c", "é"], "{found:?}");
    Ok(())
}

pub(super) async fn documents_are_counted(backend: Arc<dyn Backend>) -> Outcome {
    for n in 1..=5 {
        put_any(&backend, state(&format!("s{n}"))?, n).await?;
        put_any(&backend, key(Kind::Events, "s1", n)?, n).await?;
    }
    let elsewhere = Key { governor: name("other")?, ..state("s")? };
    put_any(&backend, elsewhere, 1).await?;
    commit(&backend, vec![Write::delete(state("s5")?, Precondition::Any)]).await?;
    let (gov, none) = (name("gov")?, name("none")?);
    for (governor, kind, wanted) in [
        (None, Kind::States, 5),
        (Some(&gov), Kind::States, 4),
        (None, Kind::Events, 5),
        (Some(&gov), Kind::Events, 5),
        (Some(&none), Kind::Events, 0),
        (None, Kind::Locks, 0),
    ] {
        let found = backend.count(governor, kind).await.map_err(|error| error.to_string())?;
        ensure!(found == wanted, "{governor:?} {kind:?}: {found}");
    }
    Ok(())
}

pub(super) async fn escaped_ids_of_any_kind_are_kept(backend: Arc<dyn Backend>) -> Outcome {
    let long = "x".repeat(1_400);
    let wide = "é".repeat(700);
    let hostile = [
        ".",
        "..",
        "../../etc/passwd",
        "__x__",
        "__id7__",
        "a~00000000000000000001",
        "%2F",
        "a\0b",
        "\n",
        " ",
        "-rf",
        "CON",
        "\u{202e}",
        "e\u{301}",
        "\u{e9}",
        "\u{feff}",
        "'; --",
        "`",
        &long,
        &wide,
    ];
    for (n, id) in hostile.iter().enumerate() {
        let n = n as u64;
        let governor = name(id)?;
        put_any(&backend, state(id)?, n).await?;
        put_any(&backend, key(Kind::Events, id, 1)?, n).await?;
        put_any(&backend, Key { governor, ..state("s")? }, n).await?;
    }
    for (n, id) in hostile.iter().enumerate() {
        let wanted = Some(json!({"n": n}));
        let governor = name(id)?;
        for key in [state(id)?, key(Kind::Events, id, 1)?, Key { governor, ..state("s")? }] {
            ensure!(value_at(&backend, key).await? == wanted, "{id:?} came back changed");
        }
        let found = pages(backend.as_ref(), versions(id, 0, 9, 9)?).await?;
        ensure!(ids(&found) == [*id], "{id:?}: {found:?}");
    }
    let found = pages(backend.as_ref(), names(Kind::States, None, 6)?).await?;
    ensure!(found.len() == hostile.len(), "{} of {}", found.len(), hostile.len());
    Ok(())
}

pub(super) async fn a_view_is_one_cut(backend: Arc<dyn Backend>) -> Outcome {
    put_any(&backend, state("a")?, 1).await?;
    put_any(&backend, state("b")?, 1).await?;
    let view = backend.view().await.map_err(|error| format!("view: {error}"))?;
    let first = read(view.as_ref(), state("a")?).await?;
    put_any(&backend, state("a")?, 2).await?;
    put_any(&backend, state("b")?, 2).await?;
    put_any(&backend, state("c")?, 2).await?;
    let one = Some(json!({"n": 1}));
    ensure!(value(first.as_ref())? == one, "a is not what it was");
    for id in ["a", "b"] {
        let found = value(read(view.as_ref(), state(id)?).await?.as_ref())?;
        ensure!(found == one, "{id} is {found:?} in the view");
    }
    let found = pages(view.as_ref(), names(Kind::States, None, 1)?).await?;
    ensure!(ids(&found) == ["a", "b"], "the view lists {:?}", ids(&found));
    drop(view);
    ensure!(value_at(&backend, state("b")?).await? == Some(json!({"n": 2})), "b is not newest");
    Ok(())
}

pub(super) async fn a_view_of_governors_is_one_cut(backend: Arc<dyn Backend>) -> Outcome {
    put_any(&backend, state("a")?, 1).await?;
    let view = backend.view().await.map_err(|error| format!("view: {error}"))?;
    let listed = async || {
        let names = view.governors(None, 10).await.map_err(|error| error.to_string())?;
        Ok::<_, String>(names.iter().map(Name::id).collect::<Vec<_>>())
    };
    ensure!(listed().await? == ["gov"], "the view lists {:?}", listed().await?);
    let elsewhere = Key { governor: name("other")?, ..state("b")? };
    put_any(&backend, elsewhere.clone(), 1).await?;
    put_any(&backend, state("b")?, 1).await?;
    ensure!(listed().await? == ["gov"], "the view lists {:?} later", listed().await?);
    ensure!(read(view.as_ref(), elsewhere).await?.is_none(), "the view sees what came later");
    let count = view.count(None, Kind::States).await.map_err(|error| error.to_string())?;
    ensure!(count == 1, "the view counts {count}");
    Ok(())
}

pub(super) async fn a_reader_who_sees_the_last_write_sees_the_first(
    backend: Arc<dyn Backend>,
) -> Outcome {
    const ROUNDS: u64 = 60;
    let writer = {
        let backend = Arc::clone(&backend);
        tokio::spawn(async move {
            for n in 1..=ROUNDS {
                let writes = vec![
                    put(key(Kind::Events, "s", n)?, &json!({"n": n}), Precondition::Absent)?,
                    put(state("log")?, &json!({"n": n}), Precondition::Any)?,
                    put(state("head")?, &json!({"n": n}), Precondition::Any)?,
                ];
                commit(&backend, writes).await?;
            }
            Ok::<(), String>(())
        })
    };
    loop {
        let found = backend
            .get(&[state("head")?, state("log")?])
            .await
            .map_err(|error| error.to_string())?;
        let mut numbers = found.iter().map(|document| {
            let n = value(document.as_ref())?.and_then(|v| v.get("n").and_then(Value::as_u64));
            Ok::<u64, String>(n.unwrap_or(0))
        });
        let (Some(head), Some(log)) = (numbers.next(), numbers.next()) else {
            return Err("two answers were due".into());
        };
        let (head, log) = (head?, log?);
        ensure!(head <= log, "the head says {head} and the log {log}");
        if head > 0 {
            let event = value_at(&backend, key(Kind::Events, "s", head)?).await?;
            ensure!(event.is_some(), "the head says {head} and its event is not there");
        }
        if head == ROUNDS {
            break;
        }
        tokio::task::yield_now().await;
    }
    writer.await.map_err(|error| error.to_string())?
}

pub(super) async fn of_racing_creates_one_wins(backend: Arc<dyn Backend>) -> Outcome {
    for round in 0..5 {
        let mut tasks = Vec::new();
        for n in 0..16 {
            let backend = Arc::clone(&backend);
            let write = put(state(&format!("r{round}"))?, &json!({"n": n}), Precondition::Absent)?;
            tasks.push(tokio::spawn(async move { (n, backend.commit(vec![write]).await) }));
        }
        let mut winners = Vec::new();
        for task in tasks {
            match task.await.map_err(|error| error.to_string())? {
                (n, Ok(_)) => winners.push(n),
                (_, Err(BackendError::Conflict)) => {}
                (n, Err(error)) => return Err(format!("writer {n}: {error}")),
            }
        }
        let found = value_at(&backend, state(&format!("r{round}"))?).await?;
        ensure!(
            winners.len() == 1 && found == winners.first().map(|n| json!({"n": n})),
            "winners {winners:?}, stored {found:?}"
        );
    }
    Ok(())
}

pub(super) async fn racing_writers_lose_nothing(backend: Arc<dyn Backend>) -> Outcome {
    const WRITERS: u64 = 8;
    const STEPS: u64 = 10;
    put_any(&backend, state("counter")?, 0).await?;
    let mut tasks = Vec::new();
    for _ in 0..WRITERS {
        let backend = Arc::clone(&backend);
        tasks.push(tokio::spawn(async move {
            let mut done = 0;
            while done < STEPS {
                let found = read(backend.as_ref(), state("counter")?).await?.ok_or("it is gone")?;
                let n: Value = found.body.parse().map_err(|error| format!("{error}"))?;
                let n = n.get("n").and_then(Value::as_u64).ok_or("no number")?;
                let guard = Precondition::Revision(found.revision);
                let write = put(state("counter")?, &json!({"n": n + 1}), guard)?;
                match backend.commit(vec![write]).await {
                    Ok(_) => done += 1,
                    Err(BackendError::Conflict) => {
                        tokio::time::sleep(crate::clock::jitter(std::time::Duration::from_millis(
                            5,
                        )))
                        .await;
                    }
                    Err(error) => return Err(error.to_string()),
                }
            }
            Ok::<(), String>(())
        }));
    }
    for task in tasks {
        task.await.map_err(|error| error.to_string())??;
    }
    let found = value_at(&backend, state("counter")?).await?;
    ensure!(found == Some(json!({"n": WRITERS * STEPS})), "{found:?}");
    Ok(())
}

pub(super) async fn identity_does_not_change(backend: Arc<dyn Backend>) -> Outcome {
    let before = backend.identity();
    put_any(&backend, state("a")?, 1).await?;
    ensure!(backend.identity() == before, "it changed");
    ensure!(!before.store.is_empty() && !before.node.is_empty(), "it is empty");
    ensure!(before.incarnation > 0, "the incarnation is 0");
    Ok(())
}

/// Leases are judged by this clock.
pub(super) async fn the_backends_clock_goes_on(backend: Arc<dyn Backend>) -> Outcome {
    put_any(&backend, state("a")?, 1).await?;
    let keys = [state("a")?, state("b")?];
    let look = || async { backend.get_at(&keys).await.map_err(|error| error.to_string()) };
    let (found, mut now) = look().await?;
    ensure!(found == backend.get(&keys).await.map_err(|error| error.to_string())?, "{found:?}");
    let started = now.clone();
    for _ in 0..20 {
        let (_, later) = look().await?;
        ensure!(
            later.epoch == now.epoch,
            "the epoch changed from {} to {}",
            now.epoch,
            later.epoch
        );
        ensure!(later.micros >= now.micros, "time went back");
        now = later;
    }
    ensure!(now.micros > started.micros, "time stands still");
    Ok(())
}
