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
    /// Softmax attention whose keys and values are products of one short vector per position (DeepSeek-AI 2024, arXiv
    /// 2405.04434).
    LatentAttention,
    /// A state that every position decays, corrects and reads, with one gate a head (Yang et al. 2024, arXiv 2412.06464).
    GatedDelta,
    /// As [`MixerKind::GatedDelta`], with a gate for each number of a key (Kimi Team 2025, arXiv 2510.26692).
    KimiDelta,
    /// A state for each channel (Gu and Dao 2023, arXiv 2312.00752).
    Mamba,
    /// A state for each head (Dao and Gu 2024, arXiv 2405.21060).
    Mamba2,
    /// Attention and Mamba-2 side by side: both read the input, and their outputs are added (Falcon LLM Team 2025, arXiv
    /// 2507.22448).
    AttentionAndMamba2,
    /// A convolution over a few positions between two gates (Liquid AI 2025, LFM2).
    ShortConvolution,
    /// A mean of values weighted by keys that decay (Peng et al. 2023, arXiv 2305.13048).
    Rwkv,
    /// Nothing: the layer is a feed-forward layer alone.
    None,
}

/// What a layer applies to each position by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum FeedForwardKind {
    /// One network, or, in layers for which the file has a router, experts.
    DenseOrExperts,
    /// A network that reads the position before, too, and has a gate (RWKV).
    ChannelMix,
    /// Nothing: the layer is a mixer alone.
    None,
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

/// Layers of latent attention and a feed-forward network.
const LATENT_ATTENTION: &[LayerKind] =
    &[LayerKind { mixer: MixerKind::LatentAttention, ffn: FeedForwardKind::DenseOrExperts }];

/// Which layers are recurrent instead of attending.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum RecurrentLayers {
    /// All of them, without feed-forward layers.
    Alone,
    /// All of them.
    All,
    /// Those that have no key and value heads.
    WithoutKeys,
    /// Those without key and value heads and without a feed-forward layer: every layer has one branch.
    WithoutKeysOrFeedForward,
    /// Those that `attention.recurrent_layers` lists, or all but every nth of `full_attention_interval`.
    Listed,
}

/// Which layers rotate queries and keys, where the file does not list them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Rotated {
    /// All but every nth; all where it is 0.
    AllBut(usize),
    /// Those with a window; all where no layer has one.
    Windowed,
}

/// How a router turns the logits of experts into weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Gating {
    /// A softmax over all experts.
    Softmax,
    /// The sigmoid of each.
    Sigmoid,
    /// A softmax over those that were chosen.
    SoftmaxOfChosen,
    /// Two experts, each with the softmax over those whose logits come close to its own (Liu et al. 2023, arXiv 2310.00811).
    SparseMixer,
}

/// Queries that grow with the position.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub struct Temperature {
    /// Factor of the logarithm.
    pub scale: f32,
    /// Positions per step.
    pub length: f32,
    /// Added to the position.
    pub offset: f32,
}

