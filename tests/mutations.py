"""Loads thousands of damaged models. Each must generate or raise a documented error, within limits of time and memory.

    python tests/mutations.py                              100,000 GGUF files and 20,000 checkpoint folders
    python tests/mutations.py --files 500 --folders 100    a short run
    python tests/mutations.py --only files:4711            repeats one case

The seed and the number of a case determine its damage, so every case can be repeated. Cases run in worker processes;
if a worker dies or hangs, the parent reports its current case.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import multiprocessing
import os
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent / "python" / "support"))

import tiny
import vocabularies

import nybble
from nybble import Model, _native

GOLDENS = Path(__file__).parent / "data" / "goldens"
ENCODERS = Path(__file__).parent / "data" / "encoders"
SECONDS = 1.0
"""CPU time limit per case."""
MEMORY = 200 << 20
"""Memory limit per case in bytes, in addition to the size of its files."""
STUCK = 300.0
"""Seconds without a message after which a worker counts as hung. Far above `SECONDS`, for busy machines."""
DOCUMENTED = (nybble.ModelError, OSError, MemoryError)
NUMBERS = [0, 1, 2, 3, 31, 255, 256, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**61, 2**63 - 1, 2**63, 2**64 - 1]

Dice = np.random.Generator
Damage = Callable[[Dice, bytearray], None]


def number(dice: Dice, width: int) -> bytes:
    """Returns a number of `width` bytes that often breaks programs."""
    return (NUMBERS[dice.integers(len(NUMBERS))] & (1 << 8 * width) - 1).to_bytes(width, "little")


def somewhere(dice: Dice, length: int) -> int:
    """Returns a position, in half of the cases near the beginning."""
    return int(dice.integers(min(length, 4096) if dice.random() < 0.5 else length)) if length else 0


def flip_bits(dice: Dice, data: bytearray) -> None:
    """Flips one to sixteen bits."""
    for _ in range(dice.integers(1, 17)):
        data[somewhere(dice, len(data))] ^= 1 << int(dice.integers(8))


def overwrite(dice: Dice, data: bytearray) -> None:
    """Overwrites bytes with a number that often breaks programs."""
    at, width = somewhere(dice, len(data)), int(dice.choice([1, 2, 4, 8]))
    data[at : at + width] = number(dice, width)


def truncate(dice: Dice, data: bytearray) -> None:
    """Truncates the data."""
    del data[somewhere(dice, len(data)) :]


def repeat(dice: Dice, data: bytearray) -> None:
    """Copies a slice to another position, replacing or inserting."""
    length = int(dice.integers(1, 65))
    source, target = somewhere(dice, len(data)), somewhere(dice, len(data))
    piece = data[source : source + length]
    data[target : target + (length if dice.random() < 0.5 else 0)] = piece


def fields(data: bytes) -> list[tuple[int, int]]:
    """Finds the numbers and strings in the header of a valid GGUF file, as (start, width)."""
    found = [(4, 4), (8, 8), (16, 8)]
    at = 24
    widths = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}

    def text(at: int) -> int:
        length = int(struct.unpack_from("<Q", data, at)[0])
        found.extend([(at, 8), (at + 8, length)])
        return at + 8 + length

    def value(kind: int, at: int) -> int:
        if kind == 8:
            return text(at)
        if kind == 9:
            of, count = struct.unpack_from("<IQ", data, at)
            found.extend([(at, 4), (at + 4, 8)])
            at += 12
            for _ in range(count):
                at = value(of, at)
            return at
        found.append((at, widths[kind]))
        return at + widths[kind]

    tensors, keys = struct.unpack_from("<QQ", data, 8)
    for _ in range(keys):
        at = text(at)
        found.append((at, 4))
        at = value(int(struct.unpack_from("<I", data, at)[0]), at + 4)
    for _ in range(tensors):
        at = text(at)
        dims = int(struct.unpack_from("<I", data, at)[0])
        found.extend([(at, 4), *((at + 4 + 8 * i, 8) for i in range(dims)), (at + 4 + 8 * dims, 4)])
        found.append((at + 8 + 8 * dims, 8))
        at += 16 + 8 * dims
    return found


def field(dice: Dice, data: bytearray) -> None:
    """Changes fields of the header, or swaps two of the same width."""
    known = fields(bytes(data))
    for _ in range(dice.integers(1, 4)):
        start, width = known[dice.integers(len(known))]
        alike = [at for at, other in known if other == width]
        if dice.random() < 0.4 and width in (1, 2, 4, 8):
            data[start : start + width] = number(dice, width)
        elif dice.random() < 0.7:
            other = alike[dice.integers(len(alike))]
            data[start : start + width], data[other : other + width] = (
                data[other : other + width],
                data[start : start + width],
            )
        elif width:
            data[start + int(dice.integers(width))] = int(dice.integers(256))


def values(dice: Dice, data: bytearray) -> None:
    """Changes values, types and names in a JSON document."""
    document = json.loads(bytes(data))
    for _ in range(dice.integers(1, 4)):
        places = list(_places(document))
        holder, key = places[dice.integers(len(places))]
        strange: list[Any] = [
            None,
            True,
            -1,
            0,
            1,
            2**31,
            2**63,
            1e308,
            1.5,
            "",
            "x",
            "\ud800",
            "{{",
            [],
            {},
            [[]],
            [0] * 9,
        ]
        match dice.integers(4):
            case 0 if isinstance(holder, dict):
                del holder[key]
            case 1:
                other, there = places[dice.integers(len(places))]
                if key in _keys(holder) and there in _keys(other):
                    holder[key], other[there] = (
                        json.loads(json.dumps(other[there])),
                        json.loads(json.dumps(holder[key])),
                    )
            case 2 if isinstance(holder, dict):
                holder[str(key) + "x"] = holder.pop(key)
            case _:
                holder[key] = strange[dice.integers(len(strange))]
        if not isinstance(document, (dict, list)) or not document:
            break
    data[:] = json.dumps(document).encode()


def _keys(holder: Any) -> Any:
    return holder if isinstance(holder, dict) else range(len(holder))


def _places(document: Any) -> Iterator[tuple[Any, Any]]:
    """Returns all places of a JSON document, as container and key. Long lists are reduced to their ends."""
    keys = list(document) if isinstance(document, dict) else list(range(len(document)))
    for key in keys[:40] + keys[40:][-3:]:
        yield document, key
        if isinstance(document[key], (dict, list)) and document[key]:
            yield from _places(document[key])


def header(dice: Dice, data: bytearray) -> None:
    """Damages the JSON header of a safetensors file and corrects its length, so that the damage is parsed."""
    length = int.from_bytes(data[:8], "little")
    head = data[8 : 8 + length]
    values(dice, head)
    data[: 8 + length] = len(head).to_bytes(8, "little") + head


GENERAL: list[Damage] = [flip_bits, overwrite, truncate, repeat]


@dataclass
class Original:
    """A valid model: its files by name."""

    name: str
    files: dict[str, bytes]
    model: str
    """The file to load; empty for the folder."""


def goldens() -> Iterator[tuple[str, dict[str, bytes]]]:
    """Returns the golden folders of decoders and encoders.

    Those without a tokenizer get llama's, which has the same number of tokens.
    """
    encoders = (folder for folder in sorted(ENCODERS.iterdir()) if (folder / "config.json").exists())
    for golden in [*sorted(GOLDENS.iterdir()), *encoders]:
        lent = {name: (GOLDENS / "llama" / name).read_bytes() for name in ("tokenizer.json", "tokenizer_config.json")}
        parts = (path for path in sorted(golden.rglob("*")) if path.suffix in (".json", ".safetensors"))
        own = {path.relative_to(golden).as_posix(): path.read_bytes() for path in parts}
        yield golden.name, lent | own


def files(folder: Path) -> list[Original]:
    """Returns GGUF files of every family, with several types and kinds of vocabulary."""
    made = []
    for i, (name, parts) in enumerate(goldens()):
        source = folder / name
        source.mkdir()
        for part, content in parts.items():
            (source / part).parent.mkdir(exist_ok=True)
            (source / part).write_bytes(content)
        made.append(folder / f"{name}.gguf")
        _native.convert(source, made[-1], ["q4_0", "q8_0", "f16", "q4_1", "bf16", "f32"][i % 6])
    made.append(tiny.write_model(folder / "bytes.gguf", layers=1))
    for name, keys in [("pieces", vocabularies.pieces()), ("merges", vocabularies.byte_level())]:
        keys["llama.vocab_size"] = len(keys["tokenizer.ggml.tokens"])
        made.append(tiny.write_model(folder / f"{name}.gguf", layers=1, **keys))
    return [Original(path.stem, {path.name: path.read_bytes()}, path.name) for path in made]


def folders() -> list[Original]:
    """Returns checkpoint folders of every family, with tokenizers."""
    return [Original(name, parts, "") for name, parts in goldens()]


def damage(dice: Dice, original: Original, folder: Path) -> Path:
    """Writes a damaged copy into `folder` and returns the path to load."""
    name = sorted(original.files)[dice.integers(len(original.files))]
    data = bytearray(original.files[name])
    ways = list(GENERAL)
    if name.endswith(".gguf"):
        ways += [field] * 4
    elif name.endswith(".json"):
        ways += [values] * 6
    else:
        ways += [header] * 4
    ways[dice.integers(len(ways))](dice, data)
    for other, content in original.files.items():
        (folder / other).parent.mkdir(exist_ok=True)
        (folder / other).write_bytes(data if other == name else content)
    return folder / original.model


def peak() -> int:
    """Returns the peak memory of this process since `reset_peak`, in bytes."""
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) << 10


def reset_peak() -> None:
    """Resets the peak memory of this process."""
    clear = Path("/proc/self/clear_refs")
    if clear.exists():
        clear.write_text("5")


def attempt(path: Path, quantize: Any) -> str:
    """Loads a model and uses it. Returns the outcome; undocumented exceptions propagate."""
    try:
        with Model.load(path, threads=1, quantize=quantize) as model:
            try:
                if model.info.generates:
                    model.generate("ab c", max_tokens=2, temperature=0)
                elif model.info.labels:
                    model.classify("ab c")
                else:
                    model.embed("ab c")
            except ValueError as error:
                return type(error).__name__ + " when used"
            return "loaded"
    except DOCUMENTED as error:
        return type(error).__name__


def work(kind: str, numbers: list[int], seed: int, limit: float, say: Connection) -> None:
    """Runs cases in a worker and sends a message before and after each."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    faulthandler.enable()
    warnings.simplefilter("ignore")  # Recoverable damage causes warnings, as intended.
    with tempfile.TemporaryDirectory(prefix="nybble-mutations-") as place:
        scratch = Path(place)
        (scratch / "originals").mkdir()
        originals = files(scratch / "originals") if kind == "files" else folders()
        for original in originals:  # The originals are valid. The first load also pays for imports.
            for name, content in original.files.items():
                (scratch / name).parent.mkdir(exist_ok=True)
                (scratch / name).write_bytes(content)
            ended = attempt(scratch / original.model, "auto")
            assert ended == "loaded", f"{original.name}: {ended}"
            for name in original.files:
                (scratch / name).unlink()
        for case in numbers:
            dice = np.random.default_rng([seed, case, kind == "files"])
            original = originals[dice.integers(len(originals))]
            folder = scratch / "case"
            folder.mkdir()
            path = damage(dice, original, folder)
            size = sum(file.stat().st_size for file in folder.iterdir())
            say.send(("begin", case, original.name))
            reset_peak()
            before, started = peak(), time.process_time()
            try:
                ended = attempt(path, ["auto", None, "int8"][case % 3] if kind == "folders" else "auto")
            except BaseException:
                ended = "UNDOCUMENTED " + traceback.format_exc()
            seconds, memory = time.process_time() - started, peak() - before
            if seconds > limit:
                ended = f"TOO LONG: {seconds:.1f} s, {ended}"
            elif memory > size + MEMORY:
                ended = f"TOO MUCH: {memory >> 20} MB for files of {size >> 20} MB, {ended}"
            say.send(("end", case, ended, seconds, memory))
            shutil.rmtree(folder)
    say.send(("done",))


