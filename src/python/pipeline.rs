//! `nybble._native.Stage`: a part of a model in a pipeline; and the stages of a pipeline that the package connects.

use std::path::PathBuf;
use std::sync::Mutex;
use std::time::Duration;

use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict};

use super::detach::{guarded, with_progress};
use super::model::{Loading, Model};
use crate::model::pipeline::{Cuts, Stages};
use crate::{Error, model};

/// The units of each of `stages` stages of a model: its layers, and its output as the last unit.
#[pyfunction]
pub(super) fn divide(py: Python<'_>, path: PathBuf, options: Loading, stages: usize) -> PyResult<Vec<(usize, usize)>> {
    let options = options.options()?;
    let units = guarded(py, || Cuts::read(path, &options)?.divide(stages))?;
    Ok(units.into_iter().map(|units| (units.start, units.end)).collect())
}

/// Some layers of a model. One thread at a time may use it.
#[pyclass(frozen, module = "nybble._native")]
pub(super) struct Stage(Mutex<model::pipeline::Stage>);

#[pymethods]
impl Stage {
    /// Loads the units from `first` to before `end` of the model at `path`.
    #[staticmethod]
    #[pyo3(signature = (path, options, first, end, progress=None))]
    fn load(
        py: Python<'_>,
        path: PathBuf,
        options: Loading,
        first: usize,
        end: usize,
        progress: Option<Py<PyAny>>,
    ) -> PyResult<Stage> {
        let options = options.options()?;
        let load =
            |report: model::Progress<'_>| model::pipeline::Stage::load(&path, &options, first..end, Some(report));
        with_progress(py, progress, load).map(|stage| Stage(Mutex::new(stage)))
    }

    /// Follows a plan of the driver, with the reply of the stage before. Returns its own reply.
    fn run<'py>(&self, py: Python<'py>, plan: &[u8], received: &[u8]) -> PyResult<Bound<'py, PyBytes>> {
        let reply = guarded(py, || {
            let busy = |_| Error::argument("stage", "a stage that another thread uses", "one thread at a time");
            Ok(self.0.try_lock().map_err(busy)?.run(plan, received))
        })?;
        Ok(PyBytes::new(py, &reply))
    }

    /// What the stage adds to the package's `ModelInfo`, by name.
    fn info<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let busy = |_| Error::argument("stage", "a stage that another thread uses", "one thread at a time");
        let (stage, info) = (self.0.try_lock().map_err(busy)?, PyDict::new(py));
        let model = stage.model();
        info.set_item("kernel", model.kernel().name())?;
        info.set_item("threads", model.threads())?;
        info.set_item("weight_bytes", model.weight_bytes())?;
        info.set_item("bytes_per_token", model.bytes_per_token())?;
        info.set_item("cache_bytes", model.cache_bytes())?;
        Ok(info)
    }
}

/// The stages that an object of the package connects.
#[derive(Debug)]
struct PyStages {
    stages: Py<PyAny>,
    count: usize,
}

impl PyStages {
    fn call<R>(&self, call: impl FnOnce(&Bound<'_, PyAny>) -> PyResult<R>) -> crate::Result<R> {
        Python::attach(|py| call(self.stages.bind(py))).map_err(|error| Error::StageLost(error.to_string()))
    }
}

impl Stages for PyStages {
    fn count(&self) -> usize {
        self.count
    }

    fn send(&self, plan: &[u8]) -> crate::Result<u64> {
        self.call(|stages| stages.call_method1("send", (PyBytes::new(stages.py(), plan),))?.extract())
    }

    fn receive(&self, ticket: u64, patience: Duration) -> crate::Result<Option<Vec<u8>>> {
        self.call(|stages| {
            let reply = stages.call_method1("receive", (ticket, patience.as_secs_f64()))?;
            let reply: Option<Bound<'_, PyBytes>> = reply.extract()?;
            Ok(reply.map(|reply| reply.as_bytes().to_vec()))
        })
    }

    fn forget(&self, ticket: u64) {
        // It frees a reply that nobody receives, or else the stages are gone.
        let _ = self.call(|stages| stages.call_method1("forget", (ticket,)).map(drop));
    }

    fn restart(&self) -> crate::Result<()> {
        self.call(|stages| stages.call_method0("restart").map(drop))
    }
}

/// A model whose layers are in `stages`, an object with the attributes of the package's `Stages`. `options` are those of the stages, with
/// the model's `cache_type`.
#[pyfunction]
pub(super) fn pipeline(py: Python<'_>, path: PathBuf, options: Loading, stages: Py<PyAny>) -> PyResult<Model> {
    let (count, options) = (stages.bind(py).getattr("count")?.extract()?, options.options()?);
    let stages = PyStages { stages, count };
    guarded(py, || model::Model::pipeline(path, &options, Box::new(stages))).map(Model::new)
}
