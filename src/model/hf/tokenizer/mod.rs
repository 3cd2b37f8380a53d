//! Writes the tokenizer under GGUF's keys: `tokenizer.json`, special tokens and chat templates.

mod description;
mod pretokenizer;
mod subwords;

use std::collections::HashMap;
use std::path::Path;

use serde_json::{Map, Value};

use description::{Tokenizer, kind};

use crate::error::{Error, Place, Result};
use crate::format::gguf::{Metadata, StringArray};
use crate::format::json;
use crate::tokenizer::older;

/// The largest size of a file in bytes. The largest known vocabularies take 35 MB.
const MAX_BYTES: u64 = 256 << 20;

/// The key of a whole `tokenizer.json`.
const WHOLE: &str = "tokenizer.huggingface.json";

/// The vocabulary, special tokens and chat templates of the model in `folder`, called `name`, whose embedding has `rows`
/// rows.
///
/// # Errors
/// [`Error::Missing`], [`Error::Malformed`] and [`Error::Unsupported`] with the key of `tokenizer.json`; [`Error::Io`].
pub(super) fn metadata(folder: &Path, name: Option<&str>, rows: usize) -> Result<Metadata> {
    let path = folder.join("tokenizer.json");
    let files = Files {
        tokenizer: optional(folder, "tokenizer_config.json")?,
        map: optional(folder, "special_tokens_map.json")?,
        generation: optional(folder, "generation_config.json")?,
        model: optional(folder, "config.json")?,
    };
    let description = match json::read(&path, MAX_BYTES) {
        Err(Error::Io { path, source }) if source.kind() == std::io::ErrorKind::NotFound => {
            match older::byte_level(folder)? {
                Some(text) => json::entries(&path, text.as_bytes(), Place::File, "an object")?.into_iter().collect(),
                None => match older::sentencepiece(folder)? {
                    Some(pieces) => return padded(pieces, folder, &files, rows),
                    None => {
                        let expected = "the vocabulary in the format of the tokenizers library".to_owned();
                        return Err(Error::Missing { path, place: Place::File, expected });
                    }
                },
            }
        }
        other => other?,
    };
    let tokenizer = Tokenizer { path, description };
    let mut metadata = Metadata::new();
    let ids = tokenizer.vocabulary(rows, &mut metadata)?;
    files.special_tokens(&ids, &tokenizer.description, rows, &mut metadata);
    let frame = (metadata.get("tokenizer.ggml.bos_token_id"), metadata.get("tokenizer.ggml.eos_token_id"));
    if tokenizer.says_more(&ids, [frame.0, frame.1].map(|id| id.and_then(|id| id.as_u64()))) {
        metadata.set(WHOLE, Value::Object(tokenizer.description.clone()).to_string());
    }
    templates(folder, &files.tokenizer, &mut metadata)?;
    // llama.cpp looks these tokens up in every model with such a name, and fails without them.
    let called_phi3 = name.is_some_and(|name| ["phi-3", "phi3"].iter().any(|part| name.to_lowercase().contains(part)));
    if called_phi3 && !["</s>", "<unk>", "<s>", "<|endoftext|>"].iter().all(|token| ids.contains_key(*token)) {
        metadata.set("general.name", "model");
    }
    Ok(metadata)
}

/// The keys of a vocabulary of SentencePiece in a file of its own, with as many tokens as the embedding has rows.
fn padded(mut metadata: Metadata, folder: &Path, files: &Files, rows: usize) -> Result<Metadata> {
    let tokens =
        metadata.get("tokenizer.ggml.tokens").and_then(|value| value.as_strings()).cloned().unwrap_or_default();
    if tokens.len() > rows {
        let found = format!("{} tokens", tokens.len());
        return Err(Error::malformed(
            folder,
            Place::File,
            found,
            format_args!("at most {rows}, the rows of the embedding"),
        ));
    }
    let numbers = |key: &str| metadata.get(key).and_then(|value| value.as_array());
    let mut kinds: Vec<i32> =
        numbers("tokenizer.ggml.token_type").and_then(|array| array.to_integers()).unwrap_or_default();
    let mut scores: Vec<f32> = numbers("tokenizer.ggml.scores").and_then(|array| array.to_f32()).unwrap_or_default();
    kinds.resize(rows, kind::UNUSED);
    scores.resize(rows, -10000.0);
    let mut texts = tokens.clone();
    for id in tokens.len()..rows {
        texts.push(format!("[PAD{id}]"));
    }
    metadata.set("tokenizer.ggml.tokens", texts);
    metadata.set("tokenizer.ggml.token_type", kinds).set("tokenizer.ggml.scores", scores);
    let eos = metadata.get("tokenizer.ggml.eos_token_id").and_then(|id| id.as_u64());
    if let Some(other) = files.numbers("eos_token_id", rows).into_iter().find(|id| Some(*id as u64) != eos) {
        metadata.set("tokenizer.ggml.eot_token_id", other as u32);
    }
    templates(folder, &files.tokenizer, &mut metadata)?;
    Ok(metadata)
}

