//! Families of 2025 and 2026 that go ways of their own.

use super::family::{ActivationSource, BASE, HfFamily, Rotation, WindowRule};
use super::llama::{GRANITE, LLAMA, OLMO2};
use super::parts::{
    EMBEDDING, NORMS, attention, expert_list, first_dense, gated, head_norms, rotating_layers, routed, shared_experts,
    sparse_list,
};
use super::qwen::QWEN2;
use crate::error::Result;
use crate::model::arch::NormKind;
use crate::model::hf::entry::{Entry, Need, Transform, tensor};
use crate::model::hf::metadata::MetadataWriter;
use crate::model::hf::settings::Settings;
use crate::model::hf::sizes::{LayerSizes, Size, Sizes};
use Need::{Always, Dense, If, Never, Sparse};
use Transform::{AddOne, ColumnsOfPart, Copy, EveryNth, PairNeighbors, RowsOfPart};

/// OpenAI 2025, arXiv 2508.10925.
pub(super) const GPT_OSS: HfFamily = HfFamily {
    model_types: &["gpt_oss"],
    architecture: "gpt-oss",
    layer: &[
        &[
            tensor("attn_norm", "input_layernorm"),
            tensor("post_attention_norm", "post_attention_layernorm"),
            tensor("attn_sinks", "self_attn.sinks").raw(),
            tensor("ffn_gate_inp", "mlp.router").bias(Always),
        ],
        &attention(Copy, If("attention_bias"), If("attention_bias")),
        &GPT_OSS_EXPERTS,
    ],
    window: WindowRule::Period(&["sliding_window_pattern"]),
    defaults: &[&[("sliding_window_pattern", "2")]],
    adjust: |_, sizes| {
        sizes.expert_ffn = sizes.ffn;
        Ok(())
    },
    keys: |keys| {
        keys.experts(true)?;
        keys.set("expert_gating_func", 3u32);
        for (key, name, usual) in
            [("expert_gate_alpha", "swiglu_alpha", 1.702), ("expert_gate_limit", "swiglu_limit", 7.0)]
        {
            let number = keys.settings.optional_float(&[name])?.unwrap_or(usual);
            if number <= 0.0 {
                return Err(keys.settings.malformed(name, number, "a positive number"));
            }
            if number != usual {
                keys.set(key, number as f32);
            }
        }
        Ok(())
    },
    ..BASE
};

/// Columns and biases of gate and up alternate.
const GPT_OSS_EXPERTS: [Entry; 6] = [
    tensor("ffn_gate_exps", "mlp.experts.gate_up_proj").raw().by(ColumnsOfPart { part: 0, parts: 2, alternate: true }),
    tensor("ffn_up_exps", "mlp.experts.gate_up_proj").raw().by(ColumnsOfPart { part: 1, parts: 2, alternate: true }),
    tensor("ffn_down_exps", "mlp.experts.down_proj").raw().by(ColumnsOfPart { part: 0, parts: 1, alternate: false }),
    tensor("ffn_gate_exps", "mlp.experts.gate_up_proj_bias")
        .raw()
        .named(".bias")
        .by(EveryNth { part: 0, parts: 2 })
        .dims(&[Size::ExpertFfn, Size::Experts]),
    tensor("ffn_up_exps", "mlp.experts.gate_up_proj_bias")
        .raw()
        .named(".bias")
        .by(EveryNth { part: 1, parts: 2 })
        .dims(&[Size::ExpertFfn, Size::Experts]),
    tensor("ffn_down_exps", "mlp.experts.down_proj_bias").raw().named(".bias").dims(&[Size::Hidden, Size::Experts]),
];

