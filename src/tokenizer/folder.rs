//! Tokenizers of Hugging Face folders: `tokenizer.json` and the small files next to it.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::path::Path;
use std::sync::OnceLock;

use serde_json::{Map, Value};

use super::description::{Build, Description, MAX_TOKEN_LENGTH, PairFrame, Tokens, reserve};
use super::token_bytes::Spelling;
use super::{ends, files, older};
use crate::error::{Error, Place, Result};
use crate::format::gguf::{Metadata, StringArray};

/// Characters that a normalizer may make of one. Common normalizers replace one character by another.
const MAX_GROWTH: usize = 1024;

/// Reads the tokenizer of the folder at `path`. `build` gets the content of `tokenizer.json`.
///
/// # Errors
/// [`Error::Missing`] when there is no `tokenizer.json`; [`Error::Malformed`] when a file is damaged or needs something that
/// nybble does not support; [`Error::Io`].
pub(super) fn describe(path: &Path, build: &mut Build<'_>) -> Result<Description> {
    let file = path.join("tokenizer.json");
    let written = match files::text(&file)? {
        None => older::byte_level(path)?,
        text => text,
    };
    let Some(text) = written else {
        return Err(Error::Missing { path: file, place: Place::File, expected: "a tokenizer".to_owned() });
    };
    let mut model_config = files::object(&path.join("config.json"))?;
    model_config.extend(files::object(&path.join("generation_config.json"))?);
    let tokenizer_config = files::object(&path.join("tokenizer_config.json"))?;
    let mut named = files::object(&path.join("special_tokens_map.json"))?;
    named.extend(tokenizer_config.clone());
    let neighbors = Neighbors {
        special_texts: special_spellings(&named),
        chat_templates: chat_templates(path, &tokenizer_config)?,
        tokenizer_config,
        model_config,
    };
    let source = Source { path: &file, key: None };
    let described = parse(&source, &text, neighbors, build)?;
    Ok(Description { path: path.to_path_buf(), ..described })
}

/// The tokenizer of a folder that has only a vocabulary of SentencePiece, under GGUF's keys. `None` for other folders.
///
/// # Errors
/// As for [`describe`].
pub(super) fn pieces(path: &Path) -> Result<Option<Metadata>> {
    if path.join("tokenizer.json").exists() {
        return Ok(None);
    }
    let Some(mut pieces) = older::sentencepiece(path)? else { return Ok(None) };
    let config = files::object(&path.join("tokenizer_config.json"))?;
    for (name, template) in chat_templates(path, &config)? {
        let key = match name.as_str() {
            "default" => "tokenizer.chat_template".to_owned(),
            _ => format!("tokenizer.chat_template.{name}"),
        };
        pieces.set(key, template);
    }
    pieces.set("tokenizer.ggml.eos_token_ids", configured_ends(path)?);
    Ok(Some(pieces))
}

/// Reads the tokenizer whose `tokenizer.json` is the value of `key` of the file at `path`.
///
/// # Errors
/// As for [`describe`].
pub(super) fn describe_json(
    text: &[u8],
    path: &Path,
    key: &str,
    neighbors: Neighbors,
    build: &mut Build<'_>,
) -> Result<Description> {
    let text = files::utf8(text.to_vec(), path, Place::Key(key.to_owned()))?;
    parse(&Source { path, key: Some(key) }, &text, neighbors, build)
}

/// The tokens that end a generation, sorted, as the files of a folder without `tokenizer.json` say.
///
/// # Errors
/// [`Error::Malformed`] and [`Error::Io`] for the files.
pub(super) fn configured_ends(path: &Path) -> Result<Vec<u32>> {
    let mut config = files::object(&path.join("config.json"))?;
    config.extend(files::object(&path.join("generation_config.json"))?);
    let mut ends = ids(config.get("eos_token_id"));
    ends.sort_unstable();
    ends.dedup();
    Ok(ends)
}

