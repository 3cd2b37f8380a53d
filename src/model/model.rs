//! A model, from loading to logits.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use super::adapter::registry::Adapters;
use super::batch::{Input, Logits};
use super::config::Config;
use super::convert::requantize::Quantized;
use super::ffn::expert_use::ExpertUse;
use super::fingerprint::Fingerprint;
use super::forward::Workspace;
use super::hf::HfFolder;
use super::mixers::positions::Positions;
use super::mtp::head::Head;
use super::pipeline::handover::Handover;
use super::pipeline::held::Held;
use super::pipeline::remote::{Remote, mirrored};
use super::state::cache::{CacheShape, CacheType};
use super::state::session::Session;
use super::transformer::{Transformer, Weights, Widths};
use super::weights::expert_cache::ExpertCache;
use super::weights::load_options::{LoadOptions, Quantize};
use super::weights::loader::{Loader, Progress};
use crate::error::{Error, Result};
use crate::format::Checkpoint;
use crate::format::gguf::{Gguf, Metadata, OpenOptions, Value};
use crate::kernels::{self, Kernel};
use crate::quant::block::BlockType;
use crate::quant::packed::Packed;
use crate::threads::{PerProcess, Scope, ThreadPool, resolve_threads};
use crate::tokenizer::{self, Limits, Tokenizer};

/// Makes another checkpoint of one.
type ChangeCheckpoint<'a> = &'a dyn for<'b> Fn(&'b dyn Checkpoint) -> Result<Box<dyn Checkpoint + 'b>>;

/// A model in memory, ready to run. It does not change: any number of sessions and threads may use it.
#[derive(Debug)]
pub struct Model {
    /// Distinguishes the sessions of this model from those of others.
    pub(super) id: u64,
    pub(super) path: PathBuf,
    /// The name in the file, or empty.
    name: String,
    pub(super) transformer: Transformer,
    pub(super) shape: CacheShape,
    context: usize,
    /// Workspaces of passes that are not running.
    workspaces: PerProcess<Mutex<Vec<Workspace>>>,
    /// Computed on first use.
    pub(super) fingerprint: OnceLock<Fingerprint>,
    metadata: Metadata,
    /// Computed on first use.
    limits: OnceLock<Limits>,
    head: LazyHead,
    pub(super) adapters: Adapters,
    /// The stages of a pipeline, which have the layers.
    remote: Option<Remote>,
    /// The experts that are in memory, where that is not all of them.
    pub(super) experts: Option<Arc<ExpertCache>>,
}

/// The head for multi-token prediction, which is loaded on first use.
#[derive(Debug)]
struct LazyHead {
    source: HeadSource,
    /// How the model was loaded.
    options: LoadOptions,
    head: OnceLock<Head>,
    loading: Mutex<()>,
}

/// Where the head comes from.
#[derive(Debug)]
enum HeadSource {
    /// The model has none, or is not to have one.
    None,
    /// This file or folder, an absolute path.
    File(PathBuf),
    /// The files have a part of one, which is not usable for this reason.
    Fault(String),
}

impl Model {
    /// Loads a GGUF file, any of its shards, or a Hugging Face folder with `config.json` and safetensors files.
    ///
    /// # Errors
    /// Those of [`Gguf::open`] and [`HfFolder::open`]; [`Error::Missing`], [`Error::Malformed`] and [`Error::Unsupported`]
    /// for keys and tensors; [`Error::UnknownKernel`] and [`Error::InvalidArgument`] for options; [`Error::OutOfMemory`].
    pub fn load(path: impl AsRef<Path>, options: &LoadOptions) -> Result<Model> {
        Model::load_with(path, options, None)
    }

    /// As [`Model::load`]. `progress` is called with the number of weights packed so far and their total.
    ///
    /// # Errors
    /// Those of [`Model::load`] and of `progress`.
    pub fn load_with(path: impl AsRef<Path>, options: &LoadOptions, progress: Option<Progress<'_>>) -> Result<Model> {
        let model = open(path.as_ref(), options, |checkpoint| {
            Model::with_part(checkpoint, options, progress, |config| Held::whole(config.layers.len()))
        })?;
        if options.mtp == Some(true) {
            model.head()?;
        }
        Ok(model)
    }

