//! The vocabulary of a GGUF file: its `tokenizer.*` keys, checked once, before anything is built from them.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::Path;
use std::sync::OnceLock;

use super::description::{Build, Description, Limits, MAX_TOKEN_LENGTH, PairFrame, Tokens, reserve};
use super::ends;
use super::folder::{self, Neighbors};
use super::json::{AddedToken, Bpe, Frame, Subwords, Units};
use super::keys::{Keys, quoted};
use super::pre_tokenizers::{self, Found, Rule};
use super::sentencepiece::{Piece, SentencePiece, TokenKind};
use super::token_bytes::{Spelling, byte_of};
use crate::error::Result;
use crate::format::gguf::{Array, Metadata, StringArray, Value};

const UNKNOWN: u8 = 2;
const CONTROL: u8 = 3;
const USER_DEFINED: u8 = 4;
const BYTE: u8 = 6;

const TOKENS: &str = "tokenizer.ggml.tokens";
const MERGES: &str = "tokenizer.ggml.merges";
/// The key of a whole `tokenizer.json`.
const WHOLE: &str = "tokenizer.huggingface.json";
/// The key of all tokens that end a generation, in files of Ollama.
const EOS_IDS: &str = "tokenizer.ggml.eos_token_ids";

/// Names of the keys of tokens that end a generation, in addition to `eos`.
const ENDS: [&str; 5] = ["eot", "eom", "fim_pad", "fim_rep", "fim_sep"];

fn id_key(name: &str) -> String {
    format!("tokenizer.ggml.{name}_token_id")
}

/// Reads the tokenizer of the metadata of the file at `path`. `build` gets a `tokenizer.json`, except for SentencePiece.
///
/// # Errors
/// [`Error::Malformed`](crate::Error::Malformed) with the key that is missing, malformed, contradicts another one, or names an
/// unsupported kind of tokenizer; [`Error::OutOfMemory`](crate::Error::OutOfMemory).
pub(super) fn describe(metadata: &Metadata, path: &Path, build: &mut Build<'_>) -> Result<Description> {
    let keys = Keys::new(metadata, path);
    match (metadata.get(WHOLE).and_then(|value| value.as_bytes()), metadata.contains(TOKENS)) {
        (Some(text), true) => whole(&keys, text, build),
        (Some(text), false) => folder::describe_json(text, path, WHOLE, Neighbors::default(), build),
        (None, _) => match subwords(&keys)? {
            Some(text) => folder::describe_json(text.as_bytes(), path, TOKENS, neighbors(&keys)?, build),
            None => read(&keys, build),
        },
    }
}

/// Reads a tokenizer that is also there as a whole `tokenizer.json`, which says more than the other keys: how text is
/// normalized, for example. Start, end and chat templates come from the keys.
fn whole(keys: &Keys<'_>, text: &[u8], build: &mut Build<'_>) -> Result<Description> {
    let texts = tokens(keys)?;
    let mut described = folder::describe_json(text, keys.path, WHOLE, neighbors(keys)?, build)?;
    if described.len() > texts.len() {
        let expected = format_args!("at least {}, the tokens in {WHOLE}", described.len());
        return Err(keys.malformed(TOKENS, format_args!("{} tokens", texts.len()), expected));
    }
    described.warnings.append(&mut keys.warnings.take());
    Ok(described)
}

