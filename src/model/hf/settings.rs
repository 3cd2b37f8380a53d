//! Reads `config.json`, with errors that name its keys.

use std::fmt::Display;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use crate::error::{Error, Place, Result};
use crate::format::json;

/// The largest size of a configuration in bytes. Known ones have a few thousand.
const MAX_BYTES: u64 = 16 << 20;
/// The largest count, more than any dimension of a known model. It bounds what is multiplied.
const MAX_COUNT: u64 = 1 << 24;

/// The settings of a model: those of its file, then the defaults of transformers for the family.
#[derive(Debug)]
pub(super) struct Settings {
    path: PathBuf,
    /// The keys that lead to these settings, each followed by a dot.
    prefix: String,
    values: Map<String, Value>,
    defaults: Defaults,
    /// The defaults of the class in transformers.
    class: Map<String, Value>,
    /// The keys that were looked for.
    #[cfg(test)]
    read: std::cell::RefCell<std::collections::BTreeSet<String>>,
}

/// Defaults of transformers, in lists that families share: keys, and their values as JSON.
pub(super) type Defaults = &'static [&'static [(&'static str, &'static str)]];

impl Settings {
    /// Reads the file at `path`. `text_config`, in multimodal models, takes precedence.
    pub(super) fn read(path: &Path) -> Result<Settings> {
        let mut values = json::read(path, MAX_BYTES)?;
        if let Some(Value::Object(text)) = values.remove("text_config") {
            for (key, value) in text {
                // The outer class ties its output, whatever it says of its text part.
                let is_outer = key == "model_type" || key == "tie_word_embeddings" && values.contains_key(&key);
                if !is_outer {
                    values.insert(key, value);
                }
            }
        }
        Ok(Settings::new(path.to_path_buf(), String::new(), values))
    }

    pub(super) fn new(path: PathBuf, prefix: String, values: Map<String, Value>) -> Settings {
        Settings {
            path,
            prefix,
            values,
            defaults: &[],
            class: Map::new(),
            #[cfg(test)]
            read: std::cell::RefCell::default(),
        }
    }

    /// The settings with the defaults of a family, and after them those of its class in transformers.
    pub(super) fn with_defaults(self, defaults: Defaults, class: Map<String, Value>) -> Settings {
        Settings { defaults, class, ..self }
    }

    /// These settings with the keys of `more`, which take precedence.
    pub(super) fn updated(self, more: &Settings) -> Settings {
        let mut values = self.values;
        values.extend(more.values.iter().map(|(key, value)| (key.clone(), value.clone())));
        Settings { values, ..self }
    }

    /// The number of keys.
    pub(super) fn len(&self) -> usize {
        self.values.len()
    }

    /// Whether there are no keys.
    pub(super) fn is_empty(&self) -> bool {
        self.values.is_empty()
    }

