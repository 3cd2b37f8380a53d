"""Reasoning is told from the answer, by the markers of each family, and its budget ends it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import hypothesis
import hypothesis.strategies as st
import pytest
import tiny

from nybble import Model, SamplingOptions
from nybble.chat.reasoning import HARMONY, detect_reasoning, template_variables
from nybble.chat.reasoning_splitter import OutputPart, Specials, Splitter, new_splitter
from nybble.chat.template import ChatTemplate
from nybble.engine import Engine
from nybble.generation.reasoning import ReasoningChoice, chat_prompt
from nybble.tokenizer import Tokenizer

THINK = "{% if '</think>' in messages[0].content %}<think>{% endif %}"
GRANITE = "Write your thoughts between <think></think> and write your response between <response></response>."
GPT_OSS = "Valid channels: analysis, commentary, final. <|start|>assistant<|channel|>analysis<|message|>"
CALL = '<|channel|>commentary to=functions.f <|constrain|>json<|message|>{"a": 1}'

FAMILIES: dict[str, tuple[str, str, str, str, str]] = {
    # Signs in the template, the end of the prompt, the output, its reasoning and its content.
    "think": (THINK, "", "<think>\nOne.\n\nTwo.\n</think>\n\nYes.\n", "One.\n\nTwo.", "Yes.\n"),
    "opened": (THINK, "<think>\n", "One.\n</think>\n\nYes.", "One.", "Yes."),
    "opened and repeated": (THINK, "<think>\n", "<think>\nOne.</think>Yes.", "One.", "Yes."),
    "closed": (THINK, "<think>\n\n</think>\n\n", "Yes <think> no.", "", "Yes <think> no."),
    "empty": (THINK, "", "<think>\n\n</think>\n\nYes.", "", "Yes."),
    "no reasoning": (THINK, "", "\n A <b>think</b> tank", "", "\n A <b>think</b> tank"),
    "mentioned": (THINK, "", "Use <think> and </think>.", "", "Use <think> and </think>."),
    "only removed": ("{{ c.split('</think>')[-1] }}", "", "<think>One.</think>Yes.", "One.", "Yes."),
    "Kimi K2 without an end": (
        THINK, "", "<think>One.<|tool_calls_section_begin|>f", "One.", "<|tool_calls_section_begin|>f",
    ),
    "Gemma 4": ("<|channel>thought\n<channel|>", "", "<|channel>thought\nOne.<channel|>Yes.", "One.", "Yes."),
    "Mistral": ("[THINK]{{ b }}[/THINK]", "", "[THINK]One.[/THINK]Yes.", "One.", "Yes."),
    "Seed": ("<seed:think></seed:think>", "", "<seed:think>One.</seed:think>Yes.", "One.", "Yes."),
    "MiniMax M3": ("<mm:think></mm:think>", "<mm:think>", "One.</mm:think>Yes.", "One.", "Yes."),
    "Command": (
        "<|START_THINKING|><|END_THINKING|>", "<|START_THINKING|>", "One.<|END_THINKING|>Yes.", "One.", "Yes.",
    ),
    "Hunyuan 3": (
        "':opensource' '<think{}>'", "<think:opensource>", "One.</think:opensource>Yes.", "One.", "Yes.",
    ),
    "Solar": (
        "assistant<|think|> <|end|> <|content|>", "assistant",
        "<|think|>One.<|end|><|begin|>assistant<|content|>Yes.", "One.", "Yes.",
    ),
    "Granite 3.2": (
        "Here is my thought process: Here is my response:", "",
        "Here is my thought process: One.\n\nHere is my response: Yes.", "One.", "Yes.",
    ),
    "Granite 3.3": (GRANITE, "", "<think>One.</think>\n<response>Yes.</response>", "One.", "Yes."),
    "Apriel": (
        "End with [BEGIN FINAL RESPONSE].", "Here are my reasoning steps:\n",
        "One.\n[BEGIN FINAL RESPONSE]\nYes.\n[END FINAL RESPONSE]", "One.", "Yes.\n",
    ),
    "Kimi-VL": ("◁think▷◁/think▷", "", "◁think▷One.◁/think▷Yes.", "One.", "Yes."),
    "gpt-oss": (
        GPT_OSS, "<|start|>assistant",
        "<|channel|>analysis<|message|>One.<|end|><|start|>assistant<|channel|>final<|message|>Yes.", "One.", "Yes.",
    ),
    "gpt-oss with a preamble": (
        GPT_OSS, "<|start|>assistant",
        "<|channel|>analysis<|message|>One.<|end|><|start|>assistant<|channel|>commentary<|message|>I call.<|end|>"
        f"<|start|>assistant{CALL}", "One.", f"I call.<|start|>assistant{CALL}",
    ),
    "gpt-oss without a channel": (GPT_OSS, "<|start|>assistant", "Yes.", "", "Yes."),
    "gpt-oss in its final channel": (
        GPT_OSS, "<|start|>assistant<|channel|>final<|message|>", "Yes.<|return|>", "", "Yes.",
    ),
}  # fmt: skip


def splitter_of(template: str, prompt: str, specials: Specials | None = None) -> Splitter:
    known = detect_reasoning(template)
    assert known is not None
    return new_splitter(known, f"Hi{prompt}", specials or Specials())


def joined(parts: list[OutputPart]) -> tuple[str, str]:
    return tuple("".join(part.text for part in parts if part.kind == kind) for kind in ("reasoning", "content"))  # type: ignore[return-value]


@pytest.mark.parametrize("family", FAMILIES)
def test_reasoning_is_split_from_content_in_pieces_of_any_size(family: str) -> None:
    template, prompt, output, reasoning, content = FAMILIES[family]
    for size in range(1, len(output) + 1):
        splitter = splitter_of(template, prompt)
        parts: list[OutputPart] = []
        for start in range(0, len(output), size):
            parts += splitter.push(output[start : start + size])
        parts += splitter.finish()
        assert joined(parts) == (reasoning, content), size


@pytest.mark.parametrize("family", FAMILIES)
def test_no_piece_of_a_marker_leaks_wherever_the_output_is_cut(family: str) -> None:
    template, prompt, output, reasoning, content = FAMILIES[family]
    for end in range(len(output)):
        splitter = splitter_of(template, prompt)
        found = joined([*splitter.push(output[:end]), *splitter.finish()])
        assert reasoning.startswith(found[0])
        # One character alone may be the end of an answer, and white space in front of reasoning may be an answer.
        assert content.startswith((found[1], found[1][:-1])) or not found[1].strip()


@pytest.mark.parametrize("family", FAMILIES)
@hypothesis.given(data=st.data())
@hypothesis.settings(max_examples=20)
def test_any_output_gives_the_same_parts_in_pieces_as_whole(family: str, data: st.DataObject) -> None:
    template, prompt, *_ = FAMILIES[family]
    known = detect_reasoning(template)
    assert known is not None
    fragments = st.sampled_from([*known.markers, "a", "<", " ", "\n", "to=f", "analysis", "final", "assistant"])
    cut = st.tuples(fragments, st.integers(0, 20), st.integers(0, 20)).map(lambda each: each[0][each[1] :][: each[2]])
    output = "".join(data.draw(st.lists(st.one_of(fragments, cut), max_size=20)))
    whole = splitter_of(template, prompt)
    expected = joined([*whole.push(output), *whole.finish()])
    pieces = splitter_of(template, prompt)
    parts: list[OutputPart] = []
    while output:
        size = data.draw(st.integers(1, 9))
        parts += pieces.push(output[:size])
        output = output[size:]
    assert joined([*parts, *pieces.finish()]) == expected
    assert not any(marker in expected[0] for marker in (known.end, *known.breaks))


def test_a_marker_that_is_cut_off_by_force_is_dropped() -> None:
    for template, closing in ((THINK, "\n</think>\n\n"), (GPT_OSS, HARMONY.closing)):
        known = detect_reasoning(template)
        assert known is not None
        splitter = new_splitter(known, f"<|start|>assistant{known.start}", Specials())
        parts = splitter.push(f"One.{known.end[:3]}")
        splitter.drop_partial_marker()
        assert joined([*parts, *splitter.push(f"{closing}Yes."), *splitter.finish()]) == ("One.", "Yes.")


def test_special_tokens_are_markers_anywhere_and_others_stay_with_the_content() -> None:
    specials = Specials({1, 2, 3}, {1: "[THINK]", 2: "[/THINK]"})
    splitter = splitter_of("[THINK]{{ b }}[/THINK]", "", specials)
    parts = [
        part
        for text, tokens in (("", [1]), ("a", [9]), ("b", [2, 9]), ("", [1]), ("c", []), ("d", [2, 3, 9]), ("", [3]))
        for part in splitter.push(text, tokens)
    ]
    assert [*parts, *splitter.finish()] == [
        OutputPart("reasoning", "a"), OutputPart("content", "b"), OutputPart("reasoning", "c"),
        OutputPart("content", "d", (3,)), OutputPart("content", "", (3,)),
    ]  # fmt: skip
    assert splitter.reasoning_tokens == 6


def test_channels_of_special_tokens_are_split_and_calls_keep_theirs() -> None:
    marks = {1: "<|channel|>", 2: "<|message|>", 3: "<|start|>", 4: "<|end|>"}
    splitter = splitter_of(GPT_OSS, "<|start|>assistant", Specials({*marks, 5}, marks))
    output: list[int | str] = [
        1, "analysis", 2, "One", ".", 4, 3, "assistant", 1, "comment", "ary to=functions.f ", 5, "json", 2, "{}",
    ]  # fmt: skip
    parts = [
        part
        for each in output
        for part in (splitter.push("", (each,)) if isinstance(each, int) else splitter.push(each, (99,)))
    ]
    assert [*parts, *splitter.finish()] == [
        OutputPart("reasoning", "One"), OutputPart("reasoning", "."),
        OutputPart("content", "<|start|>assistant<|channel|>commentary to=functions.f "),
        OutputPart("content", "json<|message|>", (5,)), OutputPart("content", "{}"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("template", "given", "expected"),
    [
        ("{{ enable_thinking }}", {"enabled": False}, {"enable_thinking": False}),
        ("{{ enable_thinking }}", {"effort": "none"}, {"enable_thinking": False}),
        ("{{ enable_thinking }}", {"effort": "high"}, {"enable_thinking": True}),
        ("{{ thinking }}", {"enabled": True}, {"thinking": True}),
        ("{% for m in messages %}{{ m.thinking ~ m['thinking'] ~ 'thinking' }}{% endfor %}", {"enabled": True}, {}),
        ("{% set e = reasoning_effort %}", {"effort": "minimal"}, {"reasoning_effort": "minimal"}),
        ("{{ reasoning_effort }}" + GPT_OSS + "<|message|>", {"effort": "max"}, {"reasoning_effort": "high"}),
        ("{{ reasoning_effort }}" + GPT_OSS, {"enabled": False}, {"reasoning_effort": "low"}),
        ("{{ reasoning_effort == 'no_think' }}", {"enabled": False}, {"reasoning_effort": "no_think"}),
        ("{{ reasoning_effort == 'no_think' }}", {"effort": "medium"}, {"reasoning_effort": "high"}),
        ("{{ thinking_budget == 0 }}", {"budget": 5}, {"thinking_budget": 5}),
        ("{{ messages }}", {"enabled": True, "effort": "high", "budget": 1}, {}),
        ("{{ enable_thinking }}", {}, {}),
    ],
)
def test_switches_reach_the_variables_that_a_template_has(
    template: str, given: dict[str, Any], expected: dict[str, Any]
) -> None:
    assert template_variables(template, ChatTemplate(template).variables, **given) == expected


def test_the_reasoning_of_earlier_answers_goes_where_the_template_reads_it() -> None:
    mistral = (
        "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}{% for b in m.content %}"
        "{% if b.type == 'thinking' %}[THINK]{{ b.thinking }}[/THINK]{% else %}{{ b.text }}{% endif %}"
        "{% endfor %}{% endif %}{% endfor %}"
    )
    answer = {"role": "assistant", "content": "Yes.", "reasoning_content": "One."}
    assert ChatTemplate(mistral).render([answer]) == "[THINK]One.[/THINK]Yes."
    harmony = GPT_OSS + "{% for m in messages %}{{ [m.content, m.thinking] | tojson }}{% endfor %}"
    call = {**answer, "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    written = ChatTemplate(harmony).render([call]).removeprefix(GPT_OSS)
    assert json.loads(written) == ["", "One.\n\nYes."]
    assert json.loads(ChatTemplate(harmony).render([answer]).removeprefix(GPT_OSS)) == ["Yes.", "One."]
    assert detect_reasoning(harmony) is HARMONY


HI = [{"role": "user", "content": "Hi"}]


@pytest.mark.parametrize(
    ("template", "choice", "more", "end"),
    [
        ("<think></think>", ReasoningChoice(), {}, "<think>"),
        ("<think></think>", ReasoningChoice(enabled=False), {}, "<think>\n</think>\n\n"),
        ("<think></think>", ReasoningChoice(effort="none"), {}, "<think>\n</think>\n\n"),
        ("<think></think>", ReasoningChoice(budget=0), {}, "<think>\n</think>\n\n"),
        ("<think></think>", ReasoningChoice(), {"answers_now": True}, "<think>\n</think>\n\n"),
        ("<think></think>{{ thinking_budget }}", ReasoningChoice(enabled=False), {}, "0<think>\n</think>\n\n"),
        ("[THINK][/THINK].", ReasoningChoice(), {"constrained": True}, ""),
        ("[THINK][/THINK].", ReasoningChoice(enabled=True), {}, ""),
        ("[THINK][/THINK].", ReasoningChoice(enabled=True), {"constrained": True}, "[THINK]"),
        ("[THINK][/THINK].", ReasoningChoice(effort="low"), {"constrained": True}, "[THINK]"),
        ("[THINK][/THINK].", ReasoningChoice(effort="none"), {"constrained": True}, ""),
        ("<seed:think></seed:think>.", ReasoningChoice(enabled=True), {"constrained": True}, "<seed:think>\n"),
        ("<think></think>", ReasoningChoice(enabled=True), {"constrained": True}, "<think>"),
        (GPT_OSS, ReasoningChoice(enabled=True), {"constrained": True}, "<|start|>assistant"),
        (GPT_OSS, ReasoningChoice(), {}, "<|start|>assistant"),
        (GPT_OSS, ReasoningChoice(budget=0), {}, "<|start|>assistant<|channel|>final<|message|>"),
        (GPT_OSS, ReasoningChoice(budget=0), {"answers_now": True}, "<|start|>assistant"),
        ("Hi", ReasoningChoice(enabled=False, budget=0), {}, ""),
    ],
)
def test_a_prompt_ends_where_reasoning_or_the_answer_begins(
    template: str, choice: ReasoningChoice, more: dict[str, Any], end: str
) -> None:
    opening = "<|start|>assistant" if template == GPT_OSS else "<think>" if template.startswith("<think>") else ""
    values = tiny.metadata(tokenizer__chat_template=f"{template}{opening}")
    tokenizer = Tokenizer.from_gguf_metadata(values)
    prompt, budget = chat_prompt(tokenizer, HI, choice, **more)
    assert prompt.removeprefix(template.partition("{{")[0]) == end
    assert (budget is None) == (template == "Hi")


SCHEMA = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"], "additionalProperties": False}


@pytest.fixture(scope="module")
def model(reasoning_model: Model) -> Model:
    return reasoning_model


@pytest.mark.parametrize("budget", [0, 1, 5, 70])
@pytest.mark.parametrize("session", [False, True])
def test_a_budget_ends_reasoning_and_the_answer_follows(model: Model, budget: int, session: bool) -> None:
    chatting = model.session() if session else model
    forced = 0 if budget == 0 else len("\n</think>\n\n")
    count = budget + forced + 8
    done = chatting.chat(HI, temperature=0, max_tokens=count, reasoning_budget=budget)
    assert done.finish_reason == "length"
    assert done.usage.completion_tokens == len(done.tokens) == count
    whole = model.tokenizer.decode(done.tokens)
    if budget:
        assert whole[: -len(done.text)].rstrip().endswith("</think>")
        assert done.reasoning == whole.partition("</think>")[0].strip()
    else:
        assert (done.reasoning, whole) == ("", done.text)
    # The answer is the one to a prompt with this reasoning.
    prompt = model.tokenizer.apply_chat_template(HI, add_generation_prompt=True)
    ids = [*model.tokenizer.encode_prompt(prompt), *done.tokens[: count - 8]]
    if budget == 0:
        ids = model.tokenizer.encode_prompt(f"{prompt}\n</think>\n\n")
    assert model.generate(ids, temperature=0, max_tokens=8).tokens == done.tokens[-8:]


def test_a_stream_gives_the_parts_of_the_completion(model: Model) -> None:
    options = SamplingOptions(seed=3, max_tokens=40, reasoning_budget=9, logprobs=0)
    done = model.chat(HI, options)
    assert done.reasoning
    assert done.text
    with model.chat(HI, options, stream=True) as stream:
        assert joined([*stream.parts()]) == (done.reasoning, done.text)
        assert stream.completion.tokens == done.tokens
    assert "".join(model.chat(HI, options, stream=True)) == done.text
    assert done.logprobs is not None
    assert [each.token for each in done.logprobs] == [*done.tokens]


def test_requests_of_an_engine_separate_reasoning_where_they_ask_for_it(model: Model) -> None:
    prompt = model.tokenizer.apply_chat_template(HI, add_generation_prompt=True)
    options = SamplingOptions(seed=3, max_tokens=40, reasoning_budget=9, logprobs=0)
    done = model.chat(HI, options)
    with Engine(model) as engine:
        request = engine.submit(prompt, options, separate_reasoning=True)
        pieces = [*request]
        assert ("".join(piece.reasoning for piece in pieces), "".join(map(str, pieces))) == (done.reasoning, done.text)
        assert tuple(token for piece in pieces for token in piece.tokens) == done.tokens
        assert sum(len(piece.logprobs or ()) for piece in pieces) == 40
        assert request.result().usage == done.usage
        endless = engine.submit(prompt, max_tokens=9, temperature=0, separate_reasoning=True).result()
        assert (endless.reasoning, endless.text) == (model.chat(HI, max_tokens=9, temperature=0).reasoning, "")
        together = engine.submit(prompt, options).result()
    assert (together.reasoning, together.tokens) == ("", done.tokens)
    assert done.reasoning in together.text
    assert together.text.endswith(done.text)


def test_reasoning_is_apart_only_in_chats_and_without_a_budget_too(model: Model) -> None:
    prompt = model.tokenizer.apply_chat_template(HI, add_generation_prompt=True)
    raw = model.generate(prompt, temperature=0, max_tokens=12)
    assert (raw.reasoning, raw.text) == ("", model.tokenizer.decode(raw.tokens))
    done = model.chat(HI, temperature=0, max_tokens=12)
    assert (done.tokens, done.text, done.finish_reason) == (raw.tokens, "", "length")
    assert done.reasoning == raw.text.strip()
    off = model.chat(HI, temperature=0, max_tokens=12, enable_thinking=False)
    assert off.text
    assert not off.reasoning


@pytest.mark.parametrize("speculation", ["off", "on"])
def test_a_constraint_and_stops_concern_the_answer_after_reasoning(model: Model, speculation: Any) -> None:
    options = SamplingOptions(seed=1, max_tokens=200, reasoning_budget=80, schema=SCHEMA, stop=("}",))
    done = model.chat(HI, options.replace(stop=()))
    assert json.loads(done.text)["a"] in (True, False)
    assert done.finish_reason == "stop"
    stopped = model.chat(HI, options)
    assert (stopped.reasoning, stopped.text + "}") == (done.reasoning, done.text.rstrip())
    # In a batch, too.
    prompt = model.tokenizer.apply_chat_template(HI, add_generation_prompt=True)
    with Engine(model, max_batch=3, speculation=speculation) as engine:
        requests = [engine.submit(prompt, options, stop=()) for _ in range(5)]
        others = [engine.submit("abc", max_tokens=30, seed=seed) for seed in range(3)]
        assert {request.result().tokens for request in requests} == {done.tokens}
        assert all(request.completion.usage.cached_tokens < 100 for request in requests)
        for seed, other in enumerate(others):
            assert other.result().tokens == model.generate("abc", max_tokens=30, seed=seed).tokens


def test_a_schema_follows_reasoning_that_the_model_would_begin_itself(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"llama__context_length": 2048, "tokenizer__chat_template": f"{THINK} {tiny.CHATML}"}
    with Model.load(tiny.write_model(tmp_path / "tiny.gguf", **changes), threads=1) as model:
        given: dict[str, Any] = {"seed": 1, "max_tokens": 200, "reasoning_budget": 8, "schema": SCHEMA}
        done = model.chat(HI, enable_thinking=True, **given)
        assert done.reasoning
        assert json.loads(done.text)["a"] in (True, False)
        direct = model.chat(HI, **given)
        assert not direct.reasoning
        assert json.loads(direct.text)["a"] in (True, False)


def test_the_reasoning_of_a_session_is_part_of_it(model: Model, tmp_path: Path) -> None:
    session = model.session()
    first = session.chat(HI, seed=5, max_tokens=60, reasoning_budget=20)
    prompt = model.tokenizer.encode_prompt(model.tokenizer.apply_chat_template(HI, add_generation_prompt=True))
    assert session.tokens == (*prompt, *first.tokens)
    session.save(tmp_path / "s")
    again = model.load_session(tmp_path / "s")
    assert again.generate("x", seed=1, max_tokens=5).tokens == session.generate("x", seed=1, max_tokens=5).tokens
    assert model.generate([*prompt, *first.tokens, ord("x")], seed=1, max_tokens=5).tokens == session.tokens[-5:]


def test_a_budget_out_of_range_is_refused() -> None:
    with pytest.raises(ValueError, match="reasoning_budget: found -1, expected None, or 0 or more"):
        SamplingOptions(reasoning_budget=-1)
