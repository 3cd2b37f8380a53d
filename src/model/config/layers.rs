//! The hyperparameters that differ between layers.

use super::latent::LatentConfig;
use super::metadata::MetadataReader;
use crate::error::Result;
use crate::format::gguf::Value;
use crate::model::arch::{
    Family, FeedForwardKind, LayerKind, MixerKind, Position, RecurrentLayers, Rotated, Temperature,
};

/// The settings that differ between layers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct LayerConfig {
    /// Its mixer and its feed-forward layer.
    pub kind: LayerKind,
    /// Positions that a query sees, including its own: backwards, and as many forwards where attention is not causal.
    pub window: Option<usize>,
    /// A query sees positions of its own chunk, of this length counted from 0.
    pub chunk: Option<usize>,
    /// Whether queries and keys are rotated.
    pub rotated: bool,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads, a divisor of `heads`.
    pub kv_heads: usize,
    /// Width of a query's or key's head.
    pub head_dim: usize,
    /// Width of a value's head.
    pub value_dim: usize,
    /// Dimensions of a head that are rotated; even, at most `head_dim`; 0 for none.
    pub rotary: usize,
    /// The layer whose keys and values this one reads instead of its own.
    pub shares: Option<usize>,
    /// Whether queries grow with the position.
    pub tempered: bool,
}

/// How far back queries see.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Reach {
    /// As [`LayerConfig::window`].
    pub(crate) window: Option<usize>,
    /// As [`LayerConfig::chunk`].
    pub(crate) chunk: Option<usize>,
}

impl Reach {
    /// The first position that a query at `position` sees.
    pub(crate) fn oldest(&self, position: usize) -> usize {
        let in_window = self.window.map_or(0, |window| (position + 1).saturating_sub(window));
        let in_chunk = self.chunk.map_or(0, |chunk| position / chunk * chunk);
        in_window.max(in_chunk)
    }
}

impl LayerConfig {
    /// How far back its queries see.
    pub(crate) fn reach(&self) -> Reach {
        Reach { window: self.window, chunk: self.chunk }
    }

    /// The rotation that applies: 0 without a window, 1 with one.
    pub(crate) fn rope(&self) -> usize {
        usize::from(self.window.is_some() || self.chunk.is_some())
    }
}

/// The widths of heads in layers without and with a window: keys, values, and what is rotated.
struct Widths {
    key: usize,
    value: usize,
    rotary: usize,
}

/// Reads the settings of all `layers` layers. `rotates` says whether the model rotates at all, `causal` whether attention
/// goes only backwards.
#[allow(clippy::too_many_arguments, reason = "the model's own settings, from which layers are made")]
pub(super) fn read(
    keys: &MetadataReader<'_>,
    family: &Family,
    layers: usize,
    hidden: usize,
    rotates: bool,
    causal: bool,
    latent: Option<&LatentConfig>,
    temperature: Option<Temperature>,
) -> Result<Vec<LayerConfig>> {
    let least = usize::from(family.recurrent.is_none());
    let heads = keys.per_layer(least, "attention.head_count", layers)?;
    let heads = heads.ok_or_else(|| keys.missing("attention.head_count"))?;
    let kv_heads = keys.per_layer(least, "attention.head_count_kv", layers)?.unwrap_or_else(|| heads.clone());
    let kinds = kinds(keys, family, layers, &kv_heads)?;
    let attends = |kind: &LayerKind| {
        matches!(kind.mixer, MixerKind::Attention | MixerKind::LatentAttention | MixerKind::AttentionAndMamba2)
    };
    for ((heads, kv_heads), _) in heads.iter().zip(&kv_heads).zip(&kinds).filter(|(_, kind)| attends(kind)) {
        keys.check("attention.head_count", heads, *heads > 0, "at least 1 in layers of attention")?;
        keys.check("attention.head_count_kv", kv_heads, *kv_heads > 0, "at least 1 in layers of attention")?;
        let expected = format_args!("a divisor of the {heads} heads");
        keys.check("attention.head_count_kv", kv_heads, heads.is_multiple_of(*kv_heads), expected)?;
    }
    let widths = match latent {
        Some(latent) => [latent_widths(latent), latent_widths(latent)],
        None => match heads.iter().zip(&kinds).find(|(_, kind)| attends(kind)) {
            Some((heads, _)) => widths(keys, hidden, *heads, rotates)?,
            None => [Widths { key: 0, value: 0, rotary: 0 }, Widths { key: 0, value: 0, rotary: 0 }],
        },
    };
    let mut windows = Windows::read(keys, family, layers)?;
    if !causal {
        // A window in both directions has its position in the middle.
        windows.window = windows.window.map(|window| window / 2 + 1);
    }
    let rotated = keys.flags("attention.rope_pattern", layers)?;
    let is_nth = |period: usize, layer: usize| period > 0 && layer % period == period - 1;
    let any_window = (0..layers).any(|layer| windows.applies(layer));
    let shared = shared_layers(keys, layers)?;
    let mut all: Vec<LayerConfig> = Vec::with_capacity(layers);
    for layer in 0..layers {
        let attends = attends(&kinds[layer]);
        let windowed = windows.applies(layer) && attends;
        let Widths { key, value, rotary } = &widths[usize::from(windowed)];
        let rotated = match (&rotated, family.quirks.rotated) {
            (Some(flags), _) => flags[layer],
            (None, Rotated::AllBut(period)) => !is_nth(period, layer),
            (None, Rotated::Windowed) => windowed || !any_window,
        };
        let own = LayerConfig {
            kind: kinds[layer],
            window: windows.window.filter(|_| windowed),
            chunk: windows.chunk.filter(|_| windowed),
            rotated,
            heads: heads[layer],
            kv_heads: match (attends, latent) {
                (false, _) => 0,
                (true, Some(_)) => 1,
                (true, None) => kv_heads[layer],
            },
            head_dim: *key,
            value_dim: *value,
            rotary: *rotary,
            shares: None,
            tempered: temperature.is_some() && (family.quirks.temperature.is_none() || !rotated),
        };
        let shares = match shared.filter(|first| layer >= *first) {
            None => None,
            Some(first) => {
                let alike = |other: &usize| windows.applies(*other) == windowed;
                let source = (0..first).rev().find(alike).ok_or_else(|| {
                    let found = format!("{} layers that share keys and values", layers - first);
                    keys.malformed("attention.shared_kv_layers", found, "an earlier layer with the same window as each")
                })?;
                let LayerConfig { kv_heads, head_dim, value_dim, .. } = all[source];
                let same = (kv_heads, head_dim, value_dim) == (own.kv_heads, own.head_dim, own.value_dim);
                keys.check(
                    "attention.head_count_kv",
                    own.kv_heads,
                    same,
                    format_args!("{kv_heads}, as in layer {source}"),
                )?;
                Some(source)
            }
        };
        all.push(LayerConfig { shares, ..own });
    }
    Ok(all)
}

