//! The sizes of a model, and the dimensions of tensors in terms of them.

use serde_json::Value;

use super::heads;
use super::settings::Settings;
use crate::error::Result;

/// The largest number of layers, more than any known model has.
const MAX_LAYERS: usize = 1024;

/// The sizes of a model, each 1 to 2^24, or 0 where the family does not have it.
#[derive(Debug, Clone)]
pub(super) struct Sizes {
    pub(super) layers: usize,
    pub(super) vocabulary: usize,
    /// Width of the residual stream.
    pub(super) hidden: usize,
    /// Width of the embedding.
    pub(super) embedding: usize,
    pub(super) heads: usize,
    /// Key and value heads, a divisor of `heads`.
    pub(super) kv_heads: usize,
    pub(super) head_dim: usize,
    /// Dimensions of a head that are rotated; even, and 0 without rotary embedding.
    pub(super) rotary: usize,
    /// As `head_dim` and `rotary`, in layers with a window; 0 where they do not differ.
    pub(super) window_head_dim: usize,
    pub(super) window_rotary: usize,
    /// Width between up and down of the feed-forward layer.
    pub(super) ffn: usize,
    /// `(layers)`: as the configuration lists it, or empty.
    pub(super) ffn_list: Vec<usize>,
    /// The longest context that the model was made for.
    pub(super) context: usize,
    pub(super) experts: usize,
    pub(super) expert_ffn: usize,
    pub(super) shared_ffn: usize,
    /// `(layers)`: whether a layer has experts. Empty where all layers have them, or none.
    pub(super) sparse: Vec<bool>,
    /// `(layers)`: sizes that differ between layers. Empty where they do not.
    pub(super) per_layer: Vec<LayerSizes>,
    /// The widths of latent attention; 0 where the family does not have it.
    pub(super) latent: LatentSizes,
    /// Width of the vector that each layer has of a token.
    pub(super) per_layer_input: usize,
    /// Tokens that have such vectors of their own. The others have those of the first.
    pub(super) input_vocabulary: usize,
    /// Whether pairs of the rotated part of latent attention are neighbors already.
    pub(super) interleaved: bool,
    /// Layers at the end that take keys and values from others.
    pub(super) shared_kv_layers: usize,
    /// Rank of the low-rank branch that joins attention.
    pub(super) low_rank: usize,
    /// Residual streams.
    pub(super) streams: usize,
    /// Vectors that tell a first text from a second one.
    pub(super) token_types: usize,
    /// Rows of the table of positions that belong to padding.
    pub(super) padding: usize,
    /// Labels of a classification head.
    pub(super) labels: usize,
    /// Width of a projection of the embedding.
    pub(super) projected: usize,
    /// Tokens that stand for other inputs than text; none where they are beyond the vocabulary.
    pub(super) placeholders: [usize; 2],
    /// `(layers)`: what a layer consists of. Empty where all layers attend.
    pub(super) kinds: Vec<LayerKind>,
    /// The sizes of recurrent layers.
    pub(super) recurrent: RecurrentSizes,
    /// Width of the vector that experts work on, where it is not that of the residual stream; otherwise 0.
    pub(super) expert_latent: usize,
}

/// How a layer mixes positions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum LayerKind {
    Attention,
    /// With a state.
    Recurrent,
    /// By both, side by side.
    Both,
    /// Not at all: it is a feed-forward layer.
    FeedForward,
}

/// The sizes of recurrent layers; 0 where the family does not have them.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct RecurrentSizes {
    /// Positions that a convolution sees.
    pub(super) kernel: usize,
    /// Width of all heads, or of the mixed vector.
    pub(super) inner: usize,
    /// Numbers of the state for each of them: in a delta rule the width of a key.
    pub(super) state: usize,
    /// Heads, or the rank of time steps in Mamba-1.
    pub(super) heads: usize,
    /// Groups of heads that share what is written and read: in a delta rule the heads of keys.
    pub(super) groups: usize,
}

impl RecurrentSizes {
    /// Numbers of a head.
    pub(super) fn head_width(&self) -> usize {
        self.inner.checked_div(self.heads).unwrap_or(0)
    }

