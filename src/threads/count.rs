//! The number of threads to use: one per core that this process may use.
//!
//! More threads only slow each other down: the second hardware thread of a core shares its multipliers, and time beyond
//! the quota of a cgroup is throttled for all threads at once.

use std::ffi::OsStr;

use crate::{Error, Result};

#[cfg(any(target_os = "linux", test))]
mod linux;

/// The maximum number of threads.
pub const MAX_THREADS: usize = 1024;

/// The environment variable that overrides [`default_threads`] if no number is given in code.
const VARIABLE: &str = "NYBBLE_NUM_THREADS";

/// The default number of threads: the physical cores that the process may run on, limited by the CPU quota of its cgroup
/// (rounded down, at least 1).
///
/// On systems other than Linux it is the standard library's
/// [`available_parallelism`](std::thread::available_parallelism).
pub fn default_threads() -> usize {
    #[cfg(target_os = "linux")]
    if let Some(count) = linux::usable_cores(std::path::Path::new("/")) {
        return count.min(MAX_THREADS);
    }
    available_cpus().min(MAX_THREADS)
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
        assert!((1..=available_cpus().max(1)).contains(&default_threads()));
    }
}
