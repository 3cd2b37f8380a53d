"""A loaded model: its properties, use from several threads, and interruption."""

from __future__ import annotations

import dataclasses
import math
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path
from typing import get_type_hints

import numpy as np
import pytest
import tiny

import nybble
from nybble import ContextFullError, LoadOptions, Model, ModelError, SamplingOptions
from nybble.load_options import LoadOverrides

END = dict.fromkeys((tiny.END_OF_TEXT, tiny.IM_START, tiny.IM_END), -math.inf)
needs_posix = pytest.mark.skipif(sys.platform == "win32", reason="Windows has neither fork nor SIGINT of this kind")


@pytest.fixture(scope="session")
def slow_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a context so large that a prompt takes seconds."""
    return tiny.write_model(tmp_path_factory.mktemp("slow") / "slow.gguf", llama__context_length=1_000_000)


def test_info_describes_the_loaded_model(tiny_file: Path) -> None:
    with Model.load(tiny_file, threads=2, kernel="scalar", context=64) as model:
        info = model.info
    assert info.file == tiny_file
    assert (info.name, info.family, info.layers, info.hidden_size) == ("tiny", "llama", 2, 64)
    assert (info.vocabulary, info.context, info.kernel, info.threads) == (tiny.VOCABULARY, 64, "scalar", 2)
    matrices = tiny.VOCABULARY * 64 + 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 96)
    assert info.parameters == matrices
    assert matrices // 2 < info.weight_bytes < 2 * matrices
    assert 0 < info.bytes_per_token <= info.weight_bytes
    assert info.cache_type == "f16"
    assert dataclasses.asdict(info)["name"] == "tiny"
    assert repr(model) == "<Model tiny (llama, scalar, 2 threads, closed)>"


def test_an_int8_cache_takes_about_half_the_memory(tiny_file: Path) -> None:
    with Model.load(tiny_file) as model, Model.load(tiny_file, cache_type="int8") as small:
        assert (model.info.cache_type, small.info.cache_type) == ("f16", "int8")
        # Per head and position: 16 keys and 16 values, and with INT8 two scales of 2 bytes.
        assert model.info.cache_bytes_per_token * (32 + 4) == small.info.cache_bytes_per_token * 64
        exact, found = model.logits([1, 2, 3, 4]), small.logits([1, 2, 3, 4])
        assert 0 < abs(exact - found).max() < 0.1 * abs(exact).max()


def test_a_closed_model_raises_and_finishes_open_streams(tiny_file: Path) -> None:
    with Model.load(tiny_file) as model:
        stream = model.stream("abc", max_tokens=5, logit_bias=END)
        next(stream)
    for use in (lambda: model.generate("abc"), lambda: model.logits([1]), lambda: model.stream("abc")):
        with pytest.raises(ModelError, match="the model is closed"):
            use()
    model.close()
    assert model.info.name == "tiny", "its properties are still known"
    assert model.tokenize("abc") == [97, 98, 99], "the tokenizer needs no weights"
    list(stream)
    assert stream.completion.usage.completion_tokens == 5, "an open stream continues"


def test_text_and_token_ids_convert_both_ways(tiny_model: Model) -> None:
    text = "Grüße, 世界 🌍"
    assert tiny_model.tokenize(text) == list(text.encode())
    assert tiny_model.detokenize(tiny_model.tokenize(text)) == text


def test_logits_have_one_row_per_token(tiny_model: Model) -> None:
    logits = tiny_model.logits([1, 2, 3])
    assert logits.shape == (3, tiny.VOCABULARY)
    assert logits.dtype == np.float32
    assert np.isfinite(logits).all()
    assert np.array_equal(tiny_model.logits([1, 2])[1], logits[1]), "a token does not depend on later ones"
    assert tiny_model.logits([]).shape == (0, tiny.VOCABULARY)
    assert np.array_equal(tiny_model.logits(np.array([1, 2, 3])), logits)


@pytest.mark.parametrize("ids", [[tiny.VOCABULARY], [-1], [2**40]])
def test_an_id_outside_the_vocabulary_is_refused(tiny_model: Model, ids: list[int]) -> None:
    with pytest.raises(ValueError, match=f"token: found {ids[0]}"):
        tiny_model.logits(ids)


def test_logits_are_bit_identical_across_kernels_and_thread_counts(tiny_file: Path) -> None:
    ids = list(range(40))
    found = []
    for kernel in nybble.kernels():
        for threads in (1, 2, 3):
            with Model.load(tiny_file, kernel=kernel, threads=threads) as model:
                found.append(model.logits(ids))
    assert len(found) >= 3
    assert all(np.array_equal(logits, found[0]) for logits in found)


def test_the_environment_chooses_the_kernel(tiny_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NYBBLE_KERNEL", "scalar")
    assert Model.load(tiny_file).info.kernel == "scalar"
    monkeypatch.setenv("NYBBLE_KERNEL", "frob")
    with pytest.raises(ValueError, match=r'kernel "frob" is not available on this CPU \(available: .*scalar'):
        Model.load(tiny_file)


def test_threads_on_made_up_nodes_have_the_same_results(tiny_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def tokens() -> tuple[int, ...]:
        with Model.load(tiny_file, threads=3) as model:
            return model.generate([5, 6, 7] * 30, max_tokens=20, temperature=0, ignore_eos=True).tokens

    monkeypatch.setenv("NYBBLE_NUMA", "off")
    expected = tokens()
    for nodes in ("2", "3"):
        monkeypatch.setenv("NYBBLE_NUMA", nodes)
        assert tokens() == expected, nodes
    monkeypatch.setenv("NYBBLE_NUMA", "many")
    with pytest.raises(ValueError, match="NYBBLE_NUMA: found many, expected on, off or a number from 1 to 64"):
        tokens()


def test_an_argument_out_of_range_is_refused(tiny_file: Path) -> None:
    with pytest.raises(ValueError, match="threads: found 0"):
        Model.load(tiny_file, threads=0)
    with pytest.raises(ValueError, match="context: found 129, expected 1 to 128"):
        Model.load(tiny_file, context=129)
    with pytest.raises(ValueError, match=r'cache_type: found "int4", expected f16, int8 or f32'):
        Model.load(tiny_file, cache_type="int4")  # type: ignore[arg-type]


def test_load_options_are_given_as_a_dataclass_or_by_name(tiny_file: Path) -> None:
    options = LoadOptions(threads=1, context=64, cache_type="int8")
    with Model.load(tiny_file, options) as model, Model.load(tiny_file, options, context=32) as other:
        assert (model.info.threads, model.info.context, model.info.cache_type) == (1, 64, "int8")
        assert (other.info.threads, other.info.context, other.info.cache_type) == (1, 32, "int8")
    with pytest.raises(TypeError, match=r"no such option: thread \(options: filename, revision, kernel, threads"):
        Model.load(tiny_file, thread=1)  # type: ignore[call-arg]


def test_type_checkers_know_every_load_option_with_its_type() -> None:
    types = get_type_hints(LoadOptions)
    fields = dataclasses.fields(LoadOptions)
    assert get_type_hints(LoadOverrides) == {field.name: types[field.name] for field in fields}
    assert all(field.metadata["help"].endswith(".") for field in fields)


def test_a_file_that_is_not_a_model_is_refused_by_name(tmp_path: Path, tiny_file: Path) -> None:
    (tmp_path / "text.gguf").write_text("once upon a time")
    with pytest.raises(ModelError, match=r"text\.gguf: .*found .*expected"):
        Model.load(tmp_path / "text.gguf")
    tiny.write_gguf(tmp_path / "empty.gguf", tiny.metadata())
    with pytest.raises(ModelError, match=r"empty\.gguf: tensor .* is missing"):
        Model.load(tmp_path / "empty.gguf")
    strange = tiny.write_model(tmp_path / "strange.gguf", general__architecture="frob")
    with pytest.raises(ModelError, match=r"strange\.gguf: .*frob"):
        Model.load(strange)
    (tmp_path / "config.json").write_text("{}")
    for file in tmp_path.glob("*.gguf"):
        file.unlink()
    with pytest.raises(ModelError, match=r"no \.safetensors|holds no|safetensors"):
        Model.load(tmp_path)
    with pytest.raises(FileNotFoundError):
        Model.load(tmp_path / "nowhere.gguf")


def test_progress_ends_at_the_total(tiny_file: Path) -> None:
    seen: list[tuple[int, int]] = []
    Model.load(tiny_file, progress=lambda done, total: seen.append((done, total)))
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1][0] == seen[-1][1]
    assert len({total for _, total in seen}) == 1


def test_an_exception_of_the_progress_callback_stops_loading(tiny_file: Path) -> None:
    seen: list[int] = []

    def refuse(done: int, total: int) -> None:
        seen.append(done)
        raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        Model.load(tiny_file, progress=refuse)
    assert len(seen) == 1


@needs_posix
def test_ctrl_c_stops_loading_and_the_next_load_succeeds(tiny_file: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        Model.load(tiny_file, progress=lambda done, total: os.kill(os.getpid(), signal.SIGINT))
    Model.load(tiny_file, progress=False).close()


# --- Threads


def test_threads_may_share_a_model(tiny_model: Model) -> None:
    options = SamplingOptions(max_tokens=60, temperature=1.0, logit_bias=END)
    expected = [tiny_model.generate("abc", options, seed=seed).tokens for seed in range(6)]
    found: dict[int, tuple[int, ...]] = {}

    def work(seed: int) -> None:
        found[seed] = tiny_model.generate("abc", options, seed=seed).tokens

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[seed] for seed in range(6)] == expected


def test_python_runs_while_rust_computes(slow_file: Path) -> None:
    """During a long call another thread counts, which needs the GIL."""
    with Model.load(slow_file, threads=1) as model:
        began = time.perf_counter()
        model.logits([1] * 512)
        once = time.perf_counter() - began
        # The time of attention grows with the square of the length, so 12 times as long is enough.
        ids = [1] * (512 * min(12, max(1, round(0.5 / once))))
        beats: list[float] = []
        done = threading.Event()

        def beat() -> None:
            while not done.wait(0.001):
                beats.append(time.perf_counter())

        thread = threading.Thread(target=beat)
        thread.start()
        start = time.perf_counter()
        model.logits(ids)
        end = time.perf_counter()
        done.set()
        thread.join()
    within = [beat for beat in beats if start < beat < end]
    assert len(within) >= 10, f"{len(within)} beats in {end - start:.2f} s"


@needs_posix
def test_a_forked_child_works(tiny_model: Model) -> None:
    options = SamplingOptions(seed=1, max_tokens=20, logit_bias=END)
    expected = tiny_model.generate("abc", options).tokens
    reader, writer = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of any fork with threads.
        child = os.fork()
    if child == 0:
        code = 1
        try:
            found = tiny_model.generate("abc", options).tokens
            os.write(writer, repr(found).encode())
            code = 0
        finally:
            os._exit(code)
    os.close(writer)
    deadline = time.monotonic() + 30
    while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0) and time.monotonic() < deadline:
        time.sleep(0.01)
    if ended == (0, 0):
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        pytest.fail("the child hangs")
    with os.fdopen(reader, "rb") as pipe:
        assert pipe.read().decode() == repr(expected)
    assert tiny_model.generate("abc", options).tokens == expected, "the parent still works"


# --- Ctrl-C

INTERRUPTED = """
import math, os, signal, sys, threading, time
from nybble import Model

