"""Finds turns of phrase and old names that the project's language rules replace: python scripts/check_language.py

Checks comments, strings, documents and function names in every tracked *.py, *.rs, *.js, *.css, *.md, *.html and *.toml
file. Prints `file:line: found -> better` for each place and exits with 1 if there is any.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
SUFFIXES = {".py", ".rs", ".js", ".css", ".md", ".html", ".toml"}
SKIPPED = (
    "tests/data/",
    "scripts/check_language.py",
    "tests/python/repository/test_language.py",
    "python/nybble/server/page/vendor/",  # The libraries of others.
)

# Phrases in prose and in function names. A space matches any white space, line breaks included. A match of the group
# `ok` is correct use.
UNIT = "tokens|bytes|bits|m?s|microseconds|values|numbers|pieces|threads|slices|operations|nats|reductions|words"
PER = "block|byte|call|character|column|CPU|entry|family|file|group|head|hour|instruction set|kernel|layer|line|matrix"
PER += "|minute|model|page|panel|pass|request|row|sequence|second|step|task|tensor|test|thread|token|weight|word|worker"
PROSE = [
    ("can ?not be had", "cannot be combined, is not available"),
    ("held to (an?|the|their|its|this|that|these|those|one|what|it)", "constrained to, checked against"),
    ("to the bit", "bit-identical"),
    ("what (it|that|this|they|these) tells?", "what it contains, reports, says"),
    ("tells? the rest|the rest is told", "see ... for the full API"),
    ("(found|expected) one that", "say what was found: 'sequence has already been stepped'"),
    (
        "(?P<ok>there )?(is|are|was|were) no (?!longer|more|less|fewer|such|different|better|worse|later|op)[a-z]+",
        "is not a",
    ),
    ("so many", "the number, N, this many"),
    ("(goes|go|went|going) on(?! (to|the|a) )", "continues"),
    ("beside", "next to, alongside, besides"),
    ("of which", "two sentences, or 'whose'"),
    (rf"(one|two|three|four|five|{UNIT}) an? ({PER})", "per"),
    (rf"an? (kernel|line|name|row|test|file|task|token|call|entry) an? ({PER})", "per, for each"),
    ("whatever the (number|size|order)", "for any number of"),
    ("as many as", "at most, up to, the same number as"),
    ("texts", "prompts, requests, completions, documents, strings"),
    ("letters", "characters"),
    ("(the|these|those|its|their|special) marks", "special tokens"),
    ("rooms?", "buffer, workspace, capacity, space, folder"),
    ("guess(es|ed|ing)?", "draft, estimate"),
    ("who (calls?|reads?|uses?|asks?|imports?|holds?|writes?|changes|wants)", "callers, code that, to ..."),
    ("which bears? (that|it)|bears? out", "is safe if, matches"),
    ("(no figure|figures?|times?) stands?", "is printed, is omitted"),
    ("(frees|takes) a place", "frees the slot"),
    ("in the making", "being built"),
    ("of no account", "irrelevant"),
]  # fmt: skip
# Files in which a phrase is correct: "letters" is the Unicode category, "texts" the former name of a module.
ALLOWED = {"letters": ("pretokenizer", "schema", "chat/template", "unicode"), "texts": ("python/nybble/__init__.py",)}

# Names in code: where the rule applies, the old name, the new one.
NAMES = [
    ("src/threads/|tests/engine/threads", "Team|team", "pool"),
    ("src/threads/|tests/engine/threads", "Crew|crew", "workers"),
    ("src/threads/|tests/engine/threads", "Board|board", "job slot"),
    ("src/threads/|tests/engine/threads", "Bell|bell", "waker"),
    ("src/threads/|tests/engine/threads", "Patience|patience", "spin time"),
    ("src/", "Room|room", "workspace"),
    ("src/model/", "Joining|joining", "branch output"),
    ("src/model/", "Inward|inward|Outward|outward", "in_proj, out_proj"),
    ("src/model/", "More", "Quirks"),
    ("src/model/", "Numbers", "KvSlice"),
    ("src/model/", "unmapped", "mmap"),
    ("src/model/", "usual", "default"),
    ("src/engine/|src/python", "Held", "ConstrainedSampler"),
    ("src/", "guess(es|ed)?", "draft"),
    ("src/engine/", "look_up", "ngram_lookup"),
    ("src/engine/", "displaced?", "preempt"),
    ("src/engine/|src/python", "Pace|pace", "PrefillBudget"),
    ("src/engine/|src/model/", "adopt|exchange", "attach_page, replace_page"),
    ("src/quantize/", "Flow|flow", "pipeline"),
    ("src/quantize/", "Journal|journal", "resume log"),
    ("src/quantize/", "Overlay|overlay", "PatchedCheckpoint"),
    ("src/quantize/", "Saved|(?<=mod )saved", "snapshot"),
    ("src/quantize/", "Learned|(?<=mod )learned", "adam"),
    ("src/quantize/", "Policy|policy", "overrides"),
    ("src/quantize/", "(?<=mod )problem", "layer_problem"),
    ("src/quantize/", "(?<=mod )fold", "norm_scaling"),
    ("src/quantize/", "(?<=mod )stream", "spill buffer"),
    ("src/quantize/", "(?<=mod )decoder", "backprop"),
    ("src/quant/|src/kernels/", "Lines?", "CacheLine, AlignedBuf"),
    ("src/quant/|src/kernels/", "coming", "prefetch"),
    ("src/", "TALLEST", "MAX_TILE_ROWS"),
    ("python/nybble/server/", "Run", "AnswerGroup"),
    ("python/nybble/server/", "guard", "middleware"),
    ("python/nybble/server/", r"limited(?=\()", "with_timeout"),
    ("python/nybble/server/", r"whole(?=\()", "collect"),
    ("python/|tests/", "unless_gone", "cancel_on_disconnect"),
    ("python/|tests/", "told_to_the_client", "as_api_errors"),
]

COMMENT_OR_STRING = {
    ".rs": re.compile(
        r"""//[^\n]*|/\*.*?\*/|b?r(?P<hashes>#*)".*?"(?P=hashes)|b?"(?:\\.|[^"\\])*"|(?P<skip>'(?:\\.|[^\\'\n])')""",
        re.S,
    ),
    ".js": re.compile(
        r"""//[^\n]*|/\*.*?\*/|`(?:\\.|[^`\\])*`|"(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])*'""",
        re.S,
    ),
    ".py": re.compile(
        r"""\#[^\n]*|[rbfuRBFU]{0,2}(?P<quotes>\"\"\"|''')(?:\\.|.)*?(?P=quotes)"""
        r"""|[rbfuRBFU]{0,2}"(?:\\.|[^"\\\n])*"|[rbfuRBFU]{0,2}'(?:\\.|[^'\\\n])*'""",
        re.S,
    ),
}