    /// As [`Model::load`], of the checkpoint that `change` makes of the one at `path`.
    pub(crate) fn load_changed(path: &Path, options: &LoadOptions, change: ChangeCheckpoint<'_>) -> Result<Model> {
        open(path, options, |checkpoint| {
            let changed = change(checkpoint)?;
            Model::with_part(changed.as_ref(), options, None, |config| Held::whole(config.layers.len()))
        })
    }

    /// Loads the part of a model that `held` chooses by its configuration.
    pub(super) fn with_part(
        checkpoint: &dyn Checkpoint,
        options: &LoadOptions,
        progress: Option<Progress<'_>>,
        held: impl FnOnce(&Config) -> Held,
    ) -> Result<Model> {
        Model::with_weights(checkpoint, options, progress, held, Weights::load_part)
    }

    /// Loads the part of a model that `held` chooses. `load` reads its weights from a loader, for a configuration and a context.
    pub(super) fn with_weights(
        checkpoint: &dyn Checkpoint,
        options: &LoadOptions,
        progress: Option<Progress<'_>>,
        held: impl FnOnce(&Config) -> Held,
        load: impl FnOnce(&Loader<'_>, &Config, usize, &Held) -> Result<Weights>,
    ) -> Result<Model> {
        let kernel = kernels::choose(options.kernel.as_deref())?;
        let pool = ThreadPool::new(resolve_threads(options.threads)?)?;
        let mut config = Config::read(checkpoint)?;
        config.experts.set_skip(options.expert_skip)?;
        let context = config.context_or_default(options.context)?;
        let held = held(&config);
        let needs = |name: &str| held.may_need(name);
        let experts = ExpertCache::new(checkpoint, options, &config, held.layers.clone(), &needs)?;
        let (weights, source) = pool.run(|scope| {
            let measure = |bytes| kernels::tuning::is_sparse_faster(kernel, scope, pool.threads(), bytes);
            let is_faster = |bytes| options.sparse.unwrap_or_else(|| measure(bytes));
            let loader =
                Loader::new(scope, checkpoint, progress, &needs).with_sparse(&is_faster).with_experts(experts.clone());
            let weights = load(&loader, &config, context, &held)?;
            let tune = |cached: &[&Packed]| {
                let present = weights.linears().filter(|layer| !layer.is_hollow()).flat_map(|layer| layer.parts());
                kernels::tuning::tune(kernel, scope, pool.threads(), present.chain(cached.iter().copied()));
            };
            experts.as_ref().inspect(|experts| experts.end_loading());
            experts.as_ref().map_or_else(|| tune(&[]), |experts| experts.with_matrices(tune));
            let source = head_source(scope, checkpoint, &config, options, weights.vocabulary());
            Ok((weights, source))
        })?;
        let default_type = if weights.is_f32() { CacheType::F32 } else { CacheType::F16 };
        static MODELS: AtomicU64 = AtomicU64::new(0);
        Ok(Model {
            id: MODELS.fetch_add(1, Ordering::Relaxed),
            path: checkpoint.path().to_path_buf(),
            name: checkpoint.metadata().get("general.name").and_then(Value::as_str).unwrap_or_default().to_owned(),
            shape: CacheShape::of_part(&config, options.cache_type.unwrap_or(default_type), &held),
            transformer: Transformer {
                handover: Handover::new(&config, weights.per_layer.as_ref().map_or(0, |per_layer| per_layer.width())),
                held,
                positions: Positions::new(&config, context, weights.rope_factors.as_deref()),
                widths: Widths::new(&config, &weights),
                config,
                weights,
                kernel,
                pool,
            },
            context,
            workspaces: PerProcess::default(),
            fingerprint: OnceLock::new(),
            metadata: checkpoint.metadata().clone(),
            limits: OnceLock::new(),
            head: LazyHead { source, options: options.clone(), head: OnceLock::new(), loading: Mutex::default() },
            adapters: Adapters::default(),
            remote: None,
            experts,
        })
    }

    /// The model, which holds nothing, as the driver of stages.
    pub(super) fn driving(self, remote: Remote) -> Model {
        Model { remote: Some(remote), ..self }
    }

    /// The stages of a pipeline.
    pub(super) fn remote(&self) -> Option<&Remote> {
        self.remote.as_ref()
    }

    /// Computes a step: all tokens of all inputs, in batches. Appends the wanted logits to `logits`: a row of
    /// [`vocabulary`](Model::vocabulary) numbers per token, in the order of the inputs; for [`Logits::Hidden`] a row of
    /// [`hidden`](Config::hidden) numbers. All inputs of a step want logits, or all want hidden states.
    ///
    /// The bits of a token's result do not depend on what else is in the step. The result of an input whose keys or values
    /// the cache type does not hold is NaN: see [`Session::check_cache`]. `interrupted` is called between layers; when it
    /// returns true the step ends.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for an unknown token, no tokens, or a session of another model;
    /// [`Error::ContextFull`] when the tokens do not fit; [`Error::OutOfMemory`]; [`Error::Interrupted`]. After an error all
    /// sessions hold the tokens that they held before, and `logits` is as it was.
    pub fn forward(
        &self,
        inputs: &mut [Input<'_>],
        logits: &mut Vec<f32>,
        interrupted: &(dyn Fn() -> bool + Sync),
    ) -> Result<()> {
        self.check_inputs(inputs)?;
        match &self.remote {
            Some(remote) => self.forward_by_stages(remote, inputs, logits, interrupted),
            None => self.compute(inputs, logits, interrupted),
        }
    }

    /// Checks the inputs of a step.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`]
    pub(super) fn check_inputs(&self, inputs: &[Input<'_>]) -> Result<()> {
        let hidden = inputs.first().is_some_and(|input| input.logits == Logits::Hidden);
        for input in inputs.iter() {
            if input.session.model != self.id {
                return Err(Error::argument("session", "a session of another model", "a session of this model"));
            }
            if (input.logits == Logits::Hidden) != hidden {
                return Err(Error::argument("logits", "both logits and hidden states", "one of them per step"));
            }
            self.check_direction(input)?;
            if input.tokens.is_empty() {
                return Err(Error::argument("tokens", "none", "at least one token"));
            }
            input.tokens.iter().try_for_each(|token| self.check_token(*token))?;
        }
        Ok(())
    }

    /// Computes a step whose inputs are checked.
    pub(super) fn compute(
        &self,
        inputs: &mut [Input<'_>],
        logits: &mut Vec<f32>,
        interrupted: &(dyn Fn() -> bool + Sync),
    ) -> Result<()> {
        self.compute_from(inputs, &[], logits, interrupted)
    }

    /// As [`Model::compute`], from the rows that the stage of a pipeline before this one has returned.
    pub(super) fn compute_from(
        &self,
        inputs: &mut [Input<'_>],
        received: &[f32],
        logits: &mut Vec<f32>,
        interrupted: &(dyn Fn() -> bool + Sync),
    ) -> Result<()> {
        let head = self.head.head.get();
        self.with_workspace(|w| self.transformer.step(w, inputs, received, logits, head, interrupted))
    }

    /// Whether the model has a head for multi-token prediction.
    pub fn has_mtp(&self) -> bool {
        matches!(self.head.source, HeadSource::File(_))
    }

    /// Loads the head for multi-token prediction, if it is not loaded.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for a model without a head, and those of [`Model::load`].
    pub(crate) fn load_mtp(&self) -> Result<()> {
        self.head().map(drop)
    }

    /// What loading has left out, a line each.
    pub fn notes(&self) -> Vec<String> {
        match &self.head.source {
            HeadSource::Fault(fault) => vec![format!("without the head for multi-token prediction: {fault}")],
            HeadSource::None | HeadSource::File(_) => Vec::new(),
        }
    }

    /// The head for multi-token prediction, which is loaded on first use.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for a model without a head, and those of [`Model::load`].
    pub(super) fn head(&self) -> Result<&Head> {
        let expected = "a model with a complete head for multi-token prediction";
        let file = match &self.head.source {
            HeadSource::File(file) => file,
            HeadSource::Fault(fault) => {
                return Err(Error::argument(
                    "speculation",
                    format_args!("\"mtp\" for a model without one: {fault}"),
                    expected,
                ));
            }
            HeadSource::None => {
                let found = format!("\"mtp\" for {}, which has none", self.path.display());
                return Err(Error::argument("speculation", found, expected));
            }
        };
        let _loading = self.head.loading.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(head) = self.head.head.get() {
            return Ok(head);
        }
        let head = open(file, &self.head.options, |checkpoint| {
            self.pool().run(|scope| {
                Head::load(&Loader::new(scope, checkpoint, None, &|_| true), self.config(), self.vocabulary())
            })
        })?;
        Ok(self.head.head.get_or_init(|| head))
    }

    /// Checks that a token is in the vocabulary.
    pub(super) fn check_token(&self, token: u32) -> Result<()> {
        if (token as usize) < self.vocabulary() {
            return Ok(());
        }
        Err(Error::argument("token", token, format_args!("an id below {}", self.vocabulary())))
    }

    /// Checks that an input asks for nothing that the model does not have.
    fn check_direction(&self, input: &Input<'_>) -> Result<()> {
        let (config, name) = (self.config(), self.config().family.name);
        if !self.has_logits() && !matches!(input.logits, Logits::None | Logits::Hidden) {
            let found = format_args!("logits of {name}, a model without an output matrix for tokens");
            return Err(Error::argument("logits", found, "hidden states"));
        }
        if !config.causal && !input.session.is_empty() {
            let found = format!("{} tokens, and attention in both directions", input.session.len());
            return Err(Error::argument("session", found, "an empty session, because all tokens see each other"));
        }
        Ok(())
    }

    /// Calls `run` with a workspace that no other pass uses, so that threads that share a model wait only for the thread
    /// pool.
    pub(super) fn with_workspace<R>(&self, run: impl FnOnce(&mut Workspace) -> R) -> R {
        let workspaces = || self.workspaces.get().lock().unwrap_or_else(PoisonError::into_inner);
        let free = workspaces().pop();
        let mut workspace = free.unwrap_or_default();
        let result = run(&mut workspace);
        workspaces().push(workspace);
        result
    }

    /// An empty session, with the adapter that applies to everything if the model has one.
    pub fn session(&self) -> Session {
        let session = Session::new(self.shape.clone(), self.context, self.id);
        mirrored(session.with_adapter(self.adapters.default_adapter()), self.remote.as_ref())
    }

    /// An empty session whose cache has another type than those of the model.
    pub(crate) fn session_in(&self, cache_type: CacheType) -> Session {
        let shape = CacheShape::of(self.config(), cache_type);
        Session::new(shape, self.context, self.id).with_adapter(self.adapters.default_adapter())
    }

    /// The file or folder it was loaded from.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The model's name in the file, or empty.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The keys and values of the file. Of a Hugging Face folder: its configuration under GGUF's keys, without the tokenizer.
    pub fn metadata(&self) -> &Metadata {
        &self.metadata
    }

    /// Loads the model's tokenizer: from the metadata of a GGUF file, which is not opened again, or from the folder.
    ///
    /// # Errors
    /// As for [`Tokenizer::load`].
    pub fn tokenizer(&self) -> Result<Tokenizer> {
        if self.path.is_dir() {
            Tokenizer::load(&self.path)
        } else {
            Tokenizer::from_metadata(&self.metadata, &self.path)
        }
    }

    /// The tokens that end a generation, as the model's files declare them or known by their spelling. Sorted; empty for files
    /// without a tokenizer. Computed on first use.
    ///
    /// # Errors
    /// [`Error::Malformed`] with the key, and those of [`Tokenizer::load`] for a folder.
    pub fn ends(&self) -> Result<&[u32]> {
        Ok(&self.limits()?.ends)
    }

    /// The tokens that end a generation, and the rows that have no token.
    pub(crate) fn limits(&self) -> Result<&Limits> {
        if let Some(limits) = self.limits.get() {
            return Ok(limits);
        }
        let limits = tokenizer::limits(&self.metadata, &self.path, self.vocabulary())?;
        Ok(self.limits.get_or_init(|| limits))
    }

    /// Hyperparameters.
    #[doc(hidden)]
    pub fn config(&self) -> &Config {
        &self.transformer.config
    }

    /// The largest number of tokens in a session.
    pub fn context(&self) -> usize {
        self.context
    }

    /// Logits per token: the rows of the embedding.
    pub fn vocabulary(&self) -> usize {
        self.transformer.weights.vocabulary()
    }

    /// The kernel that computes.
    pub fn kernel(&self) -> &'static Kernel {
        self.transformer.kernel
    }

    /// How sessions of this model store keys and values.
    pub fn cache_type(&self) -> CacheType {
        self.shape.cache_type
    }

    /// Bytes per token of a session, rounded up, before layers with a window free any. Sessions grow by 64 tokens at a time.
    pub fn cache_bytes_per_token(&self) -> usize {
        self.shape.page_bytes().div_ceil(kernels::PAGE)
    }

    /// Bytes of a page of the cache, which holds 64 tokens.
    pub fn cache_bytes_per_page(&self) -> usize {
        self.shape.page_bytes()
    }

    /// Bytes of the recurrent states of a session, whatever its length. 0 for models of attention alone.
    pub fn state_bytes(&self) -> usize {
        self.shape.state_bytes()
    }

    /// The number of threads that compute.
    pub fn threads(&self) -> usize {
        self.transformer.pool.threads()
    }

    /// The thread pool that computes, for measurements.
    #[doc(hidden)]
    pub fn pool(&self) -> &ThreadPool {
        &self.transformer.pool
    }

    /// The number of weights in matrices. A matrix that is used twice counts once.
    pub fn parameters(&self) -> usize {
        self.transformer.weights.parameters()
    }

    /// Bytes of packed weights.
    pub fn weight_bytes(&self) -> usize {
        let experts = self.experts.as_ref().map_or(0, |experts| experts.bytes());
        self.transformer.weights.bytes() + experts + self.head.head.get().map_or(0, Head::bytes)
    }

    /// What passes have chosen of the experts so far.
    #[doc(hidden)]
    pub fn expert_use(&self) -> ExpertUse {
        let [needed, read] = self.experts.as_ref().map_or([0, 0], |experts| experts.counts());
        let layers = self.transformer.weights.layers.iter().filter_map(|layer| layer.ffn.experts());
        let layers = layers.filter(|_| self.config().experts.skip.is_some()).map(|experts| experts.choices());
        let (weight_shares, chosen) = layers.map(|choices| (choices.shares(), choices.experts())).unzip();
        ExpertUse { needed, read, weight_shares, chosen }
    }

    /// Bytes of keys and values of a session that fills the context.
    pub fn cache_bytes(&self) -> usize {
        self.shape.kept_bytes(self.context)
    }

    /// Bytes of packed weights that are read for one decoded token.
    pub fn bytes_per_token(&self) -> usize {
        self.transformer.weights.bytes_read(self.transformer.config.experts.used)
    }
}

/// Opens the checkpoint at `path` and hands it to `act`, with its matrices quantized as `options` say.
pub(super) fn open<R>(path: &Path, options: &LoadOptions, act: impl FnOnce(&dyn Checkpoint) -> Result<R>) -> Result<R> {
    if path.is_dir() {
        let folder = HfFolder::open_with(path, options.mmap)?;
        // In a checkpoint that is in 4 bits already, the matrices that are left were worth more bits.
        let auto = if folder.has_packed_layers() { Quantize::Int8 } else { Quantize::Int4 };
        quantized(&folder, auto, options, act)
    } else {
        let file = Gguf::open_with(path, &OpenOptions { mmap: options.mmap })?;
        quantized(&file, Quantize::Stored, options, act)
    }
}

/// Hands an open checkpoint to `act`. [`Quantize::Auto`] stands for `auto`.
fn quantized<R>(
    checkpoint: &dyn Checkpoint,
    auto: Quantize,
    options: &LoadOptions,
    act: impl FnOnce(&dyn Checkpoint) -> Result<R>,
) -> Result<R> {
    let wanted = match if options.quantize == Quantize::Auto { auto } else { options.quantize } {
        Quantize::Auto | Quantize::Stored => return act(checkpoint),
        Quantize::Int4 => BlockType::Q4_0,
        Quantize::Int8 => BlockType::Q8_0,
    };
    let quantized = Quantized::new(checkpoint, wanted)?;
    let done = act(&quantized)?;
    quantized.finish()?;
    Ok(done)
}

/// Where the head of a model comes from. Names and shapes of its tensors are checked, their weights are not read.
fn head_source(
    scope: &Scope<'_>,
    checkpoint: &dyn Checkpoint,
    config: &Config,
    options: &LoadOptions,
    vocabulary: usize,
) -> HeadSource {
    if options.mtp == Some(false) {
        return HeadSource::None;
    }
    if let Some(fault) = checkpoint.mtp_fault() {
        return HeadSource::Fault(fault.to_owned());
    }
    if config.mtp.is_none() {
        return HeadSource::None;
    }
    let checked = Head::load(&Loader::hollow(scope, checkpoint), config, vocabulary);
    match checked
        .and_then(|_| std::path::absolute(checkpoint.path()).map_err(|error| Error::io(checkpoint.path(), error)))
    {
        Ok(path) => HeadSource::File(path),
        Err(fault) => HeadSource::Fault(fault.to_string()),
    }
}
