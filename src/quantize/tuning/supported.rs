//! The models that can be tuned.

use super::backprop::{MATRICES, NORMS};
use super::weights::BIASES;
use crate::format::Checkpoint;
use crate::kernels::Activation;
use crate::model::arch::{NormKind, Position};
use crate::model::config::{Config, LayerConfig};

/// Checks that a checkpoint consists of plain decoder blocks. The error names what differs.
pub(in crate::quantize) fn supports(checkpoint: &dyn Checkpoint, config: &Config) -> std::result::Result<(), String> {
    let known = |name: &str| match name.strip_prefix("blk.").and_then(|rest| rest.split_once('.')) {
        Some((_, part)) => {
            let weight = part.strip_suffix(".weight");
            weight.is_some_and(|stem| MATRICES.contains(&stem) || NORMS.contains(&stem)) || BIASES.contains(&part)
        }
        None => matches!(name, "token_embd.weight" | "output_norm.weight" | "output.weight" | "rope_freqs.weight"),
    };
    if let Some(name) = checkpoint.names().into_iter().find(|name| !known(name)) {
        return Err(format!("the tensor {name}"));
    }
    let matrices = config.layers.len() * (MATRICES.len() + NORMS.len());
    let blocks = checkpoint.names().into_iter().filter(|name| name.starts_with("blk.") && name.ends_with(".weight"));
    let is_usual = |layer: &LayerConfig| {
        (layer.heads, layer.kv_heads, layer.head_dim) == (config.heads, config.kv_heads, config.head_dim)
            && (layer.value_dim, layer.rotary, layer.chunk) == (config.head_dim, config.rotary, None)
            && layer.rotated
            && layer.shares.is_none()
            && !layer.tempered
    };
    let quirks = &config.family.quirks;
    let is_plain = config.family.norm == NormKind::Rms
        && matches!(config.family.position, Position::Rope | Position::RopeAdjacent)
        && config.activation == Activation::Silu
        && !config.parallel
        && config.alibi.is_none()
        && config.clamp_qkv.is_none()
        && config.attention_cap.is_none()
        && config.logit_cap.is_none()
        && (config.embedding_scale, config.residual_scale, config.logit_scale) == (1.0, 1.0, 1.0)
        && config.layers.iter().all(is_usual)
        && !(quirks.norms_after_rotation || quirks.unweighted_norms || quirks.embedding_norm || quirks.value_norm)
        && config.xielu.is_empty()
        && config.clamped_gate.is_none()
        && config.ropes[0] == config.ropes[1]
        && blocks.count() == matrices;
    if is_plain { Ok(()) } else { Err(format!("a model of the family {}", config.family.name)) }
}
