//! Reads the small text and JSON files of a folder.

use std::io::ErrorKind;
use std::path::Path;

use serde_json::{Map, Value};

use crate::error::{Error, Place, Result};
use crate::format::pointer::pointer_error;

/// The largest known vocabularies take 35 MB.
const MAX_BYTES: u64 = 256 << 20;

/// The content of the text file at `path`. `None` when there is none.
pub(super) fn text(path: &Path) -> Result<Option<String>> {
    let bytes = bytes(path)?;
    bytes.map(|bytes| utf8(bytes, path, Place::File)).transpose()
}

/// The bytes of the file at `path`. `None` when there is none.
pub(super) fn bytes(path: &Path) -> Result<Option<Vec<u8>>> {
    let io = |source| Error::io(path, source);
    // Checked before opening, which would wait on a pipe.
    let metadata = match std::fs::metadata(path) {
        Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => return Ok(None),
        other => other.map_err(io)?,
    };
    if !metadata.is_file() {
        return Err(io(std::io::Error::new(ErrorKind::InvalidInput, "not a regular file, expected text")));
    }
    if metadata.len() > MAX_BYTES {
        let found = format!("{} bytes", metadata.len());
        return Err(Error::malformed(path, Place::File, found, format_args!("at most {MAX_BYTES}")));
    }
    let bytes = std::fs::read(path).map_err(io)?;
    match pointer_error(path, &bytes) {
        Some(error) => Err(error),
        None => Ok(Some(bytes)),
    }
}

/// The text that `bytes` are, from `place` of the file at `path`.
pub(super) fn utf8(bytes: Vec<u8>, path: &Path, place: Place) -> Result<String> {
    String::from_utf8(bytes).map_err(|error| {
        let found = format!("invalid UTF-8 at byte {}", error.utf8_error().valid_up_to());
        Error::malformed(path, place, found, "text")
    })
}

/// The object in the JSON file at `path`. Empty when there is no file.
pub(super) fn object(path: &Path) -> Result<Map<String, Value>> {
    text(path)?.map_or(Ok(Map::new()), |text| parse(&text, path, Place::File))
}

/// The object in `text`, from `place` of the file at `path`.
pub(super) fn parse(text: &str, path: &Path, place: Place) -> Result<Map<String, Value>> {
    let parsed = serde_json::from_str(text).or_else(|error| match without_special_numbers(text) {
        Some(plain) => serde_json::from_str(&plain).map_err(|_| error),
        None => Err(error),
    });
    match parsed {
        Ok(Value::Object(object)) => Ok(object),
        Ok(other) => {
            let kind = match other {
                Value::Array(_) => "list",
                Value::String(_) => "string",
                Value::Number(_) => "number",
                Value::Bool(_) => "boolean",
                _ => "null",
            };
            Err(Error::malformed(path, place, format_args!("a JSON {kind}"), "an object"))
        }
        Err(error) => {
            let reason = error.to_string();
            let is_surrogate = ["surrogate", "end of hex escape"].iter().any(|part| reason.contains(part));
            Err(match is_surrogate {
                true => Error::malformed(path, place, "a lone surrogate", "whole characters"),
                false => Error::malformed(path, place, format_args!("invalid JSON ({reason})"), "an object"),
            })
        }
    }
}

/// `text` with `null` in place of the numbers that Python writes although JSON does not have them. `None` when there are none.
fn without_special_numbers(text: &str) -> Option<String> {
    const SPECIAL: [&str; 3] = ["-Infinity", "Infinity", "NaN"];
    if !SPECIAL.iter().any(|word| text.contains(word)) {
        return None;
    }
    let mut plain = String::with_capacity(text.len());
    let (mut rest, mut in_string, mut escaped) = (text, false, false);
    while let Some(c) = rest.chars().next() {
        if !in_string && let Some(word) = SPECIAL.iter().find(|word| rest.starts_with(**word)) {
            plain.push_str("null");
            rest = &rest[word.len()..];
            continue;
        }
        (in_string, escaped) = match c {
            '"' if !escaped => (!in_string, false),
            '\\' => (in_string, in_string && !escaped),
            _ => (in_string, false),
        };
        plain.push(c);
        rest = &rest[c.len_utf8()..];
    }
    Some(plain)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_that_only_python_writes_are_accepted() {
        let text = r#"{"a": [0.0, Infinity], "b": -Infinity, "c": NaN, "NaN \" Infinity": 1}"#;
        let object = parse(text, Path::new("config.json"), Place::File).unwrap();
        assert_eq!(object["a"], serde_json::json!([0.0, null]));
        assert_eq!(object["NaN \" Infinity"], 1);
        assert!(parse(r#"{"a": infinity}"#, Path::new("config.json"), Place::File).is_err());
    }
}
