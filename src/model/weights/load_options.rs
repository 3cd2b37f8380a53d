//! Options of loading a model.

use crate::error::{Error, Result};
use crate::model::state::cache::CacheType;

/// How F32, F16 and BF16 weights of a checkpoint are quantized while loading.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Quantize {
    /// [`Quantize::Int4`] for a Hugging Face folder, [`Quantize::Stored`] for a GGUF file. In a folder whose linear
    /// layers are in 4 bits already, those stay as they are and the rest becomes INT8.
    #[default]
    Auto,
    /// Keep them as stored.
    Stored,
    /// Layers INT4 with a scale per 32 weights; embedding and output INT8.
    Int4,
    /// All matrices INT8 with a scale per 32 weights.
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

/// How much memory the experts of a model may take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum ExpertMemory {
    /// All experts are in memory if the model fits into the memory that is free. Otherwise they take three quarters of what
    /// the other weights leave.
    Auto,
    /// At most this many bytes.
    Bytes(usize),
}

/// Options of loading a model.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct LoadOptions {
    /// Name of the kernel. Default: that of `NYBBLE_KERNEL`, otherwise the fastest.
    pub kernel: Option<String>,
    /// Number of threads. Default: that of `NYBBLE_NUM_THREADS`, otherwise one per physical core.
    pub threads: Option<usize>,
    /// The largest number of tokens in a session, at most the context that the model was made for. Default: that context,
    /// or the context in training if a longer one changes the results of short prompts.
    pub context: Option<usize>,
    /// How weights that are stored as floats are quantized.
    pub quantize: Quantize,
    /// How keys and values are stored. Default: F16, or F32 for models whose layers are F32.
    pub cache_type: Option<CacheType>,
    /// Whether the head for multi-token prediction is loaded with the model. `None` loads it when speculation first needs it,
    /// from the same file; with `false` there is none. Default: `None`.
    pub mtp: Option<bool>,
    /// A limit of the memory for the experts of a GGUF file. Those that do not fit are read from the file when a token chooses them,
    /// which must not change while the model is used. Results do not depend on it. Default: none.
    #[doc(hidden)]
    pub expert_memory: Option<ExpertMemory>,
    /// Leaves out the experts of a token whose weights are less than this share of the largest one's, from 0 to 1. That is
    /// faster and changes results. Default: none are left out.
    pub expert_skip: Option<f32>,
    /// Whether the zeros of matrices with many are left out, for tests. Default: where that is measured to be faster.
    #[doc(hidden)]
    pub sparse: Option<bool>,
    /// Maps files instead of reading them into memory. Without it, loading takes memory for the files as well, and is safe if
    /// a file changes while it loads. Default: true.
    pub mmap: bool,
}

impl Default for LoadOptions {
    fn default() -> LoadOptions {
        LoadOptions {
            kernel: None,
            threads: None,
            context: None,
            quantize: Quantize::Auto,
            cache_type: None,
            mtp: None,
            expert_memory: None,
            expert_skip: None,
            sparse: None,
            mmap: true,
        }
    }
}

impl LoadOptions {
    /// Limits the memory for the experts of a GGUF file to this many bytes. Those that do not fit are read from the file when a token
    /// chooses them, which must not change while the model is used. Results do not depend on it. Default: no limit.
    #[must_use]
    pub fn with_expert_memory(mut self, bytes: usize) -> Self {
        self.expert_memory = Some(ExpertMemory::Bytes(bytes));
        self
    }

    /// As [`with_expert_memory`](Self::with_expert_memory), with three quarters of what the other weights leave of the free memory, if
    /// the model does not fit into it.
    #[must_use]
    pub fn with_free_memory_for_experts(mut self) -> Self {
        self.expert_memory = Some(ExpertMemory::Auto);
        self
    }
}

setters!(LoadOptions {
    with_kernel(kernel: impl Into<Option<String>>),
    with_threads(threads: impl Into<Option<usize>>),
    with_context(context: impl Into<Option<usize>>),
    with_quantize(quantize: Quantize),
    with_cache_type(cache_type: impl Into<Option<CacheType>>),
    with_mtp(mtp: impl Into<Option<bool>>),
    with_expert_skip(expert_skip: impl Into<Option<f32>>),
    with_mmap(mmap: bool),
});