model = Model.load(sys.argv[1], threads=2)
bias = dict.fromkeys((256, 257, 258), -math.inf)
before = model.generate("abc", seed=1, max_tokens=10, logit_bias=bias).tokens

def interrupt():
    time.sleep(float(sys.argv[2]))
    os.kill(os.getpid(), signal.SIGINT)

threading.Thread(target=interrupt, daemon=True).start()
began = time.perf_counter()
try:
    if sys.argv[3] == "prompt":
        model.generate("a" * 900_000, max_tokens=1)
    else:
        model.generate("abc", max_tokens=900_000, logit_bias=bias)
except KeyboardInterrupt:
    waited = time.perf_counter() - began - float(sys.argv[2])
    assert model.generate("abc", seed=1, max_tokens=10, logit_bias=bias).tokens == before
    print(f"stopped after {waited:.3f} s")
else:
    print("ended before it was stopped")
"""


@needs_posix
@pytest.mark.parametrize("phase", ["prompt", "decoding"])
def test_ctrl_c_stops_generation_at_once_and_the_model_stays_usable(slow_file: Path, phase: str) -> None:
    command = [sys.executable, "-c", INTERRUPTED, str(slow_file), "0.5", phase]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.stderr == ""
    assert done.stdout.startswith("stopped after")


# --- A real model


def test_the_default_model_knows_the_capital_of_france(default_model: Model) -> None:
    assert default_model.generate("The capital of France is", max_tokens=4, temperature=0).text.startswith(" Paris")
    messages = [
        {"role": "system", "content": "You are a helpful assistant."},
        {"role": "user", "content": "What is the capital of France?"},
    ]
    done = default_model.chat(messages, max_tokens=40, temperature=0)
    assert (done.text, done.finish_reason) == ("The capital of France is Paris.", "stop")


def test_the_default_model_completes_alike_alone_in_a_batch_and_streamed(default_model: Model) -> None:
    prompts = ["Once upon a time", "The three largest rivers of Africa are", "1, 2, 3,"]
    options = SamplingOptions(seed=11, max_tokens=24)
    batch = default_model.generate(prompts, options)
    for prompt, done in zip(prompts, batch, strict=True):
        assert default_model.generate(prompt, options).tokens == done.tokens
        assert "".join(default_model.stream(prompt, options)) == done.text


def test_embeddings_have_one_normalized_row_per_document(tiny_model: Model) -> None:
    vectors = tiny_model.embed(["one text", "another", "one text"])
    assert vectors.shape == (3, tiny_model.info.hidden_size)
    assert vectors.dtype == np.float32
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    assert np.array_equal(vectors[0], vectors[2])
    assert not np.allclose(vectors[0], vectors[1])
    assert np.array_equal(tiny_model.embed("another"), vectors[1:2])
    assert tiny_model.embed([]).shape == (0, tiny_model.info.hidden_size)
    # The last state depends on all tokens.
    last = tiny_model.embed(["abc", "abd"], pooling="last", normalize=False)
    assert not np.allclose(last[0], last[1])
    with pytest.raises(ValueError, match="pooling: found 'max', expected mean, cls or last"):
        tiny_model.embed("x", pooling="max")  # type: ignore[arg-type]
    with pytest.raises(ContextFullError):
        tiny_model.embed("x" * 500)
