//! One file a verb.

pub(crate) mod demo;
pub(crate) mod export;
pub(crate) mod firestore;
pub(crate) mod get;
pub(crate) mod history;
pub(crate) mod import;
pub(crate) mod init;
pub(crate) mod lines;
pub(crate) mod locks;
pub(crate) mod ls;
pub(crate) mod put;
pub(crate) mod rm;
pub(crate) mod stats;
pub(crate) mod txn;
pub(crate) mod verify;
