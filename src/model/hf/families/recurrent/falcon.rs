//! Falcon-H1: attention and Mamba-2 side by side, with factors that become part of the weights.

use super::entries::{auto_count, check_heads, mamba2, recurrent_keys, require_silu, time_step_limits};
use crate::error::Result;
use crate::model::hf::entry::{Entry, Need, Segment, Values, tensor};
use crate::model::hf::families::family::{ActivationSource, BASE, HfFamily};
use crate::model::hf::families::gemma::is_untied;
use crate::model::hf::settings::Settings;
use crate::model::hf::sizes::{LayerKind, RecurrentSizes, Size, Sizes};
use Need::{If, IfSo, Never};
use Values::Scaled;

/// Technology Innovation Institute 2025, arXiv 2507.22448.
pub(in crate::model::hf::families) const FALCON_H1: HfFamily = HfFamily {
    model_types: &["falcon_h1"],
    without_influence: &["mamba_chunk_size", "num_logits_to_keep"],
    architecture: "falcon-h1",
    outside: &[&[
        tensor("token_embd", "~embed_tokens").mapped(Scaled(|settings, _| one(settings, "embedding_multiplier"))),
        tensor("output_norm", "~final_layernorm"),
        // Embedding and output have different factors.
        tensor("output", "lm_head").when(IfSo(is_untied)).mapped(HEAD),
        tensor("output", "~embed_tokens").when(If("tie_word_embeddings")).mapped(HEAD),
    ]],
    layer: &[
        // llama.cpp's name has no `.weight`.
        &[tensor("attn_norm", "input_layernorm"), tensor("ffn_norm", "pre_ff_layernorm").named("")],
        &ATTENTION,
        &MIXER,
        &FEED_FORWARD,
    ],
    ignored: &["lm_head."],
    mixer: "mamba",
    activation: ActivationSource::Is("silu"),
    adjust: |settings, sizes| {
        let expanded = settings.count(&["mamba_expand"])? * sizes.hidden;
        sizes.recurrent = RecurrentSizes {
            kernel: settings.count(&["mamba_d_conv"])?,
            inner: settings.optional_count(&["mamba_d_ssm"])?.unwrap_or(expanded),
            state: settings.count(&["mamba_d_state"])?,
            heads: settings.count(&["mamba_n_heads"])?,
            groups: settings.count(&["mamba_n_groups"])?,
        };
        sizes.kinds = vec![LayerKind::Both; sizes.layers];
        let width = auto_count(settings, "mamba_d_head", sizes.recurrent.head_width())?;
        check_heads(settings, sizes, ("mamba_d_head", width), "mamba_n_heads", "mamba_n_groups")?;
        require_silu(settings, "hidden_act")
    },
    keys: |keys| {
        recurrent_keys(keys);
        time_step_limits(keys)?;
        let is_first = keys.settings.switch("mamba_norm_before_gate", true)?;
        if keys.settings.switch("mamba_rms_norm", false)? && is_first {
            keys.set("ssm.norm_before_gate", true);
        }
        Ok(())
    },
    ..BASE
};

const HEAD: Values = Scaled(|settings, _| one(settings, "lm_head_multiplier"));

/// Factors that a weight has and its bias does not are those of its input.
const ATTENTION: [Entry; 8] = {
    const fn bias(gguf: &'static str, hf: &'static str, dims: &'static [Size]) -> Entry {
        tensor(gguf, hf).raw().named(".bias").dims(dims).when(If("attention_bias"))
    }
    [
        tensor("attn_q", "self_attn.q_proj").mapped(Scaled(|settings, _| one(settings, "attention_in_multiplier"))),
        tensor("attn_k", "self_attn.k_proj").mapped(Scaled(|settings, _| {
            whole([factor(settings, KEY)?, factor(settings, "attention_in_multiplier")?])
        })),
        tensor("attn_v", "self_attn.v_proj").mapped(Scaled(|settings, _| one(settings, "attention_in_multiplier"))),
        tensor("attn_output", "self_attn.o_proj")
            .mapped(Scaled(|settings, _| one(settings, "attention_out_multiplier"))),
        bias("attn_q", "self_attn.q_proj.bias", &[Size::Queries]),
        bias("attn_k", "self_attn.k_proj.bias", &[Size::Keys]).mapped(Scaled(|settings, _| one(settings, KEY))),
        bias("attn_v", "self_attn.v_proj.bias", &[Size::Keys]),
        bias("attn_output", "self_attn.o_proj.bias", &[Size::Hidden])
            .mapped(Scaled(|settings, _| one(settings, "attention_out_multiplier"))),
    ]
};