def run(kind: str, cases: list[int], seed: int, workers: int, limit: float) -> bool:
    """Runs cases in several processes, prints the outcomes, and returns whether all were documented."""
    context = multiprocessing.get_context("spawn")
    outcomes: Counter[str] = Counter()
    bad: list[str] = []
    slowest = largest = 0.0
    queue = [cases[i::workers] for i in range(workers) if cases[i::workers]]
    running: dict[Connection, tuple[Any, list[int]]] = {}
    current: dict[Connection, tuple[int, str]] = {}
    while queue or running:
        while queue and len(running) < workers:
            share = queue.pop()
            hear, say = context.Pipe(duplex=False)
            process = context.Process(target=work, args=(kind, share, seed, limit, say))
            process.start()
            say.close()
            running[hear] = (process, share)
        for ready in multiprocessing.connection.wait(list(running), timeout=STUCK):
            assert isinstance(ready, Connection)
            hear = ready
            process, share = running[hear]
            try:
                message = hear.recv()
            except EOFError:
                message = ("died",)
            match message:
                case ("begin", case, name):
                    current[hear] = (case, name)
                case ("end", case, ended, seconds, memory):
                    slowest, largest = max(slowest, seconds), max(largest, memory)
                    if ended.split(" ")[0] in ("UNDOCUMENTED", "TOO"):
                        bad.append(f"{kind}:{case} ({current[hear][1]}): {ended}")
                        print(bad[-1], flush=True)
                    outcomes[ended.split(":")[0].split("\n")[0] if ended[:3] in ("UND", "TOO") else ended] += 1
                case _:
                    process.join()
                    del running[hear]
                    if message == ("died",):
                        case, name = current.get(hear, (-1, "before the first case"))
                        bad.append(f"{kind}:{case} ({name}): the process ended with {process.exitcode}")
                        print(bad[-1], flush=True)
                        rest = share[share.index(case) + 1 :] if case in share else []
                        if rest:
                            queue.append(rest)
            break
        else:
            for hear, (process, _) in running.items():
                case, name = current.get(hear, (-1, "before the first case"))
                print(f"{kind}:{case} ({name}): no answer for {STUCK:.0f} s", flush=True)
                process.kill()
    summary = ", ".join(f"{name}: {count:,}" for name, count in outcomes.most_common())
    print(f"{sum(outcomes.values()):,} {kind}: {summary}")
    print(f"slowest {slowest:.2f} s, largest {largest / 2**20:.0f} MB; {len(bad)} undocumented outcomes")
    return not bad


def main() -> int:
    """Runs the cases of the command line. Returns 0 if every outcome was documented."""
    parser = argparse.ArgumentParser(description="Load thousands of damaged models.")
    parser.add_argument("--files", type=int, default=100_000, help="number of GGUF files")
    parser.add_argument("--folders", type=int, default=20_000, help="number of checkpoint folders")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--seconds", type=float, default=SECONDS, help="CPU time limit per case")
    parser.add_argument("--only", help="one case, such as files:4711")
    arguments = parser.parse_args()
    if arguments.only:
        kind, _, case = arguments.only.partition(":")
        return 0 if run(kind, [int(case)], arguments.seed, 1, arguments.seconds) else 1
    good = run("files", list(range(arguments.files)), arguments.seed, arguments.workers, arguments.seconds)
    good &= run("folders", list(range(arguments.folders)), arguments.seed, arguments.workers, arguments.seconds)
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main())
