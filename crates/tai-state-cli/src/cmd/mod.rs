//! One file a verb.

pub(crate) mod cleanup;
pub(crate) mod demo;
pub(crate) mod diff;
pub(crate) mod export;
pub(crate) mod firestore;
pub(crate) mod get;
pub(crate) mod history;
pub(crate) mod import;
pub(crate) mod init;
pub(crate) mod lines;
pub(crate) mod locks;
pub(crate) mod ls;
pub(crate) mod purge;
pub(crate) mod put;
pub(crate) mod recover;
pub(crate) mod replay;
pub(crate) mod revert;
pub(crate) mod rm;
pub(crate) mod snapshots;
pub(crate) mod stats;
pub(crate) mod timeline;
pub(crate) mod txn;
pub(crate) mod verify;
