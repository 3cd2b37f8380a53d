//! Google's Gemma: norms multiply by 1 + weight, and the output is always tied to the embedding.

use super::family::{ActivationSource, BASE, HfFamily, WindowRule};
use super::parts::{SCORE, default_attention, gated, head_norms};
use crate::error::Result;
use crate::model::hf::entry::{Entry, Need, Transform, Values, tensor};
use crate::model::hf::heads::is_headless;
use crate::model::hf::keys;
use crate::model::hf::metadata::MetadataWriter;
use crate::model::hf::settings::Settings;
use crate::model::hf::sizes::{LayerSizes, Size, Sizes};
use Need::{Always, If, Never};
use Transform::{Copy, Stack};
use Values::AddOne;

/// Gemma Team 2024, arXiv 2403.08295.
pub(super) const GEMMA: HfFamily = HfFamily {
    model_types: &["gemma"],
    architecture: "gemma",
    outside: &[TIED],
    layer: &[
        &[
            tensor("attn_norm", "input_layernorm").mapped(AddOne),
            tensor("ffn_norm", "post_attention_layernorm").mapped(AddOne),
        ],
        &default_attention(Copy),
        &gated(Always, Never),
    ],
    ignored: &["lm_head."],
    activation: ActivationSource::UnderForTanh(&["hidden_act"]),
    ..BASE
};

const TIED: &[Entry] =
    &[tensor("token_embd", "~embed_tokens"), tensor("output_norm", "~norm").mapped(AddOne), OUTPUT, SCORE];

/// The output matrix of models whose configuration unties it.
const OUTPUT: Entry = tensor("output", "@lm_head").when(Need::IfSo(is_untied));

/// Whether the model generates by a matrix of its own.
pub(super) fn is_untied(settings: &Settings) -> Result<bool> {
    Ok(!settings.switch("tie_word_embeddings", false)? && !is_headless(settings)?)
}

const FOUR_NORMS: &[Entry] = &[
    tensor("attn_norm", "input_layernorm").mapped(AddOne),
    tensor("post_attention_norm", "post_attention_layernorm").mapped(AddOne),
    tensor("ffn_norm", "pre_feedforward_layernorm").mapped(AddOne),
    tensor("post_ffw_norm", "post_feedforward_layernorm").mapped(AddOne),
];

/// Gemma Team 2024, arXiv 2408.00118.
pub(super) const GEMMA2: HfFamily = HfFamily {
    model_types: &["gemma2"],
    architecture: "gemma2",
    defaults: &[&[("sliding_window_pattern", "2")]],
    layer: &[FOUR_NORMS, &default_attention(Copy), &gated(Always, Never)],
    activation: ActivationSource::Under(&["hidden_activation"]),
    window: WindowRule::Period(&["sliding_window_pattern"]),
    keys: |keys| {
        scale(keys)?;
        // Readers assume a cap where the key is missing, so no cap is written as 0.
        for key in ["attn_logit_softcapping", "final_logit_softcapping"] {
            let cap = keys.settings.optional_float(&[key])?.unwrap_or(0.0);
            keys.set(key, cap as f32);
        }
        Ok(())
    },
    ..GEMMA
};

/// Gemma Team 2025, arXiv 2503.19786: the text part.
pub(super) const GEMMA3: HfFamily = HfFamily { bidirectional: Some(&GEMMA_EMBEDDING), ..GEMMA3_CAUSAL };

/// Schechter Vera et al. 2025, arXiv 2509.20354: EmbeddingGemma.
const GEMMA_EMBEDDING: HfFamily =
    HfFamily { architecture: "gemma-embedding", encoder: true, radius: false, ..GEMMA3_CAUSAL };

