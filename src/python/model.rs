//! `nybble._native.Model` and `Sequence`: a loaded model, and what it computes.

use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use numpy::PyArray2;
use numpy::prelude::*;
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyTuple};

use super::constraint::Constraint;
use super::detach::{detached, guarded, with_progress};
use super::processor::with_python_processor;
use super::session::Session;
use super::tokens::{Options, Sampled, TokenIds};
use crate::engine;
use crate::model::{self, ExpertMemory, Input, LoadOptions, Logits, Pooling};
use crate::{Error, threads};

/// The kernels that this CPU runs, best first.
#[pyfunction]
pub(super) fn kernels() -> Vec<&'static str> {
    crate::kernels::available().iter().map(|kernel| kernel.name()).collect()
}

/// Layout, rows, threads, the kernel that is used, and each kernel's speed in 10^9 operations per second.
type KernelChoice = (String, usize, usize, String, Vec<(String, f64)>);

/// What was measured to choose kernels.
#[pyfunction]
pub(super) fn tuning() -> Vec<KernelChoice> {
    let choices = crate::kernels::choices().into_iter();
    choices.map(|choice| (choice.layout, choice.rows, choice.threads, choice.kernel, choice.gops)).collect()
}

/// The number of threads that a model computes with by default.
#[pyfunction]
pub(super) fn default_threads() -> usize {
    threads::default_threads()
}

/// The name of the CPU's model. None where neither the CPU nor the system has one.
#[pyfunction]
pub(super) fn cpu_name() -> Option<String> {
    crate::kernels::cpu::name()
}

/// Bytes of memory that this process can still use without swap. None where the system does not report it.
#[pyfunction]
pub(super) fn available_bytes() -> Option<usize> {
    crate::system::memory::available()
}

/// Bytes of memory that this process holds, now and at most so far. None for what the system reports in another way, or not
/// at all.
#[pyfunction]
pub(super) fn resident_bytes() -> (Option<usize>, Option<usize>) {
    (crate::system::memory::resident(), crate::system::memory::peak_resident())
}

