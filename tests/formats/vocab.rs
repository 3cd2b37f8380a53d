//! `nybble::tokenizer::sentencepiece` against an implementation that is slow and obviously correct.

use nybble::tokenizer::sentencepiece::{Piece, SentencePiece, TokenKind};
use proptest::prelude::*;

const SPACE: &str = "\u{2581}";

fn piece(text: &str, score: f32, kind: TokenKind) -> Piece<'_> {
    Piece::new(text, score, kind)
}

fn normal(text: &str, score: f32) -> Piece<'_> {
    piece(text, score, TokenKind::Normal)
}

/// Joins the best pair until none is left: the highest score first, the leftmost of equals.
fn joined_naively(text: &str, pieces: &[(String, f32)]) -> Vec<String> {
    let score_of = |text: &str| pieces.iter().find(|(piece, _)| piece == text).map(|&(_, score)| score);
    let mut parts: Vec<String> = text.chars().map(String::from).collect();
    loop {
        let mut best: Option<(usize, f32)> = None;
        for left in 0..parts.len().saturating_sub(1) {
            if let Some(score) = score_of(&[&*parts[left], &*parts[left + 1]].concat())
                && best.is_none_or(|(_, highest)| score > highest)
            {
                best = Some((left, score));
            }
        }
        let Some((left, _)) = best else { return parts };
        let right = parts.remove(left + 1);
        parts[left].push_str(&right);
    }
}

proptest! {
    #[test]
    fn joining_matches_the_naive_rule_even_for_equal_scores(
        text in "[abcé]{0,24}",
        longer in prop::collection::btree_map("[abcé]{2,5}", -3i8..3, 0..24),
    ) {
        let mut pieces: Vec<(String, f32)> = ["a", "b", "c", "é"].map(|single| (single.to_owned(), -9.0)).into();
        pieces.extend(longer.into_iter().map(|(piece, score)| (piece, f32::from(score))));
        let vocabulary = SentencePiece::new(pieces.iter().map(|(text, score)| normal(text, *score)));
        let expected: Vec<u32> = joined_naively(&text, &pieces)
            .iter()
            .map(|part| pieces.iter().position(|(piece, _)| piece == part).unwrap() as u32)
            .collect();
        prop_assert_eq!(vocabulary.encode(&text, true), expected);
    }

    #[test]
    fn any_text_survives_as_bytes_when_no_piece_fits(text in any::<String>()) {
        let names: Vec<String> = (0..256).map(|byte| format!("<0x{byte:02X}>")).collect();
        let vocabulary = SentencePiece::new(names.iter().map(|name| piece(name, 0.0, TokenKind::Byte)));
        let bytes: Vec<u32> = text.replace(' ', SPACE).bytes().map(u32::from).collect();
        prop_assert_eq!(vocabulary.encode(&text, true), bytes);
    }

    #[test]
    fn no_vocabulary_and_no_text_cause_a_panic(
        text in any::<String>(),
        pieces in prop::collection::vec((any::<String>(), any::<f32>(), -1i64..9), 0..20),
    ) {
        let vocabulary = SentencePiece::new(
            pieces.iter().map(|(text, score, kind)| piece(text, *score, TokenKind::from_id(*kind))),
        )
        .with_space_prefix(true)
        .with_unknown(Some(0))
        .with_space_dropped_after(&[0, 1, 2]);
        for parse_marks in [false, true] {
            let text = pieces.iter().map(|(piece, _, _)| piece.as_str()).chain([text.as_str()]).collect::<String>();
            vocabulary.encode(&text, parse_marks);
        }
    }
}

#[test]
fn the_higher_score_is_joined_first() {
    let pieces = [normal("a", 0.0), normal("b", 0.0), normal("c", 0.0), normal("ab", 1.0), normal("bc", 2.0)];
    assert_eq!(SentencePiece::new(pieces).encode("abc", true), [0, 4]);
}

#[test]
fn a_special_token_is_found_only_when_special_tokens_are_parsed() {
    let pieces = [
        normal("<", 0.0),
        normal("s", 0.0),
        normal(">", 0.0),
        normal("<s", 1.0),
        piece("<s>", 9.0, TokenKind::Control),
    ];
    let vocabulary = SentencePiece::new(pieces);
    assert_eq!(vocabulary.encode("s<s>s", true), [1, 4, 1]);
    assert_eq!(vocabulary.encode("s<s>s", false), [1, 3, 2, 1]);
}

#[test]
fn the_longest_user_defined_token_is_always_found() {
    let pieces = [
        normal("\n", 0.0),
        normal("x", 0.0),
        piece("\n\n", -1000.0, TokenKind::UserDefined),
        piece("\n\n\n", -1000.0, TokenKind::UserDefined),
    ];
    let vocabulary = SentencePiece::new(pieces);
    for parse_marks in [false, true] {
        assert_eq!(vocabulary.encode("x\n\n\n\nx\n\nx", parse_marks), [1, 3, 0, 1, 2, 1]);
    }
}

#[test]
fn the_space_prefix_is_added_at_the_start_and_after_special_tokens() {
    let pieces = [normal(SPACE, 0.0), normal("a", 0.0), piece("<s>", 0.0, TokenKind::Control)];
    let vocabulary = SentencePiece::new(pieces);
    assert_eq!(vocabulary.encode("a<s>a a", true), [1, 2, 1, 0, 1]);
    assert_eq!(vocabulary.clone().with_space_prefix(true).encode("a<s>a a", true), [0, 1, 2, 0, 1, 0, 1]);
    assert!(vocabulary.with_space_prefix(true).encode("", true).is_empty());
}

#[test]
fn white_space_is_dropped_after_the_configured_special_tokens() {
    let pieces = [normal(SPACE, 0.0), normal("a", 0.0), normal("\n", 0.0), piece("<e>", 0.0, TokenKind::Control)];
    let vocabulary = SentencePiece::new(pieces).with_space_dropped_after(&[3]);
    assert_eq!(vocabulary.encode("a <e> \na <e>", true), [1, 0, 3, 1, 0, 3]);
}

#[test]
fn characters_without_pieces_or_bytes_are_unknown_or_left_out() {
    let pieces = [piece("<unk>", 0.0, TokenKind::Unknown), normal("a", 0.0), piece("<0xC3>", 0.0, TokenKind::Byte)];
    let vocabulary = SentencePiece::new(pieces);
    assert_eq!(vocabulary.encode("aéa", true), [1, 1], "one of two bytes is not enough");
    assert_eq!(vocabulary.with_unknown(Some(0)).encode("aéa", true), [1, 0, 1]);
}

#[test]
fn invalid_byte_tokens_and_invalid_utf8_match_nothing() {
    let broken = ["<0x-1>", "<0x>", "<0x0>", "<0x000>", "<0xGG>", "<0x+1>", "0x41"];
    let pieces = broken.iter().map(|text| piece(text, 0.0, TokenKind::Byte));
    let no_text = Piece::new(None, 0.0, TokenKind::Normal);
    let vocabulary = SentencePiece::new(pieces.chain([no_text]));
    assert!(vocabulary.encode("A\u{0}\u{1}<0x-1>", true).is_empty());
}
