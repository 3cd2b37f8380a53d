//! The `tokenizer.json` of a folder, as far as GGUF's keys are made from it.

use std::path::PathBuf;

use serde_json::{Map, Value};

use crate::error::{Error, Place, Result};
use crate::format::json;

/// GGUF's numbers for the kinds of tokens.
pub(super) mod kind {
    pub(in crate::model::hf::tokenizer) const NORMAL: i32 = 1;
    pub(in crate::model::hf::tokenizer) const UNKNOWN: i32 = 2;
    pub(in crate::model::hf::tokenizer) const CONTROL: i32 = 3;
    pub(in crate::model::hf::tokenizer) const USER_DEFINED: i32 = 4;
    pub(in crate::model::hf::tokenizer) const UNUSED: i32 = 5;
    pub(in crate::model::hf::tokenizer) const BYTE: i32 = 6;
}

/// A `tokenizer.json`.
pub(super) struct Tokenizer {
    pub(super) path: PathBuf,
    pub(super) description: Map<String, Value>,
}

impl Tokenizer {
    pub(super) fn unsupported(&self, key: &str, what: String, supported: &str) -> Error {
        let (path, place) = (self.path.clone(), Place::Key(key.to_owned()));
        Error::Unsupported { path, place, what, supported: supported.to_owned() }
    }

    pub(super) fn malformed(
        &self,
        key: &str,
        found: impl std::fmt::Display,
        expected: impl std::fmt::Display,
    ) -> Error {
        Error::malformed(&self.path, Place::Key(key.to_owned()), found, expected)
    }

    /// The steps of a part, which may be a sequence of steps in `list`.
    pub(super) fn steps(&self, part: &str, list: &str) -> Vec<&Value> {
        match self.description.get(part) {
            Some(sequence) if sequence.get("type").and_then(Value::as_str) == Some("Sequence") => {
                sequence.get(list).and_then(Value::as_array).into_iter().flatten().collect()
            }
            other => other.into_iter().collect(),
        }
    }

    pub(super) fn has_step(&self, part: &str, list: &str, kind: &str) -> bool {
        self.steps(part, list).iter().any(|step| step.get("type").and_then(Value::as_str) == Some(kind))
    }

    /// An id of a token, which must have a row in the embedding.
    pub(super) fn id(&self, key: &str, id: Option<&Value>, rows: usize) -> Result<usize> {
        let found = id.unwrap_or(&Value::Null);
        let id = found.as_u64().and_then(|id| usize::try_from(id).ok()).filter(|id| *id < rows);
        let expected = || format!("an id below {rows}, the rows of the embedding");
        id.ok_or_else(|| self.malformed(key, json::brief(found), expected()))
    }

    /// Whether the tokenizer puts a space before the text.
    pub(super) fn adds_space(&self) -> bool {
        let metaspace = |step: &&Value| {
            let is_one = step.get("type").and_then(Value::as_str) == Some("Metaspace");
            let old = step.get("add_prefix_space").and_then(Value::as_bool).unwrap_or(true);
            let scheme = step.get("prepend_scheme").and_then(Value::as_str);
            is_one && scheme.map_or(old, |scheme| scheme != "never")
        };
        self.has_step("normalizer", "normalizers", "Prepend")
            || self.steps("pre_tokenizer", "pretokenizers").iter().any(metaspace)
    }
}
