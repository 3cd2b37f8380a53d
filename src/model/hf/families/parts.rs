//! Entries that several families share.

use crate::error::Result;
use crate::model::hf::entry::{Entry, Need, Transform, Values, tensor};
use crate::model::hf::heads::classifies;
use crate::model::hf::metadata::MetadataWriter;
use crate::model::hf::settings::Settings;
use crate::model::hf::sizes::{Size, Sizes};

/// The embedding, the last norm, and the output where it is not tied to the embedding.
pub(super) const EMBEDDING: &[Entry] = &[
    tensor("token_embd", "~embed_tokens"),
    tensor("output_norm", "~norm"),
    tensor("output", "lm_head").when(Need::Untied),
    SCORE,
];

/// The matrix of a classifier that reads the last token.
pub(super) const SCORE: Entry = tensor("cls.output", "score").when(Need::IfSo(classifies));

/// As [`EMBEDDING`], with a bias of the last norm.
pub(super) const EMBEDDING_WITH_BIAS: &[Entry] = &[
    tensor("token_embd", "~embed_tokens"),
    tensor("output_norm", "~norm").bias(Need::Always),
    tensor("output", "lm_head").when(Need::Untied),
    SCORE,
];

/// The bias of an output that this switch adds, and the output's own matrix where it is tied to the embedding: a bias needs
/// one.
pub(super) const fn tied_with_bias(switch: &'static str) -> [Entry; 2] {
    [
        tensor("output", "lm_head").when(Need::Never).bias(Need::If(switch)),
        tensor("output", "~embed_tokens").when(Need::Both("tie_word_embeddings", switch)),
    ]
}

/// As [`EMBEDDING_WITH_BIAS`], under other names and without the matrix of a classifier.
pub(super) const fn named_embedding(embedding: &'static str, norm: &'static str, output: Entry) -> [Entry; 3] {
    [tensor("token_embd", embedding), tensor("output_norm", norm).bias(Need::Always), output.when(Need::Untied)]
}