    /// Channels of the convolution: those of all heads, and what is written and read.
    pub(super) fn channels(&self) -> usize {
        self.inner + 2 * self.groups * self.state
    }
}

/// The sizes of a layer that may differ between layers.
#[derive(Debug, Clone, Copy)]
pub(super) struct LayerSizes {
    pub(super) heads: usize,
    pub(super) kv_heads: usize,
    pub(super) head_dim: usize,
    pub(super) ffn: usize,
    /// Whether values are copies of keys.
    pub(super) keys_are_values: bool,
}

/// The widths of latent attention.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct LatentSizes {
    /// 0 where queries come from the input.
    pub(super) q_rank: usize,
    pub(super) kv_rank: usize,
    /// A head's part that is not rotated, and the one that is.
    pub(super) plain: usize,
    pub(super) rope: usize,
    pub(super) value: usize,
}

impl Sizes {
    /// Reads the sizes under the names that families have for them. `adjust` corrects those that the family defines
    /// differently.
    pub(super) fn read(
        settings: &Settings,
        attends: bool,
        adjust: fn(&Settings, &mut Sizes) -> Result<()>,
    ) -> Result<Sizes> {
        let heads = if attends { settings.count(&["num_attention_heads", "n_head", "n_heads"])? } else { 0 };
        let hidden = settings.count(&["hidden_size", "n_embd", "d_model", "n_embed", "dim"])?;
        let optional = |keys: &[&str]| settings.optional_count(keys).map(Option::unwrap_or_default);
        let mut sizes = Sizes {
            layers: layers(settings)?,
            vocabulary: settings.count(&["vocab_size"])?,
            hidden,
            embedding: hidden,
            heads,
            kv_heads: if attends { optional(&["num_key_value_heads"])? } else { 0 },
            head_dim: if attends { optional(&["head_dim"])? } else { 0 },
            rotary: 0,
            window_head_dim: 0,
            window_rotary: 0,
            ffn: 0,
            ffn_list: Vec::new(),
            context: optional(&["max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length"])?,
            experts: settings.number(&["num_local_experts", "num_experts", "n_routed_experts"])?,
            expert_ffn: optional(&["moe_intermediate_size"])?,
            shared_ffn: optional(&["shared_expert_intermediate_size"])?,
            sparse: Vec::new(),
            per_layer: Vec::new(),
            latent: LatentSizes::default(),
            per_layer_input: 0,
            input_vocabulary: 0,
            interleaved: true,
            shared_kv_layers: 0,
            low_rank: 0,
            streams: 0,
            token_types: 0,
            padding: 0,
            labels: heads::labels(settings)?.len(),
            projected: 0,
            placeholders: [usize::MAX; 2],
            kinds: Vec::new(),
            recurrent: RecurrentSizes::default(),
            expert_latent: 0,
        };
        if sizes.kv_heads == 0 {
            sizes.kv_heads = heads;
        }
        // Heads of latent attention have widths of their own.
        const FFN: &[&str] = &["intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size", "hidden_dim"];
        match settings.find(FFN) {
            Some((key, Value::Array(_))) => {
                let count = |size: &Value| size.as_u64().filter(|size| (1..=1 << 24).contains(size));
                let expected = "an integer from 1 to 16777216";
                let list =
                    settings.per_layer(key, sizes.layers, expected, |size| count(size).map(|size| size as usize))?;
                sizes.ffn_list = list.unwrap_or_default();
                sizes.ffn = sizes.ffn_list.first().copied().unwrap_or_default();
            }
            _ => sizes.ffn = optional(FFN)?,
        }
        if attends && sizes.head_dim == 0 && settings.get("kv_lora_rank").is_some() {
            sizes.head_dim = hidden / heads;
        }
        if attends && sizes.head_dim == 0 {
            if !hidden.is_multiple_of(heads) {
                let expected = format!("a divisor of the hidden size {hidden}");
                return Err(settings.malformed("num_attention_heads", heads, expected));
            }
            sizes.head_dim = hidden / heads;
        }
        adjust(settings, &mut sizes)?;
        if sizes.per_layer.is_empty() && sizes.ffn_list.windows(2).any(|pair| pair[0] != pair[1]) {
            let (what, supported) = ("sizes that differ between layers", "supported: the same in every layer");
            return Err(settings.unsupported("intermediate_size", what, supported));
        }
        if attends && !heads.is_multiple_of(sizes.kv_heads) {
            let expected = format!("a divisor of the {heads} heads");
            return Err(settings.malformed("num_key_value_heads", sizes.kv_heads, expected));
        }
        if sizes.experts > 0 && sizes.expert_ffn == 0 {
            return Err(settings.missing("moe_intermediate_size", "an integer"));
        }
        for (size, key) in [(sizes.ffn, "intermediate_size"), (sizes.context, "max_position_embeddings")] {
            if attends && size == 0 {
                return Err(settings.missing(key, "an integer"));
            }
        }
        Ok(sizes)
    }

