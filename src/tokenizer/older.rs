//! Folders without `tokenizer.json`: byte-level BPE in `vocab.json` and `merges.txt`, SentencePiece in `tokenizer.model`.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::{Map, Value, json};

use super::files;
use super::pre_tokenizers::{Found, find};
use crate::error::{Error, Place, Result};
use crate::format::gguf::{Metadata, StringArray};

/// The classes of transformers that read `vocab.json` and `merges.txt` as byte-level BPE, and their rules in GGUF.
const CLASSES: &[(&str, &str)] =
    &[("GPT2Tokenizer", "gpt-2"), ("CodeGenTokenizer", "gpt-2"), ("Qwen2Tokenizer", "qwen2"), ("", "gpt-2")];

const PIECES: &str = "tokenizer.model";

/// A token that is not part of the vocabulary's own file.
struct Added {
    content: String,
    special: bool,
    lstrip: bool,
    rstrip: bool,
}

/// The content of a `tokenizer.json` that says the same as `vocab.json` and `merges.txt` of the folder. `None` without them.
///
/// # Errors
/// [`Error::Malformed`] and [`Error::Unsupported`] with the file; [`Error::Io`].
pub(crate) fn byte_level(folder: &Path) -> Result<Option<String>> {
    let (vocabulary_path, merges_path) = (folder.join("vocab.json"), folder.join("merges.txt"));
    let (Some(vocabulary), Some(merges)) = (files::text(&vocabulary_path)?, files::text(&merges_path)?) else {
        return Ok(None);
    };
    let vocabulary = files::parse(&vocabulary, &vocabulary_path, Place::File)?;
    let config_path = folder.join("tokenizer_config.json");
    let config = files::object(&config_path)?;
    let class = config.get("tokenizer_class").and_then(Value::as_str).unwrap_or_default();
    let Some((_, rule)) = CLASSES.iter().find(|known| known.0 == class.trim_end_matches("Fast")) else {
        return Err(Error::Unsupported {
            path: config_path,
            place: Place::Key("tokenizer_class".to_owned()),
            what: format!("{class:?} without a tokenizer.json"),
            supported: "supported: GPT2Tokenizer, CodeGenTokenizer, Qwen2Tokenizer; others need tokenizer.json"
                .to_owned(),
        });
    };
    let mut pairs = Vec::new();
    // The first line may name the version.
    let lines = merges.lines().enumerate().filter(|(at, line)| !(line.is_empty() || *at == 0 && line.starts_with('#')));
    for (at, line) in lines {
        let pair = line.split_once(' ').filter(|(left, right)| !left.is_empty() && !right.trim_end().is_empty());
        let Some((left, right)) = pair else {
            let found = format!("line {} is {:?}", at + 1, line.chars().take(60).collect::<String>());
            return Err(Error::malformed(&merges_path, Place::File, found, "two tokens with a space between them"));
        };
        pairs.push(json!([left, right.trim_end()]));
    }
    let id = |content: &str| vocabulary.get(content).and_then(Value::as_u64);
    let mut added = added_tokens(folder, &config, id)?;
    for content in special_spellings(folder, &config)? {
        if let Some(id) = id(&content)
            && !added.contains_key(&id)
        {
            added.insert(id, Added { content, special: true, lstrip: false, rstrip: false });
        }
    }
    let added: Vec<Value> = added
        .into_iter()
        .map(|(id, token)| {
            let Added { content, special, lstrip, rstrip } = token;
            json!({"id": id, "content": content, "single_word": false, "lstrip": lstrip, "rstrip": rstrip,
                   "normalized": false, "special": special})
        })
        .collect();
    let prefix = config.get("add_prefix_space").and_then(Value::as_bool).unwrap_or(false);
    let bytes = |regex: bool| json!({"type": "ByteLevel", "add_prefix_space": prefix, "trim_offsets": true, "use_regex": regex});
    let is_gpt2 = *rule == "gpt-2";
    let splitter = match find(Some(rule.as_bytes())) {
        Found::Rule(rule) if !is_gpt2 => {
            let split = |pattern: &&str| json!({"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false});
            let steps = rule.patterns.iter().map(split).chain([bytes(false)]).collect::<Vec<_>>();
            json!({"type": "Sequence", "pretokenizers": steps})
        }
        _ => bytes(true),
    };
    let whole = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": added,
        "normalizer": if is_gpt2 { Value::Null } else { json!({"type": "NFC"}) },
        "pre_tokenizer": splitter, "post_processor": null,
        "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
            "vocab": vocabulary, "merges": pairs,
        },
    });
    Ok(Some(whole.to_string()))
}

