//! Google's Gemma: norms multiply by 1 + weight, and the output is always tied to the embedding.

use super::family::{ActivationSource, BASE, HfFamily, WindowRule};
use super::parts::{attention, gated, head_norms};
use crate::error::Result;
use crate::model::hf::entry::{Entry, Need, Transform, tensor};
use crate::model::hf::metadata::MetadataWriter;
use Need::{Always, If, Never};
use Transform::{AddOne, Copy};

/// Gemma Team 2024, arXiv 2403.08295.
pub(super) const GEMMA: HfFamily = HfFamily {
    model_types: &["gemma"],
    architecture: "gemma",
    outside: &[TIED],
    layer: &[
        &[tensor("attn_norm", "input_layernorm").by(AddOne), tensor("ffn_norm", "post_attention_layernorm").by(AddOne)],
        &attention(Copy, If("attention_bias"), If("attention_bias")),
        &gated(Always, Never),
    ],
    ignored: &["lm_head."],
    activation: ActivationSource::UnderForTanh(&["hidden_act"]),
    keys: |keys| keys.require("tie_word_embeddings", true),
    ..BASE
};

const TIED: &[Entry] = &[tensor("token_embd", "~embed_tokens"), tensor("output_norm", "~norm").by(AddOne)];

const FOUR_NORMS: &[Entry] = &[
    tensor("attn_norm", "input_layernorm").by(AddOne),
    tensor("post_attention_norm", "post_attention_layernorm").by(AddOne),
    tensor("ffn_norm", "pre_feedforward_layernorm").by(AddOne),
    tensor("post_ffw_norm", "post_feedforward_layernorm").by(AddOne),
];

/// Gemma Team 2024, arXiv 2408.00118.
pub(super) const GEMMA2: HfFamily = HfFamily {
    model_types: &["gemma2"],
    architecture: "gemma2",
    defaults: &[&[("sliding_window_pattern", "2")]],
    layer: &[FOUR_NORMS, &attention(Copy, If("attention_bias"), If("attention_bias")), &gated(Always, Never)],
    activation: ActivationSource::Under(&["hidden_activation"]),
    window: WindowRule::Period(&["sliding_window_pattern"]),
    keys: |keys| {
        keys.require("tie_word_embeddings", true)?;
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
pub(super) const GEMMA3: HfFamily = HfFamily {
    model_types: &["gemma3_text", "gemma3"],
    architecture: "gemma3",
    // The files of the larger models have few sizes.
    defaults: &[&[("rope_theta", "1e6"), ("rope_local_base_freq", "1e4"), ("sliding_window_pattern", "6")]],
    bases: &["language_model.model.", "model.language_model.", "model.", ""],
    layer: &[
        FOUR_NORMS,
        &attention(Copy, If("attention_bias"), If("attention_bias")),
        &head_norms(AddOne),
        &gated(Always, Never),
    ],
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
        keys.require("tie_word_embeddings", true)?;
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
