//! Kimi Linear: a delta rule with a gate for each channel, and latent attention without positions in other layers.

use super::entries::{attends, kinds, listed_kinds, only, recurs, require_silu};
use crate::error::Result;
use crate::model::hf::entry::{Entry, Need, Transform, Values, tensor};
use crate::model::hf::families::deepseek::{LATENT_ATTENTION, latent};
use crate::model::hf::families::family::{ActivationSource, BASE, HfFamily, Rotation};
use crate::model::hf::families::parts::{NORMS, sparse_list};
use crate::model::hf::metadata::MetadataWriter;
use crate::model::hf::settings::Settings;
use crate::model::hf::sizes::{LayerKind, RecurrentSizes, Size, Sizes};
use Need::{Dense, Never, Sparse};
use Transform::Stack;

/// Kimi Team 2025, arXiv 2510.26692.
pub(in crate::model::hf::families) const KIMI_LINEAR: HfFamily = HfFamily {
    model_types: &["kimi_linear"],
    architecture: "kimi-linear",
    layer: &[NORMS, &DELTA, &only(LATENT_ATTENTION, attends), &NETWORK, &EXPERTS],
    mixer: "self_attn",
    activation: ActivationSource::Is("silu"),
    rotation: Rotation::None,
    adjust: kimi_sizes,
    keys: kimi_keys,
    ..BASE
};

const DELTA: [Entry; 14] = {
    use Size::{Hidden, Inner, Kernel, One, RecurrentHead, RecurrentHeads};
    let entries = [
        tensor("attn_q", "#.q_proj").dims(&[Hidden, Inner]),
        tensor("attn_k", "#.k_proj").dims(&[Hidden, Inner]),
        tensor("attn_v", "#.v_proj").dims(&[Hidden, Inner]),
        tensor("ssm_conv1d_q", "#.q_conv1d").dims(&[Kernel, One, Inner, One]),
        tensor("ssm_conv1d_k", "#.k_conv1d").dims(&[Kernel, One, Inner, One]),
        tensor("ssm_conv1d_v", "#.v_conv1d").dims(&[Kernel, One, Inner, One]),
        tensor("ssm_f_a", "#.f_a_proj").dims(&[Hidden, RecurrentHead]),
        tensor("ssm_f_b", "#.f_b_proj").dims(&[RecurrentHead, Inner]),
        tensor("ssm_g_a", "#.g_a_proj").dims(&[Hidden, RecurrentHead]),
        tensor("ssm_g_b", "#.g_b_proj").dims(&[RecurrentHead, Inner]),
        tensor("ssm_beta", "#.b_proj").dims(&[Hidden, RecurrentHeads]),
        tensor("ssm_dt", "#.dt_bias").raw().named(".bias").dims(&[Inner]),
        tensor("ssm_a", "#.A_log").raw().named("").mapped(Values::NegExp).dims(&[One, RecurrentHeads, One, One]),
        tensor("ssm_norm", "#.o_norm").dims(&[RecurrentHead]),
    ];
    only(entries, recurs)
};

/// Published files name dense layers in one way, transformers writes them in the other.
const NETWORK: [Entry; 3] = {
    const fn part(gguf: &'static str, published: &'static str, written: &'static Entry) -> Entry {
        tensor(gguf, published).when(Dense).bias(Never).or(written)
    }
    [
        part("ffn_gate", "mlp.gate_proj", &tensor("ffn_gate", "block_sparse_moe.gate_proj").when(Dense)),
        part("ffn_up", "mlp.up_proj", &tensor("ffn_up", "block_sparse_moe.up_proj").when(Dense)),
        part("ffn_down", "mlp.down_proj", &tensor("ffn_down", "block_sparse_moe.down_proj").when(Dense)),
    ]
};

const EXPERTS: [Entry; 9] = {
    const fn shared(sizes: &Sizes, _: usize) -> bool {
        sizes.shared_ffn > 0
    }
    [
        tensor("attn_output", "#.o_proj").dims(&[Size::Inner, Size::Hidden]).only(recurs),
        tensor("ffn_gate_inp", "block_sparse_moe.gate").when(Sparse),
        tensor("exp_probs_b", "block_sparse_moe.gate.e_score_correction_bias").raw().named(".bias").when(Sparse),
        tensor("ffn_gate_exps", "block_sparse_moe.experts.{e}.w1").by(Stack).when(Sparse),
        tensor("ffn_up_exps", "block_sparse_moe.experts.{e}.w3").by(Stack).when(Sparse),
        tensor("ffn_down_exps", "block_sparse_moe.experts.{e}.w2").by(Stack).when(Sparse),
        tensor("ffn_gate_shexp", "block_sparse_moe.shared_experts.gate_proj").when(Sparse).only(shared),
        tensor("ffn_up_shexp", "block_sparse_moe.shared_experts.up_proj").when(Sparse).only(shared),
        tensor("ffn_down_shexp", "block_sparse_moe.shared_experts.down_proj").when(Sparse).only(shared),
    ]
};

