//! Decoding token by token.

use super::Tokenizer;
use crate::error::Result;

/// Decodes token ids one at a time. The joined pieces equal [`Tokenizer::decode`] of all ids.
///
/// [`Tokenizer::decoder`] and [`Tokenizer::decoder_after`] make one.
#[derive(Debug, Clone)]
pub struct StreamDecoder<'t> {
    tokenizer: &'t Tokenizer,
    /// Bytes of a character that is not complete yet.
    incomplete: Vec<u8>,
    /// Whether the next text loses its first space, which encoding has added.
    drops_space: bool,
}

impl<'t> StreamDecoder<'t> {
    pub(super) fn new(tokenizer: &'t Tokenizer, after: &[u32]) -> StreamDecoder<'t> {
        let at_start = after.last().is_none_or(|last| tokenizer.is_special(*last));
        StreamDecoder { tokenizer, incomplete: Vec::new(), drops_space: tokenizer.adds_space() && at_start }
    }

    /// The text that this token completes: whole characters only, and none for a special token. Bytes that are not UTF-8
    /// become U+FFFD.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`](crate::Error::InvalidArgument) for an id that is not in the vocabulary.
    pub fn push(&mut self, token: u32) -> Result<String> {
        if self.tokenizer.is_special(token) {
            return Ok(String::new());
        }
        let bytes = self.tokenizer.token_bytes(token)?;
        let mut new = bytes.as_slice();
        if self.drops_space && !new.is_empty() {
            self.drops_space = false;
            new = new.strip_prefix(b" ").unwrap_or(new);
        }
        self.incomplete.extend_from_slice(new);
        let mut text = String::new();
        let mut rest = self.incomplete.as_slice();
        let left = loop {
            match str::from_utf8(rest) {
                Ok(valid) => {
                    text.push_str(valid);
                    break 0;
                }
                Err(error) => {
                    let (valid, after) = rest.split_at(error.valid_up_to());
                    text.push_str(&String::from_utf8_lossy(valid));
                    // Without a length the bytes may still become a character.
                    let Some(len) = error.error_len() else { break after.len() };
                    text.push(char::REPLACEMENT_CHARACTER);
                    rest = &after[len..];
                }
            }
        };
        self.incomplete.drain(..self.incomplete.len() - left);
        Ok(text)
    }

    /// The remaining text: U+FFFD for an incomplete character, otherwise nothing.
    pub fn finish(&mut self) -> String {
        let rest = std::mem::take(&mut self.incomplete);
        String::from_utf8_lossy(&rest).into_owned()
    }
}
