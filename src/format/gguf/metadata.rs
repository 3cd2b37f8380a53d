//! Metadata: keys in the order of the file, and their values.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::path::Path;

use super::value::Value;
use crate::error::{Error, Place, Result};

/// Keys and values in the order of the file. Each key occurs once.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Metadata {
    entries: Vec<(String, Value)>,
    index: HashMap<String, usize>,
}

impl Metadata {
    /// Metadata without keys.
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets the value of `key`. A new key is added at the end, an existing one keeps its place. Keys are checked when the
    /// metadata are written.
    pub fn set(&mut self, key: impl Into<String>, value: impl Into<Value>) -> &mut Self {
        match self.index.entry(key.into()) {
            Entry::Occupied(known) => self.entries[*known.get()].1 = value.into(),
            Entry::Vacant(new) => {
                self.entries.push((new.key().clone(), value.into()));
                new.insert(self.entries.len() - 1);
            }
        }
        self
    }

    /// The value of `key`.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.index.get(key).and_then(|at| self.entries.get(*at)).map(|entry| &entry.1)
    }

    /// Whether the key exists.
    pub fn contains(&self, key: &str) -> bool {
        self.index.contains_key(key)
    }

    /// Keys and values in order.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = (&str, &Value)> {
        self.entries.iter().map(|(key, value)| (key.as_str(), value))
    }

    /// The keys that describe the model. Those that describe the file it came from are left out: its part in a split model,
    /// its alignment, its types, and how it was quantized.
    pub fn of_model(&self) -> Metadata {
        let mut model = Metadata::new();
        for (key, value) in self.iter().filter(|(key, _)| !describes_file(key)) {
            model.set(key, value.clone());
        }
        model
    }

    /// The number of keys.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether there are no keys.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// The value of `key` as `read` converts it. `None` when there is no such key.
    ///
    /// # Errors
    /// [`Error::Malformed`] of the file at `path` when `read` returns `None`.
    pub(super) fn typed<'a, T>(
        &'a self,
        path: &Path,
        key: &str,
        expected: &str,
        read: impl Fn(&'a Value) -> Option<T>,
    ) -> Result<Option<T>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        match read(value) {
            Some(value) => Ok(Some(value)),
            None => Err(Error::malformed(path, Place::Key(key.to_owned()), value, expected)),
        }
    }
}

/// Whether a key is about one file rather than about the model in it.
fn describes_file(key: &str) -> bool {
    const KEYS: [&str; 5] = [
        "general.alignment",
        "general.file_type",
        "general.quantization_version",
        "general.quantized_by",
        "general.filename",
    ];
    const PREFIXES: [&str; 3] = ["split.", "quantize.", "imatrix."];
    KEYS.contains(&key) || PREFIXES.iter().any(|prefix| key.starts_with(prefix))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_about_the_file_are_left_out_of_those_of_the_model() {
        let mut metadata = Metadata::new();
        for key in ["general.architecture", "split.no", "split.count", "llama.block_count", "general.alignment"] {
            metadata.set(key, 1u32);
        }
        for key in ["quantize.imatrix.file", "general.file_type", "general.name", "splitter.kind", "split.future"] {
            metadata.set(key, "x");
        }
        let model = metadata.of_model();
        let kept: Vec<&str> = model.iter().map(|(key, _)| key).collect();
        assert_eq!(kept, ["general.architecture", "llama.block_count", "general.name", "splitter.kind"]);
    }
}
