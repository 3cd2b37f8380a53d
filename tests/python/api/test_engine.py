"""The engine: each request gets the completion that it would get alone, whatever the others do."""

from __future__ import annotations

import asyncio
import dataclasses
import math
import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import get_type_hints

import pytest
import tiny

from nybble import (
    Completion,
    ContextFullError,
    Engine,
    EngineError,
    EngineOptions,
    Model,
    ModelError,
    QueueFullError,
    Request,
    SamplingOptions,
)
from nybble.engine_options import EngineOverrides
from nybble.generation.driver import Driver

# Under this bias the model never ends the text by itself.
END = dict.fromkeys((tiny.END_OF_TEXT, tiny.IM_START, tiny.IM_END), -math.inf)
# Seconds after which a test that still waits fails.
LONG = 60


@pytest.fixture
def engine(tiny_model: Model) -> Iterator[Engine]:
    with Engine(tiny_model) as engine:
        yield engine


@pytest.fixture(scope="module")
def roomy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    """A model with a context so large that a completion outlasts every test unless it is stopped."""
    file = tiny.write_model(tmp_path_factory.mktemp("roomy") / "roomy.gguf", llama__context_length=1 << 16)
    with Model.load(file, threads=2) as model:
        yield model


def endless(engine: Engine, prompt: str = "abc") -> Request:
    """A running request that does not end by itself."""
    request = engine.submit(prompt, max_tokens=None, logit_bias={b"x"[0]: 1000.0})
    next(iter(request))
    return request


def jobs(count: int) -> list[tuple[str, SamplingOptions]]:
    """Prompts of mixed lengths, every third greedy."""

    def options(i: int) -> SamplingOptions:
        temperature = 0.0 if i % 3 == 0 else 1.3
        return SamplingOptions(seed=i, temperature=temperature, max_tokens=3 + i * 7 % 50, logprobs=i % 4)

    return [(f"prompt {i % 9} " * (1 + i % 8), options(i)) for i in range(count)]


def same(done: Completion, alone: Completion) -> bool:
    """Whether two completions are equal, except for timings and cached tokens."""

    def what(it: Completion) -> tuple[object, ...]:
        return it.text, it.tokens, it.finish_reason, it.logprobs, it.usage.prompt_tokens, it.usage.completion_tokens

    return what(done) == what(alone)


@pytest.mark.parametrize("speculation", ["off", "on", "auto"])
def test_batching_and_cancelling_never_change_a_completion(tiny_model: Model, speculation: str) -> None:
    work = jobs(64)
    alone = [tiny_model.generate(prompt, options) for prompt, options in work]
    with Engine(tiny_model, max_batch=12, speculation=speculation) as engine:  # type: ignore[arg-type]
        requests = [engine.submit(prompt, options) for prompt, options in work]
        for request in requests[4::5]:
            request.cancel()
        for i, request in enumerate(requests):
            if i % 5 != 4:
                assert same(request.result(LONG), alone[i]), i
                pieces = list(request)
                assert "".join(map(str, pieces)) == alone[i].text
                assert sum((piece.tokens for piece in pieces), ()) == alone[i].tokens
            else:
                assert alone[i].text.startswith(request.result(LONG).text)
        stats = engine.stats()
        assert stats.finished + stats.cancelled == 64
        assert stats.prompt_tokens == sum(done.usage.prompt_tokens for done in alone)
        assert stats.reused_tokens > 0


def test_a_list_of_prompts_gives_the_completions_of_single_calls(tiny_model: Model) -> None:
    prompts = [prompt for prompt, _ in jobs(50)]
    options = SamplingOptions(seed=5, max_tokens=20, temperature=1.0)
    alone = [tiny_model.generate(prompt, options) for prompt in prompts]
    assert all(same(a, b) for a, b in zip(tiny_model.generate(prompts, options), alone, strict=True))


