//! `nybble._native.Scheduler`: continuous batching, which all generation goes through.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, TryLockError};
use std::time::Duration;

use pyo3::prelude::*;
use pyo3::types::PyDict;

use super::detach::{detached, guarded};
use super::model::{Model, Sequence};
use super::session::Session;
use super::tokens::Sampled;
use crate::Error;
use crate::engine::{self, SchedulerOptions, Speculation};

/// The attributes of the package's `EngineOptions` that concern a scheduler.
#[derive(FromPyObject)]
struct Options {
    max_batch: usize,
    cache_bytes: Option<usize>,
    prefix_cache: bool,
    prefill_chunk: Option<usize>,
    speculation: String,
    draft_tokens: Option<usize>,
    cache_dir: Option<PathBuf>,
    cache_dir_bytes: Option<u64>,
}

impl Options {
    fn checked(self) -> crate::Result<SchedulerOptions> {
        let default = SchedulerOptions::default();
        Ok(SchedulerOptions {
            max_batch: self.max_batch,
            cache_bytes: self.cache_bytes.unwrap_or(usize::MAX),
            prefix_cache: self.prefix_cache,
            prefill_chunk: self.prefill_chunk,
            speculation: Speculation::by_name(&self.speculation)?,
            draft_tokens: self.draft_tokens,
            cache_dir: self.cache_dir,
            cache_dir_bytes: self.cache_dir_bytes.unwrap_or(default.cache_dir_bytes),
        })
    }
}

/// The outcome of a step for one sequence: its id; its next token, or the exception that ended it; the number of prompt tokens
/// that were not computed; and its session, if it has left the scheduler.
type Event = (u64, Py<PyAny>, usize, Option<Session>);

/// Computes many sequences over one model. One thread at a time may use it.
#[pyclass(frozen, module = "nybble._native")]
pub(super) struct Scheduler {
    /// `None` after `close`.
    inner: Mutex<Option<engine::Scheduler>>,
    interrupted: AtomicBool,
}

impl Scheduler {
    /// A step holds the lock, and waiting for it here would hold the GIL meanwhile.
    fn lock(&self) -> crate::Result<MutexGuard<'_, Option<engine::Scheduler>>> {
        match self.inner.try_lock() {
            Ok(guard) => Ok(guard),
            // After a panic the scheduler is sound, if not complete.
            Err(TryLockError::Poisoned(poisoned)) => Ok(poisoned.into_inner()),
            Err(TryLockError::WouldBlock) => {
                Err(Error::argument("scheduler", "a scheduler that another thread uses", "one thread at a time"))
            }
        }
    }

    /// Calls `use_it` with the scheduler.
    fn with<R>(&self, use_it: impl FnOnce(&mut engine::Scheduler) -> R) -> crate::Result<R> {
        match self.lock()?.as_mut() {
            Some(inner) => Ok(use_it(inner)),
            None => Err(Error::argument("scheduler", "a scheduler that was closed", "one that is open")),
        }
    }
}

#[pymethods]
impl Scheduler {
    /// `options` has the attributes of the package's `EngineOptions`.
    #[new]
    #[pyo3(signature = (model, options, draft=None))]
    fn new(py: Python<'_>, model: &Model, options: Options, draft: Option<&Model>) -> PyResult<Scheduler> {
        let (model, draft, options) = (model.0.clone(), draft.map(|draft| draft.0.clone()), options.checked()?);
        // It may load the model's head.
        let inner = guarded(py, || engine::Scheduler::new(model, draft, options))?;
        Ok(Scheduler { inner: Mutex::new(Some(inner)), interrupted: AtomicBool::new(false) })
    }

    /// Takes a sequence, to sample at most `limit` tokens. Returns its id.
    fn submit(&self, sequence: &Sequence, limit: usize) -> PyResult<u64> {
        self.with(|inner| Ok(inner.submit(sequence.take()?, limit)?))?
    }

    /// Removes a sequence. Returns its session, or None when it has left already.
    fn cancel(&self, id: u64) -> PyResult<Option<Session>> {
        Ok(self.with(|inner| inner.cancel(id))?.map(|sequence| Session(sequence.into_session())))
    }

    /// The session of a sequence as of the latest step, or None when it has left. The sequence continues.
    fn session(&self, id: u64) -> PyResult<Option<Session>> {
        Ok(self.with(|inner| inner.sequence(id).map(|sequence| Session(sequence.session().fork())))?)
    }

    /// Computes a step. With `signals`, signal handlers run meanwhile, which only the main thread can do.
    fn step(&self, py: Python<'_>, signals: bool) -> PyResult<Vec<Event>> {
        let stopped = || self.interrupted.load(Ordering::Relaxed);
        let events = self.with(|inner| {
            if signals {
                detached(py, |interrupted| inner.step(&|| stopped() || interrupted()))
            } else {
                guarded(py, || inner.step(&stopped))
            }
        })?;
        let convert = |event: engine::Event| {
            let outcome = match event.result {
                Ok(sampled) => Py::new(py, Sampled::from(sampled))?.into_any(),
                Err(error) => PyErr::from(error).into_value(py).into_any(),
            };
            Ok((event.id, outcome, event.reused, event.sequence.map(|sequence| Session(sequence.into_session()))))
        };
        events?.into_iter().map(convert).collect()
    }

    /// Stops the current step, and all later ones, with an error. Any thread may call it.
    fn interrupt(&self) {
        self.interrupted.store(true, Ordering::Relaxed);
    }

    /// What has failed without an effect on any sequence since the last call, once for each kind of failure.
    fn take_reports(&self) -> PyResult<Vec<String>> {
        Ok(self.with(engine::Scheduler::take_reports)?)
    }

    /// Writes the prefix cache to its folder on disk, for at most `seconds`.
    fn save_prefixes(&self, py: Python<'_>, seconds: f64) -> PyResult<()> {
        let limit = Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX);
        self.with(|inner| {
            guarded(py, || {
                inner.save_prefixes(limit);
                Ok(())
            })
        })?
    }

    /// Frees the KV cache, and ends the threads that access the disk. Nothing else can be called later, except `interrupt`.
    fn close(&self, py: Python<'_>) -> PyResult<()> {
        let inner = self.lock()?.take();
        // A disk may take its time, and so does memory.
        guarded(py, || {
            drop(inner);
            Ok(())
        })
    }

    /// Counts, by name.
    fn stats<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let (stats, dict) = (self.with(|inner| inner.stats())?, PyDict::new(py));
        dict.set_item("running", stats.running)?;
        dict.set_item("waiting", stats.waiting)?;
        dict.set_item("cached_pages", stats.cached_pages)?;
        dict.set_item("cache_bytes", stats.cache_bytes)?;
        dict.set_item("steps", stats.steps)?;
        dict.set_item("reused_tokens", stats.reused_tokens)?;
        dict.set_item("drafted_tokens", stats.drafted_tokens)?;
        dict.set_item("accepted_tokens", stats.accepted_tokens)?;
        dict.set_item("disk_cache_hits", stats.disk_cache_hits)?;
        dict.set_item("restored_tokens", stats.restored_tokens)?;
        dict.set_item("disk_cache_errors", stats.disk_cache_errors)?;
        dict.set_item("disk_cache_bytes", stats.disk_cache_bytes)?;
        Ok(dict)
    }
}
