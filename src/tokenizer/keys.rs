//! Typed access to `tokenizer.*` keys. Errors name the file, the key, what was found and what was expected.

use std::cell::RefCell;
use std::fmt::Display;
use std::path::Path;

use crate::error::{Error, Place, Result};
use crate::format::gguf::{Array, Metadata, StringArray, Value};

/// The metadata of a file.
pub(super) struct Keys<'a> {
    pub(super) metadata: &'a Metadata,
    pub(super) path: &'a Path,
    /// What was read differently from what the file says.
    pub(super) warnings: RefCell<Vec<String>>,
}

impl<'a> Keys<'a> {
    pub(super) fn new(metadata: &'a Metadata, path: &'a Path) -> Keys<'a> {
        Keys { metadata, path, warnings: RefCell::default() }
    }

    pub(super) fn malformed(&self, key: &str, found: impl Display, expected: impl Display) -> Error {
        Error::malformed(self.path, Place::Key(key.to_owned()), found, expected)
    }

    /// The bytes of a string.
    pub(super) fn string(&self, key: &str) -> Result<Option<&'a [u8]>> {
        let Some(value) = self.metadata.get(key) else { return Ok(None) };
        value.as_bytes().map(Some).ok_or_else(|| self.malformed(key, shown(value), "a string"))
    }

    pub(super) fn flag(&self, key: &str, default: bool) -> Result<bool> {
        let Some(value) = self.metadata.get(key) else { return Ok(default) };
        value.as_bool().ok_or_else(|| self.malformed(key, shown(value), "true or false"))
    }

    /// The array that `read` returns, with `length` elements.
    fn array<T>(
        &self,
        key: &str,
        kind: &str,
        length: Option<usize>,
        read: impl FnOnce(&'a Array) -> Option<T>,
    ) -> Result<Option<T>> {
        let Some(value) = self.metadata.get(key) else { return Ok(None) };
        let expected = || format!("an array of {kind}");
        let Value::Array(array) = value else { return Err(self.malformed(key, shown(value), expected())) };
        let elements = read(array);
        if elements.is_none() && !array.is_empty() {
            let found = format!("an array that holds {}", type_name(array));
            return Err(self.malformed(key, found, expected()));
        }
        if let Some(length) = length.filter(|length| *length != array.len()) {
            let found = format!("{} elements", array.len());
            return Err(self.malformed(key, found, format_args!("{length}, one per token")));
        }
        Ok(elements)
    }

    pub(super) fn strings(&self, key: &str) -> Result<Option<&'a StringArray>> {
        static EMPTY: StringArray = StringArray::new();
        self.array(key, "str", None, |array| match array {
            Array::String(strings) => Some(strings),
            other => other.is_empty().then_some(&EMPTY),
        })
    }

    pub(super) fn integers(&self, key: &str, length: usize) -> Result<Option<Vec<i128>>> {
        self.array(key, "int", Some(length), Array::to_integers)
    }

    pub(super) fn floats(&self, key: &str, length: usize) -> Result<Option<Vec<f32>>> {
        self.array(key, "float", Some(length), Array::to_f32)
    }

    /// A token id. Without the key, `default` if it is an id, and also where the file names an id beyond the vocabulary,
    /// as other readers have it. -1, signed or unsigned, stands for none.
    pub(super) fn token_id(&self, key: &str, tokens: usize, default: Option<u32>) -> Result<Option<u32>> {
        let is_id = |id: &u32| (*id as usize) < tokens;
        let Some(value) = self.metadata.get(key) else { return Ok(default.filter(is_id)) };
        let Some(number) = value.as_i64().filter(|number| *number >= -1) else {
            return Err(self.malformed(key, shown(value), format_args!("a token id below {tokens}")));
        };
        let id = u32::try_from(number).ok().filter(is_id);
        if id.is_none() && ![-1, i64::from(u32::MAX)].contains(&number) {
            let warning = format!("ignoring {key}: found {number}, expected a token id below {tokens}");
            self.warnings.borrow_mut().push(warning);
        }
        Ok(id.or(default.filter(is_id)))
    }

    /// Token ids in an array, or one alone. Those beyond the vocabulary are dropped.
    pub(super) fn token_ids(&self, key: &str, tokens: usize) -> Result<Vec<u32>> {
        let Some(value) = self.metadata.get(key) else { return Ok(Vec::new()) };
        let Value::Array(array) = value else { return Ok(self.token_id(key, tokens, None)?.into_iter().collect()) };
        let Some(numbers) = array.to_integers::<i128>() else {
            return Err(self.malformed(key, shown(value), "an array of token ids"));
        };
        let ids = numbers.into_iter().filter_map(|number| {
            let id = u32::try_from(number).ok().filter(|id| (*id as usize) < tokens);
            if id.is_none() {
                let warning = format!("ignoring {number} in {key}: expected token ids below {tokens}");
                self.warnings.borrow_mut().push(warning);
            }
            id
        });
        Ok(ids.collect())
    }

    /// Checks the ids of special tokens that nybble does not use.
    pub(super) fn check_other_token_ids(&self, tokens: usize, used: &[String]) -> Result<()> {
        for (key, _) in self.metadata.iter() {
            let is_id = key.starts_with("tokenizer.ggml.") && key.ends_with("_token_id");
            if is_id && !used.iter().any(|name| name == key) {
                self.token_id(key, tokens, None)?;
            }
        }
        Ok(())
    }
}

/// A value for an error message.
fn shown(value: &Value) -> String {
    match value {
        Value::U8(v) => v.to_string(),
        Value::I8(v) => v.to_string(),
        Value::U16(v) => v.to_string(),
        Value::I16(v) => v.to_string(),
        Value::U32(v) => v.to_string(),
        Value::I32(v) => v.to_string(),
        Value::U64(v) => v.to_string(),
        Value::I64(v) => v.to_string(),
        Value::F32(v) => format!("{v:?}"),
        Value::F64(v) => format!("{v:?}"),
        Value::Bool(v) => v.to_string(),
        Value::String(bytes) => quoted(bytes, 60),
        Value::Array(array) => format!("an array that holds {}", type_name(array)),
    }
}

/// The first `limit` characters of a string, in quotes.
pub(super) fn quoted(bytes: &[u8], limit: usize) -> String {
    let text = String::from_utf8_lossy(bytes);
    let short: String = text.chars().take(limit).collect();
    let escaped = short.escape_debug().to_string().replace("\\\"", "\"").replace("\\'", "'");
    format!("'{escaped}'")
}

fn type_name(array: &Array) -> &'static str {
    match array {
        Array::String(_) => "str",
        Array::Bool(_) => "bool",
        Array::F32(_) | Array::F64(_) => "float",
        _ => "int",
    }
}
