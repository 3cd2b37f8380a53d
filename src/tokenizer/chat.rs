//! Chat templates, rendered as the Python package renders them.
//!
//! A template is a Jinja program from an untrusted file. It has no access to anything but its variables, and its steps and its
//! output are limited.

use std::fmt::Write;

use chrono::{Local, NaiveDateTime};
use minijinja::value::{Kwargs, Value, ValueKind};
use minijinja::{Environment, ErrorKind, Output, State};

use super::Tokenizer;
use crate::error::{Error, Place, Result};

/// Steps of one rendering. Real templates need about 100 per message.
const MAX_STEPS: u64 = 10_000_000;
/// Characters of source. Real templates have 30,000.
const MAX_SOURCE: usize = 1 << 17;
/// Characters of a pattern of `strftime_now`.
const MAX_PATTERN: usize = 100;

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
    /// [`Error::InvalidArgument`] when there is no such template, or it refuses the messages; [`Error::Malformed`] when the
    /// template is invalid, fails, or exceeds its limits.
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
        let known = description.special_texts.iter().map(|(name, text)| (name.clone(), Value::from(text.as_str())));
        let fixed = [
            ("tools", Value::from(())),
            ("documents", Value::from(())),
            ("add_generation_prompt", Value::from(!options.without_generation_prompt)),
            ("messages", messages.iter().map(|message| message.0.clone()).collect::<Value>()),
        ];
        let fixed = fixed.into_iter().map(|(name, value)| (name.to_owned(), value));
        let variables: Value = fixed.chain(known).chain(options.variables.iter().cloned()).collect();
        let source = without_generation_tags(source);
        let mut environment = environment();
        environment.add_template(name, &source).map_err(|error| malformed(one_line(&error)))?;
        let template = environment.get_template(name).map_err(|error| malformed(one_line(&error)))?;
        template.render(variables).map_err(|error| match refusal(&error) {
            Some(reason) => {
                Error::argument("messages", reason, format_args!("messages that chat template {name:?} accepts"))
            }
            None => malformed(one_line(&error)),
        })
    }
}

/// The reason for which a template refuses its messages.
fn refusal(error: &minijinja::Error) -> Option<String> {
    error.detail()?.strip_prefix(REFUSED).map(str::to_owned)
}

const REFUSED: &str = "refused: ";

fn one_line(error: &minijinja::Error) -> String {
    let line = error.line().map(|line| format!("line {line}: ")).unwrap_or_default();
    let text = format!("{line}{error}");
    text.split_whitespace().collect::<Vec<_>>().join(" ").chars().take(300).collect()
}

/// `{% generation %}` marks the model's answers for training. It has no effect on prompts.
fn without_generation_tags(source: &str) -> String {
    let (mut out, mut rest) = (String::with_capacity(source.len()), source);
    while let Some(start) = rest.find("{%") {
        let Some(end) = rest[start..].find("%}").map(|end| start + end) else { break };
        let inner = &rest[start + 2..end];
        let replaced = match inner.trim_matches(|c: char| c == '-' || c == '+' || c.is_whitespace()) {
            "generation" => inner.replace("generation", "if true"),
            "endgeneration" => inner.replace("endgeneration", "endif"),
            _ => inner.to_owned(),
        };
        out.push_str(&rest[..start + 2]);
        out.push_str(&replaced);
        out.push_str("%}");
        rest = &rest[end + 2..];
    }
    out + rest
}

/// The environment of templates, with the functions that Hugging Face's `transformers` provides.
fn environment<'s>() -> Environment<'s> {
    let mut environment = Environment::new();
    environment.set_trim_blocks(true);
    environment.set_lstrip_blocks(true);
    environment.set_fuel(Some(MAX_STEPS));
    environment.set_formatter(format);
    environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
    environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    environment.add_filter("tojson", to_json);
    environment.add_filter("string", |value: Value| python_text(&value));
    environment.add_function("raise_exception", |message: Value| -> std::result::Result<(), minijinja::Error> {
        Err(minijinja::Error::new(ErrorKind::InvalidOperation, format!("{REFUSED}{}", python_text(&message))))
    });
    environment.add_function("strftime_now", strftime_now);
    environment
}

fn format(out: &mut Output<'_>, _: &State<'_, '_>, value: &Value) -> std::result::Result<(), minijinja::Error> {
    out.write_str(&python_text(value)).map_err(minijinja::Error::from)
}

