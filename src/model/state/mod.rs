//! The state of a sequence: pages of keys and values, in memory and on disk.

pub(super) mod cache;
mod file_adapter;
mod head;
pub(super) mod page_file;
pub(super) mod recurrent;
pub(super) mod session;
pub(super) mod session_file;
mod whole_head_int8;
