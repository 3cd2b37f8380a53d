//! Memory, and the limits that the system sets for this process.

#[cfg(target_os = "linux")]
pub(crate) mod affinity;
pub(crate) mod aligned_buf;
#[cfg(all(target_os = "linux", any(feature = "python", test)))]
pub(crate) mod allocator;
pub(crate) mod arena;
mod cache_line;
#[cfg(any(target_os = "linux", test))]
pub(crate) mod cgroup;
#[cfg(any(all(windows, target_env = "gnu"), test))]
mod fused;
mod huge_pages;
#[cfg(target_os = "macos")]
pub(crate) mod macos;
pub(crate) mod memory;
#[cfg(any(feature = "python", feature = "tokenizers", test))]
pub(crate) mod panics;
#[cfg(any(windows, test))]
mod topology;
#[cfg(windows)]
pub(crate) mod windows;