const GEMMA3_CAUSAL: HfFamily = HfFamily {
    model_types: &["gemma3_text", "gemma3"],
    architecture: "gemma3",
    // The files of the larger models have few sizes.
    defaults: &[&[("rope_theta", "1e6"), ("rope_local_base_freq", "1e4"), ("sliding_window_pattern", "6")]],
    bases: &["language_model.model.", "model.language_model.", "model.", ""],
    layer: &[FOUR_NORMS, &default_attention(Copy), &head_norms(AddOne), &gated(Always, Never)],
    ignored: &[
        "lm_head.",
        "language_model.lm_head.",
        "vision_tower.",
        "multi_modal_projector.",
        "model.vision_tower.",
        "model.multi_modal_projector.",
    ],
    activation: ActivationSource::Under(&["hidden_activation"]),
    window: WindowRule::Period(&["sliding_window_pattern", "_sliding_window_pattern"]),
    keys: |keys| {
        scale(keys)?;
        if keys.settings.get("attn_logit_softcapping").is_some() {
            let key = "attn_logit_softcapping";
            return Err(keys.settings.unsupported(key, "a cap in Gemma 3", "supported: null"));
        }
        keys.copy("final_logit_softcapping", "final_logit_softcapping")
    },
    ..GEMMA
};

/// Writes the factor of the scores.
fn scale(keys: &mut MetadataWriter<'_>) -> Result<()> {
    let scalar = keys.settings.float(&["query_pre_attn_scalar"])?;
    if scalar <= 0.0 {
        return Err(keys.settings.malformed("query_pre_attn_scalar", scalar, "a positive number"));
    }
    keys.set("attention.scale", scalar.sqrt().recip() as f32);
    Ok(())
}

/// The table of per-layer vectors and what makes them.
const PER_LAYER: [Entry; 3] = [
    tensor("per_layer_token_embd", "~embed_tokens_per_layer").by(Transform::PadRows).when(Need::IfSo(has_layer_inputs)),
    tensor("per_layer_model_proj", "~per_layer_model_projection").when(Need::IfSo(has_layer_inputs)),
    tensor("per_layer_proj_norm", "~per_layer_projection_norm").when(Need::IfSo(has_layer_inputs)),
];

/// What a layer makes of its own vector.
const LAYER_INPUT: [Entry; 3] = [
    tensor("inp_gate", "per_layer_input_gate").when(Need::IfSo(has_layer_inputs)),
    tensor("proj", "per_layer_projection").when(Need::IfSo(has_layer_inputs)),
    tensor("post_norm", "post_per_layer_input_norm").when(Need::IfSo(has_layer_inputs)),
];

fn has_layer_inputs(settings: &Settings) -> Result<bool> {
    Ok(settings.number(&["hidden_size_per_layer_input"])? > 0)
}

/// Norms with plain weights, around both branches.
pub(super) const PLAIN_NORMS: [Entry; 4] = [
    tensor("attn_norm", "input_layernorm"),
    tensor("post_attention_norm", "post_attention_layernorm"),
    tensor("ffn_norm", "pre_feedforward_layernorm"),
    tensor("post_ffw_norm", "post_feedforward_layernorm"),
];

/// Query, key and value with their norms. Keys and values of layers that share those of others may be missing.
const SHARED_ATTENTION: [Entry; 6] = [
    tensor("attn_q", "self_attn.q_proj").bias(If("attention_bias")),
    tensor("attn_k", "self_attn.k_proj").when(Need::Where(has_keys)).bias(If("attention_bias")),
    tensor("attn_v", "self_attn.v_proj").when(Need::Where(has_values)).bias(Need::Optional),
    tensor("attn_output", "self_attn.o_proj").bias(If("attention_bias")),
    tensor("attn_q_norm", "self_attn.q_norm"),
    tensor("attn_k_norm", "self_attn.k_norm").when(Need::Where(has_keys)),
];

fn has_keys(sizes: &Sizes, layer: usize) -> bool {
    layer < sizes.layers - sizes.shared_kv_layers
}

fn has_values(sizes: &Sizes, layer: usize) -> bool {
    has_keys(sizes, layer) && !sizes.of_layer(Some(layer)).keys_are_values
}

/// Keys and values that layers have but do not use.
const UNUSED: &[&str] = &[
    ".self_attn.k_proj.weight",
    ".self_attn.v_proj.weight",
    ".self_attn.k_norm.weight",
    ".self_attn.k_proj.bias",
    ".self_attn.v_proj.bias",
    ".altup.correct_output_scale",
];

