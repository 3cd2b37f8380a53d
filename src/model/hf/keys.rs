//! Writes `config.json` under GGUF's keys.

use std::path::Path;

use serde_json::Value as Json;

use super::families::{ActivationSource, HfFamily, WindowRule};
use super::heads;
use super::metadata::{ComputedTensor, MetadataWriter};
use super::modules::{self, ModuleTensor};
use super::rope;
use super::settings::Settings;
use super::sizes::{LayerSizes, Sizes};
use super::switches;
use crate::error::Result;
use crate::format::gguf::{Metadata, StringArray, Value};
use crate::format::json;
use crate::model::arch::{self, NormKind};

/// All keys of the model called `name` in the folder `path`, the tensors that it has besides those of its files, and those of
/// modules that follow it.
///
/// # Errors
/// [`Error::Missing`](crate::Error::Missing), [`Error::Malformed`](crate::Error::Malformed) and
/// [`Error::Unsupported`](crate::Error::Unsupported) with the key of `config.json`.
pub(super) fn write(
    family: &HfFamily,
    settings: &Settings,
    sizes: &Sizes,
    path: &Path,
    name: &str,
) -> Result<(Metadata, Vec<ComputedTensor>, Vec<ModuleTensor>)> {
    let mut writer = MetadataWriter::new(family.architecture, settings, sizes);
    writer.metadata.set("general.architecture", family.architecture).set("general.type", "model");
    if !name.is_empty() {
        writer.metadata.set("general.name", name);
    }
    for (key, supported) in switches::REQUIRED.iter().copied() {
        writer.require(key, supported)?;
    }
    writer.causal = settings.switch("is_causal", true)? && !family.encoder;
    if !writer.causal {
        writer.set("attention.causal", false);
    }
    classifier(&mut writer)?;
    set_sizes(&mut writer);
    norm(&mut writer, family)?;
    activation(&mut writer, family.activation)?;
    writer.windowed = window(&mut writer, family)?;
    if sizes.rotary > 0 {
        rope::write(&mut writer)?;
    }
    (family.keys)(&mut writer)?;
    let modules = modules::read(path, &mut writer)?;
    Ok((writer.metadata, writer.tensors, modules))
}

/// Writes the keys of a classification head, and that a classifier has no logits of tokens.
fn classifier(keys: &mut MetadataWriter<'_>) -> Result<()> {
    let labels = heads::labels(keys.settings)?;
    if labels.is_empty() {
        return Ok(());
    }
    keys.set("classifier.output_labels", StringArray::from_iter(labels.iter().map(|label| label.as_bytes())));
    keys.set("pooling_type", RANK);
    keys.set("generates", false);
    Ok(())
}

/// llama.cpp's number of the pooling of a classification head.
const RANK: u32 = 4;

fn set_sizes(writer: &mut MetadataWriter<'_>) {
    let sizes = writer.sizes;
    per_layer_sizes(writer);
    let mut set = |key, size: usize| writer.set(key, size as u32);
    set("vocab_size", sizes.vocabulary);
    set("context_length", sizes.context);
    set("embedding_length", sizes.hidden);
    set("block_count", sizes.layers);
    if sizes.per_layer.is_empty() {
        set("feed_forward_length", sizes.ffn);
        set("attention.head_count", sizes.heads);
    }
    if sizes.per_layer.is_empty() && sizes.heads > 0 {
        set("attention.head_count_kv", sizes.kv_heads);
    }
    if sizes.head_dim > 0 {
        set("attention.key_length", sizes.head_dim);
        set("attention.value_length", sizes.head_dim);
    }
    if sizes.experts > 0 {
        set("expert_count", sizes.experts);
        set("expert_feed_forward_length", sizes.expert_ffn);
    }
    if sizes.window_head_dim > 0 {
        set("attention.key_length_swa", sizes.window_head_dim);
        set("attention.value_length_swa", sizes.window_head_dim);
    }
    if sizes.shared_ffn > 0 {
        set("expert_shared_feed_forward_length", sizes.shared_ffn);
    }
}

