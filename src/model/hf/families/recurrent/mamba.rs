//! Mamba and Mamba-2 without attention, and Jamba.

use super::entries::{
    ANY_CONTEXT, FINAL_LAYERNORM, PRE_FF_NORMS, attends, auto_count, check_heads, kinds, mamba_sizes, mamba1, mamba2,
    only, recurrent_keys, recurs, require_silu, time_step_limits,
};
use crate::error::Result;
use crate::model::hf::entry::{Entry, Need, Transform, tensor};
use crate::model::hf::families::family::{ActivationSource, BASE, HfFamily, Rotation};
use crate::model::hf::families::parts::attention;
use crate::model::hf::settings::Settings;
use crate::model::hf::sizes::{LayerKind, RecurrentSizes, Size, Sizes};
use Need::{Dense, If, Never, Sparse, Untied};
use Transform::{Copy, Stack};

/// The embedding, the last norm and the output under Mamba's names.
pub(super) const BACKBONE: &[Entry] = &[
    tensor("token_embd", "~embeddings").or(&tensor("token_embd", "~embedding")),
    tensor("output_norm", "~norm_f"),
    tensor("output", "lm_head").when(Untied).or(&tensor("output", "model.lm_head").when(Untied)),
];

/// Gu and Dao 2023, arXiv 2312.00752.
pub(in crate::model::hf::families) const MAMBA: HfFamily = HfFamily {
    model_types: &["mamba"],
    // Of training and of ways to compute the same.
    without_influence: &[
        "rescale_prenorm_residual",
        "residual_in_fp32",
        "time_step_floor",
        "time_step_init_scheme",
        "time_step_max",
        "time_step_min",
        "time_step_scale",
        "use_associative_scan",
        "use_mambapy",
    ],
    architecture: "mamba",
    bases: &["backbone.", "model.backbone.", ""],
    outside: &[BACKBONE],
    layer: &[&[tensor("attn_norm", "norm")], &mamba1("use_bias", "use_conv_bias")],
    mixer: "mixer",
    epsilon: &["layer_norm_epsilon", "rms_norm_eps"],
    activation: ActivationSource::Is("silu"),
    rotation: Rotation::None,
    attends: false,
    adjust: |settings, sizes| {
        recurrent_only(settings, sizes, auto_count(settings, "time_step_rank", sizes.hidden.div_ceil(16))?, 0)
    },
    keys: |keys| {
        recurrent_keys(keys);
        keys.set("ssm.dt_b_c_rms", false);
        Ok(())
    },
    ..BASE
};

/// Technology Innovation Institute 2024, arXiv 2410.05355: Falcon Mamba.
pub(in crate::model::hf::families) const FALCON_MAMBA: HfFamily = HfFamily {
    model_types: &["falcon_mamba"],
    keys: |keys| {
        recurrent_keys(keys);
        keys.set("ssm.dt_b_c_rms", true);
        keys.copy("ssm.dt_b_c_rms_epsilon", "mixer_rms_eps")
    },
    ..MAMBA
};

/// Dao and Gu 2024, arXiv 2405.21060; also Mamba Codestral.
pub(in crate::model::hf::families) const MAMBA2: HfFamily = HfFamily {
    model_types: &["mamba2"],
    without_influence: &[
        "chunk_size",
        "rescale_prenorm_residual",
        "residual_in_fp32",
        "time_step_floor",
        "time_step_max",
        "time_step_min",
        "time_step_rank",
    ],
    architecture: "mamba2",
    layer: &[&[tensor("attn_norm", "norm")], &mamba2(If("use_bias"), If("use_conv_bias"))],
    adjust: |settings, sizes| {
        recurrent_only(settings, sizes, settings.count(&["num_heads"])?, settings.count(&["n_groups"])?)?;
        check_heads(settings, sizes, ("head_dim", settings.count(&["head_dim"])?), "num_heads", "n_groups")
    },
    keys: |keys| {
        recurrent_keys(keys);
        time_step_limits(keys)
    },
    ..MAMBA
};

/// Reads the sizes of models whose layers are mixers without feed-forward networks.
fn recurrent_only(settings: &Settings, sizes: &mut Sizes, heads: usize, groups: usize) -> Result<()> {
    sizes.kinds = vec![LayerKind::Recurrent; sizes.layers];
    (sizes.ffn, sizes.context) = (0, ANY_CONTEXT);
    sizes.recurrent = RecurrentSizes {
        kernel: settings.count(&["conv_kernel"])?,
        inner: settings.count(&["expand"])? * sizes.hidden,
        state: settings.count(&["state_size"])?,
        heads,
        groups,
    };
    require_silu(settings, "hidden_act")
}

/// Lieber et al. 2024, arXiv 2403.19887.
pub(in crate::model::hf::families) const JAMBA: HfFamily = HfFamily {
    model_types: &["jamba"],
    without_influence: &["use_associative_scan", "use_mamba_kernels", "use_mambapy"],
    architecture: "jamba",
    outside: &[FINAL_LAYERNORM],
    layer: &[
        PRE_FF_NORMS,
        &mamba1("mamba_proj_bias", "mamba_conv_bias"),
        &[
            tensor("ssm_dt_norm", "#.dt_layernorm").dims(&[Size::RecurrentHeads]).only(recurs),
            tensor("ssm_b_norm", "#.b_layernorm").dims(&[Size::State]).only(recurs),
            tensor("ssm_c_norm", "#.c_layernorm").dims(&[Size::State]).only(recurs),
        ],
        &only(attention(Copy, Never, Never), attends),
        &[
            tensor("ffn_gate", "feed_forward.gate_proj").when(Dense),
            tensor("ffn_up", "feed_forward.up_proj").when(Dense),
            tensor("ffn_down", "feed_forward.down_proj").when(Dense),
            tensor("ffn_gate_inp", "feed_forward.router").when(Sparse),
            tensor("ffn_gate_exps", "feed_forward.experts.{e}.gate_proj").by(Stack).when(Sparse),
            tensor("ffn_up_exps", "feed_forward.experts.{e}.up_proj").by(Stack).when(Sparse),
            tensor("ffn_down_exps", "feed_forward.experts.{e}.down_proj").by(Stack).when(Sparse),
        ],
    ],
    mixer: "mamba",
    activation: ActivationSource::Is("silu"),
    rotation: Rotation::None,
    adjust: jamba_sizes,
    keys: |keys| {
        recurrent_keys(keys);
        keys.experts(false)
    },
    ..BASE
};

fn jamba_sizes(settings: &Settings, sizes: &mut Sizes) -> Result<()> {
    let every = |period: &'static str, offset: &'static str| -> Result<Vec<bool>> {
        let (step, first) = (settings.count(&[period])?, settings.number(&[offset])?);
        if first >= step {
            return Err(settings.malformed(offset, first, format_args!("less than {period}, {step}")));
        }
        Ok((0..sizes.layers).map(|layer| layer % step == first).collect())
    };
    let attends = every("attn_layer_period", "attn_layer_offset")?;
    let sparse = every("expert_layer_period", "expert_layer_offset")?;
    if sizes.experts == 1 {
        sizes.experts = 0;
    }
    (sizes.sparse, sizes.expert_ffn) = (sparse, sizes.ffn);
    mamba_sizes(settings, sizes, auto_count(settings, "mamba_dt_rank", sizes.hidden.div_ceil(16))?, 0)?;
    require_silu(settings, "hidden_act")?;
    sizes.set_kinds(settings, kinds(sizes.layers, |layer| !attends[layer]))
}
