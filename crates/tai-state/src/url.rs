//! Where a store lives, as one line of text.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use crate::error::Error;

/// A parsed store URL.
///
/// | text | means |
/// |---|---|
/// | `app.tai`, `./dir/app.tai`, `file:///data/app.tai`, `file:app.tai` | the embedded store in that file |
/// | `mem:` | a store in memory |
/// | `firestore://PROJECT`, `firestore://PROJECT/DATABASE?prefix=p` | Google Cloud Firestore |
/// | `firestore+emulator://HOST:PORT/PROJECT` | Google's Firestore emulator |
///
/// ```
/// use tai_state::StoreUrl;
/// let url: StoreUrl = "file:///data/app.tai".parse()?;
/// assert_eq!(url, StoreUrl::File { path: "/data/app.tai".into() });
/// # Ok::<(), tai_state::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum StoreUrl {
    /// A store in memory.
    Memory,
    /// The embedded store in a file.
    File {
        /// The file.
        path: PathBuf,
    },
    /// Google Cloud Firestore.
    Firestore {
        /// The Google Cloud project.
        project: String,
        /// The database, `(default)` unless named.
        database: String,
        /// What stands before the names of the collections.
        prefix: String,
    },
    /// Google's Firestore emulator.
    FirestoreEmulator {
        /// `host:port`.
        host: String,
        /// The project, any name.
        project: String,
        /// The database, `(default)` unless named.
        database: String,
        /// What stands before the names of the collections.
        prefix: String,
    },
}

const SCHEMES: &str = "known are: a file's path, file:, mem:, firestore://PROJECT, firestore+emulator://HOST:PORT/PROJECT";

impl FromStr for StoreUrl {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let refuse = |reason: &str| {
            Err(Error::refused(format!("the store URL {:?}", without_secrets(text)), reason))
        };
        if text.is_empty() {
            return refuse("it is empty");
        }
        if text.contains('\0') {
            return refuse("it holds a NUL");
        }
        let Some((scheme, rest)) = scheme(text) else {
            return Ok(Self::File { path: text.into() });
        };
        if scheme.starts_with("firestore") && rest.contains(['@', '#']) {
            return refuse("a store's URL holds no credentials: Google's own are looked for");
        }
        match scheme {
            "mem" if rest.is_empty() => Ok(Self::Memory),
            "mem" => refuse("`mem:` takes nothing behind it"),
            "file" => {
                let path = rest.strip_prefix("//").unwrap_or(rest);
                if rest.starts_with("//") && !path.starts_with('/') {
                    return refuse("a file URL has no host: write file:///path or file:path");
                }
                match path {
                    "" => refuse("it names no file"),
                    path => Ok(Self::File { path: path.into() }),
                }
            }
            "firestore" => {
                let Some((path, prefix)) = path_and_prefix(rest) else {
                    return refuse("write firestore://PROJECT[/DATABASE][?prefix=p]");
                };
                let (project, database) = path.split_once('/').unwrap_or((path, "(default)"));
                if project.is_empty() || database.is_empty() || database.contains('/') {
                    return refuse("write firestore://PROJECT[/DATABASE][?prefix=p]");
                }
                Ok(Self::Firestore {
                    project: project.into(),
                    database: database.into(),
                    prefix: prefix.into(),
                })
            }
            "firestore+emulator" => {
                let usage = "write firestore+emulator://HOST:PORT/PROJECT[/DATABASE][?prefix=p]";
                let parts = path_and_prefix(rest)
                    .and_then(|(path, prefix)| Some((path.split_once('/')?, prefix)));
                let Some(((host, path), prefix)) = parts else { return refuse(usage) };
                let (project, database) = path.split_once('/').unwrap_or((path, "(default)"));
                let has_port = host
                    .rsplit_once(':')
                    .is_some_and(|(name, port)| !name.is_empty() && port.parse::<u16>().is_ok());
                if !has_port || project.is_empty() || database.is_empty() || database.contains('/')
                {
                    return refuse(usage);
                }
                Ok(Self::FirestoreEmulator {
                    host: host.into(),
                    project: project.into(),
                    database: database.into(),
                    prefix: prefix.into(),
                })
            }
            other => refuse(&format!("the scheme {other}: is not known; {SCHEMES}")),
        }
    }
}

/// The scheme of a URL; `None` for a path. A single letter is a drive, not a scheme.
fn scheme(text: &str) -> Option<(&str, &str)> {
    let (scheme, rest) = text.split_once(':')?;
    let is_scheme = scheme.len() > 1
        && scheme.starts_with(|c: char| c.is_ascii_alphabetic())
        && scheme.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '+' | '-' | '.'));
    is_scheme.then_some((scheme, rest))
}

/// The text as errors show it: whoever takes this for another program's URL may have put a password before
/// an `@`, or a key into a query.
fn without_secrets(text: &str) -> String {
    let (scheme, rest) = scheme(text)
        .and_then(|(scheme, _)| text.split_at_checked(scheme.len() + 1))
        .unwrap_or(("", text));
    let slashes = if rest.starts_with("//") { "//" } else { "" };
    let rest = rest.strip_prefix(slashes).unwrap_or(rest);
    let (user, rest) = match rest.rsplit_once('@') {
        Some((_, host)) => ("…@", host),
        None => ("", rest),
    };
    let is_secret = |c| matches!(c, '?' | '#');
    let (rest, query) = match rest.split_once(is_secret) {
        Some((path, prefix)) if prefix.starts_with("prefix=") && !prefix.contains('&') => {
            (path, format!("?{prefix}"))
        }
        Some((path, _)) => (path, "?…".to_owned()),
        None => (rest, String::new()),
    };
    format!("{scheme}{slashes}{user}{rest}{query}")
}