/// Where the content of a `tokenizer.json` is.
struct Source<'a> {
    path: &'a Path,
    key: Option<&'a str>,
}

impl Source<'_> {
    fn place(&self) -> Place {
        self.key.map_or(Place::File, |key| Place::Key(key.to_owned()))
    }

    /// The error for a part of the file.
    fn part(&self, part: &str, found: impl std::fmt::Display, expected: impl std::fmt::Display) -> Error {
        let part = self.key.map_or(part.to_owned(), |key| format!("key '{key}': {part}"));
        Error::malformed(self.path, Place::Part(part), found, expected)
    }

    fn invalid(&self, reason: impl std::fmt::Display) -> Error {
        let expected = "the format of the tokenizers library";
        Error::malformed(self.path, self.place(), format_args!("an invalid tokenizer ({reason})"), expected)
    }
}

/// What the other files of a folder say.
#[derive(Default)]
pub(super) struct Neighbors {
    pub(super) special_texts: BTreeMap<String, String>,
    pub(super) chat_templates: BTreeMap<String, String>,
    pub(super) tokenizer_config: Map<String, Value>,
    /// `config.json`, and `generation_config.json` over it.
    pub(super) model_config: Map<String, Value>,
}

fn parse(source: &Source<'_>, text: &str, neighbors: Neighbors, build: &mut Build<'_>) -> Result<Description> {
    let file = files::parse(text, source.path, source.place())?;
    check_lengths(source, &file)?;
    build(text).map_err(|reason| source.invalid(reason))?;
    let vocabulary = Vocabulary::read(source, &file)?;
    let (spelling, adds_space) = decoding(source, file.get("decoder"))?;
    let Neighbors { special_texts, chat_templates, tokenizer_config, model_config } = neighbors;
    // Files of a model with a larger vocabulary may be left next to those of another one.
    let is_known = |id: &u32| (*id as usize) < vocabulary.size;
    let mut warnings = Vec::new();
    let mut configured = |name: &str| {
        let key = format!("{name}_token_id");
        let (known, unknown): (Vec<u32>, Vec<u32>) = ids(model_config.get(&key)).into_iter().partition(is_known);
        for id in unknown {
            warnings.push(format!("ignoring {id} in {key}: expected token ids below {}", vocabulary.size));
        }
        known
    };
    let (configured_bos, configured_eos) = (configured("bos"), configured("eos"));
    let token = |name: &str, configured: &[u32]| {
        let spelled = special_texts.get(&format!("{name}_token")).and_then(|text| vocabulary.id_of(text));
        spelled.or(configured.first().copied())
    };
    let (bos, eos) = (token("bos", &configured_bos), token("eos", &configured_eos));
    let (mut prefix, mut suffix) = frame(file.get("post_processor"));
    if let Some(id) = prefix.iter().chain(&suffix).find(|id| **id as usize >= vocabulary.size) {
        let found = format_args!("the token {id}");
        return Err(source.part("post_processor", found, format_args!("an id below {}", vocabulary.size)));
    }
    let switch = |key: &str| tokenizer_config.get(key).and_then(Value::as_bool);
    if let (Some(add), Some(bos)) = (switch("add_bos_token"), bos) {
        prefix.retain(|id| *id != bos);
        prefix.splice(0..0, add.then_some(bos));
    }
    if let (Some(add), Some(eos)) = (switch("add_eos_token"), eos) {
        suffix.retain(|id| *id != eos);
        suffix.extend(add.then_some(eos));
    }
    let pair = pair_frame(file.get("post_processor"), &prefix, &suffix);
    let framed = [&pair.before, &pair.middle, &pair.after].into_iter().flatten();
    if let Some(id) = framed.into_iter().find(|id| **id as usize >= vocabulary.size) {
        let found = format_args!("the token {id}");
        return Err(source.part("post_processor", found, format_args!("an id below {}", vocabulary.size)));
    }
    let mut ends = ends::by_spelling(|text| vocabulary.added.get(text).map(|added| added.0));
    ends.extend(configured_eos);
    ends.extend(eos);
    ends.sort_unstable();
    ends.dedup();
    let mut tokens = vocabulary.tokens(spelling)?;
    if spelling == Spelling::Words {
        // Files of these vocabularies name their special tokens next to the vocabulary.
        let named = special_texts.values().filter_map(|text| vocabulary.id_of(text));
        let all: BTreeSet<u32> = tokens.special.iter().copied().chain(named).collect();
        tokens.literal.extend(&all);
        tokens.special = all.into_iter().collect();
    }
    Ok(Description {
        path: source.path.to_path_buf(),
        sentencepiece: None,
        tokens,
        adds_space,
        prefix,
        suffix,
        pair,
        bos,
        eos,
        ends,
        special_texts,
        chat_templates,
        warnings,
    })
}

