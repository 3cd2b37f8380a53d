//! The rules by which byte-level vocabularies split a text into words before merges are applied.
//!
//! GGUF files name the rule in `tokenizer.ggml.pre`. A rule is a list of patterns. Each pattern splits all pieces that the
//! patterns before it left into the matches and the text between them. Names and rules are those of llama.cpp. It
//! approximates the patterns of tekken and gpt-4o, because its regular expressions do not support `\p{Lu}`. The rules here
//! are the models' own patterns, with which they were trained.

/// The rule behind a name.
#[derive(Debug, Clone, Copy)]
pub(super) struct Rule {
    names: &'static [&'static str],
    pub(super) patterns: &'static [&'static str],
    /// A word that is a token is encoded as that token, without merges.
    pub(super) ignore_merges: bool,
    /// Whether encoding adds the start token if `tokenizer.ggml.add_bos_token` is missing.
    pub(super) add_bos: bool,
}

/// The result of looking up a name.
pub(super) enum Found {
    Rule(&'static Rule),
    /// The rule `default`, because nybble does not know the name.
    Default(&'static Rule),
    /// The name belongs to a vocabulary whose tokens are text, not bytes.
    NotByteLevel,
}

/// The rule called `name`.
pub(super) fn find(name: Option<&[u8]>) -> Found {
    let is_called = |rule: &&Rule| name.is_some_and(|name| rule.names.iter().any(|known| known.as_bytes() == name));
    match RULES.iter().find(is_called) {
        Some(rule) => Found::Rule(rule),
        None if name.is_some_and(|name| NOT_BYTE_LEVEL.iter().any(|known| known.as_bytes() == name)) => {
            Found::NotByteLevel
        }
        None => Found::Default(&RULES[0]),
    }
}

/// The names of all rules.
#[cfg(feature = "python")]
pub(super) fn names() -> impl Iterator<Item = &'static str> {
    RULES.iter().flat_map(|rule| rule.names.iter().copied())
}

const NOT_BYTE_LEVEL: &[&str] = &["whitespace"];

/// Names for vocabularies whose merges apply to pieces of text instead of bytes: spaces are part of the pieces.
const PIECES: &[&str] = &["gemma4", "sarvam-moe", "granite-embed-multi-311m"];

/// Whether merges apply to pieces of text by this name, and whether a text begins with the start token whatever the file says.
pub(super) fn merges_pieces(name: &[u8]) -> Option<bool> {
    let known = PIECES.iter().find(|known| known.as_bytes() == name)?;
    Some(*known != "sarvam-moe")
}

// Building blocks of the patterns. Macros, because `concat!` takes literals only.

// Spelled out, since `(?i:...)` also matches characters that fold to ASCII, such as the long s.
macro_rules! contraction {
    () => {
        "'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD]"
    };
}
macro_rules! spaces {
    () => {
        r"\s*[\r\n]+|\s+(?!\S)|\s+"
    };
}
macro_rules! word {
    () => {
        r"[^\r\n\p{L}\p{N}]?\p{L}+"
    };
}
macro_rules! symbols {
    () => {
        r" ?[^\s\p{L}\p{N}]+[\r\n]*"
    };
}
macro_rules! contraction_word_digits_symbols {
    ($digits:literal) => {
        concat!(contraction!(), "|", word!(), "|", $digits, "|", symbols!())
    };
}
/// A pattern whose words end before an upper-case letter that follows a lower-case letter.
macro_rules! cased {
    ($digits:literal, $last:expr) => {
        concat!(
            r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+",
            $last,
            r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*",
            $last,
            "|",
            $digits,
            r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|",
            spaces!()
        )
    };
}
macro_rules! cased_with_contraction {
    ($digits:literal) => {
        cased!($digits, concat!("(?:", contraction!(), ")?"))
    };
}
macro_rules! han_and_kana {
    () => {
        "[\u{4e00}-\u{9fa5}\u{3040}-\u{309f}\u{30a0}-\u{30ff}]+"
    };
}
macro_rules! ascii_symbol_and_word {
    () => {
        r##"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"##
    };
}
macro_rules! word_with_combining_marks {
    () => {
        r"[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    };
}
macro_rules! kimi_upper {
    () => {
        r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
    };
}
macro_rules! kimi_lower {
    () => {
        r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
    };
}

const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)";
const LLAMA3: &str = concat!(contraction_word_digits_symbols!(r"\p{N}{1,3}"), "|", spaces!());
const QWEN2: &str = concat!(contraction_word_digits_symbols!(r"\p{N}"), "|", spaces!());
const DEEPSEEK3_TEXT: &str =
    concat!(ascii_symbol_and_word!(), "|", word_with_combining_marks!(), r"| ?[\p{P}\p{S}]+[\r\n]*|", spaces!());
const DEEPSEEK_EAST_ASIAN: &str = "[\u{4e00}-\u{9fa5}\u{800}-\u{4e00}\u{ac00}-\u{d7ff}]+";
/// The words of DeepSeek's first models: the cased characters of Unicode, without later additions.
const DEEPSEEK_WORD: &str = concat!(
    "\\s?[A-Za-z\u{b5}\u{c0}-\u{d6}\u{d8}-\u{f6}\u{f8}-\u{1ba}\u{1bc}-\u{1bf}\u{1c4}-\u{293}\u{295}-",
    "\u{2af}\u{370}-\u{373}\u{376}\u{377}\u{37b}-\u{37d}\u{37f}\u{386}\u{388}-\u{38a}\u{38c}\u{38e}-",
    "\u{3a1}\u{3a3}-\u{3f5}\u{3f7}-\u{481}\u{48a}-\u{52f}\u{531}-\u{556}\u{10a0}-\u{10c5}\u{13a0}-",
    "\u{13f5}\u{13f8}-\u{13fd}\u{1c90}-\u{1cba}\u{1cbd}-\u{1cbf}\u{1d00}-\u{1d2b}\u{1d6b}-\u{1d77}",
    "\u{1d79}-\u{1d9a}\u{1e00}-\u{1f15}\u{1f18}-\u{1f1d}\u{1f20}-\u{1f45}\u{1f48}-\u{1f4d}\u{1f50}-",
    "\u{1f57}\u{1f59}\u{1f5b}\u{1f5d}\u{1f5f}-\u{1f7d}\u{1f80}-\u{1fb4}\u{1fb6}-\u{1fbc}\u{1fbe}\u{1fc2}-",
    "\u{1fc4}\u{1fc6}-\u{1fcc}\u{1fd0}-\u{1fd3}\u{1fd6}-\u{1fdb}\u{1fe0}-\u{1fec}\u{1ff2}-\u{1ff4}",
    "\u{1ff6}-\u{1ffc}\u{2102}\u{2107}\u{210a}-\u{2113}\u{2115}\u{2119}-\u{211d}\u{2124}\u{2126}\u{2128}",
    "\u{212a}-\u{212d}\u{212f}-\u{2134}\u{2139}\u{213c}-\u{213f}\u{2145}-\u{2149}\u{214e}\u{2183}\u{2184}",
    "\u{2c00}-\u{2c7b}\u{2c7e}-\u{2ce4}\u{2ceb}-\u{2cee}\u{2cf2}\u{2cf3}\u{a640}-\u{a66d}\u{a680}-",
    "\u{a69b}\u{a722}-\u{a76f}\u{a771}-\u{a787}\u{a78b}-\u{a78e}\u{ab70}-\u{abbf}\u{fb00}-\u{fb06}",
    "\u{fb13}-\u{fb17}\u{ff21}-\u{ff3a}\u{ff41}-\u{ff5a}\u{10400}-\u{1044f}\u{104b0}-\u{104d3}\u{104d8}-",
    "\u{104fb}\u{10c80}-\u{10cb2}\u{10cc0}-\u{10cf2}\u{118a0}-\u{118df}\u{1e900}-\u{1e943}]+",
);
/// `\d{1,3}(?=(?:\d{3})*\b)`, with the word characters of Oniguruma spelled out, with which the models were trained. Other
/// regular expressions do not count the Latin-1 superscripts and fractions, or do count joiners.
const DIGITS_BY_THREES: &str =
    "\\d{1,3}(?=(?:\\d{3})*(?![\\p{Alphabetic}\\p{M}\\p{Nd}\\p{Pc}\u{b2}\u{b3}\u{b9}\u{bc}-\u{be}]))";
const BLOOM: &str = " ?[^(\\s|.,!?\u{2026}\u{3002}\u{ff0c}\u{3001}\u{964}\u{6d4}\u{60c})]+";
const AFMOE_SCRIPTS: &str = "[\u{4e00}-\u{9fff}\u{3400}-\u{4dbf}\u{f900}-\u{faff}\u{3040}-\u{309f}\u{30a0}-\u{30ff}\u{ff65}-\u{ff9f}\u{2f00}-\u{2fdf}\u{e00}-\u{e7f}\u{e80}-\u{eff}\u{1780}-\u{17ff}\u{1000}-\u{109f}\u{aa60}-\u{aa7f}\u{a9e0}-\u{a9ff}\u{ac00}-\u{d7af}\u{1100}-\u{11ff}]+";

const RULES: &[Rule] = &[
    rule(&["default"], &[r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]"]),
    rule(
        &[
            "gpt-2",
            "mpt",
            "olmo",
            "jais",
            "trillion",
            "granite-docling",
            "phi-2",
            "gigachat",
            "a.x-4.0",
            "mellum",
            "modern-bert",
            "roberta-bpe",
            "exaone4",
            "jina-es",
            "jina-de",
            "jina-v1-en",
            "jina-v2-es",
            "jina-v2-de",
            "jina-v2-code",
        ],
        &[GPT2],
    ),
    rule(
        &["starcoder", "refact", "command-r", "smollm", "codeshell", "exaone", "minerva-7b", "mellum2"],
        &[r"\p{N}", GPT2],
    ),
    rule(&["falcon"], &[r"[\p{P}\$\+<=>\^~\|`]+", GPT2, "[0-9][0-9][0-9]"]),
    with_bos(ignoring_merges(rule(
        &["llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "jina-v5-nano"],
        &[LLAMA3],
    ))),
    rule(&["dbrx", "smaug-bpe", "chatglm-bpe"], &[LLAMA3]),
    ignoring_merges(rule(&["glm4", "glm5"], &[LLAMA3])),
    rule(
        &["jais-2"],
        &[concat!(
            contraction_word_digits_symbols!(r"\p{N}{1,3}"),
            r"|\s*[\r\n]+|\s{512}(?!\S)|\s{256}(?!\S)|\s{128}(?!\S)|\s{64}(?!\S)|\s{32}(?!\S)|\s{16}(?!\S)|\s{8}(?!\S)|\s{4}(?!\S)|\s{1,2}(?!\S)|\s"
        )],
    ),
    ignoring_merges(rule(
        &["minicpm5"],
        &[r"\p{N}{1,3}", concat!(contraction_word_digits_symbols!(r"\p{N}+"), "|", spaces!())],
    )),
    rule(
        &["qwen2", "stablelm2", "deepseek-r1-qwen", "megrez", "hunyuan", "solar-open", "grok-2", "kormo", "f2llmv2"],
        &[QWEN2],
    ),
    rule(
        &["qwen35"],
        &[concat!(
            contraction!(),
            r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|",
            spaces!()
        )],
    ),
    rule(&["laguna"], &[r"[^\n]+|[\n]+", QWEN2]),
    rule(&["ufakzeka"], &[concat!(word!(), r"|\p{N}|", symbols!(), "|", spaces!())]),
    rule(&["seed-coder"], &[concat!(contraction!(), "|", word!(), r"|\p{N}| ?[^\s\p{L}\p{N}]+|", spaces!())]),
    rule(
        &["bailingmoe", "bailingmoe2", "llada-moe"],
        &[concat!(contraction_word_digits_symbols!(r"\p{N}"), r"|\s*[\r\n]|\s+(?!\S)|\s+")],
    ),
    rule(
        &["exaone-moe"],
        &[concat!(
            contraction!(),
            r"|[^\r\n\p{L}\p{N}]?(?:\p{L}\p{M}*(?: \p{L}\p{M}*)*)+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+"
        )],
    ),
    rule(
        &["deepseek-llm"],
        &[
            r"[\r\n]",
            DEEPSEEK_WORD,
            "\\s?[!-/:-~\u{ff01}-\u{ff0f}\u{ff1a}-\u{ff5e}\u{2018}-\u{201f}\u{3000}-\u{3002}]+",
            r"\s+$",
            DEEPSEEK_EAST_ASIAN,
            r"\p{N}+",
        ],
    ),
    rule(&["deepseek-coder"], &[r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", DEEPSEEK_EAST_ASIAN, r"\p{N}"]),
    rule(&["deepseek-v3", "hunyuan-dense", "joyai-llm", "hy_v4"], &[r"\p{N}{1,3}", han_and_kana!(), DEEPSEEK3_TEXT]),
    rule(
        &["spark2_5"],
        &[
            r"\p{N}{1,3}",
            han_and_kana!(),
            concat!(
                ascii_symbol_and_word!(),
                "|",
                word_with_combining_marks!(),
                r"| ?[\p{P}\p{S}]+|[\r\n]|\s+(?!\S)|\s+"
            ),
            r"\p{N}",
        ],
    ),
    rule(&["afmoe"], &[r"\p{N}{1,3}(?=(?:\p{N}{3})*(?!\p{N}))", AFMOE_SCRIPTS, DEEPSEEK3_TEXT]),
    with_bos(ignoring_merges(rule(&["tekken"], &[cased!(r"\p{N}", "")]))),
    rule(&["gpt-4o", "llama4", "kanana2", "talkie", "minimax-m2"], &[cased_with_contraction!(r"\p{N}{1,3}")]),
    ignoring_merges(rule(&["granite-embed-multi-97m"], &[cased_with_contraction!(r"\p{N}{1,3}")])),
    ignoring_merges(rule(
        &["youtu"],
        &[
            concat!(
                "[\u{ac00}-\u{d7a3}\u{3131}-\u{318e}]+|[\u{ff01}\u{2026}\u{201c}\u{201d}\u{2018}\u{2019}\u{2014}\u{ff1a}\u{ff1b}\u{ff0c}\u{3001}-\u{303f}\u{fe30}-\u{fe4f}]+|[\u{3105}-\u{312f}]+|",
                han_and_kana!()
            ),
            cased_with_contraction!(r"\p{N}"),
        ],
    )),
    rule(&["tiny_aya", "cohere2moe"], &[DIGITS_BY_THREES, cased_with_contraction!(r"\p{N}{1,3}")]),
    rule(
        &["kimi-k2"],
        &[concat!(
            r"\p{Han}+|[^\r\n\p{L}\p{N}]?",
            kimi_upper!(),
            "*",
            kimi_lower!(),
            "+(?:",
            contraction!(),
            r")?|[^\r\n\p{L}\p{N}]?",
            kimi_upper!(),
            "+",
            kimi_lower!(),
            "*(?:",
            contraction!(),
            r")?|\p{N}{1,3}|",
            symbols!(),
            "|",
            spaces!()
        )],
    ),
    rule(&["bloom", "poro-chat", "gpt3-finnish"], &[BLOOM]),
    rule(&["viking"], &[BLOOM, r"\p{N}"]),
    rule(&["superbpe"], &[r"\p{N}+", r"(?=(\d{3})+(?!\d))"]),
    with_bos(rule(
        &["chameleon"],
        &[
            "<sentinel:[0-9]+>",
            "(IMGIMG)((A|B|C|D|E|F|G|H|I){1,4})Z",
            r"([\t\n]|    |  )",
            r"\p{N}",
            r"[\p{P}!-/:-@\[-`{-~]",
            GPT2,
        ],
    )),
];

const fn rule(names: &'static [&'static str], patterns: &'static [&'static str]) -> Rule {
    Rule { names, patterns, ignore_merges: false, add_bos: false }
}

const fn ignoring_merges(rule: Rule) -> Rule {
    Rule { ignore_merges: true, ..rule }
}

const fn with_bos(rule: Rule) -> Rule {
    Rule { add_bos: true, ..rule }
}

#[cfg(all(test, feature = "tokenizers"))]
mod tests {
    use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
    use tokenizers::{OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer, SplitDelimiterBehavior};

    use super::*;

    #[test]
    fn digits_are_grouped_up_to_the_end_of_a_word_as_oniguruma_defines_it() {
        let pattern = SplitPattern::Regex(DIGITS_BY_THREES.to_owned());
        let split = Split::new(pattern, SplitDelimiterBehavior::Isolated, false).unwrap();
        for (text, expected) in [
            ("12345 a", &["12", "345", " a"][..]),
            ("12345\u{200d}a", &["12", "345", "\u{200d}a"]),
            ("12345\u{b2}", &["12345\u{b2}"]),
            ("12345\u{2460}", &["12", "345", "\u{2460}"]),
            ("12345_", &["12345_"]),
        ] {
            let mut pieces = PreTokenizedString::from(text);
            split.pre_tokenize(&mut pieces).unwrap();
            let found = pieces.get_splits(OffsetReferential::Original, OffsetType::Byte);
            assert_eq!(found.iter().map(|piece| piece.0).collect::<Vec<_>>(), expected, "{text}");
        }
    }
}
