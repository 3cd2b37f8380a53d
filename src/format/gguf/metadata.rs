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
