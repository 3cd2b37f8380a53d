"""Loads a server with requests from hostile clients: `python tests/load.py --seconds 60`.

Sends 200 bad requests per second: garbage, oversized, well-formed but invalid, cut off, sent or read too slowly, or
abandoned halfway through the response. Two good requests per second run at the same time. Afterwards the server must
still run, occupy no slot, use no more memory than before, and have answered every good request; otherwise the exit code
is 1. Without a model, a tiny one with random weights is served.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent / "python" / "support"))
import tiny

LIMIT_BYTES = 50 << 20
"""Allowed growth of the server's memory after the first quarter of the load."""


@dataclass
class Load:
    """The clients of one server."""

    host: str
    port: int
    dice: random.Random
    seen: Counter[str] = field(default_factory=Counter)
    waits: list[float] = field(default_factory=list)

    # --- Kinds of clients

    async def garbage(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(self.dice.randbytes(self.dice.randrange(1, 5000)) + b"\r\n\r\n")
        await self.answer(reader)

    async def broken_json(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        body = json.dumps(self.chat(stream=False)).encode()
        writer.write(self.request(body[: self.dice.randrange(len(body))] + self.dice.randbytes(3)))
        await self.answer(reader)

    async def wrong(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        value: Any = self.dice.choice([None, -1, 1e400, "x", [], {}, [[[]]], "\ud800", 2**70])
        name = self.dice.choice(["messages", "temperature", "n", "stop", "logit_bias", "tools", "seed", "whatever"])
        writer.write(self.request(json.dumps({**self.chat(stream=False), name: value}).encode()))
        await self.answer(reader)

    async def oversized(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        body = b" " * self.dice.choice([5_000_000, 200_000])
        writer.write(self.request(body))
        await self.answer(reader)

    async def cut_off(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        text = self.request(json.dumps(self.chat(stream=True)).encode())
        writer.write(text[: self.dice.randrange(len(text))])
        await writer.drain()

    async def leaves(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(self.request(json.dumps(self.chat(stream=self.dice.random() < 0.5, max_tokens=2000)).encode()))
        await asyncio.sleep(self.dice.random() * 0.2)

    async def sends_slowly(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for byte in self.request(json.dumps(self.chat(stream=True)).encode())[:10]:
            writer.write(bytes([byte]))
            await writer.drain()
            await asyncio.sleep(0.5)

    async def reads_slowly(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(self.request(json.dumps(self.chat(stream=True, max_tokens=100)).encode()))
        for _ in range(10):
            if not await reader.read(20):
                break
            await asyncio.sleep(0.5)

    async def good(self) -> None:
        """A request that must be answered, from a client that retries for a minute."""
        began = time.monotonic()
        while time.monotonic() - began < 60:
            try:
                reader, writer = await asyncio.open_connection(self.host, self.port)
                try:
                    writer.write(self.request(json.dumps(self.chat(stream=False, max_tokens=8)).encode()))
                    text = await asyncio.wait_for(reader.read(), 60)
                finally:
                    writer.close()
            except OSError:
                text = b""
            if text.startswith(b"HTTP/1.1 200") and b'"completion_tokens":8' in text:
                self.waits.append(time.monotonic() - began)
                self.seen["good: answered"] += 1
                return
            self.seen[f"good: {text[9:12].decode() or 'no answer'}, retried"] += 1
            await asyncio.sleep(1)
        self.seen["good: NOT ANSWERED"] += 1

    # --- Shared

    def chat(self, **more: Any) -> dict[str, Any]:
        words = "".join(self.dice.choices("abcdef ", k=self.dice.randrange(1, 60)))
        ends = {str(tiny.IM_END): -100, str(tiny.END_OF_TEXT): -100}
        return {"messages": [{"role": "user", "content": words}], "logit_bias": ends, "max_tokens": 50, **more}

    def request(self, body: bytes) -> bytes:
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {self.host}\r\nContent-Type: application/json\r\n"
        return f"{head}Connection: close\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body

    async def answer(self, reader: asyncio.StreamReader) -> None:
        self.seen[(await asyncio.wait_for(reader.read(), 60))[9:12].decode("ascii", "replace") or "closed"] += 1

    async def bad(self, kind: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]) -> None:
        try:
            reader, writer = await asyncio.open_connection(self.host, self.port)
        except OSError:
            self.seen["refused"] += 1
            return
        try:
            await kind(reader, writer)
        except (OSError, asyncio.IncompleteReadError):
            self.seen["closed"] += 1
        except asyncio.TimeoutError:
            self.seen["NO END"] += 1
        finally:
            writer.transport.abort() if self.dice.random() < 0.5 else writer.close()

    async def run(self, seconds: float, rate: int) -> None:
        kinds = [self.garbage, self.broken_json, self.wrong, self.oversized, self.cut_off, self.leaves]
        kinds += [self.sends_slowly, self.reads_slowly]
        tasks: set[asyncio.Task[None]] = set()
        began = time.monotonic()
        for index in range(int(seconds * rate)):
            await asyncio.sleep(max(0, began + index / rate - time.monotonic()))
            jobs = [self.bad(kinds[index % len(kinds)])]
            if index % (rate // 2) == 0:
                jobs.append(self.good())
            for job in jobs:
                task = asyncio.ensure_future(job)
                tasks.add(task)
                task.add_done_callback(tasks.discard)
        sent = time.monotonic() - began
        self.seen["requests"] += int(seconds * rate)
        print(f"{int(seconds * rate)} requests in {sent:.1f} s")
        await asyncio.gather(*tasks)


def state(pid: int) -> tuple[int, int]:
    """Returns the resident bytes and open files of a process."""
    status = Path(f"/proc/{pid}/status").read_text()
    resident = int(re.findall(r"VmRSS:\s+(\d+)", status)[0]) * 1024
    return resident, len(list(Path(f"/proc/{pid}/fd").iterdir()))


async def metrics(load: Load) -> dict[str, float]:
    reader, writer = await asyncio.open_connection(load.host, load.port)
    writer.write(f"GET /metrics HTTP/1.1\r\nHost: {load.host}\r\nConnection: close\r\n\r\n".encode())
    text = (await reader.read()).decode()
    writer.close()
    return {name: float(value) for name, value in re.findall(r"^(nybble_\w+) (\S+)", text, re.MULTILINE)}


async def main(options: argparse.Namespace, folder: Path) -> int:
    model = options.model or tiny.write_model(folder / "tiny.gguf", llama__context_length=4096)
    # The prefix cache is not a leak. It is small here, so that a leak shows.
    command = [sys.executable, "-m", "nybble", "serve", str(model), "--port", "0", "--cache-gb", str(options.cache_gb)]
    log = folder / "log"
    with log.open("w") as file, subprocess.Popen(command, stderr=file) as server:
        port = ""
        while not port and server.poll() is None:
            port = "".join(re.findall(r"page +http://127.0.0.1:(\d+)", log.read_text()))
            await asyncio.sleep(0.1)
        load = Load("127.0.0.1", int(port), random.Random(options.seed))
        try:
            states = []
            for _ in range(4):
                await load.run(options.seconds / 4, options.rate)
                busy = await settle(load)
                states.append(state(server.pid))
            alive = server.poll() is None
        finally:
            server.terminate()
            code = server.wait(60)
    logged = log.read_text().splitlines()[3:]
    waits = sorted(load.waits)
    print(*(f"{count:8} {name}" for name, count in sorted(load.seen.items())), sep="\n")
    print(f"good requests waited {waits[len(waits) // 2]:.2f} s (median) and {waits[-1]:.2f} s (maximum)")
    # Caches of tokens and of keys and values fill up, so memory still grows a little at first.
    print("memory after each quarter:", ", ".join(f"{resident / 1e6:.1f} MB" for resident, _ in states), end="; ")
    print("files:", ", ".join(str(files) for _, files in states), end=f"; {busy}\n")
    before, after = states[0], states[-1]
    faults = {
        "the server ended": not alive or code != 0,
        "good requests were not answered": load.seen["good: NOT ANSWERED"] > 0,
        "connections did not end": load.seen["NO END"] > 0,
        "the server answered with 500": any(name.startswith("500") for name in load.seen),
        f"the server logged {len(logged)} lines, such as {logged[:3]}": len(logged) > 0,
        "slots are still in use": busy != {"running": 0, "waiting": 0},
        "memory grew": after[0] - before[0] > LIMIT_BYTES,
        "files are still open": after[1] > before[1] + 5,
    }
    print(*(f"FAILED: {name}" for name, failed in faults.items() if failed), sep="\n")
    return int(any(faults.values()))


async def settle(load: Load) -> dict[str, float]:
    """Waits up to half a minute until no request is running. What remains has leaked."""
    for _ in range(60):
        found = await metrics(load)
        busy = {name: found[f"nybble_{name}"] for name in ("running", "waiting")}
        if not any(busy.values()):
            break
        await asyncio.sleep(0.5)
    await asyncio.sleep(6)  # Idle connections are closed after five seconds.
    return busy


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--rate", type=int, default=200)
    parser.add_argument("--cache-gb", type=float, default=0.02)
    parser.add_argument("--seed", type=int, default=1)
    with tempfile.TemporaryDirectory() as name:
        sys.exit(asyncio.run(main(parser.parse_args(), Path(name))))