/// Refuses long tokens, which the library would process for minutes, and normalizers that expand text too much.
fn check_lengths(source: &Source<'_>, file: &Map<String, Value>) -> Result<()> {
    let added = file.get("added_tokens").and_then(Value::as_array).into_iter().flatten();
    let added = added.filter_map(|token| token.get("content")?.as_str());
    let vocabulary = file.get("model").and_then(|model| model.get("vocab")).and_then(Value::as_object);
    let all = added.chain(vocabulary.into_iter().flatten().map(|(text, _)| text.as_str()));
    let long = all.filter(|text| text.len() > MAX_TOKEN_LENGTH).map(|text| text.chars().count()).max();
    if let Some(longest) = long.filter(|longest| *longest > MAX_TOKEN_LENGTH) {
        let found = format_args!("a token of {longest} characters");
        let expected = format_args!("at most {MAX_TOKEN_LENGTH}");
        return Err(Error::malformed(source.path, source.place(), found, expected));
    }
    let (mut growth, mut waiting) = (1usize, vec![file.get("normalizer")]);
    while let Some(step) = waiting.pop() {
        let Some(step) = step else { continue };
        waiting.extend(step.get("normalizers").and_then(Value::as_array).into_iter().flatten().map(Some));
        for written in ["prepend", "content"].iter().filter_map(|key| step.get(key)?.as_str()) {
            growth = growth.saturating_mul(written.chars().count().max(1));
        }
    }
    if growth > MAX_GROWTH {
        let found = format_args!("steps that make {growth} characters of one");
        return Err(source.part("normalizer", found, format_args!("at most {MAX_GROWTH}")));
    }
    Ok(())
}

/// The tokens of a `tokenizer.json`.
struct Vocabulary<'a> {
    /// Tokens of the model, by spelling.
    model: HashMap<&'a str, u32>,
    /// Added tokens by spelling: the id, and whether it is special.
    added: HashMap<&'a str, (u32, bool)>,
    /// The number of tokens.
    size: usize,
}