const OTHER_PARTS: &[&str] = &[
    "lm_head.",
    "language_model.lm_head.",
    "vision_tower.",
    "audio_tower.",
    "embed_vision.",
    "embed_audio.",
    "multi_modal_projector.",
    "model.vision_tower.",
    "model.audio_tower.",
    "model.embed_vision.",
    "model.embed_audio.",
    "model.multi_modal_projector.",
];

/// The several residual streams of a layer, and its low-rank branch.
const STREAMS: &[Entry] = &[
    tensor("altup_correct_scale", "altup.correct_output_scale").raw().when(If("altup_correct_scale")),
    tensor("altup_correct_coef", "altup.correction_coefs"),
    tensor("altup_predict_coef", "altup.prediction_coefs"),
    tensor("altup_router", "altup.modality_router"),
    tensor("altup_router_norm", "altup.router_norm"),
    tensor("laurel_l", "laurel.linear_left"),
    tensor("laurel_r", "laurel.linear_right"),
    tensor("laurel_post_norm", "laurel.post_laurel_norm"),
];

/// Google 2025: Gemma 3n, the text part.
pub(super) const GEMMA3N: HfFamily = HfFamily {
    model_types: &["gemma3n_text", "gemma3n"],
    // Training clips.
    without_influence: &["altup_coef_clip"],
    architecture: "gemma3n",
    defaults: &[&[("sliding_window_pattern", "5"), ("rope_theta", "1e6"), ("rope_local_base_freq", "1e4")]],
    bases: &["model.language_model.", "language_model.model.", "model.", ""],
    outside: &[
        &[
            tensor("token_embd", "~embed_tokens"),
            tensor("output_norm", "~norm"),
            OUTPUT,
            tensor("altup_proj", "~altup_projections.{e}").by(Stack),
            tensor("altup_unembd_proj", "~altup_unembed_projections.{e}").by(Stack),
        ],
        &PER_LAYER,
    ],
    layer: &[&PLAIN_NORMS, &SHARED_ATTENTION, &gated(Always, Never), &LAYER_INPUT, STREAMS],
    ignored: OTHER_PARTS,
    unused: UNUSED,
    activation: ActivationSource::Under(&["hidden_activation"]),
    window: WindowRule::Period(&["sliding_window_pattern", "_sliding_window_pattern"]),
    adjust: |settings, sizes| {
        layer_inputs(settings, sizes)?;
        let uniform = sizes.of_layer(None);
        let widths = sizes.ffn_list.clone();
        if widths.iter().any(|width| *width != uniform.ffn) {
            sizes.set_layers(settings, widths.into_iter().map(|ffn| LayerSizes { ffn, ..uniform }))?;
        }
        sizes.streams = settings.count(&["altup_num_inputs"])?;
        sizes.low_rank = settings.count(&["laurel_rank"])?;
        shared_kv_layers(settings, sizes)
    },
    keys: |keys| {
        let settings = keys.settings;
        if !settings.switch("altup_correct_scale", true)? {
            for layer in 0..keys.sizes.layers {
                let ones = vec![1.0; keys.sizes.hidden];
                keys.tensors.push((format!("blk.{layer}.altup_correct_scale.weight"), ones));
            }
        }
        keys.set("altup.num_inputs", keys.sizes.streams as u32);
        let active = settings.number(&["altup_active_idx"])?;
        keys.set("altup.active_idx", active as u32);
        keys.set("embedding_length_per_layer_input", keys.sizes.per_layer_input as u32);
        keys.set("attention.shared_kv_layers", keys.sizes.shared_kv_layers as u32);
        keys.set("activation_sparsity_scale", sparsity(keys)?);
        keys.copy("final_logit_softcapping", "final_logit_softcapping")
    },
    ..GEMMA
};