fn optional(folder: &Path, name: &str) -> Result<Map<String, Value>> {
    match json::read(&folder.join(name), MAX_BYTES) {
        Err(Error::Io { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => Ok(Map::new()),
        other => other,
    }
}

/// Text, kind and score of every token.
struct Tokens {
    texts: Vec<String>,
    kinds: Vec<i32>,
    scores: Vec<f32>,
}

impl Tokenizer {
    /// Writes the vocabulary, and returns the ids of the tokens.
    fn vocabulary(&self, rows: usize, metadata: &mut Metadata) -> Result<HashMap<String, usize>> {
        let empty = Value::Null;
        let model = self.description.get("model").unwrap_or(&empty);
        let kind = model.get("type").and_then(Value::as_str).unwrap_or("BPE");
        let byte_level = self.has_step("pre_tokenizer", "pretokenizers", "ByteLevel")
            || self.has_step("decoder", "decoders", "ByteLevel");
        let pieces = model.get("byte_fallback").and_then(Value::as_bool).unwrap_or(false)
            || self.has_step("decoder", "decoders", "Metaspace");
        if let Some(subwords) = subwords::Subwords::by_name(kind) {
            return subwords.vocabulary(self, model, rows, metadata);
        }
        if kind != "BPE" || !(byte_level || pieces) {
            let supported = "supported: byte-level BPE, BPE over pieces with byte fallback, WordPiece and Unigram";
            return Err(self.unsupported("model.type", format!("a vocabulary of type {kind:?}"), supported));
        }
        let merges = self.merges(model)?;
        let (tokens, ids) = self.tokens(model, &merges, byte_level, rows)?;
        metadata.set("tokenizer.ggml.model", if byte_level { "gpt2" } else { "llama" });
        let ignores = model.get("ignore_merges").and_then(Value::as_bool).unwrap_or(false);
        let pre = if byte_level {
            pretokenizer::name(self.description.get("pre_tokenizer"), ignores).map_err(|found| {
                let supported = "supported: those that GGUF has a name for; the folder itself can be used";
                self.unsupported("pre_tokenizer", found, supported)
            })?
        } else {
            "default"
        };
        metadata.set("tokenizer.ggml.pre", pre);
        metadata.set("tokenizer.ggml.tokens", tokens.texts.iter().collect::<StringArray>());
        metadata.set("tokenizer.ggml.token_type", tokens.kinds);
        if byte_level {
            let merges = merges.iter().map(|(left, right)| format!("{left} {right}")).collect::<StringArray>();
            metadata.set("tokenizer.ggml.merges", merges);
        } else {
            metadata.set("tokenizer.ggml.scores", tokens.scores);
            metadata.set("tokenizer.ggml.add_space_prefix", self.adds_space());
        }
        Ok(ids)
    }

    /// The merges, the first one with the highest priority.
    fn merges<'a>(&self, model: &'a Value) -> Result<Vec<(&'a str, &'a str)>> {
        let Some(Value::Array(merges)) = model.get("merges") else {
            return Err(self.malformed("model.merges", "no list", "a list of pairs"));
        };
        let pair = |merge: &'a Value| match merge {
            // In this older style a token cannot contain a space.
            Value::String(text) => text.split_once(' ').filter(|pair| !pair.1.contains(' ')),
            Value::Array(pair) => match pair.as_slice() {
                [Value::String(left), Value::String(right)] => Some((left.as_str(), right.as_str())),
                _ => None,
            },
            _ => None,
        };
        let pairs = merges.iter().map(|merge| {
            let expected = "two tokens, in a list or with one space between them";
            pair(merge).ok_or_else(|| self.malformed("model.merges", json::brief(merge), expected))
        });
        pairs.collect()
    }

    /// The tokens by id, and their ids.
    fn tokens(
        &self,
        model: &Value,
        merges: &[(&str, &str)],
        byte_level: bool,
        rows: usize,
    ) -> Result<(Tokens, HashMap<String, usize>)> {
        let Some(Value::Object(vocabulary)) = model.get("vocab") else {
            return Err(self.malformed("model.vocab", "no object", "the id of every token"));
        };
        let id = |key: &str, id: Option<&Value>| self.id(key, id, rows);
        let mut tokens = Tokens {
            texts: (0..rows).map(|id| format!("[PAD{id}]")).collect(),
            kinds: vec![kind::UNUSED; rows],
            scores: vec![-10000.0; rows],
        };
        let mut ids = HashMap::with_capacity(vocabulary.len());
        // SentencePiece merges by the score of the result, for which the rank of the merge stands.
        let mut ranks = HashMap::new();
        if !byte_level {
            for (rank, (left, right)) in merges.iter().enumerate() {
                ranks.entry(format!("{left}{right}")).or_insert(rank);
            }
        }
        let unknown = model.get("unk_token").and_then(Value::as_str);
        let mut seen = vec![false; rows];
        for (text, number) in vocabulary {
            let id = id("model.vocab", Some(number))?;
            if std::mem::replace(&mut seen[id], true) {
                let found = format!("the id {id} a second time, for {:?}", text.chars().take(60).collect::<String>());
                return Err(self.malformed("model.vocab", found, "each id once"));
            }
            tokens.texts[id].clone_from(text);
            tokens.kinds[id] = match text.as_str() {
                text if !byte_level && Some(text) == unknown => kind::UNKNOWN,
                text if !byte_level && is_byte(text) => kind::BYTE,
                _ => kind::NORMAL,
            };
            tokens.scores[id] = ranks.get(text.as_str()).map_or(-1e6, |rank| -(*rank as f32));
            ids.insert(text.clone(), id);
        }
        for token in self.description.get("added_tokens").and_then(Value::as_array).into_iter().flatten() {
            let id = id("added_tokens", token.get("id"))?;
            let Some(content) = token.get("content").and_then(Value::as_str) else {
                return Err(self.malformed("added_tokens", json::brief(token), "an object with content"));
            };
            let special = token.get("special").and_then(Value::as_bool).unwrap_or(false);
            tokens.kinds[id] = match special || looks_special(content) {
                _ if tokens.kinds[id] == kind::UNKNOWN => kind::UNKNOWN,
                true => kind::CONTROL,
                false => kind::USER_DEFINED,
            };
            // Pieces contain U+2581 for a space; user-defined tokens are matched in the text before spaces are replaced.
            let is_plain = byte_level || tokens.kinds[id] != kind::USER_DEFINED;
            tokens.texts[id] = if is_plain { content.to_owned() } else { content.replace('\u{2581}', " ") };
            tokens.scores[id] = 0.0;
            ids.insert(content.to_owned(), id);
        }
        Ok((tokens, ids))
    }

    /// Whether the file says more than GGUF's keys for vocabularies can. `frame` are the start and the end token.
    fn says_more(&self, ids: &HashMap<String, usize>, frame: [Option<u64>; 2]) -> bool {
        let byte_level = self.has_step("pre_tokenizer", "pretokenizers", "ByteLevel")
            || self.has_step("decoder", "decoders", "ByteLevel");
        let kind = |step: &Value| step.get("type").and_then(Value::as_str).unwrap_or_default().to_owned();
        let flag = |value: &Value, key: &str| value.get(key).and_then(Value::as_bool).unwrap_or(false);
        let spaces = |step: &&Value| {
            // The two steps by which pieces contain U+2581 for a space.
            let replaces = step.pointer("/pattern/String").and_then(Value::as_str) == Some(" ")
                && step.get("content").and_then(Value::as_str) == Some("\u{2581}");
            let prepends = step.get("prepend").and_then(Value::as_str) == Some("\u{2581}");
            !byte_level && (kind(step) == "Replace" && replaces || kind(step) == "Prepend" && prepends)
        };
        let normalizes = !self.steps("normalizer", "normalizers").iter().all(|step| step.is_null() || spaces(step));
        let splits = self.steps("pre_tokenizer", "pretokenizers").into_iter().any(|step| match kind(step).as_str() {
            "ByteLevel" => flag(step, "add_prefix_space"),
            // There are no spaces after those steps.
            "Split" => !byte_level && step.pointer("/pattern/String").and_then(Value::as_str) != Some(" "),
            // Patterns of byte-level vocabularies have names, and others are refused.
            _ => !byte_level && !step.is_null() && kind(step) != "Metaspace",
        });
        let added = self.description.get("added_tokens").and_then(Value::as_array).into_iter().flatten();
        let strips =
            added.into_iter().any(|token| ["lstrip", "rstrip", "single_word"].iter().any(|key| flag(token, key)));
        let model = self.description.get("model").unwrap_or(&Value::Null);
        let affix = |key: &str| model.get(key).and_then(Value::as_str).is_some_and(|affix| !affix.is_empty());
        let processor = self.description.get("post_processor");
        let (before, after) = frame_of(processor, ids);
        let own = |id: Option<usize>, token: Option<u64>| id.is_none_or(|id| Some(id as u64) == token);
        subwords::Subwords::by_name(model.get("type").and_then(Value::as_str).unwrap_or("BPE")).is_some()
            || normalizes
            || splits
            || strips
            || affix("end_of_word_suffix")
            || affix("continuing_subword_prefix")
            || !own(before, frame[0])
            || !own(after, frame[1])
            || has_other_frame(processor)
    }
}

