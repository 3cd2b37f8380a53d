//! Constraints on completions: a JSON Schema, a regular expression or a grammar decides which tokens may come next.
//!
//! The parser is [llguidance](https://github.com/guidance-ai/llguidance): an Earley parser over a lexer that uses
//! derivatives of regular expressions. It walks a trie of the vocabulary.

use std::fmt;
use std::sync::Arc;

use llguidance::api::TopLevelGrammar;
use llguidance::toktrie::{ApproximateTokEnv, SimpleVob, TokEnv, TokRxInfo, TokTrie};
use llguidance::{Matcher, ParserFactory};
use serde_json::{Value, json};

use crate::error::{Error, Result};
use crate::tokenizer::Tokenizer;
use crate::tokenizer::description::Description;

/// Longest token in bytes. The trie does not hold longer ones, so they never match a grammar.
const LONGEST_TOKEN: usize = 512;

/// A constraint in the form that callers write.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Grammar {
    /// JSON that validates against a [JSON Schema](https://json-schema.org/), given as JSON.
    JsonSchema(String),
    /// Output that a regular expression matches from its first to its last character.
    Regex(String),
    /// Output of a context-free grammar in llguidance's variant of Lark's syntax.
    Lark(String),
}

impl Grammar {
    /// The name of the option that sets it.
    fn name(&self) -> &'static str {
        match self {
            Grammar::JsonSchema(_) => "schema",
            Grammar::Regex(_) => "regex",
            Grammar::Lark(_) => "grammar",
        }
    }

    fn parsed(&self) -> std::result::Result<TopLevelGrammar, String> {
        Ok(match self {
            Grammar::JsonSchema(text) => {
                let mut schema: Value = serde_json::from_str(text).map_err(|error| error.to_string())?;
                let object = schema.as_object_mut().ok_or("JSON that is not an object")?;
                // Fixed whitespace: with free whitespace, a model can degenerate into writing only spaces.
                let layout = json!({ "whitespace_flexible": false, "item_separator": ", ", "key_separator": ": " });
                object.entry("x-guidance").or_insert(layout);
                // A closed object cannot be merged with other parts of the same object.
                if !text.contains("\"allOf\"") {
                    close(&mut schema);
                }
                TopLevelGrammar::from_json_schema(schema)
            }
            Grammar::Regex(text) => TopLevelGrammar::from_regex(text),
            Grammar::Lark(text) => TopLevelGrammar::from_lark(text.clone()),
        })
    }
}

/// Forbids properties that an object does not list, unless the schema says something about them. Callers expect only the
/// properties that they listed, but models add others if they may.
fn close(schema: &mut Value) {
    let Some(object) = schema.as_object_mut() else { return };
    for (key, value) in object.iter_mut() {
        match (key.as_str(), value) {
            ("properties" | "patternProperties" | "$defs" | "definitions", Value::Object(named)) => {
                named.values_mut().for_each(close);
            }
            ("anyOf" | "oneOf" | "prefixItems" | "items", Value::Array(several)) => several.iter_mut().for_each(close),
            ("items" | "additionalProperties", one) => close(one),
            _ => {}
        }
    }
    let mentions = |key: &str| object.contains_key(key);
    if mentions("properties") && !["additionalProperties", "patternProperties", "$ref"].into_iter().any(mentions) {
        object.insert("additionalProperties".to_owned(), Value::Bool(false));
    }
}

/// A vocabulary in the form that grammars need. Create it once per model: that takes about as long as loading a vocabulary.
pub struct Vocabulary(ParserFactory);