const KEY: &str = "key_multiplier";

const MIXER: [Entry; 9] = {
    let [input, conv, dt, a, d, norm, output] = mamba2(Never, If("mamba_conv_bias"));
    let out_factor = Scaled(|settings, _| one(settings, "ssm_out_multiplier"));
    [
        input.mapped(Scaled(|settings, sizes| mixer_input(settings, sizes, factor(settings, "ssm_in_multiplier")?))),
        conv,
        dt,
        a,
        d,
        norm.when(If("mamba_rms_norm")),
        output.mapped(out_factor),
        tensor("ssm_in", "#.in_proj.bias")
            .raw()
            .named(".bias")
            .dims(&[Size::MixerInput])
            .when(If("mamba_proj_bias"))
            .mapped(Scaled(|settings, sizes| mixer_input(settings, sizes, 1.0))),
        tensor("ssm_out", "#.out_proj.bias")
            .raw()
            .named(".bias")
            .dims(&[Size::Hidden])
            .when(If("projectors_bias"))
            .mapped(out_factor),
    ]
};

const FEED_FORWARD: [Entry; 5] = {
    const fn bias(gguf: &'static str, hf: &'static str, dims: &'static [Size]) -> Entry {
        tensor(gguf, hf).raw().named(".bias").dims(dims).when(If("mlp_bias"))
    }
    let [gate, down] =
        [Scaled(|settings, _| feed_forward(settings, 0)), Scaled(|settings, _| feed_forward(settings, 1))];
    [
        tensor("ffn_gate", "feed_forward.gate_proj").mapped(gate),
        tensor("ffn_up", "feed_forward.up_proj").bias(If("mlp_bias")),
        tensor("ffn_down", "feed_forward.down_proj").mapped(down),
        bias("ffn_gate", "feed_forward.gate_proj.bias", &[Size::Ffn]).mapped(gate),
        bias("ffn_down", "feed_forward.down_proj.bias", &[Size::Hidden]).mapped(down),
    ]
};

fn factor(settings: &Settings, key: &str) -> Result<f32> {
    Ok(settings.optional_float(&[key])?.unwrap_or(1.0) as f32)
}

/// The same factors for all rows.
fn whole(factors: [f32; 2]) -> Result<Vec<Segment>> {
    Ok(vec![Segment { rows: usize::MAX, factors }])
}

fn one(settings: &Settings, key: &str) -> Result<Vec<Segment>> {
    whole([factor(settings, key)?, 1.0])
}

/// The factor with this number of those of the feed-forward layer: of the gate, and of the output.
fn feed_forward(settings: &Settings, number: usize) -> Result<Vec<Segment>> {
    whole([listed(settings, "mlp_multipliers", 2)?[number], 1.0])
}

/// The factors of what Mamba-2 makes of its input: gates, values, what is written, what is read, and time steps.
fn mixer_input(settings: &Settings, sizes: &Sizes, input: f32) -> Result<Vec<Segment>> {
    let factors = listed(settings, "ssm_multipliers", 5)?;
    let RecurrentSizes { inner, state, heads, groups, .. } = sizes.recurrent;
    let rows = [inner, inner, groups * state, groups * state, heads];
    Ok(rows.into_iter().zip(factors).map(|(rows, factor)| Segment { rows, factors: [input, factor] }).collect())
}

/// The list of `count` factors under `key`, which are 1 where there is none.
fn listed(settings: &Settings, key: &str, count: usize) -> Result<Vec<f32>> {
    let found = settings.floats(key)?.unwrap_or_else(|| vec![1.0; count]);
    if found.len() == count {
        return Ok(found);
    }
    Err(settings.malformed(key, format_args!("{} numbers", found.len()), format_args!("{count} numbers")))
}
