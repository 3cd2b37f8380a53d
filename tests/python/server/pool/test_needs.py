"""What a model needs in memory, as its headers say, compared with what it takes once it is loaded."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import adapters
import pytest
import tiny
from goldens import GOLDENS, MTP
from serving import serving_several, spec

from nybble import LoadOptions, ModelError, _native
from nybble.server.options import ServeOptions, parse_size
from nybble.server.pool.needs import Limits, adapter_bytes, check_fits, least_cache_bytes, read_needs

ENCODERS = GOLDENS.parent / "encoders"
CHECKPOINTS = sorted(path.parent for folder in (GOLDENS, MTP, ENCODERS) for path in folder.glob("*/config.json"))
MEASURED = ("family", "context", "cache_bytes", "cache_bytes_per_token", "state_bytes")


@pytest.mark.parametrize("quantize", ["auto", None])
def test_headers_say_what_each_family_takes(tmp_path: Path, quantize: str | None) -> None:
    options = LoadOptions(threads=1, quantize=quantize)
    assert len(CHECKPOINTS) > 80
    for folder in CHECKPOINTS:
        sources = [folder]
        if (folder / "tokenizer.json").exists():  # A GGUF file needs a vocabulary.
            _native.convert(folder, out := tmp_path / f"{folder.name}.gguf", "q8_0")
            sources.append(out)
        for source in sources:
            needs, info = _native.model_needs(source, options), _native.Model.load(source, options).info()
            assert {name: needs[name] for name in MEASURED} == {name: info[name] for name in MEASURED}, source
            taken = info["weight_bytes"]
            # Vectors and a head for multi-token prediction count, too, which is much for models as small as these.
            assert taken <= needs["weight_bytes"] <= 2 * taken + 200_000, source
    assert [*tmp_path.glob("*.gguf")]


def test_the_weights_of_a_plain_model_are_known_within_a_tenth(tiny_file: Path) -> None:
    taken = _native.Model.load(tiny_file, LoadOptions(threads=1)).info()["weight_bytes"]
    assert taken <= _native.model_needs(tiny_file, LoadOptions())["weight_bytes"] <= 1.1 * taken


def test_the_headers_of_files_say_what_encoders_take() -> None:
    for file in sorted((ENCODERS / "gguf").glob("*.gguf")):
        needs, info = _native.model_needs(file, LoadOptions()), _native.Model.load(file, LoadOptions(threads=1)).info()
        assert {name: needs[name] for name in MEASURED} == {name: info[name] for name in MEASURED}, file
        assert info["weight_bytes"] <= needs["weight_bytes"] <= 2 * info["weight_bytes"] + 200_000, file


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"context": 129}, "context: found 129, expected 1 to 128"),
        ({"context": 64, "cache_type": "int8"}, None),
        ({"cache_type": "int4"}, "cache_type: found"),
        ({"quantize": "int3"}, "quantize: found"),
        ({"kernel": "abacus"}, "kernel"),
        ({"threads": 0}, "threads: found 0"),
    ],
)
def test_options_count_and_are_checked(tiny_file: Path, options: dict[str, Any], message: str | None) -> None:
    load = LoadOptions(**{"threads": 1, **options})
    if message is not None:
        with pytest.raises(ValueError, match=message):
            _native.model_needs(tiny_file, load)
        return
    needs, info = _native.model_needs(tiny_file, load), _native.Model.load(tiny_file, load).info()
    assert (needs["context"], needs["cache_bytes"]) == (64, info["cache_bytes"])
    assert needs["cache_bytes"] < _native.model_needs(tiny_file, LoadOptions())["cache_bytes"] / 2


def test_a_damaged_header_is_an_error_of_its_file(tmp_path: Path, tiny_file: Path) -> None:
    damaged = tmp_path / "damaged.gguf"
    for length in (0, 10, 100, 2000):
        damaged.write_bytes(tiny_file.read_bytes()[:length])
        with pytest.raises(ModelError, match=r"damaged\.gguf"):
            _native.model_needs(damaged, LoadOptions())


def test_the_cache_takes_half_of_what_the_share_leaves_and_at_least_a_context(tiny_file: Path) -> None:
    model = spec("tiny", tiny_file)
    weights, context = (read_needs(model, Limits()).weight_bytes, 32768)

    def cache(max_bytes: int | None, models: int = 2, max_loaded: int | None = None) -> int:
        return read_needs(model, Limits(max_bytes, max_loaded, models)).cache_bytes

    assert cache(None) == 1 << 30
    assert cache(20_000_000) == (10_000_000 - weights) // 2
    assert cache(20_000_000, models=4, max_loaded=2) == cache(20_000_000)
    assert cache(2 * weights) == context
    assert cache(weights + 20_000) == 20_000
    least = least_cache_bytes(_Shape(256, 0))
    assert cache(weights + 10) == least
    own = dataclasses.replace(model, options=ServeOptions(cache_gb=0.5))
    assert read_needs(own, Limits(10**12)).cache_bytes == 5 * 10**8
    with pytest.raises(ValueError, match="cache_gb: found 1e-06, expected at least"):
        read_needs(dataclasses.replace(model, options=ServeOptions(cache_gb=1e-6)), Limits())


@dataclasses.dataclass
class _Shape:
    cache_bytes_per_token: int
    state_bytes: int


def test_a_draft_model_and_adapters_count(tiny_file: Path, tmp_path: Path) -> None:
    alone = read_needs(spec("tiny", tiny_file), Limits())
    both = read_needs(spec("tiny", tiny_file, draft=str(tiny_file), speculation="on"), Limits())
    assert both.weight_bytes == 2 * alone.weight_bytes + 32768
    folder, file = adapters.write_peft(tmp_path / "peft", 1), adapters.write_gguf(tmp_path / "lora.gguf", 1)
    weights = folder / "adapter_model.safetensors"
    assert (adapter_bytes(folder), adapter_bytes(file)) == (2 * weights.stat().st_size, 2 * file.stat().st_size)
    check_fits("tiny", alone, 0, Limits(alone.total_bytes))
    for limit, adapter in ((alone.total_bytes - 1, 0), (alone.total_bytes, 1)):
        with pytest.raises(ValueError, match=r"max_memory: the model 'tiny' needs .* but models may take"):
            check_fits("tiny", alone, adapter, Limits(limit))


@pytest.mark.parametrize("speculation", ["off", "mtp", "auto"])
def test_the_reserved_memory_is_what_the_loaded_model_takes(speculation: str) -> None:
    model = spec("m", MTP / "glm4_moe", speculation=speculation, cache_bytes=4_000_000)
    with serving_several([model]) as server:
        assert server.request("POST", "/v1/completions", {"prompt": [1, 2, 3], "max_tokens": 2}).status == 200
        entry = server.entry("m")
        _, needs = entry.plan
        assert entry.service is not None
        taken = entry.service.engine.model._native.info()["weight_bytes"]
        assert taken <= needs.weight_bytes
        assert entry.nbytes == taken + 4_000_000


def test_a_tiny_context_needs_less_than_a_long_one(tmp_path: Path) -> None:
    file = tiny.write_model(tmp_path / "long.gguf", llama__context_length=1_000_000)
    long, short = (
        read_needs(dataclasses.replace(spec("m", file), load=LoadOptions(context=context)), Limits(10**8))
        for context in (None, 1000)
    )
    assert short.cache_bytes == (10**8 - short.weight_bytes) // 2
    assert long.total_bytes == 10**8


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("16GB", 16 * 10**9),
        ("1.5 gib", 3 << 29),
        ("500MB", 5 * 10**8),
        ("2k", 2000),
        ("1MiB", 1 << 20),
        ("1T", 10**12),
        ("7B", 7),
        *((text, None) for text in ("", "16", "GB", "-1GB", "0GB", "1XB", "1e9B", "inf GB", "1 2GB")),
    ],
)
def test_sizes_have_a_unit(text: str, nbytes: int | None) -> None:
    if nbytes is None:
        with pytest.raises(ValueError, match="max_memory: found"):
            ServeOptions(max_memory=text)
    else:
        assert parse_size("max_memory", text) == ServeOptions(max_memory=text).max_memory_bytes == nbytes