/// Whether a token stands for a byte, such as `<0x0A>`.
fn is_byte(text: &str) -> bool {
    let digits = text.strip_prefix("<0x").and_then(|rest| rest.strip_suffix('>'));
    digits.is_some_and(|digits| digits.len() == 2 && digits.bytes().all(|digit| digit.is_ascii_hexdigit()))
}

/// Whether a token that the file calls ordinary is a special token, by the rules of llama.cpp's converter.
fn looks_special(text: &str) -> bool {
    let enclosed = |start: &str, end: &str| text.starts_with(start) && text.ends_with(end);
    matches!(text, "<pad>" | "<mask>" | "<2mass>" | "[@BOS@]")
        || enclosed("<|", "|>")
        || enclosed("<\u{ff5c}", "\u{ff5c}>")
        || enclosed("<unused", ">")
}

/// The small files that name the special tokens.
struct Files {
    tokenizer: Map<String, Value>,
    map: Map<String, Value>,
    generation: Map<String, Value>,
    model: Map<String, Value>,
}

impl Files {
    /// The ids below `rows` under this name, first those for generation.
    fn numbers(&self, name: &str, rows: usize) -> Vec<usize> {
        let values = [&self.generation, &self.model].into_iter().filter_map(|file| file.get(name));
        let all = values.flat_map(|value| match value {
            Value::Array(list) => list.as_slice(),
            one => std::slice::from_ref(one),
        });
        let ids = all.filter_map(|id| id.as_u64().and_then(|id| usize::try_from(id).ok()));
        ids.filter(|id| *id < rows).collect()
    }

