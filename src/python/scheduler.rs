//! The scheduler, for `nybble.Engine` and `Model.generate`.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, TryLockError};

use pyo3::prelude::*;
use pyo3::types::PyDict;

use super::{Model, Sampled, Sequence, detached, guarded};
use crate::Error;
use crate::engine::{self, SchedulerOptions, Speculation};

/// Many sequences over one model. One thread at a time may use it.
#[pyclass(frozen, module = "nybble._native")]
pub(super) struct Scheduler {
    inner: Mutex<engine::Scheduler>,
    interrupted: AtomicBool,
}

impl Scheduler {
    /// Whoever holds it computes, so waiting for it here would keep the GIL all the while.
    fn inner(&self) -> crate::Result<MutexGuard<'_, engine::Scheduler>> {
        match self.inner.try_lock() {
            Ok(guard) => Ok(guard),
            // What a panic has left behind is sound, if not complete.
            Err(TryLockError::Poisoned(poisoned)) => Ok(poisoned.into_inner()),
            Err(TryLockError::WouldBlock) => {
                Err(Error::argument("scheduler", "one that is in a step", "one thread at a time"))
            }
        }
    }
}

#[pymethods]
impl Scheduler {
    #[new]
    #[pyo3(signature = (
        model, *, draft=None, max_batch=16, cache_bytes=None, prefix_cache=true, prefill_chunk=None, speculation="off"
    ))]
    #[allow(clippy::too_many_arguments, reason = "they have names in Python")]
    fn new(
        model: &Model,
        draft: Option<&Model>,
        max_batch: usize,
        cache_bytes: Option<usize>,
        prefix_cache: bool,
        prefill_chunk: Option<usize>,
        speculation: &str,
    ) -> PyResult<Scheduler> {
        let speculation = Speculation::by_name(speculation)?;
        let cache_bytes = cache_bytes.unwrap_or(usize::MAX);
        let options = SchedulerOptions { max_batch, cache_bytes, prefix_cache, prefill_chunk, speculation };
        let inner = engine::Scheduler::new(model.0.clone(), draft.map(|draft| draft.0.clone()), options)?;
        Ok(Scheduler { inner: Mutex::new(inner), interrupted: AtomicBool::new(false) })
    }

    /// Takes a sequence, to sample at most `limit` tokens. Returns its number.
    fn submit(&self, sequence: &Sequence, limit: usize) -> PyResult<u64> {
        let mut inner = self.inner()?;
        let taken = sequence.0.try_lock().ok().and_then(|mut sequence| sequence.take());
        Ok(inner.submit(taken.ok_or_else(Sequence::busy)?, limit)?)
    }

    /// Ends a sequence. False when it has left already.
    fn cancel(&self, id: u64) -> PyResult<bool> {
        Ok(self.inner()?.cancel(id))
    }

    /// Computes a step. Returns sequences' numbers, each with its next token, or the exception that ended it, and how many
    /// tokens of its prompt were not computed. `signals` lets handlers of signals run meanwhile, as the main thread can.
    fn step(&self, py: Python<'_>, signals: bool) -> PyResult<Vec<(u64, Py<PyAny>, usize)>> {
        let mut guard = self.inner()?;
        let inner = &mut *guard;
        let stopped = || self.interrupted.load(Ordering::Relaxed);
        let events = if signals {
            detached(py, |interrupted| inner.step(&|| stopped() || interrupted()))
        } else {
            guarded(py, || inner.step(&stopped))
        };
        let convert = |event: engine::Event| {
            let outcome = match event.result {
                Ok(sampled) => Py::new(py, Sampled::from(sampled))?.into_any(),
                Err(error) => PyErr::from(error).into_value(py).into_any(),
            };
            Ok((event.id, outcome, event.reused))
        };
        events?.into_iter().map(convert).collect()
    }

    /// Ends the present step, and all later ones, with an error. Any thread may ask for it.
    fn interrupt(&self) {
        self.interrupted.store(true, Ordering::Relaxed);
    }

    /// Counts, by name.
    fn stats<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let (stats, dict) = (self.inner()?.stats(), PyDict::new(py));
        dict.set_item("running", stats.running)?;
        dict.set_item("waiting", stats.waiting)?;
        dict.set_item("cached_pages", stats.cached_pages)?;
        dict.set_item("cache_bytes", stats.cache_bytes)?;
        dict.set_item("steps", stats.steps)?;
        dict.set_item("reused_tokens", stats.reused_tokens)?;
        dict.set_item("drafted_tokens", stats.drafted_tokens)?;
        dict.set_item("accepted_tokens", stats.accepted_tokens)?;
        Ok(dict)
    }
}
