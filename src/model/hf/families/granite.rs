//! IBM Granite with experts, windows and sinks.

use super::family::{HfFamily, WindowRule};
use super::llama::GRANITE;
use super::parts::{NORMS, default_attention, experts_of_ffn_width, gated};
use crate::model::hf::entry::{Entry, Need, Transform, tensor};
use crate::model::hf::sizes::Size;
use Need::{Always, If};
use Transform::{PairNeighbors, RowsOfPart};

/// IBM Granite 3 with experts.
pub(super) const GRANITE_MOE: HfFamily = HfFamily {
    model_types: &["granitemoe"],
    architecture: "granitemoe",
    layer: &[NORMS, &default_attention(PairNeighbors), &GRANITE_EXPERTS],
    adjust: experts_of_ffn_width,
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

/// Where there is a shared expert.
const SHARED: Need = Need::Where(|sizes, _| sizes.shared_ffn > 0);

/// IBM Granite 3 with experts and a shared one.
pub(super) const GRANITE_MOE_SHARED: HfFamily = HfFamily {
    model_types: &["granitemoeshared"],
    layer: &[
        NORMS,
        &default_attention(PairNeighbors),
        &GRANITE_EXPERTS,
        &[
            tensor("ffn_gate_shexp", "shared_mlp.input_linear").by(RowsOfPart { part: 0, parts: 2 }).when(SHARED),
            tensor("ffn_up_shexp", "shared_mlp.input_linear").by(RowsOfPart { part: 1, parts: 2 }).when(SHARED),
            tensor("ffn_down_shexp", "shared_mlp.output_linear").when(SHARED),
        ],
    ],
    adjust: |settings, sizes| {
        sizes.expert_ffn = sizes.ffn;
        sizes.shared_ffn = settings.number(&["shared_intermediate_size"])?;
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
        &default_attention(PairNeighbors),
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
            tensor("ffn_up_shexp", "shared_mlp.input_linear").dims(&[Size::Hidden, Size::TwiceSharedFfn]).when(SHARED),
            tensor("ffn_down_shexp", "shared_mlp.output_linear").when(SHARED),
        ],
        &default_attention(PairNeighbors),
    ],
    adjust: GRANITE_MOE_SHARED.adjust,
    keys: |keys| {
        keys.layer_bases()?;
        (GRANITE_MOE.keys)(keys)
    },
    ..GRANITE_SWA
};