    /// The sizes of a layer; those of the model outside of layers.
    pub(super) fn of_layer(&self, layer: Option<usize>) -> LayerSizes {
        let uniform = LayerSizes {
            heads: self.heads,
            kv_heads: self.kv_heads,
            head_dim: self.head_dim,
            ffn: self.ffn,
            keys_are_values: false,
        };
        layer.and_then(|layer| self.per_layer.get(layer)).copied().unwrap_or(uniform)
    }

    /// Sets the sizes of the layers, which must fit together in each.
    pub(super) fn set_layers(&mut self, settings: &Settings, layers: impl Iterator<Item = LayerSizes>) -> Result<()> {
        self.per_layer = layers.collect();
        for (index, layer) in self.per_layer.iter().enumerate() {
            if layer.kv_heads > 0 && !layer.heads.is_multiple_of(layer.kv_heads) {
                let found = format_args!("{} key and value heads in layer {index}", layer.kv_heads);
                let expected = format_args!("a divisor of its {} heads", layer.heads);
                return Err(settings.malformed("num_key_value_heads", found, expected));
            }
        }
        Ok(())
    }

    /// Sets what the layers consist of. Those that do not attend have no keys and values.
    pub(super) fn set_kinds(&mut self, settings: &Settings, kinds: Vec<LayerKind>) -> Result<()> {
        let (uniform, ffn) = (self.of_layer(None), self.ffn);
        let is_alone = kinds.contains(&LayerKind::FeedForward);
        let layers = kinds.iter().map(|kind| LayerSizes {
            kv_heads: if *kind == LayerKind::Attention { uniform.kv_heads } else { 0 },
            ffn: if *kind == LayerKind::FeedForward || !is_alone { ffn } else { 0 },
            ..uniform
        });
        self.set_layers(settings, layers)?;
        self.kinds = kinds;
        Ok(())
    }

    /// What `layer` consists of.
    pub(super) fn kind(&self, layer: usize) -> LayerKind {
        self.kinds.get(layer).copied().unwrap_or(LayerKind::Attention)
    }

    /// Whether `layer` has experts.
    pub(super) fn is_sparse(&self, layer: usize) -> bool {
        self.experts > 0 && self.sparse.get(layer).copied().unwrap_or(true)
    }
}

/// The number of layers. Where the configuration does not have it, it lists them.
fn layers(settings: &Settings) -> Result<usize> {
    const KEYS: &[&str] = &["num_hidden_layers", "n_layer", "n_layers"];
    const LISTS: &[&str] = &["layers_block_type", "hybrid_override_pattern"];
    let listed = match settings.find(LISTS).filter(|_| settings.find(KEYS).is_none()) {
        Some((_, Value::Array(list))) => list.len(),
        Some((_, Value::String(letters))) => letters.len(),
        _ => 0,
    };
    let layers = if listed > 0 { listed } else { settings.count(KEYS)? };
    if layers > MAX_LAYERS {
        return Err(settings.malformed(KEYS[0], layers, format_args!("at most {MAX_LAYERS}")));
    }
    Ok(layers)
}