impl<'a> Vocabulary<'a> {
    /// Reads the tokens, and checks that ids are consecutive and unique.
    ///
    /// The library accepts any ids in the vocabulary, and numbers added tokens itself, without regard to the file.
    fn read(source: &Source<'_>, file: &'a Map<String, Value>) -> Result<Vocabulary<'a>> {
        let vocabulary = file.get("model").and_then(|model| model.get("vocab"));
        let is_list = vocabulary.is_some_and(Value::is_array);
        let mut tokens: Vec<(&str, u32)> = match vocabulary {
            Some(Value::Object(tokens)) => {
                let id = |id: &Value| id.as_u64().and_then(|id| u32::try_from(id).ok());
                let tokens = tokens.iter().map(|(text, number)| {
                    let invalid = || source.invalid(format_args!("the id {number} of the token {}", shown(text)));
                    Ok((text.as_str(), id(number).ok_or_else(invalid)?))
                });
                tokens.collect::<Result<_>>()?
            }
            // Pairs of spelling and score.
            Some(Value::Array(pairs)) => {
                let text = |pair: &'a Value| pair.get(0).and_then(Value::as_str);
                let tokens = (0..).zip(pairs).map(|(id, pair)| {
                    let invalid = || source.invalid(format_args!("entry {id} of the vocabulary"));
                    Ok((text(pair).ok_or_else(invalid)?, id))
                });
                tokens.collect::<Result<_>>()?
            }
            _ => return Err(source.invalid("without a vocabulary")),
        };
        reserve(tokens.len(), tokens.iter().map(|(text, _)| text.len()).sum())?;
        tokens.sort_by_key(|(_, id)| *id);
        let model: HashMap<&str, u32> = tokens.iter().copied().collect();
        let mut vocabulary = Vocabulary { size: tokens.len(), model, added: HashMap::new() };
        let mut faults = Vec::new();
        for token in file.get("added_tokens").and_then(Value::as_array).into_iter().flatten() {
            let content = token.get("content").and_then(Value::as_str);
            let content = content.ok_or_else(|| source.invalid("an added token without content"))?;
            let special = token.get("special").and_then(Value::as_bool).unwrap_or(false);
            let found = token.get("id").unwrap_or(&Value::Null);
            let expected = vocabulary.id_of(content).or_else(|| {
                let is_text = !content.is_empty();
                vocabulary.size += usize::from(is_text);
                is_text.then(|| vocabulary.size as u32 - 1)
            });
            if let Some(id) = expected {
                vocabulary.added.insert(content, (id, special));
            }
            if found.as_u64() != expected.map(u64::from) {
                faults.push((content, found, expected));
            }
        }
        if !is_list {
            if let Some([first, second]) = tokens.windows(2).find(|pair| pair[0].1 == pair[1].1) {
                let found = format!("the id {} of {}", first.1, shown(first.0));
                return Err(source.part(&format!("token {}", shown(second.0)), found, "its own"));
            }
            if let Some((text, id)) = tokens.iter().find(|(_, id)| *id as usize >= vocabulary.size) {
                let expected = format_args!("one below {}", vocabulary.size);
                return Err(source.part(&format!("token {}", shown(text)), format_args!("the id {id}"), expected));
            }
        }
        if let Some((content, found, expected)) = faults.first() {
            let expected = expected.map_or("none".to_owned(), |id| id.to_string());
            let found = format_args!("the id {found}");
            return Err(source.part(&format!("added token {}", shown(content)), found, expected));
        }
        Ok(vocabulary)
    }

    fn id_of(&self, text: &str) -> Option<u32> {
        self.added.get(text).map(|added| added.0).or_else(|| self.model.get(text).copied())
    }

    /// The spellings by id.
    fn tokens(&self, spelling: Spelling) -> Result<Tokens> {
        let mut texts: Vec<Option<&str>> = vec![None; self.size];
        let added = self.added.iter().map(|(text, (id, _))| (text, id));
        for (text, id) in self.model.iter().chain(added) {
            if let Some(slot) = texts.get_mut(*id as usize) {
                *slot = Some(text);
            }
        }
        let missing = (0..).zip(&texts).filter(|(_, text)| text.is_none()).map(|(id, _)| id).collect();
        let mut special: Vec<u32> = self.added.values().filter(|added| added.1).map(|added| added.0).collect();
        special.sort_unstable();
        let literal: HashSet<u32> = self.added.values().map(|added| added.0).collect();
        let texts = texts.iter().map(|text| text.unwrap_or_default()).collect::<StringArray>();
        Ok(Tokens { texts, missing, spelling, special, literal, ids: OnceLock::new() })
    }
}

/// The start of a token, in quotes.
fn shown(text: &str) -> String {
    super::keys::quoted(text.as_bytes(), 60)
}

