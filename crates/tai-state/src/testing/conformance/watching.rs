//! Behaviours about alarms: they may ring late, together or without need, but never not at all.

use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};

use super::*;
use crate::backend::{Alarm, Backend, BackendError, Key, Kind, Precondition, Rung, Write};

/// No ring within this time is a ring that never comes.
const PATIENCE: Duration = Duration::from_secs(20);

async fn watch(
    backend: &Arc<dyn Backend>,
    kind: Kind,
    id: Option<&str>,
) -> Result<Box<dyn Alarm>, String> {
    let id = id.map(name).transpose()?;
    let alarm = backend.watch(&name("gov")?, kind, id.as_ref()).await;
    alarm.map_err(|error| format!("watch: {error}"))
}

/// Waits until the alarm has rung for this name.
async fn rings_for(alarm: &mut Box<dyn Alarm>, id: &str, what: &str) -> Outcome {
    let id = name(id)?;
    let ringing = async {
        loop {
            match alarm.ring().await {
                Ok(Rung::Anything) => return Ok(()),
                Ok(Rung::Names(names)) if names.contains(&id) => return Ok(()),
                Ok(Rung::Names(_)) => {}
                Err(error) => return Err(format!("{what}: {error}")),
            }
        }
    };
    let rung = tokio::time::timeout(PATIENCE, ringing).await;
    rung.unwrap_or_else(|_| Err(format!("{what}: the alarm does not ring")))
}

async fn number(backend: &Arc<dyn Backend>, key: &Key) -> Result<u64, String> {
    let found = value_at(backend, key.clone()).await?;
    Ok(found.and_then(|v| v.get("n").and_then(Value::as_u64)).unwrap_or(0))
}

pub(super) async fn every_change_rings(backend: Arc<dyn Backend>) -> Outcome {
    for kind in [Kind::States, Kind::Locks, Kind::Commands] {
        let mut all = watch(&backend, kind, None).await?;
        let mut one = watch(&backend, kind, Some("a/")).await?;
        let a = key(kind, "a/", 0)?;
        let put = |n| put(a.clone(), &json!({"n": n}), Precondition::Any);
        for (what, writes) in [
            ("creating", vec![put(1)?]),
            ("changing", vec![put(2)?]),
            ("deleting", vec![Write::delete(a.clone(), Precondition::Present)]),
            ("creating again", vec![put(1)?]),
        ] {
            commit(&backend, writes).await?;
            rings_for(&mut all, "a/", &format!("{what}, all of {}", kind.as_str())).await?;
            rings_for(&mut one, "a/", &format!("{what}, one of {}", kind.as_str())).await?;
        }
        // One that was not there when the watch began, among others in one commit.
        let others = ["b", "c", "d"].map(|id| {
            let key = key(kind, id, 0)?;
            super::put(key, &json!({"n": 1}), Precondition::Absent)
        });
        commit(&backend, others.into_iter().collect::<Result<_, _>>()?).await?;
        rings_for(&mut all, "c", "creating three").await?;
    }
    Ok(())
}

/// A reader who looks only when it rings reaches the last of many changes.
pub(super) async fn nothing_that_changes_is_missed(backend: Arc<dyn Backend>) -> Outcome {
    const CHANGES: u64 = 30;
    for id in [Some("watched"), None] {
        let mut alarm = watch(&backend, Kind::States, id).await?;
        let watched = state("watched")?;
        let before = number(&backend, &watched).await?;
        let writer = {
            let (backend, watched) = (Arc::clone(&backend), watched.clone());
            let elsewhere = Key { governor: name("other")?, ..watched.clone() };
            tokio::spawn(async move {
                for n in before + 1..=before + CHANGES {
                    // What is none of its business must not drown what is.
                    let noise = [elsewhere.clone(), key(Kind::Locks, "watched", 0)?];
                    let noise = noise.map(|key| put(key, &json!({"n": n}), Precondition::Any));
                    commit(&backend, noise.into_iter().collect::<Result<_, _>>()?).await?;
                    put_any(&backend, watched.clone(), n).await?;
                }
                Ok::<(), String>(())
            })
        };
        while number(&backend, &watched).await? < before + CHANGES {
            rings_for(&mut alarm, "watched", "while somebody writes").await?;
        }
        writer.await.map_err(|error| error.to_string())??;
    }
    Ok(())
}

pub(super) async fn a_ring_waits_for_who_listens_later(backend: Arc<dyn Backend>) -> Outcome {
    let mut all = watch(&backend, Kind::States, None).await?;
    let mut one = watch(&backend, Kind::States, Some("a")).await?;
    for n in 1..=20 {
        put_any(&backend, state(if n == 10 { "a" } else { "b" })?, n).await?;
    }
    rings_for(&mut all, "a", "all, afterwards").await?;
    rings_for(&mut one, "a", "one, afterwards").await
}

/// A wait that is given up, before a change and after it, does not take the ring with it.
pub(super) async fn a_wait_that_is_given_up_loses_nothing(backend: Arc<dyn Backend>) -> Outcome {
    for id in [Some("a"), None] {
        let mut alarm = watch(&backend, Kind::States, id).await?;
        for n in 1..=10 {
            let _ = tokio::time::timeout(Duration::ZERO, alarm.ring()).await;
            put_any(&backend, state("a")?, n).await?;
            let mut has_rung = false;
            for wait in [0, 0, 100, 1_000] {
                let wait = Duration::from_micros(wait);
                has_rung |= tokio::time::timeout(wait, alarm.ring()).await.is_ok();
            }
            if !has_rung {
                rings_for(&mut alarm, "a", &format!("after change {n}")).await?;
            }
        }
    }
    Ok(())
}

pub(super) async fn a_watch_must_fit_its_kind(backend: Arc<dyn Backend>) -> Outcome {
    for kind in [Kind::Events, Kind::Snapshots] {
        match backend.watch(&name("gov")?, kind, None).await {
            Err(BackendError::Invalid(_)) => {}
            other => return Err(format!("{} were watched: {other:?}", kind.as_str())),
        }
    }
    Ok(())
}
