//! Liquid AI's LFM2: short convolutions with attention in other layers.

use super::entries::{attends, kinds, only, recurs};
use crate::error::Result;
use crate::model::hf::entry::{Entry, Need, Transform, tensor};
use crate::model::hf::families::family::{ActivationSource, BASE, HfFamily};
use crate::model::hf::metadata::MetadataWriter;
use crate::model::hf::settings::Settings;
use crate::model::hf::sizes::{LayerKind, RecurrentSizes, Size, Sizes};
use Need::{Dense, If, Sparse, Untied};
use Transform::Stack;

/// Liquid AI 2025, arXiv 2511.23404.
pub(in crate::model::hf::families) const LFM2: HfFamily = HfFamily {
    model_types: &["lfm2"],
    architecture: "lfm2",
    defaults: &[&[("rope_theta", "1e6")]],
    outside: &[&[
        tensor("token_embd", "~embed_tokens"),
        // llama.cpp's name of the last norm.
        tensor("token_embd_norm", "~embedding_norm"),
        tensor("output", "lm_head").when(Untied),
    ]],
    layer: &[&CONVOLUTION, &FEED_FORWARD],
    mixer: "conv",
    epsilon: &["norm_eps"],
    activation: ActivationSource::Is("silu"),
    adjust: |settings, sizes| {
        sizes.ffn = lfm2_width(settings)?;
        let listed = lfm2_kinds(settings, sizes.layers)?;
        let attends = settings.list("full_attn_idxs")?;
        let plain = || kinds(sizes.layers, |layer| attends.as_ref().is_some_and(|all| !all.contains(&(layer as u64))));
        let kinds = listed.unwrap_or_else(plain);
        set_convolution(settings, sizes, kinds)
    },
    keys: lfm2_keys,
    ..BASE
};

/// Liquid AI 2025: LFM2 with experts.
pub(in crate::model::hf::families) const LFM2_MOE: HfFamily = HfFamily {
    model_types: &["lfm2_moe"],
    architecture: "lfm2moe",
    layer: &[&CONVOLUTION, &FEED_FORWARD, &EXPERTS],
    adjust: |settings, sizes| {
        let dense = settings.number(&["num_dense_layers"])?;
        sizes.sparse = (0..sizes.layers).map(|layer| layer >= dense).collect();
        let listed = lfm2_kinds(settings, sizes.layers)?;
        let kinds = listed.ok_or_else(|| settings.missing("layer_types", "a list"))?;
        set_convolution(settings, sizes, kinds)
    },
    keys: |keys| {
        lfm2_keys(keys)?;
        keys.experts(keys.settings.switch("norm_topk_prob", true)?)?;
        keys.set("expert_gating_func", 2u32);
        keys.set("leading_dense_block_count", keys.settings.number(&["num_dense_layers"])? as u32);
        if let Some(factor) = keys.settings.optional_float(&["routed_scaling_factor"])?.filter(|factor| *factor != 1.0)
        {
            keys.set("expert_weights_scale", factor as f32);
        }
        Ok(())
    },
    ..LFM2
};

const CONVOLUTION: [Entry; 11] = {
    use Size::{Hidden, Kernel, ThreeHidden};
    let bias = If("conv_bias");
    let [conv, input, output] = only(
        [
            tensor("shortconv.conv", "#.conv").bias(bias).dims(&[Kernel, Hidden]),
            tensor("shortconv.in_proj", "#.in_proj").bias(bias).dims(&[Hidden, ThreeHidden]),
            tensor("shortconv.out_proj", "#.out_proj").bias(bias).dims(&[Hidden, Hidden]),
        ],
        recurs,
    );
    let [q, k, v, attention_output, q_norm, k_norm] = only(
        [
            tensor("attn_q", "self_attn.q_proj"),
            tensor("attn_k", "self_attn.k_proj"),
            tensor("attn_v", "self_attn.v_proj"),
            tensor("attn_output", "self_attn.out_proj"),
            tensor("attn_q_norm", "self_attn.q_layernorm"),
            tensor("attn_k_norm", "self_attn.k_layernorm"),
        ],
        attends,
    );
    let norms = [tensor("attn_norm", "operator_norm"), tensor("ffn_norm", "ffn_norm")];
    [norms[0], norms[1], conv, input, output, q, k, v, attention_output, q_norm, k_norm]
};

const FEED_FORWARD: [Entry; 3] = [
    tensor("ffn_gate", "feed_forward.w1").when(Dense),
    tensor("ffn_up", "feed_forward.w3").when(Dense),
    tensor("ffn_down", "feed_forward.w2").when(Dense),
];

const EXPERTS: [Entry; 5] = [
    tensor("ffn_gate_inp", "feed_forward.gate").when(Sparse),
    tensor("exp_probs_b", "feed_forward.expert_bias")
        .raw()
        .named(".bias")
        .when(If("use_expert_bias"))
        .only(Sizes::is_sparse),
    tensor("ffn_gate_exps", "feed_forward.experts.{e}.w1").by(Stack).when(Sparse),
    tensor("ffn_up_exps", "feed_forward.experts.{e}.w3").by(Stack).when(Sparse),
    tensor("ffn_down_exps", "feed_forward.experts.{e}.w2").by(Stack).when(Sparse),
];

/// What each layer is, if the configuration lists it.
fn lfm2_kinds(settings: &Settings, layers: usize) -> Result<Option<Vec<LayerKind>>> {
    settings.per_layer("layer_types", layers, "conv or full_attention", |kind| match kind.as_str() {
        Some("conv") => Some(LayerKind::Recurrent),
        Some("full_attention") => Some(LayerKind::Attention),
        _ => None,
    })
}

fn set_convolution(settings: &Settings, sizes: &mut Sizes, kinds: Vec<LayerKind>) -> Result<()> {
    sizes.recurrent = RecurrentSizes { kernel: settings.count(&["conv_L_cache"])?, ..RecurrentSizes::default() };
    sizes.set_kinds(settings, kinds)
}

/// The width of the feed-forward layer, which configurations give before it is cut to two thirds and rounded up.
fn lfm2_width(settings: &Settings) -> Result<usize> {
    let width = settings.count(&["block_ff_dim", "intermediate_size"])?;
    if !settings.switch("block_auto_adjust_ff_dim", true)? {
        return Ok(width);
    }
    let two_thirds = 2 * width / 3;
    let scaled = match settings.optional_float(&["block_ffn_dim_multiplier"])? {
        Some(factor) if factor > 0.0 && factor < 1024.0 => (factor * two_thirds as f64) as usize,
        Some(factor) => {
            return Err(settings.malformed("block_ffn_dim_multiplier", factor, "more than 0, and below 1024"));
        }
        None => two_thirds,
    };
    Ok(scaled.next_multiple_of(settings.count(&["block_multiple_of"])?))
}

fn lfm2_keys(keys: &mut MetadataWriter<'_>) -> Result<()> {
    keys.set("shortconv.l_cache", keys.sizes.recurrent.kernel as u32);
    Ok(())
}
