//! Mamba-2 with attention in other layers: Granite 4, Bamba and Nemotron-H.

use serde_json::Value;

use super::entries::{
    ANY_CONTEXT, FINAL_LAYERNORM, PRE_FF_NORMS, attends, auto_count, biased_attention, check_heads, kinds,
    listed_kinds, mamba_sizes, mamba2, only, recurrent_keys, require_silu, time_step_limits,
};
use super::mamba::BACKBONE;
use crate::error::Result;
use crate::format::json;
use crate::model::hf::entry::{Entry, Need, Transform, tensor};
use crate::model::hf::families::family::{ActivationSource, BASE, HfFamily, Rotation};
use crate::model::hf::families::llama::GRANITE;
use crate::model::hf::families::parts::NORMS;
use crate::model::hf::metadata::MetadataWriter;
use crate::model::hf::settings::Settings;
use crate::model::hf::sizes::{LayerKind, RecurrentSizes, Size, Sizes};
use Need::{Dense, If, IfSo, Sparse};
use Transform::{PairHeads, PairNeighbors, RowsOfPart, Stack};

/// IBM Granite 4.
pub(in crate::model::hf::families) const GRANITE_HYBRID: HfFamily = HfFamily {
    model_types: &["granitemoehybrid"],
    without_influence: &["mamba_chunk_size"],
    architecture: "granitehybrid",
    layer: &[
        NORMS,
        &biased_attention(PairNeighbors),
        &mamba2(If("mamba_proj_bias"), If("mamba_conv_bias")),
        &GRANITE_EXPERTS,
        &[
            tensor("ffn_gate", "shared_mlp.input_linear").by(RowsOfPart { part: 0, parts: 2 }).when(Dense),
            tensor("ffn_up", "shared_mlp.input_linear").by(RowsOfPart { part: 1, parts: 2 }).when(Dense),
            tensor("ffn_down", "shared_mlp.output_linear").when(Dense),
        ],
    ],
    mixer: "mamba",
    activation: ActivationSource::Is("silu"),
    variant: |settings| {
        let layers = settings.count(&["num_hidden_layers"])?;
        if granite_kinds(settings, layers)?.iter().any(|kind| *kind != LayerKind::Attention) {
            return Ok(None);
        }
        let has_experts = settings.number(&["num_local_experts"])? > 0;
        Ok(Some(if has_experts { &GRANITE_ATTENTION_MOE } else { &GRANITE_ATTENTION }))
    },
    adjust: granite_sizes,
    keys: granite_keys,
    ..GRANITE
};

/// Granite 4 without recurrent layers, which GGUF has under the name of Granite 3.
const GRANITE_ATTENTION: HfFamily = HfFamily { architecture: "granite", ..GRANITE_HYBRID };
const GRANITE_ATTENTION_MOE: HfFamily = HfFamily { architecture: "granitemoe", ..GRANITE_HYBRID };

const GRANITE_EXPERTS: [Entry; 7] = {
    const fn shared(sizes: &Sizes, _: usize) -> bool {
        sizes.shared_ffn > 0
    }
    let [gate, up] = [RowsOfPart { part: 0, parts: 2 }, RowsOfPart { part: 1, parts: 2 }];
    [
        tensor("ffn_gate_inp", "block_sparse_moe.router.layer").when(Sparse),
        tensor("ffn_gate_exps", "block_sparse_moe.input_linear").by(gate).when(Sparse),
        tensor("ffn_up_exps", "block_sparse_moe.input_linear").by(up).when(Sparse),
        tensor("ffn_down_exps", "block_sparse_moe.output_linear").when(Sparse),
        tensor("ffn_gate_shexp", "shared_mlp.input_linear").by(gate).when(Sparse).only(shared),
        tensor("ffn_up_shexp", "shared_mlp.input_linear").by(up).when(Sparse).only(shared),
        tensor("ffn_down_shexp", "shared_mlp.output_linear").when(Sparse).only(shared),
    ]
};

