"""Runs random requests from eight threads and checks every answer against the same request alone.

    python tests/soak.py                      an hour with the default model
    python tests/soak.py --minutes 1 --model model.gguf

Each round loads a model with other threads, another kernel and another cache, and creates an engine with other limits.
Requests differ in prompt, length, sampling, schema and API, and some are refused. Answers must stay bit-identical, log
probabilities included. Memory, threads and open files must not grow. Prints a line per minute and exits with 1 at the
first fault.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import faulthandler
import random
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

import nybble
from nybble import Completion, Engine, Model, SamplingOptions
from nybble.memory import resident_bytes

TEXT = "the a of river stone light seven winter because never walks under blue machine and then it was"
WORDS = TEXT.split()
HANG_SECONDS = 1800.0
"""Time limit per round. A longer one prints all stack traces and ends the process."""
GROWTH_BYTES = 64 << 20
"""Allowed growth in bytes from the minimum of the first ten rounds to the minimum of the last ten."""
CONSTRAINTS: list[dict[str, Any]] = [
    {"schema": {"type": "object", "properties": {"age": {"type": "integer"}, "name": {"type": "string"}}}},
    {"schema": {"enum": ["river", "stone", "light"]}},
    {"regex": r"[a-z]{1,20}( [a-z]{1,20}){0,9}"},
    {"grammar": 'start: ("yes" | "no") (" " ("yes" | "no"))*'},
]


@dataclass(frozen=True)
class Request:
    """A request, and its answers when nothing else runs."""

    prompt: str
    options: SamplingOptions
    answer: Completion
    vector: npt.NDArray[np.float32]


def make(lone: Model, beginning: str, dice: random.Random) -> Request:
    """Makes a random request. Half of the prompts of a round share a prefix."""
    options = SamplingOptions(
        max_tokens=dice.choice([1, 5, 30, 80]),
        temperature=dice.choice([0.0, 0.7, 1.3]),
        top_k=dice.choice([0, 1, 40]),
        top_p=dice.choice([0.5, 0.95, 1.0]),
        typical_p=dice.choice([0.9, 1.0]),
        repetition_penalty=dice.choice([1.0, 1.1]),
        stop=dice.choice([(), ("the", "\n\n")]),
        seed=dice.randrange(2**64),
        logprobs=dice.choice([None, 3]),
        **(dice.choice(CONSTRAINTS) if dice.random() < 0.25 else {}),
    )
    words = " ".join(dice.choices(WORDS, k=dice.choice([1, 3, 20, 120, 300])))
    prompt = beginning + words if dice.random() < 0.5 else words
    return Request(prompt, options, lone.generate(prompt, options), lone.embed(prompt)[0])


def check(request: Request, found: Completion) -> int:
    """Checks an answer; that of a cancelled request may be a prefix. Returns 1, the number of answers."""
    expected = request.answer
    if found.finish_reason == "cancelled":
        same = expected.text.startswith(found.text) and expected.tokens[: len(found.tokens)] == found.tokens
    else:
        names = ("text", "tokens", "finish_reason", "logprobs")
        same = all(getattr(found, name) == getattr(expected, name) for name in names)
    if not same:
        raise AssertionError(f"{request.prompt!r} with {request.options}: {found!r} instead of {expected!r}")
    return 1


class Ways:
    """The ways to run requests. Each checks its answers and returns their number."""

    def __init__(self, model: Model, engine: Engine, requests: list[Request], seed: int) -> None:
        self.model, self.engine, self.requests, self.dice = model, engine, requests, random.Random(seed)
        self.some = self.dice.sample(requests, 3)
        self.one = self.some[0]

    def in_a_batch(self) -> int:
        # With these options the others have other answers.
        prompts = [request.prompt for request in self.some[: self.dice.choice([1, 3])]]
        self.dice.shuffle(prompts)
        return check(self.one, self.model.generate(prompts, self.one.options)[prompts.index(self.one.prompt)])

    def as_a_stream_perhaps_left(self) -> int:
        stream, leaves, text = self.model.stream(self.one.prompt, self.one.options), self.dice.random() < 0.5, ""
        for piece in stream:
            text += piece
            if leaves and self.dice.random() < 0.2:
                return check(self.one, replace(stream.completion, text=text, finish_reason="cancelled"))
        return check(self.one, replace(stream.completion, text=text))

    def by_the_engine_and_perhaps_called_off(self) -> int:
        sent, enough = [self.engine.submit(o.prompt, o.options) for o in self.some], self.dice.randrange(10)
        for count, _ in enumerate(sent[0]):
            if count == enough:
                sent[0].cancel()
        return sum(check(request, answer.result()) for request, answer in zip(self.some, sent, strict=True))

    def from_an_event_loop(self) -> int:
        async def run() -> int:
            ask = self.engine.generate
            kept, left = [asyncio.ensure_future(ask(o.prompt, o.options)) for o in self.some[:2]]
            await asyncio.sleep(self.dice.random())
            left.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await left
            return check(self.one, await kept)

        return asyncio.run(run())

    def as_a_session_that_is_saved(self) -> int:
        session = self.model.session()
        check(self.one, session.generate(self.one.prompt, self.one.options))
        with tempfile.TemporaryDirectory() as folder:
            session.save(Path(folder) / "session")
            loaded = self.model.load_session(Path(folder) / "session")
        mine, its = (both.generate(" and", self.one.options.replace(max_tokens=8)) for both in (session, loaded))
        return 1 + check(Request(f"{self.one.prompt} ... and", self.one.options, mine, self.one.vector), its)

    def as_a_vector(self) -> int:
        for request, vector in zip(self.some, self.model.embed([o.prompt for o in self.some]), strict=True):
            if not np.array_equal(request.vector, vector):
                raise AssertionError(f"{request.prompt!r}: another vector")
        return len(self.some)

    def refused(self) -> int:
        try:
            if self.dice.random() < 0.5:
                self.model.generate("the" * 5000, self.one.options)
            else:
                self.engine.submit([2**31], self.one.options)
        except ValueError:
            return 1
        raise AssertionError("a prompt that does not fit, or an unknown token, was taken")


WAYS = [name for name in vars(Ways) if not name.startswith("_")]


def one_round(source: str | None, dice: random.Random, pool: ThreadPoolExecutor, seen: Counter[str]) -> None:
    """Loads a model, runs requests in every way concurrently, and closes it."""
    faulthandler.dump_traceback_later(HANG_SECONDS, exit=True)
    caches: list[Literal["f16", "int8", "f32"]] = ["f16", "int8", "f32"]
    threads, cache_type = dice.choice([1, 2, 3, 8]), dice.choice(caches)
    # The scalar kernel takes minutes where the others take seconds.
    kernel = dice.choice([name for name in nybble.kernels() if name != "scalar"] or ["scalar"])
    with Model.load(source, threads=1, context=1024, cache_type=cache_type, progress=False) as lone:
        beginning = " ".join(dice.choices(WORDS, k=200)) + " "
        requests = [make(lone, beginning, dice) for _ in range(8)]
    with Model.load(
        source, threads=threads, kernel=kernel, context=1024, cache_type=cache_type, progress=False
    ) as model:
        # One sequence that fills the context, in the middle of a step, with its snapshots.
        least = model.info.cache_bytes + 6 * model.info.state_bytes
        engine = Engine(
            model,
            max_batch=dice.choice([1, 3, 16]),
            cache_bytes=dice.choice([None, least, 3 * least]),
            prefix_cache=dice.random() < 0.7,
            prefill_chunk=dice.choice([None, 1, 64, 1000]),
            speculation=dice.choice(["off", "on", "auto"]),
        )
        with engine:
            ways = [(name, Ways(model, engine, requests, dice.randrange(2**32))) for name in dice.sample(WAYS * 5, 30)]
            jobs = {pool.submit(getattr(way, name)): name for name, way in ways}
            for job in as_completed(jobs):
                seen[jobs[job]] += job.result()
    stats = engine.stats()
    if stats.running or stats.waiting:
        raise AssertionError(f"nobody asks any more: {stats}")
    faulthandler.cancel_dump_traceback_later()


def resources() -> list[int]:
    """Returns the bytes of memory, threads and open files of this process."""
    return [resident_bytes() or 0, *(len(list(Path("/proc/self", what).iterdir())) for what in ("task", "fd"))]


def main() -> int:
    """Runs rounds until the time is over. Returns 1 if a resource grew; a wrong answer is an exception."""
    parser = argparse.ArgumentParser(description="Random requests, each checked against the same request alone.")
    parser.add_argument("--model", help="model to load (default: the default model)")
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    dice, seen, rounds = random.Random(arguments.seed), Counter[str](), list[list[int]]()
    begun = reported = time.monotonic()
    is_over = False
    with ThreadPoolExecutor(8) as pool:
        while not is_over:
            one_round(arguments.model, dice, pool, seen)
            rounds.append(resources())
            now = time.monotonic()
            is_over = now >= begun + 60 * arguments.minutes
            if now - reported >= 60 or is_over:
                reported, (memory, threads, files) = now, rounds[-1]
                what = f"{len(rounds)} rounds, {sum(seen.values())} answers as alone; {memory >> 20} MB"
                print(f"{(now - begun) / 60:.1f} minutes: {what}, {threads} threads, {files} files", flush=True)
            # The first rounds fill caches.
            first, last = (
                [min(column) for column in zip(*some, strict=True)] for some in (rounds[2:12] or rounds, rounds[-10:])
            )
            more = (GROWTH_BYTES, 0, 0)
            if any(now > then + most for now, then, most in zip(last, first, more, strict=True)):
                print(f"bytes, threads or files grew: {first} to {last}", file=sys.stderr)
                return 1
    print(", ".join(f"{name.replace('_', ' ')} {count}" for name, count in sorted(seen.items())))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
