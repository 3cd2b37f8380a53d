"""Reasoning in the chat templates that models are published with: its switches, and answers that come back apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nybble.chat.reasoning import detect_reasoning, template_variables
from nybble.chat.reasoning_splitter import Specials, new_splitter
from nybble.chat.template import ChatTemplate

FOLDER = Path(__file__).parents[2] / "data" / "templates"
WITHOUT = ["Qwen-Qwen2.5-7B-Instruct", "Qwen3-Coder", "meta-llama-Llama-3.1-8B-Instruct"]
TEMPLATES: dict[str, tuple[str, bool, str | None]] = {
    # The marker; whether the prompt opens reasoning that is turned on; and the end of the prompt with reasoning off,
    # or None without a switch.
    "Apertus-8B-Instruct": ("<|inner_prefix|>", False, "<|assistant_start|>"),
    "Bielik-11B-v3.0-Instruct": ("<think>", True, "assistant\n"),
    "ByteDance-Seed-OSS": ("<seed:think>", False, None),
    "Cohere2MoE": ("<|START_THINKING|>", True, "<|START_THINKING|><|END_THINKING|>"),
    "CohereForAI-c4ai-command-r7b-12-2024-tool_use": ("<|START_THINKING|>", False, "<|END_THINKING|>"),
    "GLM-4.6": ("<think>", False, "<think></think>"),
    "Kimi-K2-Thinking": ("<think>", False, None),
    "LFM2.5-8B-A1B": ("<think>", False, None),
    "MiniMax-M2": ("<think>", True, None),
    "NVIDIA-Nemotron-3-Nano-30B-A3B-BF16": ("<think>", True, "<think></think>"),
    "NVIDIA-Nemotron-Nano-v2": ("<think>", True, None),
    "Qwen-Qwen3-0.6B": ("<think>", False, "<think>\n\n</think>\n\n"),
    "Qwen3.5-4B": ("<think>", True, "<think>\n\n</think>\n\n"),
    "Reka-Edge": ("<think>", True, "assistant:"),
    "StepFun3.5-Flash": ("<think>", True, None),
    "deepseek-ai-DeepSeek-V3.1": ("<think>", True, "<think></think>"),
    "deepseek-ai-DeepSeek-V4": ("<think>", True, "</think>"),
    "google-gemma-4-31B-it": ("<|channel>thought", False, "<|channel>thought\n<channel|>"),
    "ibm-granite-granite-3.3-2B-Instruct": ("<think>", False, "<|end_of_role|>"),
    "inclusionai-ling-3.0-flash": ("<think>", True, "<think></think>"),
    "llama-cpp-deepseek-r1": ("<think>", True, None),
    "mistralai-Ministral-3-14B-Reasoning-2512": ("[THINK]", False, None),
    "openai-gpt-oss-120b": ("<|channel|>analysis<|message|>", True, "<|start|>assistant"),
    "tencent-Hy3": ("<think:opensource>", True, "<think:opensource></think:opensource>"),
    "unsloth-Apriel-1.5": ("Here are my reasoning steps:", False, None),
    "upstage-Solar-Open-100B": ("<|think|>", False, "<|begin|>assistant"),
    "written-ernie-4.5-thinking": ("<think>", True, None),
}
DROP_EARLIER_REASONING = [
    "Apertus-8B-Instruct", "CohereForAI-c4ai-command-r7b-12-2024-tool_use", "Kimi-K2-Thinking",
    "NVIDIA-Nemotron-Nano-v2", "deepseek-ai-DeepSeek-V3.1", "google-gemma-4-31B-it",
    "ibm-granite-granite-3.3-2B-Instruct", "llama-cpp-deepseek-r1", "unsloth-Apriel-1.5", "upstage-Solar-Open-100B",
]  # fmt: skip
"""Templates that leave the reasoning of answers without calls out of the prompt."""
HI = {"role": "user", "content": "Hi"}
TOKENS: dict[str, Any] = {"bos_token": "<s>", "eos_token": "</s>"}


def source(name: str) -> str:
    return (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")


def prompt_of(template: ChatTemplate, text: str, enabled: bool | None) -> str:
    variables = template_variables(text, template.variables, enabled=enabled)
    return template.render([HI], add_generation_prompt=True, **TOKENS, **variables)


@pytest.mark.parametrize("name", WITHOUT)
def test_templates_of_models_that_do_not_reason_have_no_format(name: str) -> None:
    assert detect_reasoning(source(name)) is None


@pytest.mark.parametrize("name", TEMPLATES)
def test_each_template_has_its_format_and_its_switches(name: str) -> None:
    start, is_open, off = TEMPLATES[name]
    text = source(name)
    template, known = ChatTemplate(text), detect_reasoning(text)
    assert known is not None
    assert known.start == start
    assert known.is_open(prompt_of(template, text, True)) == is_open
    assert bool(template_variables(text, template.variables, enabled=False)) == (off is not None)
    if off is not None:
        assert prompt_of(template, text, False).endswith(off)


@pytest.mark.parametrize("name", [name for name in TEMPLATES if name not in DROP_EARLIER_REASONING])
def test_an_answer_in_the_history_comes_back_apart(name: str) -> None:
    text = source(name)
    template, known = ChatTemplate(text), detect_reasoning(text)
    assert known is not None
    prompt = prompt_of(template, text, True)
    answer = {"role": "assistant", "content": "The answer.", "reasoning_content": "A <b>thought</b>."}
    variables = template_variables(text, template.variables, enabled=True)
    whole = template.render([HI, answer], **TOKENS, **variables)
    assert whole.startswith(prompt)
    written = whole[len(prompt) :]
    for size in (1, 3, len(written)):
        splitter = new_splitter(known, prompt, Specials())
        pieces = [written[start : start + size] for start in range(0, len(written), size)]
        parts = [part for piece in pieces for part in splitter.push(piece)] + splitter.finish()
        reasoning = "".join(part.text for part in parts if part.kind == "reasoning")
        content = "".join(part.text for part in parts if part.kind == "content")
        assert reasoning == "A <b>thought</b>."
        # The marker that ends a turn is a token that ends the completion.
        assert content.startswith("The answer.")


@pytest.mark.parametrize("name", DROP_EARLIER_REASONING)
def test_a_template_that_drops_earlier_reasoning_may_do_so(name: str) -> None:
    answer = {"role": "assistant", "content": "The answer.", "reasoning_content": "A thought."}
    whole = ChatTemplate(source(name)).render([HI, answer, HI], add_generation_prompt=True, **TOKENS)
    assert "The answer." in whole
    assert "A thought." not in whole
