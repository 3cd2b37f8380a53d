//! Recognizes the pre-tokenizer of a `tokenizer.json`: GGUF has llama.cpp's names for them instead of patterns.

use serde_json::Value;

/// Llama 3: words, up to three digits, symbols with the line ends after them.
const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// As Llama 3, but single digits.
const QWEN2: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// As Qwen 2, but combining marks belong to words.
const QWEN35: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// GPT-4o: a capital after a lower-case letter begins a word.
const GPT4O: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// As GPT-4o, but single digits and no contractions.
const TEKKEN: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const BLOOM: &str = " ?[^(\\s|[.,!?\u{2026}\u{3002}\u{ff0c}\u{3001}\u{964}\u{6d4}\u{60c}])]+";
const HAN_AND_KANA: &str = "[\u{4e00}-\u{9fa5}\u{3040}-\u{309f}\u{30a0}-\u{30ff}]+";
const EAST_ASIAN: &str = "[\u{4e00}-\u{9fa5}\u{800}-\u{4e00}\u{ac00}-\u{d7ff}]+";
const DEEPSEEK3: &str = "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+";

/// The built-in pattern of byte-level pre-tokenizers.
const GPT2: &str = "<GPT-2>";
/// Single digits.
const DIGITS: &str = "<digits>";
/// Runs of digits.
const NUMBERS: &str = "<numbers>";
/// Runs of punctuation.
const PUNCTUATION: &str = "<punctuation>";

/// Names, and the patterns that are applied one after the other.
const KNOWN: &[(&str, &[&str])] = &[
    ("gpt-2", &[GPT2]),
    ("starcoder", &[DIGITS, GPT2]),
    ("falcon", &[PUNCTUATION, GPT2, NUMBERS, "[0-9][0-9][0-9]"]),
    ("dbrx", &[LLAMA3]),
    ("qwen2", &[QWEN2]),
    ("qwen35", &[QWEN35]),
    ("gpt-4o", &[GPT4O]),
    ("tekken", &[TEKKEN]),
    ("bloom", &[BLOOM]),
    ("deepseek-v3", &[r"\p{N}{1,3}", HAN_AND_KANA, DEEPSEEK3]),
    ("deepseek-coder", &["[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", EAST_ASIAN, DIGITS]),
];

/// The name of the byte-level pre-tokenizer that `description` describes. `ignores_merges` says whether the model skips its
/// merges for words that are tokens.
///
/// # Errors
/// A text that says what was found.
pub(super) fn name(description: Option<&Value>, ignores_merges: bool) -> Result<&'static str, String> {
    let mut patterns = Vec::new();
    add(description, &mut patterns)?;
    let known = KNOWN.iter().find(|known| known.1 == patterns);
    match known.ok_or_else(|| format!("the patterns {patterns:?}"))?.0 {
        // The two differ only in this.
        "dbrx" if ignores_merges => Ok("llama-bpe"),
        name => Ok(name),
    }
}

/// Adds the patterns of one step, or of the steps of a sequence.
fn add(step: Option<&Value>, patterns: &mut Vec<String>) -> Result<(), String> {
    let Some(step) = step else { return Ok(()) };
    let kind = step.get("type").and_then(Value::as_str).unwrap_or_default();
    let text = |key| step.get(key).and_then(Value::as_str).unwrap_or_default();
    let switch = |key, default| step.get(key).and_then(Value::as_bool).unwrap_or(default);
    let pattern = match kind {
        "Sequence" => {
            let steps = step.get("pretokenizers").and_then(Value::as_array);
            return steps.into_iter().flatten().try_for_each(|step| add(Some(step), patterns));
        }
        "ByteLevel" if !switch("use_regex", true) => return Ok(()),
        "ByteLevel" => GPT2,
        "Digits" if switch("individual_digits", false) => DIGITS,
        "Digits" => NUMBERS,
        "Punctuation" if text("behavior") == "Contiguous" => PUNCTUATION,
        "Split" => match (step.pointer("/pattern/Regex").and_then(Value::as_str), text("behavior")) {
            (Some(pattern), "Isolated") if !switch("invert", false) => pattern,
            // Text between matches is dropped, but there is none.
            (Some(pattern), "Removed") if switch("invert", false) => pattern,
            _ => return Err(format!("a split that {}", crate::format::json::brief(step))),
        },
        other => return Err(format!("a step of type {other:?}")),
    };
    patterns.push(pattern.to_owned());
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn split(pattern: &str) -> Value {
        serde_json::json!({"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false})
    }

    fn sequence(steps: &[Value]) -> Value {
        let bytes = serde_json::json!({"type": "ByteLevel", "add_prefix_space": false, "use_regex": false});
        let steps = [steps, &[bytes]].concat();
        serde_json::json!({"type": "Sequence", "pretokenizers": steps})
    }

    #[test]
    fn the_built_in_pattern_is_gpt_2() {
        let description = serde_json::json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true});
        assert_eq!(name(Some(&description), false), Ok("gpt-2"));
    }

    #[test]
    fn single_digits_and_the_built_in_pattern_are_starcoder() {
        let digits = serde_json::json!({"type": "Digits", "individual_digits": true});
        let bytes = serde_json::json!({"type": "ByteLevel", "use_regex": true});
        assert_eq!(name(Some(&sequence(&[digits, bytes])), false), Ok("starcoder"));
    }

    #[test]
    fn ignored_merges_distinguish_llama_3_from_dbrx() {
        let description = sequence(&[split(LLAMA3)]);
        assert_eq!(name(Some(&description), true), Ok("llama-bpe"));
        assert_eq!(name(Some(&description), false), Ok("dbrx"));
        let removed = serde_json::json!(
            {"type": "Split", "pattern": {"Regex": LLAMA3}, "behavior": "Removed", "invert": true}
        );
        assert_eq!(name(Some(&sequence(&[removed])), false), Ok("dbrx"));
    }

    #[test]
    fn an_unknown_pattern_is_refused() {
        assert!(name(Some(&sequence(&[split(r"\p{L}+")])), false).is_err());
        assert!(name(Some(&serde_json::json!({"type": "Whitespace"})), false).is_err());
        assert!(name(None, false).is_err());
    }
}