    /// Writes the special tokens, and which of them are added to a prompt.
    fn special_tokens(
        &self,
        ids: &HashMap<String, usize>,
        description: &Map<String, Value>,
        rows: usize,
        metadata: &mut Metadata,
    ) {
        let content = |name: &str| {
            let value = [&self.tokenizer, &self.map].into_iter().find_map(|file| file.get(name));
            value.and_then(|value| value.get("content").unwrap_or(value).as_str())
        };
        let numbers = |name: &str| self.numbers(name, rows);
        let names = [
            ("bos", "bos"),
            ("eos", "eos"),
            ("unk", "unknown"),
            ("pad", "padding"),
            ("sep", "seperator"),
            ("mask", "mask"),
        ];
        let mut found = HashMap::new();
        for (theirs, ours) in names {
            let named = content(&format!("{theirs}_token")).and_then(|content| ids.get(content).copied());
            if let Some(id) = named.or_else(|| numbers(&format!("{theirs}_token_id")).first().copied()) {
                metadata.set(format!("tokenizer.ggml.{ours}_token_id"), id as u32);
                found.insert(theirs, id);
            }
        }
        let is_subwords = metadata.get("tokenizer.ggml.model").and_then(|name| name.as_str());
        if is_subwords.is_some_and(|name| ["bert", "t5"].contains(&name)) {
            // The tokens around a text are called by the tasks of the first models.
            for (theirs, own, key) in [("cls", "bos", "bos"), ("sep", "eos", "eos")] {
                let named = content(&format!("{theirs}_token")).and_then(|content| ids.get(content).copied());
                if let (None, Some(id)) = (found.get(own), named) {
                    metadata.set(format!("tokenizer.ggml.{key}_token_id"), id as u32);
                    found.insert(own, id);
                }
            }
            if let Some(types) = self.model.get("type_vocab_size").and_then(Value::as_u64) {
                metadata.set("tokenizer.ggml.token_type_count", types as u32);
            }
        }
        // GGUF has keys for two end-of-sequence tokens.
        let (bos, eos) = (found.get("bos").copied(), found.get("eos").copied());
        if let Some(other) = numbers("eos_token_id").into_iter().find(|id| eos.is_some_and(|eos| eos != *id)) {
            metadata.set("tokenizer.ggml.eot_token_id", other as u32);
        }
        let (before, after) = frame_of(description.get("post_processor"), ids);
        let adds = |key: &str, token: Option<usize>, added: Option<usize>| {
            let switch = self.tokenizer.get(key).and_then(Value::as_bool);
            token.is_some() && switch.unwrap_or(added == token)
        };
        metadata.set("tokenizer.ggml.add_bos_token", adds("add_bos_token", bos, before));
        metadata.set("tokenizer.ggml.add_eos_token", adds("add_eos_token", eos, after));
    }
}

