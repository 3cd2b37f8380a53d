"""A model in stages answers as it does in one process, whatever happens to the stages."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
from serving import serving

from nybble import LoadOptions, Model, ModelError, pipeline
from nybble.cli import main
from nybble.engine import Engine
from nybble.pipeline import relay
from nybble.pipeline.engine import Pipeline, open_pipeline
from nybble.pipeline.worker import ProcessLink
from nybble.server import http_server

LAYERS = 5
PROMPTS = [
    f"{'A shared beginning of many words, longer than a page of tokens. ' if n % 3 else ''}Request {n}"
    for n in range(16)
]
OPTIONS: Any = {"max_tokens": 24, "temperature": 0.8, "ignore_eos": True}


@pytest.fixture(scope="module")
def deep_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny llama with several layers."""
    file = tmp_path_factory.mktemp("deep") / "deep.gguf"
    return tiny.write_model(file, layers=LAYERS, llama__context_length=256)


@pytest.fixture(scope="module")
def whole(deep_file: Path) -> Iterator[Model]:
    """The model in one process."""
    with Model.load(deep_file, threads=1) as model:
        yield model


@pytest.fixture(scope="module")
def expected(whole: Model) -> list[str]:
    """The answers to `PROMPTS`, whose number is the seed."""
    return [whole.generate(prompt, seed=n, **OPTIONS).text for n, prompt in enumerate(PROMPTS)]


def in_threads(file: Path, stages: int, **overrides: Any) -> Pipeline:
    """A pipeline whose stages are threads of this process."""
    return open_pipeline(
        file,
        lambda path, units: relay.threads(str(path), units),
        stages,
        None,
        load=LoadOptions(threads=1),
        cuts=overrides.pop("cuts", None),
        draft=overrides.pop("draft", None),
        overrides=overrides,
    )


def answers(engine: Engine) -> list[str]:
    """The answers to `PROMPTS`, all at the same time."""
    requests = [engine.submit(prompt, seed=n, **OPTIONS) for n, prompt in enumerate(PROMPTS)]
    return [request.result(timeout=300).text for request in requests]


@pytest.mark.parametrize("stages", [1, 2, 3, 6])
@pytest.mark.parametrize("speculation", ["off", "on"])
def test_sixteen_requests_get_the_same_answers(
    deep_file: Path, expected: list[str], stages: int, speculation: str
) -> None:
    with in_threads(deep_file, stages, speculation=speculation) as engine:
        assert answers(engine) == expected
        first = engine.stats()
        # Again, with the prefix cache.
        assert answers(engine) == expected
        assert engine.stats().reused_tokens > first.reused_tokens


def test_the_stages_of_processes_answer_the_same(deep_file: Path, whole: Model, expected: list[str]) -> None:
    with pipeline.processes(deep_file, stages=2, load=LoadOptions(threads=1)) as engine:
        assert answers(engine) == expected
        infos = engine.model.stage_infos
        assert len(infos) == 2
        # The embedding is the output matrix as well, so the first and the last stage have it.
        both = sum(info.weight_bytes for info in infos)
        assert engine.model.info.weight_bytes == both
        assert whole.info.weight_bytes < both < 1.5 * whole.info.weight_bytes
        assert engine.model.info.threads == 2


def test_streams_coroutines_and_chats_work_as_with_other_engines(deep_file: Path, whole: Model) -> None:
    with in_threads(deep_file, 3) as engine:
        text = whole.generate("Once", seed=1, **OPTIONS).text
        assert "".join(str(piece) for piece in engine.submit("Once", seed=1, **OPTIONS)) == text

        async def run() -> tuple[str, str]:
            streamed = "".join([piece async for piece in engine.stream("Once", seed=1, **OPTIONS)])
            return streamed, (await engine.generate("Once", seed=1, **OPTIONS)).text

        assert asyncio.run(run()) == (text, text)
        turns = [{"role": "user", "content": "Hello"}]
        assert engine.model.chat(turns, seed=2, max_tokens=8).text == whole.chat(turns, seed=2, max_tokens=8).text
        assert engine.model.logits("Hello").tobytes() == whole.logits("Hello").tobytes()
        session, other = engine.model.session(), whole.session()
        for prompt in ("One", " two"):
            assert (
                session.generate(prompt, seed=3, max_tokens=5).text == other.generate(prompt, seed=3, max_tokens=5).text
            )


def test_cancelled_requests_do_not_disturb_others(deep_file: Path, expected: list[str]) -> None:
    with in_threads(deep_file, 2) as engine:
        requests = [engine.submit(prompt, seed=n, **OPTIONS) for n, prompt in enumerate(PROMPTS)]
        for number in (1, 4, 9):
            next(iter(requests[number]))
            requests[number].cancel()
        for number, request in enumerate(requests):
            text = request.result(timeout=300).text
            assert text == expected[number] or (number in (1, 4, 9) and expected[number].startswith(text))
        assert engine.stats().cancelled == 3


