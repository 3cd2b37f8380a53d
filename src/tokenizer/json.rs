//! Writes the `tokenizer.json` of a vocabulary: of bytes or characters and their merges, of words and their parts, or of pieces with a likelihood.

use serde_json::{Map, Value, json};

use super::pre_tokenizers::Rule;

/// A token that is found in a text before the text is split into words.
pub(super) struct AddedToken<'a> {
    pub(super) id: u32,
    pub(super) content: &'a str,
    pub(super) special: bool,
    /// Whether white space after it is dropped.
    pub(super) rstrip: bool,
}

/// Byte-pair encoding.
pub(super) struct Bpe<'a> {
    pub(super) units: Units<'a>,
    pub(super) merges: &'a [(&'a str, &'a str)],
}

/// What merges apply to.
#[derive(Clone, Copy)]
pub(super) enum Units<'a> {
    /// The bytes of words.
    Bytes(&'a Rule),
    /// The characters of the whole text, where `\u{2581}` stands for a space. Characters without a token become byte tokens, or
    /// the unknown token where there are none.
    Characters { unknown: Option<&'a str> },
}

impl Bpe<'_> {
    /// The text of the file.
    pub(super) fn write<'t>(
        &self,
        tokens: impl Iterator<Item = (&'t str, u32)>,
        added: impl Iterator<Item = AddedToken<'t>>,
    ) -> String {
        let mut out = String::with_capacity(64 * self.merges.len() + 1024);
        out.push_str(r#"{"version":"1.0","truncation":null,"padding":null,"added_tokens":["#);
        for (i, token) in added.enumerate() {
            separate(&mut out, i);
            out.push_str(&format!(r#"{{"id":{},"content":"#, token.id));
            string(&mut out, token.content);
            out.push_str(&format!(
                r#","single_word":false,"lstrip":false,"rstrip":{},"normalized":false,"special":{}}}"#,
                token.rstrip, token.special
            ));
        }
        match self.units {
            Units::Bytes(rule) => bytes(&mut out, rule),
            Units::Characters { unknown } => {
                out.push_str(r#"],"normalizer":{"type":"Replace","pattern":{"String":" "},"content":"\u2581"},"#);
                out.push_str(r#""pre_tokenizer":null,"post_processor":null,"decoder":{"type":"Sequence","decoders":["#);
                out.push_str(r#"{"type":"Replace","pattern":{"String":"\u2581"},"content":" "},"#);
                out.push_str(r#"{"type":"ByteFallback"},{"type":"Fuse"}]},"model":{"type":"BPE","dropout":null,"#);
                out.push_str(r#""continuing_subword_prefix":null,"end_of_word_suffix":null,"fuse_unk":true,"#);
                out.push_str(r#""byte_fallback":true,"ignore_merges":false,"unk_token":"#);
                match unknown {
                    None => out.push_str("null"),
                    Some(text) => string(&mut out, text),
                }
                out.push_str(r#","vocab":{"#);
            }
        }
        for (i, (text, id)) in tokens.enumerate() {
            separate(&mut out, i);
            string(&mut out, text);
            out.push_str(&format!(":{id}"));
        }
        out.push_str(r#"},"merges":["#);
        for (i, (left, right)) in self.merges.iter().enumerate() {
            separate(&mut out, i);
            out.push('[');
            string(&mut out, left);
            out.push(',');
            string(&mut out, right);
            out.push(']');
        }
        out.push_str("]}}");
        out
    }
}

/// WordPiece (Schuster and Nakajima 2012) and Unigram (Kudo 2018, arXiv 1804.10959).
pub(super) enum Subwords<'a> {
    /// The tokens by id, where those that continue a word begin with `##`; and whether text becomes lower-case.
    Words { tokens: Vec<(String, u32)>, unknown: &'a str, lowercase: bool },
    /// The pieces with their scores by id, and how text is normalized.
    Pieces { pieces: Vec<(String, f32)>, unknown: usize, charsmap: Option<&'a [u8]>, prefix: bool, collapse: bool },
}

/// The tokens around a text, and around a pair of strings.
pub(super) struct Frame {
    pub(super) before: Vec<u32>,
    pub(super) middle: Vec<u32>,
    pub(super) after: Vec<u32>,
    /// Whether the second text has a token type of its own.
    pub(super) has_types: bool,
}

impl Subwords<'_> {
    /// The text of the file.
    pub(super) fn write<'t>(&self, frame: &Frame, added: impl Iterator<Item = AddedToken<'t>>) -> String {
        let added: Vec<Value> = added
            .map(|token| {
                json!({"id": token.id, "content": token.content, "single_word": false, "lstrip": false,
                    "rstrip": token.rstrip, "normalized": false, "special": token.special})
            })
            .collect();
        let (normalizer, pre_tokenizer, decoder, model) = self.parts();
        json!({"version": "1.0", "truncation": null, "padding": null, "added_tokens": added, "normalizer": normalizer,
            "pre_tokenizer": pre_tokenizer, "post_processor": frame.write(), "decoder": decoder, "model": model})
        .to_string()
    }

    fn parts(&self) -> (Value, Value, Value, Value) {
        match self {
            Subwords::Words { tokens, unknown, lowercase } => {
                let vocabulary: Map<String, Value> =
                    tokens.iter().map(|(text, id)| (text.clone(), Value::from(*id))).collect();
                (
                    json!({"type": "BertNormalizer", "clean_text": true, "handle_chinese_chars": true,
                        "strip_accents": null, "lowercase": lowercase}),
                    json!({"type": "BertPreTokenizer"}),
                    json!({"type": "WordPiece", "prefix": "##", "cleanup": true}),
                    json!({"type": "WordPiece", "unk_token": unknown, "continuing_subword_prefix": "##",
                        "max_input_chars_per_word": 100, "vocab": vocabulary}),
                )
            }
            Subwords::Pieces { pieces, unknown, charsmap, prefix, collapse } => {
                let scheme = if *prefix { "always" } else { "never" };
                let metaspace = json!({"type": "Metaspace", "replacement": "\u{2581}", "prepend_scheme": scheme,
                    "split": true});
                let split = match collapse {
                    true => json!({"type": "Sequence", "pretokenizers": [{"type": "WhitespaceSplit"}, metaspace]}),
                    false => metaspace.clone(),
                };
                let vocabulary: Vec<Value> = pieces.iter().map(|(text, score)| json!([text, score])).collect();
                (
                    charsmap.map_or(
                        Value::Null,
                        |charsmap| json!({"type": "Precompiled", "precompiled_charsmap": base64(charsmap)}),
                    ),
                    split,
                    metaspace,
                    json!({"type": "Unigram", "unk_id": unknown, "vocab": vocabulary, "byte_fallback": false}),
                )
            }
        }
    }
}

impl Frame {
    /// The post-processor that adds the tokens.
    fn write(&self) -> Value {
        let second = u8::from(self.has_types);
        let name = |id: &u32| id.to_string();
        let special = |ids: &[u32], kind: u8| -> Vec<Value> {
            ids.iter().map(|id| json!({"SpecialToken": {"id": name(id), "type_id": kind}})).collect()
        };
        let text = |id: &str, kind: u8| vec![json!({"Sequence": {"id": id, "type_id": kind}})];
        let single = [special(&self.before, 0), text("A", 0), special(&self.after, 0)].concat();
        let pair = [
            special(&self.before, 0),
            text("A", 0),
            special(&self.middle, 0),
            text("B", second),
            special(&self.after, second),
        ];
        let all = self.before.iter().chain(&self.middle).chain(&self.after);
        let tokens: Map<String, Value> =
            all.map(|id| (name(id), json!({"id": name(id), "ids": [id], "tokens": [name(id)]}))).collect();
        json!({"type": "TemplateProcessing", "single": single, "pair": pair.concat(), "special_tokens": tokens})
    }
}

/// Bytes in base 64, as JSON holds them.
fn base64(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut out = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for group in bytes.chunks(3) {
        let number = (0..3).fold(0u32, |number, at| number << 8 | u32::from(group.get(at).copied().unwrap_or(0)));
        for digit in 0..4 {
            let value = (number >> (18 - 6 * digit) & 63) as usize;
            out.push(if digit <= group.len() { char::from(DIGITS[value]) } else { '=' });
        }
    }
    out
}

/// The steps from text to the bytes of words, and the beginning of their model.
fn bytes(out: &mut String, rule: &Rule) {
    out.push_str(r#"],"normalizer":null,"pre_tokenizer":{"type":"Sequence","pretokenizers":["#);
    for pattern in rule.patterns {
        out.push_str(r#"{"type":"Split","pattern":{"Regex":"#);
        string(out, pattern);
        out.push_str(r#"},"behavior":"Isolated","invert":false},"#);
    }
    // The last step replaces bytes by the characters that stand for them.
    out.push_str(r#"{"type":"ByteLevel","add_prefix_space":false,"trim_offsets":true,"use_regex":false}]},"#);
    out.push_str(r#""post_processor":null,"decoder":{"type":"ByteLevel","add_prefix_space":true,"#);
    out.push_str(r#""trim_offsets":true,"use_regex":true},"model":{"type":"BPE","dropout":null,"#);
    out.push_str(r#""unk_token":null,"continuing_subword_prefix":null,"end_of_word_suffix":null,"#);
    out.push_str(r#""fuse_unk":false,"byte_fallback":false,"ignore_merges":"#);
    out.push_str(if rule.ignore_merges { "true" } else { "false" });
    out.push_str(r#","vocab":{"#);
}

fn separate(out: &mut String, index: usize) {
    if index > 0 {
        out.push(',');
    }
}

/// Writes a JSON string.
fn string(out: &mut String, text: &str) {
    out.push('"');
    for c in text.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            c if u32::from(c) < 0x20 => out.push_str(&format!("\\u{:04x}", u32::from(c))),
            c => out.push(c),
        }
    }
    out.push('"');
}

#[cfg(test)]
mod tests {
    use super::base64;

    #[test]
    fn bytes_become_base_64_with_padding() {
        assert_eq!(
            ["", "f", "fo", "foo", "foob"].map(|text| base64(text.as_bytes())),
            ["", "Zg==", "Zm8=", "Zm9v", "Zm9vYg=="]
        );
        assert_eq!(base64(&[0xff, 0xef, 0xbe]), "/+++");
    }
}
