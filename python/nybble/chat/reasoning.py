"""Reasoning: how models mark what they think before they answer, as data, recognized from the chat template."""

from __future__ import annotations

import functools
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

NO_LIMIT = 2**31 - 1
"""A budget of reasoning tokens that no model reaches."""

CHANNEL, MESSAGE, START, END = "<|channel|>", "<|message|>", "<|start|>", "<|end|>"
"""The markers of Harmony, the format of gpt-oss."""


@dataclass(frozen=True)
class ReasoningFormat:
    """How a model family marks reasoning: as a block between two markers, or as a channel."""

    start: str
    """The marker before reasoning."""
    end: str
    """The marker after reasoning."""
    closing: str
    """What ends reasoning by force, and leads to the answer."""
    leads: tuple[str, ...] = ()
    """Markers at the beginning of the answer, which are not part of it."""
    trailers: tuple[str, ...] = ()
    """Markers at the end of the answer, which are not part of it."""
    breaks: tuple[str, ...] = ()
    """Markers that end reasoning without its end marker. They belong to the answer."""
    channels: bool = False
    """Messages have channels, as in Harmony, and each has its header."""
    as_parts: bool = False
    """Templates read the reasoning of earlier answers from parts of the content."""

    @property
    def markers(self) -> tuple[str, ...]:
        """All markers. In some vocabularies they are special tokens, which decode to no text."""
        own = (START, CHANNEL, MESSAGE, END) if self.channels else ()
        return (*own, self.start, self.end, *self.leads, *self.trailers, *self.breaks)

    def is_open(self, prompt: str) -> bool:
        """Whether a prompt ends where reasoning comes next: within a block, or before the first channel."""
        return prompt.rstrip().endswith(START + "assistant" if self.channels else self.start)

    def opened(self, prompt: str) -> str:
        """A prompt that ends where reasoning comes next, unless the template has closed it."""
        if self.channels or self.is_open(prompt) or prompt.rstrip().endswith(self.end):
            return prompt
        return prompt + self.start + ("\n" if self.closing.startswith("\n") else "")

    def closed(self, prompt: str) -> str:
        """A prompt that ends where the answer comes next."""
        if not self.is_open(prompt):
            return prompt
        return f"{prompt}{CHANNEL}final{MESSAGE}" if self.channels else prompt + self.closing


def _block(start: str, end: str, closing: str = "", **more: Any) -> ReasoningFormat:
    return ReasoningFormat(start, end, closing or f"\n{end}\n\n", **more)


HARMONY = ReasoningFormat(
    f"{CHANNEL}analysis{MESSAGE}",
    END,
    f"{END}{START}assistant{CHANNEL}final{MESSAGE}",
    channels=True,
)
_THINK = _block("<think>", "</think>", breaks=("<|tool_calls_section_begin|>",))
_FORMATS = (
    _block("<|channel>thought", "<channel|>", "\n<channel|>"),  # Gemma 4
    _block("[THINK]", "[/THINK]", "[/THINK]", as_parts=True),  # Mistral since Magistral
    _block("<seed:think>", "</seed:think>"),  # Seed-OSS
    _block("<mm:think>", "</mm:think>"),  # MiniMax M3
    _block("<think:opensource>", "</think:opensource>"),  # Hunyuan 3
    _block(
        "<|START_THINKING|>", "<|END_THINKING|>", "<|END_THINKING|>",
        leads=("<|START_RESPONSE|>", "<|START_TEXT|>"), trailers=("<|END_RESPONSE|>", "<|END_TEXT|>"),
    ),  # Command R7B, Command A
    _block("<|inner_prefix|>", "<|inner_suffix|>", "<|inner_suffix|>"),  # Apertus
    _block(
        "<|think|>", "<|end|>", "<|end|><|begin|>assistant<|content|>",
        leads=("<|begin|>assistant<|content|>", "<|content|>"),
    ),  # Solar Open
    _block("<|open|>think<|sep|>", "<|close|>think<|sep|>", "<|close|>think<|sep|>",
           leads=("<|open|>response<|sep|>",), trailers=("<|close|>response<|sep|>",)),  # Kimi K3
    _block("◁think▷", "◁/think▷"),  # Kimi-VL
    _block("<|begin_of_thought|>", "<|end_of_thought|>",
           leads=("<|begin_of_solution|>",), trailers=("<|end_of_solution|>",)),  # OpenThinker
    _block("Here are my reasoning steps:", "[BEGIN FINAL RESPONSE]",
           trailers=("[END FINAL RESPONSE]",)),  # Apriel
    _block("Here is my thought process:", "Here is my response:"),  # Granite 3.2
    _block("<think>", "</think>", "\n</think>\n\n<response>",
           leads=("<response>",), trailers=("</response>",)),  # Granite 3.3, ERNIE 4.5
    _THINK,  # DeepSeek, Qwen 3, GLM, SmolLM3, MiniMax M2, Nemotron, EXAONE 4, Hunyuan, LFM2.5 and most others
    _block("<thinking>", "</thinking>"),
    _block("<reasoning>", "</reasoning>"),  # Reka Flash 3
)  # fmt: skip

_SPELLED_BY_TEMPLATES = {
    # Templates that put the markers together from parts.
    "<|open|>think<|sep|>": ("<|open|>", "'think'", "<|sep|>"),
    "<|think|>": ("assistant<|think|>", "<|content|>"),
    "<think:opensource>": ("<think{}>", ":opensource"),
    # Thoughts between tags are told from tools that happen to be named so.
    "<thinking>": ("<thinking>", "</thinking>"),
    "<reasoning>": ("<reasoning>", "</reasoning>"),
}


