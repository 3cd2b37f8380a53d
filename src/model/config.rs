//! Hyperparameters, read from GGUF's keys and validated once. Code that uses them does not check them again.

use super::arch::{self, Family, LayerKind, NormKind, Position, Residual};
use super::metadata::MetadataReader;
use super::namespace;
use super::rope::{RopeConfig, Scaling};
use crate::error::Result;
use crate::format::Checkpoint;
use crate::format::gguf::Value;
use crate::kernels::Activation;

/// The largest number of layers that a file may have, more than any known model has.
const MAX_LAYERS: usize = 1024;

/// Hyperparameters of a model.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Config {
    /// Choices of the family.
    pub family: &'static Family,
    /// The longest context that the model was made for.
    pub context: usize,
    /// The longest context of a session: more than `context` where the file stretches the rotation further.
    pub(crate) longest: usize,
    /// How the hidden states of a text become its embedding, where the file says it.
    #[cfg_attr(not(feature = "python"), allow(dead_code, reason = "only Python pools"))]
    pub(crate) pooling: Option<Pooling>,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads, a divisor of `heads`.
    pub kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Added to the variance under the square root of a norm.
    pub norm_eps: f32,
    /// Activation of the feed-forward layers.
    pub activation: Activation,
    /// Whether mixer and feed-forward layer read the same stream.
    pub parallel: bool,
    /// Dimensions of a head that are rotated; even, at most `head_dim`; 0 for none.
    pub rotary: usize,
    /// The rotation of layers without and with a window.
    pub ropes: [RopeConfig; 2],
    /// `(layers)`: the settings that differ between layers.
    pub layers: Vec<LayerConfig>,
    /// ALiBi's largest slope exponent, and the factor of its slopes.
    pub alibi: Option<(f32, f32)>,
    /// Factor of the dot products of queries and keys.
    pub attention_scale: f32,
    /// Queries, keys and values are clamped to plus and minus this.
    pub clamp_qkv: Option<f32>,
    /// Soft cap of attention scores.
    pub attention_cap: Option<f32>,
    /// Soft cap of logits.
    pub logit_cap: Option<f32>,
    /// Factor of the embeddings.
    pub embedding_scale: f32,
    /// Factor of a branch's output when it is added to the residual stream.
    pub residual_scale: f32,
    /// Factor of the logits.
    pub logit_scale: f32,
    /// Experts of feed-forward layers that have them.
    pub experts: ExpertsConfig,
}

/// How the hidden states of a text become its embedding.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Pooling {
    /// Their mean.
    Mean,
    /// That of the last token.
    Last,
}

impl Pooling {
    /// Its name in Python and in the server.
    #[cfg_attr(not(feature = "python"), allow(dead_code, reason = "only Python pools"))]
    pub(crate) fn name(self) -> &'static str {
        match self {
            Pooling::Mean => "mean",
            Pooling::Last => "last",
        }
    }
}

/// The settings that differ between layers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct LayerConfig {
    /// Its mixer and its feed-forward layer.
    pub kind: LayerKind,
    /// Positions that a query sees, including its own.
    pub window: Option<usize>,
    /// Whether queries and keys are rotated.
    pub rotated: bool,
}

/// Mixture of experts.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub struct ExpertsConfig {
    /// Experts in a layer.
    pub count: usize,
    /// Experts that each token uses.
    pub used: usize,
    /// Whether the weights of the used experts are divided by their sum.
    pub normalized: bool,
    /// Factor of the weights.
    pub scale: f32,
}

