"""Answers with tool calls in each family's format go through chat completions, whole and as a stream."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import tiny
from serving import Running, Scripted, scripted, serving
from tool_conversations import USER, Call, Conversation, Family, Generator
from tool_families import FAMILIES

from nybble import Model

CONVERSATIONS = 200 if os.environ.get("NYBBLE_ALL_CONVERSATIONS") else 2
each_family = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.template)


@contextmanager
def saying(family: Family, folder: Path, answers: list[str]) -> Iterator[tuple[Running, Scripted]]:
    """Serves a model with the chat template of a family that gives these answers."""
    changes: dict[str, Any] = {"llama__context_length": 100_000, "tokenizer__chat_template": family.source}
    file = tiny.write_model(folder / "tiny.gguf", layers=1, **changes)
    with Model.load(file, threads=1) as model:
        engine, script = scripted(model, *answers)
        with serving(engine, bare_calls=False) as running:
            yield running, script


def conversations(family: Family) -> list[Conversation]:
    """Conversations whose text is what the template writes."""
    return [Generator(family, seed).conversation() for seed in range(CONVERSATIONS)]


def streamed(running: Running, **parameters: Any) -> tuple[str, list[Call], str]:
    """The content, the calls and the reason of a stream."""
    content, reason = "", ""
    calls: list[tuple[str, str]] = []
    for event in running.chat([USER], stream=True, max_tokens=10_000, **parameters).events:
        (choice,) = event["choices"]
        content += choice["delta"].get("content") or ""
        reason = choice["finish_reason"] or reason
        for call in choice["delta"].get("tool_calls") or []:
            if call["index"] == len(calls):
                assert call["id"]
                calls.append((call["function"]["name"], ""))
            assert call["index"] == len(calls) - 1
            calls[-1] = (calls[-1][0], calls[-1][1] + call["function"]["arguments"])
    return content, [(name, json.loads(arguments)) for name, arguments in calls], reason


@each_family
def test_streams_and_responses_have_the_calls_that_the_template_writes(family: Family, tmp_path: Path) -> None:
    given = conversations(family)
    answers = [family.after_reasoning(each.tools) + family.answer(each) for each in given]
    with saying(
        family, tmp_path, [answer for answer in answers for _ in range(4 - family.template.endswith("tool_use"))]
    ) as (running, script):
        for conversation in given:
            expected = [*conversation.calls]
            reply = running.chat([USER], tools=conversation.tools, max_tokens=10_000)
            assert reply.calls == expected
            assert reply.choice["finish_reason"] == "tool_calls"
            content, calls, reason = streamed(running, tools=conversation.tools)
            assert (calls, reason) == (expected, "tool_calls")
            assert (reply.choice["message"]["content"] or "") == content
            content, calls, _ = streamed(running, tools=conversation.tools, parallel_tool_calls=False)
            assert calls == expected[:1]
            if not family.template.endswith("tool_use"):  # Such a template is used only with tools.
                content, calls, reason = streamed(running, tools=conversation.tools, tool_choice="none")
                assert (calls, reason) == ([], "stop")
                assert all(name in content for name, _ in expected)
            assert all(name in script.prompts[-3] for name in conversation.functions)


@each_family
def test_earlier_calls_and_results_are_in_the_prompt(family: Family, tmp_path: Path) -> None:
    given = conversations(family)
    answers = [f"{family.after_reasoning(each.tools)}Done." for each in given]
    with saying(family, tmp_path, answers) as (running, script):
        for conversation in given:
            turn = conversation.turn
            for call in turn["tool_calls"]:
                call["function"]["arguments"] = json.dumps(call["function"]["arguments"])
            results = [
                {
                    "role": "tool",
                    "tool_call_id": call["id"],
                    "name": call["function"]["name"],
                    "content": f"result {index}",
                }
                for index, call in enumerate(turn["tool_calls"])
            ]
            reply = running.chat([USER, turn, *results], tools=conversation.tools, max_tokens=10_000)
            assert "Done." in reply.choice["message"]["content"]
            prompt = script.prompts[-1]
            end = prompt.rindex(USER["content"])
            assert all(name in prompt[end:] for name, _ in conversation.calls)
            assert all(result["content"] in prompt[end:] for result in results)