/// The special tokens that a post-processor puts before and after the text.
fn frame_of(processor: Option<&Value>, ids: &HashMap<String, usize>) -> (Option<usize>, Option<usize>) {
    let Some(processor) = processor else { return (None, None) };
    match processor.get("type").and_then(Value::as_str) {
        Some("Sequence") => {
            let steps = processor.get("processors").and_then(Value::as_array).into_iter().flatten();
            let frames = steps.map(|step| match step.get("type").and_then(Value::as_str) {
                // One level deep, as the library writes it. A file could nest without limit.
                Some("Sequence") => (None, None),
                _ => frame_of(Some(step), ids),
            });
            frames.fold((None, None), |all, one| (all.0.or(one.0), all.1.or(one.1)))
        }
        Some("TemplateProcessing") => {
            let parts = processor.get("single").and_then(Value::as_array);
            let special = |part: Option<&Value>| {
                let name = part?.pointer("/SpecialToken/id")?.as_str()?;
                ids.get(name).copied()
            };
            (special(parts.and_then(|parts| parts.first())), special(parts.and_then(|parts| parts.last())))
        }
        _ => (None, None),
    }
}

/// Whether a post-processor adds tokens in a way that [`frame_of`] does not find.
fn has_other_frame(processor: Option<&Value>) -> bool {
    let Some(processor) = processor else { return false };
    match processor.get("type").and_then(Value::as_str) {
        None | Some("ByteLevel") => false,
        Some("Sequence") => {
            let steps = processor.get("processors").and_then(Value::as_array).into_iter().flatten();
            steps.into_iter().any(|step| step.get("processors").is_some() || has_other_frame(Some(step)))
        }
        Some("TemplateProcessing") => {
            let parts = processor.get("single").and_then(Value::as_array).map_or(&[][..], Vec::as_slice);
            let is_text = |part: &Value| part.get("Sequence").is_some();
            let at = parts.iter().position(is_text);
            at.is_none_or(|at| at > 1 || parts.len() > at + 2 || parts[at + 1..].iter().any(is_text))
        }
        Some(_) => true,
    }
}

/// Writes the chat templates, from all places where a folder may have them. A file of its own takes precedence.
fn templates(folder: &Path, config: &Map<String, Value>, metadata: &mut Metadata) -> Result<()> {
    let path = folder.join("chat_template.jinja");
    let mut found: Vec<(String, String)> = Vec::new();
    match std::fs::read_to_string(&path) {
        Ok(template) => found.push(("default".to_owned(), template)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
        Err(source) => return Err(Error::io(path, source)),
    }
    let older = optional(folder, "chat_template.json")?;
    for value in [config.get("chat_template"), older.get("chat_template")].into_iter().flatten() {
        match value {
            Value::String(template) => found.push(("default".to_owned(), template.clone())),
            Value::Array(list) => found.extend(list.iter().filter_map(|entry| {
                let (name, template) = (entry.get("name")?.as_str()?, entry.get("template")?.as_str()?);
                Some((name.to_owned(), template.to_owned()))
            })),
            _ => {}
        }
    }
    let mut names = StringArray::new();
    for (name, template) in found {
        // Keys contain no other characters.
        let name: String = name.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '_' }).collect();
        let key = match name.as_str() {
            "default" => "tokenizer.chat_template".to_owned(),
            _ => format!("tokenizer.chat_template.{name}"),
        };
        if !metadata.contains(&key) {
            if name != "default" {
                names.push(&name);
            }
            metadata.set(key, template);
        }
    }
    if !names.is_empty() {
        metadata.set("tokenizer.chat_templates", names);
    }
    Ok(())
}
