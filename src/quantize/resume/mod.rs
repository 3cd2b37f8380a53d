//! The files next to an output from which an interrupted run continues.
//!
//! The log keeps finished tensors; snapshots keep the activations and optimizer state between two layers or steps.

mod digest;
mod files;
mod log;
mod snapshot;

pub(super) use digest::run_key;
pub(super) use files::{ResumeFiles, candidate_path};
pub(super) use log::ResumeLog;
pub(super) use snapshot::{SavePace, Snapshot, SnapshotFile};