/// One model family.
#[derive(Debug)]
#[non_exhaustive]
pub struct Family {
    /// The name under `general.architecture`.
    pub name: &'static str,
    /// The kinds of the layers, repeated until every layer has one, but for recurrent ones.
    pub layers: &'static [LayerKind],
    /// The mixer of recurrent layers, and which layers these are.
    pub recurrent: Option<(MixerKind, RecurrentLayers)>,
    /// Whether consecutive heads of values share a head of keys; otherwise every nth does.
    pub grouped_values: bool,
    /// Whether each head's query is followed by its gate.
    pub gated_queries: bool,
    /// The name of the norm before the output matrix.
    pub output_norm: &'static str,
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
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Quirks {
    /// Embeddings are multiplied with the square root of their width.
    pub scaled_embedding: bool,
    /// Where the file has a sliding window and no pattern: layer `i` has no window when `i % n == n - 1`; every layer has
    /// it when `n` is 0.
    pub window_period: usize,
    /// Base of the rotation in layers with a window, where it differs from that of the others.
    pub window_rope_base: Option<f32>,
    /// Which layers rotate queries and keys.
    pub rotated: Rotated,
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
    /// The layer without a window is the first of a period instead of the last.
    pub full_layer_first: bool,
    /// Layers with a window see the positions of their own chunk instead, of this length.
    pub chunk: Option<usize>,
    /// Dot products of queries and keys are not scaled.
    pub unscaled_attention: bool,
    /// Queries grow with the position: in layers that do not rotate, where the file has no numbers for it.
    pub temperature: Option<Temperature>,
    /// Norms of queries and keys come after the rotation.
    pub norms_after_rotation: bool,
    /// Queries and keys of layers that rotate are normalized without weights, unless the file's `attention.qk_norm` says
    /// otherwise.
    pub unweighted_head_norms: bool,
    /// Values are normalized, head by head and without weights.
    pub value_norm: bool,
    /// The norms before a branch and before the output have no weights.
    pub unweighted_norms: bool,
    /// Embeddings are normalized without weights.
    pub embedding_norm: bool,
    /// Epsilon of the norms after a branch, where it differs from that of the others.
    pub post_norm_eps: Option<f32>,
    /// Epsilon of the norms inside latent attention.
    pub latent_norm_eps: Option<f32>,
    /// The output of attention is multiplied by this function of a gate, if the file has one.
    pub gate: Activation,
    /// How routers weigh experts, where the file does not say it.
    pub gating: Gating,
    /// The best experts whose sum is the score of a group.
    pub group_best: usize,
    /// Weights of experts apply to their input.
    pub weighted_input: bool,
    /// Experts have a gate that is clamped: its factor inside the sigmoid, and the bound.
    pub clamped_gate: Option<(f32, f32)>,
    /// Attention goes in both directions, unless the file's `attention.causal` says otherwise.
    pub bidirectional: bool,
    /// Hidden states do not become logits of tokens.
    pub without_output: bool,
    /// The first layer has no norm before attention, because the embeddings are normalized.
    pub optional_first_norm: bool,
    /// The activation is xIELU, with parameters that the file has.
    pub xielu: bool,
    /// YaRN's ramp does not begin and end at whole dimensions, unless the file's `rope.scaling.yarn_truncate` says otherwise.
    pub untruncated_yarn: bool,
}

/// The choices of most families.
pub(in crate::model) const DEFAULT_QUIRKS: Quirks = Quirks {
    scaled_embedding: false,
    window_period: 0,
    window_rope_base: None,
    rotated: Rotated::AllBut(0),
    soft_caps: None,
    scaled_by_width: None,
    normalized_experts: true,
    optional_output_norm: false,
    divided_logits: false,
    full_layer_first: false,
    chunk: None,
    unscaled_attention: false,
    temperature: None,
    norms_after_rotation: false,
    unweighted_head_norms: false,
    value_norm: false,
    unweighted_norms: false,
    embedding_norm: false,
    post_norm_eps: None,
    latent_norm_eps: None,
    gate: Activation::Sigmoid,
    gating: Gating::Softmax,
    group_best: 2,
    weighted_input: false,
    clamped_gate: None,
    bidirectional: false,
    without_output: false,
    optional_first_norm: false,
    untruncated_yarn: false,
    xielu: false,
};

/// A family with the choices of most: layers of attention and a feed-forward network in sequence, RMS norms, rotary embedding
/// and SiLU. Its methods change that.
pub(super) const fn family(name: &'static str) -> Family {
    Family {
        name,
        layers: ATTENTION,
        recurrent: None,
        grouped_values: true,
        gated_queries: false,
        output_norm: "output_norm",
        norm: NormKind::Rms,
        residual: Residual::Sequential,
        position: Position::Rope,
        activation: Activation::Silu,
        quirks: DEFAULT_QUIRKS,
    }
}

impl Family {
    pub(super) const fn norm(self, norm: NormKind) -> Family {
        Family { norm, ..self }
    }

    pub(super) const fn parallel(self) -> Family {
        Family { residual: Residual::Parallel, ..self }
    }

    pub(super) const fn position(self, position: Position) -> Family {
        Family { position, ..self }
    }

    pub(super) const fn activation(self, activation: Activation) -> Family {
        Family { activation, ..self }
    }

    /// The family with recurrent layers.
    pub(super) const fn recurrent(self, mixer: MixerKind, layers: RecurrentLayers) -> Family {
        Family { recurrent: Some((mixer, layers)), ..self }
    }

    /// The family with layers of latent attention.
    pub(super) const fn latent(self) -> Family {
        Family { layers: LATENT_ATTENTION, ..self }
    }

    pub(super) const fn quirks(self, quirks: Quirks) -> Family {
        Family { quirks, ..self }
    }

    /// The kind of layer `index`, unless it is recurrent.
    pub fn layer(&self, index: usize) -> LayerKind {
        self.layers[index % self.layers.len()]
    }
}
