//! JSON files: objects without duplicate keys.

use std::fmt;
use std::io::Read;
use std::path::Path;

use serde::de::{Deserialize, Deserializer, Error as _, MapAccess, Visitor};
use serde_json::{Map, Value};

use crate::error::{Error, Place, Result};

/// The entries of an object in the order of the file. Duplicate keys are an error, because readers disagree on their
/// meaning.
pub(crate) struct Entries(pub(crate) Vec<(String, Value)>);

impl<'de> Deserialize<'de> for Entries {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        struct Collect;

        impl<'de> Visitor<'de> for Collect {
            type Value = Entries;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<Entries, A::Error> {
                let (mut entries, mut seen) = (Vec::new(), std::collections::HashSet::new());
                while let Some((key, value)) = map.next_entry::<String, Value>()? {
                    if !seen.insert(key.clone()) {
                        return Err(A::Error::custom(format_args!("{key:?} a second time")));
                    }
                    entries.push((key, value));
                }
                Ok(Entries(entries))
            }
        }
        deserializer.deserialize_map(Collect)
    }
}

/// Parses the object in `bytes`, a part of the file at `path`. Errors call the part `what`.
pub(crate) fn entries(path: &Path, bytes: &[u8], place: Place, what: &str) -> Result<Vec<(String, Value)>> {
    let parsed = serde_json::from_slice::<Entries>(bytes);
    parsed.map(|entries| entries.0).map_err(|error| Error::malformed(path, place, error, what))
}

/// Reads the object in the file at `path`, which may have up to `largest` bytes.
pub(crate) fn read(path: &Path, largest: u64) -> Result<Map<String, Value>> {
    Ok(entries(path, &text(path, largest)?, Place::File, "a JSON object")?.into_iter().collect())
}

/// As [`read`], of a file with any JSON value.
pub(crate) fn read_value(path: &Path, largest: u64) -> Result<Value> {
    let parsed = serde_json::from_slice(&text(path, largest)?);
    parsed.map_err(|error| Error::malformed(path, Place::File, error, "JSON"))
}

/// The text of the file at `path`.
fn text(path: &Path, largest: u64) -> Result<Vec<u8>> {
    let io = |source| Error::io(path, source);
    let file = super::mapped::open(path).map_err(io)?;
    let mut bytes = Vec::new();
    file.take(largest + 1).read_to_end(&mut bytes).map_err(io)?;
    if bytes.len() as u64 > largest {
        return Err(Error::malformed(path, Place::File, format_args!("more than {largest} bytes"), "fewer"));
    }
    if let Some(error) = super::pointer::pointer_error(path, &bytes) {
        return Err(error);
    }
    Ok(quote_constants(bytes))
}

/// Puts quotes around NaN, Infinity and -Infinity, which Python writes as numbers and JSON does not have. Where a number is
/// needed, errors then name the word.
fn quote_constants(bytes: Vec<u8>) -> Vec<u8> {
    const WORDS: [&[u8]; 3] = [b"NaN", b"Infinity", b"-Infinity"];
    let (mut out, mut at, mut in_string) = (Vec::with_capacity(bytes.len()), 0, false);
    while let Some(byte) = bytes.get(at).copied() {
        let word = WORDS.iter().find(|word| !in_string && bytes[at..].starts_with(word));
        let length = match (word, byte) {
            (Some(word), _) => {
                out.push(b'"');
                out.extend_from_slice(word);
                out.push(b'"');
                at += word.len();
                continue;
            }
            (None, b'\\') if in_string => 2,
            (None, b'"') => {
                in_string = !in_string;
                1
            }
            (None, _) => 1,
        };
        let end = bytes.len().min(at + length);
        out.extend_from_slice(&bytes[at..end]);
        at = end;
    }
    out
}

/// A value for an error message, truncated where it is long.
pub(crate) fn brief(value: &Value) -> String {
    let text = value.to_string();
    match text.char_indices().nth(60) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn constants_of_python_become_strings_outside_of_strings() {
        let quoted = |text: &str| String::from_utf8(quote_constants(text.as_bytes().to_vec())).unwrap();
        assert_eq!(
            quoted(r#"{"a": NaN, "b": [Infinity, -Infinity], "c": -1}"#),
            r#"{"a": "NaN", "b": ["Infinity", "-Infinity"], "c": -1}"#
        );
        for text in [r#"{"NaN": "Infinity \" NaN", "b\\": "-Infinity"}"#, "\"\\", "\"open NaN"] {
            assert_eq!(quoted(text), text);
        }
    }
}