/// What the keys say besides the vocabulary: start, end and chat templates.
fn neighbors(keys: &Keys<'_>) -> Result<Neighbors> {
    let texts = tokens(keys)?;
    let spelled = |id: u32| texts.get(id as usize).map(|text| String::from_utf8_lossy(text).into_owned());
    let mut neighbors = Neighbors { chat_templates: chat_templates(keys)?, ..Neighbors::default() };
    let mut eos = None;
    for (name, theirs) in [("bos", "bos_token"), ("eos", "eos_token"), ("unknown", "unk_token")] {
        let id = keys.token_id(&id_key(name), texts.len(), None)?;
        if let Some(text) = id.and_then(spelled) {
            neighbors.special_texts.insert(theirs.to_owned(), text);
        }
        match name {
            "bos" => _ = id.map(|id| neighbors.model_config.insert("bos_token_id".to_owned(), id.into())),
            "eos" => eos = id,
            _ => {}
        }
    }
    let ends = named_ends(keys, texts.len(), eos)?;
    neighbors.model_config.insert("eos_token_id".to_owned(), ends.into());
    for name in ["add_bos_token", "add_eos_token"] {
        let key = format!("tokenizer.ggml.{name}");
        if keys.metadata.contains(&key) {
            neighbors.tokenizer_config.insert(name.to_owned(), keys.flag(&key, false)?.into());
        }
    }
    Ok(neighbors)
}

/// The content of a `tokenizer.json` for a vocabulary of words (`bert`) or of pieces with a likelihood (`t5`). `None` for
/// others.
fn subwords(keys: &Keys<'_>) -> Result<Option<String>> {
    let words = match keys.string("tokenizer.ggml.model")? {
        Some(b"bert") => true,
        Some(b"t5") => false,
        _ => return Ok(None),
    };
    let texts = tokens(keys)?;
    let count = texts.len();
    let kinds = kinds(keys, texts, false)?;
    reserve(count, texts.iter().map(<[u8]>::len).sum())?;
    let spelled: Vec<&str> = texts.iter().map(|text| str::from_utf8(text).unwrap_or_default()).collect();
    let by_spelling = |names: &[&str]| {
        let found = names.iter().find_map(|name| spelled.iter().position(|text| text == name));
        found.map(|id| id as u32)
    };
    let named = |names: &[&str], spellings: &[&str], default: Option<u32>| -> Result<Option<u32>> {
        for name in names {
            if let Some(id) = keys.token_id(&id_key(name), count, None)? {
                return Ok(Some(id));
            }
        }
        Ok(by_spelling(spellings).or(default.filter(|id| (*id as usize) < count)))
    };
    // The ids of the first models, which files may leave out.
    let default = |of_words: u32, of_pieces: u32| Some(if words { of_words } else { of_pieces });
    let bos = named(&["cls", "bos"], &["[CLS]", "<s>"], words.then_some(101))?;
    let eos = named(&["eos"], &["[SEP]", "</s>"], default(102, 1))?;
    let sep = named(&["seperator", "eos"], &["[SEP]", "</s>"], default(102, 1))?;
    let unknown = named(&["unknown"], &["[UNK]", "<unk>"], default(100, 2))?;
    keys.check_other_token_ids(count, &["cls", "bos", "eos", "seperator", "unknown"].map(id_key))?;
    let adds = |name: &str, default: bool| keys.flag(&format!("tokenizer.ggml.add_{name}_token"), default);
    let own = |adds: bool, id: Option<u32>| -> Vec<u32> { id.filter(|_| adds).into_iter().collect() };
    let (adds_bos, adds_eos) = (adds("bos", words)?, adds("eos", true)?);
    // The separator of words ends both strings of a pair; pieces have one more between them.
    let end = if words { sep } else { eos };
    let frame = Frame {
        before: own(adds_bos, bos),
        middle: [own(adds_eos, end), own(adds("sep", false)?, sep)].concat(),
        after: own(adds_eos, end),
        has_types: words,
    };
    let (vocabulary, contents) = match words {
        true => {
            // Files mark the beginning of a word, or as the library does its continuation.
            let marks_start = spelled.iter().zip(&kinds).any(|(text, kind)| *kind == 1 && text.starts_with(SPACE));
            let spelling = |text: &&str, kind: u8| match text.strip_prefix(SPACE) {
                _ if kind != 1 || !marks_start => (*text).to_owned(),
                Some(word) => word.to_owned(),
                None => format!("##{text}"),
            };
            let contents: Vec<String> = spelled.iter().zip(&kinds).map(|(text, kind)| spelling(text, *kind)).collect();
            let mut seen = HashSet::new();
            let all = (0..).zip(&contents).filter(|(_, text)| seen.insert(text.as_str()));
            let tokens = all.map(|(id, text)| (text.clone(), id)).collect();
            let unknown = unknown.and_then(|id| spelled.get(id as usize).copied()).unwrap_or("[UNK]");
            let lowercase = keys.flag("tokenizer.ggml.normalizer.lowercase", true)?;
            (Subwords::Words { tokens, unknown, lowercase }, contents)
        }
        false => {
            let scores = scores(keys, count)?;
            let contents: Vec<String> = spelled.iter().map(|text| (*text).to_owned()).collect();
            let pieces = contents.iter().cloned().zip(scores).collect();
            let expected = "the token of unknown characters";
            let unknown = unknown.ok_or_else(|| keys.malformed(&id_key("unknown"), "nothing", expected))? as usize;
            let charsmap = charsmap(keys)?;
            let prefix = keys.flag("tokenizer.ggml.add_space_prefix", true)?;
            let collapse = keys.flag("tokenizer.ggml.remove_extra_whitespaces", true)?;
            (Subwords::Pieces { pieces, unknown, charsmap, prefix, collapse }, contents)
        }
    };
    let mut seen = HashSet::new();
    let added = [(USER_DEFINED, false), (CONTROL, true), (UNKNOWN, true)]
        .into_iter()
        .flat_map(|(kind, special)| of_kinds(&kinds, [kind]).map(move |id| (id, special)));
    let added: Vec<AddedToken<'_>> = added
        .filter_map(|(id, special)| {
            let content = contents.get(id as usize).filter(|text| !text.is_empty())?;
            seen.insert(content).then_some(AddedToken { id, content, special, rstrip: false })
        })
        .collect();
    Ok(Some(vocabulary.write(&frame, added.into_iter())))
}

