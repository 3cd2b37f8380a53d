//! GLM and other families from China.

use super::family::{BASE, HfFamily, Rotation, WindowRule};
use super::modern::mixtral_experts;
use super::parts::{
    DEEPSEEK_EXPERTS, EMBEDDING, MERGED_GATED, NORMS, attention, default_attention, expert_list, experts_of_ffn_width,
    first_dense, gated, head_norms, routed, shared_experts, sparse_list, tied_with_bias,
};
use crate::model::hf::entry::{Need, Transform, Values, tensor};
use crate::model::hf::mtp::{DEEPSEEK_HEAD, HUNYUAN_HEAD};
use crate::model::hf::sizes::Size;
use Need::{Always, Dense, If, Never, Sparse};
use Transform::Copy;

/// GLM Team 2024, arXiv 2406.12793.
pub(super) const GLM: HfFamily = HfFamily {
    model_types: &["glm"],
    architecture: "chatglm",
    layer: &[NORMS, &attention(Copy, If("attention_bias"), Never), MERGED_GATED],
    defaults: &[&[("partial_rotary_factor", "0.5")]],
    rotation: Rotation::Part,
    ..BASE
};

/// GLM 4 (0414).
pub(super) const GLM4: HfFamily = HfFamily {
    model_types: &["glm4"],
    architecture: "glm4",
    layer: &[
        &[
            tensor("attn_norm", "input_layernorm"),
            tensor("ffn_norm", "post_attention_layernorm"),
            tensor("post_attention_norm", "post_self_attn_layernorm"),
            tensor("post_ffw_norm", "post_mlp_layernorm"),
        ],
        MERGED_GATED,
        &attention(Copy, If("attention_bias"), Never),
    ],
    ..GLM
};

/// GLM 4.5 and later with experts.
pub(super) const GLM4_MOE: HfFamily = HfFamily {
    model_types: &["glm4_moe"],
    without_influence: &["num_mtp_layers"],
    architecture: "glm4moe",
    defaults: GLM.defaults,
    layer: &[
        &[
            tensor("attn_norm", "input_layernorm"),
            tensor("post_attention_norm", "post_attention_layernorm"),
            tensor("attn_q_norm", "self_attn.q_norm").when(If("use_qk_norm")),
            tensor("attn_k_norm", "self_attn.k_norm").when(If("use_qk_norm")),
        ],
        &attention(Copy, If("attention_bias"), Never),
        &gated(Dense, Never),
        &DEEPSEEK_EXPERTS,
    ],
    mtp: Some(DEEPSEEK_HEAD),
    rotation: Rotation::Part,
    window: WindowRule::Never,
    ..DOTS1
};

/// rednote-hilab 2025, arXiv 2506.05767.
pub(super) const DOTS1: HfFamily = HfFamily {
    model_types: &["dots1"],
    architecture: "dots1",
    layer: &[NORMS, &default_attention(Copy), &head_norms(Values::Same), &gated(Dense, Never), &DEEPSEEK_EXPERTS],
    window: WindowRule::From("max_window_layers"),
    adjust: first_dense,
    keys: |keys| keys.sigmoid_router(),
    ..BASE
};

/// Baidu 2025.
pub(super) const ERNIE4_5: HfFamily = HfFamily {
    model_types: &["ernie4_5"],
    architecture: "ernie4_5",
    layer: &[NORMS, &attention(Copy, If("use_bias"), If("use_bias")), &gated(Always, If("use_bias"))],
    ..BASE
};