impl Config {
    /// Reads and validates the hyperparameters.
    ///
    /// # Errors
    /// [`Error::Missing`](crate::Error::Missing), [`Error::Malformed`](crate::Error::Malformed) or
    /// [`Error::Unsupported`](crate::Error::Unsupported) with the key.
    pub fn read(checkpoint: &dyn Checkpoint) -> Result<Config> {
        let general = MetadataReader::new(checkpoint.path(), checkpoint.metadata());
        let name = general.text("general.architecture")?;
        let Some(family) = arch::by_name(name) else {
            let mut names: Vec<&str> = arch::families().map(|family| family.name).collect();
            names.sort_unstable();
            let supported = format!("supported: {}", names.join(", "));
            return Err(general.unsupported("general.architecture", format_args!("the family {name:?}"), &supported));
        };
        let keys = general.of_family(name);

        let hidden = keys.count("embedding_length")?;
        let layers = keys.count("block_count")?;
        keys.check("block_count", layers, layers <= MAX_LAYERS, format_args!("at most {MAX_LAYERS}"))?;
        let heads =
            keys.uniform("attention.head_count", layers)?.ok_or_else(|| keys.missing("attention.head_count"))?;
        let kv_heads = keys.uniform("attention.head_count_kv", layers)?.unwrap_or(heads);
        let expected = format_args!("a divisor of the {heads} heads");
        keys.check("attention.head_count_kv", kv_heads, heads.is_multiple_of(kv_heads), expected)?;
        let head_dim = match keys.optional_count("attention.key_length")? {
            Some(length) => length,
            None => {
                let expected = format_args!("a divisor of the embedding length {hidden}");
                keys.check("attention.head_count", heads, hidden.is_multiple_of(heads), expected)?;
                hidden / heads
            }
        };
        keys.check("attention.key_length", head_dim, head_dim <= 1 << 16, "at most 65536")?;
        let value_length = keys.optional_count("attention.value_length")?.unwrap_or(head_dim);
        keys.check("attention.value_length", value_length, value_length == head_dim, format_args!("{head_dim}"))?;

        let eps_key = match family.norm {
            NormKind::Rms => "attention.layer_norm_rms_epsilon",
            NormKind::Layer => "attention.layer_norm_epsilon",
        };
        let norm_eps = keys.positive(eps_key)?.ok_or_else(|| keys.missing(eps_key))?;

        let default_alibi = (family.position == Position::Alibi).then_some(8.0);
        let alibi = keys.positive_or("attention.max_alibi_bias", default_alibi)?;
        let alibi_scale = keys.positive("attention.alibi_scale")?.unwrap_or(1.0);
        let alibi = alibi.map(|max| (max, alibi_scale));
        let rotates = matches!(family.position, Position::Rope | Position::RopeAdjacent) && alibi.is_none();
        let rotary = if rotates { keys.optional_count("rope.dimension_count")?.unwrap_or(head_dim) } else { 0 };
        let fits = rotary.is_multiple_of(2) && rotary <= head_dim;
        keys.check("rope.dimension_count", rotary, fits, format_args!("an even number up to {head_dim}"))?;
        let rope = RopeConfig::read(&keys)?;
        let window_base = keys.positive(keys.alias(["rope.freq_base_swa", "rope.local.freq_base"]))?;
        let window_base = window_base.or(family.quirks.window_rope_base);
        let window_rope = window_base.map_or(rope, RopeConfig::plain);

        let by_width = family.quirks.scaled_by_width == Some(layers);
        let scaled_width = if by_width { hidden as f32 / heads as f32 } else { head_dim as f32 };
        let (attention_cap, logit_cap) = family.quirks.soft_caps.unzip();
        let logit_scale = keys.positive("logit_scale")?.unwrap_or(1.0);
        let embedding_scale = if family.quirks.scaled_embedding { (hidden as f32).sqrt() } else { 1.0 };
        let context = keys.count("context_length")?;
        // Model cards add YaRN and leave the length as it is.
        let longest = match rope.scaling {
            Scaling::Yarn { factor, original, .. } if rotary > 0 => context.max((factor * original) as usize),
            _ => context,
        };
        // Where divisors do the stretching, the factor is 1.
        let extended = keys.optional_count("rope.scaling.extended_context_length")?;
        let longest = longest.max(extended.unwrap_or(0));
        namespace::check(&keys)?;
        Ok(Config {
            family,
            context,
            longest,
            pooling: pooling(&keys)?,
            hidden,
            heads,
            kv_heads,
            head_dim,
            norm_eps,
            activation: activation(&keys)?.unwrap_or(family.activation),
            parallel: keys.flag("use_parallel_residual")?.unwrap_or(family.residual == Residual::Parallel),
            rotary,
            ropes: [rope, window_rope],
            layers: layer_configs(&keys, family, layers)?,
            alibi,
            attention_scale: keys.positive("attention.scale")?.unwrap_or(1.0 / scaled_width.sqrt()),
            clamp_qkv: keys.positive("attention.clamp_kqv")?,
            attention_cap: keys.positive_or("attn_logit_softcapping", attention_cap)?,
            logit_cap: keys.positive_or("final_logit_softcapping", logit_cap)?,
            embedding_scale: keys.positive("embedding_scale")?.unwrap_or(embedding_scale),
            residual_scale: keys.positive("residual_scale")?.unwrap_or(1.0),
            logit_scale: if family.quirks.divided_logits { 1.0 / logit_scale } else { logit_scale },
            experts: experts(&keys, family)?,
        })
    }
}