impl Vocabulary {
    /// `tokens` are the bytes of each token by id, empty for special tokens. `ends` are the ids that end a completion.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] when `ends` is empty or has an unknown id, or there are too many tokens.
    pub fn new(mut tokens: Vec<Vec<u8>>, ends: &[u32]) -> Result<Vocabulary> {
        tokens.iter_mut().filter(|token| token.len() > LONGEST_TOKEN).for_each(Vec::clear);
        let size = u32::try_from(tokens.len()).ok().filter(|size| *size < 1 << 24);
        let size = size.ok_or_else(|| Error::argument("tokens", tokens.len(), "at most 16,777,215"))?;
        if let Some(end) = ends.iter().find(|end| **end >= size) {
            return Err(Error::argument("ends", end, format_args!("ids below {size}")));
        }
        let end = *ends.first().ok_or_else(|| Error::argument("ends", "none", "a token that ends a completion"))?;
        let trie = TokTrie::from(&TokRxInfo::new(size, end), &tokens).with_eos_tokens(ends);
        let environment: TokEnv = Arc::new(ApproximateTokEnv::new(trie));
        let mut factory = ParserFactory::new_simple(&environment).map_err(|error| unusable("tokens", &error))?;
        factory.quiet().limits_mut().verbose_errors = false;
        Ok(Vocabulary(factory))
    }

    /// The vocabulary of a tokenizer.
    ///
    /// # Errors
    /// As for [`Vocabulary::new`]: the tokenizer has no token that ends a text.
    pub fn of(tokenizer: &Tokenizer) -> Result<Vocabulary> {
        Vocabulary::of_description(tokenizer.description())
    }

    pub(crate) fn of_description(description: &Description) -> Result<Vocabulary> {
        let ids = 0..u32::try_from(description.len()).unwrap_or(u32::MAX);
        Vocabulary::new(ids.map(|id| description.grammar_bytes(id)).collect(), &description.ends)
    }

    /// The constraint of an empty completion that has to follow `grammar`.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] when the grammar is invalid, not supported or too large; the message gives the reason.
    pub fn constraint(&self, grammar: &Grammar) -> Result<Constraint> {
        let name = grammar.name();
        let parsed = grammar.parsed().map_err(|reason| Error::argument(name, reason, "a JSON Schema"))?;
        let matcher = Matcher::new(self.0.create_parser(parsed));
        let ends = self.0.tok_env().tok_trie().eos_token_set();
        let mut constraint = Constraint { name, matcher, ends };
        // Errors of the grammar show here or when the first mask is computed.
        constraint.allowed()?;
        Ok(constraint)
    }
}

impl fmt::Debug for Vocabulary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Vocabulary of {} tokens", self.0.tok_env().tok_trie().vocab_size())
    }
}

fn unusable(name: &'static str, error: &impl fmt::Display) -> Error {
    let expected = match name {
        "schema" => "a JSON Schema that nybble supports",
        "regex" => "a regular expression that nybble supports",
        _ => "a grammar that nybble supports",
    };
    let reason = reason(name, &error.to_string());
    // The lines after the first draw the grammar with a caret below the place.
    let (found, drawing) = reason.split_once('\n').unwrap_or((&reason, ""));
    match (found, drawing) {
        ("NoExtension" | "NoExtensionBias", _) => Error::argument(name, "a form that no text has", expected),
        (_, "") => Error::argument(name, found, expected),
        _ => Error::argument(name, found, format_args!("{expected}:\n{drawing}")),
    }
}

/// The reason of a parser's error, without the state of the parser that may follow. An error in a regular expression takes
/// several lines, which draw the expression with a caret below the place; here it takes one.
fn reason(name: &str, error: &str) -> String {
    let Some((before, drawing)) = error.split_once("regex parse error:") else {
        let ends = ["\n<non-verbose/>", "\n<state>", "\n<backtrace>"];
        let end = ends.into_iter().filter_map(|end| error.find(end)).min().unwrap_or(error.len());
        return error[..end].trim_end().to_owned();
    };
    let problem = drawing.lines().find_map(|line| line.strip_prefix("error: ")).unwrap_or("not a regular expression");
    // Before it are the place in a grammar and the whole expression. A regular expression is a grammar of one line, too.
    let before = if name == "grammar" { before } else { "" };
    match marked(drawing) {
        Some(marked) => format!("{before}{problem} at {marked:?}"),
        None => format!("{before}{problem}"),
    }
}