fn granite_kinds(settings: &Settings, layers: usize) -> Result<Vec<LayerKind>> {
    let listed = listed_kinds(settings, &["layer_types", "layers_block_type"], layers)?;
    Ok(listed.unwrap_or_else(|| vec![LayerKind::Recurrent; layers]))
}

fn granite_sizes(settings: &Settings, sizes: &mut Sizes) -> Result<()> {
    let kinds = granite_kinds(settings, sizes.layers)?;
    sizes.shared_ffn = settings.number(&["shared_intermediate_size"])?;
    sizes.expert_ffn = sizes.ffn;
    // Without experts the network that all tokens share is the only one.
    if sizes.experts == 0 {
        sizes.ffn = sizes.shared_ffn;
    }
    mamba2_sizes(settings, sizes)?;
    if kinds.contains(&LayerKind::Recurrent) {
        let width = auto_count(settings, "mamba_d_head", sizes.recurrent.head_width())?;
        check_heads(settings, sizes, ("mamba_d_head", width), "mamba_n_heads", "mamba_n_groups")?;
        require_silu(settings, "hidden_act")?;
    }
    sizes.set_kinds(settings, kinds)
}

/// Reads the sizes of a mixer of Mamba-2 under the names that begin with `mamba_`.
fn mamba2_sizes(settings: &Settings, sizes: &mut Sizes) -> Result<()> {
    mamba_sizes(settings, sizes, settings.count(&["mamba_n_heads"])?, settings.count(&["mamba_n_groups"])?)
}

fn granite_keys(keys: &mut MetadataWriter<'_>) -> Result<()> {
    (GRANITE.keys)(keys)?;
    keys.experts(true)?;
    recurrent_keys(keys);
    time_step_limits(keys)?;
    let rotates = keys.settings.text(&["position_embedding_type"])?.as_deref() == Some("rope");
    keys.set("rope.scaling.finetuned", rotates);
    if !rotates && keys.sizes.kinds.contains(&LayerKind::Recurrent) {
        keys.set("context_length", ANY_CONTEXT as u32);
    }
    Ok(())
}

/// IBM and others 2024.
pub(in crate::model::hf::families) const BAMBA: HfFamily = HfFamily {
    model_types: &["bamba"],
    without_influence: &["mamba_chunk_size", "num_logits_to_keep", "z_loss_coefficient"],
    architecture: "granitehybrid",
    defaults: &[&[("partial_rotary_factor", "0.5")]],
    outside: &[FINAL_LAYERNORM],
    layer: &[
        PRE_FF_NORMS,
        &biased_attention(PairNeighbors),
        &mamba2(If("mamba_proj_bias"), If("mamba_conv_bias")),
        &[
            tensor("ffn_gate", "feed_forward.gate_proj").bias(If("mlp_bias")),
            tensor("ffn_up", "feed_forward.up_proj").bias(If("mlp_bias")),
            tensor("ffn_down", "feed_forward.down_proj").bias(If("mlp_bias")),
        ],
    ],
    mixer: "mamba",
    activation: ActivationSource::Is("silu"),
    rotation: Rotation::Part,
    adjust: |settings, sizes| {
        let attends = settings.list("attn_layer_indices")?.unwrap_or_default();
        mamba2_sizes(settings, sizes)?;
        let width = auto_count(settings, "mamba_d_head", sizes.recurrent.head_width())?;
        check_heads(settings, sizes, ("mamba_d_head", width), "mamba_n_heads", "mamba_n_groups")?;
        require_silu(settings, "hidden_act")?;
        sizes.set_kinds(settings, kinds(sizes.layers, |layer| !attends.contains(&(layer as u64))))
    },
    keys: |keys| {
        recurrent_keys(keys);
        time_step_limits(keys)?;
        keys.set("rope.scaling.finetuned", true);
        Ok(())
    },
    ..BASE
};