@functools.lru_cache(maxsize=64)
def detect_reasoning(template: str) -> ReasoningFormat | None:
    """The format of the reasoning that a chat template provides for; None if it provides for none."""
    if CHANNEL in template and MESSAGE in template and START in template:
        return HARMONY if "analysis" in template else None
    for known in _FORMATS:
        signs = _SPELLED_BY_TEMPLATES.get(known.start, ())
        if known.leads == ("<response>",):
            signs = (known.end, known.start, *known.leads)
        elif not signs:
            # Many templates only remove the reasoning of earlier answers, up to its end marker.
            signs = (known.end,) if known is _THINK else (known.start, known.end)
            if known.start.startswith("Here are"):
                signs = (known.end,)  # Some templates leave the beginning to the model.
        if all(sign in template for sign in signs):
            return known
    return None


class Vocabulary(Protocol):
    """The part of a tokenizer that finds the markers of a format."""

    @property
    def chat_templates(self) -> Mapping[str, str]:
        """The chat templates by name."""

    @property
    def special_ids(self) -> frozenset[int]:
        """The special tokens, which decode to no text."""

    def id_of(self, text: str) -> int | None:
        """The id of the token with this spelling; None if there is none."""


def reasoning_format(tokenizer: Vocabulary) -> ReasoningFormat | None:
    """The format of a model's reasoning; None if its chat template provides for none."""
    templates = tokenizer.chat_templates
    return detect_reasoning("\n".join([templates.get("default", ""), templates.get("tool_use", "")]))


_FRAGMENT = re.compile(r"<[^<>]*>|\[[^\[\]]*\]")


def special_markers(tokenizer: Vocabulary, markers: Collection[str]) -> dict[int, str]:
    """The special tokens that markers consist of, by id, each with its spelling."""
    found = {}
    for fragment in {fragment for marker in markers for fragment in _FRAGMENT.findall(marker)}:
        token = tokenizer.id_of(fragment)
        if token is not None and token in tokenizer.special_ids:
            found[token] = fragment
    return found


EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")
"""Efforts of reasoning, ascending, under the names of OpenAI and of chat templates."""


def template_variables(
    template: str,
    names: Collection[str],
    *,
    enabled: bool | None = None,
    effort: str | None = None,
    budget: int | None = None,
) -> dict[str, Any]:
    """The variables by which a chat template turns reasoning on and off, and sets its effort.

    Args:
        template: The source of the template.
        names: The variables that it reads.
        enabled: Whether to reason; None as the template decides.
        effort: One of `EFFORTS`, or a name of the template's own; None as the template decides. Any but "none" also
            turns reasoning on.
        budget: The largest number of tokens of reasoning, for templates that name it in the prompt.
    """
    if enabled is None and effort is not None:
        enabled = effort != "none"
    elif enabled is False:
        effort = "none"
    found: dict[str, Any] = {}
    if enabled is not None:
        switches = ("enable_thinking", "thinking", "enable_reasoning", "reasoning")
        found |= {name: enabled for name in switches if name in names}
        if "thinking_mode" in names:
            found["thinking_mode"] = "enabled" if enabled else "disabled"
    if effort is None and enabled and "'no_think'" in template:
        effort = "high"
    if effort is not None:
        if "reasoning_effort" in names:
            found["reasoning_effort"] = _known_effort(template, effort)
        if "thinking_effort" in names and effort != "none":
            found["thinking_effort"] = {"minimal": "low", "medium": "high", "xhigh": "max"}.get(effort, effort)
    if budget is not None and budget < NO_LIMIT and "thinking_budget" in names:
        found["thinking_budget"] = budget
    return found


def _known_effort(template: str, effort: str) -> str:
    """An effort under the nearest name that a template accepts."""
    if effort not in EFFORTS:
        return effort
    if "'no_think'" in template:  # Hunyuan refuses other names.
        return {"none": "no_think", "minimal": "low", "low": "low"}.get(effort, "high")
    if CHANNEL in template:  # gpt-oss was trained with three.
        return {"none": "low", "minimal": "low", "xhigh": "high", "max": "high"}.get(effort, effort)
    return effort


def for_template(messages: list[dict[str, Any]], template: str) -> list[dict[str, Any]]:
    """Puts the reasoning of earlier answers where a chat template reads it.

    Args:
        messages: The messages, as `conversation.turns` returns them.
        template: The source of the template.
    """
    known = detect_reasoning(template)
    if known is None:
        return messages
    return [_placed(message, known, template) if message["role"] == "assistant" else message for message in messages]


def _placed(message: dict[str, Any], known: ReasoningFormat, template: str) -> dict[str, Any]:
    reasoning, content = message.get("reasoning_content"), message.get("content")
    if not isinstance(reasoning, str) or not reasoning:
        return message
    if known.as_parts and "reasoning_content" not in template:
        rest = [{"type": "text", "text": content}] if isinstance(content, str) and content else content or []
        if isinstance(rest, (list, tuple)):
            return {**message, "content": [{"type": "thinking", "thinking": reasoning}, *rest]}
    if known.channels and message.get("tool_calls") and isinstance(content, str) and content:
        # The template takes either of them before a call.
        both = f"{reasoning}\n\n{content}"
        names: dict[str, Any] = {name: both for name in ("thinking", "reasoning_content") if name in message}
        return {**message, **names, "content": ""}
    return message