/// What the model at `path` needs once it is loaded, by name, from the headers of its files. `options` has the attributes of
/// the package's `LoadOptions`.
#[pyfunction]
pub(super) fn model_needs(py: Python<'_>, path: PathBuf, options: Loading) -> PyResult<Bound<'_, PyDict>> {
    let options = options.options()?;
    let needs = guarded(py, || model::Needs::read(path, &options))?;
    let found = PyDict::new(py);
    found.set_item("family", needs.family)?;
    found.set_item("parameters", needs.parameters)?;
    found.set_item("context", needs.context)?;
    found.set_item("weight_bytes", needs.weight_bytes)?;
    found.set_item("cache_bytes", needs.cache_bytes)?;
    found.set_item("cache_bytes_per_token", needs.cache_bytes_per_token)?;
    found.set_item("state_bytes", needs.state_bytes)?;
    Ok(found)
}

/// The attributes of the package's `LoadOptions`, which documents them. Those that name a file are not among them.
#[derive(FromPyObject)]
pub(super) struct Loading {
    kernel: Option<String>,
    threads: Option<usize>,
    context: Option<usize>,
    quantize: Option<String>,
    cache_type: Option<String>,
    mtp: Option<bool>,
    expert_memory: Option<ExpertLimit>,
    expert_skip: Option<f32>,
    mmap: bool,
}

/// A limit of the memory for experts: gigabytes, or `auto`.
#[derive(FromPyObject)]
enum ExpertLimit {
    Gigabytes(f64),
    Name(String),
}

impl ExpertLimit {
    fn checked(self) -> crate::Result<ExpertMemory> {
        let expected = "a number of gigabytes above 0, or \"auto\"";
        match self {
            ExpertLimit::Gigabytes(number) if number > 0.0 && number < 1e9 => {
                Ok(ExpertMemory::Bytes((number * 1e9) as usize))
            }
            ExpertLimit::Gigabytes(number) => Err(Error::argument("expert_memory", number, expected)),
            ExpertLimit::Name(name) if name == "auto" => Ok(ExpertMemory::Auto),
            ExpertLimit::Name(name) => Err(Error::argument("expert_memory", format_args!("{name:?}"), expected)),
        }
    }
}

impl Loading {
    pub(super) fn options(self) -> crate::Result<LoadOptions> {
        let quantize = model::Quantize::by_name(self.quantize.as_deref().unwrap_or("stored"))?;
        let cache_type = self.cache_type.as_deref().map(model::CacheType::by_name).transpose()?;
        let Loading { kernel, threads, context, mtp, expert_skip, mmap, .. } = self;
        let expert_memory = self.expert_memory.map(ExpertLimit::checked).transpose()?;
        let sparse = None;
        Ok(LoadOptions {
            kernel,
            threads,
            context,
            quantize,
            cache_type,
            mtp,
            expert_memory,
            expert_skip,
            sparse,
            mmap,
        })
    }
}

/// A model in memory. [`Trim`] runs after the model is freed.
#[pyclass(frozen, module = "nybble._native")]
pub(super) struct Model(pub(super) Arc<model::Model>, Trim);

impl Model {
    pub(super) fn new(model: model::Model) -> Model {
        Model(Arc::new(model), Trim)
    }
}

/// Returns the allocator's free memory to the system on drop.
struct Trim;

impl Drop for Trim {
    fn drop(&mut self) {
        #[cfg(target_os = "linux")]
        crate::system::allocator::trim();
    }
}

#[pymethods]
impl Model {
    /// Loads a GGUF file or a Hugging Face folder. `options` has the attributes of the package's `LoadOptions`; `progress` is
    /// called with the work done and the total.
    #[staticmethod]
    #[pyo3(signature = (path, options, progress=None))]
    fn load(py: Python<'_>, path: PathBuf, options: Loading, progress: Option<Py<PyAny>>) -> PyResult<Model> {
        let options = options.options()?;
        with_progress(py, progress, |report| model::Model::load_with(path, &options, Some(report))).map(Model::new)
    }

    /// A sequence that continues `tokens`. `session` has computed a beginning of them. `options` has the attributes of the
    /// package's `SamplingOptions`. Ids in the ranges `excluded` (first, end) are never sampled, and those in `ends` not before
    /// `min_tokens` others; those in `ignored` only where nothing else is allowed. `dry_breakers` are the token sequences that end a
    /// repetition. `processor` takes the tokens and logits and returns logits. `adapter` is the name of an adapter; that of
    /// `session` if None.
    #[pyo3(signature = (
        tokens, options, constraint=None, session=None, excluded=Vec::new(), ends=Vec::new(), ignored=Vec::new(),
        dry_breakers=Vec::new(), processor=None, adapter=None
    ))]
    #[allow(clippy::too_many_arguments, reason = "Python passes them by name")]
    fn sequence(
        &self,
        py: Python<'_>,
        tokens: TokenIds,
        options: Options,
        constraint: Option<Bound<'_, Constraint>>,
        session: Option<Bound<'_, Session>>,
        excluded: Vec<(u32, u32)>,
        ends: Vec<u32>,
        ignored: Vec<u32>,
        dry_breakers: Vec<Vec<u32>>,
        processor: Option<Py<PyAny>>,
        adapter: Option<&str>,
    ) -> PyResult<Sequence> {
        let tokens = tokens.checked()?;
        let session = match session {
            Some(session) => session.get().with_adapter(adapter)?.fork(),
            None => self.0.session_with(adapter)?,
        };
        let options = options.sampling(dry_breakers)?;
        let resumed = guarded(py, || engine::Sequence::resume_endless(&self.0, session, &tokens, options));
        let mut sequence = resumed?;
        sequence.exclude(excluded.into_iter().map(|(first, end)| first..end).collect());
        sequence.hold(ends, &ignored);
        if let Some(constraint) = constraint {
            sequence.constrain(constraint.get().0.clone());
        }
        if let Some(processor) = processor {
            sequence = with_python_processor(sequence, processor);
        }
        Ok(Sequence(Mutex::new(Some(sequence))))
    }

    /// A session without tokens, with the adapter called `adapter`, or that for everything.
    #[pyo3(signature = (adapter=None))]
    fn session(&self, adapter: Option<&str>) -> PyResult<Session> {
        Ok(Session(self.0.session_with(adapter)?))
    }

    /// Applies the adapter at `path` to everything. Returns what its files say that has no influence, a line each.
    fn set_adapter(&self, py: Python<'_>, path: PathBuf) -> PyResult<Vec<String>> {
        guarded(py, || self.0.set_adapter(&path))
    }

    /// Loads the adapter at `path` under a name. Returns what its files say that has no influence, a line each.
    fn load_adapter(&self, py: Python<'_>, name: &str, path: PathBuf) -> PyResult<Vec<String>> {
        guarded(py, || self.0.load_adapter(name, path))
    }

    /// Removes the adapter called `name`. Returns whether there was one.
    fn unload_adapter(&self, name: &str) -> bool {
        self.0.unload_adapter(name)
    }

    /// The names of the adapters that can be chosen, sorted.
    fn adapters(&self) -> Vec<String> {
        self.0.adapter_names()
    }

    /// Writes a session and `tokens` to a file. The session has computed a beginning of `tokens`.
    fn save_session(
        &self,
        py: Python<'_>,
        session: Bound<'_, Session>,
        tokens: TokenIds,
        path: PathBuf,
    ) -> PyResult<()> {
        let (tokens, session) = (tokens.checked()?, session.get());
        guarded(py, || session.0.save(&self.0, &tokens, path))
    }

    /// Reads a file that `save_session` wrote. Returns the session and the tokens saved with it.
    fn load_session(&self, py: Python<'_>, path: PathBuf) -> PyResult<(Session, Vec<u32>)> {
        let (session, tokens) = guarded(py, || model::Session::load(&self.0, path))?;
        Ok((Session(session), tokens))
    }

    /// Computes the pending tokens of each sequence and samples a token for each, which is then pending. Measurements use it;
    /// generation uses a `Scheduler`.
    fn step(&self, py: Python<'_>, sequences: Vec<Py<Sequence>>) -> PyResult<Vec<Sampled>> {
        // A step holds its sequences, and waiting here would hold the GIL meanwhile.
        let mut guards: Vec<_> = sequences
            .iter()
            .map(|sequence| sequence.get().0.try_lock().map_err(|_| Sequence::busy()))
            .collect::<crate::Result<_>>()?;
        let stepped = guards.iter_mut().map(|guard| guard.as_mut().ok_or_else(Sequence::busy));
        let mut stepped: Vec<_> = stepped.collect::<crate::Result<_>>()?;
        let sampled = detached(py, |interrupted| engine::step(&self.0, &mut stepped, interrupted))?;
        Ok(sampled.into_iter().map(Sampled::from).collect())
    }

    /// The logits after each token, of shape `(len(ids), vocabulary)`.
    #[pyo3(signature = (ids, adapter=None))]
    fn logits<'py>(
        &self,
        py: Python<'py>,
        ids: TokenIds,
        adapter: Option<&str>,
    ) -> PyResult<Bound<'py, PyArray2<f32>>> {
        self.rows(py, ids, Logits::All, self.0.vocabulary(), adapter)
    }

    /// The logits of the head for multi-token prediction after each pair of tokens, of shape `(len(ids) - 1, vocabulary)`.
    fn mtp_logits<'py>(&self, py: Python<'py>, ids: TokenIds) -> PyResult<Bound<'py, PyArray2<f32>>> {
        let ids = ids.checked()?;
        let values = detached(py, |interrupted| self.0.mtp_logits(&ids, interrupted))?;
        values.into_pyarray(py).reshape([ids.len().saturating_sub(1), self.0.vocabulary()])
    }

    /// The hidden state of each token after the last norm, of shape `(len(ids), hidden_size)`.
    #[pyo3(signature = (ids, adapter=None))]
    fn hidden_states<'py>(
        &self,
        py: Python<'py>,
        ids: TokenIds,
        adapter: Option<&str>,
    ) -> PyResult<Bound<'py, PyArray2<f32>>> {
        self.rows(py, ids, Logits::Hidden, self.0.config().hidden, adapter)
    }

    /// Embeddings of documents in token ids, of shape `(len(documents), embedding_size)`. `pooling` is mean, cls or last.
    #[pyo3(signature = (texts, pooling, normalize, adapter=None))]
    fn embed<'py>(
        &self,
        py: Python<'py>,
        texts: Vec<TokenIds>,
        pooling: &str,
        normalize: bool,
        adapter: Option<&str>,
    ) -> PyResult<Bound<'py, PyArray2<f32>>> {
        let texts = texts.into_iter().map(TokenIds::checked).collect::<crate::Result<Vec<_>>>()?;
        let pooling = Some(Pooling::by_name(pooling)?);
        let values = detached(py, |interrupted| {
            let texts: Vec<&[u32]> = texts.iter().map(Vec::as_slice).collect();
            self.0.embed_with(adapter, &texts, pooling, normalize, interrupted)
        })?;
        values.into_pyarray(py).reshape([texts.len(), self.0.embedding_width()])
    }

    /// Scores of documents by the classification head, of shape `(len(documents), labels)`. A text is its token ids and the index of
    /// the first token of a second text in it, or None.
    #[pyo3(signature = (texts, adapter=None))]
    fn classify<'py>(
        &self,
        py: Python<'py>,
        texts: Vec<(TokenIds, Option<usize>)>,
        adapter: Option<&str>,
    ) -> PyResult<Bound<'py, PyArray2<f32>>> {
        let checked = texts.into_iter().map(|(ids, second)| Ok((ids.checked()?, second)));
        let texts = checked.collect::<crate::Result<Vec<_>>>()?;
        let values = detached(py, |interrupted| {
            let texts: Vec<_> = texts.iter().map(|(ids, second)| (ids.as_slice(), *second)).collect();
            self.0.classify_with(adapter, &texts, interrupted)
        })?;
        values.into_pyarray(py).reshape([texts.len(), self.0.labels()])
    }

    /// The limits of this machine with the model's kernel and threads: bytes read from memory and INT8 operations, both in
    /// 10^9 per second. Takes about a second and, during it, a buffer of up to 1 GiB.
    fn machine_limits(&self, py: Python<'_>) -> PyResult<(f64, f64)> {
        let limits = guarded(py, || Ok(crate::kernels::limits(self.0.pool(), self.0.kernel())))?;
        Ok((limits.bandwidth_gb_s, limits.int8_gops))
    }

    /// The fields of the package's `ExpertUse`, by name.
    fn expert_use<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let (found, dict) = (self.0.expert_use(), PyDict::new(py));
        dict.set_item("needed", found.needed)?;
        dict.set_item("read", found.read)?;
        dict.set_item("weight_shares", found.weight_shares)?;
        dict.set_item("chosen", found.chosen)?;
        Ok(dict)
    }

    /// What loading has left out, a line each.
    fn notes(&self) -> Vec<String> {
        self.0.notes()
    }

    /// The fields of the package's `ModelInfo`, by name.
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
        info.set_item("pooling", model.config().pooling.unwrap_or(Pooling::Mean).name())?;
        info.set_item("embedding_size", model.embedding_width())?;
        info.set_item("labels", PyTuple::new(py, labels(model))?)?;
        info.set_item("generates", model.generates())?;
        info.set_item("mtp", model.has_mtp())?;
        info.set_item("weight_bytes", model.weight_bytes())?;
        info.set_item("bytes_per_token", model.bytes_per_token())?;
        info.set_item("cache_type", model.cache_type().name())?;
        info.set_item("cache_bytes_per_token", model.cache_bytes_per_token())?;
        info.set_item("cache_bytes", model.cache_bytes())?;
        info.set_item("state_bytes", model.state_bytes())?;
        Ok(info)
    }
}