/// One dimension of a tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Size {
    One,
    Vocabulary,
    Hidden,
    /// An embedding and a state side by side.
    TwiceHidden,
    Embedding,
    Context,
    Queries,
    Keys,
    /// Queries, keys and values one after the other.
    QueriesKeysValues,
    HeadDim,
    Heads,
    KvHeads,
    Ffn,
    /// Gate and up one after the other.
    TwiceFfn,
    Experts,
    ExpertFfn,
    /// Gate and up of an expert one after the other.
    TwiceExpertFfn,
    SharedFfn,
    /// Gate and up of the shared expert one after the other.
    TwiceSharedFfn,
    /// The vector that queries are a product of.
    QRank,
    /// The vector that keys and values are products of.
    KvRank,
    /// That vector and the rotated part of keys.
    KvRankAndRope,
    /// The part of a head that is not rotated.
    Plain,
    /// The value of a head of latent attention.
    LatentValue,
    /// Those of all heads.
    LatentValues,
    /// Queries of all heads of latent attention.
    LatentQueries,
    /// The vector of a token for one layer, and those for all.
    LayerInput,
    LayerInputs,
    LowRank,
    Streams,
    /// Streams but the first.
    OtherStreams,
    /// The square of the streams.
    StreamPairs,
    TokenTypes,
    Labels,
    Projected,
    /// Queries and their gates.
    TwiceQueries,
    /// The mixed vector, and it twice: with its gate.
    Inner,
    TwiceInner,
    /// What Mamba-2 makes of its input: gates, channels of the convolution, and time steps.
    MixerInput,
    Channels,
    Kernel,
    State,
    RecurrentHeads,
    TwiceRecurrentHeads,
    /// Numbers of a head, and of a group of heads.
    RecurrentHead,
    GroupWidth,
    Groups,
    /// Time steps of a low rank, what is written and what is read.
    RankAndStates,
    ThreeHidden,
    ExpertLatent,
    /// The vector that experts read.
    ExpertInput,
}

impl Size {
    pub(super) fn of(self, sizes: &Sizes, layer: Option<usize>) -> usize {
        let own = sizes.of_layer(layer);
        let (latent, recurrent) = (sizes.latent, sizes.recurrent);
        let (queries, keys) = (own.heads * own.head_dim, own.kv_heads * own.head_dim);
        match self {
            Size::One => 1,
            Size::Vocabulary => sizes.vocabulary,
            Size::Hidden => sizes.hidden,
            Size::TwiceHidden => 2 * sizes.hidden,
            Size::Embedding => sizes.embedding,
            Size::Context => sizes.context,
            Size::Queries => queries,
            Size::Keys => keys,
            Size::QueriesKeysValues => queries + 2 * keys,
            Size::HeadDim => own.head_dim,
            Size::Heads => own.heads,
            Size::KvHeads => own.kv_heads,
            Size::Ffn => own.ffn,
            Size::TwiceFfn => 2 * own.ffn,
            Size::Experts => sizes.experts,
            Size::ExpertFfn => sizes.expert_ffn,
            Size::TwiceExpertFfn => 2 * sizes.expert_ffn,
            Size::SharedFfn => sizes.shared_ffn,
            Size::TwiceSharedFfn => 2 * sizes.shared_ffn,
            Size::QRank => latent.q_rank,
            Size::KvRank => latent.kv_rank,
            Size::KvRankAndRope => latent.kv_rank + latent.rope,
            Size::Plain => latent.plain,
            Size::LatentValue => latent.value,
            Size::LatentValues => own.heads * latent.value,
            Size::LatentQueries => own.heads * (latent.plain + latent.rope),
            Size::LayerInput => sizes.per_layer_input,
            Size::LayerInputs => sizes.layers * sizes.per_layer_input,
            Size::LowRank => sizes.low_rank,
            Size::Streams => sizes.streams,
            Size::OtherStreams => sizes.streams.saturating_sub(1),
            Size::StreamPairs => sizes.streams * sizes.streams,
            Size::TokenTypes => sizes.token_types,
            Size::Labels => sizes.labels,
            Size::Projected => sizes.projected,
            Size::TwiceQueries => 2 * queries,
            Size::Inner => recurrent.inner,
            Size::TwiceInner => 2 * recurrent.inner,
            Size::MixerInput => recurrent.inner + recurrent.channels() + recurrent.heads,
            Size::Channels => recurrent.channels(),
            Size::Kernel => recurrent.kernel,
            Size::State => recurrent.state,
            Size::RecurrentHeads => recurrent.heads,
            Size::TwiceRecurrentHeads => 2 * recurrent.heads,
            Size::RecurrentHead => recurrent.head_width(),
            Size::GroupWidth => recurrent.inner.checked_div(recurrent.groups).unwrap_or(0),
            Size::Groups => recurrent.groups,
            Size::RankAndStates => recurrent.heads + 2 * recurrent.state,
            Size::ThreeHidden => 3 * sizes.hidden,
            Size::ExpertLatent => sizes.expert_latent,
            Size::ExpertInput if sizes.expert_latent > 0 => sizes.expert_latent,
            Size::ExpertInput => sizes.hidden,
        }
    }

