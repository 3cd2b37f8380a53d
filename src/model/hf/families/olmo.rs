//! OLMo, Cohere's and LG's families: norms without weights or after the layers, windows in most layers.

use super::family::{BASE, HfFamily, WindowRule};
use super::llama::{LLAMA, OLMO2};
use super::parts::{NORMS, attention, default_attention, expert_list, experts_of_ffn_width, gated, head_norms};
use crate::model::arch::NormKind;
use crate::model::hf::entry::{Need, Transform, Values, tensor};
use crate::model::hf::sizes::Size;
use Need::{Always, If, Never, Unless};
use Transform::{Copy, PairNeighbors};

/// Groeneveld et al. 2024, arXiv 2402.00838: norms without weights.
pub(super) const OLMO: HfFamily = HfFamily {
    model_types: &["olmo"],
    architecture: "olmo",
    outside: &[&[tensor("token_embd", "~embed_tokens"), tensor("output", "lm_head").when(Need::Untied)]],
    layer: &[&default_attention(PairNeighbors), &gated(Always, Never)],
    defaults: &[&[("layer_norm_eps", "1e-5")]],
    norm: NormKind::Layer,
    keys: |keys| keys.copy("attention.clamp_kqv", "clip_qkv"),
    ..LLAMA
};

/// Team OLMo 2025, arXiv 2512.13961.
pub(super) const OLMO3: HfFamily = HfFamily {
    model_types: &["olmo3"],
    window: WindowRule::Period(&["sliding_window_pattern"]),
    defaults: &[&[("sliding_window_pattern", "4"), ("rope_theta", "5e5")]],
    keys: |keys| {
        // The class takes `rope_theta` at the top for layers without a window only.
        let rotation = keys.settings.object("rope_parameters")?;
        let window = rotation.map(|rotation| rotation.object("sliding_attention")).transpose()?.flatten();
        let base = window.map(|window| window.optional_float(&["rope_theta"])).transpose()?.flatten();
        if base.is_none() && keys.windowed.contains(&true) {
            keys.set("rope.freq_base_swa", 500_000.0f32);
        }
        keys.plain_windows()
    },
    ..OLMO2
};

/// Muennighoff et al. 2024, arXiv 2409.02060.
pub(super) const OLMOE: HfFamily = HfFamily {
    model_types: &["olmoe"],
    architecture: "olmoe",
    layer: &[
        NORMS,
        &default_attention(Copy),
        &[
            tensor("attn_q_norm", "self_attn.q_norm").dims(&[Size::Queries]),
            tensor("attn_k_norm", "self_attn.k_norm").dims(&[Size::Keys]),
            tensor("ffn_gate_inp", "mlp.gate"),
        ],
        &expert_list("mlp.experts.{e}", Always),
    ],
    adjust: experts_of_ffn_width,
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
    outside: &[&[
        tensor("token_embd", "~embed_tokens"),
        tensor("output_norm", "~norm"),
        tensor("output", "lm_head").when(Unless("tie_word_embeddings")),
    ]],
    layer: &[
        &[
            tensor("attn_norm", "input_layernorm"),
            tensor("attn_q_norm", "self_attn.q_norm").when(If("use_qk_norm")).dims(&[Size::HeadDim, Size::Heads]),
            tensor("attn_k_norm", "self_attn.k_norm").when(If("use_qk_norm")).dims(&[Size::HeadDim, Size::KvHeads]),
        ],
        &default_attention(Copy),
        &gated(Always, Never),
    ],
    ignored: &["lm_head."],
    norm: NormKind::Layer,
    keys: |keys| keys.copy("logit_scale", "logit_scale"),
    ..BASE
};

/// Cohere 2025: Command R7B and A.
pub(super) const COHERE2: HfFamily = HfFamily {
    model_types: &["cohere2"],
    architecture: "cohere2",
    layer: &[&[tensor("attn_norm", "input_layernorm")], &default_attention(Copy), &gated(Always, Never)],
    window: WindowRule::Period(&["sliding_window_pattern", "_sliding_window_pattern"]),
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
        &head_norms(Values::Same),
        &[
            tensor("post_attention_norm", "post_attention_layernorm"),
            tensor("post_ffw_norm", "post_feedforward_layernorm"),
        ],
        &gated(Always, Never),
    ],
    window: WindowRule::Pattern("sliding_window_pattern"),
    keys: |keys| {
        let windowless = keys.settings.get("sliding_window").is_none();
        keys.rotate_windows(windowless);
        Ok(())
    },
    ..BASE
};
