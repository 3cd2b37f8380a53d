//! Perplexity and divergence for Python.

use std::sync::{Mutex, PoisonError};

use numpy::PyReadonlyArray2;
use pyo3::prelude::*;
use pyo3::types::PyDict;

use super::detach::detached;
use super::model::Model;
use crate::Error;
use crate::quantize::eval::{self, Estimate, Evaluation};

/// Token ids `(windows, window)`, checked to be non-negative.
pub(super) fn token_windows(windows: &PyReadonlyArray2<'_, i32>) -> crate::Result<Vec<Vec<u32>>> {
    let id = |id: &i32| u32::try_from(*id).map_err(|_| Error::argument("token", id, "an id of the vocabulary"));
    windows.as_array().rows().into_iter().map(|row| row.iter().map(id).collect()).collect()
}

/// Runs `compute` without the GIL. It gets a function that reports finished windows to the callable `progress`, and one that
/// returns whether to stop because `progress` or a signal handler has raised.
fn watched<R: Send>(
    py: Python<'_>,
    progress: Option<Py<PyAny>>,
    compute: impl FnOnce(crate::model::Progress<'_>, &(dyn Fn() -> bool + Sync)) -> crate::Result<R> + Send,
) -> PyResult<R> {
    let raised = Mutex::new(None);
    let report = |done: usize, total: usize| {
        let called = Python::attach(|py| progress.as_ref().map_or(Ok(()), |it| it.call1(py, (done, total)).map(drop)));
        called.map_err(|exception| {
            *raised.lock().unwrap_or_else(PoisonError::into_inner) = Some(exception);
            Error::Interrupted
        })
    };
    let result = detached(py, |interrupted| compute(&report, interrupted));
    match raised.into_inner().unwrap_or_else(PoisonError::into_inner) {
        Some(exception) => Err(exception),
        None => result,
    }
}

/// The fields of the package's `Evaluation`, by name.
fn figures<'py>(py: Python<'py>, evaluation: &Evaluation) -> PyResult<Bound<'py, PyDict>> {
    let dict = PyDict::new(py);
    let estimate = |name: &str, estimate: Estimate| {
        dict.set_item(name, estimate.value)?;
        dict.set_item(format!("{name}_error"), estimate.error)
    };
    dict.set_item("tokens", evaluation.tokens)?;
    estimate("perplexity", evaluation.perplexity)?;
    if let Some(divergence) = &evaluation.divergence {
        estimate("reference_perplexity", divergence.reference)?;
        estimate("perplexity_ratio", divergence.ratio)?;
        estimate("kl_mean", divergence.kl_mean)?;
        dict.set_item("kl_median", divergence.kl_median)?;
        dict.set_item("kl_p90", divergence.kl_p90)?;
        dict.set_item("kl_p99", divergence.kl_p99)?;
        dict.set_item("kl_max", divergence.kl_max)?;
        estimate("top_agreement", divergence.top_agreement)?;
        estimate("rms_dp", divergence.rms_dp)?;
        dict.set_item("kl_by_position", divergence.kl_by_position.clone())?;
    }
    Ok(dict)
}

/// Measures the perplexity of `model` on token ids `(windows, window)`.
#[pyfunction]
#[pyo3(signature = (model, windows, progress=None))]
pub(super) fn perplexity<'py>(
    py: Python<'py>,
    model: &Model,
    windows: PyReadonlyArray2<'py, i32>,
    progress: Option<Py<PyAny>>,
) -> PyResult<Bound<'py, PyDict>> {
    let windows = token_windows(&windows)?;
    let model = &model.0;
    let evaluation =
        watched(py, progress, |report, interrupted| eval::perplexity(model, &windows, report, interrupted))?;
    figures(py, &evaluation)
}

/// The predictions of a model on a text, with which other models are compared.
#[pyclass(frozen, module = "nybble._native")]
pub(super) struct Reference(Mutex<eval::Reference>);

#[pymethods]
impl Reference {
    #[new]
    #[pyo3(signature = (model, windows, progress=None))]
    fn new(
        py: Python<'_>,
        model: &Model,
        windows: PyReadonlyArray2<'_, i32>,
        progress: Option<Py<PyAny>>,
    ) -> PyResult<Reference> {
        let windows = token_windows(&windows)?;
        let model = &model.0;
        let record = |report: crate::model::Progress<'_>, interrupted: &(dyn Fn() -> bool + Sync)| {
            eval::Reference::record(model, &windows, report, interrupted)
        };
        Ok(Reference(Mutex::new(watched(py, progress, record)?)))
    }

    /// Measures the perplexity of `model` on the same windows, and its divergence from the reference.
    #[pyo3(signature = (model, progress=None))]
    fn compare<'py>(
        &self,
        py: Python<'py>,
        model: &Model,
        progress: Option<Py<PyAny>>,
    ) -> PyResult<Bound<'py, PyDict>> {
        let busy = || Error::argument("reference", "a comparison that is still running", "one comparison at a time");
        // The holder of the lock is computing. Waiting for it here would block the GIL.
        let mut reference = self.0.try_lock().map_err(|_| busy())?;
        let (reference, model) = (&mut *reference, &model.0);
        let compare = |report: crate::model::Progress<'_>, interrupted: &(dyn Fn() -> bool + Sync)| {
            reference.compare(model, report, interrupted)
        };
        figures(py, &watched(py, progress, compare)?)
    }
}
