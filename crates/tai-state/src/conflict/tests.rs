//! The laws of the resolvers, over versions that are alike in many ways.

use chrono::{DateTime, TimeZone, Utc};
use proptest::prelude::*;
use serde_json::{Map, Value, json};

use super::*;
use crate::clock_vector::VectorClockSnapshot;

fn time(second: i64) -> DateTime<Utc> {
    Utc.timestamp_opt(1_700_000_000 + second, 0).unwrap()
}

fn clock(counts: &[(&str, u64)]) -> VectorClockSnapshot {
    let mut clock = VectorClockSnapshot::new();
    for (node, count) in counts {
        (0..*count).for_each(|_| clock.increment(node));
    }
    clock
}

fn state(second: i64, clock: VectorClockSnapshot, data: Value) -> StateSnapshot {
    StateSnapshot {
        id: "s".into(),
        data,
        version: 1,
        timestamp: time(second),
        metadata: ChangeMetadata::new("a", "b", None),
        causality: clock,
    }
}

/// What two versions have to share to be the same in every bit that is kept.
fn exactly(state: &StateSnapshot) -> String {
    canonical(&serde_json::to_value(state).unwrap())
}

/// Clocks of 1 to 64 nodes, small ones more often, so that they are equal, ordered or concurrent in turn.
fn clocks() -> impl Strategy<Value = VectorClockSnapshot> {
    let some = |nodes: usize, most| prop::collection::vec((0..nodes, 1..3u64), 0..=most);
    prop_oneof![4 => some(2, 2), 2 => some(4, 4), 1 => some(64, 64)].prop_map(|counts| {
        let mut clock = VectorClockSnapshot::new();
        for (node, count) in counts {
            (0..count).for_each(|_| clock.increment(&format!("n{node}")));
        }
        clock
    })
}

fn leaves() -> impl Strategy<Value = Value> {
    let scalars = [json!(null), json!(1), json!(1.0), json!(0.0), json!(-0.0), json!("x")];
    prop::sample::select([scalars.as_slice(), &[json!([1]), json!([1.0]), json!({})]].concat())
}

/// Small objects with the same few keys, put in in any order.
fn objects(inner: impl Strategy<Value = Value> + 'static) -> impl Strategy<Value = Value> {
    let keys = prop::sample::select(vec!["a", "b", "~/", ""]);
    prop::collection::vec((keys, inner), 0..4).prop_map(|fields| {
        let fields = fields.into_iter().map(|(key, value)| (key.to_owned(), value));
        Value::Object(fields.collect::<Map<_, _>>())
    })
}

fn data() -> impl Strategy<Value = Value> {
    let deeper = objects(prop_oneof![3 => leaves(), 1 => objects(leaves())]);
    prop_oneof![2 => leaves(), 3 => objects(leaves()), 2 => deeper]
}

fn versions() -> impl Strategy<Value = StateSnapshot> {
    let context = prop::option::of(leaves());
    let writers = (prop::sample::select(vec!["ada", "bob"]), prop::option::of(1..3u64), context);
    (0..3i64, clocks(), 1..3u64, writers, data()).prop_map(
        |(second, causality, version, (who, parent, context), data)| {
            let mut metadata = ChangeMetadata::new(who, "why", parent);
            if let Some(context) = context {
                metadata = metadata.with_context("k", context);
            }
            StateSnapshot { version, metadata, ..state(second, causality, data) }
        },
    )
}