impl Config {
    /// The context of a session by default: the longest that the rotation needs no stretching for, where stretching
    /// for long contexts changes the results of short ones.
    pub fn default_context(&self) -> usize {
        match self.ropes[0].scaling {
            Scaling::Dynamic { original, .. } | Scaling::Long { original } => self.context.min(original as usize),
            _ => self.context,
        }
    }
}

/// How the file wants embeddings to be made, by llama.cpp's numbers.
fn pooling(keys: &MetadataReader<'_>) -> Result<Option<Pooling>> {
    let key = "pooling_type";
    let Some(value) = keys.get(key) else { return Ok(None) };
    match value.as_i64().ok_or_else(|| keys.malformed(key, value, "an integer"))? {
        // Not said, or none, as generation needs.
        -1 | 0 => Ok(None),
        1 => Ok(Some(Pooling::Mean)),
        3 => Ok(Some(Pooling::Last)),
        other => Err(keys.unsupported(key, other, "supported: 0 for none, 1 for the mean, 3 for the last token")),
    }
}

/// The activation of feed-forward layers where it is not the family's own.
fn activation(keys: &MetadataReader<'_>) -> Result<Option<Activation>> {
    let key = "hidden_activation";
    let Some(found) = keys.optional_text(key)? else { return Ok(None) };
    let activation = Activation::by_name(found);
    keys.check(key, found, activation.is_some(), "silu, gelu, gelu_tanh or relu")?;
    Ok(activation)
}

fn layer_configs(keys: &MetadataReader<'_>, family: &Family, layers: usize) -> Result<Vec<LayerConfig>> {
    let is_nth = |period: usize, layer: usize| period > 0 && layer % period == period - 1;
    let window = match keys.get("attention.sliding_window") {
        Some(value) if value.as_u64() == Some(0) => None,
        _ => keys.optional_count("attention.sliding_window")?,
    };
    // Either a list or the period of layers without a window.
    let pattern = "attention.sliding_window_pattern";
    let (windowed, window_period) = match keys.get(pattern).map(Value::as_u64) {
        Some(Some(0)) => (None, 0),
        Some(Some(_)) => (None, keys.count(pattern)?),
        _ => (keys.flags(pattern, layers)?, family.quirks.window_period),
    };
    let rotated = keys.flags("attention.rope_pattern", layers)?;
    let layer = |layer: usize| LayerConfig {
        kind: family.layer(layer),
        window: window.filter(|_| match &windowed {
            Some(flags) => flags[layer],
            None => !is_nth(window_period, layer),
        }),
        rotated: match &rotated {
            Some(flags) => flags[layer],
            None => !is_nth(family.quirks.unrotated_period, layer),
        },
    };
    Ok((0..layers).map(layer).collect())
}

