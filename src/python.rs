//! The Python module `nybble._native`: converts values, releases the GIL, delegates. No logic lives here; the package
//! `nybble` makes an API of it, and `_native.pyi` describes it to type checkers.

use std::collections::HashMap;
use std::io::ErrorKind;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use numpy::PyArray2;
use numpy::prelude::*;
use pyo3::IntoPyObjectExt;
use pyo3::exceptions::{PyMemoryError, PyOSError, PyOverflowError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict, PyList, PyString, PyTuple};

use crate::engine::{self, sampler::SamplingOptions};
use crate::format::gguf::{self, Array, Gguf, Value};
use crate::model::{self, Input, LoadOptions, Logits};
use crate::quant::block::BlockType;
use crate::{Error, threads};

/// How often Python is asked for signals while Rust computes. Asking takes the GIL, so not at every opportunity.
const SIGNALS_EVERY: Duration = Duration::from_millis(20);
/// How often Python is told of progress, besides at the start and at the end. While another thread runs Python, each time
/// waits for the GIL, longer than a layer takes.
const PROGRESS_EVERY: Duration = Duration::from_millis(50);

mod errors {
    //! Exceptions that the package defines in Python.
    #![allow(missing_docs, reason = "the classes are described where they are defined")]
    pyo3::import_exception!(nybble.errors, ModelError);
    pyo3::import_exception!(nybble.errors, ContextFullError);
    pyo3::import_exception!(nybble.errors, InternalError);
}
use constraint::Constraint;
use errors::{ContextFullError, InternalError, ModelError};

/// Of everything in this module, so that memory goes back to the system when a model is closed.
#[cfg(target_os = "linux")]
#[global_allocator]
static ALLOCATOR: crate::system::allocator::Allocator = crate::system::allocator::Allocator;

mod constraint;
mod evaluate;
mod quantize;
mod scheduler;
mod session;
mod vocab;

impl From<Error> for PyErr {
    fn from(error: Error) -> PyErr {
        let message = error.to_string();
        match error {
            // With the number of the error, OSError becomes FileNotFoundError, PermissionError and so on.
            Error::Io { source, .. } if source.kind() == ErrorKind::OutOfMemory => PyMemoryError::new_err(message),
            Error::Io { path, source } => match number(&source) {
                Some(number) => PyOSError::new_err((number, reason(&source), path.into_os_string())),
                None => PyOSError::new_err(message),
            },
            Error::ContextFull { used, requested, context } => ContextFullError::new_err((used, requested, context)),
            Error::UnknownKernel { .. } | Error::InvalidArgument { .. } => PyValueError::new_err(message),
            Error::OutOfMemory { .. } => PyMemoryError::new_err(message),
            _ => ModelError::new_err(message),
        }
    }
}

/// The system's number of an error, also of one that a library has wrapped.
fn number(error: &std::io::Error) -> Option<i32> {
    error.raw_os_error().or(match error.kind() {
        ErrorKind::NotFound => Some(2),
        ErrorKind::PermissionDenied => Some(13),
        ErrorKind::NotADirectory => Some(20),
        ErrorKind::IsADirectory => Some(21),
        ErrorKind::FileTooLarge => Some(27),
        ErrorKind::StorageFull => Some(28),
        ErrorKind::ReadOnlyFilesystem => Some(30),
        _ => None,
    })
}

/// What the system says, without the number that Python adds itself.
fn reason(error: &std::io::Error) -> String {
    let text = error.to_string();
    text.split_once(" (os error").map_or(text.as_str(), |(reason, _)| reason).to_owned()
}

/// Runs `compute`. A panic in it is a bug, and ends here: as an exception that asks for a report, not as one that no
/// `except Exception` would catch.
fn caught<R>(compute: impl FnOnce() -> R) -> PyResult<R> {
    catch_unwind(AssertUnwindSafe(compute)).map_err(|panic| {
        let text = panic.downcast_ref::<String>().map(String::as_str);
        InternalError::new_err(text.or_else(|| panic.downcast_ref().copied()).unwrap_or("a panic").to_owned())
    })
}

