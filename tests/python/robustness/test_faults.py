"""Faults are contained: out of memory, a full disk, bugs, many threads, signals, forks."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cgroups
import numpy as np
import pytest
import tiny

import nybble
from nybble import Model, _native

linux = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")


def python(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Runs a script in a process of its own."""
    command = [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


LIMIT = """
    import resource
    def limit_memory(spare):
        with open("/proc/self/status") as status:
            used = int(next(line for line in status if line.startswith("VmSize")).split()[1]) << 10
        resource.setrlimit(resource.RLIMIT_AS, (used + spare, resource.RLIM_INFINITY))
"""
"""For scripts: leaves `spare` bytes of memory beyond those in use."""


def python_with_limit(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Runs a script that may call `limit_memory(spare)`."""
    return python(textwrap.dedent(LIMIT) + textwrap.dedent(script), *arguments)


def assert_contained(done: subprocess.CompletedProcess[str], refused: str) -> None:
    """Checks that a script ran out of memory for `refused` and then found its model usable."""
    assert done.returncode == 0, done.stderr
    assert f"out of memory: {refused}" in done.stdout
    assert "usable" in done.stdout


# Bugs


def test_a_panic_is_an_internal_error_that_asks_for_a_report(
    tiny_model: Model, tiny_file: Path, tmp_path: Path
) -> None:
    def outcome(raised: BaseException) -> BaseException:
        def progress(done: int, total: int) -> None:
            raise raised

        with pytest.raises(BaseException) as caught:  # noqa: PT011
            _native.convert(tiny_file, tmp_path / "out.gguf", "q8_0", progress)
        return caught.value

    # pyo3 makes its panic class at the first exception. Raised in a callback, it resumes the panic in Rust. Other
    # modules may have such a class, too, which is an ordinary exception here.
    assert isinstance(outcome(ValueError("no panic")), ValueError)
    kinds = [kind for kind in BaseException.__subclasses__() if kind.__name__ == "PanicException"]
    (error,) = [error for error in (outcome(kind("the moon fell down")) for kind in kinds) if type(error) not in kinds]
    with pytest.raises(nybble.InternalError, match=r"the moon fell down - this is a bug in nybble \d.*please report"):
        raise error
    assert tiny_model.generate("x", max_tokens=2, temperature=0).usage.completion_tokens == 2


# Memory


@linux
def test_a_model_too_large_for_memory_is_a_memory_error(tmp_path: Path, tiny_file: Path) -> None:
    big = tmp_path / "big.gguf"
    tiny.write_model(big, layers=1, feed_forward=1 << 20)  # 113 MB in three matrices
    script = """
        import os, sys
        from nybble import LoadOptions, Model, _native
        small, big = sys.argv[1:]
        model = Model.load(small, threads=1)
        before = model.generate("abc", max_tokens=8, temperature=0).text
        limit_memory(os.path.getsize(big) + (20 << 20))
        try:
            _native.Model.load(big, LoadOptions(threads=1))
        except MemoryError as error:
            print(error)
        assert model.generate("abc", max_tokens=8, temperature=0).text == before
        print("usable")
    """
    assert_contained(python_with_limit(script, tiny_file, big), "packed weights")


@linux
def test_a_cache_too_large_for_memory_is_a_memory_error(tmp_path: Path) -> None:
    # 512 layers: every page of 64 tokens takes 4 MB.
    file = tiny.write_model(tmp_path / "deep.gguf", layers=512, llama__context_length=1 << 20)
    script = """
        import os, sys
        from nybble import Model, _native
        model = Model.load(sys.argv[1], threads=1)
        model.logits(list(range(64)) * 2)
        limit_memory(24 << 20)
        try:
            model.logits(list(range(64)) * 400)
        except MemoryError as error:
            print(error)
        assert model.logits(list(range(64))).shape[0] == 64
        print("usable")
    """
    assert_contained(python_with_limit(script, file), "a page of the KV cache")


@linux
@pytest.mark.parametrize("speculation", ["off", "on"])
def test_requests_that_exceed_memory_together_wait_and_stay_the_same(tmp_path: Path, speculation: str) -> None:
    # 256 layers: every page of 64 tokens takes 2 MB, so each request needs 10 MB, and all of them 60.
    file = tiny.write_model(tmp_path / "deep.gguf", layers=256, llama__context_length=1 << 20)
    script = """
        import sys
        from nybble import Engine, Model
        model = Model.load(sys.argv[1], threads=1)
        prompts = [f"{i} " + "abcdefgh" * 30 for i in range(6)]
        alone = [model.generate(prompt, max_tokens=20, temperature=0).tokens for prompt in prompts]
        with Engine(model, speculation=sys.argv[2], prefix_cache=False, cache_bytes=1 << 40) as engine:
            limit_memory(35 << 20)
            sent = [engine.submit(prompt, max_tokens=20, temperature=0) for prompt in prompts]
            assert [answer.result().tokens for answer in sent] == alone
            drafted = engine.stats().drafted_tokens > 0
            assert drafted == (sys.argv[2] == "on")
        print("as alone")
    """
    done = python_with_limit(script, file, speculation)
    assert done.returncode == 0, done.stderr
    assert "as alone" in done.stdout


@linux
def test_logits_too_large_for_memory_are_a_memory_error(tmp_path: Path) -> None:
    file = tiny.write_model(tmp_path / "long.gguf", layers=1, llama__context_length=1 << 20)
    script = """
        import sys
        from nybble import Model
        model = Model.load(sys.argv[1], threads=1)
        before = model.logits(list(range(64)))
        limit_memory(60 << 20)
        try:
            model.logits([0] * 100_000)  # 104 MB of logits
        except MemoryError as error:
            print(error)
        assert (model.logits(list(range(64))) == before).all()
        print("usable")
    """
    assert_contained(python_with_limit(script, file), "logits needs 103600000 bytes")


@linux
def test_workspaces_too_large_for_memory_are_a_memory_error(tmp_path: Path) -> None:
    # A feed-forward layer so wide that 512 rows of it take 537 MB.
    file = tiny.write_model(tmp_path / "wide.gguf", layers=1, feed_forward=1 << 17, llama__context_length=1 << 12)
    script = """
        import sys
        from nybble import Model
        model = Model.load(sys.argv[1], threads=1)
        before = model.logits([1])
        limit_memory(200 << 20)
        try:
            model.logits([0] * 512)
        except MemoryError as error:
            print(error)
        assert (model.logits([1]) == before).all()
        print("usable")
    """
    assert_contained(python_with_limit(script, file), "the buffers of a pass")


@linux
def test_metadata_too_large_for_memory_is_a_memory_error(tmp_path: Path, tiny_file: Path) -> None:
    big = tmp_path / "metadata.gguf"
    values = tiny.metadata(general__description=b"x" * (80 << 20))
    tiny.write_gguf(big, values)
    script = """
        import os, sys
        from nybble import Model, _native
        small, big = sys.argv[1:]
        model = Model.load(small, threads=1)
        limit_memory(os.path.getsize(big) + (30 << 20))
        try:
            _native.GgufFile(big)
        except MemoryError as error:
            print(error)
        assert model.generate("abc", max_tokens=8, temperature=0).usage.completion_tokens
        print("usable")
    """
    assert_contained(python_with_limit(script, tiny_file, big), "metadata needs")


@linux
@pytest.mark.parametrize(("quota", "expected"), [(30_000, 1), (190_000, 1), (200_000, 2)])
def test_the_default_thread_count_respects_the_cgroup_quota(quota: int, expected: int) -> None:
    limits = {"cpu.cfs_period_us": 100_000, "cpu.cfs_quota_us": quota}
    with cgroups.group("cpu", first=limits, second={"cpu.max": f"{quota} 100000"}) as folder:
        done = python(cgroups.JOIN + "from nybble import _native; print(_native.default_threads())", folder)
    assert done.stdout == f"{min(expected, _native.default_threads())}\n", done.stderr


@linux
@pytest.mark.parametrize("what", ["weights", "many small weights", "a file that is read", "cache", "text"])
def test_reaching_the_cgroup_memory_limit_is_a_memory_error(tmp_path: Path, tiny_file: Path, what: str) -> None:
    big = tmp_path / "big.gguf"
    if what in ("cache", "text"):  # Every page of 64 tokens takes 8 MB in F32.
        tiny.write_model(big, layers=512, llama__context_length=1 << 20)
    elif what == "many small weights":
        tiny.write_model(big, layers=130, feed_forward=1 << 14)  # 225 MB, in pieces of half a megabyte
    else:
        tiny.write_model(big, layers=4, feed_forward=1 << 19)  # 225 MB
    script = """
        from nybble import LoadOptions, Model, _native
        small, big, what = sys.argv[2:]
        model = Model.load(small, threads=1)
        before = model.generate("abc", max_tokens=8, temperature=0).text
        for _ in range(2):
            try:
                if what == "cache":
                    with Model.load(big, threads=1, cache_type="f32") as deep:
                        deep.logits(list(range(64)) * 2)
                        deep.logits(list(range(64)) * 400)
                elif what == "text":
                    with Model.load(big, threads=1, cache_type="f32") as deep:
                        deep.generate("a" * 25600, max_tokens=1)
                else:
                    _native.Model.load(big, LoadOptions(threads=1, mmap=what != "a file that is read"))
            except MemoryError as error:
                print(error)
        assert model.generate("abc", max_tokens=8, temperature=0).text == before
        print("usable")
    """
    most = 220 << 20
    limits = {"memory.max": most, "memory.swap.max": 0}
    with cgroups.group("memory", first={"memory.limit_in_bytes": most}, second=limits) as folder:
        done = python(cgroups.JOIN + textwrap.dedent(script), folder, tiny_file, big, what)
    assert done.returncode == 0, done.stderr
    refused = {"a file that is read": "a file", "cache": "the KV cache", "text": "the KV cache"}
    assert done.stdout.count(f"out of memory: {refused.get(what, 'packed weights')} needs") == 2, done.stdout
    assert "the cgroup has" in done.stdout
    assert "usable" in done.stdout


@linux
def test_loading_and_closing_200_times_leaks_nothing(tiny_file: Path) -> None:
    def held() -> tuple[int, int, int]:
        status = Path("/proc/self/status").read_text()
        numbers = {
            line.split(":")[0]: line.split()[1] for line in status.splitlines() if ":" in line and line.split()[1:]
        }
        return int(numbers["VmRSS"]), int(numbers["Threads"]), len(list(Path("/proc/self/fd").iterdir()))

    def once() -> None:
        with Model.load(tiny_file, threads=2) as model:
            model.generate("x", max_tokens=2)

    for _ in range(20):
        once()
    before = held()
    for _ in range(200):
        once()
    after = held()
    assert after[0] < before[0] + 8 * 1024, "kilobytes of memory"
    assert after[1] <= before[1], "threads"
    assert after[2] <= before[2], "open files"


# Threads


def test_eight_threads_on_one_model_get_the_results_of_one(tiny_model: Model) -> None:
    prompts = [f"prompt {i}" for i in range(8)]
    alone = [tiny_model.generate(prompt, max_tokens=20, seed=i).text for i, prompt in enumerate(prompts)]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(5):
            jobs = [
                pool.submit(tiny_model.generate, prompt, None, max_tokens=20, seed=i)
                for i, prompt in enumerate(prompts)
            ]
            assert [job.result().text for job in jobs] == alone


def test_eight_models_in_one_thread_give_the_results_of_one(tiny_file: Path) -> None:
    with Model.load(tiny_file, threads=1) as model:
        alone = model.logits(range(20))
    models = [Model.load(tiny_file, threads=1 + i % 3) for i in range(8)]
    for _ in range(3):
        for model in models:
            np.testing.assert_array_equal(model.logits(range(20)), alone)
    for model in models:
        model.close()


def test_a_model_may_be_closed_while_another_thread_generates(tiny_file: Path) -> None:
    model = Model.load(tiny_file, threads=2)
    begun, results = threading.Event(), []

    def write() -> None:
        pieces = []
        for piece in model.stream("x", max_tokens=60, temperature=0):
            pieces.append(piece)
            begun.set()
        results.append("".join(pieces))

    writer = threading.Thread(target=write)
    writer.start()
    begun.wait(60)
    model.close()
    writer.join(60)
    with Model.load(tiny_file, threads=2) as again:
        assert results == [again.generate("x", max_tokens=60, temperature=0).text]


# Exit and signals


@pytest.mark.parametrize("ending", ["the main thread returns", "sys.exit in a stream", "the stream is never used up"])
def test_the_interpreter_may_exit_in_the_middle_of_a_stream(tiny_file: Path, ending: str) -> None:
    script = """
        import sys, threading
        from nybble import Model
        model = Model.load(sys.argv[1], threads=2)
        begun = threading.Event()
        def write():
            while True:
                for piece in model.stream("x", max_tokens=100):
                    begun.set()
        if sys.argv[2] == "the main thread returns":
            threading.Thread(target=write, daemon=True).start()
            begun.wait()
        elif sys.argv[2] == "sys.exit in a stream":
            for piece in model.stream("x", max_tokens=100):
                sys.exit(0)
        else:
            stream = model.stream("x", max_tokens=100)
            next(iter(stream))
    """
    done = python(script, tiny_file, ending)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
@pytest.mark.parametrize("phase", ["decode", "prefill"])
def test_a_sigterm_handler_stops_generation_at_once(tmp_path: Path, phase: str) -> None:
    file = tiny.write_model(tmp_path / "slow.gguf", layers=512, llama__context_length=1 << 16)
    script = """
        import signal, sys
        from nybble import Model
        model = Model.load(sys.argv[1], threads=2)
        def end(number, frame):
            raise SystemExit(17)
        signal.signal(signal.SIGTERM, end)
        print("ready", flush=True)
        if sys.argv[2] == "decode":
            model.generate("x", max_tokens=60_000)
        else:
            model.logits([0] * 60_000)
    """
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script), str(file), phase], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 17


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
@pytest.mark.parametrize("phase", ["load", "quantize", "convert"])
def test_a_signal_stops_loading_and_quantizing_without_leftover_files(
    tmp_path: Path, phase: str, number: signal.Signals
) -> None:
    file = tiny.write_model(tmp_path / "many.gguf", layers=256)
    out = tmp_path / "out"
    out.mkdir()
    script = """
        import signal, sys
        from nybble import LoadOptions, QuantizeOptions, _native
        file, out, phase = sys.argv[1:]
        def end(number, frame):
            raise SystemExit(17)
        signal.signal(signal.SIGTERM, end)
        signal.signal(signal.SIGINT, end)
        def progress(*_):
            if not said:
                said.append(print("ready", flush=True))
        said = []
        while True:  # There is always work for the signal to stop.
            if phase == "load":
                _native.Model.load(file, LoadOptions(threads=2), progress)
            elif phase == "convert":
                _native.convert(file, out + "/model.gguf", "q8_0", progress)
            else:
                options = QuantizeOptions(recipe="rtn", force=True, threads=2)
                _native.quantize(file, out + "/model.gguf", options, progress=progress)
    """
    command = [sys.executable, "-c", textwrap.dedent(script), str(file), str(out), phase]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        assert process.wait(120) == 17
    # Quantization keeps its resume log. No other file is incomplete.
    left = {path.name for path in out.iterdir()} - {"model.gguf", "model.gguf.resume"}
    assert left == set()
    if (out / "model.gguf").exists():
        with Model.load(out / "model.gguf", threads=1) as model:
            model.logits([1])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:This process.*is multi-threaded:DeprecationWarning")
def test_a_fork_while_threads_compute_leaves_both_processes_usable(tiny_file: Path) -> None:
    script = """
        import os, sys, threading, warnings
        warnings.simplefilter("ignore")
        from nybble import Model
        model = Model.load(sys.argv[1], threads=2)
        expected = model.generate("abc", max_tokens=20, temperature=0).text
        ending = threading.Event()
        def busy():
            while not ending.is_set():
                assert model.generate("abc", max_tokens=20, temperature=0).text == expected
        threads = [threading.Thread(target=busy) for _ in range(2)]
        for thread in threads:
            thread.start()
        for _ in range(5):
            child = os.fork()
            if child == 0:
                # The child has no thread pool of the parent's model; its own model makes one.
                with Model.load(sys.argv[1], threads=2) as own:
                    same = own.generate("abc", max_tokens=20, temperature=0).text == expected
                os._exit(0 if same else 1)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        ending.set()
        for thread in threads:
            thread.join()
        assert model.generate("abc", max_tokens=20, temperature=0).text == expected
    """
    done = python(script, tiny_file)
    assert (done.returncode, done.stderr) == (0, "")


# The disk


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes of POSIX")
def test_a_pipe_is_refused_instead_of_waited_for(tiny_model: Model, tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for load in (lambda: Model.load(pipe, threads=1), lambda: tiny_model.load_session(pipe)):
        with pytest.raises(OSError, match=r"not a regular file.*pipe"):
            load()


@linux
@pytest.mark.parametrize("writing", ["convert", "quantize", "session"])
def test_a_full_disk_is_an_oserror_and_leaves_the_old_file(tmp_path: Path, tiny_file: Path, writing: str) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "file").write_bytes(b"the old file")
    # A limit on the size of files stands for a full disk. Python ignores the signal that comes with it.
    script = """
        import resource, sys
        from nybble import Model, QuantizeOptions, _native
        model, out, writing = sys.argv[1:]
        loaded = Model.load(model, threads=1)
        session = loaded.session()
        session.generate("a" * 100, max_tokens=2)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))
        try:
            if writing == "convert":
                _native.convert(model, out, "q8_0")
            elif writing == "quantize":
                _native.quantize(model, out, QuantizeOptions(recipe="rtn", force=True, threads=1))
            else:
                session.save(out)
        except OSError as error:
            print(type(error).__name__, error)
        assert loaded.generate("abc", max_tokens=8).usage.completion_tokens
    """
    done = python(script, tiny_file, out / "file", writing)
    assert done.returncode == 0, done.stderr
    assert "OSError [Errno 27]" in done.stdout
    assert str(out / "file") in done.stdout
    assert (out / "file").read_bytes() == b"the old file"
    assert {path.name for path in out.iterdir()} <= {"file", "file.resume"}
