//! Checks that memory is available before a large allocation.
//!
//! Linux grants more memory than a cgroup may use, and kills one of its processes when the memory is written. So large
//! allocations are compared with the cgroup's limit first and refused if they certainly do not fit: file pages that the kernel can
//! drop do not count as used, and swap counts as free.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::error::{Error, Result};

#[cfg(any(target_os = "linux", test))]
mod limits;

/// Smaller allocations are not checked. Larger ones for weights and the KV cache are always mapped from the system.
pub(super) const SMALLEST_CHECKED: usize = 64 << 10;
/// The size from which the allocator maps memory. Smaller blocks may come from memory that was freed before.
#[cfg(all(target_os = "linux", feature = "python"))]
const SMALLEST_ALLOCATION: usize = super::allocator::SMALLEST_MAP;
/// The size from which any allocator maps memory. That of glibc grows to this.
#[cfg(not(all(target_os = "linux", feature = "python")))]
const SMALLEST_ALLOCATION: usize = 32 << 20;
/// Left for all allocations that are not checked.
const RESERVE: usize = 8 << 20;
/// How long a reading stays valid. Memory granted since is subtracted.
const READING_LASTS: Duration = Duration::from_millis(50);

/// What was left, and when.
static LEFT: Mutex<Option<(Instant, usize)>> = Mutex::new(None);

/// Checks that the cgroup has `bytes` left, which the caller maps from the system next.
///
/// # Errors
/// [`Error::OutOfMemory`] if it certainly does not.
pub(crate) fn check(purpose: &'static str, bytes: usize) -> Result<()> {
    if bytes < SMALLEST_CHECKED {
        return Ok(());
    }
    let mut known = LEFT.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some((read, left)) = known.as_mut()
        && read.elapsed() < READING_LASTS
        && *left >= bytes.saturating_add(RESERVE)
    {
        *left -= bytes;
        return Ok(());
    }
    let left = cgroup_left();
    if left < bytes.saturating_add(RESERVE) {
        *known = None;
        return Err(Error::OutOfMemory { what: purpose, bytes, left: Some(left) });
    }
    *known = Some((Instant::now(), left - bytes));
    Ok(())
}

/// As [`check`], for memory from the allocator.
pub(crate) fn check_allocation(purpose: &'static str, bytes: usize) -> Result<()> {
    if bytes < SMALLEST_ALLOCATION { Ok(()) } else { check(purpose, bytes) }
}

/// Bytes that this process can still use without swap: the least that the machine and the limits of the process leave. These are
/// its cgroup and that group's ancestors, or its job on Windows. `None` where the system does not say.
pub(crate) fn available() -> Option<usize> {
    #[cfg(target_os = "linux")]
    return limits::available(std::path::Path::new("/"));
    #[cfg(target_os = "macos")]
    return super::macos::available();
    #[cfg(windows)]
    return super::windows::available();
    #[cfg(not(any(target_os = "linux", target_os = "macos", windows)))]
    None
}

/// Bytes of memory that the process holds, mapped files included. `None` on Linux, where a file says so, and where the
/// system does not say.
#[cfg(feature = "python")]
pub(crate) fn resident() -> Option<usize> {
    #[cfg(target_os = "macos")]
    return super::macos::resident();
    #[cfg(windows)]
    return super::windows::resident().map(|[now, _]| now);
    #[cfg(not(any(target_os = "macos", windows)))]
    None
}

/// The peak of [`resident`] so far. `None` on Unix, where `getrusage` says so, and where the system does not say.
#[cfg(feature = "python")]
pub(crate) fn peak_resident() -> Option<usize> {
    #[cfg(windows)]
    return super::windows::resident().map(|[_, peak]| peak);
    #[cfg(not(windows))]
    None
}

/// Bytes that the process's cgroups have left, swap included.
fn cgroup_left() -> usize {
    #[cfg(target_os = "linux")]
    if let Some(left) = limits::cgroup_left(std::path::Path::new("/")) {
        return left;
    }
    usize::MAX
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_available_memory_is_known_and_plausible() {
        let available = available();
        if cfg!(any(target_os = "linux", target_os = "macos", windows)) {
            assert!(available.is_some_and(|bytes| (1 << 20..1 << 50).contains(&bytes)), "{available:?}");
        }
    }

    #[test]
    fn only_a_cgroup_limit_refuses_an_impossible_size() {
        assert!(check("a test", SMALLEST_CHECKED - 1).is_ok());
        match (cgroup_left(), check("a test", usize::MAX - RESERVE)) {
            (usize::MAX, result) => assert!(result.is_ok()),
            (_, result) => assert!(result.unwrap_err().to_string().contains("cgroup")),
        }
    }
}