fn experts(keys: &MetadataReader<'_>, family: &Family) -> Result<ExpertsConfig> {
    // Files of dense models may have a count of 0.
    if keys.get("expert_count").is_none_or(|count| count.as_u64() == Some(0)) {
        return Ok(ExpertsConfig { count: 0, used: 0, normalized: false, scale: 1.0 });
    }
    let (count, used) = (keys.count("expert_count")?, keys.count("expert_used_count")?);
    keys.check("expert_used_count", used, used <= count, format_args!("at most the {count} experts"))?;
    let gating = keys.optional_count("expert_gating_func")?.unwrap_or(1);
    if gating != 1 {
        return Err(keys.unsupported("expert_gating_func", gating, "supported: 1, softmax"));
    }
    Ok(ExpertsConfig {
        count,
        used,
        // The second name is that of Ollama's files.
        normalized: keys
            .flag(keys.alias(["expert_weights_norm", "norm_top_k_prob"]))?
            .unwrap_or(family.quirks.normalized_experts),
        scale: keys.positive("expert_weights_scale")?.unwrap_or(1.0),
    })
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::error::Error;
    use crate::format::gguf::{Array, Metadata};
    use crate::format::{Checkpoint, Tensor};
    use crate::model::namespace::{NEUTRAL, READ, REPEATED, WITHOUT_INFLUENCE};

    struct Keys(Metadata);

    impl Checkpoint for Keys {
        fn path(&self) -> &Path {
            Path::new("test.gguf")
        }

        fn metadata(&self) -> &Metadata {
            &self.0
        }

        fn tensor(&self, _: &str) -> Option<Tensor<'_>> {
            None
        }

        fn names(&self) -> Vec<&str> {
            Vec::new()
        }

        fn release(&self, _: &str) {}
    }

    /// Keys with which every other one is read that a model of `family` has.
    fn metadata(family: &str) -> Metadata {
        let mut metadata = Metadata::new();
        metadata.set("general.architecture", family);
        metadata.set(format!("{family}.embedding_length"), 4u32);
        for key in ["block_count", "context_length", "attention.head_count", "expert_count"] {
            metadata.set(format!("{family}.{key}"), 2u32);
        }
        metadata.set(format!("{family}.expert_used_count"), 1u32);
        metadata.set(format!("{family}.rope.scaling.type"), "yarn");
        for key in ["attention.layer_norm_epsilon", "attention.layer_norm_rms_epsilon"] {
            metadata.set(format!("{family}.{key}"), 1e-5f32);
        }
        metadata
    }

    /// The error of a model of `family` in which `key` has `value`.
    fn error(family: &str, key: &str, value: Value) -> Option<String> {
        let mut metadata = metadata(family);
        let key = format!("{family}.{key}");
        metadata.set(&*key, value);
        let error = Config::read(&Keys(metadata)).err()?;
        let (Error::Malformed { place, .. } | Error::Unsupported { place, .. }) = &error else {
            panic!("{error}");
        };
        assert!(place.to_string().contains(&key), "{key}: {error}");
        Some(error.to_string())
    }

    #[test]
    fn every_key_that_counts_as_read_is_read() {
        let wrong = || Value::Array(Array::F64(vec![0.5]));
        for key in READ {
            // The kind of norm decides which epsilon is read.
            assert!(["llama", "bloom"].iter().any(|family| error(family, key, wrong()).is_some()), "{key}");
        }
    }

    #[test]
    fn every_key_of_gguf_is_read_listed_or_refused() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/gguf_keys.json");
        let list: serde_json::Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
        for key in list["keys"].as_array().unwrap().iter().map(|key| key.as_str().unwrap()) {
            let lists = [READ.contains(&key), WITHOUT_INFLUENCE.contains(&key)];
            let kept = NEUTRAL.iter().map(|known| known.0).chain(REPEATED.iter().map(|known| known.0));
            if lists == [false, false] {
                let value = Value::from(vec![true, false]);
                assert!(error("llama", key, value).is_some(), "{key}");
            } else {
                assert!(lists != [true, true] && !kept.into_iter().any(|known| known == key), "{key}: twice");
            }
        }
    }

    #[test]
    fn keys_that_change_the_computation_are_refused_unless_they_are_neutral() {
        for (key, neutral, changed) in [
            ("attention.causal", Value::Bool(true), Value::Bool(false)),
            ("nextn_predict_layers", Value::U32(0), Value::U32(1)),
            ("rope.scaling.yarn_ext_factor", Value::F32(-1.0), Value::F32(0.5)),
            ("attention.temperature_length", Value::U16(0), Value::I32(8192)),
        ] {
            for family in ["llama", "qwen2", "bloom", "gemma3"] {
                assert_eq!(error(family, key, neutral.clone()), None);
                assert!(error(family, key, changed.clone()).is_some());
            }
        }
        assert_eq!(error("gemma3", "vision.block_count", Value::U32(27)), None);
        assert!(error("gemma3", "visionary", Value::U32(27)).is_some());
    }
}
