//! Memory, and the limits that the system sets for this process.

pub(crate) mod aligned_buf;
#[cfg(all(target_os = "linux", any(feature = "python", test)))]
pub(crate) mod allocator;
pub(crate) mod arena;
mod cache_line;
#[cfg(any(target_os = "linux", test))]
pub(crate) mod cgroup;
mod huge_pages;
#[cfg(any(target_os = "linux", test))]
mod limits;
pub(crate) mod memory;
#[cfg(any(feature = "python", feature = "tokenizers", test))]
pub(crate) mod panics;