/// Meta 2025.
pub(super) const LLAMA4: HfFamily = HfFamily {
    model_types: &["llama4_text", "llama4"],
    architecture: "llama4",
    bases: &["language_model.model.", "model.language_model.", "model.", ""],
    outside: &[&[
        tensor("token_embd", "~embed_tokens"),
        tensor("output_norm", "~norm"),
        tensor("output", "@lm_head").when(Need::Untied),
    ]],
    layer: &[
        NORMS,
        &attention(Copy, If("attention_bias"), If("attention_bias")),
        &[
            tensor("ffn_gate", "feed_forward.gate_proj").when(Dense),
            tensor("ffn_up", "feed_forward.up_proj").when(Dense),
            tensor("ffn_down", "feed_forward.down_proj").when(Dense),
            tensor("ffn_gate_inp", "feed_forward.router").when(Sparse),
            tensor("ffn_gate_exps", "feed_forward.experts.gate_up_proj")
                .raw()
                .by(ColumnsOfPart { part: 0, parts: 2, alternate: false })
                .when(Sparse),
            tensor("ffn_up_exps", "feed_forward.experts.gate_up_proj")
                .raw()
                .by(ColumnsOfPart { part: 1, parts: 2, alternate: false })
                .when(Sparse),
            tensor("ffn_down_exps", "feed_forward.experts.down_proj")
                .raw()
                .by(ColumnsOfPart { part: 0, parts: 1, alternate: false })
                .when(Sparse),
            tensor("ffn_gate_shexp", "feed_forward.shared_expert.gate_proj").when(Sparse),
            tensor("ffn_up_shexp", "feed_forward.shared_expert.up_proj").when(Sparse),
            tensor("ffn_down_shexp", "feed_forward.shared_expert.down_proj").when(Sparse),
        ],
    ],
    ignored: &["vision_model.", "multi_modal_projector.", "model.vision_model.", "model.multi_modal_projector."],
    adjust: |settings, sizes| {
        (sizes.expert_ffn, sizes.shared_ffn) = (sizes.ffn, sizes.ffn);
        sizes.ffn = settings.count(&["intermediate_size_mlp"])?;
        let listed: Option<Vec<u64>> = settings.list("moe_layers")?;
        let step = settings.count(&["interleave_moe_layer_step"])?;
        let is_sparse = |layer: usize| match &listed {
            Some(listed) => listed.contains(&(layer as u64)),
            None => (layer + 1).is_multiple_of(step),
        };
        sizes.sparse = (0..sizes.layers).map(is_sparse).collect();
        Ok(())
    },
    keys: llama4_keys,
    ..BASE
};

fn llama4_keys(keys: &mut MetadataWriter<'_>) -> Result<()> {
    let settings = keys.settings;
    keys.experts(false)?;
    keys.set("interleave_moe_layer_step", settings.count(&["interleave_moe_layer_step"])? as u32);
    let rotated = rotating_layers(keys, "no_rope_layer_interval")?;
    keys.set("attention.rope_pattern", rotated.clone());
    let chunked = settings.per_layer(
        "layer_types",
        keys.sizes.layers,
        "full_attention or chunked_attention",
        |kind| match kind.as_str() {
            Some("full_attention") => Some(false),
            Some("chunked_attention") => Some(true),
            _ => None,
        },
    )?;
    let chunked = chunked.unwrap_or(rotated);
    match settings.optional_count(&["attention_chunk_size"])? {
        Some(chunk) if chunked.contains(&true) => {
            keys.set("attention.chunk_length", chunk as u32);
            keys.set("attention.sliding_window_pattern", chunked);
        }
        // A window of 0 says that there are no chunks either.
        _ => keys.set("attention.sliding_window", 0u32),
    }
    if settings.switch("attn_temperature_tuning", true)? {
        keys.set("attention.temperature_scale", settings.float(&["attn_scale"])? as f32);
        keys.set("attention.temperature_length", settings.count(&["floor_scale"])? as u32);
    } else {
        keys.set("attention.temperature_scale", 0.0f32);
    }
    keys.set("attention.qk_norm", settings.switch("use_qk_norm", true)?);
    Ok(())
}