/// NVIDIA 2025, arXiv 2504.03624: Nemotron-H and Nemotron 3. A layer is a mixer or a feed-forward network.
pub(in crate::model::hf::families) const NEMOTRON_H: HfFamily = HfFamily {
    model_types: &["nemotron_h"],
    without_influence: &[
        // The class has no such biases, and takes the number of heads for their width.
        "attention_bias",
        "expand",
        "mamba_proj_bias",
        "sliding_window",
        // Of training and of ways to compute the same.
        "chunk_size",
        "mamba_ssm_cache_dtype",
        "moe_shared_expert_overlap",
        "num_logits_to_keep",
        "rescale_prenorm_residual",
        "residual_in_fp32",
        "time_step_floor",
        "time_step_limit",
        "time_step_max",
        "use_mamba_kernels",
        // The class raises time steps to this in prompts, but not in steps. No other program does.
        "time_step_min",
        // Layers for drafts.
        "mtp_layers_block_type",
        "num_nextn_predict_layers",
    ],
    architecture: "nemotron_h",
    bases: &["backbone.", "model.", ""],
    outside: &[BACKBONE],
    layer: &[
        &[tensor("attn_norm", "norm")],
        &mamba2(If("use_bias"), IfSo(|settings| settings.switch_of(&["mamba_conv_bias", "use_conv_bias"], true))),
        &only(
            [
                tensor("attn_q", "#.q_proj").by(PairHeads),
                tensor("attn_k", "#.k_proj").by(PairHeads),
                tensor("attn_v", "#.v_proj"),
                tensor("attn_output", "#.o_proj"),
            ],
            attends,
        ),
        &only(NEMOTRON_FEED_FORWARD, |sizes, layer| sizes.kind(layer) == LayerKind::FeedForward),
    ],
    mixer: "mixer",
    epsilon: &["layer_norm_epsilon", "rms_norm_eps"],
    activation: ActivationSource::Under(&["mlp_hidden_act"]),
    rotation: Rotation::None,
    variant: |settings| {
        let has_experts = nemotron_kinds(settings)?.contains(&NemotronKind::Experts);
        Ok(has_experts.then_some(&NEMOTRON_H_MOE))
    },
    adjust: nemotron_sizes,
    keys: nemotron_keys,
    ..BASE
};

const NEMOTRON_H_MOE: HfFamily = HfFamily { architecture: "nemotron_h_moe", ..NEMOTRON_H };

const NEMOTRON_FEED_FORWARD: [Entry; 10] = {
    use Size::{ExpertFfn, ExpertInput, ExpertLatent, Experts, Hidden};
    let latent = Need::Where(|sizes, layer| sizes.expert_latent > 0 && sizes.is_sparse(layer));
    let bias = If("mlp_bias");
    [
        tensor("ffn_up", "#.up_proj").when(Dense).bias(bias),
        tensor("ffn_down", "#.down_proj").when(Dense).bias(bias),
        tensor("ffn_gate_inp", "#.gate").when(Sparse),
        tensor("exp_probs_b", "#.gate.e_score_correction_bias").raw().named(".bias").when(Sparse),
        tensor("ffn_up_exps", "#.experts.{e}.up_proj").by(Stack).when(Sparse).dims(&[ExpertInput, ExpertFfn, Experts]),
        tensor("ffn_down_exps", "#.experts.{e}.down_proj").by(Stack).when(Sparse).dims(&[
            ExpertFfn,
            ExpertInput,
            Experts,
        ]),
        tensor("ffn_up_shexp", "#.shared_experts.up_proj").when(Sparse).bias(bias),
        tensor("ffn_down_shexp", "#.shared_experts.down_proj").when(Sparse).bias(bias),
        tensor("ffn_latent_down", "#.fc1_latent_proj").when(latent).bias(bias).dims(&[Hidden, ExpertLatent]),
        tensor("ffn_latent_up", "#.fc2_latent_proj").when(latent).bias(bias).dims(&[ExpertLatent, Hidden]),
    ]
};

#[derive(Clone, Copy, PartialEq, Eq)]
enum NemotronKind {
    Mixer(LayerKind),
    Experts,
}

