//! Hyper-parameters, read from GGUF's keys and validated once. Nothing below this checks them again.

use std::path::Path;

use super::arch::{self, Family, NormKind, Position, Residual};
use super::rope::{RopeConfig, Scaling};
use crate::error::{Error, Place, Result};
use crate::format::Checkpoint;
use crate::format::gguf::{Metadata, Value};
use crate::kernels::Activation;

/// More layers than any known model has; a bound on what a file can ask for.
const MAX_LAYERS: usize = 1024;

/// Hyper-parameters of a model.
#[derive(Debug, Clone)]
pub struct Config {
    /// What does not differ within the family.
    pub family: &'static Family,
    /// Positions the model was made for.
    pub context: usize,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; divides `heads`.
    pub kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// What stands under the root of a norm beside the variance.
    pub norm_eps: f32,
    /// Activation of the feed-forward layers.
    pub activation: Activation,
    /// Whether attention and feed-forward layer read the same stream.
    pub parallel: bool,
    /// Dimensions of a head that are rotated; even, at most `head_dim`; 0 for none.
    pub rotary: usize,
    /// The angles of ordinary layers and of those with a window.
    pub ropes: [RopeConfig; 2],
    /// What differs from layer to layer, one entry a transformer block.
    pub layers: Vec<LayerConfig>,
    /// Largest slope exponent of a bias by distance, and what the slopes are multiplied with.
    pub alibi: Option<(f32, f32)>,
    /// What dot products of queries and keys are multiplied with.
    pub attention_scale: f32,
    /// Bound of queries, keys and values.
    pub clamp_qkv: Option<f32>,
    /// Soft bound of attention scores.
    pub attention_cap: Option<f32>,
    /// Soft bound of logits.
    pub logit_cap: Option<f32>,
    /// What embeddings are multiplied with.
    pub embedding_scale: f32,
    /// What the output of a layer is multiplied with before it joins the stream.
    pub residual_scale: f32,
    /// What logits are multiplied with.
    pub logit_scale: f32,
    /// Experts in feed-forward layers that have them.
    pub experts: Experts,
}

/// What differs from layer to layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LayerConfig {
    /// Positions that a query sees, itself included.
    pub window: Option<usize>,
    /// Whether queries and keys are rotated.
    pub rotated: bool,
}

/// Mixture of experts.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Experts {
    /// Experts in a layer.
    pub count: usize,
    /// Of which each token uses so many.
    pub used: usize,
    /// Whether the weights of those used are divided by their sum.
    pub normalized: bool,
    /// What the weights are multiplied with.
    pub scale: f32,
}

impl Config {
    /// Reads and validates the hyper-parameters.
    ///
    /// # Errors
    /// [`Error::Missing`], [`Error::Malformed`] or [`Error::Unsupported`] with the key.
    pub fn read(checkpoint: &dyn Checkpoint) -> Result<Config> {
        let general = Keys { path: checkpoint.path(), metadata: checkpoint.metadata(), prefix: "" };
        let name = general.text("general.architecture")?;
        let Some(family) = arch::by_name(name) else {
            let names: Vec<&str> = arch::FAMILIES.iter().map(|family| family.name).collect();
            let supported = format!("supported: {}", names.join(", "));
            return Err(general.unsupported("general.architecture", format_args!("the family {name:?}"), &supported));
        };
        let keys = Keys { prefix: name, ..general };

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

        let usual_alibi = (family.position == Position::Alibi).then_some(8.0);
        let alibi = keys.positive_or("attention.max_alibi_bias", usual_alibi)?;
        let alibi_scale = keys.positive("attention.alibi_scale")?.unwrap_or(1.0);
        let alibi = alibi.map(|max| (max, alibi_scale));
        let rotates = matches!(family.position, Position::Rope | Position::RopeAdjacent) && alibi.is_none();
        let rotary = if rotates { keys.optional_count("rope.dimension_count")?.unwrap_or(head_dim) } else { 0 };
        let fits = rotary.is_multiple_of(2) && rotary <= head_dim;
        keys.check("rope.dimension_count", rotary, fits, format_args!("an even number up to {head_dim}"))?;
        let rope = RopeConfig::read(&keys)?;
        let window_base = keys.positive("rope.freq_base_swa")?.or(family.more.window_rope_base);
        let window_rope = window_base.map_or(rope, RopeConfig::plain);

        let by_width = family.more.scaled_by_width == Some(layers);
        let scaled_width = if by_width { hidden as f32 / heads as f32 } else { head_dim as f32 };
        let (attention_cap, logit_cap) = family.more.soft_caps.unzip();
        let logit_scale = keys.positive("logit_scale")?.unwrap_or(1.0);
        let embedding_scale = if family.more.scaled_embedding { (hidden as f32).sqrt() } else { 1.0 };
        Ok(Config {
            family,
            context: keys.count("context_length")?,
            hidden,
            heads,
            kv_heads,
            head_dim,
            norm_eps,
            activation: keys.activation()?.unwrap_or(family.activation),
            parallel: keys.flag("use_parallel_residual")?.unwrap_or(family.residual == Residual::Parallel),
            rotary,
            ropes: [rope, window_rope],
            layers: keys.layers(family, layers)?,
            alibi,
            attention_scale: keys.positive("attention.scale")?.unwrap_or(1.0 / scaled_width.sqrt()),
            clamp_qkv: keys.positive("attention.clamp_kqv")?,
            attention_cap: keys.positive_or("attn_logit_softcapping", attention_cap)?,
            logit_cap: keys.positive_or("final_logit_softcapping", logit_cap)?,
            embedding_scale: keys.positive("embedding_scale")?.unwrap_or(embedding_scale),
            residual_scale: keys.positive("residual_scale")?.unwrap_or(1.0),
            logit_scale: if family.more.divided_logits { 1.0 / logit_scale } else { logit_scale },
            experts: keys.experts(family)?,
        })
    }
}