def blank(text: str) -> str:
    """Replaces everything but line breaks by spaces."""
    return re.sub(r"[^\n]", " ", text)


def split(text: str, suffix: str) -> tuple[str, str]:
    """Splits `text` into prose and code, each with the other blanked out. Code in backticks belongs to neither."""
    if suffix not in COMMENT_OR_STRING:
        return re.sub(r"`[^`\n]*`", lambda code: blank(code[0]), text), ""
    prose, code, end = [], [], 0
    for part in COMMENT_OR_STRING[suffix].finditer(text):
        gap = text[end : part.start()]
        words = blank(part[0]) if part.groupdict().get("skip") else part[0]
        words = re.sub(r"(?m)^(\s*)(//[/!]?|#)|^//[/!]?", lambda lead: blank(lead[0]), words)
        prose += [blank(gap), re.sub(r"`[^`\n]*`", lambda span: blank(span[0]), words)]
        code += [gap, blank(part[0])]
        end = part.end()
    prose.append(blank(text[end:]))
    code.append(text[end:])
    return "".join(prose), "".join(code)


def faults(path: str, text: str) -> Iterator[tuple[int, str, str]]:
    """Yields the line, the match and its replacement."""
    prose, code = split(text, Path(path).suffix)
    functions = re.compile(r"\b(?:fn|def)\s+(\w+)")
    named = [(found.start(1), found[1].replace("_", " ")) for found in functions.finditer(code)]
    # Most phrases occur nowhere, which is soon found without the blanks.
    summary = " | ".join(" ".join(words.split()) for words in [prose, *(name for _, name in named)])
    for pattern, better in PROSE:
        if any(part in path for part in ALLOWED.get(pattern, ())):
            continue
        expression = re.compile(r"\b(?:" + pattern.replace(" ", r"\s+") + r")(?!\w)", re.I)
        if expression.search(summary) is None:
            continue
        for at, words in [(0, prose), *named]:
            for found in expression.finditer(words):
                if not found.groupdict().get("ok"):
                    yield text.count("\n", 0, at + found.start()) + 1, " ".join(found[0].split()), better
    for folder, pattern, better in NAMES:
        if re.match(folder, path):
            for found in re.finditer(rf"\b(?:{pattern})\b", code):
                yield text.count("\n", 0, found.start()) + 1, found[0], better


def main() -> int:
    listing = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    paths = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    count = 0
    for path in sorted(set(paths)):
        file = ROOT / path
        if file.suffix not in SUFFIXES or path.startswith(SKIPPED) or not file.exists():
            continue
        for line, found, better in sorted(faults(path, file.read_text(encoding="utf-8"))):
            print(f"{path}:{line}: {found} -> {better}")
            count += 1
    if count:
        print(f"{count} places do not follow the project's language rules", file=sys.stderr)
    return 1 if count else 0


if __name__ == "__main__":
    sys.exit(main())