/// The first of the last layers that take keys and values from others.
fn shared_layers(keys: &MetadataReader<'_>, layers: usize) -> Result<Option<usize>> {
    let key = "attention.shared_kv_layers";
    // A float in files of some converters.
    let Some(value) = keys.get(key) else { return Ok(None) };
    let shared = value.as_u64().or_else(|| value.as_f32().filter(|n| n.fract() == 0.0 && *n >= 0.0).map(|n| n as u64));
    let shared = shared.ok_or_else(|| keys.malformed(key, value, "a number of layers"))?;
    keys.check(key, shared, shared < layers as u64, format_args!("fewer than the {layers} layers"))?;
    Ok((shared > 0).then(|| layers - shared as usize))
}

fn latent_widths(latent: &LatentConfig) -> Widths {
    Widths { key: latent.kv_rank + latent.rope, value: latent.kv_rank, rotary: latent.rope }
}

/// The widths of layers without and with a window.
fn widths(keys: &MetadataReader<'_>, hidden: usize, heads: usize, rotates: bool) -> Result<[Widths; 2]> {
    let key = match keys.optional_count("attention.key_length")? {
        Some(length) => length,
        None => {
            let expected = format_args!("a divisor of the embedding length {hidden}");
            keys.check("attention.head_count", heads, hidden.is_multiple_of(heads), expected)?;
            hidden / heads
        }
    };
    let value = keys.optional_count("attention.value_length")?.unwrap_or(key);
    let rotary = if rotates { keys.optional_count("rope.dimension_count")?.unwrap_or(key) } else { 0 };
    let window_key = keys.optional_count("attention.key_length_swa")?;
    let window_value = keys.optional_count("attention.value_length_swa")?;
    let window_rotary = keys.optional_count("rope.dimension_count_swa")?;
    let window_rotary = window_rotary.or(window_key).unwrap_or(rotary);
    let all = [
        Widths { key, value, rotary },
        Widths {
            key: window_key.unwrap_or(key),
            value: window_value.or(window_key).unwrap_or(value),
            rotary: if rotates { window_rotary } else { 0 },
        },
    ];
    for (Widths { key, value, rotary }, suffix) in all.iter().zip(["", "_swa"]) {
        keys.check(&format!("attention.key_length{suffix}"), key, *key <= 1 << 16, "at most 65536")?;
        keys.check(&format!("attention.value_length{suffix}"), value, *value <= 1 << 16, "at most 65536")?;
        let fits = rotary.is_multiple_of(2) && rotary <= key;
        let expected = format_args!("an even number up to {key}");
        keys.check(&format!("rope.dimension_count{suffix}"), rotary, fits, expected)?;
    }
    Ok(all)
}

/// Which layers have a window or chunks.
struct Windows {
    window: Option<usize>,
    chunk: Option<usize>,
    /// A switch per layer, in files that list them.
    listed: Option<Vec<bool>>,
    /// Otherwise, one of this many layers is without; 0 for none.
    period: usize,
    full_layer_first: bool,
}

