//! The choices that families differ in.
//!
//! They do not repeat what the file itself determines: its tensors show whether there is a gate, a bias, a norm of queries
//! and keys, a norm after a branch or a table of positions, and its keys hold the numbers (scales, caps, windows).

use crate::kernels::Activation;

/// How a layer normalizes its input.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum NormKind {
    /// Root mean square: scale only.
    Rms,
    /// Mean and variance, with or without a bias.
    Layer,
}

/// What the two branches of a layer read, unless the file's `use_parallel_residual` says otherwise.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Residual {
    /// `x += mixer(norm(x)); x += ffn(norm(x))`
    Sequential,
    /// `x += mixer(norm(x)) + ffn(norm(x))`, with one norm or two.
    Parallel,
}

/// How positions are encoded, unless the file has a table of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Position {
    /// Rotary embedding of queries and keys, pairs `(i, i + n / 2)`.
    Rope,
    /// Rotary embedding, with the file's query and key rows ordered for pairs `(2i, 2i + 1)`. Packing reorders them, so
    /// that there is one rotation.
    RopeAdjacent,
    /// A bias that grows with the distance, with a slope per head (Press et al. 2021, arXiv 2108.12409).
    Alibi,
    /// Not at all, or by a learned vector per position that the file holds.
    Learned,
}

/// How a layer exchanges information between positions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum MixerKind {
    /// Softmax attention over keys and values.
    Attention,
}

/// What a layer applies to each position by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum FeedForwardKind {
    /// One network, or, in layers for which the file has a router, experts.
    DenseOrExperts,
}

/// The two halves of a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct LayerKind {
    /// The first half.
    pub mixer: MixerKind,
    /// The second half.
    pub ffn: FeedForwardKind,
}

/// Layers of attention and a feed-forward network.
const ATTENTION: &[LayerKind] = &[LayerKind { mixer: MixerKind::Attention, ffn: FeedForwardKind::DenseOrExperts }];

/// One model family.
#[derive(Debug)]
#[non_exhaustive]
pub struct Family {
    /// The name under `general.architecture`.
    pub name: &'static str,
    /// The kinds of the layers, repeated until every layer has one.
    pub layers: &'static [LayerKind],
    /// Norm of every layer.
    pub norm: NormKind,
    /// What the two branches of a layer read.
    pub residual: Residual,
    /// How positions are encoded.
    pub position: Position,
    /// Activation of the feed-forward layer.
    pub activation: Activation,
    /// Choices that few families change.
    pub quirks: Quirks,
}

/// Choices that few families change.
#[derive(Debug)]
#[non_exhaustive]
pub struct Quirks {
    /// Embeddings are multiplied with the square root of their width.
    pub scaled_embedding: bool,
    /// Where the file has a sliding window and no pattern: layer `i` has no window when `i % n == n - 1`; every layer has
    /// it when `n` is 0.
    pub window_period: usize,
    /// Base of the rotation in layers with a window, where it differs from that of the others.
    pub window_rope_base: Option<f32>,
    /// Every n-th layer rotates nothing, unless the file lists them; 0 for none.
    pub unrotated_period: usize,
    /// Soft caps of attention scores and of logits where the file has none.
    pub soft_caps: Option<(f32, f32)>,
    /// Number of layers of the one size whose attention is scaled by `hidden / heads` instead of the head's width.
    pub scaled_by_width: Option<usize>,
    /// Weights of the chosen experts are divided by their sum.
    pub normalized_experts: bool,
    /// The norm before the output matrix may be missing.
    pub optional_output_norm: bool,
    /// Logits are divided by the file's `logit_scale` instead of multiplied.
    pub divided_logits: bool,
}

/// The choices of most families.
pub(super) const DEFAULT_QUIRKS: Quirks = Quirks {
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

/// A family of layers of attention and a feed-forward network.
pub(super) const fn family(
    name: &'static str,
    norm: NormKind,
    residual: Residual,
    position: Position,
    activation: Activation,
    quirks: Quirks,
) -> Family {
    Family { name, layers: ATTENTION, norm, residual, position, activation, quirks }
}

impl Family {
    /// The kind of layer `index`.
    pub fn layer(&self, index: usize) -> LayerKind {
        self.layers[index % self.layers.len()]
    }
}