impl Config {
    /// Tokens that a session holds unless told otherwise: up to where the rotation is as it was trained, for kinds of
    /// stretching that give other results for short texts as soon as long ones are provided for.
    pub fn usual_context(&self) -> usize {
        match self.ropes[0].scaling {
            Scaling::Dynamic { original, .. } | Scaling::Long { original } => self.context.min(original as usize),
            _ => self.context,
        }
    }
}

/// The keys of one family, with errors that name file and key.
#[derive(Clone, Copy)]
pub(super) struct Keys<'a> {
    path: &'a Path,
    metadata: &'a Metadata,
    /// The family's name, or nothing for whole keys.
    prefix: &'a str,
}

impl<'a> Keys<'a> {
    fn full(&self, key: &str) -> String {
        if self.prefix.is_empty() { key.to_owned() } else { format!("{}.{key}", self.prefix) }
    }

    fn malformed(&self, key: &str, found: impl std::fmt::Display, expected: impl std::fmt::Display) -> Error {
        Error::malformed(self.path, Place::Key(self.full(key)), found, expected)
    }

    fn missing(&self, key: &str) -> Error {
        Error::Missing {
            path: self.path.to_path_buf(),
            place: Place::Key(self.full(key)),
            expected: "a value".to_owned(),
        }
    }

    /// An error unless `holds`.
    pub(super) fn check(
        &self,
        key: &str,
        found: impl std::fmt::Display,
        holds: bool,
        expected: impl std::fmt::Display,
    ) -> Result<()> {
        if holds { Ok(()) } else { Err(self.malformed(key, found, expected)) }
    }

