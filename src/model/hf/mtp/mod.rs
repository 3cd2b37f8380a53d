//! The head for multi-token prediction (MTP) of a checkpoint: a layer more, with a projection and norms of its own.
//!
//! GGUF has its tensors in a layer behind the last, as `nextn.*`. A head that lacks tensors is left out, with the reason.

use crate::error::Result;
use crate::format::gguf::{Array, Metadata, Value};
use crate::format::safetensors::SafeTensors;
use crate::model::arch;
use crate::model::hf::entry::{Entry, Need, Values, tensor};
use crate::model::hf::settings::Settings;
use crate::model::hf::sizes::{LayerKind, Size, Sizes};

/// How a family's checkpoints store the head.
#[derive(Clone, Copy)]
pub(in crate::model::hf) struct HfHead {
    pub(in crate::model::hf) place: HeadPlace,
    /// Tensors outside the head's layer.
    pub(in crate::model::hf) entries: &'static [Entry],
    /// The layer of the model whose window and sizes the head's layer has.
    pub(in crate::model::hf) like: fn(&Settings, &Sizes) -> Result<usize>,
    /// Whether the head's layer has experts, in models with experts.
    pub(in crate::model::hf) sparse: fn(&Settings) -> Result<bool>,
}

/// Where the head is.
#[derive(Clone, Copy)]
pub(in crate::model::hf) enum HeadPlace {
    /// In layers behind the last, which `num_nextn_predict_layers` counts.
    BehindLast,
    /// Under `mtp.`, with a numbering of its own.
    Separate,
}

/// What stands before the names of a head that is not in a layer behind the last.
const SEPARATE: &[&str] = &["mtp.", "model.mtp."];

/// The projection of embedding and state.
const PROJECTION: &[Size] = &[Size::TwiceHidden, Size::Hidden];

/// Like the last layer of attention.
fn like_last(_: &Settings, sizes: &Sizes) -> Result<usize> {
    let attends = |layer: &usize| sizes.kind(*layer) == LayerKind::Attention;
    Ok((0..sizes.layers).rev().find(attends).unwrap_or(sizes.layers.saturating_sub(1)))
}

/// DeepSeek's names, which GLM has, too.
pub(in crate::model::hf) const DEEPSEEK_HEAD: HfHead = HfHead {
    place: HeadPlace::BehindLast,
    entries: &[
        tensor("nextn.eh_proj", "eh_proj").dims(PROJECTION),
        tensor("nextn.enorm", "enorm"),
        tensor("nextn.hnorm", "hnorm"),
        tensor("nextn.shared_head_norm", "shared_head.norm"),
        tensor("nextn.shared_head_head", "shared_head.head").when(Need::Optional),
        tensor("nextn.embed_tokens", "embed_tokens").when(Need::Optional),
    ],
    like: like_last,
    sparse: |_| Ok(true),
};

/// Those names, with the last norm under another one.
pub(in crate::model::hf) const HUNYUAN_HEAD: HfHead = HfHead {
    entries: &[
        tensor("nextn.eh_proj", "eh_proj").dims(PROJECTION),
        tensor("nextn.enorm", "enorm"),
        tensor("nextn.hnorm", "hnorm"),
        tensor("nextn.shared_head_norm", "final_layernorm"),
    ],
    ..DEEPSEEK_HEAD
};

/// Qwen's names, with what happens to the weights of norms.
const fn qwen_entries(norms: Values) -> [Entry; 5] {
    [
        tensor("nextn.eh_proj", "fc").dims(PROJECTION),
        tensor("nextn.enorm", "pre_fc_norm_embedding").mapped(norms),
        tensor("nextn.hnorm", "pre_fc_norm_hidden").mapped(norms),
        tensor("nextn.shared_head_norm", "norm").mapped(norms),
        tensor("nextn.embed_tokens", "embed_tokens").when(Need::Optional),
    ]
}

/// A head under Qwen's names, as Mellum has it.
pub(in crate::model::hf) const MELLUM_HEAD: HfHead =
    HfHead { place: HeadPlace::Separate, entries: &qwen_entries(Values::Same), ..DEEPSEEK_HEAD };

/// A head under Qwen's names, whose norms are of 1 + weight.
pub(in crate::model::hf) const QWEN_HEAD: HfHead = HfHead { entries: &qwen_entries(Values::AddOne), ..MELLUM_HEAD };