    /// The dimensions `[columns, rows, ...]` of the weight that GGUF calls `name`, in families whose entry has no others.
    pub(super) fn named(name: &str) -> &'static [Size] {
        use Size::*;
        match name {
            "token_embd" | "output" | "nextn.embed_tokens" | "nextn.shared_head_head" => &[Embedding, Vocabulary],
            "token_embd_proj" => &[Embedding, Hidden],
            "output_proj" => &[Hidden, Embedding],
            "position_embd" => &[Hidden, Context],
            "token_types" => &[Hidden, TokenTypes],
            "cls" => &[Hidden, Hidden],
            "cls.output" => &[Hidden, Labels],
            "dense_2" => &[Hidden, Projected],
            "attn_q" => &[Hidden, Queries],
            "attn_k" | "attn_v" => &[Hidden, Keys],
            "attn_qkv" => &[Hidden, QueriesKeysValues],
            "attn_output" => &[Queries, Hidden],
            "attn_q_norm" | "attn_k_norm" => &[HeadDim],
            "ffn_gate" | "ffn_up" => &[Hidden, Ffn],
            "ffn_down" => &[Ffn, Hidden],
            "ffn_gate_inp" => &[Hidden, Experts],
            "ffn_gate_exps" | "ffn_up_exps" => &[Hidden, ExpertFfn, Experts],
            "ffn_down_exps" => &[ExpertFfn, Hidden, Experts],
            "ffn_gate_shexp" | "ffn_up_shexp" => &[Hidden, SharedFfn],
            "ffn_down_shexp" => &[SharedFfn, Hidden],
            "ffn_gate_up_exps" => &[Hidden, TwiceExpertFfn, Experts],
            "exp_probs_b" => &[Experts],
            "attn_sinks" => &[Heads],
            "attn_gate" => &[Hidden, Queries],
            "attn_sub_norm" => &[Queries],
            "ffn_sub_norm" => &[Ffn],
            "layer_output_scale" => &[One],
            "attn_q_a" => &[Hidden, QRank],
            "attn_q_a_norm" => &[QRank],
            "attn_q_b" => &[QRank, LatentQueries],
            "attn_kv_a_mqa" => &[Hidden, KvRankAndRope],
            "attn_kv_a_norm" => &[KvRank],
            "attn_k_b" => &[Plain, KvRank, Heads],
            "attn_v_b" => &[KvRank, LatentValue, Heads],
            "per_layer_token_embd" => &[LayerInputs, Vocabulary],
            "per_layer_model_proj" => &[Hidden, LayerInputs],
            "per_layer_proj_norm" => &[LayerInput],
            "inp_gate" => &[Hidden, LayerInput],
            "proj" => &[LayerInput, Hidden],
            "altup_proj" | "altup_unembd_proj" => &[Hidden, Hidden, OtherStreams],
            "altup_router" => &[Hidden, Streams],
            "altup_predict_coef" => &[Streams, StreamPairs],
            "altup_correct_coef" => &[Streams, Streams],
            "laurel_l" => &[Hidden, LowRank],
            "laurel_r" => &[LowRank, Hidden],
            // The norms, and the gate of the shared expert.
            _ => &[Hidden],
        }
    }
}