    fn get(&self, key: &str) -> Option<&'a Value> {
        self.metadata.get(&self.full(key))
    }

    pub(super) fn optional_text(&self, key: &str) -> Result<Option<&'a str>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        value.as_str().map(Some).ok_or_else(|| self.malformed(key, value.type_name(), "text in UTF-8"))
    }

    fn text(&self, key: &str) -> Result<&'a str> {
        self.optional_text(key)?.ok_or_else(|| self.missing(key))
    }

    pub(super) fn float(&self, key: &str) -> Result<Option<f32>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        value.as_f32().map(Some).ok_or_else(|| self.malformed(key, value.type_name(), "a float"))
    }

    /// A positive and finite number. Zero, with which some files say "none", is none.
    pub(super) fn positive(&self, key: &str) -> Result<Option<f32>> {
        let Some(value) = self.float(key)? else { return Ok(None) };
        self.check(key, value, value.is_finite() && value >= 0.0, "a positive number")?;
        Ok((value > 0.0).then_some(value))
    }

    /// As [`Keys::positive`], and `usual` where there is no such key: a zero in the file still means none.
    fn positive_or(&self, key: &str, usual: Option<f32>) -> Result<Option<f32>> {
        if self.get(key).is_some() { self.positive(key) } else { Ok(usual) }
    }

    fn flag(&self, key: &str) -> Result<Option<bool>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        value.as_bool().map(Some).ok_or_else(|| self.malformed(key, value.type_name(), "true or false"))
    }

    /// The activation of feed-forward layers where it is not the family's own.
    fn activation(&self) -> Result<Option<Activation>> {
        let name = "hidden_activation";
        self.optional_text(name)?
            .map(|found| {
                Activation::by_name(found).ok_or_else(|| self.malformed(name, found, "silu, gelu, gelu_tanh or relu"))
            })
            .transpose()
    }

    fn layers(&self, family: &Family, layers: usize) -> Result<Vec<LayerConfig>> {
        let period = |period: usize, layer: usize| period > 0 && layer % period == period - 1;
        let window = match self.get("attention.sliding_window") {
            Some(value) if value.as_u64() == Some(0) => None,
            _ => self.optional_count("attention.sliding_window")?,
        };
        // Either a list or the period of layers without a window.
        let pattern = "attention.sliding_window_pattern";
        let (windowed, window_period) = match self.get(pattern).map(Value::as_u64) {
            Some(Some(0)) => (None, 0),
            Some(Some(_)) => (None, self.count(pattern)?),
            _ => (self.flags(pattern, layers)?, family.more.window_period),
        };
        let rotated = self.flags("attention.rope_pattern", layers)?;
        Ok((0..layers)
            .map(|layer| LayerConfig {
                window: window.filter(|_| match &windowed {
                    Some(flags) => flags[layer],
                    None => !period(window_period, layer),
                }),
                rotated: match &rotated {
                    Some(flags) => flags[layer],
                    None => !period(family.more.unrotated_period, layer),
                },
            })
            .collect())
    }

    /// An array of booleans, one a layer.
    fn flags(&self, key: &str, layers: usize) -> Result<Option<Vec<bool>>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let flags = value.as_array().and_then(|array| array.as_bools());
        let flags = flags.ok_or_else(|| self.malformed(key, value.type_name(), "an array of booleans"))?;
        let expected = format_args!("{layers}, one a layer");
        self.check(key, format_args!("{} values", flags.len()), flags.len() == layers, expected)?;
        Ok(Some(flags.to_vec()))
    }

    fn experts(&self, family: &Family) -> Result<Experts> {
        // Files of dense models may say 0.
        let zero = |key: &str| self.get(key).and_then(Value::as_u64) == Some(0);
        if self.get("expert_count").is_none() || zero("expert_count") {
            return Ok(Experts { count: 0, used: 0, normalized: false, scale: 1.0 });
        }
        let (count, used) = (self.count("expert_count")?, self.count("expert_used_count")?);
        self.check("expert_used_count", used, used <= count, format_args!("at most the {count} experts"))?;
        let gating = self.optional_count("expert_gating_func")?.unwrap_or(1);
        if gating != 1 {
            return Err(self.unsupported("expert_gating_func", gating, "supported: 1, softmax"));
        }
        Ok(Experts {
            count,
            used,
            normalized: self.flag("expert_weights_norm")?.unwrap_or(family.more.normalized_experts),
            scale: self.positive("expert_weights_scale")?.unwrap_or(1.0),
        })
    }

    /// A number of things, at least one and at most 2^31.
    pub(super) fn optional_count(&self, key: &str) -> Result<Option<usize>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let count = value.as_u64().ok_or_else(|| self.malformed(key, value.type_name(), "an integer"))?;
        self.check(key, count, (1..=1 << 31).contains(&count), "1 to 2147483648")?;
        Ok(Some(count as usize))
    }

    fn count(&self, key: &str) -> Result<usize> {
        self.optional_count(key)?.ok_or_else(|| self.missing(key))
    }

    /// A count that is the same in all layers, given once or a layer.
    fn uniform(&self, key: &str, layers: usize) -> Result<Option<usize>> {
        let Some(array) = self.get(key).and_then(|value| value.as_array()) else { return self.optional_count(key) };
        let counts: Option<Vec<u32>> = array.to_integers();
        let counts = counts.ok_or_else(|| self.malformed(key, array.type_name(), "integers"))?;
        self.check(
            key,
            format_args!("{} values", counts.len()),
            counts.len() == layers,
            format_args!("{layers}, one a layer"),
        )?;
        let first = counts.first().copied().unwrap_or(0);
        self.check(key, first, first > 0, "1 or more")?;
        match counts.iter().find(|count| **count != first) {
            None => Ok(Some(first as usize)),
            Some(other) => Err(self.unsupported(
                key,
                format_args!("{first} in one layer and {other} in another"),
                "supported: the same number in every layer",
            )),
        }
    }

    pub(super) fn unsupported(&self, key: &str, what: impl std::fmt::Display, supported: &str) -> Error {
        Error::Unsupported {
            path: self.path.to_path_buf(),
            place: Place::Key(self.full(key)),
            what: what.to_string(),
            supported: supported.to_owned(),
        }
    }
}
