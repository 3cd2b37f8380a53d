//! The keys of a family's namespace in GGUF: those that are read, those without influence on the result, and those with one
//! supported value. Any other is refused, because a model with it computes something else.

use super::metadata::MetadataReader;
use crate::error::Result;
use crate::format::gguf::Value;

/// Keys that `Config::read` reads.
pub(super) const READ: &[&str] = &[
    "attention.alibi_scale",
    "attention.clamp_kqv",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.layer_norm_epsilon",
    "attention.layer_norm_rms_epsilon",
    "attention.max_alibi_bias",
    "attention.rope_pattern",
    "attention.scale",
    "attention.sliding_window",
    "attention.sliding_window_pattern",
    "attention.value_length",
    "attn_logit_softcapping",
    "block_count",
    "context_length",
    "embedding_length",
    "embedding_scale",
    "expert_count",
    "expert_gating_func",
    "expert_used_count",
    "expert_weights_norm",
    "expert_weights_scale",
    "final_logit_softcapping",
    "hidden_activation",
    "logit_scale",
    "norm_top_k_prob",
    "pooling_type",
    "residual_scale",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.freq_base_swa",
    "rope.global.freq_base",
    "rope.local.freq_base",
    "rope.scale_linear",
    "rope.scaling.attn_factor",
    "rope.scaling.dynamic_factor",
    "rope.scaling.extended_context_length",
    "rope.scaling.factor",
    "rope.scaling.original_context_length",
    "rope.scaling.type",
    "rope.scaling.yarn_attn_factor",
    "rope.scaling.yarn_beta_fast",
    "rope.scaling.yarn_beta_slow",
    "use_parallel_residual",
];

/// Keys without influence on the result. One that ends with a dot stands for all that begin with it.
pub(super) const WITHOUT_INFLUENCE: &[&str] = &[
    // Tensors have these sizes.
    "embedding_length_out",
    "expert_feed_forward_length",
    "expert_shared_count",
    "expert_shared_feed_forward_length",
    "feed_forward_length",
    "leading_dense_block_count",
    "vocab_size",
    // Notes about the file.
    "rope.scaling.finetuned",
    "tensor_data_layout",
    // Parts that text does not pass through.
    "audio.",
    "classifier.output_labels",
    "classifier.output_labels.",
    "mm.",
    "projector.",
    "vision.",
    // For text, the sections of a rotation have the same positions.
    "rope.dimension_sections",
    "rope.mrope_section",
];

/// Keys that are not computed, and the values that mean the same as no key.
pub(super) const NEUTRAL: &[(&str, &[f64])] = &[
    ("attention.causal", &[1.0]),
    ("attention.output_scale", &[0.0, 1.0]),
    ("attention.shared_kv_layers", &[0.0]),
    ("attention.temperature_length", &[0.0]),
    ("attention.temperature_scale", &[0.0]),
    ("expert_group_count", &[0.0, 1.0]),
    ("expert_group_used_count", &[0.0, 1.0]),
    ("nextn_predict_layers", &[0.0]),
    ("rope.freq_scale", &[1.0]),
    ("rope.scaling.alpha", &[0.0]),
    ("rope.scaling.yarn_ext_factor", &[1.0, -1.0]),
    ("rope.scaling.yarn_log_multiplier", &[0.0]),
    ("router_logit_softcapping", &[0.0]),
];

/// Keys that repeat another one, and that one. Another value is not computed.
pub(super) const REPEATED: &[(&str, &str)] = &[
    ("attention.key_length_swa", "attention.key_length"),
    ("attention.value_length_swa", "attention.value_length"),
    ("rope.dimension_count_swa", "rope.dimension_count"),
];

/// Checks that no key of the family has a meaning that is not computed.
///
/// # Errors
/// [`Error::Unsupported`](crate::Error::Unsupported) with the key.
pub(super) fn check(keys: &MetadataReader<'_>) -> Result<()> {
    for (key, value) in keys.own() {
        let ignored = |known: &&str| known.strip_suffix('.').map_or(*known == key, |_| key.starts_with(*known));
        if READ.contains(&key) || WITHOUT_INFLUENCE.iter().any(ignored) {
            continue;
        }
        if let Some((_, neutral)) = NEUTRAL.iter().find(|known| known.0 == key) {
            if !number(value).is_some_and(|found| neutral.contains(&found)) {
                let listed: Vec<String> = neutral.iter().map(f64::to_string).collect();
                let supported = match value {
                    Value::Bool(_) => format!("supported: {}", neutral.contains(&1.0)),
                    _ => format!("supported: {}", listed.join(", ")),
                };
                return Err(keys.unsupported(key, value, &supported));
            }
            continue;
        }
        if let Some((_, other)) = REPEATED.iter().find(|known| known.0 == key)
            && keys.get(other).and_then(Value::as_u64) == value.as_u64()
            && value.as_u64().is_some()
        {
            continue;
        }
        return Err(keys.unsupported(
            key,
            value,
            "supported: files without this key, whose meaning nybble does not compute",
        ));
    }
    Ok(())
}

/// A number or a boolean as a number.
fn number(value: &Value) -> Option<f64> {
    let integer = value.as_bool().map(i64::from).or(value.as_i64());
    integer.map(|number| number as f64).or(value.as_f32().map(f64::from))
}
