"""The order in which a pool loads and unloads models, with loading under the control of the test."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from serving import wait

from nybble import LoadOptions
from nybble.engine import Engine, EngineStats
from nybble.server import ServeOptions, Service, Settings
from nybble.server.errors import ApiError
from nybble.server.pool import pool as pool_module
from nybble.server.pool.entry import Entry, Loaded
from nybble.server.pool.job import Job
from nybble.server.pool.needs import Limits, Needs
from nybble.server.pool.pool import Pool
from nybble.server.pool.spec import ModelSpec

SIZE = 100


class FakeModel:
    """A model with adapters and nothing else."""

    def __init__(self, adapters: tuple[str, ...]) -> None:
        self.adapters = adapters
        self.info = SimpleNamespace(context=128)

    def unload_adapter(self, name: str) -> None:
        self.adapters = tuple(each for each in self.adapters if each != name)


class Loading:
    """Loads models that only exist by name: at once, unless the test holds them back."""

    def __init__(self) -> None:
        self.started: list[str] = []
        self.closed: list[str] = []
        self.errors: dict[str, Exception] = {}
        self.gates: dict[str, threading.Event] = {}

    def hold(self, name: str) -> threading.Event:
        """Holds loading a model back until the event is set."""
        return self.gates.setdefault(name, threading.Event())

    def load(
        self, spec: ModelSpec, adapters: Any, needs: Needs, settings: Any, shared: Any, job: Job[Loaded]
    ) -> Loaded:
        """Takes the place of `entry.load`."""
        self.started.append(spec.name)
        while (gate := self.gates.get(spec.name)) is not None and not gate.wait(0.001):
            job.report(0, 1)
        if (error := self.errors.get(spec.name)) is not None:
            raise error
        model = FakeModel(tuple(adapters))
        stats = EngineStats(finished=1)
        fake = SimpleNamespace(model=model, stats=lambda: stats, failure=None, close=lambda saving_seconds: None)
        stack = contextlib.ExitStack()
        stack.callback(self.closed.append, spec.name)
        service = Service(cast("Engine", fake), spec.name, settings, spec.aliases, shared)
        return Loaded(service, needs.total_bytes, stack)


class Caller:
    """A request, as the pool sees it."""

    def __init__(self, seconds: float) -> None:
        self.state = SimpleNamespace(leases=contextlib.ExitStack(), deadline=time.monotonic() + seconds)
        self.is_gone = asyncio.Event()

    async def receive(self) -> dict[str, str]:
        await self.is_gone.wait()
        return {"type": "http.disconnect"}


class Requests:
    """Requests for the models of a pool, by a name of their own."""

    def __init__(self, pool: Pool) -> None:
        self.pool = pool
        self.callers: dict[str, Caller] = {}
        self.tasks: dict[str, asyncio.Task[Service]] = {}

    def ask(self, request: str, model: str) -> asyncio.Task[Service]:
        caller = self.callers[request] = Caller(self.pool.settings.request_seconds)
        task = self.tasks[request] = asyncio.ensure_future(self.pool.lease(cast("Any", caller), model))
        return task

    def finish(self, *requests: str) -> None:
        for request in requests:
            self.callers[request].state.leases.close()

    async def served(self, request: str, model: str) -> None:
        """Asks for a model, and waits for it."""
        assert (await self.ask(request, model)).name == model

    def waiting(self) -> list[str]:
        return [request for request, task in self.tasks.items() if not task.done()]


@pytest.fixture
def loading(monkeypatch: pytest.MonkeyPatch) -> Loading:
    loading = Loading()
    monkeypatch.setattr(pool_module, "load", loading.load)
    return loading


def entry(name: str, nbytes: int = SIZE, **changes: Any) -> Entry:
    spec = ModelSpec(name=name, source=f"{name}.gguf", load=LoadOptions(), options=ServeOptions())
    needs = Needs("llama", 1000, 128, nbytes - 1, 1)
    return Entry(name, Settings(), **{"spec": spec, "needs": needs, **changes})


def run(
    test: Callable[[Requests], Awaitable[None]],
    *entries: Entry,
    max_bytes: int | None = 2 * SIZE,
    max_loaded: int | None = None,
    **settings: Any,
) -> Pool:
    """Runs a test with a pool, and frees its models at the end."""
    pool = Pool(entries or [entry("a"), entry("b"), entry("c")], Settings(**settings), Limits(max_bytes, max_loaded))

    async def main() -> None:
        requests = Requests(pool)
        await test(requests)
        for task in requests.tasks.values():
            task.cancel()
        await asyncio.gather(*requests.tasks.values(), return_exceptions=True)

    asyncio.run(main())
    pool.close()
    return pool


async def until(condition: Callable[[], bool]) -> None:
    """Lets the event loop run until a condition holds, at most a minute."""
    async with asyncio.timeout(60) if hasattr(asyncio, "timeout") else contextlib.nullcontext():
        while not condition():
            await asyncio.sleep(0.001)


async def settled(requests: Requests) -> None:
    """Lets the event loop run until no model is being loaded or unloaded, and nobody else has a turn."""
    for _ in range(20):
        await asyncio.sleep(0)
    await until(lambda: all(each.job is None for each in requests.pool.entries))
    for _ in range(20):
        await asyncio.sleep(0)


def states(requests: Requests) -> dict[str, str]:
    return {each.name: each.state for each in requests.pool.entries}


def test_requests_that_come_together_load_a_model_once(loading: Loading) -> None:
    gate = loading.hold("a")

    async def test(requests: Requests) -> None:
        tasks = [requests.ask(f"a{number}", "a") for number in range(5)]
        await requests.served("b1", "b")  # A load does not hold up other models.
        assert len(requests.waiting()) == 5
        gate.set()
        services = [await task for task in tasks]
        assert len({id(service) for service in services}) == 1
        assert requests.pool.entries[0].users == 5

    run(test)
    assert loading.started == ["a", "b"]
    assert sorted(loading.closed) == ["a", "b"]


def test_the_model_that_was_used_least_recently_is_unloaded(loading: Loading) -> None:
    async def test(requests: Requests) -> None:
        for request, model in (("1", "a"), ("2", "b"), ("3", "a"), ("4", "c")):
            await requests.served(request, model)
            requests.finish(request)
        assert states(requests) == {"a": "loaded", "b": "unloaded", "c": "loaded"}
        await requests.served("5", "b")
        requests.finish("5")
        assert states(requests) == {"a": "unloaded", "b": "loaded", "c": "loaded"}
        assert requests.pool.used_bytes == 2 * SIZE

    pool = run(test)
    assert loading.started == ["a", "b", "c", "b"]
    assert [each.stats().finished for each in pool.entries] == [1, 2, 1]


@pytest.mark.parametrize("limits", [{"max_bytes": 2 * SIZE}, {"max_bytes": None, "max_loaded": 2}])
def test_a_model_in_use_stays_until_its_requests_have_ended(loading: Loading, limits: dict[str, Any]) -> None:
    async def test(requests: Requests) -> None:
        await requests.served("a1", "a")
        await requests.served("b1", "b")
        requests.ask("c1", "c")
        await settled(requests)
        assert states(requests) == {"a": "loaded", "b": "loaded", "c": "unloaded"}
        # The model that has to leave takes no more requests, the other one does.
        requests.ask("a2", "a")
        await requests.served("b2", "b")
        await settled(requests)
        assert requests.waiting() == ["c1", "a2"]
        requests.finish("a1")
        assert (await requests.tasks["c1"]).name == "c"
        assert states(requests)["a"] == "unloaded"
        # It is loaded again in its turn: after the request that came before.
        requests.finish("b1", "b2")
        assert (await requests.tasks["a2"]).name == "a"
        assert states(requests) == {"a": "loaded", "b": "unloaded", "c": "loaded"}

    run(test, **limits)
    assert loading.started == ["a", "b", "c", "a"]


def test_requests_without_memory_get_their_turn_in_order(loading: Loading) -> None:
    async def test(requests: Requests) -> None:
        await requests.served("a1", "a")
        order = ["b1", "c1", "a2", "b2", "c2"]
        for request in order:
            requests.ask(request, request[0])
        served = ["a1"]
        for _ in range(10):
            requests.finish(*served)
            await settled(requests)
            served += [request for request in order if request not in served and requests.tasks[request].done()]
        # Both requests for a model are served together, the models in the order of the first ones.
        assert served == ["a1", "b1", "b2", "c1", "c2", "a2"]

    run(test, max_bytes=SIZE)


def test_a_request_that_leaves_gives_up_its_place(loading: Loading) -> None:
    async def test(requests: Requests) -> None:
        await requests.served("a1", "a")
        await requests.served("b1", "b")
        requests.ask("c1", "c")
        requests.ask("a2", "a")
        await settled(requests)
        assert requests.waiting() == ["c1", "a2"]
        requests.callers["c1"].is_gone.set()
        with pytest.raises(ApiError, match="the client has disconnected"):
            await requests.tasks["c1"]
        assert (await requests.tasks["a2"]).name == "a"
        assert requests.pool.waiting == 0

    run(test)
    assert loading.started == ["a", "b"]


def test_a_load_continues_when_its_client_leaves(loading: Loading) -> None:
    gate = loading.hold("a")

    async def test(requests: Requests) -> None:
        first, second = requests.ask("a1", "a"), requests.ask("a2", "a")
        await until(lambda: loading.started == ["a"])
        requests.callers["a1"].is_gone.set()
        second.cancel()
        await asyncio.wait([first, second])
        gate.set()
        await settled(requests)
        assert states(requests)["a"] == "loaded"
        await requests.served("a3", "a")
        assert requests.pool.entries[0].users == 1

    run(test)
    assert loading.started == ["a"]


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (ValueError("a.gguf: damaged"), 500, "model_not_loaded"),
        (MemoryError("too little memory"), 503, "out_of_memory"),
        (ConnectionError("no network"), 503, "model_not_loaded"),
    ],
)
def test_an_error_in_loading_ends_the_requests_that_wait_and_no_later_ones(
    loading: Loading, monkeypatch: pytest.MonkeyPatch, error: Exception, status: int, code: str
) -> None:
    loading.errors["a"] = error
    needs = entry("a").needs
    monkeypatch.setattr(pool_module, "prepare", lambda *_: needs)

    async def test(requests: Requests) -> None:
        tasks = [requests.ask("a1", "a"), requests.ask("a2", "a")]
        for task in tasks:
            with pytest.raises(ApiError, match="'a' could not be loaded") as found:
                await task
            assert str(error) in str(found.value)
            assert (found.value.status, found.value.code) == (status, code)
        assert requests.pool.used_bytes == 0
        del loading.errors["a"]
        await requests.served("a3", "a")

    pool = run(test)
    assert (pool.entries[0].failures, pool.entries[0].loads) == (1, 1)


def test_a_model_is_measured_when_its_first_request_comes(loading: Loading, monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"a": Needs("llama", 1, 4096, SIZE, 0), "b": Needs("llama", 1, 128, 3 * SIZE, 0)}
    monkeypatch.setattr(pool_module, "prepare", lambda spec, *_: found[spec.name])

    async def test(requests: Requests) -> None:
        assert requests.pool.entries[0].context is None
        await requests.served("a1", "a")
        assert requests.pool.entries[0].context == 128  # That of the loaded model.
        with pytest.raises(ApiError, match=r"'b' needs 300 bytes .* but models may take 200 bytes") as error:
            await requests.ask("b1", "b")
        assert error.value.code == "model_too_large"

    run(test, entry("a", needs=None), entry("b", needs=None))
    assert loading.started == ["a"]


def test_too_many_requests_that_wait_are_refused(loading: Loading) -> None:
    loading.hold("a")

    async def test(requests: Requests) -> None:
        requests.ask("a1", "a")
        requests.ask("a2", "a")
        await until(lambda: requests.pool.waiting == 2)
        with pytest.raises(ApiError) as error:
            await requests.ask("a3", "a")
        assert (error.value.status, error.value.code) == (429, "queue_full")

    run(test, max_answers=2)


def test_the_wait_for_a_model_has_the_time_limit_of_answers(loading: Loading) -> None:
    loading.hold("a")

    async def test(requests: Requests) -> None:
        with pytest.raises(ApiError, match="'a' was not loaded within 0 seconds") as error:
            await requests.ask("a1", "a")
        assert error.value.status == 503
        assert requests.pool.waiting == 0

    run(test, request_seconds=0)


def test_shutting_down_refuses_requests_that_wait_and_stops_loading(loading: Loading) -> None:
    loading.hold("a")

    async def test(requests: Requests) -> None:
        task = requests.ask("a1", "a")
        await until(lambda: loading.started == ["a"])
        requests.pool.shared.draining = True
        requests.pool.refuse_waiting()
        for each in (task, requests.ask("a2", "a")):
            with pytest.raises(ApiError) as error:
                await each
            assert error.value.code == "shutting_down"

    pool = run(test)  # It stops what is being loaded, and waits for it.
    assert pool.entries[0].loaded is None
    assert loading.closed == []


def test_a_model_whose_load_ends_after_the_event_loop_is_freed(loading: Loading) -> None:
    gate = loading.hold("a")
    pool = Pool([entry("a")], Settings(), Limits())

    async def main() -> None:
        task = Requests(pool).ask("a1", "a")
        await until(lambda: loading.started == ["a"])
        task.cancel()

    asyncio.run(main())
    gate.set()
    wait(lambda: (job := pool.entries[0].job) is not None and job.result is not None)
    pool.close()
    assert loading.closed == ["a"]


def test_idle_models_are_unloaded_after_their_time(loading: Loading) -> None:
    async def test(requests: Requests) -> None:
        await requests.served("a1", "a")
        await requests.served("b1", "b")
        requests.finish("b1")
        await settled(requests)
        assert states(requests) == {"a": "loaded", "b": "loaded"}
        requests.finish("a1")
        await until(lambda: states(requests)["a"] == "unloaded")
        # A request may ask for another time, until the next one.
        await requests.served("a2", "a")
        requests.pool.keep(requests.pool.entries[0], float("inf"))
        requests.finish("a2")
        await settled(requests)
        assert states(requests) == {"a": "loaded", "b": "loaded"}
        requests.pool.keep(requests.pool.entries[1], 0)
        await until(lambda: states(requests)["b"] == "unloaded")
        await requests.served("a3", "a")
        requests.finish("a3")
        await until(lambda: states(requests)["a"] == "unloaded")

    run(test, entry("a", unload_after=0), entry("b"))


def test_adapters_count_and_come_back_with_their_model(loading: Loading, tmp_path: Path) -> None:
    file = tmp_path / "lora.gguf"
    file.write_bytes(b"x" * 10)

    async def test(requests: Requests) -> None:
        pool = requests.pool
        (first, _) = pool.entries
        await requests.served("a1", "a")
        with pytest.raises(ValueError, match="damaged"):
            async with pool.adding_adapter(first, "new", file):
                raise ValueError("damaged")
        await requests.served("b0", "b")
        with pytest.raises(ApiError, match="the adapter needs 20 bytes"):
            async with pool.adding_adapter(first, "new", file):
                raise AssertionError("there is no memory")
        assert (pool.used_bytes, first.adapters) == (2 * SIZE, {})
        requests.finish("b0")
        async with pool.adding_adapter(first, "new", file):
            # It is loaded once the other model is gone.
            assert states(requests) == {"a": "loaded", "b": "unloaded"}
        assert pool.used_bytes == SIZE + 20
        requests.finish("a1")
        await requests.served("b1", "b")  # 220 bytes are too many for both.
        assert states(requests) == {"a": "unloaded", "b": "loaded"}
        assert pool.names.listed() == ["a", "a:new", "b"]
        requests.finish("b1")
        assert (await requests.ask("a2", "a:new")).engine.model.adapters == ("new",)
        requests.finish("a2")
        await requests.served("b2", "b")
        pool.remove_adapter(first, "new")
        assert pool.names.listed() == ["a", "b"]

    run(test, entry("a"), entry("b"))


def test_an_adapter_that_is_removed_returns_its_memory(loading: Loading, tmp_path: Path) -> None:
    file, other = tmp_path / "lora.gguf", tmp_path / "other.gguf"
    gate = loading.hold("b")

    async def test(requests: Requests) -> None:
        pool = requests.pool
        first, second = pool.entries
        await requests.served("a1", "a")
        for path, nbytes in ((file, 10), (file, 15), (other, 5)):  # It replaces the one before.
            path.write_bytes(b"x" * nbytes)
            async with pool.adding_adapter(first, "new", path):
                pass
            assert pool.used_bytes == SIZE + 2 * nbytes
        other.unlink()
        pool.remove_adapter(first, "new")
        assert pool.used_bytes == SIZE
        # A model that is being loaded has the adapter at first.
        second.adapters["early"] = file
        task = requests.ask("b1", "b")
        await until(lambda: second.state == "loading")
        pool.remove_adapter(second, "early")
        gate.set()
        await task
        assert (second.lora_names, pool.used_bytes) == ((), 2 * SIZE)

    run(test, entry("a"), entry("b"), max_bytes=10 * SIZE)


@pytest.mark.parametrize("fails", [True, False])
def test_an_adapter_may_be_removed_while_it_is_added(loading: Loading, tmp_path: Path, fails: bool) -> None:
    old, new = tmp_path / "old.gguf", tmp_path / "new.gguf"
    old.write_bytes(b"x" * 5)
    new.write_bytes(b"x" * 7)

    async def test(requests: Requests) -> None:
        pool, first = requests.pool, requests.pool.entries[0]
        await requests.served("a1", "a")
        async with pool.adding_adapter(first, "new", old):
            pass
        with pytest.raises(ValueError, match="damaged") if fails else contextlib.nullcontext():
            async with pool.adding_adapter(first, "new", new):
                pool.remove_adapter(first, "new")
                if fails:
                    raise ValueError("damaged")
        assert first.adapters == ({} if fails else {"new": new})
        assert pool.used_bytes == SIZE + (0 if fails else 14)

    run(test)


def test_adapters_wait_for_the_memory_of_a_model_that_leaves(loading: Loading, tmp_path: Path) -> None:
    file = tmp_path / "lora.gguf"
    file.write_bytes(b"x" * 5)
    gate = threading.Event()

    async def test(requests: Requests) -> None:
        pool = requests.pool
        first, second, _ = pool.entries
        added: list[str] = []

        async def add(name: str) -> None:
            async with pool.adding_adapter(first, name, file):
                assert pool.used_bytes <= 2 * SIZE
                added.append(name)

        await requests.served("a1", "a")
        await requests.served("b1", "b")
        requests.finish("b1")
        assert second.loaded is not None
        second.loaded.resources.callback(gate.wait)
        tasks = [asyncio.ensure_future(add(name)) for name in ("one", "two")]
        for _ in range(20):
            await asyncio.sleep(0)
        assert (states(requests)["b"], added) == ("unloading", [])
        gate.set()
        await asyncio.gather(*tasks)
        assert sorted(added) == ["one", "two"]

    run(test)


def test_memory_of_a_model_that_cannot_be_unloaded_stays_reserved(
    loading: Loading, caplog: pytest.LogCaptureFixture
) -> None:
    async def test(requests: Requests) -> None:
        first = requests.pool.entries[0]
        await requests.served("a1", "a")
        assert first.loaded is not None
        first.loaded.resources.callback(_fail)
        requests.finish("a1")
        requests.pool.keep(first, 0)
        await until(lambda: first.state == "unloaded")
        assert requests.pool.used_bytes == SIZE
        await requests.served("a2", "a")
        assert requests.pool.used_bytes == 2 * SIZE
        with pytest.raises(ApiError, match=r"'large' needs 150 bytes .* but models may take 100 bytes"):
            await requests.ask("c1", "large")

    run(test, entry("a"), entry("large", SIZE + SIZE // 2))
    assert "the model a could not be unloaded: its memory stays reserved" in caplog.text


def _fail() -> None:
    raise RuntimeError("damaged")


def test_closing_a_pool_frees_all_models_together_even_if_one_fails(
    loading: Loading, caplog: pytest.LogCaptureFixture
) -> None:
    both = threading.Barrier(2)

    async def test(requests: Requests) -> None:
        for name in "abc":
            await requests.served(name, name)
        first, *others = [each.loaded for each in requests.pool.entries]
        assert first is not None
        first.resources.callback(_fail)
        for loaded in others:
            assert loaded is not None
            loaded.resources.callback(both.wait, 60)

    run(test, max_bytes=None)
    assert sorted(loading.closed) == ["a", "b", "c"]
    assert not both.broken
    assert "the model a could not be unloaded" in caplog.text


def test_work_in_a_thread_ends_before_the_lease_of_a_cancelled_request(loading: Loading) -> None:
    started, gate, ended = threading.Event(), threading.Event(), threading.Event()

    def work() -> None:
        started.set()
        gate.wait(60)
        ended.set()
        raise ValueError("nobody asks for it")

    async def test(requests: Requests) -> None:
        service = await requests.ask("a1", "a")
        task = asyncio.ensure_future(service.in_thread(work))
        await until(started.is_set)
        for _ in range(3):
            task.cancel()
            for _ in range(20):
                await asyncio.sleep(0)
            assert not task.done()
        gate.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert ended.is_set()

    run(test)


@pytest.fixture(autouse=True)
def _without_threads_left() -> Iterator[None]:
    """No test leaves a thread that loads."""
    yield
    wait(lambda: "nybble-loading" not in [thread.name for thread in threading.enumerate()])