/// The character that begins words in vocabularies.
const SPACE: char = '\u{2581}';

/// The table by which SentencePiece normalizes text, as bytes.
fn charsmap<'a>(keys: &Keys<'a>) -> Result<Option<&'a [u8]>> {
    let key = "tokenizer.ggml.precompiled_charsmap";
    match keys.metadata.get(key) {
        None => Ok(None),
        Some(Value::Array(Array::U8(bytes))) if bytes.is_empty() => Ok(None),
        Some(Value::Array(Array::U8(bytes))) => Ok(Some(bytes)),
        Some(Value::Array(Array::I8(bytes))) => Ok(Some(bytemuck::cast_slice(bytes))),
        Some(other) => Err(keys.malformed(key, other.type_name(), "an array of bytes")),
    }
}

/// The tokens that end a generation by the keys of the file: `eos`, which ends a text, and others.
fn named_ends(keys: &Keys<'_>, count: usize, eos: Option<u32>) -> Result<Vec<u32>> {
    let mut ends: Vec<u32> = eos.into_iter().collect();
    for name in ENDS {
        ends.extend(keys.token_id(&id_key(name), count, None)?);
    }
    ends.extend(keys.token_ids(EOS_IDS, count)?);
    Ok(ends)
}

fn read(keys: &Keys<'_>, build: &mut Build<'_>) -> Result<Description> {
    let mut warnings = Vec::new();
    let model = Model::read(keys)?;
    let (is_sentencepiece, is_merged) = (model == Model::SentencePiece, matches!(model, Model::Merged { .. }));
    let texts = tokens(keys)?;
    let count = texts.len();
    let mut kinds = kinds(keys, texts, is_sentencepiece || is_merged)?;
    let rule = if model == Model::ByteLevel { Some(rule(keys, &mut warnings)?) } else { None };
    reserve(count, texts.iter().map(<[u8]>::len).sum())?;
    let mut ids: HashMap<&[u8], u32> = HashMap::with_capacity(count);
    for (id, text) in (0..).zip(texts.iter()) {
        ids.entry(text).or_insert(id);
    }

    let (bos, eos, unknown) = if is_sentencepiece { (Some(1), Some(2), Some(0)) } else { (None, None, None) };
    let bos = keys.token_id(&id_key("bos"), count, bos)?;
    let eos = keys.token_id(&id_key("eos"), count, eos)?;
    let mut named_ends = named_ends(keys, count, eos)?;
    let unknown = keys.token_id(&id_key("unknown"), count, unknown)?;
    let mut ends = ends::by_spelling(|text| ids.get(text.as_bytes()).copied());
    ends.append(&mut named_ends);
    let used: Vec<String> = ["bos", "eos", "unknown"].iter().chain(&ENDS).map(|name| id_key(name)).collect();
    keys.check_other_token_ids(count, &used)?;
    ends.sort_unstable();
    ends.dedup();
    // They are special tokens even if the file says otherwise: never part of a text, and recognized in prompts.
    for id in &ends {
        if let Some(kind) = kinds.get_mut(*id as usize).filter(|kind| **kind != UNKNOWN) {
            *kind = CONTROL;
        }
    }
    let adds_bos = keys.flag("tokenizer.ggml.add_bos_token", rule.map_or(is_sentencepiece, |rule| rule.add_bos))?;
    let adds_bos = adds_bos || model == Model::Merged { always_begins: true };
    let adds_eos = keys.flag("tokenizer.ggml.add_eos_token", false)?;
    for (name, adds, token) in [("bos", adds_bos, bos), ("eos", adds_eos, eos)] {
        let is_named = keys.metadata.contains(&id_key(name));
        if adds && token.is_none() && !is_named && keys.metadata.contains(&format!("tokenizer.ggml.add_{name}_token")) {
            let expected = format_args!("a token id, since add_{name}_token is true");
            return Err(keys.malformed(&id_key(name), "nothing", expected));
        }
    }
    let separator = keys.token_id(&id_key("seperator"), count, None)?;
    let own = |adds: bool, id: Option<u32>| -> Vec<u32> { id.filter(|_| adds).into_iter().collect() };
    let drops_space = drops_space_after(keys, texts, &kinds)?;
    let adds_space = is_sentencepiece && keys.flag("tokenizer.ggml.add_space_prefix", true)?;
    let sentencepiece = match is_sentencepiece {
        true => {
            let scores = scores(keys, count)?;
            let pieces = texts.iter().zip(scores).zip(&kinds).map(|((text, score), kind)| Piece {
                text: str::from_utf8(text).ok(),
                score,
                kind: TokenKind::from_id(i64::from(*kind)),
            });
            let pieces = SentencePiece::new(pieces).with_space_prefix(adds_space).with_unknown(unknown);
            Some(pieces.with_space_dropped_after(&drops_space))
        }
        false => {
            let vocabulary = Vocabulary { texts, kinds: &kinds, ids: &ids };
            let unknown = unknown.and_then(|id| str::from_utf8(texts.get(id as usize)?).ok());
            let units = rule.map_or(Units::Characters { unknown }, Units::Bytes);
            let json = vocabulary.json(keys, units, &drops_space, &mut warnings)?;
            build(&json).map_err(|reason| keys.malformed(TOKENS, reason, "tokens that the merges fit"))?;
            None
        }
    };
    warnings.append(&mut keys.warnings.take());
    let text = |id: u32| texts.get(id as usize).map(|text| String::from_utf8_lossy(text).into_owned());
    let named = [("bos_token", bos), ("eos_token", eos), ("unk_token", unknown)];
    let named = named.into_iter().filter_map(|(name, id)| Some((name.to_owned(), text(id?)?)));
    let mut special: Vec<u32> = of_kinds(&kinds, [CONTROL, UNKNOWN]).collect();
    special.sort_unstable();
    Ok(Description {
        path: keys.path.to_path_buf(),
        sentencepiece,
        tokens: Tokens {
            texts: texts.clone(),
            missing: HashSet::new(),
            spelling: if rule.is_some() { Spelling::ByteLevel } else { Spelling::Pieces },
            literal: special.iter().copied().chain(of_kinds(&kinds, [USER_DEFINED])).collect(),
            special,
            ids: OnceLock::new(),
        },
        adds_space,
        prefix: own(adds_bos, bos),
        suffix: own(adds_eos, eos),
        pair: PairFrame {
            before: own(adds_bos, bos),
            middle: [own(adds_eos, eos), own(keys.flag("tokenizer.ggml.add_sep_token", false)?, separator)].concat(),
            after: own(adds_eos, eos),
            has_types: false,
        },
        bos,
        eos,
        ends,
        special_texts: named.collect(),
        chat_templates: chat_templates(keys)?,
        warnings,
    })
}

