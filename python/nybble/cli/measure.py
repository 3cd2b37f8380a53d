"""The measurements of `nybble bench`: prefill, decode, and the limits of the machine in the same run."""

from __future__ import annotations

import dataclasses
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nybble import _native
from nybble.sampling import SamplingOptions

if TYPE_CHECKING:
    from nybble.model import Model, ModelInfo

_WARM_UP_TOKENS = 4


@dataclass(frozen=True)
class Limits:
    """The limits of this machine with a number of threads."""

    threads: int
    bandwidth_gb_s: float
    """Memory bandwidth for reads, in 10^9 bytes per second."""
    int8_gops: float
    """INT8 throughput, in 10^9 operations per second."""


@dataclass(frozen=True)
class Speed:
    """Median speeds for one combination of threads, length and batch."""

    threads: int
    length: int
    """Tokens of the prompt."""
    batch: int
    """Sequences that are computed together."""
    prompt_tokens_per_second: float
    decode_tokens_per_second: float
    """Sum over all sequences."""
    prompt_share_of_int8: float
    decode_share_of_bandwidth: float

    @property
    def key(self) -> tuple[int, int, int]:
        """The combination that was measured."""
        return self.threads, self.length, self.batch


@dataclass(frozen=True)
class Memory:
    """Memory of the process, in bytes. None where the system does not report it."""

    peak_bytes: int | None
    huge_page_bytes: int | None


def speeds(
    model: Model,
    lengths: Sequence[int],
    batches: Sequence[int],
    generate: int,
    rounds: int,
    advance: Callable[[], None],
) -> tuple[Limits, list[Speed], Memory]:
    """Measures all combinations of `lengths` and `batches` with one model.

    Args:
        model: The model.
        lengths: Tokens of the prompts.
        batches: Numbers of sequences.
        generate: Tokens to generate per sequence.
        rounds: Repetitions.
        advance: Called after each round.

    Returns:
        The limits, the speeds, and the memory of the process before the limits were measured, which takes a buffer
        larger than all CPU caches.
    """
    info, native = model.info, model._native
    measured: list[tuple[int, int, float, float]] = []
    for length in lengths:
        for batch in batches:
            _round(native, info, length, batch, min(generate, _WARM_UP_TOKENS))
            seconds = []
            for _ in range(rounds):
                seconds.append(_round(native, info, length, batch, generate))
                advance()
            reading, writing = (statistics.median(column) for column in zip(*seconds, strict=True))
            measured.append((length, batch, reading, writing))
    memory = Memory(info.peak_resident_bytes, info.huge_page_bytes)
    limits = Limits(info.threads, *native.machine_limits())
    found = [_speed(info, limits, length, batch, generate, *times) for length, batch, *times in measured]
    return limits, found, memory


def _round(native: _native.Model, info: ModelInfo, length: int, batch: int, generate: int) -> tuple[float, float]:
    """Seconds for the prompts of all sequences, and for the decoding after them."""
    greedy = SamplingOptions(temperature=0, seed=0)
    # The work does not depend on the ids.
    prompts = [[(7919 * i + 13 + row) % info.vocabulary for i in range(length)] for row in range(batch)]
    sequences = [native.sequence(prompt, greedy) for prompt in prompts]
    start = time.perf_counter()
    native.step(sequences)
    read = time.perf_counter()
    for _ in range(generate):
        native.step(sequences)
    return read - start, time.perf_counter() - read


def _speed(
    info: ModelInfo, limits: Limits, length: int, batch: int, generate: int, reading: float, writing: float
) -> Speed:
    prompt_rate, steps = length * batch / reading, generate / writing
    # Each weight is multiplied and added once per token, but only the last token of a prompt needs the output layer.
    weights = info.parameters * info.bytes_per_token / info.weight_bytes - info.vocabulary * info.hidden_size
    # A step reads the weights once, and for each sequence the KV cache, and recurrent states, which it also writes.
    cached = info.cache_bytes_per_token * (length + generate / 2) + 2 * info.state_bytes
    step_bytes = info.bytes_per_token + batch * cached
    return Speed(
        threads=info.threads,
        length=length,
        batch=batch,
        prompt_tokens_per_second=prompt_rate,
        decode_tokens_per_second=batch * steps,
        prompt_share_of_int8=2 * weights * prompt_rate / (limits.int8_gops * 1e9),
        decode_share_of_bandwidth=step_bytes * steps / (limits.bandwidth_gb_s * 1e9),
    )


def machine() -> dict[str, Any]:
    """The description of the machine that published figures need."""
    return {"cpu": _cpu(), "platform": platform.platform(), "nybble": _native.__version__}


def report(
    info: ModelInfo, load_seconds: float, limits: Sequence[Limits], measured: Sequence[Speed], memory: Memory
) -> dict[str, Any]:
    """A run for `--json`."""
    return {
        "model": info.name or info.file.name,
        "file": str(info.file),
        **machine(),
        "kernel": info.kernel,
        "load_seconds": load_seconds,
        "weight_bytes": info.weight_bytes,
        "cache_bytes": info.cache_bytes,
        "context": info.context,
        "peak_rss_bytes": memory.peak_bytes,
        "huge_page_bytes": memory.huge_page_bytes,
        "tuning": tuning(),
        "limits": [dataclasses.asdict(limit) for limit in limits],
        "speeds": [dataclasses.asdict(speed) for speed in measured],
    }


def tuning() -> list[dict[str, Any]]:
    """The kernels that loading chose on this machine, and the speeds it chose by. Empty where there is no choice."""
    names = ("layout", "rows", "threads", "kernel", "gops")
    return [dict(zip(names, (*choice[:4], dict(choice[4])), strict=True)) for choice in _native.tuning()]


def read(run: Any) -> list[Speed]:
    """The speeds of a run that `--json` printed.

    Raises:
        ValueError: `run` has another format.
    """
    try:
        return [Speed(**speed) for speed in run["speeds"]]
    except (KeyError, TypeError):
        raise ValueError("not the output of `nybble bench --json`") from None


def _cpu() -> str:
    return _native.cpu_name() or platform.processor() or platform.machine()
