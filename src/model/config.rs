//! Hyper-parameters, read from GGUF's keys and validated once. Nothing below this checks them again.

use std::path::Path;

use super::arch::{self, Family, Position};
use super::rope::Scaling;
use crate::error::{Error, Place, Result};
use crate::format::Checkpoint;
use crate::format::gguf::{Metadata, Value};

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
    /// Transformer blocks.
    pub layers: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; divides `heads`.
    pub kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// What stands under the root of a norm beside the variance.
    pub norm_eps: f32,
    /// Dimensions of a head that are rotated; even, at most `head_dim`.
    pub rotary: usize,
    /// Base of the rotation's angles.
    pub rope_base: f32,
    /// How the angles are stretched for long contexts.
    pub rope_scaling: Scaling,
    /// What dot products of queries and keys are multiplied with.
    pub attention_scale: f32,
}

impl Config {
    /// Reads and validates the hyper-parameters.
    ///
    /// # Errors
    /// [`Error::Missing`], [`Error::Malformed`] or [`Error::Unsupported`] with the key.
    pub fn read(checkpoint: &dyn Checkpoint) -> Result<Config> {
        let general = Keys { path: checkpoint.path(), metadata: checkpoint.metadata(), prefix: "" };
        let name = general.text("general.architecture")?;
        let family = arch::by_name(name).ok_or_else(|| Error::Unsupported {
            path: checkpoint.path().to_path_buf(),
            place: Place::Key("general.architecture".to_owned()),
            what: format!("the family {name:?}"),
            supported: format!(
                "supported: {}",
                arch::FAMILIES.iter().map(|family| family.name).collect::<Vec<_>>().join(", ")
            ),
        })?;
        let keys = Keys { prefix: name, ..general };

        let hidden = keys.count("embedding_length")?;
        let layers = keys.count("block_count")?;
        keys.check("block_count", layers, layers <= MAX_LAYERS, format_args!("at most {MAX_LAYERS}"))?;
        let heads = keys.uniform("attention.head_count", layers)?.ok_or_else(|| keys.missing("attention.head_count"))?;
        let kv_heads = keys.uniform("attention.head_count_kv", layers)?.unwrap_or(heads);
        keys.check(
            "attention.head_count_kv",
            kv_heads,
            heads.is_multiple_of(kv_heads),
            format_args!("a divisor of the {heads} heads"),
        )?;
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
        let rotary = keys.optional_count("rope.dimension_count")?.unwrap_or(head_dim);
        if matches!(family.position, Position::Rope { .. }) {
            let fits = rotary.is_multiple_of(2) && rotary <= head_dim;
            keys.check("rope.dimension_count", rotary, fits, format_args!("an even number up to {head_dim}"))?;
        }
        let rope_base = keys.float("rope.freq_base")?.unwrap_or(10000.0);
        keys.check("rope.freq_base", rope_base, rope_base.is_finite() && rope_base > 0.0, "a positive number")?;
        let eps_key = match family.norm {
            arch::NormKind::Rms => "attention.layer_norm_rms_epsilon",
            arch::NormKind::Layer => "attention.layer_norm_epsilon",
        };
        let norm_eps = keys.float(eps_key)?.ok_or_else(|| keys.missing(eps_key))?;
        keys.check(eps_key, norm_eps, norm_eps.is_finite() && norm_eps > 0.0, "a positive number")?;
        Ok(Config {
            family,
            context: keys.count("context_length")?,
            hidden,
            layers,
            heads,
            kv_heads,
            head_dim,
            norm_eps,
            rotary,
            rope_base,
            rope_scaling: Scaling::read(&keys)?,
            attention_scale: 1.0 / (head_dim as f32).sqrt(),
        })
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
        self.check(key, format_args!("{} values", counts.len()), counts.len() == layers, format_args!("{layers}, one a layer"))?;
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
