//! Models: from a checkpoint to logits.

pub mod arch;
mod attention;
pub mod config;
pub mod convert;
mod experts;
mod fingerprint;
mod forward;
pub mod hf;
mod kv_cache;
mod linear;
pub mod requantize;
mod rope;
mod session_file;
mod weights;

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, OnceLock};

use crate::error::{Error, Result};
use crate::format::Checkpoint;
use crate::format::gguf::{Gguf, OpenOptions, Value};
use crate::kernels::{self, Kernel};
use crate::quant::block::BlockType;
use crate::threads::{ThreadPool, resolve_threads};
use config::Config;
pub(crate) use forward::layerwise;
pub use forward::{Input, Logits};
use hf::HfFolder;
pub use kv_cache::{CacheType, Session, SharedPage};
use requantize::Quantized;
use rope::Rope;
pub use rope::{RopeConfig, Scaling};
pub use weights::Progress;
use weights::{Loader, Weights};

/// What becomes of weights that a checkpoint holds as F32, F16 or BF16.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Quantize {
    /// INT4 for a folder of Hugging Face, as stored for a GGUF file. Where linear layers are in 4 bits already they stay as
    /// they are, and the rest becomes INT8.
    #[default]
    Auto,
    /// Nothing: they are computed as they are stored.
    Stored,
    /// Layers INT4, a scale every 32 weights; embedding and output INT8.
    Int4,
    /// All matrices INT8, a scale every 32 weights.
    Int8,
}

impl Quantize {
    /// The choice called `auto`, `stored`, `int4` or `int8`.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for other names.
    pub fn by_name(name: &str) -> Result<Quantize> {
        Ok(match name {
            "auto" => Quantize::Auto,
            "stored" => Quantize::Stored,
            "int4" => Quantize::Int4,
            "int8" => Quantize::Int8,
            _ => return Err(Error::argument("quantize", format_args!("{name:?}"), "int4, int8, stored or auto")),
        })
    }
}

/// What a caller may choose when a model is loaded.
#[derive(Debug, Clone, Default)]
pub struct LoadOptions {
    /// Name of the kernel; otherwise what `NYBBLE_KERNEL` says, otherwise the best one.
    pub kernel: Option<String>,
    /// Threads; otherwise what `NYBBLE_NUM_THREADS` says, otherwise as many as pay off.
    pub threads: Option<usize>,
    /// Tokens that a session may hold, at most what the model was made for; otherwise that, or what it was trained on
    /// before its rotation was stretched.
    pub context: Option<usize>,
    /// Whether weights that are stored as floats are quantized.
    pub quantize: Quantize,
    /// How keys and values are stored; otherwise F16, or F32 for models whose layers are F32.
    pub cache_type: Option<CacheType>,
    /// Reads files into memory instead of mapping them, so that somebody who shortens or overwrites one meanwhile can neither end
    /// the process nor slip in other weights than were checked. While it loads it takes the size of the files more.
    pub unmapped: bool,
}

/// A model in memory, ready to run. It does not change: any number of sessions and threads may use it.
#[derive(Debug)]
pub struct Model {
    /// Tells the sessions of this model from those of others.
    id: u64,
    path: PathBuf,
    /// What the file calls it, or nothing.
    name: String,
    config: Config,
    weights: Weights,
    /// Angles of ordinary layers and of those with a window.
    ropes: [Rope; 2],
    /// Of a bias by distance `(heads)`, or empty.
    slopes: Vec<f32>,
    shape: kv_cache::Shape,
    context: usize,
    kernel: &'static Kernel,
    pool: ThreadPool,
    widths: forward::Widths,
    /// Buffers of passes that are not running.
    scratch: Mutex<Vec<forward::Scratch>>,
    /// Computed when somebody asks.
    fingerprint: OnceLock<fingerprint::Fingerprint>,
}

impl Model {
    /// Loads a GGUF file, any of its shards, or a folder of Hugging Face with `config.json` and safetensors files.
    ///
    /// # Errors
    /// Those of [`Gguf::open`] and [`HfFolder::open`]; [`Error::Missing`], [`Error::Malformed`] and [`Error::Unsupported`]
    /// for keys and tensors; [`Error::UnknownKernel`] and [`Error::InvalidArgument`] for options; [`Error::OutOfMemory`].
    pub fn load(path: impl AsRef<Path>, options: &LoadOptions) -> Result<Model> {
        Model::load_with(path, options, None)
    }

    /// As [`Model::load`], telling `progress` how many of the weights are packed, and how many there are.
    ///
    /// # Errors
    /// Those of [`Model::load`] and of `progress`.
    pub fn load_with(path: impl AsRef<Path>, options: &LoadOptions, progress: Option<Progress<'_>>) -> Result<Model> {
        let path = path.as_ref();
        if path.is_dir() {
            let folder = HfFolder::open_with(path, !options.unmapped)?;
            // Of a checkpoint that is in 4 bits already, only what was thought worth more is left.
            let usual = if folder.has_packed_layers() { Quantize::Int8 } else { Quantize::Int4 };
            Model::from_checkpoint(&folder, usual, options, progress)
        } else {
            let file = Gguf::open_with(path, &OpenOptions { mmap: !options.unmapped })?;
            Model::from_checkpoint(&file, Quantize::Stored, options, progress)
        }
    }