/// A value as Python prints it.
fn python_text(value: &Value) -> String {
    match value.as_str() {
        Some(text) => text.to_owned(),
        None if value.is_undefined() => String::new(),
        None => python_repr(value),
    }
}

fn python_repr(value: &Value) -> String {
    let all = |value: &Value| value.try_iter().into_iter().flatten().collect::<Vec<_>>();
    match value.kind() {
        ValueKind::None => "None".to_owned(),
        ValueKind::Bool => if value.is_true() { "True" } else { "False" }.to_owned(),
        ValueKind::String => {
            let text = value.as_str().unwrap_or_default();
            let quote = if text.contains('\'') && !text.contains('"') { '"' } else { '\'' };
            let mut quoted = String::from(quote);
            for c in text.chars() {
                match c {
                    '\\' => quoted.push_str("\\\\"),
                    '\n' => quoted.push_str("\\n"),
                    '\r' => quoted.push_str("\\r"),
                    '\t' => quoted.push_str("\\t"),
                    c if c == quote => quoted.extend(['\\', c]),
                    c => quoted.push(c),
                }
            }
            quoted.push(quote);
            quoted
        }
        ValueKind::Seq | ValueKind::Iterable => {
            format!("[{}]", all(value).iter().map(python_repr).collect::<Vec<_>>().join(", "))
        }
        ValueKind::Map => {
            let entry = |key: &Value| {
                let value = value.get_item(key).unwrap_or_default();
                format!("{}: {}", python_repr(key), python_repr(&value))
            };
            format!("{{{}}}", all(value).iter().map(entry).collect::<Vec<_>>().join(", "))
        }
        _ => value.to_string(),
    }
}

/// JSON as Python's `json.dumps` writes it, without escapes for HTML.
fn to_json(value: Value, options: Kwargs) -> std::result::Result<String, minijinja::Error> {
    let indent: Option<usize> = options.get("indent")?;
    let ascii: Option<bool> = options.get("ensure_ascii")?;
    let sorted: Option<bool> = options.get("sort_keys")?;
    let separators: Option<Vec<String>> = options.get("separators")?;
    options.assert_all_used()?;
    if indent.is_some_and(|indent| indent > 16) {
        return Err(minijinja::Error::new(ErrorKind::InvalidOperation, "tojson: indent: expected at most 16"));
    }
    let (item, key) = match separators.as_deref() {
        Some([item, key]) => (item.clone(), key.clone()),
        _ => (if indent.is_some() { "," } else { ", " }.to_owned(), ": ".to_owned()),
    };
    let style = Style { indent, item, key, ascii: ascii == Some(true), sorted: sorted == Some(true) };
    let mut out = String::new();
    style.write(&mut out, &value, 0)?;
    Ok(out)
}

struct Style {
    indent: Option<usize>,
    item: String,
    key: String,
    ascii: bool,
    sorted: bool,
}

impl Style {
    fn write(&self, out: &mut String, value: &Value, level: usize) -> std::result::Result<(), minijinja::Error> {
        match value.kind() {
            ValueKind::Seq | ValueKind::Iterable => {
                let items: Vec<Value> = value.try_iter()?.collect();
                self.list(out, '[', ']', level, &items, |out, item| self.write(out, item, level + 1))
            }
            ValueKind::Map => {
                let mut keys: Vec<Value> = value.try_iter()?.collect();
                if self.sorted {
                    keys.sort();
                }
                self.list(out, '{', '}', level, &keys, |out, key| {
                    self.string(out, &python_text(key));
                    out.push_str(&self.key);
                    self.write(out, &value.get_item(key)?, level + 1)
                })
            }
            ValueKind::String => {
                self.string(out, value.as_str().unwrap_or_default());
                Ok(())
            }
            ValueKind::None => {
                out.push_str("null");
                Ok(())
            }
            ValueKind::Bool => {
                out.push_str(if value.is_true() { "true" } else { "false" });
                Ok(())
            }
            ValueKind::Number => {
                out.push_str(&value.to_string());
                Ok(())
            }
            other => {
                let message = format!("tojson: a value of type {other} is not JSON");
                Err(minijinja::Error::new(ErrorKind::InvalidOperation, message))
            }
        }
    }

