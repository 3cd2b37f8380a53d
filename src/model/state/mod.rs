//! The state of a sequence: pages of keys and values, in memory and on disk.

pub(super) mod cache;
mod cache_type;
mod counted;
mod file_adapter;
mod head;
pub(super) mod journal;
mod owner;
pub(super) mod page_file;
pub(super) mod page_head;
pub(super) mod recurrent;
pub(super) mod session;
pub(super) mod session_file;
pub(super) mod shared_page;
mod whole_head_int8;