    /// The keys that were looked for so far.
    #[cfg(test)]
    pub(super) fn keys_read(&self) -> std::collections::BTreeSet<String> {
        self.read.borrow().clone()
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// The value of `key`. `None` where it is null.
    pub(super) fn get(&self, key: &str) -> Option<Value> {
        self.find(&[key]).map(|found| found.1)
    }

    /// The first of `keys` that has a value, and the value: in the file, otherwise among the defaults.
    pub(super) fn find<'k>(&self, keys: &[&'k str]) -> Option<(&'k str, Value)> {
        #[cfg(test)]
        self.read.borrow_mut().extend(keys.iter().map(|key| (*key).to_owned()));
        let default = |key: &&'k str| {
            // A key that the file sets to null has no default.
            if self.values.contains_key(*key) {
                return None;
            }
            match self.defaults.iter().copied().flatten().find(|default| default.0 == *key) {
                Some((_, default)) => serde_json::from_str(default).ok(),
                None => self.class.get(*key).cloned(),
            }
        };
        let mut known = keys.iter().filter_map(|key| Some((*key, self.values.get(*key)?.clone())));
        let mut defaults = keys.iter().filter_map(|key| Some((*key, default(key)?)));
        known.find(|found| !found.1.is_null()).or_else(|| defaults.find(|found| !found.1.is_null()))
    }

    /// The object under `key` as settings without defaults. Errors name the whole path of keys.
    pub(super) fn object(&self, key: &str) -> Result<Option<Settings>> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Object(values)) => {
                let prefix = format!("{}{key}.", self.prefix);
                Ok(Some(Settings::new(self.path.clone(), prefix, values)))
            }
            Some(other) => Err(self.malformed(key, json::brief(&other), "an object")),
        }
    }

    fn place(&self, key: &str) -> Place {
        Place::Key(format!("{}{key}", self.prefix))
    }

    pub(super) fn malformed(&self, key: &str, found: impl Display, expected: impl Display) -> Error {
        Error::malformed(&self.path, self.place(key), found, expected)
    }

    pub(super) fn unsupported(&self, key: &str, what: impl Display, supported: &str) -> Error {
        Error::Unsupported {
            path: self.path.clone(),
            place: self.place(key),
            what: what.to_string(),
            supported: supported.to_owned(),
        }
    }

    pub(super) fn missing(&self, key: &str, expected: &str) -> Error {
        Error::Missing { path: self.path.clone(), place: self.place(key), expected: expected.to_owned() }
    }

    /// The value under the first of `keys` that has one, converted by `read`.
    fn typed<T>(&self, keys: &[&str], expected: &str, read: impl Fn(&Value) -> Option<T>) -> Result<Option<T>> {
        let Some((key, value)) = self.find(keys) else { return Ok(None) };
        match read(&value) {
            Some(value) => Ok(Some(value)),
            None => Err(self.malformed(key, json::brief(&value), expected)),
        }
    }

    /// A count, 1 to 2^24, under the first of `keys` that has a value.
    pub(super) fn optional_count(&self, keys: &[&str]) -> Result<Option<usize>> {
        let expected = format!("an integer from 1 to {MAX_COUNT}");
        self.typed(keys, &expected, |value| {
            // The bound fits into every `usize`.
            value.as_u64().filter(|count| (1..=MAX_COUNT).contains(count)).map(|count| count as usize)
        })
    }

    /// As [`Settings::optional_count`], but there must be one.
    pub(super) fn count(&self, keys: &[&str]) -> Result<usize> {
        let first = keys.first().copied().unwrap_or_default();
        self.optional_count(keys)?.ok_or_else(|| self.missing(first, "an integer"))
    }

    /// A number from 0 to 2^24 under the first of `keys` that has one; otherwise 0.
    pub(super) fn number(&self, keys: &[&str]) -> Result<usize> {
        let expected = format!("an integer from 0 to {MAX_COUNT}");
        let number = self.typed(keys, &expected, |value| value.as_u64().filter(|number| *number <= MAX_COUNT))?;
        Ok(number.unwrap_or(0) as usize)
    }

    /// A list of integers.
    pub(super) fn list(&self, key: &str) -> Result<Option<Vec<u64>>> {
        self.typed(&[key], "a list of integers", |value| value.as_array()?.iter().map(Value::as_u64).collect())
    }

    /// A finite number.
    pub(super) fn optional_float(&self, keys: &[&str]) -> Result<Option<f64>> {
        self.typed(keys, "a finite number", |value| value.as_f64().filter(|number| (*number as f32).is_finite()))
    }

    /// As [`Settings::optional_float`], but there must be one.
    pub(super) fn float(&self, keys: &[&str]) -> Result<f64> {
        let first = keys.first().copied().unwrap_or_default();
        self.optional_float(keys)?.ok_or_else(|| self.missing(first, "a number"))
    }

    /// A switch; `default` where there is none.
    pub(super) fn switch(&self, key: &str, default: bool) -> Result<bool> {
        Ok(self.typed(&[key], "true or false", Value::as_bool)?.unwrap_or(default))
    }

    /// As [`Settings::switch`], under the first of `keys` that has a value.
    pub(super) fn switch_of(&self, keys: &[&str], default: bool) -> Result<bool> {
        Ok(self.typed(keys, "true or false", Value::as_bool)?.unwrap_or(default))
    }

    /// Whether the file sets `key` to null.
    pub(super) fn is_null(&self, key: &str) -> bool {
        #[cfg(test)]
        self.read.borrow_mut().insert(key.to_owned());
        self.values.get(key).is_some_and(Value::is_null)
    }

    /// A string.
    pub(super) fn text(&self, keys: &[&str]) -> Result<Option<String>> {
        self.typed(keys, "a string", |value| value.as_str().map(str::to_owned))
    }

    /// A list of numbers.
    pub(super) fn floats(&self, key: &str) -> Result<Option<Vec<f32>>> {
        self.typed(&[key], "a list of finite numbers", |value| {
            let numbers = value.as_array()?.iter().map(|number| number.as_f64().map(|number| number as f32));
            numbers.collect::<Option<Vec<_>>>().filter(|numbers| numbers.iter().all(|number| number.is_finite()))
        })
    }

    /// The list under `key`, which must have one entry per layer, converted by `read`.
    pub(super) fn per_layer<T>(
        &self,
        key: &str,
        layers: usize,
        expected: &str,
        read: impl Fn(&Value) -> Option<T>,
    ) -> Result<Option<Vec<T>>> {
        let expected = format!("a list of {layers}, one per layer: {expected}");
        self.typed(&[key], &expected, |value| {
            let list = value.as_array().filter(|list| list.len() == layers)?;
            list.iter().map(&read).collect()
        })
    }
}