/// Baidu 2025, with experts.
pub(super) const ERNIE4_5_MOE: HfFamily = HfFamily {
    model_types: &["ernie4_5_moe"],
    architecture: "ernie4_5-moe",
    outside: &[EMBEDDING, &tied_with_bias("use_bias")],
    layer: &[
        NORMS,
        &attention(Copy, If("use_bias"), If("use_bias")),
        &gated(Dense, If("use_bias")),
        &routed("mlp.gate", "mlp.moe_statics.e_score_correction_bias"),
        &expert_list("mlp.experts.{e}", Sparse),
        &shared_experts("mlp.shared_experts", If("use_bias")),
    ],
    adjust: |settings, sizes| {
        sizes.experts = settings.count(&["moe_num_experts"])?;
        sizes.shared_ffn = sizes.expert_ffn * settings.number(&["moe_num_shared_experts"])?;
        let (start, step) = (settings.number(&["moe_layer_start_index"])?, settings.count(&["moe_layer_interval"])?);
        let end = match settings.get("moe_layer_end_index").and_then(|end| end.as_i64()) {
            Some(end) if end >= 0 => end as usize,
            _ => sizes.layers.saturating_sub(1),
        };
        let is_sparse = |layer: usize| (layer + 1).is_multiple_of(step) && (start..=end).contains(&layer);
        sizes.sparse = (0..sizes.layers).map(is_sparse).collect();
        Ok(())
    },
    keys: |keys| {
        keys.experts_used(&["moe_k"], true)?;
        // Shares of a softmax never have so small a sum.
        if let Some(least) = keys.settings.optional_float(&["moe_norm_min"])?.filter(|least| *least > 1e-6) {
            return Err(keys.settings.unsupported("moe_norm_min", least, "supported: up to 1e-6"));
        }
        keys.set("interleave_moe_layer_step", keys.settings.count(&["moe_layer_interval"])? as u32);
        keys.leading_dense_layers();
        keys.set("expert_shared_count", keys.settings.number(&["moe_num_shared_experts"])? as u32);
        Ok(())
    },
    ..BASE
};

/// Tencent 2025: Hunyuan.
pub(super) const HUNYUAN_DENSE: HfFamily = HfFamily {
    model_types: &["hunyuan_v1_dense"],
    without_influence: &["eod_token_id"],
    architecture: "hunyuan-dense",
    layer: &[
        NORMS,
        &default_attention(Copy),
        &[tensor("attn_q_norm", "self_attn.query_layernorm"), tensor("attn_k_norm", "self_attn.key_layernorm")],
        &gated(Always, Never),
    ],
    ..BASE
};

/// Tencent 2026: HY 3.
pub(super) const HY_V3: HfFamily = HfFamily {
    model_types: &["hy_v3"],
    without_influence: &["enable_moe_fp32_combine"],
    architecture: "hy_v3",
    layer: &[
        NORMS,
        &default_attention(Copy),
        &head_norms(Values::Same),
        &gated(Dense, If("mlp_bias")),
        // llama.cpp's name of this bias has no ending.
        &[
            tensor("ffn_gate_inp", "mlp.router.gate").when(Sparse),
            tensor("exp_probs_b", "mlp.expert_bias").raw().named("").when(Sparse),
        ],
        &expert_list("mlp.experts.{e}", Sparse),
        &shared_experts("mlp.shared_mlp", If("mlp_bias")),
    ],
    adjust: |settings, sizes| {
        // The class takes no shared experts for the width of dense layers.
        let shared = sizes.expert_ffn * settings.number(&["num_shared_experts"])?;
        sizes.shared_ffn = if shared > 0 { shared } else { sizes.ffn };
        sparse_list(settings, sizes, |layer| layer > 0)
    },
    mtp: Some(HUNYUAN_HEAD),
    defaults: &[&[("num_nextn_predict_layers", "1")]],
    keys: |keys| {
        keys.experts(true)?;
        keys.set("expert_gating_func", 2u32);
        keys.copy("expert_weights_scale", "router_scaling_factor")?;
        keys.leading_dense_layers();
        Ok(())
    },
    ..BASE
};

/// ByteDance 2025.
pub(super) const SEED_OSS: HfFamily = HfFamily {
    model_types: &["seed_oss"],
    architecture: "seed_oss",
    layer: &[
        &[tensor("attn_norm", "input_layernorm"), tensor("post_attention_norm", "post_attention_layernorm")],
        &attention(Copy, If("attention_bias"), If("attention_out_bias")),
        &gated(Always, If("mlp_bias")),
    ],
    ..BASE
};

/// MiniMax 2025.
pub(super) const MINIMAX_M2: HfFamily = HfFamily {
    model_types: &["minimax_m2"],
    without_influence: &["router_jitter_noise"],
    architecture: "minimax-m2",
    layer: &[
        NORMS,
        &attention(Copy, Never, Never),
        &[
            tensor("attn_q_norm", "self_attn.q_norm").dims(&[Size::Queries]),
            tensor("attn_k_norm", "self_attn.k_norm").dims(&[Size::Keys]),
            tensor("ffn_gate_inp", "block_sparse_moe.gate"),
            tensor("exp_probs_b", "block_sparse_moe.e_score_correction_bias").raw().named(".bias"),
        ],
        &mixtral_experts(),
    ],
    rotation: Rotation::Part,
    adjust: experts_of_ffn_width,
    keys: |keys| {
        keys.experts(true)?;
        keys.set("expert_gating_func", 2u32);
        Ok(())
    },
    ..BASE
};
