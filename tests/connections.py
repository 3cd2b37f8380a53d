"""Opens more connections than a server may have open files: `python tests/connections.py`.

Most of them are idle. The others send a request, and each must be answered, as must /health afterwards. The log must
stay short. Otherwise the exit code is 1. Without a model, a tiny one with random weights is served.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "python" / "support"))
import tiny

LOG_BYTES = 100_000


@dataclass
class Outcome:
    """What the clients and the log show."""

    statuses: list[int]
    """The status of each working connection's answer; 0 for none."""
    health: int
    log_bytes: int
    seconds: float

    @property
    def is_good(self) -> bool:
        """Whether every request was answered and the log stayed short."""
        return set(self.statuses) == {200} and self.health == 200 and self.log_bytes < LOG_BYTES

    def __str__(self) -> str:
        answered = self.statuses.count(200)
        return (
            f"{answered} of {len(self.statuses)} requests answered, /health {self.health}, "
            f"{self.log_bytes:,} bytes of log, {self.seconds:.1f} s"
        )


def _request(path: str, body: object = None) -> bytes:
    text = b"" if body is None else json.dumps(body).encode()
    head = f"{'GET' if body is None else 'POST'} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
    return f"{head}Content-Type: application/json\r\nContent-Length: {len(text)}\r\n\r\n".encode() + text


async def _ask(port: int, request: bytes, is_sent: asyncio.Event | None = None) -> int:
    """The status of the answer to a request; 0 if there is none."""
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(request)
        await writer.drain()
        if is_sent is not None:
            is_sent.set()
        answer = await asyncio.wait_for(reader.read(), 300)
        writer.close()
        return int(answer.split()[1])
    except (OSError, IndexError, asyncio.TimeoutError):
        return 0


async def _clients(port: int, connections: int, working: int, tokens: int) -> tuple[list[int], int]:
    """Opens idle connections before and after the working ones, and waits for the answers."""
    body = {"prompt": "x", "max_tokens": tokens, "stream": True}
    idle = []

    async def open_idle(count: int) -> None:
        for _ in range(count):
            idle.append(await asyncio.open_connection("127.0.0.1", port))

    before = (connections - working) // 2
    await open_idle(before)
    tasks = []
    for _ in range(working):
        is_sent = asyncio.Event()
        task = asyncio.create_task(_ask(port, _request("/v1/completions", body), is_sent))
        tasks.append(task)
        await asyncio.wait([task, asyncio.create_task(is_sent.wait())], return_when=asyncio.FIRST_COMPLETED)
    await open_idle(connections - working - before)
    statuses = list(await asyncio.gather(*tasks))
    health = await _ask(port, _request("/health"))
    for _, writer in idle:
        writer.close()
    return statuses, health


def attack(model: Path, files: int, connections: int, working: int, tokens: int = 30) -> Outcome:
    """Serves a model in a process with at most `files` open files, and connects to it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    own = connections + 200
    if soft != resource.RLIM_INFINITY and soft < own:
        resource.setrlimit(resource.RLIMIT_NOFILE, (own if hard == resource.RLIM_INFINITY else min(own, hard), hard))
    command = [sys.executable, "-m", "nybble", "serve", str(model), "--port", "0", "--max-queue", str(working)]
    with tempfile.TemporaryFile() as log:
        started = time.monotonic()
        process = subprocess.Popen(
            command,
            stderr=log,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (files, files)),
        )
        try:
            port = _port(process, log.fileno())
            statuses, health = asyncio.run(_clients(port, connections, working, tokens))
            seconds = time.monotonic() - started
        finally:
            process.terminate()
            process.wait(60)
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        log.seek(0, 2)
        return Outcome(statuses, health, log.tell(), seconds)


def _port(process: subprocess.Popen[bytes], log: int) -> int:
    """Waits until the server logs its address."""
    while process.poll() is None:
        for line in Path(f"/dev/fd/{log}").read_bytes().decode().splitlines():
            if line.split()[:1] == ["page"]:
                return int(line.split()[1].rpartition(":")[2].strip("/"))
        time.sleep(0.05)
    text = Path(f"/dev/fd/{log}").read_text()
    raise RuntimeError(f"the server has ended with exit code {process.returncode}: {text}")


def main() -> int:
    """Runs the attack with the arguments of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="a model to serve")
    parser.add_argument("--files", type=int, default=1024, help="open files of the server (default: 1024)")
    parser.add_argument("--connections", type=int, default=2000, help="connections (default: 2000)")
    parser.add_argument("--working", type=int, default=200, help="connections with a request (default: 200)")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = given.model or tiny.write_model(Path(folder) / "tiny.gguf")
        outcome = attack(model, given.files, given.connections, given.working)
    print(outcome)
    return 0 if outcome.is_good else 1


if __name__ == "__main__":
    sys.exit(main())