/// Mistral AI 2025: Ministral 3.
pub(super) const MINISTRAL3: HfFamily = HfFamily {
    model_types: &["ministral3", "mistral3"],
    architecture: "mistral3",
    bases: &["language_model.model.", "model.language_model.", "model.", ""],
    outside: LLAMA4.outside,
    ignored: &["vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector."],
    layer: &[NORMS, &attention(PairNeighbors, Never, Never), &gated(Always, Never)],
    window: WindowRule::Always,
    keys: |keys| {
        let Some(rope) = keys.settings.object("rope_parameters")?.filter(|rope| !rope.is_empty()) else {
            return Ok(());
        };
        let Some(scale) = rope.optional_float(&["llama_4_scaling_beta"])? else { return Ok(()) };
        if scale > 0.0 {
            let length = rope.count(&["original_max_position_embeddings"])?;
            keys.set("attention.temperature_scale", scale as f32);
            keys.set("attention.temperature_length", length as u32);
        }
        Ok(())
    },
    ..LLAMA
};

/// Arcee AI 2025.
pub(super) const ARCEE: HfFamily = HfFamily {
    model_types: &["arcee"],
    architecture: "arcee",
    layer: &[
        NORMS,
        &attention(PairNeighbors, If("attention_bias"), If("attention_bias")),
        &[
            tensor("ffn_up", "mlp.up_proj").bias(If("mlp_bias")),
            tensor("ffn_down", "mlp.down_proj").bias(If("mlp_bias")),
        ],
    ],
    ..LLAMA
};

/// Swiss AI 2025, arXiv 2509.14233.
pub(super) const APERTUS: HfFamily = HfFamily {
    model_types: &["apertus"],
    architecture: "apertus",
    layer: &[
        &[
            tensor("attn_norm", "attention_layernorm"),
            tensor("ffn_norm", "feedforward_layernorm"),
            tensor("ffn_up", "mlp.up_proj"),
            tensor("ffn_down", "mlp.down_proj"),
        ],
        &attention(Copy, If("attention_bias"), If("attention_bias")),
        &head_norms(Copy),
    ],
    // Read as keys.
    unused: &[".act_fn.alpha_p", ".act_fn.alpha_n", ".act_fn.beta", ".act_fn.eps"],
    activation: ActivationSource::Xielu,
    ..LLAMA
};

/// Ma et al. 2024, arXiv 2402.17764.
pub(super) const BITNET: HfFamily = HfFamily {
    model_types: &["bitnet"],
    architecture: "bitnet",
    layer: &[
        NORMS,
        &attention(Copy, If("attention_bias"), If("attention_bias")),
        &gated(Always, Never),
        &[tensor("attn_sub_norm", "self_attn.attn_sub_norm"), tensor("ffn_sub_norm", "mlp.ffn_sub_norm")],
    ],
    ..BASE
};

/// Groeneveld et al. 2024, arXiv 2402.00838: norms without weights.
pub(super) const OLMO: HfFamily = HfFamily {
    model_types: &["olmo"],
    architecture: "olmo",
    outside: &[&[tensor("token_embd", "~embed_tokens"), tensor("output", "lm_head").when(Need::Untied)]],
    layer: &[&attention(PairNeighbors, If("attention_bias"), If("attention_bias")), &gated(Always, Never)],
    defaults: &[&[("layer_norm_eps", "1e-5")]],
    norm: NormKind::Layer,
    keys: |keys| keys.copy("attention.clamp_kqv", "clip_qkv"),
    ..LLAMA
};

/// Team OLMo 2025, arXiv 2512.13961.
pub(super) const OLMO3: HfFamily = HfFamily {
    model_types: &["olmo3"],
    window: WindowRule::Period(&["sliding_window_pattern"]),
    defaults: &[&[("sliding_window_pattern", "4")]],
    keys: |keys| keys.plain_windows(),
    ..OLMO2
};

