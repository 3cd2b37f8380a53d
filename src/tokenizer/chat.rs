//! Chat templates, rendered as the Python package renders them.
//!
//! A template is a Jinja program from an untrusted file. It has no access to anything but its variables, and its steps and its
//! output are limited.

mod environment;
mod json;
mod methods;
mod python;
mod turns;

use minijinja::value::{Value, ValueKind};

use self::environment::{environment, one_line, refusal, without_generation_tags};
use self::turns::{Turn, cut_after_end, mark_end, turn};
use super::Tokenizer;
use crate::error::{Error, Place, Result};
use crate::system::panics;

/// Characters of source. Real templates have 30,000.
const MAX_SOURCE: usize = 1 << 17;

/// A turn of a conversation.
#[derive(Debug, Clone)]
pub struct Message(Value);

impl Message {
    /// What `role` says: "system", "user", "assistant" or another role that the template knows.
    pub fn new(role: &str, content: &str) -> Message {
        Message(Value::from_iter([("role", content_of(role)), ("content", content_of(content))]))
    }

    /// A message of the user.
    pub fn user(content: &str) -> Message {
        Message::new("user", content)
    }

    /// An answer of the model.
    pub fn assistant(content: &str) -> Message {
        Message::new("assistant", content)
    }

    /// Instructions for the model.
    pub fn system(content: &str) -> Message {
        Message::new("system", content)
    }

    /// A message as a JSON object, for example with `tool_calls`.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] when the text is not a JSON object.
    pub fn from_json(text: &str) -> Result<Message> {
        let value = parse("message", text)?;
        match value.kind() {
            ValueKind::Map => Ok(Message(value)),
            other => Err(Error::argument("message", format_args!("JSON of type {other}"), "a JSON object")),
        }
    }
}

fn content_of(text: &str) -> Value {
    Value::from(text)
}

fn parse(name: &'static str, text: &str) -> Result<Value> {
    serde_json::from_str(text).map_err(|error| Error::argument(name, format_args!("invalid JSON ({error})"), "JSON"))
}

/// How a conversation becomes a prompt.
#[derive(Debug, Clone, Default)]
pub struct ChatOptions {
    template: Option<String>,
    without_generation_prompt: bool,
    continued_field: Option<String>,
    variables: Vec<(String, Value)>,
}

impl ChatOptions {
    /// Chooses one of [`Tokenizer::chat_template_names`]. Default: "tool_use" if there are tools and such a template, otherwise
    /// "default".
    pub fn with_template(mut self, name: &str) -> ChatOptions {
        self.template = Some(name.to_owned());
        self
    }

    /// Whether the prompt ends with the beginning of the model's answer. Default: true.
    pub fn with_generation_prompt(mut self, add: bool) -> ChatOptions {
        self.without_generation_prompt = !add;
        self
    }

    /// Ends the prompt within the last message, after this field of it ("content" or "reasoning_content"), so that the model
    /// continues it. Such a prompt does not end with the beginning of another answer.
    pub fn with_continued_message(mut self, field: &str) -> ChatOptions {
        self.continued_field = Some(field.to_owned());
        self.with_generation_prompt(false)
    }

    /// Sets a variable of the template to a JSON value: `tools` to a list of functions that the model may call, `documents`, or
    /// a switch such as `enable_thinking`.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] when the text is not JSON.
    pub fn with_variable(mut self, name: &str, json: &str) -> Result<ChatOptions> {
        self.variables.push((name.to_owned(), parse("variable", json)?));
        Ok(self)
    }
}

impl Tokenizer {
    /// Writes a conversation as a prompt, by the model's chat template.
    ///
    /// Models that were trained on text alone have none. This program answers a prompt, or continues it, as `nybble run` does:
    ///
    /// ```no_run
    /// use nybble::{ChatOptions, LoadOptions, Message, Model, SamplingOptions, Sequence, step};
    ///
    /// let model = Model::load("model.gguf", &LoadOptions::default())?;
    /// let tokenizer = model.tokenizer()?;
    /// let (mut prompt, options) = ("Why is the sky blue?".to_owned(), ChatOptions::default());
    /// if tokenizer.chat_template(None).is_some() {
    ///     prompt = tokenizer.apply_chat_template(&[Message::user(&prompt)], &options)?;
    /// }
    /// let prompt = tokenizer.encode_prompt(&prompt)?;
    /// let mut text = tokenizer.decoder_after(&prompt);
    /// let mut sequence = Sequence::new(&model, &prompt, SamplingOptions::greedy())?;
    /// while !sequence.has_ended() && sequence.len() < model.context() {
    ///     print!("{}", text.push(step(&model, &mut [&mut sequence], &|| false)?[0].token)?);
    /// }
    /// # Ok::<(), nybble::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] when there is no such template, it refuses the messages, or the last message cannot be
    /// continued; [`Error::Malformed`] when the template is invalid, fails, or exceeds its limits.
    pub fn apply_chat_template(&self, messages: &[Message], options: &ChatOptions) -> Result<String> {
        let description = self.description();
        let tools = options.variables.iter().rfind(|(name, _)| name == "tools");
        let has_tools = tools.is_some_and(|(_, tools)| tools.is_true());
        let default =
            if has_tools && description.chat_templates.contains_key("tool_use") { "tool_use" } else { "default" };
        let name = options.template.as_deref().unwrap_or(default);
        let source = description.chat_template(name)?;
        let malformed = |found: String| {
            let place = Place::Part(format!("chat template '{name}'"));
            Error::malformed(&description.path, place, found, "a Jinja template that renders these messages")
        };
        if source.len() > MAX_SOURCE {
            return Err(malformed(format!("{} bytes of source", source.len())));
        }
        let mut turns: Vec<Turn> = messages.iter().map(|message| turn(&message.0)).collect();
        let continued = match &options.continued_field {
            Some(field) => Some((mark_end(&mut turns, field, source)?, field)),
            None => None,
        };
        let known = description.special_texts.iter().map(|(name, text)| (name.clone(), Value::from(text.as_str())));
        let fixed = [
            ("tools", Value::from(())),
            ("documents", Value::from(())),
            ("add_generation_prompt", Value::from(!options.without_generation_prompt)),
            ("messages", turns.into_iter().map(Value::from_iter).collect::<Value>()),
        ];
        let fixed = fixed.into_iter().map(|(name, value)| (name.to_owned(), value));
        let variables: Value = fixed.chain(known).chain(options.variables.iter().cloned()).collect();
        let source = without_generation_tags(source);
        let mut environment = environment();
        environment.add_template(name, &source).map_err(|error| malformed(one_line(&error)))?;
        let template = environment.get_template(name).map_err(|error| malformed(one_line(&error)))?;
        // The library panics where a template reverses an empty list, for example.
        let rendered = panics::catch(|| template.render(variables)).map_err(malformed)?;
        let prompt = rendered.map_err(|error| match refusal(&error) {
            Some(reason) => {
                Error::argument("messages", reason, format_args!("messages that chat template {name:?} accepts"))
            }
            None => malformed(one_line(&error)),
        })?;
        let Some((text, field)) = continued else { return Ok(prompt) };
        cut_after_end(&prompt, &text).ok_or_else(|| {
            let expected = format_args!("a field of the last message that chat template {name:?} writes");
            Error::argument("continued message", format_args!("{field:?}"), expected)
        })
    }
}