/// Runs `compute` without the GIL, panics [`caught`].
fn guarded<R: Send>(py: Python<'_>, compute: impl FnOnce() -> crate::Result<R> + Send) -> PyResult<R> {
    let result = py.detach(|| catch_unwind(AssertUnwindSafe(compute)));
    Ok(caught(|| result.unwrap_or_else(|panic| resume_unwind(panic)))??)
}

/// Runs `compute` without the GIL. The function that it gets says whether a signal handler has raised, as Ctrl-C does; the
/// exception is raised when `compute` returns.
fn detached<R: Send>(
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
    match raised.into_inner().unwrap_or_else(PoisonError::into_inner) {
        Some(exception) => Err(exception),
        None => result,
    }
}

/// Runs `compute` without the GIL. It reports how much is done, and how much there is, to the callable `progress`, not more
/// often than anybody could see. What that or a signal handler raises ends `compute` and is raised when it has returned.
fn with_progress<R: Send>(
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
    match raised.into_inner().unwrap_or_else(PoisonError::into_inner) {
        Some(exception) => Err(exception),
        None => result,
    }
}

/// Writes a GGUF file or a folder of Hugging Face as a GGUF file whose matrices are of `type`.
#[pyfunction]
#[pyo3(signature = (source, out, r#type, progress=None))]
fn convert(py: Python<'_>, source: PathBuf, out: PathBuf, r#type: &str, progress: Option<Py<PyAny>>) -> PyResult<()> {
    let names = || Error::argument("type", format_args!("{type:?}"), "f32, f16, bf16, q8_0, q4_0 or q4_1");
    let wanted = BlockType::from_name(r#type).ok_or_else(names)?;
    with_progress(py, progress, |report| model::convert::convert_path(&source, &out, wanted, Some(report)))
}

/// Panics, so that a test can see what becomes of that.
#[pyfunction]
fn panic_for_tests(py: Python<'_>, words: &str) -> PyResult<()> {
    guarded(py, || panic!("{words}"))
}

/// The kernels that this CPU can run, best first.
#[pyfunction]
fn kernels() -> Vec<&'static str> {
    crate::kernels::available().iter().map(|kernel| kernel.name()).collect()
}

/// How many threads a model computes with unless told otherwise.
#[pyfunction]
fn default_threads() -> usize {
    threads::default_threads()
}

/// Bytes of memory that this process can still use without swap. None where the system does not report it.
#[pyfunction]
fn available_bytes() -> Option<usize> {
    crate::system::memory::available()
}

/// What a file says of a tensor.
#[pyclass(frozen, get_all, module = "nybble._native")]
struct TensorInfo {
    name: String,
    r#type: &'static str,
    /// Values that lie side by side first.
    shape: Py<PyTuple>,
    offset: u64,
    nbytes: usize,
}

/// An open GGUF file, or several that make up one model.
#[pyclass(frozen, module = "nybble._native")]
struct GgufFile(Gguf);

#[pymethods]
impl GgufFile {
    #[new]
    #[pyo3(signature = (path, mmap=true))]
    fn new(py: Python<'_>, path: PathBuf, mmap: bool) -> PyResult<GgufFile> {
        guarded(py, || Gguf::open_with(path, &gguf::OpenOptions { mmap })).map(GgufFile)
    }

    /// All keys and values, made anew at each access. Bytes that are no UTF-8 become lone surrogates.
    #[getter]
    fn metadata<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let dict = PyDict::new(py);
        for (key, value) in self.0.metadata().iter() {
            dict.set_item(key, to_python(py, value)?)?;
        }
        Ok(dict)
    }

    /// The tensors, in the order of the file.
    #[getter]
    fn tensors(&self, py: Python<'_>) -> PyResult<Vec<TensorInfo>> {
        let info = |tensor: &gguf::TensorInfo| {
            Ok(TensorInfo {
                name: tensor.name().to_owned(),
                r#type: tensor.block_type().name(),
                shape: PyTuple::new(py, tensor.dims())?.unbind(),
                offset: tensor.offset(),
                nbytes: tensor.nbytes(),
            })
        };
        self.0.tensors().iter().map(info).collect()
    }
}