/// Muennighoff et al. 2024, arXiv 2409.02060.
pub(super) const OLMOE: HfFamily = HfFamily {
    model_types: &["olmoe"],
    architecture: "olmoe",
    layer: &[
        NORMS,
        &attention(Copy, If("attention_bias"), If("attention_bias")),
        &[
            tensor("attn_q_norm", "self_attn.q_norm").dims(&[Size::Queries]),
            tensor("attn_k_norm", "self_attn.k_norm").dims(&[Size::Keys]),
            tensor("ffn_gate_inp", "mlp.gate"),
        ],
        &expert_list("mlp.experts.{e}", Always),
    ],
    adjust: |_, sizes| {
        sizes.expert_ffn = sizes.ffn;
        Ok(())
    },
    keys: |keys| {
        keys.copy("attention.clamp_kqv", "clip_qkv")?;
        keys.experts(keys.settings.switch("norm_topk_prob", false)?)
    },
    ..BASE
};

/// Cohere 2024: Command R.
pub(super) const COHERE: HfFamily = HfFamily {
    model_types: &["cohere"],
    architecture: "command-r",
    outside: &[&[tensor("token_embd", "~embed_tokens"), tensor("output_norm", "~norm")]],
    layer: &[
        &[
            tensor("attn_norm", "input_layernorm"),
            tensor("attn_q_norm", "self_attn.q_norm").when(If("use_qk_norm")).dims(&[Size::HeadDim, Size::Heads]),
            tensor("attn_k_norm", "self_attn.k_norm").when(If("use_qk_norm")).dims(&[Size::HeadDim, Size::KvHeads]),
        ],
        &attention(Copy, If("attention_bias"), If("attention_bias")),
        &gated(Always, Never),
    ],
    ignored: &["lm_head."],
    norm: NormKind::Layer,
    keys: |keys| {
        keys.require("tie_word_embeddings", true)?;
        keys.copy("logit_scale", "logit_scale")
    },
    ..BASE
};

/// Cohere 2025: Command R7B and A.
pub(super) const COHERE2: HfFamily = HfFamily {
    model_types: &["cohere2"],
    architecture: "cohere2",
    layer: &[
        &[tensor("attn_norm", "input_layernorm")],
        &attention(Copy, If("attention_bias"), If("attention_bias")),
        &gated(Always, Never),
    ],
    window: WindowRule::Period(&["sliding_window_pattern", "_sliding_window_pattern"]),
    rotation: Rotation::Part,
    keys: |keys| {
        keys.rotate_windows(false);
        (COHERE.keys)(keys)
    },
    ..COHERE
};

/// LG AI Research 2025, arXiv 2507.11407: norms follow the layers.
pub(super) const EXAONE4: HfFamily = HfFamily {
    model_types: &["exaone4"],
    architecture: "exaone4",
    layer: &[
        &attention(Copy, Never, Never),
        &head_norms(Copy),
        &[
            tensor("post_attention_norm", "post_attention_layernorm"),
            tensor("post_ffw_norm", "post_feedforward_layernorm"),
        ],
        &gated(Always, Never),
    ],
    window: WindowRule::Pattern("sliding_window_pattern"),
    keys: |keys| {
        keys.rotate_windows(true);
        Ok(())
    },
    ..BASE
};

/// GLM Team 2024, arXiv 2406.12793.
pub(super) const GLM: HfFamily = HfFamily {
    model_types: &["glm"],
    architecture: "chatglm",
    layer: &[
        NORMS,
        &attention(Copy, If("attention_bias"), Never),
        &[
            tensor("ffn_up", "mlp.gate_up_proj").dims(&[Size::Hidden, Size::TwiceFfn]),
            tensor("ffn_down", "mlp.down_proj"),
        ],
    ],
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
            tensor("ffn_up", "mlp.gate_up_proj").dims(&[Size::Hidden, Size::TwiceFfn]),
            tensor("ffn_down", "mlp.down_proj"),
        ],
        &attention(Copy, If("attention_bias"), Never),
    ],
    ..GLM
};