/// The limits of a model with these metadata and `rows` rows: as [`describe`] finds them, but without building a tokenizer.
/// Empty for a file without a vocabulary.
///
/// # Errors
/// [`Error::Malformed`](crate::Error::Malformed) with the key.
pub(super) fn limits(metadata: &Metadata, path: &Path, rows: usize) -> Result<Limits> {
    let keys = Keys::new(metadata, path);
    if metadata.contains(WHOLE) {
        return describe(metadata, path, &mut |_| Ok(())).map(|description| Limits::of(&description, rows));
    }
    if !metadata.contains(TOKENS) {
        return Ok(Limits::default());
    }
    let texts = tokens(&keys)?;
    let mut spelled: HashMap<&[u8], u32> = HashMap::new();
    for (id, text) in (0..).zip(texts.iter()).filter(|(_, text)| ends::is_spelling(text)) {
        spelled.entry(text).or_insert(id);
    }
    let mut ids = ends::by_spelling(|text| spelled.get(text.as_bytes()).copied());
    let default = keys.metadata.get("tokenizer.ggml.model").and_then(|value| value.as_str()) == Some("llama");
    let eos = keys.token_id(&id_key("eos"), texts.len(), default.then_some(2))?;
    ids.extend(named_ends(&keys, texts.len(), eos)?);
    ids.sort_unstable();
    ids.dedup();
    let (tokens, rows) = (texts.len() as u32, rows as u32);
    Ok(Limits { ends: ids, missing: (tokens < rows).then_some(tokens..rows).into_iter().collect() })
}

