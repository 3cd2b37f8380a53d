//! Entries that several families share.

use crate::error::Result;
use crate::model::hf::entry::{Entry, Need, Transform, tensor};
use crate::model::hf::metadata::MetadataWriter;
use crate::model::hf::settings::Settings;
use crate::model::hf::sizes::Sizes;

/// The embedding, the last norm, and the output where it is not tied to the embedding.
pub(super) const EMBEDDING: &[Entry] = &[
    tensor("token_embd", "~embed_tokens"),
    tensor("output_norm", "~norm"),
    tensor("output", "lm_head").when(Need::Untied),
];

/// As [`EMBEDDING`], with a bias of the last norm.
pub(super) const EMBEDDING_WITH_BIAS: &[Entry] = &[
    tensor("token_embd", "~embed_tokens"),
    tensor("output_norm", "~norm").bias(Need::Always),
    tensor("output", "lm_head").when(Need::Untied),
];

/// The norms before attention and before the feed-forward layer.
pub(super) const NORMS: &[Entry] =
    &[tensor("attn_norm", "input_layernorm"), tensor("ffn_norm", "post_attention_layernorm")];

/// Query, key, value and output projection, with the order of the query and key rows and the need for biases.
pub(super) const fn attention(rows: Transform, qkv: Need, output: Need) -> [Entry; 4] {
    [
        tensor("attn_q", "self_attn.q_proj").by(rows).bias(qkv),
        tensor("attn_k", "self_attn.k_proj").by(rows).bias(qkv),
        tensor("attn_v", "self_attn.v_proj").bias(qkv),
        tensor("attn_output", "self_attn.o_proj").bias(output),
    ]
}

/// Norms of the queries and keys of each head.
pub(super) const fn head_norms(transform: Transform) -> [Entry; 2] {
    [tensor("attn_q_norm", "self_attn.q_norm").by(transform), tensor("attn_k_norm", "self_attn.k_norm").by(transform)]
}

/// A feed-forward layer with a gate.
pub(super) const fn gated(need: Need, bias: Need) -> [Entry; 3] {
    [
        tensor("ffn_gate", "mlp.gate_proj").when(need).bias(bias),
        tensor("ffn_up", "mlp.up_proj").when(need).bias(bias),
        tensor("ffn_down", "mlp.down_proj").when(need).bias(bias),
    ]
}

/// Writes whether attention and feed-forward layer share their input, `default` where the configuration does not say it.
pub(super) fn parallel_residual(keys: &mut MetadataWriter<'_>, default: bool) -> Result<()> {
    let parallel = keys.settings.switch("use_parallel_residual", default)?;
    keys.set("use_parallel_residual", parallel);
    Ok(())
}

/// Makes the feed-forward layer four times as wide as the model where the configuration has no width.
pub(super) fn four_times(_: &Settings, sizes: &mut Sizes) -> Result<()> {
    if sizes.ffn == 0 {
        sizes.ffn = 4 * sizes.hidden;
    }
    Ok(())
}
