"""Many requests over one model: each gets the text that it would get alone, whatever the others do."""

from __future__ import annotations

import asyncio
import math
import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny

from nybble import Completion, ContextFullError, Engine, Model, ModelError, QueueFullError, Request, SamplingOptions

# Under this bias the model never ends the text by itself.
END = dict.fromkeys((tiny.END_OF_TEXT, tiny.IM_START, tiny.IM_END), -math.inf)
# So long that a test that waits for it in vain fails.
LONG = 60


@pytest.fixture
def engine(tiny_model: Model) -> Iterator[Engine]:
    with Engine(tiny_model) as engine:
        yield engine


@pytest.fixture(scope="module")
def roomy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    """A model whose texts go on for longer than any test waits, unless they are stopped."""
    file = tiny.write_model(tmp_path_factory.mktemp("roomy") / "roomy.gguf", llama__context_length=1 << 16)
    with Model.load(file, threads=2) as model:
        yield model


def endless(engine: Engine, prompt: str = "abc") -> Request:
    """A request that is being written."""
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
    """Equal but for the times, and for what did not need computing."""

    def what(it: Completion) -> tuple[object, ...]:
        return it.text, it.tokens, it.finish_reason, it.logprobs, it.usage.prompt_tokens, it.usage.completion_tokens

    return what(done) == what(alone)


@pytest.mark.parametrize("speculation", ["off", "on", "auto"])
def test_sixty_four_requests_some_cancelled_get_what_each_gets_alone(tiny_model: Model, speculation: str) -> None:
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


def test_a_list_of_prompts_gives_what_each_prompt_gives_alone(tiny_model: Model) -> None:
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


def test_a_coroutine_waits_for_one_text_or_for_several(tiny_model: Model, engine: Engine) -> None:
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


def test_no_token_asked_is_no_token_written(engine: Engine) -> None:
    request = engine.submit("abc", max_tokens=0)
    assert (list(request), request.result(0).finish_reason) == ([], "length")


def test_tokens_of_a_stop_string_come_as_a_piece_without_text(tiny_model: Model, engine: Engine) -> None:
    request = engine.submit("abc", logit_bias={b"x"[0]: 1000.0}, stop=["xxx"], max_tokens=9)
    assert [(piece.text, len(piece.tokens)) for piece in request] == [("", 3)]
    assert request.result(LONG).finish_reason == "stop"


@pytest.mark.parametrize("speculation", ["off", "on"])
def test_texts_that_are_held_to_a_schema_are_written_beside_others(tiny_model: Model, speculation: str) -> None:
    schema = {"type": "object", "properties": {"a": {"enum": ["x", "yy"]}, "b": {"type": "boolean"}}}
    held = [SamplingOptions(schema=schema, seed=i, temperature=1.5, max_tokens=60) for i in range(5)]
    free = [SamplingOptions(seed=i, max_tokens=20 + i, logit_bias=END) for i in range(5)]
    with Engine(tiny_model, speculation=speculation) as engine:  # type: ignore[arg-type]
        requests = [engine.submit(f"prompt {i}", options) for i, options in enumerate(held + free)]
        for i, options in enumerate(held + free):
            assert same(requests[i].result(LONG), tiny_model.generate(f"prompt {i}", options)), i


# Prefixes


def test_a_prompt_that_begins_like_an_earlier_one_reuses_its_pages(tiny_model: Model, engine: Engine) -> None:
    system = "s" * 64
    first = engine.submit(system + "one", max_tokens=3, seed=1).result(LONG)
    assert engine.stats().reused_tokens == 0
    second = engine.submit(system + "two", max_tokens=3, seed=1).result(LONG)
    assert engine.stats().reused_tokens == 64
    assert (first.usage.cached_tokens, second.usage.cached_tokens) == (0, 64)
    assert same(first, tiny_model.generate(system + "one", max_tokens=3, seed=1))
    assert same(second, tiny_model.generate(system + "two", max_tokens=3, seed=1))
    assert engine.stats().cached_pages == 1


def test_nothing_is_kept_where_that_is_switched_off(tiny_model: Model) -> None:
    with Engine(tiny_model, prefix_cache=False) as engine:
        for _ in range(2):
            engine.submit("s" * 100, max_tokens=3).result(LONG)
        assert (engine.stats().reused_tokens, engine.stats().cached_pages) == (0, 0)


