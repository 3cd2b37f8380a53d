//! The number of threads to use: one per core that this process may use.
//!
//! More threads only slow each other down: the second hardware thread of a core shares its multipliers, and time beyond
//! the quota of a cgroup is throttled for all threads at once.

use std::ffi::OsStr;

use crate::{Error, Result};

#[cfg(any(target_os = "linux", test))]
pub(super) mod linux;

/// The maximum number of threads.
pub const MAX_THREADS: usize = 1024;

/// The environment variable that overrides [`default_threads`] if no number is given in code.
const VARIABLE: &str = "NYBBLE_NUM_THREADS";

/// The default number of threads: the physical cores that the process may run on, limited by the CPU quota of its cgroup, or
/// by the CPU rate of its job on Windows (rounded down, at least 1).
///
/// On macOS, only the cores of the fastest kind count. Where the system does not say, it is the standard library's
/// [`available_parallelism`](std::thread::available_parallelism).
pub fn default_threads() -> usize {
    usable_cores().unwrap_or_else(available_cpus).min(MAX_THREADS)
}

/// The physical cores to use, at least 1. `None` if the system does not say.
fn usable_cores() -> Option<usize> {
    #[cfg(target_os = "linux")]
    return linux::usable_cores(std::path::Path::new("/"));
    #[cfg(target_os = "macos")]
    return crate::system::macos::usable_cores();
    #[cfg(windows)]
    return crate::system::windows::usable_cores();
    #[cfg(not(any(target_os = "linux", target_os = "macos", windows)))]
    None
}

/// The number of threads to use: `requested`, else the environment variable `NYBBLE_NUM_THREADS` unless it is empty,
/// else [`default_threads`].
///
/// # Errors
///
/// [`Error::InvalidArgument`] if the request or the variable is not a number from 1 to [`MAX_THREADS`].
pub fn resolve_threads(requested: Option<usize>) -> Result<usize> {
    resolve(requested, std::env::var_os(VARIABLE).as_deref())
}

fn resolve(requested: Option<usize>, variable: Option<&OsStr>) -> Result<usize> {
    if let Some(threads) = requested {
        return check("threads", threads);
    }
    match variable {
        Some(text) if !text.is_empty() => match text.to_str().and_then(|text| text.trim().parse().ok()) {
            Some(threads) => check(VARIABLE, threads),
            None => Err(Error::argument(VARIABLE, text.display(), format!("a number from 1 to {MAX_THREADS}"))),
        },
        _ => Ok(default_threads()),
    }
}

/// `threads`, if it is from 1 to [`MAX_THREADS`].
pub(super) fn check(name: &'static str, threads: usize) -> Result<usize> {
    if (1..=MAX_THREADS).contains(&threads) {
        Ok(threads)
    } else {
        Err(Error::argument(name, threads, format!("a number from 1 to {MAX_THREADS}")))
    }
}

/// How many threads can run at the same time, each on its own hardware thread.
pub(super) fn available_cpus() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_beats_the_variable_and_the_variable_beats_the_default() {
        assert_eq!(resolve(Some(3), Some(OsStr::new("5"))).unwrap(), 3);
        assert_eq!(resolve(None, Some(OsStr::new("5"))).unwrap(), 5);
        assert_eq!(resolve(None, Some(OsStr::new(" 7\n"))).unwrap(), 7);
        assert_eq!(resolve(None, Some(OsStr::new(""))).unwrap(), default_threads());
        assert_eq!(resolve(None, None).unwrap(), default_threads());
    }

    #[test]
    fn an_error_names_the_source_of_a_number_out_of_range() {
        for bad in [0, MAX_THREADS + 1, usize::MAX] {
            let message = resolve(Some(bad), None).unwrap_err().to_string();
            assert_eq!(message, format!("threads: found {bad}, expected a number from 1 to 1024"));
        }
        for bad in ["0", "-1", "1025", "2.5", "two", "99999999999999999999"] {
            let message = resolve(None, Some(OsStr::new(bad))).unwrap_err().to_string();
            assert_eq!(message, format!("NYBBLE_NUM_THREADS: found {bad}, expected a number from 1 to 1024"));
        }
        assert_eq!(resolve(Some(1), None).unwrap(), 1);
        assert_eq!(resolve(Some(MAX_THREADS), None).unwrap(), MAX_THREADS);
    }

    #[test]
    fn the_default_is_from_one_to_the_available_cpus() {
        assert_eq!(usable_cores().is_some(), cfg!(any(target_os = "linux", target_os = "macos", windows)));
        assert!((1..=available_cpus().max(1)).contains(&default_threads()));
    }
}