/// The ids of all tokens of these kinds, one kind after the other.
fn of_kinds<const N: usize>(kinds: &[u8], wanted: [u8; N]) -> impl Iterator<Item = u32> {
    let all = move |kind| (0..).zip(kinds).filter(move |(_, other)| **other == kind).map(|(id, _)| id);
    wanted.into_iter().flat_map(all)
}

/// How a vocabulary splits text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Model {
    ByteLevel,
    SentencePiece,
    /// Merges of characters. `always_begins`: a text begins with the start token whatever the file says, as llama.cpp does.
    Merged {
        always_begins: bool,
    },
}

impl Model {
    fn read(keys: &Keys<'_>) -> Result<Model> {
        let key = "tokenizer.ggml.model";
        let pre = keys.string("tokenizer.ggml.pre")?.and_then(pre_tokenizers::merges_pieces);
        match keys.string(key)? {
            Some(b"gpt2") => Ok(pre.map_or(Model::ByteLevel, |always_begins| Model::Merged { always_begins })),
            Some(b"gemma4") => Ok(Model::Merged { always_begins: true }),
            Some(b"llama") => Ok(Model::SentencePiece),
            other => {
                let found = other.map_or("nothing".to_owned(), |name| quoted(name, 60));
                let known = "'gpt2' (byte-level BPE), 'gemma4' (BPE), 'llama' (SentencePiece), 'bert' (WordPiece) or 't5' \
                    (Unigram)";
                Err(keys.malformed(key, found, known))
            }
        }
    }
}

fn tokens<'a>(keys: &Keys<'a>) -> Result<&'a StringArray> {
    let expected = "an array of at least one token";
    let tokens = keys.strings(TOKENS)?.ok_or_else(|| keys.malformed(TOKENS, "nothing", expected))?;
    if tokens.is_empty() {
        return Err(keys.malformed(TOKENS, "an empty array", expected));
    }
    for text in tokens.iter().filter(|text| text.len() > MAX_TOKEN_LENGTH) {
        let characters = String::from_utf8_lossy(text).chars().count();
        if characters > MAX_TOKEN_LENGTH {
            let found = format_args!("a token of {characters} characters");
            return Err(keys.malformed(TOKENS, found, format_args!("at most {MAX_TOKEN_LENGTH}")));
        }
    }
    Ok(tokens)
}