impl Windows {
    fn read(keys: &MetadataReader<'_>, family: &Family, layers: usize) -> Result<Windows> {
        let quirks = &family.quirks;
        let length = |key: &str| match keys.get(key) {
            Some(value) if value.as_u64() == Some(0) => Ok(None),
            _ => keys.optional_count(key),
        };
        let (window, chunk) = (length("attention.sliding_window")?, length("attention.chunk_length")?);
        let has_window = keys.get("attention.sliding_window").is_some();
        let (window, chunk) = match quirks.chunk {
            // Where the model has chunks, a window of 0 means that it has none.
            Some(default) if !has_window => (None, chunk.or(Some(default))),
            Some(_) => (None, chunk),
            None => (window, chunk),
        };
        let pattern = "attention.sliding_window_pattern";
        let (listed, period) = match keys.get(pattern).map(Value::as_u64) {
            Some(Some(0)) => (None, 0),
            Some(Some(_)) => (None, keys.count(pattern)?),
            _ => (keys.flags(pattern, layers)?, quirks.window_period),
        };
        Ok(Windows { window, chunk, listed, period, full_layer_first: quirks.full_layer_first })
    }

    /// Whether `layer` has a window or chunks.
    fn applies(&self, layer: usize) -> bool {
        let full = if self.full_layer_first { 0 } else { self.period.saturating_sub(1) };
        (self.window.is_some() || self.chunk.is_some())
            && match &self.listed {
                Some(flags) => flags[layer],
                None => self.period == 0 || layer % self.period != full,
            }
    }
}

/// How queries grow with the position: `1 + scale ln(1 + floor((position + offset) / length))`.
pub(super) fn temperature(
    keys: &MetadataReader<'_>,
    family: &Family,
    original: Option<f32>,
) -> Result<Option<Temperature>> {
    let default = family.quirks.temperature;
    let zero = |key: &str| keys.get(key).is_some_and(|value| value.as_f32() == Some(0.0) || value.as_u64() == Some(0));
    let scale = keys.positive("attention.temperature_scale")?.or(default.map(|default| default.scale));
    let length = match keys.get("attention.temperature_length") {
        Some(_) if zero("attention.temperature_length") => None,
        _ => keys.optional_count("attention.temperature_length")?.map(|length| length as f32),
    };
    if zero("attention.temperature_scale") {
        return Ok(None);
    }
    let Some(scale) = scale else { return Ok(None) };
    let Some(length) = length.or(default.map(|default| default.length)).or(original) else {
        return Err(keys.missing("attention.temperature_length"));
    };
    Ok(Some(Temperature { scale, length, offset: default.map_or(0.0, |default| default.offset) }))
}

/// Whether queries and keys are rotated.
pub(super) fn rotates(keys: &MetadataReader<'_>, family: &Family) -> Result<bool> {
    // Granite's files say with this key whether attention rotates; in others it is a note.
    let is_off = family.name.starts_with("granite") && keys.flag("rope.scaling.finetuned")? == Some(false);
    Ok(matches!(family.position, Position::Rope | Position::RopeAdjacent) && !is_off)
}

/// What the halves of each layer are.
fn kinds(keys: &MetadataReader<'_>, family: &Family, layers: usize, kv_heads: &[usize]) -> Result<Vec<LayerKind>> {
    let mut kinds: Vec<LayerKind> = (0..layers).map(|layer| family.layer(layer)).collect();
    let Some((mixer, recurrent)) = family.recurrent else { return Ok(kinds) };
    match recurrent {
        RecurrentLayers::Alone => kinds.fill(LayerKind { mixer, ffn: FeedForwardKind::None }),
        RecurrentLayers::All => {
            let ffn = match mixer {
                MixerKind::Rwkv => FeedForwardKind::ChannelMix,
                _ => FeedForwardKind::DenseOrExperts,
            };
            kinds.fill(LayerKind { mixer, ffn });
        }
        RecurrentLayers::WithoutKeys => {
            let without = kinds.iter_mut().zip(kv_heads).filter(|(_, kv_heads)| **kv_heads == 0);
            without.for_each(|(kind, _)| kind.mixer = mixer);
        }
        RecurrentLayers::WithoutKeysOrFeedForward => {
            let key = "feed_forward_length";
            let widths = keys.per_layer(0, key, layers)?.ok_or_else(|| keys.missing(key))?;
            for (layer, (kind, width)) in kinds.iter_mut().zip(widths).enumerate() {
                match (width, kv_heads[layer]) {
                    (0, 0) => *kind = LayerKind { mixer, ffn: FeedForwardKind::None },
                    (0, _) => kind.ffn = FeedForwardKind::None,
                    (_, 0) => kind.mixer = MixerKind::None,
                    (width, _) => {
                        let expected = format_args!("0 in layer {layer}, which has key and value heads");
                        return Err(keys.malformed(key, width, expected));
                    }
                }
            }
        }
        RecurrentLayers::Listed => {
            let period = keys.optional_count("full_attention_interval")?.unwrap_or(4);
            let listed = keys.flags("attention.recurrent_layers", layers)?;
            let listed = listed.unwrap_or_else(|| (0..layers).map(|layer| (layer + 1) % period != 0).collect());
            kinds.iter_mut().zip(listed).filter(|(_, is)| *is).for_each(|(kind, _)| kind.mixer = mixer);
        }
    }
    Ok(kinds)
}
