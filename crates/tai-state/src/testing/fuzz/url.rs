//! Store URLs: read, shown and read again; and what is refused tells no secret.

use crate::url::StoreUrl;

/// Stands in no text by chance.
const SECRET: &str = "hUsh4hush4Hush";

/// Text.
pub(super) fn url(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    said(text);
    // With a password of its own: one that was drawn may be a word of the error, or a row of zeros.
    if let Some(text) = with_password(text, SECRET).filter(|_| !text.contains(SECRET))
        && let Some(said) = said(&text)
    {
        assert!(!said.contains(SECRET), "{said:?} tells {SECRET:?}");
    }
}

/// What is said of it; `None` for the path of a file, which may hold anything, and no secret.
fn said(text: &str) -> Option<String> {
    match text.parse::<StoreUrl>() {
        Ok(url) => {
            let shown = url.to_string();
            let again = shown.parse::<StoreUrl>();
            assert_eq!(again.ok().as_ref(), Some(&url), "{text:?} is shown as {shown:?}");
            (!matches!(url, StoreUrl::File { .. })).then(|| format!("{shown} {url:?}"))
        }
        Err(error) => {
            assert_eq!(error.code(), "invalid_state", "{error}");
            Some(format!("{error} {error:?} {:?}", error.hint()))
        }
    }
}

/// The text with this between the user's name and the host, where it has a password.
fn with_password(text: &str, secret: &str) -> Option<String> {
    let (scheme, behind) = text.split_once("://")?;
    let authority = behind.split(['/', '?', '#']).next()?;
    let (user, host) = authority.rsplit_once('@')?;
    let (name, _) = user.split_once(':')?;
    let rest = behind.get(authority.len()..)?;
    Some(format!("{scheme}://{name}:{secret}@{host}{rest}"))
}