fn kinds(keys: &Keys<'_>, texts: &StringArray, is_sentencepiece: bool) -> Result<Vec<u8>> {
    let key = "tokenizer.ggml.token_type";
    let default = |text: &[u8]| if is_sentencepiece && byte_of(text).is_some() { BYTE } else { 1 };
    let kinds = match keys.integers(key, texts.len())? {
        None => texts.iter().map(default).collect(),
        Some(numbers) => {
            let kind = |number: i128| {
                let kind = u8::try_from(number).ok().filter(|kind| *kind <= BYTE);
                kind.ok_or_else(|| keys.malformed(key, format_args!("the type {number}"), "types of 1 to 6"))
            };
            numbers.into_iter().map(kind).collect::<Result<Vec<u8>>>()?
        }
    };
    for (id, (text, kind)) in texts.iter().zip(&kinds).enumerate() {
        if *kind == BYTE && byte_of(text).is_none() || is_sentencepiece && is_broken_byte(text) {
            let found = format!("{} as byte token {id}", quoted(text, 40));
            return Err(keys.malformed(TOKENS, found, "'<0x00>' to '<0xFF>'"));
        }
    }
    Ok(kinds)
}

/// Whether a token looks like a byte token, but is none.
fn is_broken_byte(text: &[u8]) -> bool {
    let Some(inner) = text.strip_prefix(b"<0x").and_then(|rest| rest.strip_suffix(b">")) else { return false };
    let inner = String::from_utf8_lossy(inner);
    let starts_as_byte = byte_of(text.get(..6).unwrap_or_default()).is_some();
    inner.chars().count() <= 8 && !inner.contains('\n') && !starts_as_byte
}

fn scores(keys: &Keys<'_>, count: usize) -> Result<Vec<f32>> {
    let key = "tokenizer.ggml.scores";
    let expected = format_args!("{count} scores, one per token");
    let scores = keys.floats(key, count)?.ok_or_else(|| keys.malformed(key, "nothing", expected))?;
    match scores.iter().any(|score| score.is_nan()) {
        true => Err(keys.malformed(key, "NaN", "numbers")),
        false => Ok(scores),
    }
}

/// The merges, the first one with the highest priority.
fn merges<'a>(keys: &Keys<'a>) -> Result<Vec<(&'a [u8], &'a [u8])>> {
    let merges = keys.strings(MERGES)?.ok_or_else(|| keys.malformed(MERGES, "nothing", "an array of merges"))?;
    let pair = |merge: &'a [u8]| {
        let at = merge.iter().position(|byte| *byte == b' ')?;
        let (left, right) = (&merge[..at], &merge[at + 1..]);
        (!left.is_empty() && !right.is_empty() && !right.contains(&b' ')).then_some((left, right))
    };
    let expected = "two parts with one space between them";
    let pairs =
        merges.iter().map(|merge| pair(merge).ok_or_else(|| keys.malformed(MERGES, quoted(merge, 40), expected)));
    pairs.collect()
}