/// The sizes that differ between layers: once where they are the same in all.
fn per_layer_sizes(writer: &mut MetadataWriter<'_>) {
    let layers = &writer.sizes.per_layer;
    if layers.is_empty() {
        return;
    }
    let of = |size: fn(&LayerSizes) -> usize| layers.iter().map(|layer| size(layer) as u32).collect::<Vec<_>>();
    let keys = [
        ("feed_forward_length", of(|layer| layer.ffn)),
        ("attention.head_count", of(|layer| layer.heads)),
        ("attention.head_count_kv", of(|layer| layer.kv_heads)),
    ];
    for (key, all) in keys {
        match all.first().filter(|first| all.iter().all(|other| other == *first)) {
            Some(first) => writer.set(key, *first),
            None => writer.set(key, all.clone()),
        }
    }
}

fn norm(writer: &mut MetadataWriter<'_>, family: &HfFamily) -> Result<()> {
    let (key, names): (_, &[&str]) = match family.norm {
        NormKind::Rms => ("attention.layer_norm_rms_epsilon", &["rms_norm_eps"]),
        NormKind::Layer => {
            const NAMES: &[&str] =
                &["layer_norm_epsilon", "layer_norm_eps", "norm_epsilon", "norm_eps", "rms_norm_eps"];
            ("attention.layer_norm_epsilon", NAMES)
        }
    };
    let names = if family.epsilon.is_empty() { names } else { family.epsilon };
    let epsilon = writer.settings.float(names)?;
    if epsilon <= 0.0 {
        return Err(writer.settings.malformed(names[0], epsilon, "a positive number"));
    }
    writer.set(key, epsilon as f32);
    Ok(())
}

fn activation(writer: &mut MetadataWriter<'_>, source: ActivationSource) -> Result<()> {
    let name = match source {
        ActivationSource::Is(name) => name,
        ActivationSource::Xielu => {
            let name = writer.settings.text(&["hidden_act"])?.unwrap_or_default();
            if name != "xielu" {
                return Err(writer.settings.unsupported("hidden_act", format_args!("{name:?}"), "supported: xielu"));
            }
            return Ok(());
        }
        ActivationSource::Under(keys) | ActivationSource::UnderForTanh(keys) => {
            let first = keys.first().copied().unwrap_or_default();
            let name = writer.settings.text(keys)?.ok_or_else(|| writer.settings.missing(first, "an activation"))?;
            match name.as_str() {
                "silu" | "swish" | "swiglu" => "silu",
                "gelu" if matches!(source, ActivationSource::UnderForTanh(_)) => "gelu_tanh",
                "gelu" | "gelu_python" => "gelu",
                "gelu_new" | "gelu_fast" | "gelu_pytorch_tanh" => "gelu_tanh",
                "relu" => "relu",
                "relu2" => "relu2",
                other => {
                    let supported = "supported: silu, gelu, gelu_new, gelu_fast, gelu_pytorch_tanh, relu, relu2";
                    return Err(writer.settings.unsupported(first, json::brief(&Json::from(other)), supported));
                }
            }
        }
    };
    writer.set("hidden_activation", name);
    Ok(())
}

/// Architectures for which llama.cpp reads a switch per layer, and no period.
const LISTED_WINDOWS: [&str; 2] = ["gemma4", "granite_swa"];

