//! Writes vocabularies of words and their parts (WordPiece), and of pieces with a likelihood (Unigram).

use std::collections::HashMap;

use serde_json::Value;

use super::description::{Tokenizer, kind};
use crate::error::Result;
use crate::format::gguf::{Metadata, StringArray};
use crate::format::json;

/// A kind of vocabulary.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Subwords {
    Words,
    Pieces,
}

impl Subwords {
    /// The kind that the tokenizers library calls `name`.
    pub(super) fn by_name(name: &str) -> Option<Subwords> {
        match name {
            "WordPiece" => Some(Subwords::Words),
            "Unigram" => Some(Subwords::Pieces),
            _ => None,
        }
    }

    /// Writes the vocabulary, and returns the ids of the tokens.
    pub(super) fn vocabulary(
        self,
        tokenizer: &Tokenizer,
        model: &Value,
        rows: usize,
        metadata: &mut Metadata,
    ) -> Result<HashMap<String, usize>> {
        let mut texts: Vec<String> = (0..rows).map(|id| format!("[PAD{id}]")).collect();
        let (mut kinds, mut scores) = (vec![kind::UNUSED; rows], vec![-10000.0f32; rows]);
        let mut ids = HashMap::new();
        for (text, id, score) in self.tokens(tokenizer, model, rows)? {
            texts[id] = text.to_owned();
            (kinds[id], scores[id]) = (kind::NORMAL, score);
            ids.entry(text.to_owned()).or_insert(id);
        }
        let unknown = match self {
            Subwords::Words => model.get("unk_token").and_then(Value::as_str).and_then(|text| ids.get(text).copied()),
            Subwords::Pieces => match model.get("unk_id") {
                None | Some(Value::Null) => None,
                id => Some(tokenizer.id("model.unk_id", id, rows)?),
            },
        };
        for token in tokenizer.description.get("added_tokens").and_then(Value::as_array).into_iter().flatten() {
            let id = tokenizer.id("added_tokens", token.get("id"), rows)?;
            let Some(content) = token.get("content").and_then(Value::as_str) else {
                return Err(tokenizer.malformed("added_tokens", json::brief(token), "an object with content"));
            };
            let special = token.get("special").and_then(Value::as_bool).unwrap_or(false);
            kinds[id] = if special { kind::CONTROL } else { kind::USER_DEFINED };
            (texts[id], scores[id]) = (content.to_owned(), 0.0);
            ids.insert(content.to_owned(), id);
        }
        if let Some(id) = unknown {
            kinds[id] = if self == Subwords::Words { kind::CONTROL } else { kind::UNKNOWN };
            metadata.set("tokenizer.ggml.unknown_token_id", id as u32);
        }
        if self == Subwords::Words {
            // llama.cpp marks the beginning of a word instead of its continuation.
            for (text, _) in texts.iter_mut().zip(&kinds).filter(|(_, kind)| **kind == kind::NORMAL) {
                *text = match text.strip_prefix("##") {
                    Some(rest) if !rest.is_empty() => rest.to_owned(),
                    _ => format!("\u{2581}{text}"),
                };
            }
        }
        metadata.set("tokenizer.ggml.model", if self == Subwords::Words { "bert" } else { "t5" });
        metadata.set("tokenizer.ggml.pre", "default");
        metadata.set("tokenizer.ggml.tokens", texts.iter().collect::<StringArray>());
        metadata.set("tokenizer.ggml.token_type", kinds);
        match self {
            Subwords::Words => {
                let lowercase = |step: &&Value| step.get("lowercase").and_then(Value::as_bool) == Some(true);
                let lowercase = tokenizer.steps("normalizer", "normalizers").iter().any(lowercase);
                metadata.set("tokenizer.ggml.normalizer.lowercase", lowercase);
            }
            Subwords::Pieces => {
                metadata.set("tokenizer.ggml.scores", scores);
                metadata.set("tokenizer.ggml.add_space_prefix", tokenizer.adds_space());
                let splits = tokenizer.has_step("pre_tokenizer", "pretokenizers", "WhitespaceSplit");
                metadata.set("tokenizer.ggml.remove_extra_whitespaces", splits);
                if let Some(charsmap) = charsmap(tokenizer)? {
                    metadata.set("tokenizer.ggml.precompiled_charsmap", charsmap);
                }
            }
        }
        metadata.set("tokenizer.ggml.add_sep_token", has_two_between(tokenizer));
        Ok(ids)
    }