/// Reads the sizes of the vectors that each layer has of a token.
fn layer_inputs(settings: &Settings, sizes: &mut Sizes) -> Result<()> {
    sizes.per_layer_input = settings.number(&["hidden_size_per_layer_input"])?;
    let rows = settings.optional_count(&["vocab_size_per_layer_input"])?;
    sizes.input_vocabulary = rows.unwrap_or(sizes.vocabulary);
    Ok(())
}

fn shared_kv_layers(settings: &Settings, sizes: &mut Sizes) -> Result<()> {
    let shared = settings.number(&["num_kv_shared_layers"])?;
    if shared >= sizes.layers {
        let expected = format_args!("fewer than the {} layers", sizes.layers);
        return Err(settings.malformed("num_kv_shared_layers", shared, expected));
    }
    sizes.shared_kv_layers = shared;
    Ok(())
}

/// For each layer the number of deviations above the mean from which a gate counts: the quantile of the normal distribution
/// at the share of gates that do not.
fn sparsity(keys: &MetadataWriter<'_>) -> Result<Vec<f32>> {
    let layers = keys.sizes.layers;
    let share = |value: &serde_json::Value| value.as_f64().filter(|share| (0.0..1.0).contains(share));
    let key = "activation_sparsity_pattern";
    let listed = match keys.settings.get(key) {
        // One number for all layers.
        Some(value) if value.is_number() => share(&value).map(|share| vec![share; layers]),
        _ => keys.settings.per_layer(key, layers, "a share from 0 to 1", share)?,
    };
    let sparse = if layers > 10 { 10 } else { 0 };
    let shares = listed.unwrap_or_else(|| (0..layers).map(|layer| if layer < sparse { 0.95 } else { 0.0 }).collect());
    Ok(shares.into_iter().map(|share| if share > 0.0 { quantile(share) as f32 } else { f32::NEG_INFINITY }).collect())
}

/// The quantile of the normal distribution: the number below which this share of it lies. By bisection of its integral.
fn quantile(share: f64) -> f64 {
    let (mut low, mut high) = (-40.0, 40.0);
    for _ in 0..200 {
        let middle = (low + high) / 2.0;
        let below = 0.5 * libm::erfc(-middle * std::f64::consts::FRAC_1_SQRT_2);
        (low, high) = if below < share { (middle, high) } else { (low, middle) };
    }
    (low + high) / 2.0
}

/// The factor of a layer, and experts next to its feed-forward network.
const EXPERTS_AND_SCALE: &[Entry] = &[
    tensor("layer_output_scale", "layer_scalar").raw(),
    tensor("post_ffw_norm_1", "post_feedforward_layernorm_1").when(If("enable_moe_block")),
    tensor("post_ffw_norm_2", "post_feedforward_layernorm_2").when(If("enable_moe_block")),
    tensor("pre_ffw_norm_2", "pre_feedforward_layernorm_2").when(If("enable_moe_block")),
    tensor("ffn_gate_inp", "router.proj").when(If("enable_moe_block")),
    tensor("ffn_gate_inp", "router.scale").raw().named(".scale").dims(&[Size::Hidden]).when(If("enable_moe_block")),
    tensor("ffn_down_exps", "router.per_expert_scale")
        .raw()
        .named(".scale")
        .dims(&[Size::Experts])
        .when(If("enable_moe_block")),
    tensor("ffn_gate_up_exps", "experts.gate_up_proj").raw().when(If("enable_moe_block")),
    tensor("ffn_down_exps", "experts.down_proj").raw().when(If("enable_moe_block")),
];

/// Google 2026: Gemma 4, the text part.
pub(super) const GEMMA4: HfFamily = HfFamily {
    model_types: &["gemma4_text", "gemma4", "gemma4_unified", "gemma4_unified_text"],
    without_influence: &[],
    architecture: "gemma4",
    defaults: &[&[("sliding_window_pattern", "6")]],
    outside: &[&[tensor("token_embd", "~embed_tokens"), tensor("output_norm", "~norm"), OUTPUT], &PER_LAYER],
    layer: &[&PLAIN_NORMS, &SHARED_ATTENTION, &gated(Always, Never), &LAYER_INPUT, EXPERTS_AND_SCALE],
    adjust: gemma4_sizes,
    keys: |keys| {
        keys.set("embedding_length_per_layer_input", keys.sizes.per_layer_input as u32);
        keys.set("attention.shared_kv_layers", keys.sizes.shared_kv_layers as u32);
        if keys.sizes.experts > 0 {
            keys.experts_used(&["top_k_experts"], true)?;
        }
        keys.copy("final_logit_softcapping", "final_logit_softcapping")
    },
    ..GEMMA3N
};