/// The window of attention, and which layers have one.
fn window(writer: &mut MetadataWriter<'_>, family: &HfFamily) -> Result<Vec<bool>> {
    let rule = family.window;
    let settings = writer.settings;
    if matches!(rule, WindowRule::Never) || !settings.switch("use_sliding_window", true)? {
        return Ok(Vec::new());
    }
    let Some(window) = settings.optional_count(&["sliding_window", "local_attention"])? else { return Ok(Vec::new()) };
    // In GGUF a window in both directions is its whole width.
    let window = if writer.causal || !family.radius { window } else { 2 * window };
    let slides = window_kinds(settings, writer.sizes.layers, rule)?;
    if slides.contains(&true) {
        writer.set("attention.sliding_window", window as u32);
        if !matches!(rule, WindowRule::Always) || slides.contains(&false) {
            let first = arch::by_name(family.architecture).is_some_and(|family| family.quirks.full_layer_first);
            let listed = first || LISTED_WINDOWS.contains(&family.architecture);
            writer
                .set("attention.sliding_window_pattern", if listed { slides.clone().into() } else { pattern(&slides) });
        }
    }
    Ok(slides)
}

/// Which layers have a window, in a model that has one.
pub(super) fn window_kinds(settings: &Settings, layers: usize, rule: WindowRule) -> Result<Vec<bool>> {
    let kinds = settings.per_layer("layer_types", layers, "full_attention or sliding_attention", |kind| match kind
        .as_str()
    {
        Some("full_attention") => Some(false),
        Some("sliding_attention") => Some(true),
        _ => None,
    })?;
    Ok(match (kinds, rule) {
        (kinds, WindowRule::PeriodThenFull(keys)) => {
            let kinds = match kinds {
                Some(kinds) => kinds,
                None => {
                    let period = settings.count(keys)?;
                    (0..layers).map(|layer| !(layer + 1).is_multiple_of(period)).collect()
                }
            };
            kinds.into_iter().enumerate().map(|(layer, slides)| slides && layer + 1 < layers).collect()
        }
        (Some(kinds), _) => kinds,
        (None, WindowRule::From(key)) => {
            let first = settings.get(key).and_then(|first| first.as_u64()).unwrap_or(0);
            (0..layers).map(|layer| layer as u64 >= first).collect()
        }
        (None, WindowRule::Period(keys)) => {
            let period = settings.count(keys)?;
            (0..layers).map(|layer| !(layer + 1).is_multiple_of(period)).collect()
        }
        (None, WindowRule::Pattern(key)) => {
            // A number, or a letter per layer of a period.
            let period = match settings.get(key).as_ref().and_then(|pattern| pattern.as_str().map(str::len)) {
                Some(letters) => letters,
                None => settings.number(&[key])?,
            };
            (0..layers).map(|layer| period > 0 && !(layer + 1).is_multiple_of(period)).collect()
        }
        (None, WindowRule::FullFirstOf(key)) => {
            let period = settings.count(&[key])?;
            (0..layers).map(|layer| !layer.is_multiple_of(period)).collect()
        }
        (None, WindowRule::FullFirst(period)) => (0..layers).map(|layer| !layer.is_multiple_of(period)).collect(),
        (None, WindowRule::Listed) => return Err(settings.missing("layer_types", "a list")),
        (None, WindowRule::ListedOrNone) => vec![false; layers],
        (None, _) => vec![true; layers],
    })
}

/// Which layers have a window: the period `n` where all but every `n`th have one, otherwise a switch per layer.
fn pattern(slides: &[bool]) -> Value {
    let repeats = |period: &usize| slides.iter().enumerate().all(|(i, slides)| *slides == (i % period < period - 1));
    match (1..=slides.len() + 1).find(repeats) {
        Some(period) => Value::U32(period as u32),
        None => Value::from(slides.to_vec()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_in_all_but_every_nth_layer_are_written_as_a_period() {
        assert_eq!(pattern(&[true, false, true, false]), Value::U32(2));
        assert_eq!(pattern(&[true, true, true, true, true, false, true]), Value::U32(6));
        assert_eq!(pattern(&[false, false]), Value::U32(1));
        assert_eq!(pattern(&[true, true]), Value::U32(3));
        assert_eq!(pattern(&[false, true]), Value::from(vec![false, true]));
    }
}
