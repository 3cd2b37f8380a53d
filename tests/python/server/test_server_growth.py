"""The server keeps nothing of clients that have left. Objects are counted, since resident memory is too noisy."""

from __future__ import annotations

import asyncio
import gc
import logging
import random
import threading
import time
from collections import Counter
from collections.abc import Iterator

import load
import pytest
import tiny
from serving import Running, serving

from nybble import Model
from nybble.engine import Engine
from nybble.server import http_server
from nybble.server.connections import Connections

KINDS = ["garbage", "broken_json", "wrong", "oversized", "cut_off", "leaves", "good"]
ONCE = 80
"""Clients of a burst."""


@pytest.fixture(autouse=True)
def no_log(caplog: pytest.LogCaptureFixture) -> None:
    """Keeps pytest from collecting the lines of requests, which are objects, too."""
    caplog.set_level(logging.WARNING, "nybble.server")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    file = tiny.write_model(tmp_path_factory.mktemp("growth") / "tiny.gguf", llama__context_length=4096)
    with (
        Model.load(file, threads=1) as model,
        # A prefix cache so small that it fills up at once.
        Engine(model, max_batch=8, max_queue=128, cache_bytes=1_500_000) as engine,
        serving(engine) as running,
    ):
        yield running


def burst(server: Running, kind: str, seed: int) -> None:
    """Runs many clients of a kind, a few at a time, until none of their requests is in flight."""
    clients = load.Load(*server.address, random.Random(seed))

    async def run() -> None:
        few = asyncio.Semaphore(16)

        async def one() -> None:
            async with few:
                await (clients.good() if kind == "good" else clients.bad(getattr(clients, kind)))

        await asyncio.gather(*(one() for _ in range(ONCE)))

    asyncio.run(run())
    stats = server.service.engine.stats
    server.wait(lambda: (stats().running, stats().waiting, server.service.working) == (0, 0, 0))


def objects() -> Counter[str]:
    for _ in range(3):
        gc.collect()
    return Counter(f"{type(found).__module__}.{type(found).__qualname__}" for found in gc.get_objects())


@pytest.mark.parametrize("kind", KINDS)
def test_no_objects_are_kept_of_disconnected_clients(server: Running, kind: str) -> None:
    burst(server, kind, 0)
    before = objects()
    # Objects that are made once, or are about to go, grow once. A leak grows with every burst.
    for seed in range(1, 7):
        burst(server, kind, seed)
        # Connections end a little later than their requests.
        for _ in range(20):
            after = objects()
            grown = after - before
            if max(grown.values(), default=0) < ONCE // 4:
                return check_service(server)
            time.sleep(0.05)
        before = after
    pytest.fail(f"{ONCE} clients left behind {grown.most_common(5)}")


def check_service(server: Running) -> None:
    """Asserts that the engine of an idle server holds no requests."""
    service = server.service
    assert not service._running
    assert not service.engine._loop._requests
    driver = service.engine._loop._driver
    assert driver is not None
    assert len(driver) == 0
    assert service.engine.stats().cache_bytes <= 1_500_000


def test_prompts_are_prepared_by_few_threads(server: Running) -> None:
    # Each thread keeps a cache of words for its tokenizer, and memory of its own.
    burst(server, "good", 9)
    assert sum("AnyIO worker" in thread.name for thread in threading.enumerate()) <= 4


def test_all_connections_read_into_one_buffer(server: Running) -> None:
    # For other protocols, asyncio allocates 256 kB per read, which fragments memory.
    protocol = http_server._protocol(server.service.settings, Connections(1))
    assert issubclass(protocol, asyncio.BufferedProtocol)
    body = b" " * 150_000 + b'{"messages": [{"role": "user", "content": "x"}], "max_tokens": 1}'
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {server.url[7:]}\r\nContent-Type: application/json\r\n"
    with server.connection() as connection:
        connection.sendall(f"{head}Connection: close\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
    assert answer.startswith(b"HTTP/1.1 200")