def test_a_memory_limit_is_kept_and_a_text_that_needs_more_is_a_memory_error(tiny_model: Model) -> None:
    page = 64 * tiny_model.info.cache_bytes_per_token
    options = SamplingOptions(max_tokens=None, logit_bias={**END, b"x"[0]: 1000.0})
    with Engine(tiny_model, cache_bytes=page) as engine:
        requests = [engine.submit(f"{i}" * 10, options) for i in range(3)]
        for request in requests:
            with pytest.raises(MemoryError, match="key/value cache of one sequence"):
                request.result(LONG)
            assert request.completion.usage.completion_tokens == 64 - 10 + 1
        assert engine.stats().cache_bytes <= page
        assert engine.submit("abc", max_tokens=5, seed=1).result(LONG).text


# Leaving


def test_a_cancelled_request_ends_at_once_with_what_it_has(roomy: Model) -> None:
    with Engine(roomy, max_batch=1) as engine:
        request = endless(engine)
        waiting = engine.submit("abc", max_tokens=4, logit_bias=END)
        request.cancel()
        request.cancel()
        done = request.result(LONG)
        assert done.finish_reason == "cancelled"
        assert set(done.text) == {"x"}
        assert len(list(request)) == len(done.tokens)
        assert waiting.result(LONG).finish_reason == "length", "the place is free"
        assert (engine.stats().cancelled, engine.stats().finished) == (1, 1)


def test_a_request_may_be_cancelled_while_it_waits(roomy: Model) -> None:
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


def test_a_loop_that_was_closed_leaves_no_request_behind(roomy: Model) -> None:
    with Engine(roomy, max_batch=1) as engine:
        loop = asyncio.new_event_loop()
        stream = engine.stream("abc", max_tokens=None, logit_bias={b"x"[0]: 1000.0})
        assert loop.run_until_complete(anext(stream)) == "x"
        loop.close()
        del stream
        assert engine.submit("abc", max_tokens=2, logit_bias=END).result(LONG).usage.completion_tokens == 2


# What goes wrong


def test_what_cannot_be_asked_is_refused_at_once(tiny_model: Model, engine: Engine) -> None:
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


def test_a_full_queue_refuses_and_takes_again_when_there_is_room(roomy: Model) -> None:
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


def test_one_text_that_fails_leaves_the_others_alone(tiny_model: Model, engine: Engine) -> None:
    nothing = dict.fromkeys(range(tiny.VOCABULARY), -math.inf)
    bad, good = engine.submit("abc", logit_bias=nothing), engine.submit("abc", max_tokens=5, seed=1)
    with pytest.raises(ModelError, match="logits"):
        bad.result(LONG)
    with pytest.raises(ModelError, match="logits"):
        list(bad)
    assert good.result(LONG).text == tiny_model.generate("abc", max_tokens=5, seed=1).text


