//! Models: from a checkpoint to logits.

pub mod arch;
mod attention;
pub mod config;
pub mod convert;
mod forward;
pub mod hf;
mod kv_cache;
mod linear;
pub mod requantize;
mod rope;
mod weights;

use std::path::{Path, PathBuf};
use std::sync::Mutex;

use crate::error::{Error, Result};
use crate::format::Checkpoint;
use crate::format::gguf::Gguf;
use crate::kernels::{self, Kernel};
use crate::threads::{Team, resolve_threads};
use config::Config;
pub use forward::{Input, Logits};
pub use kv_cache::Session;
pub use rope::{Rope, Scaling};
pub use weights::Progress;
use weights::Weights;

/// What a caller may choose when a model is loaded.
#[derive(Debug, Clone, Default)]
pub struct LoadOptions {
    /// Name of the kernel; otherwise what `NYBBLE_KERNEL` says, otherwise the best one.
    pub kernel: Option<String>,
    /// Threads; otherwise what `NYBBLE_NUM_THREADS` says, otherwise as many as pay off.
    pub threads: Option<usize>,
    /// Tokens that a session may hold, at most what the model was made for; otherwise that.
    pub context: Option<usize>,
}

/// A model in memory, ready to run. It does not change: any number of sessions and threads may use it.
#[derive(Debug)]
pub struct Model {
    path: PathBuf,
    config: Config,
    weights: Weights,
    rope: Option<Rope>,
    shape: kv_cache::Shape,
    context: usize,
    kernel: &'static dyn Kernel,
    team: Team,
    /// Buffers of passes that are not running.
    scratch: Mutex<Vec<forward::Scratch>>,
}

impl Model {
    /// Loads a GGUF file, or the first of its shards.
    ///
    /// # Errors
    /// Those of [`Gguf::open`]; [`Error::Missing`], [`Error::Malformed`] and [`Error::Unsupported`] for keys and tensors;
    /// [`Error::UnknownKernel`] and [`Error::InvalidArgument`] for options; [`Error::OutOfMemory`].
    pub fn load(path: impl AsRef<Path>, options: &LoadOptions) -> Result<Model> {
        Model::from_checkpoint(&Gguf::open(path)?, options, None)
    }

    /// Loads a model from an open checkpoint, telling `progress` how far it is.
    ///
    /// # Errors
    /// Those of [`Model::load`].
    pub fn from_checkpoint(
        checkpoint: &dyn Checkpoint,
        options: &LoadOptions,
        progress: Option<Progress<'_>>,
    ) -> Result<Model> {
        let kernel = kernels::choose(options.kernel.as_deref())?;
        let team = Team::new(resolve_threads(options.threads)?)?;
        let config = Config::read(checkpoint)?;
        let context = options.context.unwrap_or(config.context);
        if context == 0 || context > config.context {
            let expected = format!("1 to {}, for which the model was made", config.context);
            return Err(Error::argument("context", context, expected));
        }
        let weights = team.run(|scope| Weights::load(scope, checkpoint, &config, progress))?;
        let rope = matches!(config.family.position, arch::Position::Rope { .. })
            .then(|| Rope::new(config.rotary, config.rope_base, config.rope_scaling, weights.rope_factors.as_deref()));
        Ok(Model {
            path: checkpoint.path().to_path_buf(),
            shape: kv_cache::Shape::of(&config),
            config,
            weights,
            rope,
            context,
            kernel,
            team,
            scratch: Mutex::default(),
        })
    }

    /// An empty session.
    pub fn session(&self) -> Session {
        Session::new(self.shape, self.context)
    }

    /// The file or folder it was loaded from.
    pub fn path(&self) -> &Path {
        &self.path
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
    pub fn kernel(&self) -> &'static dyn Kernel {
        self.kernel
    }

    /// Threads that compute.
    pub fn threads(&self) -> usize {
        self.team.threads()
    }

    /// The threads, to measure with.
    pub fn team(&self) -> &Team {
        &self.team
    }

    /// Number of weights in matrices; a matrix that serves twice counts once.
    pub fn parameters(&self) -> usize {
        self.weights.parameters()
    }

    /// Bytes of packed weights.
    pub fn weight_bytes(&self) -> usize {
        self.weights.bytes().0
    }

    /// Bytes of packed weights that one decoded token reads.
    pub fn bytes_per_token(&self) -> usize {
        self.weights.bytes().1
    }
}
