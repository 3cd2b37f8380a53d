//! What a file or folder says about its tokenizer: everything but the code that splits text into words.
//!
//! Rust and Python both build their tokenizer from a [`Description`]. Only the encoder differs: the crate `tokenizers` here,
//! the package `tokenizers` there, both from the same `tokenizer.json`, which [`Build`] gets.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::ops::Range;
use std::path::PathBuf;
use std::sync::OnceLock;

use super::sentencepiece::SentencePiece;
use super::token_bytes::Spelling;
use crate::error::{Error, Result};
use crate::format::gguf::StringArray;

/// Longest token in characters. Real tokens are far shorter. Long ones would take quadratic time or much memory.
pub(super) const MAX_TOKEN_LENGTH: usize = 1 << 16;

/// Builds the encoder from the content of a `tokenizer.json`. An error is the reason why the library cannot.
pub(crate) type Build<'a> = dyn FnMut(&str) -> Result<(), String> + 'a;

/// A tokenizer as its file describes it.
#[derive(Debug)]
pub(crate) struct Description {
    /// The file or folder, for errors.
    pub(crate) path: PathBuf,
    /// Encodes by the scores of pieces. Otherwise the encoder is the one that [`Build`] has made.
    pub(crate) sentencepiece: Option<SentencePiece>,
    pub(super) tokens: Tokens,
    /// Whether encoding puts a space before a text, which decoding removes.
    pub(crate) adds_space: bool,
    /// Ids before every text.
    pub(crate) prefix: Vec<u32>,
    /// Ids after every text.
    pub(crate) suffix: Vec<u32>,
    /// The ids around two strings, such as a query and a document.
    pub(crate) pair: PairFrame,
    pub(crate) bos: Option<u32>,
    pub(crate) eos: Option<u32>,
    /// Every token that ends a generation, sorted.
    pub(crate) ends: Vec<u32>,
    /// Special tokens that templates know by name, such as `bos_token`.
    #[cfg_attr(not(any(feature = "chat", feature = "python")), allow(dead_code, reason = "only templates use it"))]
    pub(crate) special_texts: BTreeMap<String, String>,
    /// Chat templates by name. The one without a name is called `default`.
    pub(crate) chat_templates: BTreeMap<String, String>,
    /// What the file leaves unclear, and how it was understood.
    pub(crate) warnings: Vec<String>,
}

/// The ids around two strings.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct PairFrame {
    pub(crate) before: Vec<u32>,
    /// Between the strings.
    pub(crate) middle: Vec<u32>,
    pub(crate) after: Vec<u32>,
    /// Whether models tell the second text from the first by its token type.
    pub(crate) has_types: bool,
}

/// The spellings of all tokens.
#[derive(Debug)]
pub(super) struct Tokens {
    pub(super) texts: StringArray,
    /// Ids without a token.
    pub(super) missing: HashSet<u32>,
    pub(super) spelling: Spelling,
    /// Special tokens, which decode to no text, sorted.
    pub(super) special: Vec<u32>,
    /// Tokens that are written literally.
    pub(super) literal: HashSet<u32>,
    /// The first id of each spelling, computed on first use.
    pub(super) ids: OnceLock<HashMap<Box<[u8]>, u32>>,
}

impl Description {
    /// The number of ids.
    pub(crate) fn len(&self) -> usize {
        self.tokens.texts.len()
    }

    /// The spelling of a token. `None` for an id without a token.
    pub(crate) fn token_text(&self, id: u32) -> Option<&[u8]> {
        self.tokens.texts.get(id as usize).filter(|_| !self.tokens.missing.contains(&id))
    }

    /// The bytes that a token adds to a text. `None` for an id without a token.
    pub(crate) fn token_bytes(&self, id: u32) -> Option<Vec<u8>> {
        let text = self.token_text(id)?;
        Some(if self.tokens.literal.contains(&id) { text.to_vec() } else { self.tokens.spelling.bytes(text) })
    }

    /// As [`token_bytes`](Description::token_bytes), for grammars. A special token begins with the byte 0xFF, which occurs in no
    /// text, so that only a grammar that names the token produces it.
    #[cfg(feature = "grammar")]
    pub(crate) fn grammar_bytes(&self, id: u32) -> Vec<u8> {
        if self.is_special(id) {
            return [b"\xff", self.token_text(id).unwrap_or_default()].concat();
        }
        self.token_bytes(id).unwrap_or_default()
    }

