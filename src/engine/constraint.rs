//! Texts that follow a JSON Schema, a regular expression or a grammar: which tokens may come next.
//!
//! The parser is [llguidance](https://github.com/guidance-ai/llguidance): an Earley parser over a lexer of derivatives of
//! regular expressions, which walks a trie of the vocabulary.

use std::fmt;
use std::sync::Arc;

use llguidance::api::TopLevelGrammar;
use llguidance::toktrie::{ApproximateTokEnv, SimpleVob, TokEnv, TokRxInfo, TokTrie};
use llguidance::{Matcher, ParserFactory};
use serde_json::{Value, json};

use super::sampler::{Sampled, Sampler};
use crate::error::{Error, Result};

/// Tokens of more bytes, which the trie has no room for, never fit a grammar.
const LONGEST_TOKEN: usize = 512;

/// What a text has to follow.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Grammar {
    /// A JSON text that a [JSON Schema](https://json-schema.org/), itself written as JSON, describes.
    JsonSchema(String),
    /// A text that a regular expression matches from its beginning to its end.
    Regex(String),
    /// A text of a context-free grammar in llguidance's variant of Lark's syntax.
    Lark(String),
}

impl Grammar {
    /// The option by which callers know it.
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
                let object = schema.as_object_mut().ok_or("a JSON text that is no object")?;
                // One way to write each value: where spaces are free, a model that has lost its way writes nothing else.
                let form = json!({ "whitespace_flexible": false, "item_separator": ", ", "key_separator": ": " });
                object.entry("x-guidance").or_insert(form);
                // What is closed cannot be merged with other parts of the same object.
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

/// Objects whose properties are listed get no others, unless the schema says something about others: callers look for
/// what they listed, and models that may go on do.
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

/// A vocabulary, as grammars look at it. Made once for a model; making it takes about as long as loading a vocabulary.
pub struct Vocabulary(ParserFactory);

impl Vocabulary {
    /// Args: the bytes of each token by its id, none for those that are no text, and the ids that end a text.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] when no id, or an unknown one, ends a text.
    pub fn new(mut tokens: Vec<Vec<u8>>, ends: &[u32]) -> Result<Vocabulary> {
        tokens.iter_mut().filter(|token| token.len() > LONGEST_TOKEN).for_each(Vec::clear);
        let size = u32::try_from(tokens.len()).ok().filter(|size| *size < 1 << 24);
        let size = size.ok_or_else(|| Error::argument("tokens", tokens.len(), "at most 16,777,215"))?;
        if let Some(end) = ends.iter().find(|end| **end >= size) {
            return Err(Error::argument("ends", end, format_args!("ids below {size}")));
        }
        let end = *ends.first().ok_or_else(|| Error::argument("ends", "none", "a token that ends a text"))?;
        let trie = TokTrie::from(&TokRxInfo::new(size, end), &tokens).with_eos_tokens(ends);
        let environment: TokEnv = Arc::new(ApproximateTokEnv::new(trie));
        let mut factory = ParserFactory::new_simple(&environment).map_err(|error| unusable("tokens", &error))?;
        factory.quiet().limits_mut().verbose_errors = false;
        Ok(Vocabulary(factory))
    }

    /// A text of `grammar`, of which nothing is written yet.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] with what is wrong with the grammar, or that it is too large.
    pub fn constraint(&self, grammar: &Grammar) -> Result<Constraint> {
        let name = grammar.name();
        let parsed = grammar.parsed().map_err(|reason| Error::argument(name, reason, "a JSON Schema"))?;
        let matcher = Matcher::new(self.0.create_parser(parsed));
        let ends = self.0.tok_env().tok_trie().eos_token_set();
        let mut constraint = Constraint { name, matcher, ends };
        // Whatever is wrong shows now or when the first token is looked for.
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
    // The parser's reports go on with its state; the first line says what is wrong.
    let reason = error.to_string();
    Error::argument(name, reason.lines().next().unwrap_or_default(), "one that can be followed")
}

/// A text in the making, and what may follow.
#[derive(Clone)]
pub struct Constraint {
    name: &'static str,
    matcher: Matcher,
    ends: SimpleVob,
}

impl Constraint {
    /// The tokens that may come next. Once nothing more can come, those that end a text.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] when finding out takes the parser beyond its limits.
    pub fn allowed(&mut self) -> Result<Allowed> {
        let set = if self.matcher.stop_reason().is_ok() && self.matcher.is_stopped() {
            self.ends.clone()
        } else {
            self.matcher.compute_mask().map_err(|error| unusable(self.name, &error))?
        };
        Ok(Allowed(set))
    }