/// The tokens that the small files add, by id. `id_of` finds the id of a token of the vocabulary.
fn added_tokens(
    folder: &Path,
    config: &Map<String, Value>,
    id_of: impl Fn(&str) -> Option<u64>,
) -> Result<BTreeMap<u64, Added>> {
    let mut added = BTreeMap::new();
    for (content, id) in files::object(&folder.join("added_tokens.json"))? {
        if let Some(id) = id.as_u64() {
            added.insert(id, Added { content, special: false, lstrip: false, rstrip: false });
        }
    }
    let listed = config.get("added_tokens_decoder").and_then(Value::as_object);
    for (id, token) in listed.into_iter().flatten() {
        let flag = |name: &str| token.get(name).and_then(Value::as_bool).unwrap_or(false);
        if let (Ok(id), Some(content)) = (id.parse(), token.get("content").and_then(Value::as_str)) {
            let content = content.to_owned();
            let (special, lstrip, rstrip) = (flag("special"), flag("lstrip"), flag("rstrip"));
            added.insert(id, Added { content, special, lstrip, rstrip });
        }
    }
    // A token that the vocabulary has under another id would get that one.
    added.retain(|id, token| id_of(&token.content).is_none_or(|own| own == *id));
    Ok(added)
}

/// The spellings of special tokens that the small files name.
fn special_spellings(folder: &Path, config: &Map<String, Value>) -> Result<Vec<String>> {
    let mut named = files::object(&folder.join("special_tokens_map.json"))?;
    named.extend(config.clone());
    let lists = named.get("additional_special_tokens").and_then(Value::as_array).into_iter().flatten();
    let single = named.iter().filter(|(key, _)| key.ends_with("_token")).map(|(_, value)| value);
    let text = |value: &Value| value.get("content").unwrap_or(value).as_str().map(str::to_owned);
    Ok(single.chain(lists).filter_map(text).collect())
}