    /// The id of the token that is spelled `text`, the first of equal ones.
    pub(crate) fn id_of(&self, text: &[u8]) -> Option<u32> {
        let first_ids = || {
            let mut ids = HashMap::with_capacity(self.len());
            for (id, text) in (0..).zip(self.tokens.texts.iter()) {
                if !self.tokens.missing.contains(&id) {
                    ids.entry(text.into()).or_insert(id);
                }
            }
            ids
        };
        self.tokens.ids.get_or_init(first_ids).get(text).copied()
    }

    pub(crate) fn is_special(&self, id: u32) -> bool {
        self.tokens.special.binary_search(&id).is_ok()
    }

    /// All special tokens, sorted.
    #[cfg(feature = "python")]
    pub(crate) fn special(&self) -> &[u32] {
        &self.tokens.special
    }

    /// `ids` with the tokens that the model expects around every text; only before it, for a text that the model continues,
    /// unless it `ends`. Tokens that are there already, which is possible where special tokens in the text were recognized,
    /// are not added again.
    pub(crate) fn framed(&self, ids: Vec<u32>, special_recognized: bool, ends: bool) -> Vec<u32> {
        let mut before = self.prefix.clone();
        let mut after = if ends { self.suffix.as_slice() } else { &[] };
        if special_recognized && let Some(first) = ids.first() {
            if ids.starts_with(&before) {
                before.clear();
            } else if Some(*first) == self.bos {
                before.retain(|id| Some(*id) != self.bos);
            }
            if ids.ends_with(after) {
                after = &[];
            }
        }
        [before.as_slice(), &ids, after].concat()
    }

    /// Two strings as one, and the index of the first token of the second one where models tell it from the first.
    pub(crate) fn framed_pair(&self, first: Vec<u32>, second: Vec<u32>) -> (Vec<u32>, Option<usize>) {
        let PairFrame { before, middle, after, has_types } = &self.pair;
        let start = before.len() + first.len() + middle.len();
        let ids = [before.as_slice(), &first, middle, &second, after].concat();
        (ids, has_types.then_some(start))
    }

    /// The chat template called `name`.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] when there is none.
    #[cfg(feature = "chat")]
    pub(super) fn chat_template(&self, name: &str) -> Result<&str> {
        let listed = || {
            let names: Vec<&str> = self.chat_templates.keys().map(String::as_str).collect();
            let names = if names.is_empty() { "none".to_owned() } else { names.join(", ") };
            let expected = format!("one of the chat templates of {} ({names})", self.path.display());
            Error::argument("template", format_args!("{name:?}"), expected)
        };
        self.chat_templates.get(name).map(String::as_str).ok_or_else(listed)
    }

    /// The ids below `count` without a token, as ranges in ascending order: many models have more rows in their output matrix
    /// than tokens.
    pub(crate) fn missing_ids(&self, count: usize) -> Vec<Range<u32>> {
        let (len, count) = (self.len() as u32, u32::try_from(count).unwrap_or(u32::MAX));
        let mut gaps: Vec<u32> = self.tokens.missing.iter().copied().filter(|id| *id < count).collect();
        gaps.sort_unstable();
        let beyond = (len < count).then_some(len..count);
        gaps.into_iter().map(|id| id..id + 1).chain(beyond).collect()
    }

    /// The error for an id without a token.
    pub(super) fn unknown(&self, id: u32) -> Error {
        Error::argument("token", id, format_args!("an id below {}", self.len()))
    }
}

/// What a vocabulary says about generation.
#[derive(Debug, Default)]
pub(crate) struct Limits {
    /// The tokens that end a generation, sorted.
    pub(crate) ends: Vec<u32>,
    /// Rows of the output matrix without a token, which are never sampled.
    pub(crate) missing: Vec<Range<u32>>,
}

impl Limits {
    pub(super) fn of(description: &Description, rows: usize) -> Limits {
        Limits { ends: description.ends.clone(), missing: description.missing_ids(rows) }
    }
}

/// Reserves and frees as much memory as a vocabulary with these tokens takes: a map that cannot grow aborts the process.
///
/// # Errors
/// [`Error::OutOfMemory`].
pub(super) fn reserve(tokens: usize, bytes: usize) -> Result<()> {
    // The spellings and their ids in a hash map that is half empty.
    let bytes = bytes.saturating_add(tokens.saturating_mul(64));
    let reserved = Vec::<u8>::new().try_reserve_exact(bytes);
    reserved.map_err(|_| Error::OutOfMemory { what: "a vocabulary", bytes, left: None })
}
