//! Microsoft's Phi.

use super::family::{BASE, HfFamily, Rotation, WindowRule};
use super::parts::{MERGED_GATED, NORMS, named_embedding};
use crate::model::arch::NormKind;
use crate::model::hf::entry::{Need, tensor};
use Need::{Always, If};

/// Li et al. 2023, arXiv 2309.05463: Phi 1, 1.5 and 2.
pub(super) const PHI: HfFamily = HfFamily {
    model_types: &["phi"],
    architecture: "phi2",
    defaults: &[&[("partial_rotary_factor", "0.5")]],
    outside: &[&named_embedding("~embed_tokens", "~final_layernorm", tensor("output", "lm_head").bias(Always))],
    layer: &[&[
        tensor("attn_norm", "input_layernorm").bias(Always),
        tensor("attn_q", "self_attn.q_proj").bias(Always),
        tensor("attn_k", "self_attn.k_proj").bias(Always),
        tensor("attn_v", "self_attn.v_proj").bias(Always),
        tensor("attn_q_norm", "self_attn.q_layernorm").both(If("qk_layernorm")),
        tensor("attn_k_norm", "self_attn.k_layernorm").both(If("qk_layernorm")),
        tensor("attn_output", "self_attn.dense").bias(Always),
        tensor("ffn_up", "mlp.fc1").bias(Always),
        tensor("ffn_down", "mlp.fc2").bias(Always),
    ]],
    norm: NormKind::Layer,
    rotation: Rotation::Part,
    ..BASE
};

/// Abdin et al. 2024, arXiv 2404.14219; also Phi 4.
pub(super) const PHI3: HfFamily = HfFamily {
    model_types: &["phi3"],
    architecture: "phi3",
    layer: &[
        NORMS,
        &[tensor("attn_qkv", "self_attn.qkv_proj"), tensor("attn_output", "self_attn.o_proj")],
        MERGED_GATED,
    ],
    rotation: Rotation::Part,
    window: WindowRule::Always,
    ..BASE
};
