//! RWKV of the fourth generation.

use crate::model::arch::NormKind;
use crate::model::hf::entry::{Need, tensor};
use crate::model::hf::families::family::{ActivationSource, BASE, HfFamily, Rotation};
use crate::model::hf::families::parts::four_times;
use crate::model::hf::sizes::{LayerKind, Size};
use Need::{Always, Untied};
use Size::{Ffn, Hidden};

/// Peng et al. 2023, arXiv 2305.13048.
pub(in crate::model::hf::families) const RWKV: HfFamily = HfFamily {
    model_types: &["rwkv"],
    architecture: "rwkv4",
    bases: &["rwkv.", ""],
    outside: &[&[
        tensor("token_embd", "~embeddings"),
        tensor("token_embd_norm", "~blocks.0.pre_ln").bias(Always),
        tensor("output_norm", "~ln_out").bias(Always),
        tensor("output", "head").when(Untied),
    ]],
    layers: "~blocks.",
    layer: &[&[
        tensor("attn_norm", "ln1").bias(Always),
        tensor("attn_norm_2", "ln2").bias(Always),
        tensor("time_mix_lerp_k", "attention.time_mix_key").raw(),
        tensor("time_mix_lerp_v", "attention.time_mix_value").raw(),
        tensor("time_mix_lerp_r", "attention.time_mix_receptance").raw(),
        tensor("time_mix_decay", "attention.time_decay").raw(),
        tensor("time_mix_first", "attention.time_first").raw(),
        tensor("time_mix_key", "attention.key").dims(&[Hidden, Hidden]),
        tensor("time_mix_value", "attention.value").dims(&[Hidden, Hidden]),
        tensor("time_mix_receptance", "attention.receptance").dims(&[Hidden, Hidden]),
        tensor("time_mix_output", "attention.output").dims(&[Hidden, Hidden]),
        tensor("channel_mix_lerp_k", "feed_forward.time_mix_key").raw(),
        tensor("channel_mix_lerp_r", "feed_forward.time_mix_receptance").raw(),
        tensor("channel_mix_key", "feed_forward.key").dims(&[Hidden, Ffn]),
        tensor("channel_mix_value", "feed_forward.value").dims(&[Ffn, Hidden]),
        tensor("channel_mix_receptance", "feed_forward.receptance").dims(&[Hidden, Hidden]),
    ]],
    norm: NormKind::Layer,
    activation: ActivationSource::Is("relu2"),
    rotation: Rotation::None,
    attends: false,
    adjust: |settings, sizes| {
        four_times(settings, sizes)?;
        sizes.kinds = vec![LayerKind::Recurrent; sizes.layers];
        sizes.context = settings.count(&["context_length", "max_position_embeddings"])?;
        // transformers itself cannot step where they differ.
        if let Some(width) = settings.optional_count(&["attention_hidden_size"])?.filter(|width| *width != sizes.hidden)
        {
            let supported = format!("supported: {}, as hidden_size", sizes.hidden);
            return Err(settings.unsupported("attention_hidden_size", width, &supported));
        }
        Ok(())
    },
    keys: |keys| {
        // The class gives the last norm this epsilon whatever the configuration says.
        keys.set("output_norm_epsilon", 1e-5f32);
        // Halving the residual stream every few layers is the same as four times the epsilon of the norms after it.
        let every = match keys.settings.get("rescale_every") {
            Some(every) if every.as_i64().is_some_and(|every| every <= 0) => 0,
            _ => keys.settings.number(&["rescale_every"])?,
        };
        keys.set("rescale_every", every as u32);
        Ok(())
    },
    ..BASE
};
