//! Tokens that end a text or a turn, known by their spelling, because many files do not declare them.

/// Spellings of tokens that end a generation.
const SPELLINGS: &[&str] = &[
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
    "<|flush|>",
    "<|calls|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "<|eom_id|>",
    "<EOT>",
    "_<EOT>",
    "[EOT]",
    "[EOS]",
    "<|end_of_text|>",
    "<eos>",
    "<end_of_utterance>",
    "<turn|>",
    "<|tool_response>",
    "<\u{ff5c}end\u{2581}of\u{2581}sentence\u{ff5c}>",
    "[e~[",
    // A code model starts an unrelated file after these.
    "<|fim_pad|>",
    "<fim-pad>",
    "<PAD>",
    "[PAD]",
    "<|file_sep|>",
    "<|fim_repo|>",
    "<|repo_name|>",
    "<fim-repo>",
    "<REPO>",
    "<reponame>",
];

/// The tokens of a vocabulary that end a generation, by their spelling. `id_of` finds the id of a spelling.
pub(super) fn by_spelling(id_of: impl Fn(&str) -> Option<u32>) -> Vec<u32> {
    let has = |text| id_of(text).is_some();
    // Models with these tokens write <|end|> in the middle of an answer.
    let harmony = has("<|return|>") && has("<|call|>");
    let solar = has("<|flush|>") && (has("<|call|>") || has("<|calls|>"));
    let spellings = SPELLINGS.iter().filter(|text| **text != "<|end|>" || !(harmony || solar));
    spellings.filter_map(|text| id_of(text)).collect()
}

/// Whether [`by_spelling`] looks for this token.
pub(super) fn is_spelling(text: &[u8]) -> bool {
    text.len() < 64 && SPELLINGS.iter().any(|spelling| spelling.as_bytes() == text)
}

#[cfg(test)]
mod tests {
    use super::by_spelling;

    fn ends(tokens: &[&str]) -> Vec<u32> {
        by_spelling(|text| tokens.iter().position(|token| *token == text).map(|at| at as u32))
    }

    #[test]
    fn an_end_is_known_by_its_spelling() {
        assert_eq!(ends(&["a", "<|im_end|>", "b", "<eos>"]), [1, 3]);
        assert_eq!(ends(&["<|end|>"]), [0]);
    }

    #[test]
    fn a_mark_inside_of_an_answer_is_not_an_end() {
        assert_eq!(ends(&["<|end|>", "<|return|>", "<|call|>"]), [1, 2]);
        assert_eq!(ends(&["<|end|>", "<|flush|>", "<|calls|>"]), [1, 2]);
    }
}
