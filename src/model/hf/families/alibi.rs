//! Families with ALiBi (Press et al. 2021, arXiv 2108.12409), or whose first models had it.

use super::family::{ActivationSource, HfFamily, Rotation};
use super::gpt::GPT2;
use super::parts::{biased, named_embedding};
use crate::error::Result;
use crate::model::hf::entry::{Need, Transform, tensor};
use crate::model::hf::settings::Settings;
use Need::{Always, If, IfSo, Optional};
use Transform::Ungroup;

/// The exponent of ALiBi's slopes: they are powers of 2 to the minus this.
const MAX_BIAS: f32 = 8.0;

/// BigScience 2022, arXiv 2211.05100.
pub(super) const BLOOM: HfFamily = HfFamily {
    model_types: &["bloom"],
    architecture: "bloom",
    defaults: &[&[("seq_length", "2048")]],
    outside: &[&[
        tensor("token_embd", "~word_embeddings"),
        tensor("token_embd_norm", "~word_embeddings_layernorm").bias(Always),
        tensor("output_norm", "~ln_f").bias(Always),
        tensor("output", "lm_head").when(Need::Untied),
    ]],
    layer: &[&[
        tensor("attn_norm", "input_layernorm").bias(Always),
        tensor("attn_qkv", "self_attention.query_key_value").by(Ungroup).bias(Always),
        tensor("attn_output", "self_attention.dense").bias(Always),
        tensor("ffn_norm", "post_attention_layernorm").bias(Always),
        tensor("ffn_up", "mlp.dense_h_to_4h").bias(Always),
        tensor("ffn_down", "mlp.dense_4h_to_h").bias(Always),
    ]],
    activation: ActivationSource::Is("gelu_tanh"),
    adjust: |_, sizes| {
        (sizes.kv_heads, sizes.ffn) = (sizes.heads, 4 * sizes.hidden);
        Ok(())
    },
    keys: |keys| {
        keys.set("attention.max_alibi_bias", MAX_BIAS);
        keys.require("apply_residual_connection_post_layernorm", false)
    },
    ..GPT2
};

/// Almazrouei et al. 2023, arXiv 2311.16867. The RW models have ALiBi.
pub(super) const FALCON: HfFamily = HfFamily {
    model_types: &["falcon", "RefinedWeb", "RefinedWebModel"],
    architecture: "falcon",
    defaults: &[&[("new_decoder_architecture", "null")]],
    outside: &[&named_embedding("~word_embeddings", "~ln_f", tensor("output", "lm_head"))],
    layer: &[&[
        tensor("attn_norm", "input_layernorm").both(IfSo(one_norm)),
        tensor("attn_norm", "ln_mlp").both(IfSo(two_norms)),
        tensor("attn_norm_2", "ln_attn").both(IfSo(two_norms)),
        tensor("ffn_norm", "post_attention_layernorm").both(IfSo(serial)),
        tensor("attn_qkv", "self_attention.query_key_value").by(Ungroup).bias(If("bias")),
        tensor("attn_output", "self_attention.dense").bias(If("bias")),
        tensor("ffn_up", "mlp.dense_h_to_4h").bias(If("bias")),
        tensor("ffn_down", "mlp.dense_4h_to_h").bias(If("bias")),
    ]],
    activation: ActivationSource::Under(&["activation"]),
    rotation: Rotation::Unless("alibi"),
    adjust: |settings, sizes| {
        sizes.kv_heads = if is_new(settings)? {
            settings.optional_count(&["num_kv_heads", "n_head_kv"])?.unwrap_or(sizes.heads)
        } else if settings.switch("multi_query", true)? {
            1
        } else {
            sizes.heads
        };
        sizes.ffn = settings.optional_count(&["ffn_hidden_size"])?.unwrap_or(4 * sizes.hidden);
        Ok(())
    },
    keys: |keys| {
        keys.set("tensor_data_layout", "jploski");
        let serial = serial(keys.settings)?;
        keys.set("use_parallel_residual", !serial);
        if keys.settings.switch("alibi", false)? {
            keys.set("attention.max_alibi_bias", MAX_BIAS);
            // Unlike other families it adds the bias before it scales the scores.
            keys.set("attention.alibi_scale", (keys.sizes.head_dim as f32).sqrt().recip());
        }
        Ok(())
    },
    ..GPT2
};

fn serial(settings: &Settings) -> Result<bool> {
    Ok(!settings.switch("parallel_attn", true)?)
}

/// Whether the model has the architecture of the 40B one. Its first checkpoints lack the switch, but have `n_head_kv`.
fn is_new(settings: &Settings) -> Result<bool> {
    settings.switch("new_decoder_architecture", settings.get("n_head_kv").is_some())
}

fn two_norms(settings: &Settings) -> Result<bool> {
    let norms = settings.optional_count(&["num_ln_in_parallel_attn"])?;
    let two = norms.map_or(is_new(settings)?, |norms| norms == 2);
    Ok(two && !serial(settings)?)
}

fn one_norm(settings: &Settings) -> Result<bool> {
    two_norms(settings).map(|two| !two)
}

/// MosaicML 2023.
pub(super) const MPT: HfFamily = HfFamily {
    model_types: &["mpt"],
    architecture: "mpt",
    outside: &[&[
        tensor("token_embd", "~wte"),
        tensor("position_embd", "~wpe").when(Optional),
        tensor("output_norm", "~norm_f").bias(Optional),
        tensor("output", "lm_head").when(Need::Untied),
    ]],
    layers: "~blocks.",
    layer: &[&biased(
        Optional,
        [
            ["attn_norm", "norm_1"],
            ["attn_qkv", "attn.Wqkv"],
            ["attn_output", "attn.out_proj"],
            ["ffn_norm", "norm_2"],
            ["ffn_up", "ffn.up_proj"],
            ["ffn_down", "ffn.down_proj"],
        ],
    )],
    without_influence: &[
        "embedding_fraction",
        "expansion_ratio",
        "init_device",
        "learned_pos_emb",
        "no_bias",
        "norm_type",
    ],
    activation: ActivationSource::Is("gelu"),
    adjust: |settings, sizes| {
        sizes.ffn = 4 * sizes.hidden;
        if let Some(attention) = settings.object("attn_config")? {
            sizes.kv_heads = attention.optional_count(&["kv_n_heads"])?.unwrap_or(sizes.heads);
        }
        Ok(())
    },
    keys: |keys| {
        let settings = keys.settings;
        if let Some(scale) = settings.get("logit_scale") {
            return Err(settings.unsupported("logit_scale", scale, "supported: null"));
        }
        let mut max_bias = MAX_BIAS;
        if let Some(attention) = settings.object("attn_config")? {
            for switch in ["qk_ln", "prefix_lm", "attn_uses_sequence_id"] {
                if attention.switch(switch, false)? {
                    return Err(attention.unsupported(switch, "true", "supported: false"));
                }
            }
            max_bias = attention.optional_float(&["alibi_bias_max"])?.map_or(max_bias, |max| max as f32);
            if !attention.switch("alibi", true)? {
                max_bias = 0.0;
            }
            for (theirs, ours) in [("clip_qkv", "attention.clamp_kqv"), ("softmax_scale", "attention.scale")] {
                if let Some(number) = attention.optional_float(&[theirs])? {
                    keys.set(ours, number as f32);
                }
            }
        }
        keys.set("attention.max_alibi_bias", max_bias);
        Ok(())
    },
    ..GPT2
};
