//! Families of 2024 to 2026 that go ways of their own.

use super::family::{ActivationSource, BASE, HfFamily, Rotation, WindowRule};
use super::llama::LLAMA;
use super::parts::{
    NORMS, attention, default_attention, expert_list, experts_of_ffn_width, gated, head_norms, named_embedding,
    rotating_layers, routed, shared_experts, sparse_list, tied_with_bias,
};
use super::qwen::QWEN2;
use crate::error::Result;
use crate::model::arch::NormKind;
use crate::model::hf::entry::{Entry, Need, Transform, Values, tensor};
use crate::model::hf::keys::window_kinds;
use crate::model::hf::metadata::MetadataWriter;
use crate::model::hf::mtp::{HfHead, MELLUM_HEAD};
use crate::model::hf::settings::Settings;
use crate::model::hf::sizes::{LayerSizes, Size, Sizes};
use Need::{Always, Dense, If, Never, Sparse};
use Transform::{ColumnsOfPart, Copy, EveryNth, PairNeighbors};
use Values::AddOne;

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
        &default_attention(Copy),
        &GPT_OSS_EXPERTS,
    ],
    window: WindowRule::Period(&["sliding_window_pattern"]),
    defaults: &[&[("sliding_window_pattern", "2")]],
    adjust: experts_of_ffn_width,
    keys: |keys| {
        keys.experts(true)?;
        keys.set("expert_gating_func", 3u32);
        for (key, name, default) in
            [("expert_gate_alpha", "swiglu_alpha", 1.702), ("expert_gate_limit", "swiglu_limit", 7.0)]
        {
            let number = keys.settings.optional_float(&[name])?.unwrap_or(default);
            if number <= 0.0 {
                return Err(keys.settings.malformed(name, number, "a positive number"));
            }
            if number != default {
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
    without_influence: &["router_jitter_noise"],
    architecture: "llama4",
    bases: &["language_model.model.", "model.language_model.", "model.", ""],
    outside: &[&[
        tensor("token_embd", "~embed_tokens"),
        tensor("output_norm", "~norm"),
        tensor("output", "@lm_head").when(Need::Untied),
    ]],
    layer: &[
        NORMS,
        &default_attention(Copy),
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
        // The second name is that of older files.
        let (new, old) = (keys.settings.object("rope_parameters")?, keys.settings.object("rope_scaling")?);
        let Some(rope) = [new, old].into_iter().flatten().find(|rope| !rope.is_empty()) else { return Ok(()) };
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
        &default_attention(PairNeighbors),
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
        &default_attention(Copy),
        &head_norms(Values::Same),
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
        &default_attention(Copy),
        &gated(Always, Never),
        &[tensor("attn_sub_norm", "self_attn.attn_sub_norm"), tensor("ffn_sub_norm", "mlp.ffn_sub_norm")],
    ],
    ..BASE
};

/// Parmar et al. 2024, arXiv 2402.16819: LayerNorm with 1 + weight.
pub(super) const NEMOTRON: HfFamily = HfFamily {
    model_types: &["nemotron"],
    architecture: "nemotron",
    outside: &[&[
        tensor("token_embd", "~embed_tokens"),
        tensor("output_norm", "~norm").mapped(AddOne).bias(Always),
        tensor("output", "lm_head").when(Need::Untied),
    ]],
    layer: &[
        &[
            tensor("attn_norm", "input_layernorm").mapped(AddOne).bias(Always),
            tensor("ffn_norm", "post_attention_layernorm").mapped(AddOne).bias(Always),
            tensor("ffn_up", "mlp.up_proj").bias(If("mlp_bias")),
            tensor("ffn_down", "mlp.down_proj").bias(If("mlp_bias")),
        ],
        &default_attention(Copy),
    ],
    defaults: &[&[("partial_rotary_factor", "0.5")]],
    norm: NormKind::Layer,
    rotation: Rotation::Part,
    ..BASE
};

/// Experts under the names of Mixtral.
pub(super) const fn mixtral_experts() -> [Entry; 3] {
    [
        tensor("ffn_gate_exps", "block_sparse_moe.experts.{e}.w1").by(Transform::Stack),
        tensor("ffn_up_exps", "block_sparse_moe.experts.{e}.w3").by(Transform::Stack),
        tensor("ffn_down_exps", "block_sparse_moe.experts.{e}.w2").by(Transform::Stack),
    ]
}

/// Microsoft 2024: Phi 3.5 with experts.
pub(super) const PHIMOE: HfFamily = HfFamily {
    model_types: &["phimoe"],
    without_influence: &["input_jitter_noise"],
    architecture: "phimoe",
    outside: &[
        &named_embedding("~embed_tokens", "~norm", tensor("output", "lm_head")),
        &tied_with_bias("lm_head_bias"),
    ],
    layer: &[
        &[
            tensor("attn_norm", "input_layernorm").bias(Always),
            tensor("ffn_norm", "post_attention_layernorm").bias(Always),
            tensor("ffn_gate_inp", "block_sparse_moe.gate"),
        ],
        &default_attention(Copy),
        &mixtral_experts(),
    ],
    norm: NormKind::Layer,
    window: WindowRule::Always,
    adjust: experts_of_ffn_width,
    keys: |keys| {
        keys.experts(false)?;
        // The router always chooses two.
        keys.set("expert_used_count", 2u32);
        keys.copy("expert_jitter", "router_jitter_noise")?;
        phimoe_magnitude(keys)
    },
    ..BASE
};

/// Sets the magnitude of a stretched rotation, for which the class has keys of its own.
fn phimoe_magnitude(keys: &mut MetadataWriter<'_>) -> Result<()> {
    let settings = keys.settings;
    let stretched = match settings.object("rope_scaling")?.filter(|rope| !rope.is_empty()) {
        Some(rope) => Some(rope),
        None => settings.object("rope_parameters")?,
    };
    let Some(rope) = stretched else { return Ok(()) };
    let kind = rope.text(&["rope_type", "type"])?.unwrap_or_default();
    match kind.as_str() {
        "" | "default" => return Ok(()),
        "longrope" | "su" => {}
        other => {
            let supported = "supported in this family: default, longrope";
            return Err(rope.unsupported("rope_type", format_args!("{other:?}"), supported));
        }
    }
    let (short, long) = (rope.float(&["short_mscale"])?, rope.float(&["long_mscale"])?);
    if short != long {
        let supported = format!("supported: {short}, as short_mscale");
        return Err(rope.unsupported("long_mscale", long, &supported));
    }
    keys.set("rope.scaling.attn_factor", long as f32);
    // The class computes with the short factors in any context.
    let short = keys.tensors.iter().find(|(name, _)| name.starts_with("rope_factors_short")).map(|(_, x)| x.clone());
    let long = keys.tensors.iter_mut().find(|(name, _)| name.starts_with("rope_factors_long"));
    if let (Some(short), Some((_, long))) = (short, long) {
        *long = short;
    }
    Ok(())
}

/// JetBrains 2026.
pub(super) const MELLUM: HfFamily = HfFamily {
    model_types: &["mellum"],
    without_influence: &["num_mtp_layers"],
    architecture: "mellum",
    layer: &[
        NORMS,
        &default_attention(Copy),
        &head_norms(Values::Same),
        &gated(Dense, Never),
        &[tensor("ffn_gate_inp", "mlp.gate").when(Sparse)],
        &expert_list("mlp.experts.{e}", Sparse),
    ],
    mtp: Some(MELLUM_MTP),
    window: WindowRule::ListedOrNone,
    rotation: Rotation::Part,
    adjust: |settings, sizes| sparse_list(settings, sizes, |_| true),
    keys: |keys| {
        keys.plain_windows()?;
        keys.experts(keys.settings.switch("norm_topk_prob", true)?)
    },
    ..QWEN2
};

/// Its head, whose layer has a window unless the configuration says otherwise.
const MELLUM_MTP: HfHead = HfHead {
    like: |settings, sizes| {
        let slides = window_kinds(settings, sizes.layers, WindowRule::ListedOrNone)?;
        let wanted = mtp_kind(settings, "mtp_layer_types", ["full_attention", "sliding_attention"])?;
        let wanted = wanted && settings.get("sliding_window").is_some();
        slides.iter().rposition(|slides| *slides == wanted).ok_or_else(|| {
            let supported = "supported: a kind of attention that a layer of the model has";
            settings.unsupported("mtp_layer_types", "another kind of attention than all layers have", supported)
        })
    },
    sparse: |settings| mtp_kind(settings, "mtp_mlp_layer_types", ["dense", "sparse"]),
    ..MELLUM_HEAD
};

/// Which of two kinds the layer of a head has by the first entry of the list under `key`; the second without a list.
fn mtp_kind(settings: &Settings, key: &str, [first, second]: [&str; 2]) -> Result<bool> {
    let listed = settings.get(key).and_then(|kinds| kinds.as_array().and_then(|kinds| kinds.first().cloned()));
    match listed.as_ref().map(|kind| kind.as_str()) {
        None => Ok(true),
        Some(Some(kind)) if kind == first => Ok(false),
        Some(Some(kind)) if kind == second => Ok(true),
        Some(other) => {
            let found = format!("{:?}", other.unwrap_or_default());
            Err(settings.unsupported(key, found, &format!("supported: {first}, {second}")))
        }
    }
}

/// Poolside 2026.
pub(super) const LAGUNA: HfFamily = HfFamily {
    model_types: &["laguna"],
    architecture: "laguna",
    layer: &[
        NORMS,
        &default_attention(Copy),
        &head_norms(Values::Same),
        &[
            tensor("attn_gate", "self_attn.g_proj").when(Need::IfSo(gates_per_head)).dims(&[Size::Hidden, Size::Heads]),
            tensor("attn_gate", "self_attn.g_proj").when(Need::IfSo(|settings| Ok(!gates_per_head(settings)?))),
        ],
        &gated(Dense, Never),
        &routed("mlp.gate", "mlp.experts.e_score_correction_bias"),
        &expert_list("mlp.experts.{e}", Sparse),
        &shared_experts("mlp.shared_expert", Never),
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
        // The class has gates whatever the switch says.
        Some(serde_json::Value::Bool(false)) => Ok(false),
        Some(other) => Err(settings.unsupported("gating", other, "supported: true, false, per-head, per-element")),
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
    outside: &[&[
        tensor("token_embd", "~embed_tokens").by(Transform::Placeholders),
        tensor("output_norm", "~norm"),
        tensor("output", "@lm_head").when(Need::Untied),
    ]],
    adjust: |settings, sizes| {
        for (token, key) in sizes.placeholders.iter_mut().zip(["image_token_id", "video_token_id"]) {
            if settings.get(key).is_some() {
                *token = settings.number(&[key])?;
            }
        }
        Ok(())
    },
    layer: &[
        &[
            tensor("attn_norm", "input_layernorm").mapped(AddOne),
            tensor("post_attention_norm", "post_attention_layernorm").mapped(AddOne),
            tensor("ffn_norm", "pre_feedforward_layernorm").mapped(AddOne),
            tensor("post_ffw_norm", "post_feedforward_layernorm").mapped(AddOne),
            tensor("attn_gate", "self_attn.gate_proj"),
        ],
        &default_attention(PairNeighbors),
        &gated(Always, Never),
    ],
    ignored: &["model.visual.", "model.vision_", "visual.", "vision_tower.", "model.multi_modal_projector."],
    activation: ActivationSource::Under(&["hidden_activation"]),
    defaults: &[&[("sliding_window_pattern", "4")]],
    window: WindowRule::Period(&["sliding_window_pattern"]),
    keys: |keys| {
        // The class reads only whether a base is 0.
        let layers = keys.sizes.layers;
        let base = |base: &serde_json::Value| base.as_f64().map(|base| base != 0.0);
        match keys.settings.per_layer("layer_rope_theta", layers, "a base, or 0", base)? {
            Some(rotated) => keys.set("attention.rope_pattern", rotated),
            None => keys.rotate_windows(true),
        }
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