/// The vocabulary of `tokenizer.model` and its special tokens under GGUF's keys. `None` without the file.
///
/// # Errors
/// [`Error::Malformed`] and [`Error::Unsupported`] with the part of the file; [`Error::Io`].
pub(crate) fn sentencepiece(folder: &Path) -> Result<Option<Metadata>> {
    let path = folder.join(PIECES);
    let Some(bytes) = files::bytes(&path)? else { return Ok(None) };
    let damaged = || Error::malformed(&path, Place::File, "damaged bytes", "a vocabulary of SentencePiece");
    let unsupported = |part: &str, what: &str, supported: &str| Error::Unsupported {
        path: path.clone(),
        place: Place::Key(part.to_owned()),
        what: what.to_owned(),
        supported: format!("supported: {supported}; or a tokenizer.json"),
    };
    let (mut texts, mut scores, mut kinds) = (Vec::<String>::new(), Vec::new(), Vec::new());
    let (mut is_bpe, mut bos, mut eos, mut unknown) = (false, 1, 2, 0);
    let (mut adds_space, mut collapses) = (true, true);
    for field in Fields(&bytes) {
        let (number, Wire::Bytes(part)) = field.ok_or_else(damaged)? else { continue };
        match number {
            1 => {
                let (mut text, mut score, mut kind) = (String::new(), 0.0, 1);
                for field in Fields(part) {
                    match field.ok_or_else(damaged)? {
                        (1, Wire::Bytes(bytes)) => text = str::from_utf8(bytes).map_err(|_| damaged())?.to_owned(),
                        (2, Wire::Fixed(bits)) => score = f32::from_bits(bits),
                        (3, Wire::Number(number)) => kind = i32::try_from(number).map_err(|_| damaged())?,
                        _ => {}
                    }
                }
                texts.push(text);
                scores.push(score);
                kinds.push(kind);
            }
            2 => {
                for field in Fields(part) {
                    match field.ok_or_else(damaged)? {
                        (3, Wire::Number(kind)) => is_bpe = kind == 2,
                        (40, Wire::Number(id)) => unknown = id,
                        (41, Wire::Number(id)) => bos = id,
                        (42, Wire::Number(id)) => eos = id,
                        _ => {}
                    }
                }
            }
            3 => {
                for field in Fields(part) {
                    match field.ok_or_else(damaged)? {
                        (2, Wire::Bytes(map)) if !map.is_empty() => {
                            let supported = "vocabularies that leave text as it is";
                            return Err(unsupported("normalizer_spec", "a table that rewrites text", supported));
                        }
                        (3, Wire::Number(on)) => adds_space = on != 0,
                        (4, Wire::Number(on)) => collapses = on != 0,
                        _ => {}
                    }
                }
            }
            _ => {}
        }
    }
    if !is_bpe {
        return Err(unsupported("trainer_spec.model_type", "a vocabulary that is not BPE", "BPE"));
    }
    if collapses {
        let supported = "vocabularies that keep spaces";
        return Err(unsupported("normalizer_spec.remove_extra_whitespaces", "true", supported));
    }
    let config = files::object(&folder.join("tokenizer_config.json"))?;
    let own = texts.clone();
    for (id, token) in added_tokens(folder, &config, |text| own.iter().position(|own| own == text).map(|at| at as u64))?
    {
        let id = usize::try_from(id).unwrap_or(usize::MAX);
        if id > texts.len() {
            let found = format_args!("the id {id} of {:?}", token.content);
            let expected = format!("the ids from {} on", texts.len());
            return Err(Error::malformed(folder.join("tokenizer_config.json"), Place::File, found, expected));
        }
        if id == texts.len() {
            texts.push(token.content);
            scores.push(0.0);
            kinds.push(if token.special { 3 } else { 4 });
        } else if token.special && kinds[id] != 2 {
            kinds[id] = 3;
        }
    }
    let switch = |key: &str, default: bool| config.get(key).and_then(Value::as_bool).unwrap_or(default);
    let mut metadata = Metadata::new();
    metadata.set("tokenizer.ggml.model", "llama").set("tokenizer.ggml.pre", "default");
    metadata.set("tokenizer.ggml.tokens", texts.iter().collect::<StringArray>());
    metadata.set("tokenizer.ggml.token_type", kinds).set("tokenizer.ggml.scores", scores);
    metadata.set("tokenizer.ggml.add_space_prefix", adds_space);
    metadata.set("tokenizer.ggml.add_bos_token", switch("add_bos_token", true) && (bos as usize) < texts.len());
    metadata.set("tokenizer.ggml.add_eos_token", switch("add_eos_token", false) && (eos as usize) < texts.len());
    for (name, id) in [("bos", bos), ("eos", eos), ("unknown", unknown)] {
        // Without the token, its number is -1.
        if let Some(id) = u32::try_from(id).ok().filter(|id| (*id as usize) < texts.len()) {
            metadata.set(format!("tokenizer.ggml.{name}_token_id"), id);
        }
    }
    Ok(Some(metadata))
}

/// The value of a field of a protocol buffer.
enum Wire<'a> {
    Number(u64),
    Fixed(u32),
    Bytes(&'a [u8]),
    /// Eight bytes, which no field here has.
    Wide,
}

/// The fields of a protocol buffer: number and value. Ends with `None` inside where bytes are damaged.
struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    fn number(&mut self) -> Option<u64> {
        let mut number = 0u64;
        for shift in (0..64).step_by(7) {
            let (byte, rest) = self.0.split_first()?;
            self.0 = rest;
            number |= u64::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                return Some(number);
            }
        }
        None
    }

    fn take(&mut self, count: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(count)?;
        self.0 = rest;
        Some(taken)
    }

    fn field(&mut self) -> Option<(u64, Wire<'a>)> {
        let key = self.number()?;
        let value = match key & 7 {
            0 => Wire::Number(self.number()?),
            1 => self.take(8).map(|_| Wire::Wide)?,
            2 => {
                let count = usize::try_from(self.number()?).ok()?;
                Wire::Bytes(self.take(count)?)
            }
            5 => Wire::Fixed(u32::from_le_bytes(self.take(4)?.try_into().ok()?)),
            _ => return None,
        };
        Some((key >> 3, value))
    }
}

impl<'a> Iterator for Fields<'a> {
    type Item = Option<(u64, Wire<'a>)>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.0.is_empty() {
            return None;
        }
        let field = self.field();
        if field.is_none() {
            self.0 = &[];
        }
        Some(field)
    }
}
