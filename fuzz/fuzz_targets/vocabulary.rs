//! Input as a SentencePiece vocabulary and a text: one piece per line, and the text after an empty line.
#![no_main]

use libfuzzer_sys::fuzz_target;
use nybble::tokenizer::sentencepiece::{Piece, SentencePiece, TokenKind};

fuzz_target!(|bytes: &[u8]| {
    let text = String::from_utf8_lossy(bytes);
    let (vocabulary, text) = text.split_once("\n\n").unwrap_or((&text, "a b"));
    let pieces = vocabulary.lines().enumerate().map(|(i, line)| {
        Piece::new(
            line.strip_prefix(['0', '1', '2', '3', '4', '5', '6']),
            -((i * 7919 % 97) as f32),
            TokenKind::from_id(i64::from(line.as_bytes().first().copied().unwrap_or(b'1')) - i64::from(b'0')),
        )
    });
    let pieces = SentencePiece::new(pieces).with_space_prefix(bytes.len() % 2 == 0);
    for special in [false, true] {
        assert!(pieces.encode(text, special).len() <= 4 * (text.len() + 4), "more tokens than bytes");
    }
});