    /// Loads a model from an open checkpoint, whose floats become what `usual` says unless the options say otherwise.
    fn from_checkpoint(
        checkpoint: &dyn Checkpoint,
        usual: Quantize,
        options: &LoadOptions,
        progress: Option<Progress<'_>>,
    ) -> Result<Model> {
        let wanted = match if options.quantize == Quantize::Auto { usual } else { options.quantize } {
            Quantize::Auto | Quantize::Stored => return Model::pack(checkpoint, options, progress),
            Quantize::Int4 => BlockType::Q4_0,
            Quantize::Int8 => BlockType::Q8_0,
        };
        let quantized = Quantized::new(checkpoint, wanted)?;
        let model = Model::pack(&quantized, options, progress)?;
        quantized.finish()?;
        Ok(model)
    }

    fn pack(checkpoint: &dyn Checkpoint, options: &LoadOptions, progress: Option<Progress<'_>>) -> Result<Model> {
        Model::with_weights(checkpoint, options, progress, Weights::load)
    }

    fn with_weights(
        checkpoint: &dyn Checkpoint,
        options: &LoadOptions,
        progress: Option<Progress<'_>>,
        load: impl FnOnce(&Loader<'_>, &Config, usize) -> Result<Weights>,
    ) -> Result<Model> {
        let kernel = kernels::choose(options.kernel.as_deref())?;
        let pool = ThreadPool::new(resolve_threads(options.threads)?)?;
        let config = Config::read(checkpoint)?;
        let context = options.context.unwrap_or(config.usual_context());
        if context == 0 || context > config.context {
            let expected = format!("1 to {}, for which the model was made", config.context);
            return Err(Error::argument("context", context, expected));
        }
        let weights = pool.run(|scope| load(&Loader::new(scope, checkpoint, progress), &config, context))?;
        let [rope, window_rope] = &config.ropes;
        let ropes = [
            Rope::new(rope, config.rotary, context, weights.rope_factors.as_deref()),
            // Factors of the file are for the layers that see far.
            Rope::new(
                window_rope,
                config.rotary,
                context,
                (rope == window_rope).then_some(weights.rope_factors.as_deref()).flatten(),
            ),
        ];
        let slopes = config.alibi.map_or(Vec::new(), |(max, scale)| attention::slopes(config.heads, max, scale));
        let usual = if weights.is_f32() { CacheType::F32 } else { CacheType::F16 };
        static MODELS: AtomicU64 = AtomicU64::new(0);
        Ok(Model {
            id: MODELS.fetch_add(1, Ordering::Relaxed),
            path: checkpoint.path().to_path_buf(),
            name: checkpoint.metadata().get("general.name").and_then(Value::as_str).unwrap_or_default().to_owned(),
            shape: kv_cache::Shape::of(&config, options.cache_type.unwrap_or(usual)),
            widths: forward::Widths::of(&config, &weights),
            config,
            weights,
            ropes,
            slopes,
            context,
            kernel,
            pool,
            scratch: Mutex::default(),
            fingerprint: OnceLock::new(),
        })
    }

    /// An empty session.
    pub fn session(&self) -> Session {
        Session::new(self.shape, self.context, self.id)
    }

    /// The file or folder it was loaded from.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What the file calls the model; empty if it does not.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Hyper-parameters.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Tokens that a session may hold.
    pub fn context(&self) -> usize {
        self.context
    }

    /// Logits a token: the rows of the embedding.
    pub fn vocabulary(&self) -> usize {
        self.weights.embedding.parts()[0].rows()
    }

    /// The kernel that computes.
    pub fn kernel(&self) -> &'static Kernel {
        self.kernel
    }

    /// How its sessions store keys and values.
    pub fn cache_type(&self) -> CacheType {
        self.shape.cache_type
    }

    /// Bytes of a session for each token, rounded up; sessions grow by 64 tokens at a time.
    pub fn cache_bytes_per_token(&self) -> usize {
        self.shape.page_bytes().div_ceil(kernels::PAGE)
    }

    /// Bytes of a page of the cache, which holds 64 tokens.
    pub fn cache_bytes_per_page(&self) -> usize {
        self.shape.page_bytes()
    }

    /// Threads that compute.
    pub fn threads(&self) -> usize {
        self.pool.threads()
    }

    /// The threads, to measure with.
    pub fn pool(&self) -> &ThreadPool {
        &self.pool
    }

    /// Number of weights in matrices; a matrix that serves twice counts once.
    pub fn parameters(&self) -> usize {
        self.weights.parameters()
    }

    /// Bytes of packed weights.
    pub fn weight_bytes(&self) -> usize {
        self.weights.bytes()
    }

    /// Bytes of keys and values of a session that fills the context; one that holds less takes less.
    pub fn cache_bytes(&self) -> usize {
        self.shape.bytes(self.context).unwrap_or(usize::MAX)
    }

    /// Bytes of packed weights that one decoded token reads.
    pub fn bytes_per_token(&self) -> usize {
        self.weights.bytes_read(self.config.experts.used)
    }
}
