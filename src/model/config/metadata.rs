//! Reads the keys of a GGUF file, with errors that name the file, the key and what was expected.

use std::fmt::Display;
use std::path::Path;

use crate::error::{Error, Place, Result};
use crate::format::gguf::{Metadata, Value};

/// Reads the keys of one family, with errors that name the file and the key.
#[derive(Clone, Copy)]
pub(in crate::model) struct MetadataReader<'a> {
    path: &'a Path,
    metadata: &'a Metadata,
    /// The family's name, or nothing for whole keys.
    prefix: &'a str,
}

impl<'a> MetadataReader<'a> {
    /// A reader of whole keys.
    pub(in crate::model) fn new(path: &'a Path, metadata: &'a Metadata) -> MetadataReader<'a> {
        MetadataReader { path, metadata, prefix: "" }
    }

    /// A reader of the keys that begin with `family` and a dot.
    pub(in crate::model) fn of_family(self, family: &'a str) -> MetadataReader<'a> {
        MetadataReader { prefix: family, ..self }
    }

    /// Whether the keys are those of this family.
    pub(in crate::model) fn is_family(&self, name: &str) -> bool {
        self.prefix == name
    }

    fn full(&self, key: &str) -> String {
        if self.prefix.is_empty() { key.to_owned() } else { format!("{}.{key}", self.prefix) }
    }

    pub(in crate::model) fn malformed(&self, key: &str, found: impl Display, expected: impl Display) -> Error {
        Error::malformed(self.path, Place::Key(self.full(key)), found, expected)
    }

    pub(in crate::model) fn missing(&self, key: &str) -> Error {
        Error::Missing {
            path: self.path.to_path_buf(),
            place: Place::Key(self.full(key)),
            expected: "a value".to_owned(),
        }
    }

    /// Returns an error unless `holds`.
    pub(in crate::model) fn check(
        &self,
        key: &str,
        found: impl Display,
        holds: bool,
        expected: impl Display,
    ) -> Result<()> {
        if holds { Ok(()) } else { Err(self.malformed(key, found, expected)) }
    }

    /// The value of a key.
    pub(in crate::model) fn get(&self, key: &str) -> Option<&'a Value> {
        self.metadata.get(&self.full(key))
    }

    /// The keys of the family without its name, and their values.
    pub(in crate::model) fn own(&self) -> impl Iterator<Item = (&'a str, &'a Value)> {
        let prefix = self.prefix;
        self.metadata.iter().filter_map(move |(key, value)| Some((key.strip_prefix(prefix)?.strip_prefix('.')?, value)))
    }

    /// The first of `names` that the file has, otherwise the first.
    pub(in crate::model) fn alias(&self, names: [&'static str; 2]) -> &'static str {
        if self.get(names[0]).is_none() && self.get(names[1]).is_some() { names[1] } else { names[0] }
    }

    /// A text in UTF-8.
    pub(in crate::model) fn optional_text(&self, key: &str) -> Result<Option<&'a str>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        value.as_str().map(Some).ok_or_else(|| self.malformed(key, value.type_name(), "text in UTF-8"))
    }

    /// As [`MetadataReader::optional_text`], but the key must be there.
    pub(in crate::model) fn text(&self, key: &str) -> Result<&'a str> {
        self.optional_text(key)?.ok_or_else(|| self.missing(key))
    }

    /// A float.
    pub(in crate::model) fn float(&self, key: &str) -> Result<Option<f32>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        value.as_f32().map(Some).ok_or_else(|| self.malformed(key, value.type_name(), "a float"))
    }

    /// A positive and finite number. Zero, which some files write for "none", is none.
    pub(in crate::model) fn positive(&self, key: &str) -> Result<Option<f32>> {
        let Some(value) = self.float(key)? else { return Ok(None) };
        self.check(key, value, value.is_finite() && value >= 0.0, "a positive number")?;
        Ok((value > 0.0).then_some(value))
    }

    /// As [`MetadataReader::positive`], with `default` where there is no such key. A zero in the file still means none.
    pub(in crate::model) fn positive_or(&self, key: &str, default: Option<f32>) -> Result<Option<f32>> {
        if self.get(key).is_some() { self.positive(key) } else { Ok(default) }
    }

    /// A boolean.
    pub(in crate::model) fn flag(&self, key: &str) -> Result<Option<bool>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        value.as_bool().map(Some).ok_or_else(|| self.malformed(key, value.type_name(), "true or false"))
    }

    /// An array of booleans, one per layer.
    pub(in crate::model) fn flags(&self, key: &str, layers: usize) -> Result<Option<Vec<bool>>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let flags = value.as_array().and_then(|array| array.as_bools());
        let flags = flags.ok_or_else(|| self.malformed(key, value.type_name(), "an array of booleans"))?;
        let expected = format_args!("{layers}, one per layer");
        self.check(key, format_args!("{} values", flags.len()), flags.len() == layers, expected)?;
        Ok(Some(flags.to_vec()))
    }

    /// A count, 1 to 2^31.
    pub(in crate::model) fn optional_count(&self, key: &str) -> Result<Option<usize>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let count = value.as_u64().ok_or_else(|| self.malformed(key, value.type_name(), "an integer"))?;
        self.check(key, count, (1..=1 << 31).contains(&count), "1 to 2147483648")?;
        Ok(Some(count as usize))
    }

    /// As [`MetadataReader::optional_count`], but the key must be there.
    pub(in crate::model) fn count(&self, key: &str) -> Result<usize> {
        self.optional_count(key)?.ok_or_else(|| self.missing(key))
    }

    /// Counts per layer, given once or one by one, from `least` on, 0 or 1.
    pub(in crate::model) fn per_layer(&self, least: usize, key: &str, layers: usize) -> Result<Option<Vec<usize>>> {
        let Some(array) = self.get(key).and_then(|value| value.as_array()) else {
            let zero = least == 0 && self.get(key).is_some_and(|value| value.as_u64() == Some(0));
            let count = if zero { Some(0) } else { self.optional_count(key)? };
            return Ok(count.map(|count| vec![count; layers]));
        };
        let counts: Option<Vec<u32>> = array.to_integers();
        let counts = counts.ok_or_else(|| self.malformed(key, array.type_name(), "integers"))?;
        self.check(
            key,
            format_args!("{} values", counts.len()),
            counts.len() == layers,
            format_args!("{layers}, one per layer"),
        )?;
        let known = |count: &u32| (least as u32..=1 << 31).contains(count);
        match counts.iter().find(|count| !known(count)) {
            Some(count) => Err(self.malformed(key, count, format_args!("{least} to 2147483648"))),
            None => Ok(Some(counts.into_iter().map(|count| count as usize).collect())),
        }
    }

    /// Floats per layer, given once or one by one. They may be infinite, but not NaN.
    pub(in crate::model) fn floats(&self, key: &str, layers: usize) -> Result<Option<Vec<f32>>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let floats = match value.as_array() {
            None => vec![value.as_f32().ok_or_else(|| self.malformed(key, value.type_name(), "floats"))?; layers],
            Some(array) => array.to_f32().ok_or_else(|| self.malformed(key, array.type_name(), "floats"))?,
        };
        let expected = format_args!("{layers}, one per layer");
        self.check(key, format_args!("{} values", floats.len()), floats.len() == layers, expected)?;
        self.check(key, f32::NAN, !floats.iter().any(|float| float.is_nan()), "numbers")?;
        Ok(Some(floats))
    }

    pub(in crate::model) fn unsupported(&self, key: &str, what: impl Display, supported: &str) -> Error {
        Error::Unsupported {
            path: self.path.to_path_buf(),
            place: Place::Key(self.full(key)),
            what: what.to_string(),
            supported: supported.to_owned(),
        }
    }
}