impl Model {
    /// Computes `ids` in a new session. Returns `wanted` of each, `width` values per token.
    fn rows<'py>(
        &self,
        py: Python<'py>,
        ids: TokenIds,
        wanted: Logits,
        width: usize,
        adapter: Option<&str>,
    ) -> PyResult<Bound<'py, PyArray2<f32>>> {
        let ids = ids.checked()?;
        let rows = ids.len();
        let values = detached(py, |interrupted| {
            let mut values = Vec::new();
            if !ids.is_empty() {
                let mut session = self.0.session_with(adapter)?;
                let input = Input::new(&mut session, &ids, wanted);
                self.0.forward(&mut [input], &mut values, interrupted)?;
                session.check_cache()?;
                if wanted == Logits::Hidden && values.iter().any(|value| !value.is_finite()) {
                    return Err(Error::BadHiddenStates);
                }
            }
            Ok(values)
        })?;
        values.into_pyarray(py).reshape([rows, width])
    }
}

/// The names of a classifier's labels; their numbers where the file has no names.
fn labels(model: &model::Model) -> Vec<String> {
    let named = model.label_names();
    (0..model.labels()).map(|label| named.get(label).cloned().unwrap_or_else(|| format!("LABEL_{label}"))).collect()
}

/// A prompt and its completion so far. A scheduler takes it out of this object.
#[pyclass(frozen, module = "nybble._native")]
pub(super) struct Sequence(Mutex<Option<engine::Sequence>>);

impl Sequence {
    /// Takes the sequence, for a scheduler.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] when a step or a scheduler has it.
    pub(super) fn take(&self) -> crate::Result<engine::Sequence> {
        self.0.try_lock().ok().and_then(|mut sequence| sequence.take()).ok_or_else(Sequence::busy)
    }

    fn busy() -> Error {
        Error::argument("sequence", "a sequence that a step or a scheduler has", "each sequence in one at a time")
    }
}
