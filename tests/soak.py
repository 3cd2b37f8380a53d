"""Keeps models busy with random requests from several threads and checks every answer against its lone run.

    python tests/soak.py                      an hour with the default model
    python tests/soak.py --minutes 1 --model model.gguf

Requests differ in prompt, length, sampling and way of asking (alone, in a batch, as a stream, as a stream left in
the middle); what they have in common is that the answer may not depend on any of that. Memory, threads and open files
are looked at between rounds and may not grow.
"""

from __future__ import annotations

import argparse
import random
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from nybble import Completion, Model, SamplingOptions

TEXT = "the a of river stone light seven winter because never walks under blue machine and then it was"
WORDS = TEXT.split()
CONSUMERS = 8
ROUND = 24
"""Requests between two looks at what the process holds."""


@dataclass(frozen=True)
class Request:
    """What is asked, and the answer of the lone run."""

    prompt: str
    options: SamplingOptions
    answer: Completion


def ask(model: Model, dice: random.Random) -> Request:
    """A random request with its answer when nothing else runs."""
    prompt = " ".join(dice.choices(WORDS, k=dice.choice([1, 3, 20, 120, 300])))
    options = SamplingOptions(
        max_tokens=dice.choice([1, 5, 30, 80]),
        temperature=dice.choice([0.0, 0.7, 1.3]),
        top_p=dice.choice([0.5, 0.95, 1.0]),
        repetition_penalty=dice.choice([1.0, 1.1]),
        seed=dice.randrange(2**32),
        logprobs=dice.choice([None, 3]),
    )
    return Request(prompt, options, model.generate(prompt, options))


def check(request: Request, text: str, whole: bool) -> None:
    """Fails unless `text` is the answer, or the beginning of it."""
    expected = request.answer.text
    if text != expected and (whole or not expected.startswith(text)):
        raise AssertionError(f"{request.prompt[:60]!r} with {request.options}: {text!r} instead of {expected!r}")


def serve(model: Model, requests: list[Request], way: int, dice: random.Random) -> int:
    """Asks again, among everybody else's requests. Returns the number of answers checked."""
    request = dice.choice(requests)
    match way:
        case 0:
            check(request, model.generate(request.prompt, request.options).text, whole=True)
        case 1:
            check(request, "".join(model.stream(request.prompt, request.options)), whole=True)
        case 2:
            pieces: list[str] = []
            for piece in model.stream(request.prompt, request.options):
                pieces.append(piece)
                if dice.random() < 0.2:
                    break
            check(request, "".join(pieces), whole=False)
        case _:
            alike = [other for other in requests if other.options == request.options] or [request]
            for other, answer in zip(alike, model.generate([o.prompt for o in alike], request.options), strict=True):
                check(other, answer.text, whole=True)
            return len(alike)
    return 1


def held() -> tuple[int, int, int]:
    """Megabytes of memory, threads and open files of this process."""
    status = Path("/proc/self/status").read_text()
    memory = int(next(line for line in status.splitlines() if line.startswith("VmRSS")).split()[1]) >> 10
    return memory, threading.active_count(), len(list(Path("/proc/self/fd").iterdir()))


def main() -> int:
    """Runs for as long as asked. Returns 1 if an answer differed or something grew."""
    parser = argparse.ArgumentParser(description="Random requests, each checked against its lone run.")
    parser.add_argument("--model", help="what to load; the default model if not given")
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    dice = random.Random(arguments.seed)
    end = time.monotonic() + 60 * arguments.minutes
    answers, rounds = 0, 0
    first: tuple[int, int, int] | None = None
    with ThreadPoolExecutor(CONSUMERS) as pool:
        while time.monotonic() < end:
            with Model.load(arguments.model, threads=dice.choice([1, 2, 3]), context=1024) as model:
                requests = [ask(model, dice) for _ in range(6)]
                jobs = [
                    pool.submit(serve, model, requests, way % 4, random.Random(dice.randrange(2**32)))
                    for way in range(ROUND)
                ]
                answers += sum(job.result() for job in jobs)
            rounds += 1
            now = held()
            print(
                f"{rounds} rounds, {answers} answers as alone; {now[0]} MB, {now[1]} threads, {now[2]} files",
                flush=True,
            )
            # The first rounds fill caches that stay.
            first = now if rounds == 3 else first
            if first and (now[0] > first[0] + 100 or now[1] > first[1] or now[2] > first[2]):
                print(f"grew from {first} to {now}", file=sys.stderr)
                return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
