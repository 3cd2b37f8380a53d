//! Computing without the GIL: panics, signals and progress reports.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use pyo3::prelude::*;

use super::errors::InternalError;
use crate::system::panics;
use crate::{Error, model};

/// How often signal handlers run while Rust computes. Each run takes the GIL.
const SIGNALS_EVERY: Duration = Duration::from_millis(20);
/// How often progress is reported, in addition to the start and the end. While another thread runs Python, each report waits
/// for the GIL, which takes longer than a layer.
const PROGRESS_EVERY: Duration = Duration::from_millis(50);

/// Runs `compute` without the GIL. A panic, which is a bug, becomes an `InternalError`, which `except Exception` catches.
pub(super) fn guarded<R: Send>(py: Python<'_>, compute: impl FnOnce() -> crate::Result<R> + Send) -> PyResult<R> {
    let result = py.detach(|| panics::catch(compute));
    Ok(result.map_err(InternalError::new_err)??)
}

/// Runs `compute` without the GIL. Its argument returns true once a signal handler has raised, as for Ctrl-C; that exception is
/// raised when `compute` returns.
pub(super) fn detached<R: Send>(
    py: Python<'_>,
    compute: impl FnOnce(&(dyn Fn() -> bool + Sync)) -> crate::Result<R> + Send,
) -> PyResult<R> {
    let raised = Mutex::new(None);
    let asked = Mutex::new(Instant::now());
    let interrupted = || {
        let Ok(mut asked) = asked.try_lock() else { return false };
        if asked.elapsed() < SIGNALS_EVERY {
            return false;
        }
        *asked = Instant::now();
        let signal = Python::attach(|py| py.check_signals()).err();
        let is_raised = signal.is_some();
        if is_raised {
            *raised.lock().unwrap_or_else(PoisonError::into_inner) = signal;
        }
        is_raised
    };
    let result = guarded(py, || compute(&interrupted));
    raised.into_inner().unwrap_or_else(PoisonError::into_inner).map_or(result, Err)
}

/// Runs `compute` without the GIL. It reports the work done and the total to the callable `progress`, at most every
/// [`PROGRESS_EVERY`]. An exception of `progress` or of a signal handler stops `compute` and is raised when it returns.
pub(super) fn with_progress<R: Send>(
    py: Python<'_>,
    progress: Option<Py<PyAny>>,
    compute: impl FnOnce(model::Progress<'_>) -> crate::Result<R> + Send,
) -> PyResult<R> {
    let raised = Mutex::new(None);
    let reported: Mutex<Option<Instant>> = Mutex::new(None);
    let report = |done: usize, total: usize| {
        let mut reported = reported.lock().unwrap_or_else(PoisonError::into_inner);
        if done < total && reported.is_some_and(|reported| reported.elapsed() < PROGRESS_EVERY) {
            return Ok(());
        }
        *reported = Some(Instant::now());
        let called = Python::attach(|py| {
            py.check_signals()?;
            progress.as_ref().map_or(Ok(()), |progress| progress.call1(py, (done, total)).map(drop))
        });
        called.map_err(|exception| {
            *raised.lock().unwrap_or_else(PoisonError::into_inner) = Some(exception);
            Error::Interrupted
        })
    };
    let result = guarded(py, || compute(&report));
    raised.into_inner().unwrap_or_else(PoisonError::into_inner).map_or(result, Err)
}