fn rule(keys: &Keys<'_>, warnings: &mut Vec<String>) -> Result<&'static Rule> {
    let key = "tokenizer.ggml.pre";
    let name = keys.string(key)?;
    let shown = name.map(|name| quoted(name, 60));
    match (pre_tokenizers::find(name), shown) {
        (Found::Rule(rule), _) => Ok(rule),
        (Found::NotByteLevel, shown) => {
            Err(keys.malformed(key, shown.unwrap_or_default(), "a byte-level pre-tokenizer"))
        }
        (Found::Default(rule), shown) => {
            let problem = match shown {
                None => "the file does not name its pre-tokenizer".to_owned(),
                Some(name) => format!("unknown pre-tokenizer {name}"),
            };
            let result = "using 'default', which may split words differently from the model's training";
            warnings.push(format!("{problem} ({key}): {result}"));
            Ok(rule)
        }
    }
}

/// Phi-3's special tokens, which drop the white space after them. Its files do not mark them as such.
fn drops_space_after(keys: &Keys<'_>, texts: &StringArray, kinds: &[u8]) -> Result<Vec<u32>> {
    let name = String::from_utf8_lossy(keys.string("general.name")?.unwrap_or_default()).to_lowercase();
    if !name.contains("phi-3") && !name.contains("phi3") {
        return Ok(Vec::new());
    }
    let kept: [&[u8]; 3] = [b"<unk>", b"<s>", b"<|endoftext|>"];
    let drops = |id: &u32| texts.get(*id as usize).is_some_and(|text| !kept.contains(&text));
    Ok(of_kinds(kinds, [USER_DEFINED, CONTROL, UNKNOWN]).filter(drops).collect())
}

fn chat_templates(keys: &Keys<'_>) -> Result<BTreeMap<String, String>> {
    let mut found = BTreeMap::new();
    for (key, _) in keys.metadata.iter() {
        let Some(name) = key.strip_prefix("tokenizer.chat_template") else { continue };
        let Some(name) = name.strip_prefix('.').or_else(|| name.is_empty().then_some("")) else { continue };
        if let Some(template) = keys.string(key)?.filter(|template| !template.is_empty()) {
            let name = if name.is_empty() { "default" } else { name };
            found.insert(name.to_owned(), String::from_utf8_lossy(template).into_owned());
        }
    }
    Ok(found)
}

/// A vocabulary with merges.
struct Vocabulary<'a> {
    texts: &'a StringArray,
    kinds: &'a [u8],
    /// The first id of each spelling.
    ids: &'a HashMap<&'a [u8], u32>,
}

impl<'a> Vocabulary<'a> {
    /// The id of a token that can occur in a text: one that is neither empty nor invalid UTF-8.
    fn encodable(&self, text: &[u8]) -> Option<(&'a str, u32)> {
        let (text, id) = self.ids.get_key_value(text)?;
        Some((str::from_utf8(text).ok().filter(|text| !text.is_empty())?, *id))
    }

    /// The content of a `tokenizer.json` that applies the merges to `units`.
    fn json(
        &self,
        keys: &Keys<'_>,
        units: Units<'_>,
        drops_space: &[u32],
        warnings: &mut Vec<String>,
    ) -> Result<String> {
        let all = merges(keys)?;
        let drops_space: HashSet<u32> = drops_space.iter().copied().collect();
        let mut joined = Vec::new();
        let known = |(left, right): &(&[u8], &[u8])| {
            joined.clear();
            joined.extend_from_slice(left);
            joined.extend_from_slice(right);
            self.encodable(&joined)?;
            Some((self.encodable(left)?.0, self.encodable(right)?.0))
        };
        // The library panics on merges of other parts.
        let merges: Vec<(&str, &str)> = all.iter().filter_map(known).collect();
        if merges.len() < all.len() {
            warnings.push(format!(
                "{MERGES}: {} of {} merges are ignored, since their parts or results are not tokens",
                all.len() - merges.len(),
                all.len()
            ));
        }
        let own = |id: u32| {
            let text = self.texts.get(id as usize)?;
            self.encodable(text).filter(|(_, first)| *first == id).map(|(text, _)| text)
        };
        let added =
            [(USER_DEFINED, false), (CONTROL, true), (UNKNOWN, true)].into_iter().flat_map(|(kind, special)| {
                of_kinds(self.kinds, [kind]).filter_map(move |id| Some((id, own(id)?, special)))
            });
        let added =
            added.map(|(id, content, special)| AddedToken { id, content, special, rstrip: drops_space.contains(&id) });
        let tokens = (0..self.texts.len() as u32).filter_map(|id| Some((own(id)?, id)));
        Ok(Bpe { units, merges: &merges }.write(tokens, added))
    }
}