/// The beginning of what a caret marks in the drawing of a regular expression.
fn marked(drawing: &str) -> Option<String> {
    const LONGEST: usize = 24;
    let is_marks = |line: &str| line.contains('^') && line.chars().all(|c| c == '^' || c == ' ');
    let lines: Vec<_> = drawing.lines().collect();
    let pair = lines.windows(2).find(|pair| is_marks(pair[1]))?;
    let marked: String = pair[0].chars().skip(pair[1].find('^')?).take(LONGEST).collect();
    (!marked.is_empty()).then_some(marked)
}

/// The state of a constraint after the tokens so far.
#[derive(Clone)]
pub struct Constraint {
    name: &'static str,
    matcher: Matcher,
    ends: SimpleVob,
}

impl Constraint {
    /// The tokens that may come next. Once the output is complete, the tokens that end a completion.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] when the parser exceeds its limits.
    #[doc(hidden)]
    pub fn allowed(&mut self) -> Result<Allowed> {
        let set = if self.matcher.stop_reason().is_ok() && self.matcher.is_stopped() {
            self.ends.clone()
        } else {
            self.matcher.compute_mask().map_err(|error| unusable(self.name, &error))?
        };
        Ok(Allowed(set))
    }

    /// Advances by a token, which must be one of those [`allowed`](Constraint::allowed).
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for any other token.
    pub fn accept(&mut self, token: u32) -> Result<()> {
        if self.matcher.is_stopped() && self.ends.is_allowed(token) {
            return Ok(());
        }
        self.matcher.consume_token(token).map_err(|error| unusable(self.name, &error))
    }

    /// Returns up to `count` draft tokens: first those that spell the only continuation allowed, then those of
    /// `lookup(draft so far)` that the constraint allows.
    pub(super) fn draft(&self, count: usize, lookup: impl FnOnce(&[u32]) -> Vec<u32>) -> Vec<u32> {
        if self.matcher.is_stopped() {
            return Vec::new();
        }
        // Looking ahead changes a parser, so a copy does it.
        let mut ahead = self.matcher.clone();
        let mut bytes = ahead.compute_ff_bytes();
        bytes.truncate(count * LONGEST_TOKEN);
        // Models mostly use the longest tokens.
        let mut draft = ahead.tok_env().map_or(Vec::new(), |env| env.tok_trie().greedy_tokenize(&bytes));
        draft.truncate(count);
        draft.truncate(ahead.try_consume_tokens(&draft).unwrap_or(0));
        if draft.len() < count && !ahead.is_stopped() {
            let mut more = lookup(&draft);
            more.truncate(count - draft.len());
            more.truncate(ahead.validate_tokens(&more).unwrap_or(0));
            draft.append(&mut more);
        }
        draft
    }

    /// Whether the output may end here.
    pub fn may_end(&mut self) -> bool {
        self.matcher.is_stopped() || self.matcher.is_accepting().unwrap_or(false)
    }
}

impl fmt::Debug for Constraint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Constraint by {}", self.name)
    }
}

/// A set of tokens.
#[derive(Clone)]
#[doc(hidden)]
pub struct Allowed(SimpleVob);

impl Allowed {
    /// Sets the logits of all other tokens to minus infinity, those beyond the vocabulary included.
    pub fn apply(&self, logits: &mut [f32]) {
        let known = self.0.len().min(logits.len());
        let (known, rest) = logits.split_at_mut(known);
        rest.fill(f32::NEG_INFINITY);
        for (logits, bits) in known.chunks_mut(32).zip(self.0.as_slice()) {
            if *bits != u32::MAX {
                let others = logits.iter_mut().enumerate().filter(|(bit, _)| bits >> bit & 1 == 0);
                others.for_each(|(_, logit)| *logit = f32::NEG_INFINITY);
            }
        }
    }

    /// Whether `token` is in the set.
    pub fn contains(&self, token: u32) -> bool {
        (token as usize) < self.0.len() && self.0.is_allowed(token)
    }
}

impl fmt::Debug for Allowed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} tokens", self.0.num_set())
    }
}
