"""Programs that must check: what calls return, and annotations with the exported names."""

from __future__ import annotations

import pathlib
from typing import Literal

from typing_extensions import assert_type

import nybble
from nybble import (
    Completion,
    Documents,
    Engine,
    EngineOverrides,
    Evaluation,
    FinishReason,
    LoadOverrides,
    Message,
    Model,
    Progress,
    Prompt,
    Prompts,
    QuantizeOverrides,
    Recipe,
    Report,
    Request,
    SamplingOptions,
    SamplingOverrides,
    Session,
    StageProgress,
    TensorReport,
    TextStream,
    Tokenizer,
)

load: LoadOverrides = {"threads": 4, "cache_type": "int8"}
greedy: SamplingOverrides = {"temperature": 0, "max_tokens": 8}
engine_options: EngineOverrides = {"max_batch": 4}
recipe: Recipe = "gptq"
quantize_options: QuantizeOverrides = {"recipe": recipe, "group": 64}


def show(done: int, total: int) -> None:
    print(done, total)


def show_stage(stage: str, done: int, total: int) -> None:
    print(stage, done, total)


progress: Progress = show
stage_progress: StageProgress = show_stage

model = Model.load("model.gguf", progress=progress, **load)
Model.load(pathlib.Path("model.gguf"), progress=False).close()
Model.load("model.gguf", progress=True).close()
Model.load("model.gguf", progress=None).close()


def prompts_of_any_form(one: Prompt, several: Prompts) -> None:
    assert_type(model.generate(one, **greedy), Completion)
    assert_type(model.generate(several, SamplingOptions(seed=1)), list[Completion])
    assert_type(model.generate("One"), Completion)
    assert_type(model.generate([1, 2]), Completion)
    assert_type(model.generate((1, 2)), Completion)
    assert_type(model.generate(["One", "Two"]), list[Completion])
    assert_type(model.generate(("One", "Two")), list[Completion])
    assert_type(model.generate([[1, 2], [3]]), list[Completion])
    assert_type(model.stream([1, 2]), TextStream)
    model.embed("One")
    model.embed([1, 2])
    model.embed(["One", "Two"])
    model.logits("One")
    model.logits([1, 2])


def answers(messages: list[Message], stream: bool) -> FinishReason:
    assert_type(model.chat(messages), Completion)
    assert_type(model.chat(messages, stream=False), Completion)
    assert_type(model.chat(messages, stream=True), TextStream)
    assert_type(model.chat(messages, stream=stream), Completion | TextStream)
    session = model.session()
    assert_type(session, Session)
    assert_type(session.chat(messages), Completion)
    assert_type(session.chat(messages, stream=True), TextStream)
    assert_type(session.chat(messages, stream=stream), Completion | TextStream)
    assert_type(session.generate([1, 2]), Completion)
    return session.generate("One").finish_reason


async def requests() -> None:
    async with Engine(model, **engine_options) as engine:
        assert_type(engine, Engine)
        assert_type(engine.submit([1, 2]), Request)
        assert_type(await engine.submit("One"), Completion)
        assert_type(await engine.generate("One"), Completion)
        assert_type(await engine.generate([1, 2]), Completion)
        assert_type(await engine.generate(["One", "Two"]), list[Completion])
        async for text in engine.stream([1, 2]):
            assert_type(text, str)


def measured(text: Documents) -> tuple[Report, Evaluation, tuple[TensorReport, ...]]:
    report = nybble.quantize("folder", "model.gguf", progress=stage_progress, **quantize_options)
    return report, nybble.evaluate(model, text, progress=progress), report.tensors


reason: Literal["stop", "length", "cancelled"] = answers([{"role": "user", "content": "Hello"}], stream=False)
tokenizer: Tokenizer = model.tokenizer
tokenizer.encode("One", add_special=False, parse_special=False)
model.tokenize("One", add_special=False, parse_special=False)
names: list[str] = nybble.kernels()
version: str = nybble.__version__
