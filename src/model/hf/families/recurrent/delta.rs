//! Delta rules with attention in other layers: Qwen3-Next, Qwen 3.5 and OLMo Hybrid.

use super::entries::{attends, biased_attention, kinds, listed_kinds, only, recurrent_keys, recurs, require_silu};
use crate::error::Result;
use crate::model::hf::entry::{Entry, Need, TiledRows, Transform, Values, tensor};
use crate::model::hf::families::family::{BASE, HfFamily, Rotation};
use crate::model::hf::families::parts::{EMBEDDING, gated};
use crate::model::hf::families::qwen::{EXPERTS, sparse_layers};
use crate::model::hf::metadata::MetadataWriter;
use crate::model::hf::settings::Settings;
use crate::model::hf::sizes::{LayerKind, RecurrentSizes, Size, Sizes};
use Need::{Always, Never, Sparse, Untied};
use Transform::{Concat, Copy, DeltaGroups, RowsOfPart, TileColumns, TileHeads};
use Values::{AddOne, NegExp};

/// The norms before both branches, of 1 + weight.
const NORMS: &[Entry] = &[
    tensor("attn_norm", "input_layernorm").mapped(AddOne),
    tensor("post_attention_norm", "post_attention_layernorm").mapped(AddOne),
];

const OUTSIDE: &[Entry] = &[
    tensor("token_embd", "~embed_tokens"),
    tensor("output_norm", "~norm").mapped(AddOne),
    tensor("output", "@lm_head").when(Untied),
];

/// Queries with a gate for each number of a head's output, keys and values.
const GATED_ATTENTION: [Entry; 6] = {
    let [q, k, v, output] = biased_attention(Copy);
    [
        q.dims(&[Size::Hidden, Size::TwiceQueries]),
        k,
        v,
        output,
        tensor("attn_q_norm", "self_attn.q_norm").mapped(AddOne).only(attends),
        tensor("attn_k_norm", "self_attn.k_norm").mapped(AddOne).only(attends),
    ]
};

/// Router, experts, and a gated expert that all tokens use. Experts are one tensor each, or one tensor in all.
const GATED_EXPERTS: [Entry; 4] = [
    tensor("ffn_gate_inp_shexp", "mlp.shared_expert_gate").when(Sparse).dims(&[Size::Hidden, Size::One]),
    tensor("ffn_gate_shexp", "mlp.shared_expert.gate_proj").when(Sparse),
    tensor("ffn_up_shexp", "mlp.shared_expert.up_proj").when(Sparse),
    tensor("ffn_down_shexp", "mlp.shared_expert.down_proj").when(Sparse),
];

const FUSED_EXPERTS: [Entry; 7] = {
    let [router, gate, up, down, dense_gate, dense_up, dense_down] = EXPERTS;
    const GATE: Entry =
        tensor("ffn_gate_exps", "mlp.experts.gate_up_proj").raw().by(RowsOfPart { part: 0, parts: 2 }).when(Sparse);
    const UP: Entry =
        tensor("ffn_up_exps", "mlp.experts.gate_up_proj").raw().by(RowsOfPart { part: 1, parts: 2 }).when(Sparse);
    const DOWN: Entry = tensor("ffn_down_exps", "mlp.experts.down_proj").raw().when(Sparse);
    [router, gate.or(&GATE), up.or(&UP), down.or(&DOWN), dense_gate, dense_up, dense_down]
};

