//! DeepSeek V2 and V3, and GLM 4 Lite: latent attention.

use super::family::{BASE, HfFamily, Rotation};
use super::parts::{DEEPSEEK_EXPERTS, NORMS, expert_list, first_dense, gated, shared_experts, sparse_list};
use crate::error::Result;
use crate::model::hf::entry::{Entry, Need, Transform, tensor};
use crate::model::hf::metadata::MetadataWriter;
use crate::model::hf::settings::Settings;
use crate::model::hf::sizes::{LatentSizes, Size, Sizes};
use Need::{Dense, If, Never, Sparse};
use Transform::{LatentKeys, LatentPairs, LatentValues};

/// The projections of latent attention.
pub(super) const LATENT_ATTENTION: [Entry; 9] = [
    tensor("attn_q", "self_attn.q_proj")
        .by(LatentPairs)
        .when(Need::Where(|sizes, _| sizes.latent.q_rank == 0))
        .dims(&[Size::Hidden, Size::LatentQueries]),
    tensor("attn_q_a", "self_attn.q_a_proj").when(Need::Where(has_q_rank)).bias(Need::Optional),
    tensor("attn_q_a_norm", "self_attn.q_a_layernorm").when(Need::Where(has_q_rank)),
    tensor("attn_q_b", "self_attn.q_b_proj").by(LatentPairs).when(Need::Where(has_q_rank)),
    tensor("attn_kv_a_mqa", "self_attn.kv_a_proj_with_mqa").by(LatentPairs).bias(If("attention_bias")),
    tensor("attn_kv_a_norm", "self_attn.kv_a_layernorm"),
    tensor("attn_k_b", "self_attn.kv_b_proj").by(LatentKeys),
    tensor("attn_v_b", "self_attn.kv_b_proj").by(LatentValues),
    tensor("attn_output", "self_attn.o_proj").bias(If("attention_bias")).dims(&[Size::LatentValues, Size::Hidden]),
];

fn has_q_rank(sizes: &Sizes, _: usize) -> bool {
    sizes.latent.q_rank > 0
}

/// DeepSeek-AI 2024, arXiv 2405.04434.
pub(super) const DEEPSEEK_V2: HfFamily = HfFamily {
    model_types: &["deepseek_v2"],
    // The class does not divide weights, whatever this says.
    without_influence: &["norm_topk_prob"],
    architecture: "deepseek2",
    layer: &[
        NORMS,
        &LATENT_ATTENTION,
        &gated(Dense, If("mlp_bias")),
        &[tensor("ffn_gate_inp", "mlp.gate").when(Sparse)],
        &expert_list("mlp.experts.{e}", Sparse),
        &shared_experts("mlp.shared_experts", If("mlp_bias")),
    ],
    rotation: Rotation::Latent,
    adjust: |settings, sizes| {
        first_dense(settings, sizes)?;
        latent(settings, sizes)
    },
    keys: |keys| {
        keys.experts(false)?;
        let settings = keys.settings;
        keys.set("expert_gating_func", 1u32);
        keys.copy("expert_weights_scale", "routed_scaling_factor")?;
        let method = settings.text(&["topk_method"])?.unwrap_or_else(|| "greedy".to_owned());
        match method.as_str() {
            "greedy" => {}
            "group_limited_greedy" => {
                keys.groups()?;
                keys.set("expert_group_best", 1u32);
            }
            other => {
                let supported = "supported: greedy, group_limited_greedy";
                return Err(settings.unsupported("topk_method", format_args!("{other:?}"), supported));
            }
        }
        latent_keys(keys)
    },
    ..BASE
};

/// DeepSeek-AI 2024, arXiv 2412.19437.
pub(super) const DEEPSEEK_V3: HfFamily = HfFamily {
    model_types: &["deepseek_v3"],
    without_influence: &["num_mtp_layers"],
    layer: &[NORMS, &LATENT_ATTENTION, &gated(Dense, Never), &DEEPSEEK_EXPERTS],
    keys: |keys| {
        keys.sigmoid_router()?;
        latent_keys(keys)
    },
    ..DEEPSEEK_V2
};

/// GLM 4.7 Flash and others.
pub(super) const GLM4_MOE_LITE: HfFamily = HfFamily {
    model_types: &["glm4_moe_lite"],
    adjust: |settings, sizes| {
        first_dense(settings, sizes)?;
        sparse_list(settings, sizes, |layer| layer > 0)?;
        latent(settings, sizes)?;
        for settings in [settings.object("rope_parameters")?.as_ref(), Some(settings)].into_iter().flatten() {
            let key = "partial_rotary_factor";
            if let Some(share) = settings.optional_float(&[key])?.filter(|share| *share != 1.0) {
                return Err(settings.unsupported(key, share, "supported in this family: 1"));
            }
        }
        Ok(())
    },
    ..DEEPSEEK_V3
};

pub(super) fn latent(settings: &Settings, sizes: &mut Sizes) -> Result<()> {
    let latent = LatentSizes {
        q_rank: settings.optional_count(&["q_lora_rank"])?.unwrap_or(0),
        kv_rank: settings.count(&["kv_lora_rank"])?,
        plain: settings.count(&["qk_nope_head_dim"])?,
        rope: settings.count(&["qk_rope_head_dim"])?,
        value: settings.count(&["v_head_dim"])?,
    };
    sizes.latent = latent;
    sizes.interleaved = settings.switch("rope_interleave", true)?;
    // Keys and values are one vector for all heads.
    sizes.kv_heads = sizes.heads;
    Ok(())
}

fn latent_keys(keys: &mut MetadataWriter<'_>) -> Result<()> {
    let latent = keys.sizes.latent;
    let mut set = |key: &str, size: usize| keys.set(key, size as u32);
    set("attention.head_count_kv", 1);
    if latent.q_rank > 0 {
        set("attention.q_lora_rank", latent.q_rank);
    }
    set("attention.kv_lora_rank", latent.kv_rank);
    set("attention.key_length", latent.kv_rank + latent.rope);
    set("attention.value_length", latent.kv_rank);
    set("attention.key_length_mla", latent.plain + latent.rope);
    set("attention.value_length_mla", latent.value);
    keys.leading_dense_layers();
    Ok(())
}