def test_tasks_of_one_loop_and_threads_share_an_engine(tiny_model: Model, engine: Engine) -> None:
    work = jobs(12)
    alone = [tiny_model.generate(prompt, options).text for prompt, options in work]

    async def stream(prompt: str, options: SamplingOptions) -> str:
        return "".join([piece async for piece in engine.stream(prompt, options)])

    async def all_of_them() -> list[str]:
        return await asyncio.gather(*[stream(prompt, options) for prompt, options in work])

    results: list[list[str]] = []
    threads = [threading.Thread(target=lambda: results.append(asyncio.run(all_of_them()))) for _ in range(3)]
    for thread in threads:
        thread.start()
    results.append([engine.submit(prompt, options).result(LONG).text for prompt, options in work])
    for thread in threads:
        thread.join(LONG)
    assert results == [alone] * 4


def test_a_coroutine_waits_for_one_completion_or_for_several(tiny_model: Model, engine: Engine) -> None:
    async def run() -> None:
        one = await engine.generate("abc", max_tokens=9, seed=1)
        assert one.text == tiny_model.generate("abc", max_tokens=9, seed=1).text
        several = await engine.generate(["abc", "de"], max_tokens=9, seed=1)
        assert [done.text for done in several] == [
            done.text for done in tiny_model.generate(["abc", "de"], max_tokens=9, seed=1)
        ]
        assert (await engine.submit("abc", max_tokens=9, seed=1)).text == one.text
        with pytest.raises(ContextFullError):
            await engine.generate(["abc", "a" * 200])

    asyncio.run(run())


def test_a_prompt_may_be_token_ids(tiny_model: Model, engine: Engine) -> None:
    done = engine.submit(tiny_model.tokenize("abc"), max_tokens=9, seed=1).result(LONG)
    assert done.text == tiny_model.generate("abc", max_tokens=9, seed=1).text
    with pytest.raises(ValueError, match="token"):
        engine.submit([10_000])


def test_max_tokens_0_gives_an_empty_completion(engine: Engine) -> None:
    request = engine.submit("abc", max_tokens=0)
    assert (list(request), request.result(0).finish_reason) == ([], "length")


def test_tokens_of_a_stop_string_come_as_a_piece_without_text(tiny_model: Model, engine: Engine) -> None:
    request = engine.submit("abc", logit_bias={b"x"[0]: 1000.0}, stop=["xxx"], max_tokens=9)
    assert [(piece.text, len(piece.tokens)) for piece in request] == [("", 3)]
    assert request.result(LONG).finish_reason == "stop"


@pytest.mark.parametrize("speculation", ["off", "on"])
def test_constrained_and_free_requests_share_a_batch(tiny_model: Model, speculation: str) -> None:
    schema = {"type": "object", "properties": {"a": {"enum": ["x", "yy"]}, "b": {"type": "boolean"}}}
    constrained = [SamplingOptions(schema=schema, seed=i, temperature=1.5, max_tokens=60) for i in range(5)]
    free = [SamplingOptions(seed=i, max_tokens=20 + i, logit_bias=END) for i in range(5)]
    with Engine(tiny_model, speculation=speculation) as engine:  # type: ignore[arg-type]
        requests = [engine.submit(f"prompt {i}", options) for i, options in enumerate(constrained + free)]
        for i, options in enumerate(constrained + free):
            assert same(requests[i].result(LONG), tiny_model.generate(f"prompt {i}", options)), i


# Prefixes


def test_a_prompt_reuses_the_pages_of_a_common_prefix(tiny_model: Model, engine: Engine) -> None:
    system = "s" * 64
    first = engine.submit(system + "one", max_tokens=3, seed=1).result(LONG)
    assert engine.stats().reused_tokens == 0
    second = engine.submit(system + "two", max_tokens=3, seed=1).result(LONG)
    assert engine.stats().reused_tokens == 64
    assert (first.usage.cached_tokens, second.usage.cached_tokens) == (0, 64)
    assert same(first, tiny_model.generate(system + "one", max_tokens=3, seed=1))
    assert same(second, tiny_model.generate(system + "two", max_tokens=3, seed=1))
    assert engine.stats().cached_pages == 1