fn to_python<'py>(py: Python<'py>, value: &Value) -> PyResult<Bound<'py, PyAny>> {
    Ok(match value {
        Value::U8(v) => v.into_bound_py_any(py)?,
        Value::I8(v) => v.into_bound_py_any(py)?,
        Value::U16(v) => v.into_bound_py_any(py)?,
        Value::I16(v) => v.into_bound_py_any(py)?,
        Value::U32(v) => v.into_bound_py_any(py)?,
        Value::I32(v) => v.into_bound_py_any(py)?,
        Value::F32(v) => v.into_bound_py_any(py)?,
        Value::Bool(v) => v.into_bound_py_any(py)?,
        Value::U64(v) => v.into_bound_py_any(py)?,
        Value::I64(v) => v.into_bound_py_any(py)?,
        Value::F64(v) => v.into_bound_py_any(py)?,
        Value::String(bytes) => text(py, bytes)?,
        Value::Array(array) => match array {
            // A list of bytes must not become a `bytes`.
            Array::U8(v) => PyList::new(py, v)?.into_any(),
            Array::I8(v) => PyList::new(py, v)?.into_any(),
            Array::U16(v) => PyList::new(py, v)?.into_any(),
            Array::I16(v) => PyList::new(py, v)?.into_any(),
            Array::U32(v) => PyList::new(py, v)?.into_any(),
            Array::I32(v) => PyList::new(py, v)?.into_any(),
            Array::F32(v) => PyList::new(py, v)?.into_any(),
            Array::Bool(v) => PyList::new(py, v)?.into_any(),
            Array::U64(v) => PyList::new(py, v)?.into_any(),
            Array::I64(v) => PyList::new(py, v)?.into_any(),
            Array::F64(v) => PyList::new(py, v)?.into_any(),
            Array::String(v) => {
                let strings: PyResult<Vec<_>> = v.iter().map(|bytes| text(py, bytes)).collect();
                PyList::new(py, strings?)?.into_any()
            }
        },
    })
}

/// Token ids, which Python counts with integers of any size: one that no type here holds is a wrong id like any other.
struct TokenIds(Vec<i64>);

impl<'a, 'py> FromPyObject<'a, 'py> for TokenIds {
    type Error = PyErr;

    fn extract(object: Borrowed<'a, 'py, PyAny>) -> PyResult<Self> {
        let ids = object.extract::<Vec<i64>>();
        ids.map(TokenIds).map_err(|error| match error.is_instance_of::<PyOverflowError>(object.py()) {
            true => Error::argument("token", "an integer of more than 64 bits", "an id of the vocabulary").into(),
            false => error,
        })
    }
}

fn token_ids(TokenIds(ids): TokenIds) -> crate::Result<Vec<u32>> {
    ids.into_iter()
        .map(|id| u32::try_from(id).map_err(|_| Error::argument("token", id, "an id of the vocabulary")))
        .collect()
}

fn text<'py>(py: Python<'py>, bytes: &[u8]) -> PyResult<Bound<'py, PyAny>> {
    match str::from_utf8(bytes) {
        Ok(text) => Ok(PyString::new(py, text).into_any()),
        Err(_) => PyBytes::new(py, bytes).call_method1("decode", ("utf-8", "surrogateescape")),
    }
}

/// The attributes of the package's `SamplingOptions`, which says what they mean.
#[derive(FromPyObject)]
struct Options {
    temperature: f32,
    top_k: u32,
    top_p: f32,
    min_p: f32,
    typical_p: f32,
    repetition_penalty: f32,
    presence_penalty: f32,
    frequency_penalty: f32,
    penalty_window: u32,
    logit_bias: HashMap<u32, f32>,
    seed: Option<u64>,
    logprobs: Option<u32>,
}