def test_a_draft_model_in_this_process_changes_nothing(deep_file: Path, whole: Model, expected: list[str]) -> None:
    with in_threads(deep_file, 2, draft=whole, speculation="on") as engine:
        assert answers(engine) == expected
        assert engine.stats().accepted_tokens > 0


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="ends processes by a signal of POSIX")
def test_no_answer_is_lost_when_stages_are_killed(deep_file: Path, expected: list[str]) -> None:
    with pipeline.processes(deep_file, stages=3, load=LoadOptions(threads=1)) as engine:
        stages = engine.model.stages
        assert isinstance(stages, relay.Relay)
        requests = [engine.submit(prompt, seed=n, **OPTIONS) for n, prompt in enumerate(PROMPTS)]
        killed = []
        for number in (0, 5, 10):
            # As soon as a request has some of its answer.
            pieces = iter(requests[number])
            next(pieces)
            link = stages._links[number % 3]
            assert isinstance(link, ProcessLink)
            os.kill(link.pid, signal.SIGKILL)
            killed.append(link.pid)
        assert [request.result(timeout=300).text for request in requests] == expected
        assert engine.failure is None
        now = {link.pid for link in stages._links if isinstance(link, ProcessLink)}
        assert len(now) == 3
        assert now.isdisjoint(killed)


@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="stops processes by a signal of POSIX")
def test_no_answer_is_lost_when_a_stage_hangs(deep_file: Path, expected: list[str]) -> None:
    options = LoadOptions(threads=1)
    with pipeline.processes(deep_file, stages=3, load=options, silent_seconds=3) as engine:
        stages = engine.model.stages
        assert isinstance(stages, relay.Relay)
        requests = [engine.submit(prompt, seed=n, **OPTIONS) for n, prompt in enumerate(PROMPTS)]
        next(iter(requests[0]))
        stopped = stages._links[1]
        assert isinstance(stopped, ProcessLink)
        os.kill(stopped.pid, signal.SIGSTOP)
        assert [request.result(timeout=300).text for request in requests] == expected
        assert engine.failure is None
        now = stages._links[1]
        assert isinstance(now, ProcessLink)
        assert now.pid != stopped.pid
        assert stopped._was_silent


@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="stops processes by a signal of POSIX")
def test_a_stage_that_hangs_while_it_loads_is_an_error(deep_file: Path) -> None:
    stop_itself = ["sh", "-c", "kill -STOP $$"]
    with pytest.raises(TimeoutError, match="sent nothing for 2 seconds and was killed"):
        ProcessLink(str(deep_file), LoadOptions(threads=1), (0, LAYERS + 1), stop_itself, silent_seconds=2)


def test_the_server_answers_from_stages(deep_file: Path, whole: Model) -> None:
    turns = [{"role": "user", "content": "Hello"}]
    expected = whole.chat(turns, temperature=0, max_tokens=8).text
    with in_threads(deep_file, 2) as engine, serving(engine) as server:
        assert server.chat(turns, temperature=0, max_tokens=8).choice["message"]["content"] == expected


def test_the_command_serves_stages(
    deep_file: Path, expected: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    served: list[list[str]] = []

    def serve(service: Any, *_: object) -> None:
        assert len(service.engine.model.stage_infos) == 3
        served.append(answers(service.engine))

    monkeypatch.setattr(http_server, "serve", serve)
    assert main(["serve", str(deep_file), "--port", "0", "--stages", "3", "--threads", "1"]) == 0
    assert served == [expected]
    for more, message in [
        (["--ray", "auto"], "ray: found 'auto', but no stages"),
        (["--stages", "2", "--cache-dir", "x"], "cache_dir: found 'x', expected none together with stages"),
        (["--stages", "2", "--adapter", "a=b"], "expected none together with stages"),
        (["--stages", "2", "--max-loaded", "1"], "together with several models"),
    ]:
        assert main(["serve", str(deep_file), "--port", "0", *more]) == 2
        assert message in " ".join(capsys.readouterr().err.replace("│", "").split())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"stages": 0}, "stages: found 0, expected 1 or more"),
        ({"stages": 9}, "stages: found 9, expected 1 to 6"),
        ({"stages": 2, "cuts": [7]}, r"cuts: found \[7\], expected 1 rising numbers from 1 to 5"),
        ({"stages": 3, "cuts": [2]}, r"cuts: found \[2\], expected 2 rising numbers"),
        ({"stages": 2, "cache_dir": "somewhere"}, "cache_dir: found a folder"),
        ({"stages": 2, "speculation": "mtp"}, 'speculation: found "mtp"'),
    ],
)
def test_options_that_a_pipeline_does_not_have_are_refused(deep_file: Path, given: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        in_threads(deep_file, **given)


def test_what_only_one_process_computes_is_refused_by_name(deep_file: Path, tmp_path: Path) -> None:
    with in_threads(deep_file, 2, cuts=[1]) as engine:
        assert [*engine.model.units] == [(0, 1), (1, LAYERS + 1)]
        model, refused = engine.model, "found a pipeline of stages, expected a model in one process"
        with pytest.raises(ValueError, match=refused):
            model.embed("Hello")
        with pytest.raises(ValueError, match=refused):
            model.load_adapter("name", tmp_path)
        session = model.session()
        session.generate("Hello", max_tokens=2)
        with pytest.raises(ValueError, match=refused):
            session.save(tmp_path / "session")
    with pytest.raises(ModelError, match="closed"):
        engine.submit("Hello")


def test_a_stage_that_cannot_load_is_an_error(deep_file: Path, tmp_path: Path) -> None:
    missing = relay.Relay(
        lambda options, units: ProcessLink(str(tmp_path / "none.gguf"), options, units), [(0, 1), (1, LAYERS + 1)]
    )
    with pytest.raises(FileNotFoundError, match=r"none\.gguf"):
        missing.start(LoadOptions(threads=1))
    ended = relay.Relay(
        lambda options, units: ProcessLink(str(deep_file), options, units, ["false"]), [(0, LAYERS + 1)]
    )
    with pytest.raises(ConnectionError, match="ended while it loaded, with status 1"):
        ended.start(LoadOptions(threads=1))