    fn list(
        &self,
        out: &mut String,
        open: char,
        close: char,
        level: usize,
        items: &[Value],
        write: impl Fn(&mut String, &Value) -> std::result::Result<(), minijinja::Error>,
    ) -> std::result::Result<(), minijinja::Error> {
        out.push(open);
        let new_line = |out: &mut String, level: usize| {
            if let Some(indent) = self.indent.filter(|_| !items.is_empty()) {
                out.push('\n');
                out.extend(std::iter::repeat_n(' ', indent * level));
            }
        };
        for (i, item) in items.iter().enumerate() {
            if i > 0 {
                out.push_str(&self.item);
            }
            new_line(out, level + 1);
            write(out, item)?;
        }
        new_line(out, level);
        out.push(close);
        Ok(())
    }

    fn string(&self, out: &mut String, text: &str) {
        out.push('"');
        for c in text.chars() {
            match c {
                '"' => out.push_str("\\\""),
                '\\' => out.push_str("\\\\"),
                '\n' => out.push_str("\\n"),
                '\r' => out.push_str("\\r"),
                '\t' => out.push_str("\\t"),
                '\u{8}' => out.push_str("\\b"),
                '\u{c}' => out.push_str("\\f"),
                c if u32::from(c) < 0x20 || self.ascii && !c.is_ascii() => {
                    let mut units = [0; 2];
                    c.encode_utf16(&mut units).iter().for_each(|unit| out.push_str(&format!("\\u{unit:04x}")));
                }
                c => out.push(c),
            }
        }
        out.push('"');
    }
}

/// The local time in a pattern of `strftime`.
fn strftime_now(pattern: &str) -> std::result::Result<String, minijinja::Error> {
    date(Local::now().naive_local(), pattern)
}

fn date(time: NaiveDateTime, pattern: &str) -> std::result::Result<String, minijinja::Error> {
    let refused = |why: &str| minijinja::Error::new(ErrorKind::InvalidOperation, format!("strftime_now: {why}"));
    if pattern.chars().count() > MAX_PATTERN || pattern.contains(|c: char| c.is_ascii_digit()) {
        return Err(refused("the pattern is too long or contains a width"));
    }
    let mut out = String::new();
    // Fails for what chrono does not know, and for the time zone, which a local time does not have.
    match write!(out, "{}", time.format(pattern)) {
        Ok(()) => Ok(out),
        Err(_) => Err(refused(&format!("the pattern {pattern:?} is not supported"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Five and three quarter hours east of Greenwich.
    const ZONE: &str = "XXX-05:45";

    fn at(seconds: i64) -> NaiveDateTime {
        chrono::DateTime::from_timestamp(seconds, 0).unwrap().naive_utc()
    }

    #[test]
    fn dates_are_written_in_the_patterns_of_templates() {
        assert_eq!(date(at(0), "%A %d %B %Y %H:%M:%S").unwrap(), "Thursday 01 January 1970 00:00:00");
        assert_eq!(date(at(951_782_399), "%a %-d %b %y, %I:%M %p").unwrap(), "Mon 28 Feb 00, 11:59 PM");
        assert_eq!(date(at(951_782_400), "%Y-%m-%d%%").unwrap(), "2000-02-29%");
        for refused in ["%Q", "%Z", "%100000Y", &"%Y".repeat(51)] {
            assert!(date(at(0), refused).is_err(), "{refused}");
        }
    }

    #[test]
    fn templates_see_the_local_time() {
        // A process cannot change its time zone safely while other threads run, so the test starts itself in this one.
        if std::env::var("TZ").as_deref() != Ok(ZONE) {
            let test = "tokenizer::chat::tests::templates_see_the_local_time";
            let mut command = std::process::Command::new(std::env::current_exe().unwrap());
            let done = command.args([test, "--exact"]).env("TZ", ZONE).output().unwrap();
            let printed = String::from_utf8_lossy(&done.stdout);
            assert!(done.status.success() && printed.contains("1 passed"), "{printed}");
            return;
        }
        let east = chrono::TimeDelta::minutes(5 * 60 + 45);
        let minute = || date(chrono::Utc::now().naive_utc() + east, "%d %H:%M").unwrap();
        let before = minute();
        let shown = strftime_now("%d %H:%M").unwrap();
        assert!([before, minute()].contains(&shown), "{shown}");
    }
}