/// Qwen 2025: Qwen3-Next. The gated delta rule is of Yang et al. 2024, arXiv 2412.06464.
pub(in crate::model::hf::families) const QWEN3_NEXT: HfFamily = HfFamily {
    model_types: &["qwen3_next"],
    architecture: "qwen3next",
    defaults: &[&[("partial_rotary_factor", "0.25"), ("full_attention_interval", "4")]],
    outside: &[OUTSIDE],
    layer: &[
        NORMS,
        &GATED_ATTENTION,
        &only(
            [
                tensor("attn_qkv", "#.in_proj_qkvz")
                    .by(DeltaGroups { gate: false })
                    .dims(&[Size::Hidden, Size::Channels]),
                tensor("attn_gate", "#.in_proj_qkvz").by(DeltaGroups { gate: true }).dims(&[Size::Hidden, Size::Inner]),
                tensor("ssm_ba", "#.in_proj_ba").dims(&[Size::Hidden, Size::TwiceRecurrentHeads]),
                tensor("ssm_conv1d", "#.conv1d").dims(&[Size::Kernel, Size::Channels]),
                tensor("ssm_dt", "#.dt_bias").raw().named(".bias").dims(&[Size::RecurrentHeads]),
                tensor("ssm_a", "#.A_log").raw().named("").mapped(NegExp).dims(&[Size::RecurrentHeads]),
                tensor("ssm_norm", "#.norm").dims(&[Size::RecurrentHead]),
                tensor("ssm_out", "#.out_proj").dims(&[Size::Inner, Size::Hidden]),
            ],
            recurs,
        ),
        &FUSED_EXPERTS,
        &GATED_EXPERTS,
    ],
    mixer: "linear_attn",
    rotation: Rotation::Part,
    adjust: |settings, sizes| {
        sparse_layers(settings, sizes)?;
        delta_sizes(settings, sizes)
    },
    keys: |keys| {
        delta_keys(keys)?;
        keys.experts(keys.settings.switch("norm_topk_prob", true)?)
    },
    ..BASE
};

/// Qwen 2026: Qwen 3.5, the text part.
pub(in crate::model::hf::families) const QWEN3_5: HfFamily = HfFamily {
    model_types: &["qwen3_5_text", "qwen3_5"],
    architecture: "qwen35",
    bases: &["model.language_model.", "language_model.model.", "model.", ""],
    layer: &[NORMS, &GATED_ATTENTION, &TILED_DELTA, &gated(Always, Never)],
    ignored: &["model.visual.", "visual."],
    adjust: delta_sizes,
    keys: qwen35_keys,
    ..QWEN3_NEXT
};

/// Qwen 3.5 with experts, the text part.
pub(in crate::model::hf::families) const QWEN3_5_MOE: HfFamily = HfFamily {
    model_types: &["qwen3_5_moe_text", "qwen3_5_moe"],
    architecture: "qwen35moe",
    layer: &[NORMS, &GATED_ATTENTION, &TILED_DELTA, &FUSED_EXPERTS, &GATED_EXPERTS],
    adjust: |settings, sizes| {
        // No layer is without experts, so that nothing needs this width.
        if sizes.ffn == 0 {
            sizes.ffn = sizes.expert_ffn;
        }
        delta_sizes(settings, sizes)
    },
    keys: |keys| {
        qwen35_keys(keys)?;
        keys.experts(true)
    },
    ..QWEN3_5
};

/// A gated delta rule with a projection for each of its inputs. GGUF has the heads of values in another order.
const TILED_DELTA: [Entry; 9] = only(
    [
        tensor("attn_qkv", "#.in_proj_qkv").by(TileHeads(TiledRows::All)).dims(&[Size::Hidden, Size::Channels]),
        tensor("attn_gate", "#.in_proj_z").by(TileHeads(TiledRows::Values)).dims(&[Size::Hidden, Size::Inner]),
        tensor("ssm_alpha", "#.in_proj_a").by(TileHeads(TiledRows::Heads)).dims(&[Size::Hidden, Size::RecurrentHeads]),
        tensor("ssm_beta", "#.in_proj_b").by(TileHeads(TiledRows::Heads)).dims(&[Size::Hidden, Size::RecurrentHeads]),
        tensor("ssm_conv1d", "#.conv1d").by(TileHeads(TiledRows::All)).dims(&[Size::Kernel, Size::Channels]),
        tensor("ssm_dt", "#.dt_bias")
            .raw()
            .named(".bias")
            .by(TileHeads(TiledRows::Heads))
            .dims(&[Size::RecurrentHeads]),
        tensor("ssm_a", "#.A_log")
            .raw()
            .named("")
            .by(TileHeads(TiledRows::Heads))
            .mapped(NegExp)
            .dims(&[Size::RecurrentHeads]),
        tensor("ssm_norm", "#.norm").dims(&[Size::RecurrentHead]),
        tensor("ssm_out", "#.out_proj").by(TileColumns).dims(&[Size::Inner, Size::Hidden]),
    ],
    recurs,
);

