//! GPT-2 and the families that resemble it: LayerNorm with biases, and a feed-forward layer without a gate.

use super::family::{ActivationSource, BASE, HfFamily, Rotation, WindowRule};
use super::parts::{EMBEDDING_WITH_BIAS, attention, four_times, named_embedding, parallel_residual};
use crate::error::Result;
use crate::model::arch::NormKind;
use crate::model::hf::entry::{Entry, Need, Transform, tensor};
use crate::model::hf::settings::Settings;
use Need::{Always, If, IfSo, Unless};
use Transform::{Copy, Skip, Transpose, Ungroup};

/// Radford et al. 2019.
pub(super) const GPT2: HfFamily = HfFamily {
    model_types: &["gpt2"],
    architecture: "gpt2",
    bases: &["transformer.", ""],
    outside: &[OUTSIDE],
    layers: "~h.",
    layer: &[&layer(Transpose, Transpose)],
    norm: NormKind::Layer,
    activation: ActivationSource::Under(&["activation_function"]),
    rotation: Rotation::None,
    adjust: four_times,
    keys: |keys| {
        keys.require("scale_attn_weights", true)?;
        keys.require("scale_attn_by_inverse_layer_idx", false)?;
        keys.require("add_cross_attention", false)
    },
    ..BASE
};

const OUTSIDE: &[Entry] = &[
    tensor("token_embd", "~wte"),
    tensor("position_embd", "~wpe"),
    tensor("output_norm", "~ln_f").bias(Always),
    tensor("output", "lm_head").when(Need::Untied),
];

const fn layer(qkv: Transform, rest: Transform) -> [Entry; 6] {
    [
        tensor("attn_norm", "ln_1").bias(Always),
        tensor("attn_qkv", "attn.c_attn").by(qkv).bias(Always),
        tensor("attn_output", "attn.c_proj").by(rest).bias(Always),
        tensor("ffn_norm", "ln_2").bias(Always),
        tensor("ffn_up", "mlp.c_fc").by(rest).bias(Always),
        tensor("ffn_down", "mlp.c_proj").by(rest).bias(Always),
    ]
}

/// Li et al. 2023, arXiv 2305.06161: StarCoder and SantaCoder.
pub(super) const GPT_BIGCODE: HfFamily = HfFamily {
    model_types: &["gpt_bigcode"],
    architecture: "starcoder",
    layer: &[&layer(Ungroup, Copy)],
    adjust: |settings, sizes| {
        sizes.kv_heads = if settings.switch("multi_query", true)? { 1 } else { sizes.heads };
        four_times(settings, sizes)
    },
    keys: |keys| {
        keys.require("scale_attn_weights", true)?;
        keys.require("add_cross_attention", false)
    },
    ..GPT2
};

/// Wang and Komatsuzaki 2021.
pub(super) const GPTJ: HfFamily = HfFamily {
    model_types: &["gptj"],
    architecture: "gptj",
    outside: &[&named_embedding("~wte", "~ln_f", tensor("output", "lm_head").bias(Always))],
    layer: &[&[
        tensor("attn_norm", "ln_1").bias(Always),
        tensor("attn_q", "attn.q_proj"),
        tensor("attn_k", "attn.k_proj"),
        tensor("attn_v", "attn.v_proj"),
        tensor("attn_output", "attn.out_proj"),
        tensor("ffn_up", "mlp.fc_in").bias(Always),
        tensor("ffn_down", "mlp.fc_out").bias(Always),
    ]],
    rotation: Rotation::Part,
    keys: |_| Ok(()),
    ..GPT2
};

