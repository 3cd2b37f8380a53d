//! Writes the `tokenizer.json` of a byte-level vocabulary.

use super::pre_tokenizers::Rule;

/// A token that is found in a text before the text is split into words.
pub(super) struct AddedToken<'a> {
    pub(super) id: u32,
    pub(super) content: &'a str,
    pub(super) special: bool,
    /// Whether white space after it is dropped.
    pub(super) rstrip: bool,
}

/// Byte-level BPE.
pub(super) struct Bpe<'a> {
    pub(super) rule: &'a Rule,
    pub(super) merges: &'a [(&'a str, &'a str)],
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
        out.push_str(r#"],"normalizer":null,"pre_tokenizer":{"type":"Sequence","pretokenizers":["#);
        for pattern in self.rule.patterns {
            out.push_str(r#"{"type":"Split","pattern":{"Regex":"#);
            string(&mut out, pattern);
            out.push_str(r#"},"behavior":"Isolated","invert":false},"#);
        }
        // The last step replaces bytes by the characters that stand for them.
        out.push_str(r#"{"type":"ByteLevel","add_prefix_space":false,"trim_offsets":true,"use_regex":false}]},"#);
        out.push_str(r#""post_processor":null,"decoder":{"type":"ByteLevel","add_prefix_space":true,"#);
        out.push_str(r#""trim_offsets":true,"use_regex":true},"model":{"type":"BPE","dropout":null,"#);
        out.push_str(r#""unk_token":null,"continuing_subword_prefix":null,"end_of_word_suffix":null,"#);
        out.push_str(&format!(
            r#""fuse_unk":false,"byte_fallback":false,"ignore_merges":{},"vocab":{{"#,
            self.rule.ignore_merges
        ));
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
