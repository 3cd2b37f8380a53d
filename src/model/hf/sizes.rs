//! The sizes of a model, and the dimensions of tensors in terms of them.

use super::settings::Settings;
use crate::error::Result;

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
    /// Width between up and down of the feed-forward layer.
    pub(super) ffn: usize,
    /// The longest context that the model was made for.
    pub(super) context: usize,
    pub(super) experts: usize,
    pub(super) expert_ffn: usize,
    pub(super) shared_ffn: usize,
    /// `(layers)`: whether a layer has experts. Empty where all layers have them, or none.
    pub(super) sparse: Vec<bool>,
}

impl Sizes {
    /// Reads the sizes under the names that families have for them. `adjust` corrects those that the family defines
    /// differently.
    pub(super) fn read(settings: &Settings, adjust: fn(&Settings, &mut Sizes) -> Result<()>) -> Result<Sizes> {
        let heads = settings.count(&["num_attention_heads", "n_head", "n_heads"])?;
        let hidden = settings.count(&["hidden_size", "n_embd", "d_model", "n_embed"])?;
        let optional = |keys: &[&str]| settings.optional_count(keys).map(Option::unwrap_or_default);
        let mut sizes = Sizes {
            layers: settings.count(&["num_hidden_layers", "n_layer", "n_layers"])?,
            vocabulary: settings.count(&["vocab_size"])?,
            hidden,
            embedding: hidden,
            heads,
            kv_heads: settings.optional_count(&["num_key_value_heads"])?.unwrap_or(heads),
            head_dim: optional(&["head_dim"])?,
            rotary: 0,
            ffn: optional(&["intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size"])?,
            context: optional(&["max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length"])?,
            experts: optional(&["num_local_experts", "num_experts"])?,
            expert_ffn: optional(&["moe_intermediate_size"])?,
            shared_ffn: optional(&["shared_expert_intermediate_size"])?,
            sparse: Vec::new(),
        };
        if sizes.head_dim == 0 {
            if !hidden.is_multiple_of(heads) {
                let expected = format!("a divisor of the hidden size {hidden}");
                return Err(settings.malformed("num_attention_heads", heads, expected));
            }
            sizes.head_dim = hidden / heads;
        }
        adjust(settings, &mut sizes)?;
        if !heads.is_multiple_of(sizes.kv_heads) {
            let expected = format!("a divisor of the {heads} heads");
            return Err(settings.malformed("num_key_value_heads", sizes.kv_heads, expected));
        }
        if sizes.experts > 0 && sizes.expert_ffn == 0 {
            return Err(settings.missing("moe_intermediate_size", "an integer"));
        }
        for (size, key) in [(sizes.ffn, "intermediate_size"), (sizes.context, "max_position_embeddings")] {
            if size == 0 {
                return Err(settings.missing(key, "an integer"));
            }
        }
        Ok(sizes)
    }

    /// Rows of all query heads together.
    pub(super) fn queries(&self) -> usize {
        self.heads * self.head_dim
    }

    /// Rows of all key heads together, or of all value heads.
    pub(super) fn keys(&self) -> usize {
        self.kv_heads * self.head_dim
    }

    /// Whether `layer` has experts.
    pub(super) fn is_sparse(&self, layer: usize) -> bool {
        self.experts > 0 && self.sparse.get(layer).copied().unwrap_or(true)
    }
}

/// One dimension of a tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Size {
    Vocabulary,
    Hidden,
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
    SharedFfn,
}

impl Size {
    pub(super) fn of(self, sizes: &Sizes) -> usize {
        match self {
            Size::Vocabulary => sizes.vocabulary,
            Size::Hidden => sizes.hidden,
            Size::Embedding => sizes.embedding,
            Size::Context => sizes.context,
            Size::Queries => sizes.queries(),
            Size::Keys => sizes.keys(),
            Size::QueriesKeysValues => sizes.queries() + 2 * sizes.keys(),
            Size::HeadDim => sizes.head_dim,
            Size::Heads => sizes.heads,
            Size::KvHeads => sizes.kv_heads,
            Size::Ffn => sizes.ffn,
            Size::TwiceFfn => 2 * sizes.ffn,
            Size::Experts => sizes.experts,
            Size::ExpertFfn => sizes.expert_ffn,
            Size::SharedFfn => sizes.shared_ffn,
        }
    }

    /// The dimensions `[columns, rows, ...]` of the weight that GGUF calls `name`, in families whose entry has no others.
    pub(super) fn named(name: &str) -> &'static [Size] {
        use Size::*;
        match name {
            "token_embd" | "output" => &[Embedding, Vocabulary],
            "token_embd_proj" => &[Embedding, Hidden],
            "output_proj" => &[Hidden, Embedding],
            "position_embd" => &[Hidden, Context],
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
            // The norms, and the gate of the shared expert.
            _ => &[Hidden],
        }
    }
}
