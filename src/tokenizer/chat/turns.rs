//! Messages as `transformers` passes them to a chat template, and the last one where the model continues it.

use minijinja::value::Value;

use crate::error::{Error, Result};

/// A message as a template sees it, in the order of its keys.
pub(super) type Turn = Vec<(Value, Value)>;

/// The names under which templates and programs pass a message's reasoning. The first is the usual one.
const REASONING: [&str; 3] = ["reasoning_content", "thinking", "reasoning"];
/// Marks the place at which the model continues. Templates that trim content remove the space, which shows it.
const END: &str = "CONTINUE_FINAL_MESSAGE_TAG ";

/// The message without keys that are null, since many templates would write "None", and with all names of its reasoning.
pub(super) fn turn(message: &Value) -> Turn {
    let mut turn: Turn = entries(message).filter(|(_, value)| !value.is_none()).collect();
    if let Some(reasoning) = REASONING.iter().find_map(|name| field(&turn, name)) {
        let thinking = field(&turn, "thinking").unwrap_or_else(|| reasoning.clone());
        turn.retain(|(key, _)| key.as_str() != Some("thinking"));
        turn.insert(0, (Value::from("thinking"), thinking));
        set_field(&mut turn, "reasoning_content", reasoning);
    }
    turn
}

/// Keys and values of an object.
fn entries(object: &Value) -> impl Iterator<Item = (Value, Value)> {
    object.try_iter().into_iter().flatten().map(|key| (key.clone(), object.get_item(&key).unwrap_or_default()))
}

fn field(turn: &Turn, name: &str) -> Option<Value> {
    turn.iter().find(|(key, _)| key.as_str() == Some(name)).map(|(_, value)| value.clone())
}

fn set_field(turn: &mut Turn, name: &str, value: Value) {
    match turn.iter_mut().find(|(key, _)| key.as_str() == Some(name)) {
        Some((_, old)) => *old = value,
        None => turn.push((Value::from(name), value)),
    }
}

/// Marks the end of a field of the last message, for [`cut_after_end`]. Returns the text that the model continues.
pub(super) fn mark_end(turns: &mut [Turn], name: &str, source: &str) -> Result<String> {
    let refused = |found: &str| {
        let expected = format_args!("a last message with text in {name:?}, and a chat template that writes it");
        Error::argument("continued message", found, expected)
    };
    let last = turns.last_mut().ok_or_else(|| refused("no messages"))?;
    let value = field(last, name).ok_or_else(|| refused("no such field"))?;
    // Reasoning is there under several names. The template may read each of them.
    let mut fields = vec![name];
    if REASONING.contains(&name) {
        fields = REASONING.into_iter().filter(|other| field(last, other).as_ref() == Some(&value)).collect();
    }
    if !fields.iter().any(|name| source.contains(name)) {
        return Err(refused("a chat template that does not name it"));
    }
    if let Some(text) = value.as_str() {
        for name in fields {
            set_field(last, name, Value::from(format!("{text}{END}")));
        }
        return Ok(text.to_owned());
    }
    let mut parts: Vec<Value> = value.try_iter().into_iter().flatten().collect();
    let is_text = |part: &Value| part.get_attr("text").is_ok_and(|text| text.as_str().is_some());
    let part = parts.iter_mut().rfind(|part| is_text(part)).ok_or_else(|| refused("no text"))?;
    let text = part.get_attr("text").unwrap_or_default().to_string();
    let mut marked: Turn = entries(part).collect();
    set_field(&mut marked, "text", Value::from(format!("{text}{END}")));
    *part = Value::from_iter(marked);
    set_field(last, name, Value::from(parts));
    Ok(text)
}

/// The prompt up to the mark of [`mark_end`]. `None` if the template has not written the text or the mark.
pub(super) fn cut_after_end(prompt: &str, text: &str) -> Option<String> {
    let end = prompt.rfind(END.trim_end()).filter(|_| prompt.contains(text.trim()))?;
    let (before, after) = prompt.split_at(end);
    Some(if after.starts_with(END) { before } else { before.trim_end() }.to_owned())
}
