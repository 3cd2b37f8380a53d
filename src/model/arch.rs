//! The families as data: what differs between them is a handful of choices.

use crate::kernels::Activation;

/// How a layer normalizes its input.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NormKind {
    /// Root mean square: scale only.
    Rms,
    /// Mean and variance, with or without a bias.
    Layer,
}

/// Where the residual stream joins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Residual {
    /// `x += attention(norm(x)); x += ffn(norm(x))`
    Sequential,
    /// `x += attention(norm(x)) + ffn(norm(x))`, with one norm or two; a key of the file may say sequential instead.
    Parallel,
}

/// How positions enter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Position {
    /// Rotary embedding of queries and keys.
    Rope {
        /// Whether the file's q and k rows are ordered for pairs `(2i, 2i + 1)` instead of `(i, i + n / 2)`. They are put
        /// into the second order while they are packed, so that there is one rotation.
        adjacent: bool,
    },
    /// A bias that grows with the distance, a slope a head.
    Alibi,
    /// A learned vector a position, added to the embedding.
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
    /// Activation of the feed-forward layer; gated where the layer has a gate.
    pub activation: Activation,
}

/// Every family that is supported.
pub const FAMILIES: &[Family] = &[
    // Touvron et al. 2023, arXiv 2302.13971 and 2307.09288; also Mistral, SmolLM, TinyLlama, Yi and many others.
    Family {
        name: "llama",
        norm: NormKind::Rms,
        residual: Residual::Sequential,
        position: Position::Rope { adjacent: true },
        activation: Activation::Silu,
    },
];

/// The family of that name.
pub fn by_name(name: &str) -> Option<&'static Family> {
    FAMILIES.iter().find(|family| family.name == name)
}