/// Black et al. 2022, arXiv 2204.06745; also Pythia, Dolly and StableLM-Alpha.
pub(super) const GPT_NEOX: HfFamily = HfFamily {
    model_types: &["gpt_neox"],
    architecture: "gptneox",
    defaults: &[&[("rotary_pct", "0.25")]],
    bases: &["gpt_neox.", ""],
    outside: &[&named_embedding("~embed_in", "~final_layer_norm", tensor("output", "embed_out"))],
    layers: "~layers.",
    layer: &[&[
        tensor("attn_norm", "input_layernorm").bias(Always),
        tensor("attn_qkv", "attention.query_key_value").by(Ungroup).bias(If("attention_bias")),
        tensor("attn_output", "attention.dense").bias(If("attention_bias")),
        tensor("ffn_norm", "post_attention_layernorm").bias(Always),
        tensor("ffn_up", "mlp.dense_h_to_4h").bias(Always),
        tensor("ffn_down", "mlp.dense_4h_to_h").bias(Always),
    ]],
    activation: ActivationSource::Under(&["hidden_act"]),
    rotation: Rotation::Part,
    keys: |keys| parallel_residual(keys, true),
    ..GPT2
};

/// Zhang et al. 2022, arXiv 2205.01068. GGUF has no names for it; these are nybble's own.
pub(super) const OPT: HfFamily = HfFamily {
    model_types: &["opt"],
    architecture: "opt",
    defaults: &[&[("layer_norm_eps", "1e-5")]],
    bases: &["model.decoder.", "decoder.", ""],
    outside: &[&[
        tensor("token_embd", "~embed_tokens"),
        tensor("token_embd_proj", "~project_in").when(IfSo(is_projected)),
        tensor("output_proj", "~project_out").when(IfSo(is_projected)),
        // The first two rows are for padding.
        tensor("position_embd", "~embed_positions").by(Skip(2)),
        tensor("output_norm", "~final_layer_norm").both(IfSo(has_last_norm)),
        tensor("output", "lm_head").when(Need::Untied),
    ]],
    layers: "~layers.",
    layer: &[&[
        tensor("attn_norm", "self_attn_layer_norm").both(If("do_layer_norm_before")),
        tensor("attn_output_norm", "self_attn_layer_norm").both(Unless("do_layer_norm_before")),
        tensor("attn_q", "self_attn.q_proj").bias(If("enable_bias")),
        tensor("attn_k", "self_attn.k_proj").bias(If("enable_bias")),
        tensor("attn_v", "self_attn.v_proj").bias(If("enable_bias")),
        tensor("attn_output", "self_attn.out_proj").bias(If("enable_bias")),
        tensor("ffn_norm", "final_layer_norm").both(If("do_layer_norm_before")),
        tensor("layer_output_norm", "final_layer_norm").both(Unless("do_layer_norm_before")),
        tensor("ffn_up", "fc1").bias(If("enable_bias")),
        tensor("ffn_down", "fc2").bias(If("enable_bias")),
    ]],
    adjust: |settings, sizes| {
        sizes.embedding = settings.optional_count(&["word_embed_proj_dim"])?.unwrap_or(sizes.hidden);
        four_times(settings, sizes)
    },
    keys: |keys| keys.require("layer_norm_elementwise_affine", true),
    ..GPT2
};

/// Whether embeddings and layers have different widths, as in OPT-350m.
fn is_projected(settings: &Settings) -> Result<bool> {
    let hidden = settings.count(&["hidden_size"])?;
    Ok(settings.optional_count(&["word_embed_proj_dim"])?.is_some_and(|width| width != hidden))
}

/// Whether there is a norm before the output matrix: only where norms precede their layers.
fn has_last_norm(settings: &Settings) -> Result<bool> {
    Ok(settings.switch("do_layer_norm_before", true)? && !settings.switch("_remove_final_layer_norm", false)?)
}

/// Lozhkov et al. 2024, arXiv 2402.19173.
pub(super) const STARCODER2: HfFamily = HfFamily {
    model_types: &["starcoder2"],
    architecture: "starcoder2",
    outside: &[EMBEDDING_WITH_BIAS],
    layer: &[
        &[
            tensor("attn_norm", "input_layernorm").bias(Always),
            tensor("ffn_norm", "post_attention_layernorm").bias(Always),
            tensor("ffn_up", "mlp.c_fc").bias(If("use_bias")),
            tensor("ffn_down", "mlp.c_proj").bias(If("use_bias")),
        ],
        &attention(Copy, If("use_bias"), If("use_bias")),
    ],
    norm: NormKind::Layer,
    window: WindowRule::Always,
    ..BASE
};
