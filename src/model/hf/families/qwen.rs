//! Qwen 2 and 3, dense and with experts.

use super::family::{BASE, HfFamily, WindowRule};
use super::parts::{NORMS, attention, default_attention, gated, head_norms};
use crate::error::Result;
use crate::model::hf::entry::{Entry, Need, Transform, Values, tensor};
use crate::model::hf::settings::Settings;
use crate::model::hf::sizes::Sizes;
use Need::{Always, Dense, If, Never, Sparse};
use Transform::{Copy, Squeeze, Stack};

/// Yang et al. 2024, arXiv 2407.10671; also Qwen 2.5.
pub(super) const QWEN2: HfFamily = HfFamily {
    model_types: &["qwen2"],
    architecture: "qwen2",
    layer: &[NORMS, &attention(Copy, Always, Never), &gated(Always, Never)],
    window: WindowRule::From("max_window_layers"),
    ..BASE
};

/// Router and experts, and the dense network of layers without experts.
pub(super) const EXPERTS: [Entry; 7] = {
    let [gate, up, down] = gated(Dense, Never);
    [
        tensor("ffn_gate_inp", "mlp.gate").when(Sparse),
        tensor("ffn_gate_exps", "mlp.experts.{e}.gate_proj").by(Stack).when(Sparse),
        tensor("ffn_up_exps", "mlp.experts.{e}.up_proj").by(Stack).when(Sparse),
        tensor("ffn_down_exps", "mlp.experts.{e}.down_proj").by(Stack).when(Sparse),
        gate,
        up,
        down,
    ]
};

/// Qwen 1.5 and 2 with experts and a shared expert.
pub(super) const QWEN2_MOE: HfFamily = HfFamily {
    model_types: &["qwen2_moe"],
    architecture: "qwen2moe",
    layer: &[
        NORMS,
        &attention(Copy, If("qkv_bias"), Never),
        &EXPERTS,
        &[
            tensor("ffn_gate_inp_shexp", "mlp.shared_expert_gate").by(Squeeze).when(Sparse),
            tensor("ffn_gate_shexp", "mlp.shared_expert.gate_proj").when(Sparse),
            tensor("ffn_up_shexp", "mlp.shared_expert.up_proj").when(Sparse),
            tensor("ffn_down_shexp", "mlp.shared_expert.down_proj").when(Sparse),
        ],
    ],
    adjust: sparse_layers,
    keys: |keys| keys.experts(keys.settings.switch("norm_topk_prob", false)?),
    ..QWEN2
};

/// Yang et al. 2025, arXiv 2505.09388.
pub(super) const QWEN3: HfFamily = HfFamily {
    model_types: &["qwen3"],
    architecture: "qwen3",
    layer: &[NORMS, &default_attention(Copy), &head_norms(Values::Same), &gated(Always, Never)],
    ..QWEN2
};

/// Qwen 3 with experts.
pub(super) const QWEN3_MOE: HfFamily = HfFamily {
    model_types: &["qwen3_moe"],
    architecture: "qwen3moe",
    layer: &[NORMS, &default_attention(Copy), &head_norms(Values::Same), &EXPERTS],
    window: WindowRule::Always,
    adjust: sparse_layers,
    keys: |keys| keys.experts(keys.settings.switch("norm_topk_prob", false)?),
    ..QWEN3
};

/// Every `decoder_sparse_step`-th layer has experts, except for those in `mlp_only_layers`.
pub(super) fn sparse_layers(settings: &Settings, sizes: &mut Sizes) -> Result<()> {
    let step = settings.count(&["decoder_sparse_step"])?;
    let without: Vec<u64> = match settings.get("mlp_only_layers") {
        None => Vec::new(),
        Some(list) => serde_json::from_value(list)
            .map_err(|error| settings.malformed("mlp_only_layers", error, "a list of layers"))?,
    };
    sizes.sparse =
        (0..sizes.layers).map(|layer| (layer + 1).is_multiple_of(step) && !without.contains(&(layer as u64))).collect();
    Ok(())
}