def test_an_error_in_the_loop_reaches_everyone_who_waits(roomy: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(roomy, max_batch=1)
    running, waiting = endless(engine), engine.submit("abc")
    monkeypatch.setattr(Request, "_push", lambda *_: 1 // 0)
    for request in (running, waiting):
        with pytest.raises(ZeroDivisionError):
            request.result(LONG)
    with pytest.raises(ModelError, match="engine has failed: integer division"):
        engine.submit("abc")
    engine.close()


def test_waiting_ends_when_the_time_is_up_and_the_text_goes_on(roomy: Model) -> None:
    with Engine(roomy) as engine:
        request = endless(engine)
        with pytest.raises(TimeoutError, match="not finished within 0 seconds"):
            request.result(0)
        assert not request._is_done
        request.cancel()


# The end


def test_a_closed_engine_takes_nothing_and_fails_what_it_has(roomy: Model) -> None:
    engine = Engine(roomy, max_batch=1)
    running, waiting = endless(engine), engine.submit("abc")
    engine.close()
    engine.close()
    for request in (running, waiting):
        with pytest.raises(ModelError, match="closed before the text was finished"):
            request.result(LONG)
    assert running.completion.text.startswith("x")
    with pytest.raises(ModelError, match="the engine is closed"):
        engine.submit("abc")
    assert roomy.generate("abc", max_tokens=1)


def test_a_drained_engine_finishes_what_it_has(tiny_model: Model) -> None:
    engine = Engine(tiny_model, max_batch=2)
    requests = [engine.submit("abc", max_tokens=20, logit_bias=END) for _ in range(7)]
    engine.close(drain=True)
    assert [request.result(0).usage.completion_tokens for request in requests] == [20] * 7


def test_a_closed_model_takes_no_requests_and_finishes_those_it_has(tiny_file: Path) -> None:
    model = Model.load(tiny_file, threads=1)
    with Engine(model) as engine:
        request = engine.submit("abc", max_tokens=50, logit_bias=END)
        model.close()
        assert request.result(LONG).usage.completion_tokens == 50
        with pytest.raises(ModelError, match="the model is closed"):
            engine.submit("abc")
    with pytest.raises(ModelError, match="the model is closed"):
        Engine(model)


def test_a_forgotten_engine_ends_and_one_whose_request_is_held_does_not(tiny_model: Model) -> None:
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
def test_the_interpreter_may_end_with_an_engine_that_was_not_closed(tiny_file: Path, ending: str) -> None:
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
def test_a_forked_process_is_told_that_the_engine_stayed_behind(tmp_path: Path) -> None:
    file = tiny.write_model(tmp_path / "roomy.gguf", llama__context_length=1 << 16)
    script = """
        import os, sys
        from nybble import Engine, Model, ModelError
        model = Model.load(sys.argv[1], threads=2)
        engine = Engine(model)
        request = engine.submit("x", max_tokens=None, logit_bias={120: 1000.0})
        next(iter(request))
        if (child := os.fork()) == 0:
            for ask in (lambda: request.result(60), lambda: engine.submit("x")):
                try:
                    ask()
                    os._exit(1)
                except ModelError as error:
                    assert "forked" in str(error), error
            engine.close()
            with Engine(model) as own:
                assert own.submit("x", max_tokens=3, logit_bias={120: 1000.0}).result(60).text == "xxx"
            os._exit(17)
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == 17, status
        request.cancel()
        assert set(request.result(60).text) == {"x"}
        engine.close()
    """
    done = run(script, file)
    assert (done.returncode, done.stderr) == (0, "")


# Guesses


def test_guesses_that_are_right_save_steps_and_change_nothing(tiny_model: Model) -> None:
    options = SamplingOptions(temperature=0, max_tokens=60, logit_bias={b"x"[0]: 1000.0})
    with Engine(tiny_model, speculation="on") as engine:
        assert same(engine.submit("abc", options).result(LONG), tiny_model.generate("abc", options))
        stats = engine.stats()
        assert stats.accepted_tokens > 40
        assert stats.steps < 30


def test_a_draft_model_guesses_and_changes_nothing(tmp_path: Path, tiny_file: Path, tiny_model: Model) -> None:
    small = tiny.write_model(tmp_path / "small.gguf", layers=1)
    options = SamplingOptions(seed=3, max_tokens=60, temperature=1.0, logit_bias=END)
    alone = tiny_model.generate("abc", options)
    for file in (tiny_file, small):
        with (
            Model.load(file, threads=1) as draft,
            Engine(tiny_model, speculation="on", draft=draft) as engine,
        ):
            assert same(engine.submit("abc", options).result(LONG), alone)
            stats = engine.stats()
            assert stats.drafted_tokens > 0
            assert (stats.accepted_tokens == stats.drafted_tokens) == (file == tiny_file)


def test_a_draft_model_that_cannot_help_is_refused(tmp_path: Path, tiny_model: Model) -> None:
    tokens = tiny.metadata()["tokenizer.ggml.tokens"]
    other = tiny.write_model(tmp_path / "other.gguf", tokenizer__ggml__tokens=[tokens[1], tokens[0], *tokens[2:]])
    with Model.load(other, threads=1) as draft:
        with pytest.raises(ValueError, match=r"draft: found .* as token 0"):
            Engine(tiny_model, speculation="on", draft=draft)
        with pytest.raises(ValueError, match='speculation is "off"'):
            Engine(tiny_model, draft=draft)