impl From<Options> for SamplingOptions {
    fn from(options: Options) -> SamplingOptions {
        // Sorted, because a map has no order, and what is computed must not depend on one.
        let mut logit_bias: Vec<_> = options.logit_bias.into_iter().collect();
        logit_bias.sort_by_key(|(token, _)| *token);
        SamplingOptions {
            temperature: options.temperature,
            top_k: options.top_k,
            top_p: options.top_p,
            min_p: options.min_p,
            typical_p: options.typical_p,
            repetition_penalty: options.repetition_penalty,
            presence_penalty: options.presence_penalty,
            frequency_penalty: options.frequency_penalty,
            penalty_window: options.penalty_window,
            logit_bias,
            seed: options.seed,
            logprobs: options.logprobs,
        }
    }
}

/// A sampled token, its log-probability, and the likeliest tokens with theirs.
#[pyclass(frozen, get_all, module = "nybble._native")]
struct Sampled {
    id: u32,
    logprob: Option<f32>,
    top: Vec<(u32, f32)>,
}

impl From<engine::sampler::Sampled> for Sampled {
    fn from(sampled: engine::sampler::Sampled) -> Sampled {
        Sampled { id: sampled.token, logprob: sampled.logprob, top: sampled.top }
    }
}

/// Text in the making. A scheduler takes it away.
#[pyclass(frozen, module = "nybble._native")]
struct Sequence(Mutex<Option<engine::Sequence>>);

impl Sequence {
    fn of(mut sequence: engine::Sequence, constraint: Option<Bound<'_, Constraint>>) -> Sequence {
        if let Some(constraint) = constraint {
            sequence.constrain(constraint.get().0.clone());
        }
        Sequence(Mutex::new(Some(sequence)))
    }

    /// What a sequence that is not there is told as.
    fn busy() -> Error {
        Error::argument("sequence", "one that is in a step or a scheduler already", "each in one at a time")
    }
}

/// A model in memory. Its end is that of the model, and then of [`Trim`].
#[pyclass(frozen, module = "nybble._native")]
struct Model(Arc<model::Model>, Trim);

/// Has the allocator give back what it keeps, when it ends.
struct Trim;

impl Drop for Trim {
    fn drop(&mut self) {
        #[cfg(target_os = "linux")]
        crate::system::allocator::trim();
    }
}