fn kimi_sizes(settings: &Settings, sizes: &mut Sizes) -> Result<()> {
    latent(settings, sizes)?;
    sizes.interleaved = true;
    sizes.context = settings.count(&["model_max_length", "max_position_embeddings"])?;
    sizes.shared_ffn = sizes.expert_ffn * settings.number(&["num_shared_experts", "n_shared_experts"])?;
    let published = settings.object("linear_attn_config")?;
    let size = |theirs: &str, ours: &str| {
        let listed = published.as_ref().map(|own| own.optional_count(&[theirs])).transpose()?.flatten();
        listed.map_or_else(|| settings.count(&[ours]), Ok)
    };
    let heads = size("num_heads", "linear_num_heads")?;
    let width = size("head_dim", "linear_head_dim")?;
    sizes.recurrent = RecurrentSizes {
        kernel: size("short_conv_kernel_size", "linear_conv_kernel_dim")?,
        inner: heads * width,
        state: width,
        heads,
        groups: heads,
    };
    let first = settings.optional_count(&["first_k_dense_replace"])?;
    let dense = if settings.get("first_k_dense_replace").is_some() { first.unwrap_or(0) } else { 1 };
    sparse_list(settings, sizes, |_| true)?;
    if settings.get("mlp_layer_types").is_none() {
        sizes.sparse = (0..sizes.layers).map(|layer| layer >= dense).collect();
    }
    require_silu(settings, "hidden_act")?;
    let kinds = kimi_kinds(settings, published.as_ref(), sizes.layers)?;
    sizes.set_kinds(settings, kinds)
}

/// Which layers attend: `linear_attn_config` of published configurations counts them from 1.
fn kimi_kinds(settings: &Settings, published: Option<&Settings>, layers: usize) -> Result<Vec<LayerKind>> {
    if let Some(kinds) = listed_kinds(settings, &["layer_types"], layers)? {
        return Ok(kinds);
    }
    let Some(published) = published else {
        return Ok(kinds(layers, |layer| layer == 0 || layer % 4 != 0));
    };
    let (full, delta) = (published.list("full_attn_layers")?, published.list("kda_layers")?);
    let (Some(full), Some(delta)) = (full, delta) else {
        return Ok(kinds(layers, |layer| layer == 0 || layer % 4 != 0));
    };
    for layer in 1..=layers as u64 {
        if full.contains(&layer) == delta.contains(&layer) {
            let what = if full.contains(&layer) { "both lists" } else { "neither list" };
            let expected = "each layer from 1 in full_attn_layers or in kda_layers";
            return Err(published.malformed("kda_layers", format_args!("layer {layer} in {what}"), expected));
        }
    }
    Ok(kinds(layers, |layer| delta.contains(&(layer as u64 + 1))))
}

fn kimi_keys(keys: &mut MetadataWriter<'_>) -> Result<()> {
    let (settings, sizes) = (keys.settings, keys.sizes);
    for (key, supported) in [("moe_router_activation_func", "sigmoid")] {
        if let Some(other) = settings.text(&[key])?.filter(|found| found != supported) {
            return Err(settings.unsupported(key, format_args!("{other:?}"), &format!("supported: {supported}")));
        }
    }
    keys.require("mla_use_nope", true)?;
    if let Some(step) = settings.optional_count(&["moe_layer_freq"])?.filter(|step| *step != 1) {
        return Err(settings.unsupported("moe_layer_freq", step, "supported: 1"));
    }
    // Keys and values are one vector for all heads.
    let kv_heads = sizes.kinds.iter().map(|kind| u32::from(*kind == LayerKind::Attention));
    keys.set("attention.head_count_kv", kv_heads.collect::<Vec<_>>());
    let (latent, recurrent) = (sizes.latent, sizes.recurrent);
    // llama.cpp writes the width of a head as the configuration has it, which nothing reads.
    let head = settings.optional_count(&["head_dim"])?.unwrap_or(latent.rope);
    let all = [
        ("attention.kv_lora_rank", latent.kv_rank),
        ("attention.key_length", latent.kv_rank + latent.rope),
        ("attention.value_length", head),
        ("attention.key_length_mla", latent.plain + latent.rope),
        ("attention.value_length_mla", latent.value),
        ("rope.dimension_count", latent.rope),
        ("ssm.conv_kernel", recurrent.kernel),
        ("kda.head_dim", recurrent.state),
    ];
    for (key, size) in all {
        keys.set(key, size as u32);
    }
    if latent.q_rank > 0 {
        keys.set("attention.q_lora_rank", latent.q_rank as u32);
    }
    keys.leading_dense_layers();
    let normalize = settings.switch_of(&["moe_renormalize", "norm_topk_prob"], true)?;
    keys.experts_used(&["num_experts_per_token", "num_experts_per_tok"], normalize)?;
    keys.set("expert_gating_func", 2u32);
    keys.copy("expert_weights_scale", "routed_scaling_factor")?;
    let groups = settings.number(&["num_expert_group", "n_group"])?;
    if groups > 1 {
        keys.set("expert_group_count", groups as u32);
    }
    let used = settings.number(&["topk_group"])?;
    if used > 0 {
        keys.set("expert_group_used_count", used as u32);
    }
    Ok(())
}
