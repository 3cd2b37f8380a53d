r"""The rules by which byte-level vocabularies split a text into words before merges are applied.

GGUF files name the rule in `tokenizer.ggml.pre`. A rule is a list of patterns. Each pattern splits all pieces that the
patterns before it left into the matches and the text between them. Names and rules are those of llama.cpp. It
approximates the patterns of tekken and gpt-4o, because its regular expressions do not support `\p{Lu}`. The rules here
are the models' own patterns, with which they were trained.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace

from tokenizers import Regex, pre_tokenizers

from nybble.errors import ModelError


@dataclass(frozen=True)
class PreTokenizer:
    """The rule behind a `tokenizer.ggml.pre` name."""

    patterns: tuple[str, ...]
    ignore_merges: bool = False
    """A word that is a token is encoded as that token, without merges."""
    add_bos: bool = False
    """Whether encoding adds the start token if `tokenizer.ggml.add_bos_token` is missing."""

    def build(self) -> pre_tokenizers.PreTokenizer:
        """The rule for the `tokenizers` package. Its last step replaces bytes by the characters that stand for them."""
        splits: list[pre_tokenizers.PreTokenizer] = [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in self.patterns
        ]
        return pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def find(name: str | None) -> PreTokenizer:
    """The rule with a name. An unknown or missing name gives a warning and the rule `default`.

    Raises:
        ModelError: The name belongs to a vocabulary that is not byte-level.
    """
    if name is None:
        warnings.warn(
            "the file does not name its pre-tokenizer (tokenizer.ggml.pre): using 'default', which may split words "
            "differently from the model's training",
            stacklevel=2,
        )
        return _RULES["default"]
    if name in _NOT_BYTE_LEVEL:
        raise ModelError(f"key 'tokenizer.ggml.pre': found {name!r}, expected a byte-level pre-tokenizer")
    if name not in _RULES:
        warnings.warn(
            f"unknown pre-tokenizer {name!r} (tokenizer.ggml.pre): using 'default', which may split words differently "
            "from the model's training",
            stacklevel=2,
        )
    return _RULES.get(name, _RULES["default"])


def names() -> tuple[str, ...]:
    """The names of all rules."""
    return tuple(_RULES)


# --- Building blocks of the patterns ----------------------------------------------------------------------------------

# Spelled out, since `(?i:...)` also matches characters that fold to ASCII, such as the long s.
_CONTRACTION = r"'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD]"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_SYMBOLS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_SYMBOLS_OR_SLASH = r" ?[^\s\p{L}\p{N}]+[\r\n/]*"
_DIGITS_FROM_THE_RIGHT = r"\p{N}{1,3}(?=(?:\p{N}{3})*(?!\p{N}))"


def _any(*patterns: str) -> str:
    return "|".join(patterns)


def _cased(digits: str, *, contraction: bool = True) -> str:
    """A pattern whose words end before an upper-case letter that follows a lower-case letter."""
    upper, lower = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
    first, last = r"[^\r\n\p{L}\p{N}]?", f"(?:{_CONTRACTION})?" if contraction else ""
    return _any(f"{first}{upper}*{lower}+{last}", f"{first}{upper}+{lower}*{last}", digits, _SYMBOLS_OR_SLASH, _SPACES)


_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_LLAMA3 = _any(_CONTRACTION, _WORD, r"\p{N}{1,3}", _SYMBOLS, _SPACES)
_QWEN2 = _any(_CONTRACTION, _WORD, r"\p{N}", _SYMBOLS, _SPACES)

# The letters of DeepSeek's first models: the cased letters of Unicode, without later additions.
_DEEPSEEK_LETTERS = (
    "A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-\u0373"
    "\u0376\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f"
    "\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77"
    "\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d\u1f5f-\u1f7d"
    "\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec\u1ff2-\u1ff4"
    "\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d\u212f-\u2134\u2139"
    "\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d"
    "\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a"
    "\uff41-\uff5a\U00010400-\U0001044f\U000104b0-\U000104d3\U000104d8-\U000104fb\U00010c80-\U00010cb2"
    "\U00010cc0-\U00010cf2\U000118a0-\U000118df\U0001e900-\U0001e943"
)
_DEEPSEEK_PUNCTUATION = "!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002"
_DEEPSEEK_EAST_ASIAN = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
_HAN_AND_KANA = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
_ASCII_SYMBOL_AND_WORD = r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"
_WORD_WITH_COMBINING_MARKS = r"[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
_DEEPSEEK3_TEXT = _any(_ASCII_SYMBOL_AND_WORD, _WORD_WITH_COMBINING_MARKS, r" ?[\p{P}\p{S}]+[\r\n]*", _SPACES)
_BLOOM = " ?[^(\\s|.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c)]+"
_AFMOE_SCRIPTS = (
    "[\u4e00-\u9fff\u3400-\u4dbf\uf900-\ufaff\u3040-\u309f\u30a0-\u30ff\uff65-\uff9f\u2f00-\u2fdf\u0e00-\u0e7f"
    "\u0e80-\u0eff\u1780-\u17ff\u1000-\u109f\uaa60-\uaa7f\ua9e0-\ua9ff\uac00-\ud7af\u1100-\u11ff]+"
)
_YOUTU_SCRIPTS = _any(
    "[\uac00-\ud7a3\u3131-\u318e]+",
    "[\uff01\u2026\u201c\u201d\u2018\u2019\u2014\uff1a\uff1b\uff0c\u3001-\u303f\ufe30-\ufe4f]+",
    "[\u3105-\u312f]+",
    _HAN_AND_KANA,
)
_JAIS2_SPACES = _any(*(rf"\s{{{n}}}(?!\S)" for n in (512, 256, 128, 64, 32, 16, 8, 4)), r"\s{1,2}(?!\S)", r"\s")
_KIMI_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_KIMI_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"

# --- The rules --------------------------------------------------------------------------------------------------------

_gpt2 = PreTokenizer((_GPT2,))
_digits_then_gpt2 = PreTokenizer((r"\p{N}", _GPT2))
_llama3 = PreTokenizer((_LLAMA3,), ignore_merges=True, add_bos=True)
_qwen2 = PreTokenizer((_QWEN2,))
_deepseek3 = PreTokenizer((r"\p{N}{1,3}", _HAN_AND_KANA, _DEEPSEEK3_TEXT))
_gpt4o = PreTokenizer((_cased(r"\p{N}{1,3}"),))
_bloom = PreTokenizer((_BLOOM,))
_bailing = PreTokenizer((_any(_CONTRACTION, _WORD, r"\p{N}", _SYMBOLS, r"\s*[\r\n]|\s+(?!\S)|\s+"),))
_tiny_aya = PreTokenizer((r"\d{1,3}(?=(?:\d{3})*\b)", _cased(r"\p{N}{1,3}")))

_RULES: dict[str, PreTokenizer] = {
    "default": PreTokenizer((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
    # The pattern of GPT-2.
    **dict.fromkeys(
        ("gpt-2", "mpt", "olmo", "jais", "trillion", "granite-docling", "phi-2", "gigachat", "a.x-4.0", "mellum"), _gpt2
    ),
    **dict.fromkeys(("modern-bert", "roberta-bpe", "exaone4", "jina-es", "jina-de"), _gpt2),
    **dict.fromkeys(("jina-v1-en", "jina-v2-es", "jina-v2-de", "jina-v2-code"), _gpt2),
    # Single digits, then the pattern of GPT-2.
    **dict.fromkeys(
        ("starcoder", "refact", "command-r", "smollm", "codeshell", "exaone", "minerva-7b", "mellum2"),
        _digits_then_gpt2,
    ),
    "falcon": PreTokenizer((r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, "[0-9][0-9][0-9]")),
    # The pattern of Llama 3: up to three digits, and symbols with the line breaks after them.
    **dict.fromkeys(
        ("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"), _llama3
    ),
    "jina-v5-nano": _llama3,
    **dict.fromkeys(("dbrx", "smaug-bpe", "chatglm-bpe", "glm4"), PreTokenizer((_LLAMA3,))),
    "jais-2": PreTokenizer((_any(_CONTRACTION, _WORD, r"\p{N}{1,3}", _SYMBOLS, r"\s*[\r\n]+", _JAIS2_SPACES),)),
    "minicpm5": PreTokenizer(
        (r"\p{N}{1,3}", _any(_CONTRACTION, _WORD, r"\p{N}+", _SYMBOLS, _SPACES)), ignore_merges=True
    ),
    # The pattern of Qwen 2: that of Llama 3 with single digits.
    **dict.fromkeys(
        ("qwen2", "stablelm2", "deepseek-r1-qwen", "megrez", "hunyuan", "solar-open", "grok-2", "kormo", "f2llmv2"),
        _qwen2,
    ),
    "qwen35": PreTokenizer(
        (
            _any(
                _CONTRACTION,
                r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+",
                r"\p{N}",
                r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*",
                _SPACES,
            ),
        )
    ),
    "laguna": PreTokenizer((r"[^\n]+|[\n]+", _QWEN2)),
    "ufakzeka": PreTokenizer((_any(_WORD, r"\p{N}", _SYMBOLS, _SPACES),)),
    "seed-coder": PreTokenizer((_any(_CONTRACTION, _WORD, r"\p{N}", r" ?[^\s\p{L}\p{N}]+", _SPACES),)),
    **dict.fromkeys(("bailingmoe", "bailingmoe2", "llada-moe"), _bailing),
    "exaone-moe": PreTokenizer(
        (
            _any(
                _CONTRACTION,
                r"[^\r\n\p{L}\p{N}]?(?:\p{L}\p{M}*(?: \p{L}\p{M}*)*)+",
                r"\p{N}",
                r" ?[^\s\p{L}\p{N}]+[\r\n/]?",
                r"\s*[\r\n]|\s+(?!\S)|\s+",
            ),
        )
    ),
    # DeepSeek, by generation.
    "deepseek-llm": PreTokenizer(
        (
            r"[\r\n]",
            rf"\s?[{_DEEPSEEK_LETTERS}]+",
            rf"\s?[{_DEEPSEEK_PUNCTUATION}]+",
            r"\s+$",
            _DEEPSEEK_EAST_ASIAN,
            r"\p{N}+",
        )
    ),
    "deepseek-coder": PreTokenizer((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _DEEPSEEK_EAST_ASIAN, r"\p{N}")),
    **dict.fromkeys(("deepseek-v3", "hunyuan-dense", "joyai-llm", "hy_v4"), _deepseek3),
    "spark2_5": PreTokenizer(
        (
            r"\p{N}{1,3}",
            _HAN_AND_KANA,
            _any(_ASCII_SYMBOL_AND_WORD, _WORD_WITH_COMBINING_MARKS, r" ?[\p{P}\p{S}]+", r"[\r\n]", r"\s+(?!\S)|\s+"),
            r"\p{N}",
        )
    ),
    "afmoe": PreTokenizer((_DIGITS_FROM_THE_RIGHT, _AFMOE_SCRIPTS, _DEEPSEEK3_TEXT)),
    # Words split by case.
    "tekken": PreTokenizer((_cased(r"\p{N}", contraction=False),), ignore_merges=True, add_bos=True),
    **dict.fromkeys(("gpt-4o", "llama4", "kanana2", "talkie", "minimax-m2"), _gpt4o),
    "granite-embed-multi-97m": replace(_gpt4o, ignore_merges=True),
    "youtu": PreTokenizer((_YOUTU_SCRIPTS, _cased(r"\p{N}")), ignore_merges=True),
    **dict.fromkeys(("tiny_aya", "cohere2moe"), _tiny_aya),
    "kimi-k2": PreTokenizer(
        (
            _any(
                r"\p{Han}+",
                rf"[^\r\n\p{{L}}\p{{N}}]?{_KIMI_UPPER}*{_KIMI_LOWER}+(?:{_CONTRACTION})?",
                rf"[^\r\n\p{{L}}\p{{N}}]?{_KIMI_UPPER}+{_KIMI_LOWER}*(?:{_CONTRACTION})?",
                r"\p{N}{1,3}",
                _SYMBOLS,
                _SPACES,
            ),
        )
    ),
    # Others.
    **dict.fromkeys(("bloom", "poro-chat", "gpt3-finnish"), _bloom),
    "viking": PreTokenizer((_BLOOM, r"\p{N}")),
    "superbpe": PreTokenizer((r"\p{N}+", r"(?=(\d{3})+(?!\d))")),
    "chameleon": PreTokenizer(
        (
            r"<sentinel:[0-9]+>",
            r"(IMGIMG)((A|B|C|D|E|F|G|H|I){1,4})Z",
            r"([\t\n]|    |  )",
            r"\p{N}",
            r"[\p{P}!-/:-@\[-`{-~]",
            _GPT2,
        ),
        add_bos=True,
    ),
}

# Their tokens are text, not bytes.
_NOT_BYTE_LEVEL = frozenset({"gemma4", "sarvam-moe", "granite-embed-multi-311m", "whitespace"})