/// The head of a checkpoint: what stands before the names of its tensors and before those of its layer.
pub(in crate::model::hf) struct FoundHead {
    pub(in crate::model::hf) head: HfHead,
    pub(in crate::model::hf) names: String,
    pub(in crate::model::hf) layer: String,
}

/// Finds the head of a checkpoint whose layers have names that begin with `layers` and their number; `None` where there is no
/// tensor of one. Of several layers, the first one is used.
pub(in crate::model::hf) fn find(
    head: HfHead,
    layers: &str,
    settings: &Settings,
    sizes: &Sizes,
    files: &SafeTensors,
) -> Result<Option<FoundHead>> {
    let is_there = |prefix: &str| files.tensors().iter().any(|tensor| tensor.name().starts_with(prefix));
    Ok(match head.place {
        HeadPlace::BehindLast => {
            let layer = format!("{layers}{}.", sizes.layers);
            let has_head = settings.number(&["num_nextn_predict_layers"])? > 0 && is_there(&layer);
            has_head.then(|| FoundHead { head, names: layer.clone(), layer })
        }
        HeadPlace::Separate => SEPARATE.iter().find(|prefix| is_there(prefix)).map(|prefix| FoundHead {
            head,
            names: (*prefix).to_owned(),
            layer: format!("{prefix}layers.0."),
        }),
    })
}

/// Adds the sizes of the head's layer, behind those of the model's layers.
pub(in crate::model::hf) fn add_sizes(head: &HfHead, settings: &Settings, sizes: &mut Sizes) -> Result<()> {
    let like = (head.like)(settings, sizes)?;
    if let Some(own) = sizes.per_layer.get(like) {
        sizes.per_layer.push(*own);
    }
    if sizes.experts > 0 {
        sizes.sparse.resize(sizes.layers, true);
        sizes.sparse.push((head.sparse)(settings)?);
    }
    Ok(())
}

/// Counts the head's layer in the keys, with the settings of the layer that it is like.
pub(in crate::model::hf) fn write_keys(
    head: &HfHead,
    settings: &Settings,
    sizes: &Sizes,
    architecture: &str,
    metadata: &mut Metadata,
) -> Result<()> {
    let (layers, like) = (sizes.layers, (head.like)(settings, sizes)?);
    let prefix = format!("{architecture}.");
    let pattern = format!("{prefix}attention.sliding_window_pattern");
    let first = arch::by_name(architecture).is_some_and(|family| family.quirks.full_layer_first);
    let extended = |key: &str, value: &Value| match value {
        Value::Array(array) if array.len() == layers => repeated(array, like).map(Value::Array),
        value if key == pattern => {
            let period = value.as_u64().filter(|period| *period > 0)? as usize;
            let full = if first { 0 } else { period - 1 };
            let windowed = |layer: usize| layer % period != full;
            let all: Vec<bool> = (0..layers).chain([like]).map(windowed).collect();
            (windowed(layers) != windowed(like)).then(|| all.into())
        }
        _ => None,
    };
    let own = metadata.iter().filter(|(key, _)| key.starts_with(&prefix));
    let changed: Vec<_> = own.filter_map(|(key, value)| Some((key.to_owned(), extended(key, value)?))).collect();
    for (key, value) in changed {
        metadata.set(key, value);
    }
    metadata.set(format!("{prefix}block_count"), layers as u32 + 1);
    metadata.set(format!("{prefix}nextn_predict_layers"), 1u32);
    Ok(())
}

/// The values of `array` and, behind them, number `index` once more. `None` for kinds of values that layers do not have.
fn repeated(array: &Array, index: usize) -> Option<Array> {
    let mut array = array.clone();
    match &mut array {
        Array::U32(values) => values.push(*values.get(index)?),
        Array::I32(values) => values.push(*values.get(index)?),
        Array::F32(values) => values.push(*values.get(index)?),
        Array::Bool(values) => values.push(*values.get(index)?),
        _ => return None,
    }
    Some(array)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_of_layers_end_with_the_heads() {
        assert_eq!(repeated(&Array::Bool(vec![true, false]), 0), Some(Array::Bool(vec![true, false, true])));
        assert_eq!(repeated(&Array::U32(vec![4, 8]), 1), Some(Array::U32(vec![4, 8, 8])));
        assert_eq!(repeated(&Array::U64(vec![4, 8]), 1), None);
    }
}
