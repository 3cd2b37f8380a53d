//! The families as data: names, shapes and switches of `config.json`, and how tensors are called and laid out.
//!
//! A family that resembles another is the other one with what differs (`..LLAMA`).

mod alibi;
mod gemma;
mod gpt;
mod llama;
mod phi;
mod qwen;

use super::keys::Keys;
use super::map::{Entry, Need, Transform, tensor};
use super::settings::{Defaults, Settings};
use super::sizes::Sizes;
use crate::error::Result;

/// Every family that can be read.
const FAMILIES: &[&Family] = &[
    &llama::LLAMA,
    &llama::MISTRAL,
    &llama::MIXTRAL,
    &llama::GRANITE,
    &llama::SMOLLM3,
    &llama::OLMO2,
    &llama::STABLELM,
    &qwen::QWEN2,
    &qwen::QWEN2_MOE,
    &qwen::QWEN3,
    &qwen::QWEN3_MOE,
    &gemma::GEMMA,
    &gemma::GEMMA2,
    &gemma::GEMMA3,
    &gpt::GPT2,
    &gpt::GPT_BIGCODE,
    &gpt::GPTJ,
    &gpt::GPT_NEOX,
    &gpt::OPT,
    &gpt::STARCODER2,
    &alibi::BLOOM,
    &alibi::FALCON,
    &alibi::MPT,
    &phi::PHI,
    &phi::PHI3,
];

/// The family of a `model_type`.
pub(super) fn by_model_type(name: &str) -> Option<&'static Family> {
    FAMILIES.iter().find(|family| family.model_types.contains(&name)).copied()
}

/// Every `model_type` that can be read.
pub(super) fn model_types() -> impl Iterator<Item = &'static str> {
    FAMILIES.iter().flat_map(|family| family.model_types).copied()
}

/// How the norms are written in config.json and GGUF.
#[derive(Debug, Clone, Copy)]
pub(super) enum Norm {
    Rms,
    Layer,
}

/// Which activation the feed-forward layer has.
#[derive(Debug, Clone, Copy)]
pub(super) enum Activation {
    /// The one under the first of these keys that has a value.
    Under(&'static [&'static str]),
    /// This one, by the name it has in the metadata.
    Is(&'static str),
}

/// Which dimensions of queries and keys are rotated.
#[derive(Debug, Clone, Copy)]
pub(super) enum Rotation {
    None,
    All,
    /// As many as the configuration says.
    Part,
    /// All, unless this switch is on.
    Unless(&'static str),
}

/// Which layers have the window that `sliding_window` says, where `layer_types` does not.
#[derive(Debug, Clone, Copy)]
pub(super) enum Window {
    /// None, whatever `sliding_window` says.
    Never,
    /// All.
    Always,
    /// The layers from the number under this key on.
    From(&'static str),
    /// All but every nth, the number being under one of these keys.
    Period(&'static [&'static str]),
    /// Nothing but `layer_types` says it.
    Listed,
}

/// A family, as transformers writes its checkpoints.
pub(super) struct Family {
    /// `model_type` in `config.json`.
    pub(super) model_types: &'static [&'static str],
    /// `general.architecture` in GGUF.
    pub(super) architecture: &'static str,
    /// What transformers assumes where `config.json` does not say.
    pub(super) defaults: Defaults,
    /// What `~` may stand for in names, the first that fits.
    pub(super) bases: &'static [&'static str],
    /// Tensors outside the layers.
    pub(super) outside: &'static [&'static [Entry]],
    /// What the names of layer N's tensors begin with, before N.
    pub(super) layers: &'static str,
    /// Tensors of a layer.
    pub(super) layer: &'static [&'static [Entry]],
    /// Beginnings of the names of tensors that are not needed.
    pub(super) ignored: &'static [&'static str],
    pub(super) norm: Norm,
    pub(super) activation: Activation,
    pub(super) rotation: Rotation,
    pub(super) window: Window,
    /// Puts sizes right that the family means otherwise than most.
    pub(super) adjust: fn(&Settings, &mut Sizes) -> Result<()>,
    /// Writes the keys that only this family has.
    pub(super) keys: fn(&mut Keys<'_>) -> Result<()>,
}

/// A family of no tensors, to start from.
const BASE: Family = Family {
    model_types: &[],
    architecture: "",
    defaults: &[],
    bases: &["model.", ""],
    outside: &[],
    layers: "~layers.",
    layer: &[],
    ignored: &[],
    norm: Norm::Rms,
    activation: Activation::Under(&["hidden_act"]),
    rotation: Rotation::All,
    window: Window::Never,
    adjust: |_, _| Ok(()),
    keys: |_| Ok(()),
};

// --- Parts that several families share ---------------------------------------------------------------------------------

/// The embedding, the last norm, and the output where it is not the embedding.
const EMBEDDING: &[Entry] = &[
    tensor("token_embd", "~embed_tokens"),
    tensor("output_norm", "~norm"),
    tensor("output", "lm_head").when(Need::Untied),
];

/// The norms before attention and before the feed-forward layer.
const NORMS: &[Entry] = &[tensor("attn_norm", "input_layernorm"), tensor("ffn_norm", "post_attention_layernorm")];

/// Query, key, value and output, with the order of the query and key rows and the biases.
const fn attention(rows: Transform, qkv: Need, output: Need) -> [Entry; 4] {
    [
        tensor("attn_q", "self_attn.q_proj").by(rows).bias(qkv),
        tensor("attn_k", "self_attn.k_proj").by(rows).bias(qkv),
        tensor("attn_v", "self_attn.v_proj").bias(qkv),
        tensor("attn_output", "self_attn.o_proj").bias(output),
    ]
}

/// Norms of the queries and keys of each head.
const fn head_norms(transform: Transform) -> [Entry; 2] {
    [tensor("attn_q_norm", "self_attn.q_norm").by(transform), tensor("attn_k_norm", "self_attn.k_norm").by(transform)]
}

/// A feed-forward layer with a gate.
const fn gated(need: Need, bias: Need) -> [Entry; 3] {
    [
        tensor("ffn_gate", "mlp.gate_proj").when(need).bias(bias),
        tensor("ffn_up", "mlp.up_proj").when(need).bias(bias),
        tensor("ffn_down", "mlp.down_proj").when(need).bias(bias),
    ]
}

/// For families whose feed-forward layer is four times as wide as the model unless they say otherwise.
fn four_times(_: &Settings, sizes: &mut Sizes) -> Result<()> {
    if sizes.ffn == 0 {
        sizes.ffn = 4 * sizes.hidden;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn defaults_are_json_and_every_model_type_belongs_to_one_family() {
        for family in FAMILIES {
            for (key, value) in family.defaults {
                assert!(serde_json::from_str::<serde_json::Value>(value).is_ok(), "{key} of {:?}", family.model_types);
            }
        }
        let mut names: Vec<_> = model_types().collect();
        let all = names.len();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), all);
    }
}