def test_no_page_is_kept_without_the_prefix_cache(tiny_model: Model) -> None:
    with Engine(tiny_model, prefix_cache=False) as engine:
        for _ in range(2):
            engine.submit("s" * 100, max_tokens=3).result(LONG)
        assert (engine.stats().reused_tokens, engine.stats().cached_pages) == (0, 0)


def test_a_request_that_exceeds_the_memory_limit_is_a_memory_error(tiny_model: Model) -> None:
    page = 64 * tiny_model.info.cache_bytes_per_token
    options = SamplingOptions(max_tokens=None, logit_bias={**END, b"x"[0]: 1000.0})
    with Engine(tiny_model, cache_bytes=page) as engine:
        requests = [engine.submit(f"{i}" * 10, options) for i in range(3)]
        for request in requests:
            with pytest.raises(MemoryError, match="KV cache of one sequence"):
                request.result(LONG)
            assert request.completion.usage.completion_tokens == 64 - 10 + 1
        assert engine.stats().cache_bytes <= page
        assert engine.submit("abc", max_tokens=5, seed=1).result(LONG).text


# Cancelling


def test_a_cancelled_request_ends_at_once_with_a_partial_completion(roomy: Model) -> None:
    with Engine(roomy, max_batch=1) as engine:
        request = endless(engine)
        waiting = engine.submit("abc", max_tokens=4, logit_bias=END)
        request.cancel()
        request.cancel()
        done = request.result(LONG)
        assert done.finish_reason == "cancelled"
        assert set(done.text) == {"x"}
        assert len(list(request)) == len(done.tokens)
        assert waiting.result(LONG).finish_reason == "length", "the slot is free"
        assert (engine.stats().cancelled, engine.stats().finished) == (1, 1)


def test_a_waiting_request_may_be_cancelled(roomy: Model) -> None:
    with Engine(roomy, max_batch=1) as engine:
        running = endless(engine)
        waiting = engine.submit("abc")
        waiting.cancel()
        assert waiting.result(LONG).text == ""
        running.cancel()
        assert engine.submit("abc", max_tokens=2, logit_bias=END).result(LONG).usage.completion_tokens == 2


@pytest.mark.parametrize("way", ["break", "cancel", "generate"])
def test_leaving_a_stream_cancels_its_request(roomy: Model, way: str) -> None:
    bias = {b"x"[0]: 1000.0}

    async def run(engine: Engine) -> None:
        begun = asyncio.Event()

        async def consume() -> None:
            if way == "generate":
                begun.set()
                await engine.generate("abc", max_tokens=None, logit_bias=bias)
            async for _ in engine.stream("abc", max_tokens=None, logit_bias=bias):
                begun.set()
                if way == "break":
                    break

        task = asyncio.create_task(consume())
        await asyncio.wait_for(begun.wait(), LONG)
        if way == "break":
            await task
        else:
            await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        await asyncio.wait_for(engine.generate("abc", max_tokens=2), LONG)

    with Engine(roomy, max_batch=1) as engine:
        asyncio.run(run(engine))
        assert engine.stats().cancelled == 1


def test_closing_an_event_loop_cancels_its_requests(roomy: Model) -> None:
    with Engine(roomy, max_batch=1) as engine:
        loop = asyncio.new_event_loop()
        stream = engine.stream("abc", max_tokens=None, logit_bias={b"x"[0]: 1000.0})
        assert loop.run_until_complete(anext(stream)) == "x"
        loop.close()
        del stream
        assert engine.submit("abc", max_tokens=2, logit_bias=END).result(LONG).usage.completion_tokens == 2


# Errors


