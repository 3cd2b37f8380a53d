#!/usr/bin/env python3
"""Runs one runtime for `trust.py`, which starts it with the interpreter of the runtime's environment.

    python benches/trust_peers.py NAME TEST MODEL...

Needs only the runtime itself. Runs the test on each model and prints the outcome as one JSON value per line. If the
process ends earlier, the runtime or the system ended it. Output of the runtime goes to standard error.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import itertools
import json
import os
import resource
import signal
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

PROMPTS = [[72, 101, 108, 108, 111] * 4, [110, 105, 103, 104, 116] * 3]
"""Token ids that every byte-level vocabulary has."""
BEGINNING = 257
"""The id of the BOS token in the models of `trust.py`."""
BEYOND = 100_000_000
LONG = 1000
"""Length of a prompt that takes every runtime seconds."""
CONTEXT = 2048


class Runtime(ABC):
    """A loaded model."""

    takes_text = False
    """Whether prompts are strings instead of token ids."""

    @abstractmethod
    def __init__(self, path: str, threads: int) -> None: ...

    @abstractmethod
    def write(self, prompt: list[int], count: int) -> list[int] | str:
        """Generates greedily after the prompt."""

    def numbers(self, ids: list[int], piece: int) -> list[float] | None:
        """Logits or logprobs after the prompt, prefilled in chunks of `piece` tokens. None if unavailable."""
        return None


class Nybble(Runtime):
    def __init__(self, path: str, threads: int) -> None:
        import nybble as package

        self.package = package
        self.model = package.Model.load(path, threads=threads, context=CONTEXT, progress=False)

    def write(self, prompt: list[int], count: int) -> list[int] | str:
        if max(prompt) < 256:
            return list(self.model.generate(bytes(prompt).decode(), max_tokens=count, temperature=0).tokens)
        with self.package.Engine(self.model) as engine:  # The engine accepts token ids.
            return list(engine.submit(prompt, max_tokens=count, temperature=0).result().tokens)

    def numbers(self, ids: list[int], piece: int) -> list[float] | None:
        with self.package.Engine(self.model, prefill_chunk=piece, prefix_cache=False) as engine:
            answer = engine.submit(ids, max_tokens=1, temperature=0, logprobs=20).result()
        assert answer.logprobs is not None
        return [likely for _, _, likely in answer.logprobs[0].top]


class LlamaCpp(Runtime):
    def __init__(self, path: str, threads: int) -> None:
        self.package = importlib.import_module("llama_cpp")
        self.model = self.package.Llama(path, n_ctx=CONTEXT, n_threads=threads, n_threads_batch=threads, verbose=False)

    def write(self, prompt: list[int], count: int) -> list[int] | str:
        return list(itertools.islice(self.model.generate(prompt, temp=0.0, reset=True), count))

    def numbers(self, ids: list[int], piece: int) -> list[float] | None:
        self.model.reset()
        for i in range(0, len(ids), piece):
            self.model.eval(ids[i : i + piece])
        logits = self.package.llama_get_logits_ith(self.model._ctx.ctx, -1)
        return [float(logits[i]) for i in range(self.model.n_vocab())]


class MistralRs(Runtime):
    takes_text = True

    def __init__(self, path: str, threads: int) -> None:
        os.environ["RAYON_NUM_THREADS"] = str(threads)
        self.package = importlib.import_module("mistralrs")
        file = Path(path).resolve()
        which = self.package.Which.GGUF(quantized_model_id=str(file.parent), quantized_filename=file.name)
        self.runner = self.package.Runner(which=which, no_kv_cache=False, prefix_cache_n=0)

    def write(self, prompt: list[int], count: int) -> list[int] | str:
        text = bytes(token % 256 for token in prompt).decode("latin-1")
        request = self.package.CompletionRequest(
            model="default", prompt=text, max_tokens=count, temperature=0.0, ignore_eos=True
        )
        return str(self.runner.send_completion_request(request).choices[0].text)


class NeuralSpeed(Runtime):
    def __init__(self, path: str, threads: int) -> None:
        # Importing the package itself would import torch, which running a model does not need.
        found = importlib.util.find_spec("neural_speed")
        assert found is not None
        assert found.submodule_search_locations
        sys.path.append(next(iter(found.submodule_search_locations)))
        self.model = importlib.import_module("llama_cpp").Model()
        self.model.init_model(path, threads=threads, ctx_size=CONTEXT, n_batch=CONTEXT, max_new_tokens=CONTEXT)

    def write(self, prompt: list[int], count: int) -> list[int] | str:
        self.model.reinit()
        # Prompts must start with this token. On an error it returns an empty list.
        out = [self.model.generate([[BEGINNING, *prompt[1:]]])]
        out += [self.model.generate([]) for _ in range(count - 1)]
        if not out[0]:
            raise ValueError("neural-speed returned no tokens")
        return [token for step in out for row in step for token in row]


RUNTIMES: dict[str, type[Runtime]] = {
    "nybble": Nybble,
    "llama-cpp-python": LlamaCpp,
    "mistral.rs": MistralRs,
    "neural-speed": NeuralSpeed,
}


def load_and_write(make: Callable[..., Runtime], path: str) -> str:
    make(path, 1).write(PROMPTS[0], 2)
    return "loads"


def cut(make: Callable[..., Runtime], path: str) -> str:
    model = make(path, 2)
    first = model.write(PROMPTS[0], 4)
    os.truncate(path, Path(path).stat().st_size // 2)
    return "no effect" if model.write(PROMPTS[0], 4) == first else "different output"


def no_memory(make: Callable[..., Runtime], path: str) -> str:
    with contextlib.suppress(Exception):
        make("/nowhere", 2)  # Completes all imports before the limit is set.
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    most = taken + Path(path).stat().st_size // 2
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    make(path, 2).write(PROMPTS[0] * 60, 4)
    return "loads"


def unknown_token(make: Callable[..., Runtime], path: str) -> str:
    model = make(path, 2)
    if model.takes_text:
        return "accepts no ids"
    return f"writes {len(model.write([*PROMPTS[0], BEYOND], 2))} tokens"


def too_long(make: Callable[..., Runtime], path: str) -> str:
    model = make(path, 2)
    return f"writes {len(model.write((PROMPTS[0] * CONTEXT)[: CONTEXT + 100], 2))} tokens or characters"


def two_calls(make: Callable[..., Runtime], path: str) -> str:
    model = make(path, 2)
    lone = [model.write(prompt, 24) for prompt in PROMPTS]
    say("two threads")
    found: list[Any] = [[], []]

    def ask(i: int) -> None:
        for _ in range(8):
            try:
                found[i].append(model.write(PROMPTS[i], 24))
            except Exception as error:
                found[i].append(type(error).__name__)

    threads = [threading.Thread(target=ask, args=(i,), daemon=True) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    same = sum(text == lone[i] for i in range(2) for text in found[i])
    raised = {text for texts in found for text in texts if isinstance(text, str) and text.endswith("Error")}
    return f"{same} of 16 as alone" + "".join(f", {name}" for name in sorted(raised))


def other_threads(make: Callable[..., Runtime], path: str) -> str:
    model = make(path, 2)
    prompt = (PROMPTS[0] * CONTEXT)[:LONG]
    over, longest = threading.Event(), 0.0

    def count() -> None:
        nonlocal longest
        last = time.monotonic()
        while not over.is_set():
            time.sleep(0.002)
            now = time.monotonic()
            longest, last = max(longest, now - last), now

    thread = threading.Thread(target=count, daemon=True)
    thread.start()
    begun = time.monotonic()
    model.write(prompt, 1)
    whole = time.monotonic() - begun
    over.set()
    thread.join()
    return f"blocked for {longest:.2f} of {whole:.1f} s"


def interrupt(make: Callable[..., Runtime], path: str) -> str:
    model = make(path, 2)
    prompt = (PROMPTS[0] * CONTEXT)[:LONG]
    short = model.write(PROMPTS[0], 4)
    begun = time.monotonic()
    model.write(prompt, 1)
    whole = time.monotonic() - begun
    say("long prompt")
    try:
        model.write([*PROMPTS[1], *prompt], 1)  # Another first token, so that no prefix is cached.
    except KeyboardInterrupt:
        say(time.monotonic())
        usable = model.write(PROMPTS[0], 4) == short
        return f"of {whole:.1f}, then {'usable' if usable else 'different output'}"
    return "ignored"


def same_bits(make: Callable[..., Runtime], path: str) -> str:
    ids = [i * (i + 3) % 251 for i in range(61)]
    model = make(path, 2)
    whole = model.numbers(ids, len(ids))
    if whole is None:
        return "has no logits"
    others = {
        "one by one": model.numbers(ids, 1),
        "in pieces of 7": model.numbers(ids, 7),
        "by 1 thread": make(path, 1).numbers(ids, len(ids)),
    }
    words = []
    for name, other in others.items():
        assert other is not None
        most = max(abs(a - b) for a, b in zip(whole, other, strict=True))
        words.append(f"{name} {f'{most:.2g} off' if most else 'the same'}")
    return ", ".join(words)


TESTS: dict[str, Callable[[Callable[..., Runtime], str], str]] = {
    "loads": load_and_write,
    "cut": cut,
    "no-memory": no_memory,
    "unknown-token": unknown_token,
    "too-long": too_long,
    "two-calls": two_calls,
    "other-threads": other_threads,
    "interrupt": interrupt,
    "same-bits": same_bits,
}


def say(what: Any) -> None:
    print(json.dumps(what), file=answers, flush=True)


def main() -> int:
    _, name, test, *paths = sys.argv
    # Processes that a shell starts in the background ignore SIGINT.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for path in paths:
        try:
            say({"ended": TESTS[test](RUNTIMES[name], path)})
        except BaseException as error:
            say({"raised": type(error).__name__, "message": str(error)[:300]})
    return 0


if __name__ == "__main__":
    # Answers go to standard output; what runtimes print there is redirected to standard error.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    raise SystemExit(main())
