//! Entries and sizes that families with recurrent layers share.

use serde_json::Value;

use crate::error::Result;
use crate::model::hf::entry::{Entry, Need, Transform, Values, tensor};
use crate::model::hf::metadata::MetadataWriter;
use crate::model::hf::settings::Settings;
use crate::model::hf::sizes::{LayerKind, RecurrentSizes, Size, Sizes};
use Need::{Always, If, Untied};

/// What llama.cpp writes for models without a length of their own.
pub(super) const ANY_CONTEXT: usize = 1 << 20;

/// The embedding, the last norm and the output under the names of Jamba and Bamba.
pub(super) const FINAL_LAYERNORM: &[Entry] = &[
    tensor("token_embd", "~embed_tokens"),
    tensor("output_norm", "~final_layernorm"),
    tensor("output", "lm_head").when(Untied),
];

/// The norms of a layer under the names of Jamba and Bamba.
pub(super) const PRE_FF_NORMS: &[Entry] =
    &[tensor("attn_norm", "input_layernorm"), tensor("ffn_norm", "pre_ff_layernorm")];

/// Whether a layer has a state.
pub(super) fn recurs(sizes: &Sizes, layer: usize) -> bool {
    matches!(sizes.kind(layer), LayerKind::Recurrent | LayerKind::Both)
}

/// Whether a layer attends.
pub(super) fn attends(sizes: &Sizes, layer: usize) -> bool {
    matches!(sizes.kind(layer), LayerKind::Attention | LayerKind::Both)
}

/// The same entries, only in layers that `layers` chooses.
pub(super) const fn only<const N: usize>(mut entries: [Entry; N], layers: fn(&Sizes, usize) -> bool) -> [Entry; N] {
    let mut index = 0;
    while index < N {
        entries[index] = entries[index].only(layers);
        index += 1;
    }
    entries
}

/// A mixer of Gu and Dao 2023, arXiv 2312.00752, with the switches of its biases.
pub(super) const fn mamba1(bias: &'static str, conv_bias: &'static str) -> [Entry; 7] {
    use Size::{Hidden, Inner, Kernel, RankAndStates, RecurrentHeads, State, TwiceInner};
    let entries = [
        tensor("ssm_in", "#.in_proj").dims(&[Hidden, TwiceInner]).bias(If(bias)),
        tensor("ssm_conv1d", "#.conv1d").dims(&[Kernel, Inner]).bias(If(conv_bias)),
        tensor("ssm_x", "#.x_proj").dims(&[Inner, RankAndStates]),
        tensor("ssm_dt", "#.dt_proj").dims(&[RecurrentHeads, Inner]).bias(Always),
        tensor("ssm_a", "#.A_log").raw().named("").mapped(Values::NegExp).dims(&[State, Inner]),
        tensor("ssm_d", "#.D").raw().named("").dims(&[Inner]),
        tensor("ssm_out", "#.out_proj").dims(&[Inner, Hidden]).bias(If(bias)),
    ];
    only(entries, recurs)
}

/// A mixer of Dao and Gu 2024, arXiv 2405.21060, with the needs of its biases and of its norm.
pub(super) const fn mamba2(bias: Need, conv_bias: Need) -> [Entry; 7] {
    use Size::{Channels, GroupWidth, Groups, Hidden, Inner, Kernel, MixerInput, One, RecurrentHeads};
    let entries = [
        tensor("ssm_in", "#.in_proj").dims(&[Hidden, MixerInput]).bias(bias),
        tensor("ssm_conv1d", "#.conv1d").dims(&[Kernel, Channels]).bias(conv_bias),
        tensor("ssm_dt", "#.dt_bias").raw().named(".bias").dims(&[RecurrentHeads]),
        tensor("ssm_a", "#.A_log").raw().named("").mapped(Values::NegExp).dims(&[One, RecurrentHeads]),
        tensor("ssm_d", "#.D").raw().named("").dims(&[One, RecurrentHeads]),
        tensor("ssm_norm", "#.norm").by(Transform::Unflatten).dims(&[GroupWidth, Groups]),
        tensor("ssm_out", "#.out_proj").dims(&[Inner, Hidden]).bias(bias),
    ];
    only(entries, recurs)
}

/// Queries, keys, values and output below these names, with biases where `attention_bias` is on.
pub(super) const fn biased_attention(rows: Transform) -> [Entry; 4] {
    let bias = If("attention_bias");
    let entries = [
        tensor("attn_q", "self_attn.q_proj").by(rows).bias(bias),
        tensor("attn_k", "self_attn.k_proj").by(rows).bias(bias),
        tensor("attn_v", "self_attn.v_proj").bias(bias),
        tensor("attn_output", "self_attn.o_proj").bias(bias),
    ];
    only(entries, attends)
}