/// What each layer is: a list of names, or a letter for each.
fn nemotron_kinds(settings: &Settings) -> Result<Vec<NemotronKind>> {
    const KEYS: &[&str] = &["layers_block_type", "layer_types", "hybrid_override_pattern"];
    let Some((key, listed)) = settings.find(KEYS) else {
        return Err(settings.missing(KEYS[0], "a list with the kind of each layer"));
    };
    let names: Option<Vec<String>> = match &listed {
        Value::String(letters) => Some(letters.chars().map(String::from).collect()),
        Value::Array(names) => names.iter().map(|name| name.as_str().map(str::to_owned)).collect(),
        _ => None,
    };
    let kind = |name: &String| match name.as_str() {
        "linear_attention" | "mamba" | "M" => Some(NemotronKind::Mixer(LayerKind::Recurrent)),
        "full_attention" | "attention" | "*" => Some(NemotronKind::Mixer(LayerKind::Attention)),
        "mlp" | "-" => Some(NemotronKind::Mixer(LayerKind::FeedForward)),
        "moe" | "E" => Some(NemotronKind::Experts),
        _ => None,
    };
    let kinds: Option<Vec<NemotronKind>> = names.and_then(|names| names.iter().map(kind).collect());
    kinds.filter(|kinds| !kinds.is_empty()).ok_or_else(|| {
        let expected = "linear_attention, full_attention, mlp or moe for each layer, or M, *, - or E";
        settings.malformed(key, json::brief(&listed), expected)
    })
}

fn nemotron_sizes(settings: &Settings, sizes: &mut Sizes) -> Result<()> {
    let kinds = nemotron_kinds(settings)?;
    sizes.layers = kinds.len();
    sizes.sparse = kinds.iter().map(|kind| *kind == NemotronKind::Experts).collect();
    sizes.head_dim = settings.count(&["head_dim", "attention_head_dim"])?;
    sizes.context = ANY_CONTEXT;
    if sizes.sparse.contains(&true) {
        sizes.shared_ffn = settings.count(&["moe_shared_expert_intermediate_size"])?;
        sizes.expert_latent = settings.number(&["moe_latent_size"])?;
    } else {
        sizes.experts = 0;
    }
    let (heads, width) = (settings.count(&["mamba_num_heads"])?, settings.count(&["mamba_head_dim"])?);
    sizes.recurrent = RecurrentSizes {
        kernel: settings.count(&["mamba_d_conv", "conv_kernel"])?,
        inner: heads * width,
        state: settings.count(&["ssm_state_size"])?,
        heads,
        groups: settings.count(&["mamba_n_groups", "n_groups"])?,
    };
    check_heads(settings, sizes, ("mamba_head_dim", width), "mamba_num_heads", "n_groups")?;
    require_silu(settings, "mamba_hidden_act")?;
    let plain = kinds.iter().map(|kind| match kind {
        NemotronKind::Mixer(kind) => *kind,
        NemotronKind::Experts => LayerKind::FeedForward,
    });
    sizes.set_kinds(settings, plain.collect())?;
    let experts = (sizes.expert_ffn, &sizes.sparse);
    for (layer, _) in sizes.per_layer.iter_mut().zip(experts.1).filter(|(_, sparse)| **sparse) {
        layer.ffn = experts.0;
    }
    Ok(())
}

fn nemotron_keys(keys: &mut MetadataWriter<'_>) -> Result<()> {
    recurrent_keys(keys);
    keys.set("rope.scaling.finetuned", false);
    keys.copy("attention.layer_norm_epsilon", "layer_norm_epsilon")?;
    if keys.sizes.experts == 0 {
        return Ok(());
    }
    keys.experts(keys.settings.switch("norm_topk_prob", true)?)?;
    keys.set("expert_gating_func", 2u32);
    keys.copy("expert_weights_scale", "routed_scaling_factor")?;
    keys.set("expert_shared_count", keys.settings.number(&["n_shared_experts"])? as u32);
    if keys.sizes.expert_latent > 0 {
        keys.set("moe_latent_size", keys.sizes.expert_latent as u32);
    }
    keys.groups()
}