#[pymethods]
impl Model {
    /// Loads a GGUF file or a folder of Hugging Face; `progress` is called with how much is done and how much there is.
    #[staticmethod]
    #[pyo3(signature = (
        path, kernel=None, threads=None, context=None, quantize="auto", cache_type=None, mmap=true,
        progress=None
    ))]
    #[allow(clippy::too_many_arguments, reason = "they have names in Python")]
    fn load(
        py: Python<'_>,
        path: PathBuf,
        kernel: Option<String>,
        threads: Option<usize>,
        context: Option<usize>,
        quantize: &str,
        cache_type: Option<&str>,
        mmap: bool,
        progress: Option<Py<PyAny>>,
    ) -> PyResult<Model> {
        let quantize = model::Quantize::by_name(quantize)?;
        let cache_type = cache_type.map(model::CacheType::by_name).transpose()?;
        let options = LoadOptions { kernel, threads, context, quantize, cache_type, unmapped: !mmap };
        with_progress(py, progress, |report| model::Model::load_with(path, &options, Some(report)))
            .map(|model| Model(Arc::new(model), Trim))
    }

    /// Begins a sequence with a prompt. `options` has the attributes of the package's `SamplingOptions`.
    #[pyo3(signature = (prompt, options, constraint=None))]
    fn sequence(
        &self,
        py: Python<'_>,
        prompt: TokenIds,
        options: Options,
        constraint: Option<Bound<'_, Constraint>>,
    ) -> PyResult<Sequence> {
        let prompt = token_ids(prompt)?;
        let sequence = guarded(py, || engine::Sequence::new(&self.0, &prompt, options.into()))?;
        Ok(Sequence::of(sequence, constraint))
    }

    /// Computes what is pending of each sequence and samples a token for each, which is then pending.
    fn step(&self, py: Python<'_>, sequences: Vec<Py<Sequence>>) -> PyResult<Vec<Sampled>> {
        // Whoever holds a sequence computes, so waiting for it here would keep the GIL all the while.
        let mut guards: Vec<_> = sequences
            .iter()
            .map(|sequence| sequence.get().0.try_lock().map_err(|_| Sequence::busy()))
            .collect::<crate::Result<_>>()?;
        let stepped = guards.iter_mut().map(|guard| guard.as_mut().ok_or_else(Sequence::busy));
        let mut stepped: Vec<_> = stepped.collect::<crate::Result<_>>()?;
        let sampled = detached(py, |interrupted| engine::step(&self.0, &mut stepped, interrupted))?;
        Ok(sampled.into_iter().map(Sampled::from).collect())
    }

    /// The logits after each token `(len(ids), vocabulary)`.
    fn logits<'py>(&self, py: Python<'py>, ids: TokenIds) -> PyResult<Bound<'py, PyArray2<f32>>> {
        self.rows(py, ids, Logits::All, self.0.vocabulary())
    }

    /// The hidden state of each token behind the last norm `(len(ids), hidden_size)`.
    fn hidden_states<'py>(&self, py: Python<'py>, ids: TokenIds) -> PyResult<Bound<'py, PyArray2<f32>>> {
        self.rows(py, ids, Logits::Hidden, self.0.config().hidden)
    }

    /// What this machine could do at most with the model's kernel and threads: bytes read from memory and INT8 operations,
    /// both in 10^9 a second. Takes about a second and, for that time, a buffer of up to 1 GiB.
    fn machine_limits(&self, py: Python<'_>) -> PyResult<(f64, f64)> {
        let limits = guarded(py, || Ok(crate::kernels::limits(self.0.pool(), self.0.kernel())))?;
        Ok((limits.bandwidth_gb_s, limits.int8_gops))
    }

    /// What the package's `ModelInfo` holds, by name.
    fn info<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let (model, info) = (&self.0, PyDict::new(py));
        info.set_item("name", model.name())?;
        info.set_item("family", model.config().family.name)?;
        info.set_item("parameters", model.parameters())?;
        info.set_item("layers", model.config().layers.len())?;
        info.set_item("hidden_size", model.config().hidden)?;
        info.set_item("vocabulary", model.vocabulary())?;
        info.set_item("context", model.context())?;
        info.set_item("kernel", model.kernel().name())?;
        info.set_item("threads", model.threads())?;
        info.set_item("weight_bytes", model.weight_bytes())?;
        info.set_item("bytes_per_token", model.bytes_per_token())?;
        info.set_item("cache_type", model.cache_type().name())?;
        info.set_item("cache_bytes_per_token", model.cache_bytes_per_token())?;
        info.set_item("cache_bytes", model.cache_bytes())?;
        Ok(info)
    }
}

impl Model {
    /// What `wanted` says of each token, `width` numbers.
    fn rows<'py>(
        &self,
        py: Python<'py>,
        ids: TokenIds,
        wanted: Logits,
        width: usize,
    ) -> PyResult<Bound<'py, PyArray2<f32>>> {
        let ids = token_ids(ids)?;
        let rows = ids.len();
        let values = detached(py, |interrupted| {
            let mut values = Vec::new();
            if !ids.is_empty() {
                let mut session = self.0.session();
                let input = Input { session: &mut session, tokens: &ids, logits: wanted };
                self.0.forward(&mut [input], &mut values, interrupted)?;
            }
            Ok(values)
        })?;
        values.into_pyarray(py).reshape([rows, width])
    }
}

/// The compiled half of the package `nybble`.
#[pymodule]
mod _native {
    #[pymodule_export]
    use super::constraint::{Constraint, Vocabulary};
    #[pymodule_export]
    use super::evaluate::{Baseline, perplexity};
    #[pymodule_export]
    use super::quantize::quantize;
    #[pymodule_export]
    use super::scheduler::Scheduler;
    #[pymodule_export]
    use super::session::Session;
    #[pymodule_export]
    use super::vocab::SentencePiece;
    #[pymodule_export]
    use super::{
        GgufFile, Model, Sampled, Sequence, TensorInfo, available_bytes, convert, default_threads, kernels,
        panic_for_tests,
    };

    #[pymodule_export]
    #[allow(non_upper_case_globals, reason = "Python's name for it")]
    const __version__: &str = env!("CARGO_PKG_VERSION");
}
