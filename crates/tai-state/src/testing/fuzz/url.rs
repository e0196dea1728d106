//! Store URLs: read, shown and read again; and what is refused tells no secret.

use crate::url::StoreUrl;

/// Text.
pub(super) fn url(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    let secret = password(text);
    let said = match text.parse::<StoreUrl>() {
        Ok(url) => {
            let shown = url.to_string();
            let again = shown.parse::<StoreUrl>();
            assert_eq!(again.ok().as_ref(), Some(&url), "{text:?} is shown as {shown:?}");
            // The path of a file may hold anything, and no secret.
            if matches!(url, StoreUrl::File { .. }) {
                return;
            }
            format!("{shown} {url:?}")
        }
        Err(error) => {
            assert_eq!(error.code(), "invalid_state", "{error}");
            format!("{error} {error:?} {:?}", error.hint())
        }
    };
    if let Some(secret) = secret {
        assert!(!said.contains(secret), "{said:?} tells {secret:?}");
    }
}

/// What stands between the user's name and the host, if it is long enough to be told from other text.
fn password(text: &str) -> Option<&str> {
    let (before, behind) = text.split_once("://")?;
    let authority = behind.split(['/', '?', '#']).next()?;
    let (user, host) = authority.rsplit_once('@')?;
    let (name, password) = user.split_once(':')?;
    let plain = password.len() >= 6 && password.bytes().all(|byte| byte.is_ascii_alphanumeric());
    let rest = [before, name, host, behind.get(authority.len()..)?, "firestore+emulator://"];
    // As it is, or as it is shown: a NUL before six zeros is seven of them.
    let is_said = |part: &&str| part.contains(password) || format!("{part:?}").contains(password);
    (plain && !rest.iter().any(is_said) && !KNOWN.contains(password)).then_some(password)
}

/// What errors say anyway.
const KNOWN: &str =
    "write firestore emulator invalidstate subject reason prefix project database the store URL";