/// Entries with biases: the names in GGUF and in the checkpoint.
pub(super) const fn biased<const N: usize>(bias: Need, names: [[&'static str; 2]; N]) -> [Entry; N] {
    let mut entries = [tensor("", ""); N];
    let mut index = 0;
    while index < N {
        let [gguf, hf] = names[index];
        entries[index] = tensor(gguf, hf).bias(bias);
        index += 1;
    }
    entries
}

/// The norms before attention and before the feed-forward layer.
pub(super) const NORMS: &[Entry] =
    &[tensor("attn_norm", "input_layernorm"), tensor("ffn_norm", "post_attention_layernorm")];

/// Query, key, value and output projection, with the order of the query and key rows and the need for biases.
pub(super) const fn attention(rows: Transform, qkv: Need, output: Need) -> [Entry; 4] {
    [
        tensor("attn_q", "self_attn.q_proj").by(rows).bias(qkv),
        tensor("attn_k", "self_attn.k_proj").by(rows).bias(qkv),
        tensor("attn_v", "self_attn.v_proj").bias(qkv),
        tensor("attn_output", "self_attn.o_proj").bias(output),
    ]
}

/// As [`attention`], with biases where `attention_bias` is on.
pub(super) const fn default_attention(rows: Transform) -> [Entry; 4] {
    attention(rows, Need::If("attention_bias"), Need::If("attention_bias"))
}

/// Norms of the queries and keys of each head.
pub(super) const fn head_norms(values: Values) -> [Entry; 2] {
    [tensor("attn_q_norm", "self_attn.q_norm").mapped(values), tensor("attn_k_norm", "self_attn.k_norm").mapped(values)]
}

/// A feed-forward layer with a gate.
pub(super) const fn gated(need: Need, bias: Need) -> [Entry; 3] {
    [
        tensor("ffn_gate", "mlp.gate_proj").when(need).bias(bias),
        tensor("ffn_up", "mlp.up_proj").when(need).bias(bias),
        tensor("ffn_down", "mlp.down_proj").when(need).bias(bias),
    ]
}

/// A feed-forward layer with a gate, whose gate and up are one matrix.
pub(super) const MERGED_GATED: &[Entry] =
    &[tensor("ffn_up", "mlp.gate_up_proj").dims(&[Size::Hidden, Size::TwiceFfn]), tensor("ffn_down", "mlp.down_proj")];

/// Router and selection bias of layers with experts.
pub(super) const fn routed(router: &'static str, bias: &'static str) -> [Entry; 2] {
    [
        tensor("ffn_gate_inp", router).when(Need::Sparse),
        tensor("exp_probs_b", bias).raw().named(".bias").when(Need::Sparse),
    ]
}

/// Experts that are one tensor each. `{e}` in the prefix of their names is the number of the expert.
pub(super) const fn expert_list(prefix: &'static str, need: Need) -> [Entry; 3] {
    let [gate, up, down] = projections(prefix);
    [
        tensor("ffn_gate_exps", gate).by(Transform::Stack).when(need),
        tensor("ffn_up_exps", up).by(Transform::Stack).when(need),
        tensor("ffn_down_exps", down).by(Transform::Stack).when(need),
    ]
}

/// The experts that every token uses, in one network.
pub(super) const fn shared_experts(prefix: &'static str, bias: Need) -> [Entry; 3] {
    let [gate, up, down] = projections(prefix);
    let need = Need::Where(has_shared_experts);
    [
        tensor("ffn_gate_shexp", gate).when(need).bias(bias),
        tensor("ffn_up_shexp", up).when(need).bias(bias),
        tensor("ffn_down_shexp", down).when(need).bias(bias),
    ]
}

/// Router, experts and shared experts under DeepSeek's names.
pub(super) const DEEPSEEK_EXPERTS: [Entry; 8] = {
    let [router, bias] = routed("mlp.gate", "mlp.gate.e_score_correction_bias");
    let [gate, up, down] = expert_list("mlp.experts.{e}", Need::Sparse);
    let [shared_gate, shared_up, shared_down] = shared_experts("mlp.shared_experts", Need::Never);
    [router, bias, gate, up, down, shared_gate, shared_up, shared_down]
};

fn has_shared_experts(sizes: &Sizes, layer: usize) -> bool {
    sizes.shared_ffn > 0 && sizes.is_sparse(layer)
}

/// The names of gate, up and down below these prefixes.
const fn projections(prefix: &'static str) -> [&'static str; 3] {
    match prefix.as_bytes() {
        b"mlp.experts.{e}" => ["mlp.experts.{e}.gate_proj", "mlp.experts.{e}.up_proj", "mlp.experts.{e}.down_proj"],
        b"mlp.shared_experts" => {
            ["mlp.shared_experts.gate_proj", "mlp.shared_experts.up_proj", "mlp.shared_experts.down_proj"]
        }
        b"mlp.shared_expert" => {
            ["mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj", "mlp.shared_expert.down_proj"]
        }
        b"mlp.shared_mlp" => ["mlp.shared_mlp.gate_proj", "mlp.shared_mlp.up_proj", "mlp.shared_mlp.down_proj"],
        _ => panic!("an unknown prefix"),
    }
}

/// Makes experts as wide as the feed-forward layer.
pub(super) fn experts_of_ffn_width(_: &Settings, sizes: &mut Sizes) -> Result<()> {
    sizes.expert_ffn = sizes.ffn;
    Ok(())
}

/// Reads the sizes of experts under DeepSeek's names, with dense layers first.
pub(super) fn first_dense(settings: &Settings, sizes: &mut Sizes) -> Result<()> {
    sizes.shared_ffn = sizes.expert_ffn * settings.number(&["n_shared_experts"])?;
    let first = settings.number(&["first_k_dense_replace"])?;
    sizes.sparse = (0..sizes.layers).map(|layer| layer >= first).collect();
    Ok(())
}

/// Reads which layers have experts from `mlp_layer_types`. Where there is no such list, `default` says it.
pub(super) fn sparse_list(settings: &Settings, sizes: &mut Sizes, default: fn(usize) -> bool) -> Result<()> {
    let listed =
        settings.per_layer("mlp_layer_types", sizes.layers, "dense or sparse", |kind| match kind.as_str() {
            Some("dense") => Some(false),
            Some("sparse") => Some(true),
            _ => None,
        })?;
    sizes.sparse = listed.unwrap_or_else(|| (0..sizes.layers).map(default).collect());
    Ok(())
}

/// Which layers rotate queries and keys: `no_rope_layers` lists them, otherwise all but every nth do, where `period` is the
/// key of n.
pub(super) fn rotating_layers(keys: &MetadataWriter<'_>, period: &str) -> Result<Vec<bool>> {
    let layers = keys.sizes.layers;
    let listed = match keys.settings.get("no_rope_layers").as_ref().and_then(|list| list.as_array()) {
        Some(list) if list.is_empty() => None,
        _ => keys.settings.per_layer("no_rope_layers", layers, "1 to rotate, 0 not to", |rotates| {
            rotates.as_u64().map(|rotates| rotates != 0)
        })?,
    };
    match listed {
        Some(listed) => Ok(listed),
        None => {
            let period = keys.settings.count(&[period])?;
            Ok((0..layers).map(|layer| !(layer + 1).is_multiple_of(period)).collect())
        }
    }
}

/// Writes whether attention and feed-forward layer share their input, `default` where the configuration does not say it.
pub(super) fn parallel_residual(keys: &mut MetadataWriter<'_>, default: bool) -> Result<()> {
    let parallel = keys.settings.switch("use_parallel_residual", default)?;
    keys.set("use_parallel_residual", parallel);
    Ok(())
}

/// Makes the feed-forward layer four times as wide as the model where the configuration has no width.
pub(super) fn four_times(_: &Settings, sizes: &mut Sizes) -> Result<()> {
    if sizes.ffn == 0 {
        sizes.ffn = 4 * sizes.hidden;
    }
    Ok(())
}