def test_an_invalid_request_is_refused_at_once(tiny_model: Model, engine: Engine) -> None:
    with pytest.raises(ContextFullError, match="prompt has 129 tokens"):
        engine.submit("a" * 129)
    with pytest.raises(ContextFullError):
        engine.stream("a" * 129)
    with pytest.raises(ValueError, match="top_p"):
        engine.submit("a", top_p=3)
    with pytest.raises(TypeError, match="no such option"):
        engine.submit("a", max_token=3)  # type: ignore[call-arg]
    for wrong in ({"max_batch": 0}, {"prefill_chunk": 0}, {"max_queue": -1}, {"speculation": "perhaps"}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Engine(tiny_model, **wrong)


def test_a_full_queue_refuses_requests_until_a_slot_is_free(roomy: Model) -> None:
    with Engine(roomy, max_batch=1, max_queue=2) as engine:
        running = endless(engine)
        waiting = [engine.submit("abc", max_tokens=1) for _ in range(2)]
        with pytest.raises(QueueFullError, match="2 requests wait") as caught:
            engine.submit("abc")
        assert caught.value.waiting == 2
        running.cancel()
        for request in waiting:
            request.result(LONG)
        assert engine.submit("abc", max_tokens=1).result(LONG)


def test_a_request_that_fails_does_not_affect_others(tiny_model: Model, engine: Engine) -> None:
    nothing = dict.fromkeys(range(tiny.VOCABULARY), -math.inf)
    bad, good = engine.submit("abc", logit_bias=nothing), engine.submit("abc", max_tokens=5, seed=1)
    with pytest.raises(ModelError, match="logits"):
        bad.result(LONG)
    with pytest.raises(ModelError, match="logits"):
        list(bad)
    assert good.result(LONG).text == tiny_model.generate("abc", max_tokens=5, seed=1).text


def test_an_error_in_the_text_of_a_request_ends_only_that_request(
    roomy: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = roomy.generate("abc", max_tokens=40, seed=1).text
    push = Request._push
    with Engine(roomy) as engine:
        good = engine.submit("abc", max_tokens=40, seed=1)
        bad = endless(engine)
        monkeypatch.setattr(Request, "_push", lambda self, *more: 1 // 0 if self is bad else push(self, *more))
        with pytest.raises(ZeroDivisionError):
            bad.result(LONG)
        assert good.result(LONG).text == expected
        assert engine.failure is None


def test_a_failed_step_ends_its_requests_and_later_ones_are_tried_again(
    roomy: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Driver.step
    fails = threading.Event()
    monkeypatch.setattr(Driver, "step", lambda self, **how: 1 // 0 if fails.is_set() else step(self, **how))
    with Engine(roomy, max_batch=1) as engine:
        running, waiting = endless(engine), engine.submit("abc")
        fails.set()
        for request in (running, waiting):
            with pytest.raises(EngineError, match="engine has failed: integer division") as caught:
                request.result(LONG)
            assert isinstance(caught.value.__cause__, ZeroDivisionError)
        with pytest.raises(EngineError):
            engine.submit("abc").result(LONG)
        assert isinstance(engine.failure, ZeroDivisionError)
        fails.clear()
        assert (
            engine.submit("abc", max_tokens=9, seed=1).result(LONG).text
            == roomy.generate("abc", max_tokens=9, seed=1).text
        )
        assert engine.failure is None
        assert engine.stats().running == 0


def test_an_engine_that_cannot_start_again_fails_each_request_until_it_can(
    roomy: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Driver.step
    monkeypatch.setattr(Driver, "step", lambda self, **how: 1 // 0)
    with Engine(roomy) as engine:
        with pytest.raises(EngineError):
            engine.submit("abc").result(LONG)
        monkeypatch.setattr(Driver, "step", step)
        create = engine._loop._new_driver
        engine._loop._new_driver = no_memory
        with pytest.raises(MemoryError):
            engine.submit("abc").result(LONG)
        engine._loop._new_driver = create
        assert engine.submit("abc", max_tokens=2).result(LONG).usage.completion_tokens == 2


def no_memory() -> Driver[Request]:
    raise MemoryError


def test_a_timeout_ends_the_wait_and_not_the_request(roomy: Model) -> None:
    with Engine(roomy) as engine:
        request = endless(engine)
        with pytest.raises(TimeoutError, match="has not ended within 0 seconds"):
            request.result(0)
        assert not request._is_done
        request.cancel()


# Closing


def test_closing_an_engine_fails_its_requests_and_refuses_new_ones(roomy: Model) -> None:
    engine = Engine(roomy, max_batch=1)
    running, waiting = endless(engine), engine.submit("abc")
    engine.close()
    engine.close()
    for request in (running, waiting):
        with pytest.raises(ModelError, match="closed before the request ended"):
            request.result(LONG)
    assert running.completion.text.startswith("x")
    with pytest.raises(ModelError, match="the engine is closed"):
        engine.submit("abc")
    assert roomy.generate("abc", max_tokens=1)


def test_draining_an_engine_finishes_its_requests(tiny_model: Model) -> None:
    engine = Engine(tiny_model, max_batch=2)
    requests = [engine.submit("abc", max_tokens=20, logit_bias=END) for _ in range(7)]
    engine.close(drain=True)
    assert [request.result(0).usage.completion_tokens for request in requests] == [20] * 7


def test_closing_the_model_refuses_new_requests_and_finishes_running_ones(tiny_file: Path) -> None:
    model = Model.load(tiny_file, threads=1)
    with Engine(model) as engine:
        request = engine.submit("abc", max_tokens=50, logit_bias=END)
        model.close()
        assert request.result(LONG).usage.completion_tokens == 50
        with pytest.raises(ModelError, match="the model is closed"):
            engine.submit("abc")
    with pytest.raises(ModelError, match="the model is closed"):
        Engine(model)


def test_an_engine_runs_while_it_or_a_request_is_referenced(tiny_model: Model) -> None:
    def engines() -> int:
        return sum(thread.name == "nybble-engine" for thread in threading.enumerate())

    before = engines()
    request = Engine(tiny_model).submit("abc", max_tokens=30, logit_bias=END)
    assert request.result(LONG).usage.completion_tokens == 30
    assert engines() == before + 1
    del request
    assert engines() == before


def run(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.parametrize("ending", ["idle", "running", "exit in a stream"])
def test_the_interpreter_may_exit_with_an_open_engine(tiny_file: Path, ending: str) -> None:
    script = """
        import asyncio, sys
        from nybble import Engine, Model
        engine = Engine(Model.load(sys.argv[1], threads=2))
        if sys.argv[2] == "idle":
            engine.submit("x", max_tokens=2).result()
        elif sys.argv[2] == "running":
            requests = [engine.submit("x", max_tokens=100) for _ in range(200)]
            next(iter(requests[0]), None)
        else:
            async def main():
                async for piece in engine.stream("x", max_tokens=100):
                    sys.exit(0)
            asyncio.run(main())
    """
    done = run(script, tiny_file, ending)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_an_engine_starts_again_in_each_forked_process(tmp_path: Path) -> None:
    file = tiny.write_model(tmp_path / "roomy.gguf", llama__context_length=1 << 16)
    script = """
        import os, sys
        from nybble import Engine, Model, ModelError
        x = {"logit_bias": {120: 1000.0}}
        model = Model.load(sys.argv[1], threads=2)
        engine, closed = Engine(model, max_batch=1), Engine(model)
        closed.close()
        request, waiting = (engine.submit("x", max_tokens=None, **x) for _ in range(2))
        next(iter(request))

        def answers(generations):
            for ask in (lambda: request.result(60), lambda: waiting.result(60), lambda: closed.submit("x")):
                try:
                    ask()
                    os._exit(1)
                except ModelError as error:
                    assert "forked" in str(error) or "closed" in str(error), error
            assert engine.stats().running == engine.stats().prompt_tokens == 0
            for _ in range(2):
                assert engine.submit("x", max_tokens=3, **x).result(60).text == "xxx"
            assert engine.stats().finished == 2
            if generations and (child := os.fork()) == 0:
                answers(generations - 1)
            elif generations:
                ends(child)
            engine.close()
            try:
                engine.submit("x")
            except ModelError:
                sys.exit(17)

        def ends(child):
            _, status = os.waitpid(child, 0)
            assert os.waitstatus_to_exitcode(status) == 17, status

        if (child := os.fork()) == 0:
            answers(1)
        ends(child)
        if (child := os.fork()) == 0:  # Closed before it has started again.
            engine.close()
            sys.exit(17)
        ends(child)
        request.cancel()
        waiting.cancel()
        assert set(request.result(60).text) == {"x"}
        engine.close()
    """
    done = run(script, file)
    assert (done.returncode, done.stderr) == (0, "")


# Options


def test_options_are_given_as_a_dataclass_or_by_name(tiny_model: Model) -> None:
    base = EngineOptions(max_batch=2, max_queue=0)
    with Engine(tiny_model, base, prefix_cache=False) as engine:
        for _ in range(2):
            engine.submit("s" * 100, max_tokens=3).result(LONG)
        assert engine.stats().cached_pages == 0
    with pytest.raises(TypeError, match=r"no such option: max_batches \(options: max_batch, max_queue"):
        Engine(tiny_model, max_batches=2)  # type: ignore[call-arg]
    with pytest.raises(ValueError, match="max_queue: found -1"):
        base.replace(max_queue=-1)


def test_type_checkers_know_every_engine_option_with_its_type() -> None:
    types = get_type_hints(EngineOptions)
    fields = dataclasses.fields(EngineOptions)
    assert get_type_hints(EngineOverrides) == {field.name: types[field.name] for field in fields}
    assert all(field.metadata["help"].endswith(".") for field in fields)


# --- async with


def test_an_engine_ends_with_its_async_block_after_its_requests(tiny_model: Model) -> None:
    async def main() -> tuple[Engine, Completion, str]:
        async with Engine(tiny_model) as engine:
            waiting = engine.submit("abc", max_tokens=20, logit_bias=END)
            text = "".join([piece async for piece in engine.stream("abc", max_tokens=3, logit_bias=END, seed=1)])
        return engine, await waiting, text

    engine, done, text = asyncio.run(main())
    assert len(done.tokens) == 20, "running requests finish first"
    assert text == tiny_model.generate("abc", max_tokens=3, logit_bias=END, seed=1).text
    with pytest.raises(ModelError, match="the engine is closed"):
        engine.submit("abc")


def test_an_async_block_lets_tasks_read_while_it_ends(tiny_model: Model) -> None:
    async def main() -> list[str]:
        async def read(running: Engine) -> list[str]:
            return [text async for text in running.stream("abc", max_tokens=50, logit_bias=END)]

        async with Engine(tiny_model) as engine:
            task = asyncio.create_task(read(engine))
            await asyncio.sleep(0)
        return await task

    assert asyncio.run(main())


def test_an_error_or_a_cancelled_task_ends_an_async_block_at_once(roomy: Model) -> None:
    async def fail() -> Request:
        async with Engine(roomy) as engine:
            requests.append(endless(engine))
            raise RuntimeError("enough")

    async def wait() -> None:
        async with Engine(roomy) as engine:
            requests.append(endless(engine))
            begun.set()

    async def cancel() -> None:
        task = asyncio.create_task(wait())
        await begun.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    requests: list[Request] = []
    with pytest.raises(RuntimeError, match="enough"):
        asyncio.run(fail())
    begun = asyncio.Event()
    asyncio.run(cancel())
    for request in requests:
        with pytest.raises(ModelError, match="closed"):
            request.result(LONG)