    /// Takes the token that was chosen among those [`allowed`](Constraint::allowed).
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for one that was not.
    pub fn accept(&mut self, token: u32) -> Result<()> {
        if self.matcher.is_stopped() && self.ends.is_allowed(token) {
            return Ok(());
        }
        self.matcher.consume_token(token).map_err(|error| unusable(self.name, &error))
    }

    /// Up to `most` tokens that may come next, as a guess: those that spell what leaves no choice, and of what `look_up` gives
    /// after them the ones that fit.
    pub(super) fn guess(&self, most: usize, look_up: impl FnOnce(&[u32]) -> Vec<u32>) -> Vec<u32> {
        if self.matcher.is_stopped() {
            return Vec::new();
        }
        // Looking ahead leaves traces in a parser; in a copy they cannot reach the text.
        let mut ahead = self.matcher.clone();
        let mut bytes = ahead.compute_ff_bytes();
        bytes.truncate(most * LONGEST_TOKEN);
        // What the model would choose to spell it with is often the same as the longest tokens.
        let mut guesses = ahead.tok_env().map_or(Vec::new(), |known| known.tok_trie().greedy_tokenize(&bytes));
        guesses.truncate(most);
        guesses.truncate(ahead.try_consume_tokens(&guesses).unwrap_or(0));
        if guesses.len() < most && !ahead.is_stopped() {
            let mut more = look_up(&guesses);
            more.truncate(most - guesses.len());
            more.truncate(ahead.validate_tokens(&more).unwrap_or(0));
            guesses.append(&mut more);
        }
        guesses
    }

    /// Whether the text may end here.
    pub fn may_end(&mut self) -> bool {
        self.matcher.is_stopped() || self.matcher.is_accepting().unwrap_or(false)
    }
}

impl fmt::Debug for Constraint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Constraint by a {}", self.name)
    }
}

/// A constraint, and what it allows next once that was looked up.
#[derive(Debug)]
pub(super) struct Held {
    constraint: Constraint,
    allowed: Option<Result<Allowed>>,
}

impl Held {
    pub(super) fn new(constraint: Constraint) -> Held {
        Held { constraint, allowed: None }
    }

    /// See [`Constraint::guess`].
    pub(super) fn guess(&self, most: usize, look_up: impl FnOnce(&[u32]) -> Vec<u32>) -> Vec<u32> {
        self.constraint.guess(most, look_up)
    }

    /// Chooses among the tokens allowed, and takes the choice.
    pub(super) fn sample(&mut self, sampler: &mut Sampler, logits: &mut [f32]) -> Result<Sampled> {
        let allowed = self.allowed.take().unwrap_or_else(|| self.constraint.allowed())?;
        let sampled = sampler.sample_among(logits, Some(&allowed))?;
        self.constraint.accept(sampled.token)?;
        Ok(sampled)
    }
}

/// Runs `compute`, and beside it, in a thread of its own, looks up what each constraint allows.
pub(super) fn beside<T>(held: Vec<&mut Held>, compute: impl FnOnce() -> T) -> T {
    if held.is_empty() {
        return compute();
    }
    let look = |held: &mut Held| {
        // There already, if the step before was interrupted.
        held.allowed.get_or_insert_with(|| held.constraint.allowed());
    };
    std::thread::scope(|scope| {
        scope.spawn(|| held.into_iter().for_each(look));
        compute()
    })
}

/// A set of tokens.
#[derive(Clone)]
pub struct Allowed(SimpleVob);

impl Allowed {
    /// Makes the logits of all other tokens minus infinity. Of a model with more logits than tokens the rest are others too.
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

    /// Whether `token` is in it.
    pub fn contains(&self, token: u32) -> bool {
        (token as usize) < self.0.len() && self.0.is_allowed(token)
    }
}

impl fmt::Debug for Allowed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} tokens", self.0.num_set())
    }
}