fn delta_sizes(settings: &Settings, sizes: &mut Sizes) -> Result<()> {
    linear_sizes(settings, sizes)?;
    require_silu(settings, "hidden_act")?;
    let listed = listed_kinds(settings, &["layer_types"], sizes.layers)?;
    sizes.kinds = match listed {
        Some(kinds) => kinds,
        None => {
            let interval = settings.count(&["full_attention_interval"])?;
            kinds(sizes.layers, |layer| !(layer + 1).is_multiple_of(interval))
        }
    };
    Ok(())
}

/// Reads the sizes under the names that begin with `linear_`.
fn linear_sizes(settings: &Settings, sizes: &mut Sizes) -> Result<()> {
    let heads = settings.count(&["linear_num_value_heads"])?;
    sizes.recurrent = RecurrentSizes {
        kernel: settings.count(&["linear_conv_kernel_dim"])?,
        inner: heads * settings.count(&["linear_value_head_dim"])?,
        state: settings.count(&["linear_key_head_dim"])?,
        heads,
        groups: settings.count(&["linear_num_key_heads"])?,
    };
    if !heads.is_multiple_of(sizes.recurrent.groups) {
        let expected = format_args!("a multiple of the {} heads of keys", sizes.recurrent.groups);
        return Err(settings.malformed("linear_num_value_heads", heads, expected));
    }
    Ok(())
}

fn delta_keys(keys: &mut MetadataWriter<'_>) -> Result<()> {
    recurrent_keys(keys);
    recurrent_layers(keys);
    // Older configurations have it; readers of GGUF look for it.
    let interval = keys.settings.optional_count(&["full_attention_interval"])?.unwrap_or(4);
    keys.set("full_attention_interval", interval as u32);
    keys.require("attn_output_gate", true)
}

/// Writes which layers have a state.
fn recurrent_layers(keys: &mut MetadataWriter<'_>) {
    let layers: Vec<bool> = keys.sizes.kinds.iter().map(|kind| *kind == LayerKind::Recurrent).collect();
    keys.set("attention.recurrent_layers", layers);
}

fn qwen35_keys(keys: &mut MetadataWriter<'_>) -> Result<()> {
    delta_keys(keys)?;
    // Text has the same position in every section; other readers need the sections.
    let rope = [keys.settings.object("rope_parameters")?, keys.settings.object("rope_scaling")?];
    let listed = rope.into_iter().flatten().find_map(|rope| rope.list("mrope_section").transpose()).transpose()?;
    let mut sections: Vec<i32> = match listed {
        Some(listed) => listed.into_iter().map(|section| i32::try_from(section).unwrap_or(i32::MAX)).collect(),
        None => vec![11, 11, 10],
    };
    sections.resize(4, 0);
    keys.set("rope.dimension_sections", sections);
    Ok(())
}

