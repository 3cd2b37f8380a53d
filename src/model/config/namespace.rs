//! The keys of a family's namespace in GGUF: those that are read, those without influence on the result, and those with one
//! supported value. Any other is refused, because a model with it computes something else.

use super::metadata::MetadataReader;
use crate::error::Result;
use crate::format::gguf::Value;

/// Keys that `Config::read` reads.
pub(in crate::model) const READ: &[&str] = &[
    "activation_sparsity_scale",
    "altup.active_idx",
    "altup.num_inputs",
    "attention.alibi_scale",
    "attention.causal",
    "attention.chunk_length",
    "attention.clamp_kqv",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.key_length_swa",
    "attention.layer_norm_epsilon",
    "attention.layer_norm_rms_epsilon",
    "attention.max_alibi_bias",
    "attention.post_norm_epsilon",
    "attention.qk_norm",
    "attention.rope_pattern",
    "attention.scale",
    "attention.shared_kv_layers",
    "attention.sliding_window",
    "attention.sliding_window_pattern",
    "attention.temperature_length",
    "attention.temperature_scale",
    "attention.value_length",
    "attention.value_length_swa",
    "attn_logit_softcapping",
    "block_count",
    "classifier.activation",
    "classifier.output_labels",
    "classifier.pooling_type",
    "context_length",
    "embedding_length",
    "embedding_scale",
    "expert_count",
    "expert_gate_alpha",
    "expert_gate_limit",
    "expert_gating_func",
    "expert_group_best",
    "expert_group_count",
    "expert_group_used_count",
    "expert_jitter",
    "expert_used_count",
    "expert_weights_norm",
    "expert_weights_scale",
    "final_logit_softcapping",
    "generates",
    "hidden_activation",
    "logit_scale",
    "moe_latent_size",
    "norm_top_k_prob",
    "output_norm_epsilon",
    "pooling_type",
    "residual_scale",
    "rope.dimension_count",
    "rope.dimension_count_swa",
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
    "rope.scaling.yarn_log_multiplier",
    "rope.scaling.yarn_truncate",
    "router_logit_softcapping",
    "use_parallel_residual",
];

/// Keys that `Config::read` reads for models of latent attention.
pub(in crate::model) const READ_LATENT: &[&str] =
    &["attention.key_length_mla", "attention.kv_lora_rank", "attention.q_lora_rank", "attention.value_length_mla"];

/// Keys that `Config::read` reads for models with recurrent layers.
pub(in crate::model) const READ_RECURRENT: &[&str] = &[
    "attention.recurrent_layers",
    "full_attention_interval",
    "kda.head_dim",
    "rescale_every",
    "shortconv.l_cache",
    "ssm.beta_scale",
    "ssm.conv_kernel",
    "ssm.dt_b_c_rms",
    "ssm.dt_b_c_rms_epsilon",
    "ssm.group_count",
    "ssm.inner_size",
    "ssm.norm_before_gate",
    "ssm.norm_epsilon",
    "ssm.state_size",
    "ssm.time_step_max",
    "ssm.time_step_min",
    "ssm.time_step_rank",
];

/// Keys that `Config::read` reads for families with heads for multi-token prediction.
pub(in crate::model) const READ_MTP: &[&str] = &["nextn_predict_layers"];

/// Keys of dense modules after `dense_` and a number. Tensors have the sizes.
pub(in crate::model) const READ_DENSE: &[&str] = &["activation", "feat_in", "feat_out"];

/// Keys without influence on the result. One that ends with a dot stands for all that begin with it.
pub(in crate::model) const WITHOUT_INFLUENCE: &[&str] = &[
    // Tensors have these sizes.
    "embedding_length_out",
    "embedding_length_per_layer_input",
    "expert_feed_forward_length",
    "expert_shared_count",
    "expert_shared_feed_forward_length",
    "feed_forward_length",
    "interleave_moe_layer_step",
    "leading_dense_block_count",
    "vocab_size",
    // Notes about the file.
    "rope.scaling.finetuned",
    "tensor_data_layout",
    // Parts that text does not pass through.
    "audio.",
    "mm.",
    "projector.",
    "vision.",
    // For text, the sections of a rotation have the same positions.
    "rope.dimension_sections",
    "rope.mrope_section",
];

/// Keys that are not computed, and the values that mean the same as no key.
pub(in crate::model) const NEUTRAL: &[(&str, &[f64])] = &[
    ("attention.output_scale", &[0.0, 1.0]),
    ("nextn_predict_layers", &[0.0]),
    ("rope.freq_scale", &[1.0]),
    ("rope.scaling.alpha", &[0.0]),
    ("rope.scaling.yarn_ext_factor", &[1.0, -1.0]),
];

/// Checks that no key of the family has a meaning that is not computed, in a model with latent attention, recurrent layers, or a head for
/// multi-token prediction.
///
/// # Errors
/// [`Error::Unsupported`](crate::Error::Unsupported) with the key.
pub(in crate::model) fn check(keys: &MetadataReader<'_>, [latent, recurrent, mtp]: [bool; 3]) -> Result<()> {
    for (key, value) in keys.own() {
        let ignored = |known: &&str| known.strip_suffix('.').map_or(*known == key, |_| key.starts_with(*known));
        let dense = key.strip_prefix("dense_").and_then(|rest| rest.split_once('_'));
        if dense.is_some_and(|(number, rest)| number.parse::<usize>().is_ok() && READ_DENSE.contains(&rest)) {
            continue;
        }
        let read = [(true, READ), (latent, READ_LATENT), (recurrent, READ_RECURRENT), (mtp, READ_MTP)];
        if read.iter().any(|(is_read, list)| *is_read && list.contains(&key)) || WITHOUT_INFLUENCE.iter().any(ignored) {
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