/// What stands behind `//`, and the one parameter that is known.
fn path_and_prefix(rest: &str) -> Option<(&str, &str)> {
    let rest = rest.strip_prefix("//")?;
    match rest.split_once('?') {
        None => Some((rest, "")),
        Some((path, query)) => {
            let prefix = query.strip_prefix("prefix=")?;
            let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-');
            (!prefix.is_empty() && prefix.chars().all(plain)).then_some((path, prefix))
        }
    }
}

impl fmt::Display for StoreUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let query = |prefix: &str| match prefix {
            "" => String::new(),
            prefix => format!("?prefix={prefix}"),
        };
        match self {
            Self::Memory => f.write_str("mem:"),
            Self::File { path } => {
                let slashes = if path.is_absolute() { "//" } else { "" };
                write!(f, "file:{slashes}{}", path.display())
            }
            Self::Firestore { project, database, prefix } => {
                write!(f, "firestore://{project}/{database}{}", query(prefix))
            }
            Self::FirestoreEmulator { host, project, database, prefix } => {
                write!(f, "firestore+emulator://{host}/{project}/{database}{}", query(prefix))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn urls_by_table() {
        for (text, shown) in [
            ("app.tai", "file:app.tai"),
            ("./dir/app.tai", "file:./dir/app.tai"),
            ("file:app.tai", "file:app.tai"),
            ("file:///data/app.tai", "file:///data/app.tai"),
            ("/data/a b.tai", "file:///data/a b.tai"),
            ("c:/x.tai", "file:c:/x.tai"),
            ("mem:", "mem:"),
            ("firestore://p", "firestore://p/(default)"),
            ("firestore://p/d?prefix=x_1", "firestore://p/d?prefix=x_1"),
            (
                "firestore+emulator://127.0.0.1:8080/demo-a",
                "firestore+emulator://127.0.0.1:8080/demo-a/(default)",
            ),
        ] {
            assert_eq!(text.parse::<StoreUrl>().unwrap().to_string(), shown, "{text}");
        }
        for text in [
            "",
            "mem:x",
            "file:",
            "file://",
            "file://host/x",
            "http://x",
            "redis://x",
            "firestore:",
            "firestore://",
            "firestore://p/",
            "firestore://p/d/e",
            "firestore://p?x=1",
            "firestore://p?prefix=",
            "firestore://p?prefix=a/b",
            "firestore+emulator://h/p",
            "firestore+emulator://h:99999/p",
            "firestore+emulator://h:1/",
            "a\0b",
            "firestore://user:pass@p",
            "firestore://user@p",
            "firestore+emulator://user:pass@h:1/p",
        ] {
            assert_eq!(text.parse::<StoreUrl>().unwrap_err().code(), "invalid_state", "{text}");
        }
    }

    #[test]
    fn what_is_refused_tells_no_secret() {
        for (text, shown) in [
            ("redis://ada:s3cr3t@host:6379/0", "redis://…@host:6379/0"),
            ("redis://ada:s3/c?r@3t@host", "redis://…@host"),
            ("ada:s3cr3t@host", "ada:…@host"),
            ("\0x://ada:s3cr3t@host", "…@host"),
            ("firestore+emulator://ada:s3cr3t@h:80/p", "firestore+emulator://…@h:80/p"),
            ("firestore://p?key=s3cr3t", "firestore://p?…"),
            ("redis://host/0#s3cr3t", "redis://host/0?…"),
            ("firestore://p?prefix=a/b", "firestore://p?prefix=a/b"),
            ("http://x", "http://x"),
        ] {
            let error = text.parse::<StoreUrl>().unwrap_err().to_string();
            assert!(error.contains(&format!("{shown:?}")), "{text}: {error}");
        }
    }

    #[test]
    fn a_refusal_shows_no_password_and_no_parameter() {
        for text in [
            "firestore://user:CANARY@p/d",
            "firestore://CANARY@p",
            "firestore://user:a/CANARY@p",
            "firestore://p?token=CANARY",
            "firestore://p/d?prefix=x&token=CANARY",
            "firestore://p#CANARY",
            "firestore://p/d?key=CANARY@x",
            "firestore+emulator://user:CANARY@h:1/p",
            "firestore+emulator://h:1/p?access_token=CANARY",
            "redis://user:CANARY@h/0",
            "postgres:CANARY@h",
            "file://user:CANARY@host/x",
            "https://h/x?sig=CANARY",
        ] {
            let error = text.parse::<StoreUrl>().unwrap_err();
            assert!(!format!("{error} {error:?}").contains("CANARY"), "{error}");
            let scheme = text.split_once(':').unwrap().0;
            assert!(error.to_string().contains(scheme), "{error}");
        }
    }

    proptest! {
        #[test]
        fn what_is_shown_reads_back(text in "(file:|firestore://|firestore\\+emulator://h:1/|mem:)?[a-z/().?=:-]{0,20}") {
            if let Ok(url) = text.parse::<StoreUrl>() {
                prop_assert_eq!(url.to_string().parse::<StoreUrl>().unwrap(), url);
            }
        }
    }
}