/// How tokens are spelled, and whether decoding removes a space at the start of a text.
fn decoding(source: &Source<'_>, decoder: Option<&Value>) -> Result<(Spelling, bool)> {
    let kind = |step: &Value| step.get("type").and_then(Value::as_str).unwrap_or_default().to_owned();
    let steps: Vec<&Value> = match decoder {
        Some(decoder) if kind(decoder) == "Sequence" => {
            let steps = decoder.get("decoders").and_then(Value::as_array).into_iter().flatten();
            steps.filter(|step| step.is_object() && kind(step) != "Sequence").collect()
        }
        decoder => decoder.filter(|decoder| decoder.is_object()).into_iter().collect(),
    };
    let kinds: Vec<String> = steps.iter().map(|step| kind(step)).collect();
    let of_kind = |name: &str| kinds.iter().position(|kind| kind == name).map(|at| steps[at]);
    if of_kind("ByteLevel").is_some() {
        return Ok((Spelling::ByteLevel, false));
    }
    if let Some(step) = of_kind("Metaspace") {
        let old = step.get("add_prefix_space").and_then(Value::as_bool).unwrap_or(true);
        let scheme = step.get("prepend_scheme").and_then(Value::as_str);
        return Ok((Spelling::Pieces, scheme.map_or(old, |scheme| scheme != "never")));
    }
    if of_kind("WordPiece").is_some() {
        return Ok((Spelling::Words, true));
    }
    let known = ["Replace", "ByteFallback", "Fuse", "Strip"];
    if kinds.iter().all(|kind| known.contains(&kind.as_str())) && of_kind("Replace").is_some() {
        let strips = |step: &&Value| kind(step) == "Strip" && step.get("start").and_then(Value::as_u64) > Some(0);
        return Ok((Spelling::Pieces, steps.iter().any(strips)));
    }
    let found = if kinds.is_empty() { "none".to_owned() } else { kinds.join(", ") };
    let expected = "ByteLevel, Metaspace, WordPiece, or a sequence of Replace, ByteFallback, Fuse and Strip";
    Err(source.part("decoder", found, expected))
}

/// The spellings of special tokens by name.
fn special_spellings(config: &Map<String, Value>) -> BTreeMap<String, String> {
    let named = config.iter().filter(|(key, _)| key.ends_with("_token"));
    let spelled = named.filter_map(|(key, value)| {
        let content = if value.is_object() { value.get("content")? } else { value };
        Some((key.clone(), content.as_str()?.to_owned()))
    });
    spelled.collect()
}

/// The ids of a value that is an id or a list of ids.
fn ids(value: Option<&Value>) -> Vec<u32> {
    let values = match value {
        Some(Value::Array(values)) => values.as_slice(),
        other => other.map_or(&[][..], std::slice::from_ref),
    };
    values.iter().filter_map(|id| u32::try_from(id.as_u64()?).ok()).collect()
}

/// The ids that a post-processor puts before and after every text.
fn frame(processor: Option<&Value>) -> (Vec<u32>, Vec<u32>) {
    let Some(processor) = processor else { return Default::default() };
    if let Some(steps) = processor.get("processors").and_then(Value::as_array) {
        // A later step surrounds what the earlier ones made. The library reads files with up to 128 levels.
        return steps.iter().fold(Default::default(), |(before, after): (Vec<u32>, Vec<u32>), step| {
            let (outer_before, outer_after) = frame(Some(step));
            ([outer_before, before].concat(), [after, outer_after].concat())
        });
    }
    let token = |key: &str| -> Option<u32> { u32::try_from(processor.get(key)?.get(1)?.as_u64()?).ok() };
    if let (Some(start), Some(end)) = (token("cls"), token("sep")) {
        return (vec![start], vec![end]);
    }
    let parts = processor.get("single").and_then(Value::as_array).map_or(&[][..], Vec::as_slice);
    let is_text = |part: &&Value| part.get("Sequence").is_some();
    // With the text twice or never, there is no frame.
    if parts.iter().filter(is_text).count() != 1 {
        return Default::default();
    }
    let special = |part: &Value| special_ids(processor, part);
    let at = parts.iter().position(|part| is_text(&part)).unwrap_or_default();
    (parts[..at].iter().flat_map(special).collect(), parts[at + 1..].iter().flat_map(special).collect())
}

