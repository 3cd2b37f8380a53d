//! The families as data: what differs between them is a handful of choices.
//!
//! What a file shows by itself is not repeated here: whether there is a gate, a bias, a norm on queries and keys, a norm
//! after a layer or a table of positions is seen from the tensors, and numbers (scales, caps, windows) from the keys.

use crate::kernels::Activation;

/// How a layer normalizes its input.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NormKind {
    /// Root mean square: scale only.
    Rms,
    /// Mean and variance, with or without a bias.
    Layer,
}

/// Where the residual stream joins, unless the file's `use_parallel_residual` says otherwise.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Residual {
    /// `x += attention(norm(x)); x += ffn(norm(x))`
    Sequential,
    /// `x += attention(norm(x)) + ffn(norm(x))`, with one norm or two.
    Parallel,
}

/// How positions enter, unless the file has a table of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Position {
    /// Rotary embedding of queries and keys, pairs `(i, i + n / 2)`.
    Rope,
    /// Rotary embedding, the file's q and k rows ordered for pairs `(2i, 2i + 1)`. They are put into the other order while
    /// they are packed, so that there is one rotation.
    RopeAdjacent,
    /// A bias that grows with the distance, a slope a head (Press et al. 2021, arXiv 2108.12409).
    Alibi,
    /// Not at all, or by a learned vector a position that the file brings.
    Learned,
}

/// One model family.
#[derive(Debug)]
pub struct Family {
    /// The name under `general.architecture`.
    pub name: &'static str,
    /// Norm of every layer.
    pub norm: NormKind,
    /// Where the residual stream joins.
    pub residual: Residual,
    /// How positions enter.
    pub position: Position,
    /// Activation of the feed-forward layer.
    pub activation: Activation,
    /// The rest, which few families change.
    pub more: Quirks,
}

/// Choices that few families make otherwise.
#[derive(Debug)]
pub struct Quirks {
    /// Embeddings are multiplied with the root of their width.
    pub scaled_embedding: bool,
    /// Where the file names a sliding window and no pattern: layer `i` sees everything when `i % n == n - 1`, and every
    /// layer has the window when `n` is 0.
    pub window_period: usize,
    /// Base of the rotation in layers with a window, where it is another than that of the others.
    pub window_rope_base: Option<f32>,
    /// Every n-th layer rotates nothing, unless the file lists them; 0 for none.
    pub unrotated_period: usize,
    /// Bounds of attention scores and logits where the file names none.
    pub soft_caps: Option<(f32, f32)>,
    /// Number of layers of the one size whose attention is scaled by the width over the heads instead of the head's width.
    pub scaled_by_width: Option<usize>,
    /// Weights of the chosen experts are divided by their sum.
    pub normalized_experts: bool,
    /// There may be no norm before the output matrix.
    pub optional_output_norm: bool,
    /// Logits are divided by the file's `logit_scale` instead of multiplied.
    pub divided_logits: bool,
}

/// What most families do.
const DEFAULT_QUIRKS: Quirks = Quirks {
    scaled_embedding: false,
    window_period: 0,
    window_rope_base: None,
    unrotated_period: 0,
    soft_caps: None,
    scaled_by_width: None,
    normalized_experts: true,
    optional_output_norm: false,
    divided_logits: false,
};

use Activation::{Gelu, GeluTanh, Relu, Silu};
use NormKind::{Layer, Rms};
use Position::{Alibi, Learned, Rope, RopeAdjacent};
use Residual::{Parallel, Sequential};

const fn family(
    name: &'static str,
    norm: NormKind,
    residual: Residual,
    position: Position,
    activation: Activation,
    more: Quirks,
) -> Family {
    Family { name, norm, residual, position, activation, more }
}

/// Every family that is supported.
pub const FAMILIES: &[Family] = &[
    // Touvron et al. 2023, arXiv 2302.13971 and 2307.09288; also Mistral, Mixtral, SmolLM, TinyLlama, Yi.
    family("llama", Rms, Sequential, RopeAdjacent, Silu, DEFAULT_QUIRKS),
    // Black et al. 2022, arXiv 2204.06745; Pythia, Dolly, StableLM-alpha.
    family("gptneox", Layer, Parallel, Rope, Gelu, DEFAULT_QUIRKS),
    // Wang and Komatsuzaki 2021.
    family("gptj", Layer, Parallel, RopeAdjacent, GeluTanh, DEFAULT_QUIRKS),
    family("mpt", Layer, Sequential, Alibi, Gelu, DEFAULT_QUIRKS),
    // Almazrouei et al. 2023, arXiv 2311.16867.
    family("falcon", Layer, Parallel, Rope, Gelu, DEFAULT_QUIRKS),
    // Li et al. 2023, arXiv 2305.06161: gpt_bigcode.
    family("starcoder", Layer, Sequential, Learned, GeluTanh, DEFAULT_QUIRKS),
    // Lozhkov et al. 2024, arXiv 2402.19173.
    family("starcoder2", Layer, Sequential, Rope, GeluTanh, DEFAULT_QUIRKS),
    family("gpt2", Layer, Sequential, Learned, GeluTanh, DEFAULT_QUIRKS),
    // Zhang et al. 2022, arXiv 2205.01068.
    family("opt", Layer, Sequential, Learned, Relu, Quirks { optional_output_norm: true, ..DEFAULT_QUIRKS }),
    // Scao et al. 2022, arXiv 2211.05100.
    family("bloom", Layer, Sequential, Alibi, GeluTanh, DEFAULT_QUIRKS),
    family("qwen2", Rms, Sequential, Rope, Silu, DEFAULT_QUIRKS),
    family("qwen2moe", Rms, Sequential, Rope, Silu, Quirks { normalized_experts: false, ..DEFAULT_QUIRKS }),
    family("qwen3", Rms, Sequential, Rope, Silu, DEFAULT_QUIRKS),
    family("qwen3moe", Rms, Sequential, Rope, Silu, DEFAULT_QUIRKS),
    family("gemma", Rms, Sequential, Rope, GeluTanh, Quirks { scaled_embedding: true, ..DEFAULT_QUIRKS }),
    // arXiv 2408.00118.
    family(
        "gemma2",
        Rms,
        Sequential,
        Rope,
        GeluTanh,
        Quirks {
            scaled_embedding: true,
            window_period: 2,
            soft_caps: Some((50.0, 30.0)),
            scaled_by_width: Some(46),
            ..DEFAULT_QUIRKS
        },
    ),
    // arXiv 2503.19786.
    family(
        "gemma3",
        Rms,
        Sequential,
        Rope,
        GeluTanh,
        Quirks {
            scaled_embedding: true,
            window_period: 6,
            window_rope_base: Some(10000.0),
            scaled_by_width: Some(62),
            ..DEFAULT_QUIRKS
        },
    ),
    family("phi2", Layer, Parallel, Rope, GeluTanh, DEFAULT_QUIRKS),
    family("phi3", Rms, Sequential, Rope, Silu, DEFAULT_QUIRKS),
    family("stablelm", Layer, Sequential, Rope, Silu, DEFAULT_QUIRKS),
    family("olmo2", Rms, Sequential, Rope, Silu, DEFAULT_QUIRKS),
    family("granite", Rms, Sequential, RopeAdjacent, Silu, Quirks { divided_logits: true, ..DEFAULT_QUIRKS }),
    family("smollm3", Rms, Sequential, RopeAdjacent, Silu, Quirks { unrotated_period: 4, ..DEFAULT_QUIRKS }),
];

/// The family of that name.
pub fn by_name(name: &str) -> Option<&'static Family> {
    FAMILIES.iter().find(|family| family.name == name)
}