/// Reads what each layer consists of from the first of `keys` that lists it, under transformers' names of now or before.
pub(super) fn listed_kinds(settings: &Settings, keys: &[&str], layers: usize) -> Result<Option<Vec<LayerKind>>> {
    let Some((key, _)) = settings.find(keys) else { return Ok(None) };
    settings.per_layer(key, layers, "linear_attention or full_attention", |kind| match kind.as_str() {
        Some("linear_attention" | "mamba") => Some(LayerKind::Recurrent),
        Some("full_attention" | "attention") => Some(LayerKind::Attention),
        _ => None,
    })
}

/// Which layers have a state: those that `is_recurrent` chooses.
pub(super) fn kinds(layers: usize, is_recurrent: impl Fn(usize) -> bool) -> Vec<LayerKind> {
    let kind = |layer| if is_recurrent(layer) { LayerKind::Recurrent } else { LayerKind::Attention };
    (0..layers).map(kind).collect()
}

/// Reads the sizes of a mixer, except heads and groups, under the names that begin with `mamba_`.
pub(super) fn mamba_sizes(settings: &Settings, sizes: &mut Sizes, heads: usize, groups: usize) -> Result<()> {
    sizes.recurrent = RecurrentSizes {
        kernel: settings.count(&["mamba_d_conv"])?,
        inner: settings.count(&["mamba_expand"])? * sizes.hidden,
        state: settings.count(&["mamba_d_state"])?,
        heads,
        groups,
    };
    Ok(())
}

/// The count under `key`, or `default` where it is `"auto"`.
pub(super) fn auto_count(settings: &Settings, key: &str, default: usize) -> Result<usize> {
    match settings.get(key) {
        Some(Value::String(text)) if text == "auto" => Ok(default),
        _ => settings.count(&[key]),
    }
}

/// Writes the sizes of recurrent layers.
pub(super) fn recurrent_keys(keys: &mut MetadataWriter<'_>) {
    let sizes = keys.sizes.recurrent;
    let all = [
        ("ssm.conv_kernel", sizes.kernel),
        ("ssm.inner_size", sizes.inner),
        ("ssm.state_size", sizes.state),
        ("ssm.time_step_rank", sizes.heads),
        ("ssm.group_count", sizes.groups),
    ];
    for (key, size) in all.into_iter().filter(|(_, size)| *size > 0) {
        keys.set(key, size as u32);
    }
}

/// Writes the bounds of Mamba-2's time steps under `time_step_limit`, where there are any.
pub(super) fn time_step_limits(keys: &mut MetadataWriter<'_>) -> Result<()> {
    const KEY: &str = "time_step_limit";
    let number = |value: &Value| match value {
        Value::Object(float) => float.get("__float__").and_then(Value::as_str) == Some("Infinity"),
        other => other.as_str() == Some("Infinity"),
    };
    let bound = |value: &Value| if number(value) { Some(f64::INFINITY) } else { value.as_f64() };
    let Some(limits) = keys.settings.get(KEY) else { return Ok(()) };
    let bounds = limits.as_array().and_then(|all| all.iter().map(bound).collect::<Option<Vec<_>>>());
    let Some(&[low, high]) = bounds.as_deref().filter(|bounds| bounds.len() == 2 && bounds[0] <= bounds[1]) else {
        let found = crate::format::json::brief(&limits);
        return Err(keys.settings.malformed(KEY, found, "the least and the largest time step"));
    };
    if low > 0.0 {
        keys.set("ssm.time_step_min", low as f32);
    }
    if high.is_finite() {
        keys.set("ssm.time_step_max", high as f32);
    }
    Ok(())
}

/// Returns an error for an activation other than SiLU, which convolutions and gates have as well.
pub(super) fn require_silu(settings: &Settings, key: &str) -> Result<()> {
    match settings.text(&[key])?.as_deref() {
        None | Some("silu" | "swish") => Ok(()),
        Some(other) => Err(settings.unsupported(key, format_args!("{other:?}"), "supported in this family: silu")),
    }
}

/// Checks that the heads of Mamba-2 and their groups fit together: `heads` heads of `width` numbers.
pub(super) fn check_heads(
    settings: &Settings,
    sizes: &Sizes,
    width: (&str, usize),
    heads: &str,
    groups: &str,
) -> Result<()> {
    let recurrent = sizes.recurrent;
    if width.1 * recurrent.heads != recurrent.inner {
        let found = format_args!("{} heads of {} numbers", recurrent.heads, width.1);
        return Err(settings.malformed(width.0, found, format_args!("{} in all", recurrent.inner)));
    }
    if recurrent.groups == 0 || !recurrent.heads.is_multiple_of(recurrent.groups) {
        let expected = format_args!("a divisor of the {} heads under {heads}", recurrent.heads);
        return Err(settings.malformed(groups, recurrent.groups, expected));
    }
    Ok(())
}