/// Two or three versions, each of which may be the one before with one thing changed.
fn alike() -> impl Strategy<Value = [StateSnapshot; 3]> {
    let change = |of: StateSnapshot, from: StateSnapshot, what: u8| match what {
        0 => StateSnapshot { data: from.data, ..of },
        1 => StateSnapshot { causality: from.causality, ..of },
        2 => StateSnapshot { metadata: from.metadata, ..of },
        3 => StateSnapshot { version: from.version, ..of },
        4 => StateSnapshot { timestamp: from.timestamp, ..of },
        _ => from,
    };
    (versions(), versions(), versions(), 0..9u8, 0..9u8).prop_map(
        move |(a, b, c, first, second)| {
            let b = change(a.clone(), b, first);
            let c = change(b.clone(), c, second);
            [a, b, c]
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(10_000))]

    #[test]
    fn the_resolvers_that_choose([a, b, c] in alike()) {
        let resolvers: [(&dyn ConflictResolver, bool); 3] = [
            (&LastWriteWinsResolver, true),
            (&HighestVersionResolver, true),
            (&CausalityAwareResolver, false),
        ];
        for (resolver, is_associative) in resolvers {
            let resolve = |a: &StateSnapshot, b: &StateSnapshot| resolver.resolve(a, b).unwrap();
            let won = resolve(&a, &b);
            prop_assert_eq!(exactly(&won), exactly(&resolve(&b, &a)), "commutative");
            prop_assert!([exactly(&a), exactly(&b)].contains(&exactly(&won)), "one of the two");
            prop_assert_eq!(exactly(&resolve(&a, &a)), exactly(&a), "idempotent");
            if is_associative {
                let left = resolve(&won, &c);
                prop_assert_eq!(exactly(&left), exactly(&resolve(&a, &resolve(&b, &c))), "associative");
            }
            let all = exactly(&resolver.resolve_all(&[a.clone(), b.clone(), c.clone()]).unwrap());
            for order in [[&a, &c, &b], [&b, &a, &c], [&b, &c, &a], [&c, &a, &b], [&c, &b, &a]] {
                let order = order.map(Clone::clone);
                prop_assert_eq!(&all, &exactly(&resolver.resolve_all(&order).unwrap()));
            }
            let two = resolver.resolve_all(&[b.clone(), a.clone()]).unwrap();
            prop_assert_eq!(exactly(&two), exactly(&won));
        }
        // Of equal times, causality is never turned around.
        if a.timestamp == b.timestamp && a.causality.happened_before(&b.causality) {
            prop_assert_eq!(exactly(&LastWriteWinsResolver.resolve(&a, &b).unwrap()), exactly(&b));
        }
        if a.causality.happened_before(&b.causality) {
            prop_assert_eq!(exactly(&CausalityAwareResolver.resolve(&a, &b).unwrap()), exactly(&b));
        }
        let newest = CausalityAwareResolver.resolve_all(&[a.clone(), b.clone(), c.clone()]).unwrap();
        prop_assert!([&a, &b, &c].iter().all(|v| !newest.causality.happened_before(&v.causality)));
    }

    #[test]
    fn merging([a, b, c] in alike(), base in data(), is_lenient in any::<bool>()) {
        let merge = FieldMergeResolver::new(base.clone());
        let merge = if is_lenient { merge.or_last_write() } else { merge };
        let is_order_kept = |left: Result<StateSnapshot>, right: Result<StateSnapshot>| match (left, right) {
            (Ok(left), Ok(right)) => exactly(&left) == exactly(&right),
            (
                Err(Error::MergeConflict { fields: left, .. }),
                Err(Error::MergeConflict { fields: right, .. }),
            ) => !is_lenient && left == right && left.is_sorted() && !left.is_empty(),
            _ => false,
        };
        prop_assert!(is_order_kept(merge.resolve(&a, &b), merge.resolve(&b, &a)), "commutative");
        prop_assert_eq!(exactly(&merge.resolve(&a, &a).unwrap()), exactly(&a), "idempotent");
        let one = merge.resolve_all(&[a.clone(), b.clone(), c.clone()]);
        prop_assert!(is_order_kept(one, merge.resolve_all(&[c, b.clone(), a.clone()])));
        if let Ok(merged) = merge.resolve(&a, &b) {
            prop_assert!(!merged.causality.happened_before(&a.causality));
            prop_assert_eq!(merged.version, a.version.max(b.version));
            prop_assert_eq!(merged.timestamp, a.timestamp.max(b.timestamp));
            // Where one side has changed nothing, the other side's value is the answer.
            if same(&a.data, &base) {
                prop_assert!(same(&merged.data, &b.data));
            }
        }
    }

    #[test]
    fn sameness_is_that_of_the_canonical_text(a in data(), b in data()) {
        prop_assert_eq!(same(&a, &b), canonical(&a) == canonical(&b));
        prop_assert!(same(&a, &a.clone()));
    }
}