/// Ai2 2026: OLMo Hybrid. Layers that attend have norms after their branches, the others before.
pub(in crate::model::hf::families) const OLMO_HYBRID: HfFamily = HfFamily {
    model_types: &["olmo_hybrid"],
    // Of training.
    without_influence: &[
        "linear_a_log_max",
        "linear_a_log_min",
        "linear_dt_init_floor",
        "linear_dt_max",
        "linear_dt_min",
    ],
    architecture: "olmo-hybrid",
    outside: &[EMBEDDING],
    layer: &[
        &only(
            [
                tensor("attn_norm", "attention_layer_norm").or(&tensor("attn_norm", "input_layernorm")),
                tensor("ffn_norm", "feedforward_layer_norm").or(&tensor("ffn_norm", "post_attention_layernorm")),
                tensor("attn_qkv", "#.{q_proj|k_proj|v_proj}").by(Concat).dims(&[Size::Hidden, Size::Channels]),
                // transformers saves three equal parts, however wide queries, keys and values are.
                tensor("ssm_conv1d", "#.{q_conv1d|k_conv1d|v_conv1d}").by(Concat).dims(CONVOLUTION).or(&CONV1D),
                tensor("attn_gate", "#.g_proj").dims(&[Size::Hidden, Size::Inner]),
                tensor("ssm_alpha", "#.a_proj").dims(&[Size::Hidden, Size::RecurrentHeads]),
                tensor("ssm_beta", "#.b_proj").dims(&[Size::Hidden, Size::RecurrentHeads]),
                tensor("ssm_dt", "#.dt_bias").raw().named(".bias").dims(&[Size::RecurrentHeads]),
                tensor("ssm_a", "#.A_log").raw().named("").mapped(NegExp).dims(&[Size::RecurrentHeads]),
                tensor("ssm_norm", "#.o_norm").dims(&[Size::RecurrentHead]),
                tensor("ssm_out", "#.o_proj").dims(&[Size::Inner, Size::Hidden]),
            ],
            recurs,
        ),
        &only(
            [
                tensor("post_attention_norm", "feedforward_layer_norm")
                    .or(&tensor("post_attention_norm", "post_attention_layernorm")),
                tensor("post_ffw_norm", "post_feedforward_layernorm"),
                tensor("attn_q_norm", "self_attn.q_norm").dims(&[Size::Queries]),
                tensor("attn_k_norm", "self_attn.k_norm").dims(&[Size::Keys]),
            ],
            attends,
        ),
        &biased_attention(Copy),
        &gated(Always, Never),
    ],
    mixer: "linear_attn",
    adjust: olmo_sizes,
    keys: |keys| {
        recurrent_keys(keys);
        recurrent_layers(keys);
        // The class has this epsilon whatever the configuration says.
        keys.set("ssm.norm_epsilon", 1e-5f32);
        if keys.settings.switch("linear_allow_neg_eigval", true)? {
            keys.set("ssm.beta_scale", 2.0f32);
        }
        if !olmo_rotates(keys.settings)? {
            keys.set("attention.rope_pattern", vec![false; keys.sizes.layers]);
        }
        Ok(())
    },
    ..BASE
};

const CONVOLUTION: &[Size] = &[Size::Kernel, Size::Channels];
const CONV1D: Entry = tensor("ssm_conv1d", "#.conv1d").dims(CONVOLUTION);

fn olmo_sizes(settings: &Settings, sizes: &mut Sizes) -> Result<()> {
    let groups = settings.optional_count(&["linear_num_key_heads"])?.unwrap_or(sizes.heads);
    let heads = settings.optional_count(&["linear_num_value_heads"])?.unwrap_or(sizes.heads);
    let state = match settings.optional_count(&["linear_key_head_dim"])? {
        Some(width) => width,
        None => sizes.hidden * 3 / 4 / groups,
    };
    let width = settings.optional_count(&["linear_value_head_dim"])?.unwrap_or(2 * state);
    let kernel = settings.count(&["linear_conv_kernel_dim"])?;
    sizes.recurrent = RecurrentSizes { kernel, inner: heads * width, state, heads, groups };
    if !heads.is_multiple_of(groups) || state == 0 {
        let expected = format_args!("a multiple of the {groups} heads of keys");
        return Err(settings.malformed("linear_num_value_heads", heads, expected));
    }
    require_silu(settings, "hidden_act")?;
    let last = sizes.layers - 1;
    sizes.kinds = match listed_kinds(settings, &["layer_types"], sizes.layers)? {
        Some(kinds) => kinds,
        // A model of up to three layers attends in the last one.
        None => kinds(sizes.layers, |layer| layer % 4 != 3 && (last >= 3 || layer != last)),
    };
    Ok(())
}

/// Whether layers that attend rotate: unless the base is null.
fn olmo_rotates(settings: &Settings) -> Result<bool> {
    const BASE: &str = "rope_theta";
    let parameters = [settings.object("rope_scaling")?, settings.object("rope_parameters")?];
    let inside = parameters.into_iter().flatten().find(|parameters| !parameters.is_empty());
    Ok(match inside {
        Some(inside) if inside.is_null(BASE) => false,
        Some(inside) if inside.get(BASE).is_some() => true,
        _ => !settings.is_null(BASE),
    })
}
