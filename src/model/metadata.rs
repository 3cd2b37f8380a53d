//! Reads the keys of a GGUF file, with errors that name the file, the key and what was expected.

use std::fmt::Display;
use std::path::Path;

use crate::error::{Error, Place, Result};
use crate::format::gguf::{Metadata, Value};

/// Reads the keys of one family, with errors that name the file and the key.
#[derive(Clone, Copy)]
pub(super) struct MetadataReader<'a> {
    path: &'a Path,
    metadata: &'a Metadata,
    /// The family's name, or nothing for whole keys.
    prefix: &'a str,
}

impl<'a> MetadataReader<'a> {
    /// A reader of whole keys.
    pub(super) fn new(path: &'a Path, metadata: &'a Metadata) -> MetadataReader<'a> {
        MetadataReader { path, metadata, prefix: "" }
    }

    /// A reader of the keys that begin with `family` and a dot.
    pub(super) fn of_family(self, family: &'a str) -> MetadataReader<'a> {
        MetadataReader { prefix: family, ..self }
    }

    fn full(&self, key: &str) -> String {
        if self.prefix.is_empty() { key.to_owned() } else { format!("{}.{key}", self.prefix) }
    }

    pub(super) fn malformed(&self, key: &str, found: impl Display, expected: impl Display) -> Error {
        Error::malformed(self.path, Place::Key(self.full(key)), found, expected)
    }

    pub(super) fn missing(&self, key: &str) -> Error {
        Error::Missing {
            path: self.path.to_path_buf(),
            place: Place::Key(self.full(key)),
            expected: "a value".to_owned(),
        }
    }

    /// Returns an error unless `holds`.
    pub(super) fn check(&self, key: &str, found: impl Display, holds: bool, expected: impl Display) -> Result<()> {
        if holds { Ok(()) } else { Err(self.malformed(key, found, expected)) }
    }

    /// The value of a key.
    pub(super) fn get(&self, key: &str) -> Option<&'a Value> {
        self.metadata.get(&self.full(key))
    }

    /// The keys of the family without its name, and their values.
    pub(super) fn own(&self) -> impl Iterator<Item = (&'a str, &'a Value)> {
        let prefix = self.prefix;
        self.metadata.iter().filter_map(move |(key, value)| Some((key.strip_prefix(prefix)?.strip_prefix('.')?, value)))
    }

    /// The first of `names` that the file has, otherwise the first.
    pub(super) fn alias(&self, names: [&'static str; 2]) -> &'static str {
        if self.get(names[0]).is_none() && self.get(names[1]).is_some() { names[1] } else { names[0] }
    }

    /// A text in UTF-8.
    pub(super) fn optional_text(&self, key: &str) -> Result<Option<&'a str>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        value.as_str().map(Some).ok_or_else(|| self.malformed(key, value.type_name(), "text in UTF-8"))
    }

    /// As [`MetadataReader::optional_text`], but the key must be there.
    pub(super) fn text(&self, key: &str) -> Result<&'a str> {
        self.optional_text(key)?.ok_or_else(|| self.missing(key))
    }

    /// A float.
    pub(super) fn float(&self, key: &str) -> Result<Option<f32>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        value.as_f32().map(Some).ok_or_else(|| self.malformed(key, value.type_name(), "a float"))
    }

    /// A positive and finite number. Zero, which some files write for "none", is none.
    pub(super) fn positive(&self, key: &str) -> Result<Option<f32>> {
        let Some(value) = self.float(key)? else { return Ok(None) };
        self.check(key, value, value.is_finite() && value >= 0.0, "a positive number")?;
        Ok((value > 0.0).then_some(value))
    }

    /// As [`MetadataReader::positive`], with `default` where there is no such key. A zero in the file still means none.
    pub(super) fn positive_or(&self, key: &str, default: Option<f32>) -> Result<Option<f32>> {
        if self.get(key).is_some() { self.positive(key) } else { Ok(default) }
    }

    /// A boolean.
    pub(super) fn flag(&self, key: &str) -> Result<Option<bool>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        value.as_bool().map(Some).ok_or_else(|| self.malformed(key, value.type_name(), "true or false"))
    }

    /// An array of booleans, one per layer.
    pub(super) fn flags(&self, key: &str, layers: usize) -> Result<Option<Vec<bool>>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let flags = value.as_array().and_then(|array| array.as_bools());
        let flags = flags.ok_or_else(|| self.malformed(key, value.type_name(), "an array of booleans"))?;
        let expected = format_args!("{layers}, one per layer");
        self.check(key, format_args!("{} values", flags.len()), flags.len() == layers, expected)?;
        Ok(Some(flags.to_vec()))
    }

    /// A count, 1 to 2^31.
    pub(super) fn optional_count(&self, key: &str) -> Result<Option<usize>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let count = value.as_u64().ok_or_else(|| self.malformed(key, value.type_name(), "an integer"))?;
        self.check(key, count, (1..=1 << 31).contains(&count), "1 to 2147483648")?;
        Ok(Some(count as usize))
    }

    /// As [`MetadataReader::optional_count`], but the key must be there.
    pub(super) fn count(&self, key: &str) -> Result<usize> {
        self.optional_count(key)?.ok_or_else(|| self.missing(key))
    }

    /// A count that is the same in all layers, given once or per layer.
    pub(super) fn uniform(&self, key: &str, layers: usize) -> Result<Option<usize>> {
        let Some(array) = self.get(key).and_then(|value| value.as_array()) else { return self.optional_count(key) };
        let counts: Option<Vec<u32>> = array.to_integers();
        let counts = counts.ok_or_else(|| self.malformed(key, array.type_name(), "integers"))?;
        self.check(
            key,
            format_args!("{} values", counts.len()),
            counts.len() == layers,
            format_args!("{layers}, one per layer"),
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

    pub(super) fn unsupported(&self, key: &str, what: impl Display, supported: &str) -> Error {
        Error::Unsupported {
            path: self.path.to_path_buf(),
            place: Place::Key(self.full(key)),
            what: what.to_string(),
            supported: supported.to_owned(),
        }
    }
}