#[test]
fn last_write_wins_by_table() {
    let (small, large) = (clock(&[("a", 1)]), clock(&[("a", 1), ("b", 1)]));
    let one = || state(1, small.clone(), json!(1));
    let cases = [
        // The later one wins, whatever the clocks and versions say.
        (
            StateSnapshot { version: 9, ..state(1, large.clone(), json!(2)) },
            state(2, small.clone(), json!(1)),
        ),
        (one(), state(1, large.clone(), json!(1))),
        (state(1, clock(&[("b", 9)]), json!(1)), state(1, clock(&[("a", 10)]), json!(1))),
        (state(1, clock(&[("a", 1)]), json!(1)), state(1, clock(&[("b", 1)]), json!(1))),
        (one(), StateSnapshot { version: 2, ..one() }),
        (one(), StateSnapshot { metadata: ChangeMetadata::new("b", "b", None), ..one() }),
        (one(), StateSnapshot { metadata: ChangeMetadata::new("a", "c", None), ..one() }),
        (one(), StateSnapshot { metadata: ChangeMetadata::new("a", "b", Some(1)), ..one() }),
        (one(), StateSnapshot { metadata: one().metadata.with_context("k", 1), ..one() }),
    ];
    for (loser, winner) in cases {
        assert_eq!(last_write(&loser, &winner), Ordering::Less, "{loser:?} {winner:?}");
        assert_eq!(last_write(&winner, &loser), Ordering::Greater, "{loser:?} {winner:?}");
    }
    // Data that only the canonical text tells apart are apart.
    for (a, b) in [(json!(1), json!(1.0)), (json!(0.0), json!(-0.0)), (json!([1]), json!([2]))] {
        assert_ne!(
            last_write(&state(1, small.clone(), a), &state(1, small.clone(), b)),
            Ordering::Equal
        );
    }
    let [here, there] = [r#"{"a":1,"b":2}"#, r#"{"b":2,"a":1}"#]
        .map(|text| state(1, small.clone(), serde_json::from_str(text).unwrap()));
    assert_eq!(last_write(&here, &there), Ordering::Equal);
}

#[test]
fn causality_counts_more_than_the_clock_on_the_wall() {
    let cause = state(100, clock(&[("a", 1)]), json!("cause"));
    let effect = state(1, clock(&[("a", 1), ("b", 1)]), json!("effect"));
    let apart = state(50, clock(&[("c", 1)]), json!("apart"));
    let data = |resolver: &dyn ConflictResolver, versions: &[&StateSnapshot]| {
        let versions: Vec<_> = versions.iter().map(|version| (*version).clone()).collect();
        resolver.resolve_all(&versions).unwrap().data
    };
    assert_eq!(data(&CausalityAwareResolver, &[&cause, &effect]), json!("effect"));
    assert_eq!(data(&LastWriteWinsResolver, &[&cause, &effect]), json!("cause"));
    assert_eq!(data(&CausalityAwareResolver, &[&effect, &apart]), json!("apart"));
    // The cause is the last write of the three, but one of them knew of it.
    assert_eq!(data(&CausalityAwareResolver, &[&cause, &effect, &apart]), json!("apart"));
}

/// What would become of a version that wins with a merged clock: it would win where it had lost, and the
/// answer would depend on who meets whom first.
#[test]
fn a_merged_clock_in_the_answer_would_break_associativity() {
    let merging = ResolveWith::new("merging", |a: &StateSnapshot, b: &StateSnapshot| {
        let mut won = LastWriteWinsResolver.resolve(a, b)?;
        won.causality.merge(&a.causality);
        won.causality.merge(&b.causality);
        Ok(won)
    });
    let a = state(1, clock(&[("a", 3)]), json!("a"));
    let b = state(1, clock(&[("b", 4)]), json!("b"));
    let c = state(1, clock(&[("c", 5)]), json!("c"));
    let resolve = |a: &StateSnapshot, b: &StateSnapshot| merging.resolve(a, b).unwrap();
    assert_eq!(resolve(&resolve(&a, &b), &c).data, json!("b"));
    assert_eq!(resolve(&a, &resolve(&b, &c)).data, json!("c"));
}

#[test]
fn three_way_merge_by_table() {
    type Case = (Value, Value, Value, Result<Value, Vec<&'static str>>);
    let cases: [Case; 16] = [
        // base, ours, theirs
        (json!({"x": 1}), json!({"x": 1}), json!({"x": 2}), Ok(json!({"x": 2}))),
        (
            json!({"x": 1, "y": 1}),
            json!({"x": 2, "y": 1}),
            json!({"x": 1, "y": 2}),
            Ok(json!({"x": 2, "y": 2})),
        ),
        (json!({"x": 1}), json!({"x": 2}), json!({"x": 2}), Ok(json!({"x": 2}))),
        (json!({"x": 1}), json!({"x": 2}), json!({"x": 3}), Err(vec!["/x"])),
        // Taking away is a change; null is a value.
        (json!({"x": 1, "y": 1}), json!({"y": 1}), json!({"x": 1, "y": 2}), Ok(json!({"y": 2}))),
        (json!({"x": 1}), json!({}), json!({}), Ok(json!({}))),
        (json!({"x": 1}), json!({}), json!({"x": 2}), Err(vec!["/x"])),
        (json!({"x": 1}), json!({"x": null}), json!({"x": 1}), Ok(json!({"x": null}))),
        (json!({"x": 1}), json!({"x": null}), json!({}), Err(vec!["/x"])),
        // At every depth, and arrays as wholes.
        (
            json!({"a": {"x": 1, "y": 1}}),
            json!({"a": {"x": 2, "y": 1}}),
            json!({"a": {"x": 1}}),
            Ok(json!({"a": {"x": 2}})),
        ),
        (json!({"a": [1]}), json!({"a": [1, 2]}), json!({"a": [0, 1]}), Err(vec!["/a"])),
        // Added on both sides: objects are merged, all else must be equal.
        (
            json!({}),
            json!({"a": {"x": 1}}),
            json!({"a": {"y": 1}}),
            Ok(json!({"a": {"x": 1, "y": 1}})),
        ),
        (json!({"a": 5}), json!({"a": {"x": 1}}), json!({"a": {"x": 2}}), Err(vec!["/a/x"])),
        // Pointers are escaped and sorted.
        (
            json!({}),
            json!({"b": 1, "a/b": {"~": 1}, "": 1}),
            json!({"b": 2, "a/b": {"~": 2}, "": 2}),
            Err(vec!["/", "/a~1b/~0", "/b"]),
        ),
        // Whole values.
        (json!({"x": 1}), json!([1]), json!({"x": 2}), Err(vec![""])),
        (json!(1), json!(1.0), json!(1), Ok(json!(1.0))),
    ];
    for (base, ours, theirs, expected) in cases {
        let merge = FieldMergeResolver::new(base.clone());
        let (ours, theirs) =
            (state(1, clock(&[("a", 1)]), ours), state(2, clock(&[("b", 1)]), theirs));
        let merged = merge.resolve(&ours, &theirs);
        match (&merged, &expected) {
            (Ok(merged), Ok(expected)) => assert!(same(&merged.data, expected), "{merged:?}"),
            (Err(Error::MergeConflict { state, fields }), Err(expected)) => {
                assert_eq!(
                    (state.as_str(), fields),
                    ("s", &expected.iter().map(ToString::to_string).collect())
                );
            }
            _ => panic!("{base} {ours:?} {theirs:?}: {merged:?}, expected {expected:?}"),
        }
        // What a base that is handed over says counts more than the one that was set.
        let handed = state(0, clock(&[]), base);
        let elsewhere = FieldMergeResolver::new(json!("x"));
        let again = elsewhere.resolve_with_base(Some(&handed), &ours, &theirs);
        assert_eq!(again.map(|m| m.data).ok(), merged.map(|m| m.data).ok());
    }
}

#[test]
fn the_last_write_decides_only_the_fields_in_conflict() {
    let base = json!({"x": 1, "y": 1, "z": 1, "gone": 1});
    let early = state(1, clock(&[("a", 1)]), json!({"x": 2, "y": 2, "z": 1, "gone": 2}));
    let late = state(2, clock(&[("b", 1)]), json!({"x": 3, "y": 1, "z": 1}));
    let merge = FieldMergeResolver::new(base).or_last_write();
    for merged in [merge.resolve(&early, &late), merge.resolve(&late, &early)] {
        let merged = merged.unwrap();
        assert_eq!(merged.data, json!({"x": 3, "y": 2, "z": 1}));
        assert_eq!(merged.timestamp, late.timestamp);
        assert_eq!(merged.causality, clock(&[("a", 1), ("b", 1)]));
    }
}

#[test]
fn what_cannot_be_resolved_is_refused() {
    let one = state(1, clock(&[]), json!(1));
    let other = StateSnapshot { id: "other".into(), ..one.clone() };
    let nest = |levels| (0..levels).fold(json!({}), |inner, _| json!([inner]));
    let deep = state(2, clock(&[]), nest(MAX_DEPTH));
    let fits = state(2, clock(&[]), nest(MAX_DEPTH - 1));
    let custom = ResolveWith::new("first", |a: &StateSnapshot, _: &StateSnapshot| Ok(a.clone()));
    let resolvers: [Box<dyn ConflictResolver>; 6] = [
        Box::new(LastWriteWinsResolver),
        Box::new(CausalityAwareResolver),
        Box::new(HighestVersionResolver),
        Box::new(FieldMergeResolver::default().or_last_write()),
        Box::new(FieldMergeResolver::new(nest(MAX_DEPTH - 1)).or_last_write()),
        Box::new(custom),
    ];
    for resolver in resolvers {
        for (a, b) in [(&one, &other), (&one, &deep), (&deep, &one)] {
            let refused = resolver.resolve(a, b).unwrap_err();
            assert_eq!(refused.code(), "invalid_state", "{} {refused}", resolver.name());
            assert!(resolver.resolve_all(&[a.clone(), b.clone()]).is_err());
        }
        assert_eq!(resolver.resolve_all(&[]).unwrap_err().code(), "invalid_state");
        resolver.resolve(&fits, &one).unwrap();
        resolver.resolve(&fits, &fits).unwrap();
        assert_eq!(resolver.resolve_all(std::slice::from_ref(&one)).unwrap(), one);
    }
    // Far too deep: neither recursion nor dropping it may overflow the stack.
    let deepest = (0..100_000).fold(json!({}), |inner, _| Value::Array(vec![inner]));
    let refused = FieldMergeResolver::new(deepest).resolve(&one, &fits).unwrap_err();
    assert_eq!(refused.code(), "invalid_state");
}

#[test]
fn an_error_shows_some_fields_and_keeps_all() {
    let fields: Vec<String> = (0..8).map(|n| format!("/f{n}")).collect();
    let error = Error::MergeConflict { state: "s".into(), fields };
    let shown = r#"s was changed differently on both sides in "/f0", "/f1", "/f2", "/f3", "/f4" and 3 more"#;
    assert_eq!(error.to_string(), shown);
    assert_eq!(error.code(), "merge_conflict");
    assert!(error.is_permanent() && error.hint().is_some());
}