/// Layers with full attention have heads of another width, and in some models fewer keys, which are values as well.
fn gemma4_sizes(settings: &Settings, sizes: &mut Sizes) -> Result<()> {
    layer_inputs(settings, sizes)?;
    shared_kv_layers(settings, sizes)?;
    if !settings.switch("enable_moe_block", false)? {
        sizes.experts = 0;
    }
    let same = settings.switch("attention_k_eq_v", false)?;
    let double = settings.switch("use_double_wide_mlp", false)?;
    let global = settings.optional_count(&["global_head_dim"])?.unwrap_or(512);
    let global_kv = settings.optional_count(&["num_global_key_value_heads"])?.filter(|_| same);
    let slides = keys::window_kinds(settings, sizes.layers, WindowRule::Period(&["sliding_window_pattern"]))?;
    let layer = PerLayerSizes { slides, global, global_kv, same, double };
    per_layer_sizes(settings, sizes, &layer)
}

/// What layers with full attention have of their own.
pub(super) struct PerLayerSizes {
    /// `(layers)`: whether a layer has a window.
    pub(super) slides: Vec<bool>,
    /// Width of a head, and key and value heads where their number differs.
    pub(super) global: usize,
    pub(super) global_kv: Option<usize>,
    /// Whether values are copies of keys.
    pub(super) same: bool,
    /// Whether layers that share keys have a wide feed-forward layer.
    pub(super) double: bool,
}

/// Sets the sizes of layers with a window and of the others, as far as `per_layer_config` does not list them.
pub(super) fn per_layer_sizes(settings: &Settings, sizes: &mut Sizes, own: &PerLayerSizes) -> Result<()> {
    let PerLayerSizes { slides, global, global_kv, same, double } = own;
    let (global, global_kv, same, double) = (*global, *global_kv, *same, *double);
    let overrides = settings.object("per_layer_config")?;
    let uniform = sizes.of_layer(None);
    let mut layers = Vec::with_capacity(sizes.layers);
    for (layer, slides) in slides.iter().enumerate() {
        let own = match &overrides {
            Some(overrides) => overrides.object(&layer.to_string())?,
            None => None,
        };
        let (head_dim, kv_heads) = match (&own, &overrides) {
            (Some(own), _) => (own.optional_count(&["head_dim"])?, own.optional_count(&["num_key_value_heads"])?),
            (None, Some(_)) => (None, None),
            (None, None) if *slides => (None, None),
            (None, None) => (Some(global), global_kv),
        };
        let wide = double && layer >= sizes.layers - sizes.shared_kv_layers;
        layers.push(LayerSizes {
            heads: uniform.heads,
            kv_heads: kv_heads.unwrap_or(uniform.kv_heads),
            head_dim: head_dim.unwrap_or(uniform.head_dim),
            ffn: uniform.ffn * if wide { 2 } else { 1 },
            keys_are_values: same && !slides,
        });
    }
    for kind in [false, true] {
        let mut widths =
            slides.iter().zip(&layers).filter(|(slides, _)| **slides == kind).map(|(_, layer)| layer.head_dim);
        let Some(first) = widths.next() else { continue };
        if let Some(other) = widths.find(|other| *other != first) {
            let what = format_args!("heads of {first} and of {other} numbers in layers of one kind");
            return Err(settings.unsupported("per_layer_config", what, "supported: one width for each kind of layer"));
        }
        if kind {
            sizes.window_head_dim = first;
        } else {
            sizes.head_dim = first;
        }
    }
    if !slides.contains(&false) {
        sizes.head_dim = sizes.window_head_dim;
    }
    sizes.set_layers(settings, layers.into_iter())
}
