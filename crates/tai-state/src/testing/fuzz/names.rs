//! Ids to the names that they are kept under, and back.

use crate::keys::{Address, Key, Kind, MAX_NAME_BYTES, Name};

/// Two texts, divided by the byte 0xff.
pub(super) fn names(bytes: &[u8]) {
    let (first, second) = match bytes.iter().position(|byte| *byte == 0xff) {
        Some(at) => (&bytes[..at], &bytes[at + 1..]),
        None => (bytes, &[][..]),
    };
    let texts = [first, second].map(String::from_utf8_lossy);
    let escaped = texts.each_ref().map(|text| escape(text));
    for text in &texts {
        taken(text);
    }
    if let [Some(a), Some(b)] = &escaped {
        // Neither two ids under one name, nor two addresses at one place.
        assert_eq!(a == b, texts[0] == texts[1], "{texts:?} are {a} and {b}");
        let swapped = |governor: &Name, state: &Name| Address {
            governor: governor.clone(),
            state: state.clone(),
        };
        let key = |address: &Address, kind, version| Key {
            governor: address.governor.clone(),
            kind,
            name: address.state.clone(),
            version,
        };
        let mut places = std::collections::BTreeSet::new();
        let mut keys = std::collections::BTreeSet::new();
        for address in [swapped(a, b), swapped(b, a)] {
            for kind in Kind::ALL {
                let versions = if kind.is_versioned() { vec![1, 10, u64::MAX] } else { vec![0] };
                for version in versions {
                    let key = key(&address, kind, version);
                    places.insert(key.to_string());
                    keys.insert(key);
                }
            }
        }
        assert_eq!(places.len(), keys.len(), "{texts:?} stand at one place");
    }
}

fn escape(id: &str) -> Option<Name> {
    let name = match Name::escape(id, "id") {
        Ok(name) => name,
        Err(error) => {
            let wanted = if id.is_empty() { "invalid_state" } else { "too_large" };
            assert_eq!(error.code(), wanted, "{error}");
            // Each byte becomes three at most.
            assert!(id.is_empty() || id.len() * 3 > MAX_NAME_BYTES, "{id:?} is refused");
            return None;
        }
    };
    let text = name.as_str();
    assert!(!text.is_empty() && text.len() <= MAX_NAME_BYTES);
    let reserved = text.len() >= 4 && text.starts_with("__") && text.ends_with("__");
    let odd = |c: char| matches!(c, '/' | '~') || c.is_control();
    assert!(!text.contains(odd) && !reserved && text != "." && text != "..", "{text:?}");
    assert_eq!(name.id(), id);
    assert_eq!(Name::from_escaped(text), Some(name.clone()));
    Some(name)
}

/// A text is taken for a name only if it is the one that its id has.
fn taken(text: &str) {
    if let Some(name) = Name::from_escaped(text) {
        assert_eq!(name.as_str(), text);
        let again = Name::escape(&name.id(), "id").expect("the id of a name");
        assert_eq!(again, name, "{text:?} is not what its id escapes to");
    }
}