    /// The tokens of the model with their ids and scores.
    fn tokens<'a>(self, tokenizer: &Tokenizer, model: &'a Value, rows: usize) -> Result<Vec<(&'a str, usize, f32)>> {
        match (self, model.get("vocab")) {
            (Subwords::Words, Some(Value::Object(words))) => {
                let word = |(text, id): (&'a String, &Value)| {
                    Ok((text.as_str(), tokenizer.id("model.vocab", Some(id), rows)?, 0.0))
                };
                words.iter().map(word).collect()
            }
            (Subwords::Pieces, Some(Value::Array(pieces))) => {
                let piece = |(id, piece): (usize, &'a Value)| {
                    let pair = piece.get(0).and_then(Value::as_str).zip(piece.get(1).and_then(Value::as_f64));
                    let expected = "pairs of a piece and its score, one for each row of the embedding at most";
                    let (text, score) = pair
                        .filter(|_| id < rows)
                        .ok_or_else(|| tokenizer.malformed("model.vocab", json::brief(piece), expected))?;
                    Ok((text, id, score as f32))
                };
                pieces.iter().enumerate().map(piece).collect()
            }
            (_, other) => {
                let found = other.map_or("nothing".to_owned(), json::brief);
                Err(tokenizer.malformed("model.vocab", found, "the tokens"))
            }
        }
    }
}

/// Whether two tokens are between the strings of a pair.
fn has_two_between(tokenizer: &Tokenizer) -> bool {
    let steps = tokenizer.steps("post_processor", "processors");
    steps.iter().any(|step| match step.get("type").and_then(Value::as_str) {
        Some("RobertaProcessing") => true,
        Some("TemplateProcessing") => {
            let parts = step.get("pair").and_then(Value::as_array).map_or(&[][..], Vec::as_slice);
            let mut texts = (0..).zip(parts).filter(|(_, part)| part.get("Sequence").is_some()).map(|(at, _)| at);
            texts.next().zip(texts.next()).is_some_and(|(first, second): (usize, usize)| second > first + 2)
        }
        _ => false,
    })
}

/// The table by which SentencePiece normalizes text, from base 64.
fn charsmap(tokenizer: &Tokenizer) -> Result<Option<Vec<u8>>> {
    let key = "precompiled_charsmap";
    let mut steps = tokenizer.steps("normalizer", "normalizers").into_iter();
    let Some(text) = steps.find_map(|step| step.get(key)?.as_str()) else { return Ok(None) };
    let value = |digit: u8| match digit {
        b'A'..=b'Z' => Some(digit - b'A'),
        b'a'..=b'z' => Some(digit - b'a' + 26),
        b'0'..=b'9' => Some(digit - b'0' + 52),
        b'+' => Some(62),
        b'/' => Some(63),
        _ => None,
    };
    let digits: Option<Vec<u8>> = text.trim_end_matches('=').bytes().map(value).collect();
    let Some(digits) = digits else {
        return Err(tokenizer.malformed(key, "other characters", "bytes in base 64"));
    };
    let mut bytes = Vec::with_capacity(digits.len() / 4 * 3);
    for group in digits.chunks(4) {
        let number = (0..4).fold(0u32, |number, at| number << 6 | u32::from(group.get(at).copied().unwrap_or(0)));
        bytes.extend((0..group.len() - 1).map(|at| (number >> (16 - 8 * at)) as u8));
    }
    Ok(Some(bytes))
}
