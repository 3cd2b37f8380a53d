//! Llama and its closest relatives.

use super::family::{BASE, HfFamily, Rotation, WindowRule};
use super::parts::{
    EMBEDDING_WITH_BIAS, NORMS, attention, default_attention, experts_of_ffn_width, gated, parallel_residual,
    rotating_layers,
};
use crate::model::arch::NormKind;
use crate::model::hf::entry::{Need, Transform, tensor};
use crate::model::hf::sizes::Size;
use Need::{Always, If, Never, Unless};
use Transform::{Copy, PairNeighbors, Stack};

/// Touvron et al. 2023, arXiv 2302.13971 and 2307.09288; also Yi, TinyLlama, SmolLM and many others.
pub(super) const LLAMA: HfFamily = HfFamily {
    model_types: &["llama"],
    architecture: "llama",
    layer: &[NORMS, &default_attention(PairNeighbors), &gated(Always, If("mlp_bias"))],
    ..BASE
};

/// Jiang et al. 2023, arXiv 2310.06825.
pub(super) const MISTRAL: HfFamily = HfFamily { model_types: &["mistral"], window: WindowRule::Always, ..LLAMA };

/// Jiang et al. 2024, arXiv 2401.04088.
pub(super) const MIXTRAL: HfFamily = HfFamily {
    model_types: &["mixtral"],
    without_influence: &["router_jitter_noise"],
    defaults: &[&[("rope_theta", "1e6")]],
    layer: &[
        NORMS,
        &attention(PairNeighbors, Never, Never),
        &[
            tensor("ffn_gate_inp", "block_sparse_moe.gate"),
            tensor("ffn_gate_exps", "block_sparse_moe.experts.{e}.w1").by(Stack),
            tensor("ffn_up_exps", "block_sparse_moe.experts.{e}.w3").by(Stack),
            tensor("ffn_down_exps", "block_sparse_moe.experts.{e}.w2").by(Stack),
        ],
    ],
    window: WindowRule::Always,
    adjust: experts_of_ffn_width,
    keys: |keys| keys.experts(true),
    ..LLAMA
};

/// IBM Granite 3.
pub(super) const GRANITE: HfFamily = HfFamily {
    model_types: &["granite"],
    architecture: "granite",
    keys: |keys| {
        keys.copy("attention.scale", "attention_multiplier")?;
        keys.copy("embedding_scale", "embedding_multiplier")?;
        keys.copy("residual_scale", "residual_multiplier")?;
        keys.copy("logit_scale", "logits_scaling")
    },
    ..LLAMA
};

/// SmolLM3: some layers do not rotate queries and keys.
pub(super) const SMOLLM3: HfFamily = HfFamily {
    model_types: &["smollm3"],
    architecture: "smollm3",
    defaults: &[&[("rope_theta", "2e6")]],
    window: WindowRule::Listed,
    keys: |keys| {
        let rotates = rotating_layers(keys, "no_rope_layer_interval")?;
        keys.set("attention.rope_pattern", rotates);
        Ok(())
    },
    ..LLAMA
};

/// Team OLMo 2024, arXiv 2501.00656: norms follow the layers, and those of queries and keys are over all heads together.
pub(super) const OLMO2: HfFamily = HfFamily {
    model_types: &["olmo2"],
    architecture: "olmo2",
    layer: &[
        &default_attention(Copy),
        &[
            tensor("attn_q_norm", "self_attn.q_norm").dims(&[Size::Queries]),
            tensor("attn_k_norm", "self_attn.k_norm").dims(&[Size::Keys]),
            tensor("post_attention_norm", "post_attention_layernorm"),
            tensor("post_ffw_norm", "post_feedforward_layernorm"),
        ],
        &gated(Always, Never),
    ],
    ..LLAMA
};

/// Stability AI 2024, arXiv 2402.17834.
pub(super) const STABLELM: HfFamily = HfFamily {
    model_types: &["stablelm"],
    architecture: "stablelm",
    defaults: &[&[("partial_rotary_factor", "0.25")]],
    outside: &[EMBEDDING_WITH_BIAS],
    layer: &[
        &[
            tensor("attn_norm", "input_layernorm").bias(Always),
            tensor("ffn_norm", "post_attention_layernorm").both(Unless("use_parallel_residual")),
            tensor("attn_q_norm", "self_attn.q_layernorm.norms.{e}")
                .by(Stack)
                .when(If("qk_layernorm"))
                .dims(&[Size::HeadDim, Size::Heads]),
            tensor("attn_k_norm", "self_attn.k_layernorm.norms.{e}")
                .by(Stack)
                .when(If("qk_layernorm"))
                .dims(&[Size::HeadDim, Size::KvHeads]),
        ],
        &attention(Copy, If("use_qkv_bias"), Never),
        &gated(Always, Never),
    ],
    norm: NormKind::Layer,
    rotation: Rotation::Part,
    keys: |keys| parallel_residual(keys, false),
    ..LLAMA
};