/// The ids that a post-processor puts around two strings. Where it does not say it, those around one text.
fn pair_frame(processor: Option<&Value>, prefix: &[u32], suffix: &[u32]) -> PairFrame {
    let single = || PairFrame { before: prefix.to_vec(), after: suffix.to_vec(), ..PairFrame::default() };
    let Some(processor) = processor else { return single() };
    let kind = |step: &Value| step.get("type").and_then(Value::as_str).unwrap_or_default().to_owned();
    let steps = processor.get("processors").and_then(Value::as_array);
    let steps: Vec<&Value> = steps.map_or_else(|| vec![processor], |steps| steps.iter().collect());
    let known = ["TemplateProcessing", "BertProcessing", "RobertaProcessing"];
    let Some(step) = steps.into_iter().find(|step| known.contains(&kind(step).as_str())) else { return single() };
    let token = |key: &str| -> Vec<u32> {
        step.get(key).and_then(|pair| ids(pair.get(1)).first().copied()).into_iter().collect()
    };
    match kind(step).as_str() {
        "BertProcessing" => {
            PairFrame { before: token("cls"), middle: token("sep"), after: token("sep"), has_types: true }
        }
        "RobertaProcessing" => {
            let middle = [token("sep"), token("sep")].concat();
            PairFrame { before: token("cls"), middle, after: token("sep"), has_types: false }
        }
        _ => {
            let parts = step.get("pair").and_then(Value::as_array).map_or(&[][..], Vec::as_slice);
            let text = |name: &str| {
                parts.iter().position(|part| part.pointer("/Sequence/id").and_then(Value::as_str) == Some(name))
            };
            let (Some(first), Some(second)) = (text("A"), text("B")) else { return single() };
            if first > second {
                return single();
            }
            let of = |parts: &[Value]| parts.iter().flat_map(|part| special_ids(step, part)).collect();
            let has_types = parts[second].pointer("/Sequence/type_id").and_then(Value::as_u64).unwrap_or(0) > 0;
            PairFrame {
                before: of(&parts[..first]),
                middle: of(&parts[first + 1..second]),
                after: of(&parts[second + 1..]),
                has_types,
            }
        }
    }
}

/// The ids of a special token in a template.
fn special_ids(processor: &Value, part: &Value) -> Vec<u32> {
    let name = part.pointer("/SpecialToken/id").and_then(Value::as_str).unwrap_or_default();
    ids(processor.get("special_tokens").and_then(|tokens| tokens.get(name)).and_then(|token| token.get("ids")))
}

/// The templates by name, from all files that may hold them. Template files take precedence.
fn chat_templates(folder: &Path, config: &Map<String, Value>) -> Result<BTreeMap<String, String>> {
    let mut found = BTreeMap::new();
    let older = files::object(&folder.join("chat_template.json"))?;
    for value in [older.get("chat_template"), config.get("chat_template")].into_iter().flatten() {
        match value {
            Value::String(template) => {
                found.entry("default".to_owned()).or_insert_with(|| template.clone());
            }
            Value::Array(list) => {
                let named = list.iter().filter_map(|entry| {
                    Some((entry.get("name")?.as_str()?.to_owned(), entry.get("template")?.as_str()?.to_owned()))
                });
                named.for_each(|(name, template)| {
                    found.entry(name).or_insert(template);
                });
            }
            _ => {}
        }
    }
    let additional = std::fs::read_dir(folder.join("additional_chat_templates"));
    for entry in additional.into_iter().flatten().flatten() {
        let path = entry.path();
        if path.extension().is_some_and(|extension| extension == "jinja")
            && let Some(name) = path.file_stem().and_then(|name| name.to_str())
        {
            found.insert(name.to_owned(), files::text(&path)?.unwrap_or_default());
        }
    }
    if let Some(template) = files::text(&folder.join("chat_template.jinja"))? {
        found.insert("default".to_owned(), template);
    }
    Ok(found)
}
