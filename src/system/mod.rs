//! What the system grants this process.
//!
//! All that reads takes the root of the file system, so that tests can build one. Whatever cannot be read or understood does
//! not limit.

pub(crate) mod aligned_buf;
#[cfg(all(target_os = "linux", any(feature = "python", test)))]
pub(crate) mod allocator;
#[cfg(any(target_os = "linux", test))]
pub(crate) mod cgroup;
pub(crate) mod memory;
#[cfg(any(feature = "python", test))]
pub(crate) mod panics;
