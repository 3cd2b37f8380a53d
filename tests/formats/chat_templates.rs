//! Chat templates render as in the Python package.

use nybble::Error;
use nybble::format::gguf::Metadata;
use nybble::tokenizer::{ChatOptions, Message, Tokenizer};

use crate::tokenizers::{golden, list, metadata};

/// A tokenizer with this chat template.
fn with_template(template: &str) -> Tokenizer {
    let mut file: Metadata = metadata(&golden()["files"][0]["metadata"]);
    file.set("tokenizer.chat_template", template);
    Tokenizer::from_metadata(&file, "model.gguf").unwrap()
}

#[test]
fn prompts_are_those_of_python() {
    for chat in list(&golden()["chats"]) {
        let tokenizer = with_template(chat["template"].as_str().unwrap());
        let messages: Vec<Message> =
            list(&chat["messages"]).iter().map(|json| Message::from_json(json.as_str().unwrap()).unwrap()).collect();
        let mut options = ChatOptions::default().with_generation_prompt(chat["prompt"].as_bool().unwrap());
        if let Some(field) = chat["continued"].as_str() {
            options = options.with_continued_message(field);
        }
        for (name, json) in chat["variables"].as_object().unwrap() {
            options = options.with_variable(name, json.as_str().unwrap()).unwrap();
        }
        let text = tokenizer.apply_chat_template(&messages, &options).unwrap();
        assert_eq!(text, chat["text"].as_str().unwrap(), "{}", chat["template"]);
    }
}

#[test]
fn a_template_is_chosen_by_name_and_by_tools() {
    let mut file = metadata(&golden()["files"][0]["metadata"]);
    file.set("tokenizer.chat_template", "plain").set("tokenizer.chat_template.tool_use", "tools");
    file.set("tokenizer.chat_template.rag", "{{ messages[0].content }} {{ bos_token }}");
    let tokenizer = Tokenizer::from_metadata(&file, "model.gguf").unwrap();
    let apply = |options: ChatOptions| tokenizer.apply_chat_template(&[Message::user("Hi")], &options);
    assert_eq!(apply(ChatOptions::default()).unwrap(), "plain");
    assert_eq!(apply(ChatOptions::default().with_variable("tools", "[{}]").unwrap()).unwrap(), "tools");
    assert_eq!(apply(ChatOptions::default().with_template("rag")).unwrap(), "Hi <|start|>");
    assert_eq!(tokenizer.chat_template(Some("rag")).map(str::len), Some(41));
    assert_eq!(tokenizer.chat_template_names().collect::<Vec<_>>(), ["default", "rag", "tool_use"]);
    let error = apply(ChatOptions::default().with_template("no-such")).unwrap_err();
    let expected = "one of the chat templates of model.gguf (default, rag, tool_use)";
    assert_eq!(error.to_string(), format!("template: found \"no-such\", expected {expected}"));
}

#[test]
fn a_refusal_and_a_failure_are_different_errors() {
    let apply = |template: &str| {
        let options = ChatOptions::default();
        with_template(template).apply_chat_template(&[Message::new("judge", "Hi")], &options).unwrap_err()
    };
    let refused = apply("{{ raise_exception('no role ' ~ messages[0].role) }}");
    assert!(matches!(&refused, Error::InvalidArgument { name: "messages", .. }), "{refused}");
    assert!(refused.to_string().contains("no role judge"), "{refused}");
    for broken in [
        "{{ [][::-1] | list }}",
        "{% if %}",
        "{{ messages[0].content.no_such() }}",
        "{{ 1 + 'a' }}",
        "{{ [1] | tojson(indent=99) }}",
    ] {
        let failed = apply(broken);
        assert!(matches!(&failed, Error::Malformed { .. }), "{failed}");
        assert!(failed.to_string().starts_with("model.gguf: chat template 'default': found "), "{failed}");
    }
}

#[test]
fn a_message_that_cannot_be_continued_is_refused() {
    let apply = |template: &str, messages: &[Message], field: &str| {
        let options = ChatOptions::default().with_continued_message(field);
        with_template(template).apply_chat_template(messages, &options).unwrap_err().to_string()
    };
    let message = [Message::assistant("Hello")];
    let written = "{{ messages[0].content }}";
    let image = Message::from_json(r#"{"role": "assistant", "content": [{"image": 1}]}"#).unwrap();
    for (found, template, messages, field) in [
        ("no messages", written, &[][..], "content"),
        ("no such field", written, &message, "reasoning_content"),
        ("a chat template that does not name it", written, &message, "role"),
        ("no text", written, &[image], "content"),
        ("\"content\"", "{# content #}", &message, "content"),
    ] {
        let error = apply(template, messages, field);
        assert!(error.starts_with(&format!("continued message: found {found}, expected ")), "{error}");
    }
}

#[test]
fn a_template_that_runs_for_ever_is_stopped() {
    let nested = "{% for a in range(9999) %}".repeat(4) + "x" + &"{% endfor %}".repeat(4);
    let failed = with_template(&nested).apply_chat_template(&[], &ChatOptions::default()).unwrap_err();
    assert!(failed.to_string().contains("fuel"), "{failed}");
}

#[test]
fn a_message_that_is_not_an_object_is_refused() {
    assert!(Message::from_json("[]").unwrap_err().to_string().starts_with("message: found JSON of type sequence"));
    assert!(Message::from_json("{").unwrap_err().to_string().starts_with("message: found invalid JSON"));
    assert!(ChatOptions::default().with_variable("x", "nope").is_err());
}
