//! A credentials' file that cannot be used is an error that quotes nothing of it.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::disallowed_methods)]

mod common;

use std::time::{Duration, Instant};

use common::{run, tool};

#[test]
fn nothing_of_a_key_file_comes_out() {
    let folder = tempfile::tempdir().unwrap();
    let key = |name: &str, text: &str| {
        let path = folder.path().join(name);
        std::fs::write(&path, text).unwrap();
        path
    };
    let files = [
        key("no-json", "CANARY-nothing"),
        key("text", "\"CANARY-text\""),
        key("type", r#"{"type":"CANARY-type","private_key":"CANARY-key"}"#),
        key(
            "number",
            r#"{"type":"service_account","private_key":["CANARY-list"],"client_email":7}"#,
        ),
        key(
            "pem",
            r#"{"type":"service_account","client_email":"CANARY-mail","private_key_id":"CANARY-id",
                "private_key":"-----BEGIN PRIVATE KEY-----\nQ0FOQVJZ\n-----END PRIVATE KEY-----\n","project_id":"p"}"#,
        ),
        key(
            "external",
            r#"{"type":"external_account","audience":"CANARY-audience","subject_token_type":"CANARY-kind",
                "token_url":"http://127.0.0.1:1/CANARY-url","credential_source":{"file":"/nonexistent/CANARY-file"}}"#,
        ),
        folder.path().join("absent"),
    ];
    for file in files {
        for format in ["table", "json"] {
            let mut command = tool();
            command
                .args(["-u", "firestore://some-project", "-o", format, "get", "g/s"])
                .env("GOOGLE_APPLICATION_CREDENTIALS", &file)
                .env("GCE_METADATA_HOST", "127.0.0.1:1")
                .env("RUST_BACKTRACE", "1")
                .env("RUST_LOG", "trace")
                .env_remove("FIRESTORE_EMULATOR_HOST");
            let started = Instant::now();
            let ran = run(command, b"");
            let what = format!("{}: {ran:?}", file.display());
            assert_eq!(ran.exit, 7, "{what}");
            assert!(started.elapsed() < Duration::from_secs(5), "{what}");
            assert!(!ran.err.contains("panicked"), "{what}");
            for secret in ["CANARY", "Q0FOQVJZ"] {
                assert!(!ran.err.contains(secret) && !ran.out.contains(secret), "{what}");
            }
            // It says what can be done.
            for way in
                ["FIRESTORE_EMULATOR_HOST", "GOOGLE_APPLICATION_CREDENTIALS", "StateStore::open"]
            {
                assert!(ran.err.contains(way), "{what}");
            }
        }
    }
}