/// GLM 4.5 and later with experts.
pub(super) const GLM4_MOE: HfFamily = HfFamily {
    model_types: &["glm4_moe"],
    architecture: "glm4moe",
    layer: &[
        &[
            tensor("attn_norm", "input_layernorm"),
            tensor("post_attention_norm", "post_attention_layernorm"),
            tensor("attn_q_norm", "self_attn.q_norm").when(If("use_qk_norm")),
            tensor("attn_k_norm", "self_attn.k_norm").when(If("use_qk_norm")),
        ],
        &attention(Copy, If("attention_bias"), Never),
        &gated(Dense, Never),
        &routed("mlp.gate", "mlp.gate.e_score_correction_bias"),
        &expert_list("mlp.experts.{e}", Sparse),
        &shared_experts("mlp.shared_experts"),
    ],
    adjust: first_dense,
    keys: |keys| keys.sigmoid_router(),
    ..GLM
};

/// rednote-hilab 2025, arXiv 2506.05767.
pub(super) const DOTS1: HfFamily = HfFamily {
    model_types: &["dots1"],
    architecture: "dots1",
    layer: &[
        NORMS,
        &attention(Copy, If("attention_bias"), If("attention_bias")),
        &head_norms(Copy),
        &gated(Dense, Never),
        &routed("mlp.gate", "mlp.gate.e_score_correction_bias"),
        &expert_list("mlp.experts.{e}", Sparse),
        &shared_experts("mlp.shared_experts"),
    ],
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
    layer: &[
        NORMS,
        &attention(Copy, If("use_bias"), If("use_bias")),
        &gated(Dense, If("use_bias")),
        &[
            tensor("ffn_gate_inp", "mlp.gate").when(Sparse),
            tensor("exp_probs_b", "mlp.moe_statics.e_score_correction_bias").raw().named(".bias").when(Sparse),
        ],
        &expert_list("mlp.experts.{e}", Sparse),
        &shared_experts("mlp.shared_experts"),
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
        keys.experts_used("moe_k", true)?;
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
    architecture: "hunyuan-dense",
    layer: &[
        NORMS,
        &attention(Copy, If("attention_bias"), If("attention_bias")),
        &[tensor("attn_q_norm", "self_attn.query_layernorm"), tensor("attn_k_norm", "self_attn.key_layernorm")],
        &gated(Always, Never),
    ],
    ..BASE
};

/// Tencent 2026: HY 3.
pub(super) const HY_V3: HfFamily = HfFamily {
    model_types: &["hy_v3"],
    architecture: "hy_v3",
    layer: &[
        NORMS,
        &attention(Copy, If("attention_bias"), If("attention_bias")),
        &head_norms(Copy),
        &gated(Dense, If("mlp_bias")),
        &[
            tensor("ffn_gate_inp", "mlp.router.gate").when(Sparse),
            tensor("exp_probs_b", "mlp.expert_bias").raw().named(".bias").when(Sparse),
        ],
        &expert_list("mlp.experts.{e}", Sparse),
        &shared_experts("mlp.shared_mlp"),
    ],
    adjust: |settings, sizes| {
        sizes.shared_ffn = sizes.expert_ffn * settings.number(&["num_shared_experts"])?;
        sparse_list(settings, sizes, |layer| layer > 0)
    },
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

/// Parmar et al. 2024, arXiv 2402.16819: LayerNorm with 1 + weight.
pub(super) const NEMOTRON: HfFamily = HfFamily {
    model_types: &["nemotron"],
    architecture: "nemotron",
    defaults: &[&[("partial_rotary_factor", "0.5")]],
    outside: &[&[
        tensor("token_embd", "~embed_tokens"),
        tensor("output_norm", "~norm").by(AddOne).bias(Always),
        tensor("output", "lm_head").when(Need::Untied),
    ]],
    layer: &[
        &[
            tensor("attn_norm", "input_layernorm").by(AddOne).bias(Always),
            tensor("ffn_norm", "post_attention_layernorm").by(AddOne).bias(Always),
            tensor("ffn_up", "mlp.up_proj").bias(If("mlp_bias")),
            tensor("ffn_down", "mlp.down_proj").bias(If("mlp_bias")),
        ],
        &attention(Copy, If("attention_bias"), If("attention_bias")),
    ],
    norm: NormKind::Layer,
    rotation: Rotation::Part,
    ..BASE
};

/// MiniMax 2025.
pub(super) const MINIMAX_M2: HfFamily = HfFamily {
    model_types: &["minimax_m2"],
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
    adjust: |_, sizes| {
        sizes.expert_ffn = sizes.ffn;
        Ok(())
    },
    keys: |keys| {
        keys.experts(true)?;
        keys.set("expert_gating_func", 2u32);
        Ok(())
    },
    ..BASE
};

/// Experts under the names of Mixtral.
const fn mixtral_experts() -> [Entry; 3] {
    [
        tensor("ffn_gate_exps", "block_sparse_moe.experts.{e}.w1").by(Transform::Stack),
        tensor("ffn_up_exps", "block_sparse_moe.experts.{e}.w3").by(Transform::Stack),
        tensor("ffn_down_exps", "block_sparse_moe.experts.{e}.w2").by(Transform::Stack),
    ]
}

/// Microsoft 2024: Phi 3.5 with experts.
pub(super) const PHIMOE: HfFamily = HfFamily {
    model_types: &["phimoe"],
    architecture: "phimoe",
    outside: &[&[
        tensor("token_embd", "~embed_tokens"),
        tensor("output_norm", "~norm").bias(Always),
        tensor("output", "lm_head").when(Need::Untied).bias(If("lm_head_bias")),
    ]],
    layer: &[
        &[
            tensor("attn_norm", "input_layernorm").bias(Always),
            tensor("ffn_norm", "post_attention_layernorm").bias(Always),
            tensor("ffn_gate_inp", "block_sparse_moe.gate"),
        ],
        &attention(Copy, If("attention_bias"), If("attention_bias")),
        &mixtral_experts(),
    ],
    norm: NormKind::Layer,
    window: WindowRule::Always,
    defaults: &[&[("layer_norm_eps", "null")]],
    adjust: |_, sizes| {
        sizes.expert_ffn = sizes.ffn;
        Ok(())
    },
    keys: |keys| {
        keys.experts(false)?;
        keys.copy("expert_jitter", "router_jitter_noise")
    },
    ..BASE
};

/// IBM Granite 3 with experts.
pub(super) const GRANITE_MOE: HfFamily = HfFamily {
    model_types: &["granitemoe"],
    architecture: "granitemoe",
    layer: &[NORMS, &attention(PairNeighbors, If("attention_bias"), If("attention_bias")), &GRANITE_EXPERTS],
    adjust: |_, sizes| {
        sizes.expert_ffn = sizes.ffn;
        Ok(())
    },
    keys: |keys| {
        keys.experts(true)?;
        (GRANITE.keys)(keys)
    },
    ..GRANITE
};

const GRANITE_EXPERTS: [Entry; 4] = [
    tensor("ffn_gate_inp", "block_sparse_moe.router.layer"),
    tensor("ffn_gate_exps", "block_sparse_moe.input_linear").by(RowsOfPart { part: 0, parts: 2 }),
    tensor("ffn_up_exps", "block_sparse_moe.input_linear").by(RowsOfPart { part: 1, parts: 2 }),
    tensor("ffn_down_exps", "block_sparse_moe.output_linear"),
];

/// IBM Granite 3 with experts and a shared one.
pub(super) const GRANITE_MOE_SHARED: HfFamily = HfFamily {
    model_types: &["granitemoeshared"],
    layer: &[
        NORMS,
        &attention(PairNeighbors, If("attention_bias"), If("attention_bias")),
        &GRANITE_EXPERTS,
        &[
            tensor("ffn_gate_shexp", "shared_mlp.input_linear").by(RowsOfPart { part: 0, parts: 2 }),
            tensor("ffn_up_shexp", "shared_mlp.input_linear").by(RowsOfPart { part: 1, parts: 2 }),
            tensor("ffn_down_shexp", "shared_mlp.output_linear"),
        ],
    ],
    adjust: |settings, sizes| {
        sizes.expert_ffn = sizes.ffn;
        sizes.shared_ffn = settings.count(&["shared_intermediate_size"])?;
        Ok(())
    },
    ..GRANITE_MOE
};

/// IBM Granite with windows and sinks.
pub(super) const GRANITE_SWA: HfFamily = HfFamily {
    model_types: &["granite_swa"],
    architecture: "granite_swa",
    layer: &[
        NORMS,
        &[tensor("attn_sinks", "self_attn.sinks").raw()],
        &attention(PairNeighbors, If("attention_bias"), If("attention_bias")),
        &gated(Always, If("mlp_bias")),
    ],
    window: WindowRule::FullFirst(4),
    keys: |keys| {
        keys.layer_bases()?;
        (GRANITE.keys)(keys)
    },
    ..GRANITE
};

/// IBM Granite with windows, sinks and experts.
pub(super) const GRANITE_MOE_SWA: HfFamily = HfFamily {
    model_types: &["granitemoe_swa"],
    layer: &[
        NORMS,
        &[
            tensor("attn_sinks", "self_attn.sinks").raw(),
            tensor("ffn_gate_inp", "block_sparse_moe.router"),
            tensor("ffn_gate_up_exps", "block_sparse_moe.experts.gate_up_proj").raw(),
            tensor("ffn_down_exps", "block_sparse_moe.experts.down_proj").raw(),
            tensor("ffn_up_shexp", "shared_mlp.input_linear").dims(&[Size::Hidden, Size::TwiceSharedFfn]),
            tensor("ffn_down_shexp", "shared_mlp.output_linear"),
        ],
        &attention(PairNeighbors, If("attention_bias"), If("attention_bias")),
    ],
    adjust: GRANITE_MOE_SHARED.adjust,
    keys: |keys| {
        keys.layer_bases()?;
        (GRANITE_MOE.keys)(keys)
    },
    ..GRANITE_SWA
};

/// JetBrains 2026.
pub(super) const MELLUM: HfFamily = HfFamily {
    model_types: &["mellum"],
    architecture: "mellum",
    layer: &[
        NORMS,
        &attention(Copy, If("attention_bias"), If("attention_bias")),
        &head_norms(Copy),
        &gated(Dense, Never),
        &[tensor("ffn_gate_inp", "mlp.gate").when(Sparse)],
        &expert_list("mlp.experts.{e}", Sparse),
    ],
    window: WindowRule::ListedOrNone,
    adjust: |settings, sizes| sparse_list(settings, sizes, |_| true),
    keys: |keys| {
        keys.plain_windows()?;
        keys.experts(keys.settings.switch("norm_topk_prob", true)?)
    },
    ..QWEN2
};

/// Poolside 2026.
pub(super) const LAGUNA: HfFamily = HfFamily {
    model_types: &["laguna"],
    architecture: "laguna",
    layer: &[
        NORMS,
        &attention(Copy, If("attention_bias"), If("attention_bias")),
        &head_norms(Copy),
        &[
            tensor("attn_gate", "self_attn.g_proj").when(Need::IfSo(gates_per_head)).dims(&[Size::Hidden, Size::Heads]),
            tensor("attn_gate", "self_attn.g_proj").when(Need::IfSo(|settings| Ok(!gates_per_head(settings)?))),
        ],
        &gated(Dense, Never),
        &routed("mlp.gate", "mlp.experts.e_score_correction_bias"),
        &expert_list("mlp.experts.{e}", Sparse),
        &shared_experts("mlp.shared_expert"),
    ],
    window: WindowRule::ListedOrNone,
    rotation: Rotation::Part,
    adjust: laguna_sizes,
    keys: |keys| {
        keys.plain_windows()?;
        keys.experts(true)?;
        keys.set("expert_gating_func", 2u32);
        keys.require("moe_apply_router_weight_on_input", false)?;
        keys.copy("expert_weights_scale", "moe_routed_scaling_factor")?;
        keys.copy("router_logit_softcapping", "moe_router_logit_softcapping")?;
        keys.leading_dense_layers();
        Ok(())
    },
    ..BASE
};

/// Whether there is one gate for each head, or one for each number.
fn gates_per_head(settings: &Settings) -> Result<bool> {
    match settings.get("gating") {
        None | Some(serde_json::Value::Bool(true)) => Ok(true),
        Some(serde_json::Value::String(kind)) if kind == "per-head" => Ok(true),
        Some(serde_json::Value::String(kind)) if kind == "per-element" => Ok(false),
        Some(other) => Err(settings.unsupported("gating", other, "supported: true, per-head, per-element")),
    }
}

fn laguna_sizes(settings: &Settings, sizes: &mut Sizes) -> Result<()> {
    sparse_list(settings, sizes, |layer| layer > 0)?;
    let heads = settings.per_layer("num_attention_heads_per_layer", sizes.layers, "a number of heads", |heads| {
        heads.as_u64().filter(|heads| (1..=1 << 24).contains(heads)).map(|heads| heads as usize)
    })?;
    if let Some(heads) = heads {
        let uniform = sizes.of_layer(None);
        sizes.set_layers(settings, heads.into_iter().map(|heads| LayerSizes { heads, ..uniform }))?;
    }
    Ok(())
}

/// Muse Glimmer: the text part.
pub(super) const MUSE_GLIMMER: HfFamily = HfFamily {
    model_types: &["muse_glimmer_text", "muse_glimmer"],
    architecture: "muse-glimmer",
    bases: &["model.language_model.", "language_model.model.", "model.", ""],
    outside: &[EMBEDDING],
    layer: &[
        &[
            tensor("attn_norm", "input_layernorm").by(AddOne),
            tensor("post_attention_norm", "post_attention_layernorm").by(AddOne),
            tensor("ffn_norm", "pre_feedforward_layernorm").by(AddOne),
            tensor("post_ffw_norm", "post_feedforward_layernorm").by(AddOne),
            tensor("attn_gate", "self_attn.gate_proj"),
        ],
        &attention(PairNeighbors, If("attention_bias"), If("attention_bias")),
        &gated(Always, Never),
    ],
    ignored: &["model.visual.", "model.vision_", "visual.", "vision_tower.", "model.multi_modal_projector."],
    activation: ActivationSource::Under(&["hidden_activation"]),
    defaults: &[&[("sliding_window_pattern", "4")]],
    window: WindowRule::Period(&["sliding_window_pattern"]),
    keys: |keys| {
        if keys.settings.get("layer_rope_theta").is_none() {
            keys.rotate_windows(true);
        }
        keys.layer_bases()?;
        keys.copy("final_logit_softcapping", "final_logit_softcapping")?;
        keys.copy("logit_scale", "output_multiplier")?;
        keys.copy("attention.post_norm_epsilon", "post_norm_eps")?;
        let factor = keys.settings.float(&["qk_scale_factor"])? as f32;
        let width = keys.sizes.head_dim;
        for layer in 0..keys.sizes.layers {
            keys.tensors.push((format!("blk.{layer}.attn_q_norm.weight"), vec![factor; width]));
            keys.tensors.push((format!("blk.{layer}.attn_k_norm.weight"), vec![1.0; width]));
        }
        Ok(())
    },
    ..BASE
};
