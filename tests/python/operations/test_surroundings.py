"""Commands as the first process of a container, and next to one another."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import tiny
from goldens import GOLDENS

if sys.platform == "win32":
    pytest.skip("Windows has no such processes", allow_module_level=True)

NYBBLE = [sys.executable, "-m", "nybble"]
ALONE = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]


def _can_be_alone() -> bool:
    try:
        return subprocess.run([*ALONE, "true"], capture_output=True, check=False).returncode == 0
    except OSError:
        return False


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
@pytest.mark.parametrize("command", ["run", "quantize"])
def test_the_first_process_of_a_container_ends_by_a_signal(command: str, number: int, tmp_path: Path) -> None:
    if not _can_be_alone():
        pytest.skip("no process namespaces here")
    file = tiny.write_model(tmp_path / "long.gguf", llama__context_length=1 << 20)
    text = tmp_path / "prose.txt"
    text.write_text("Some prose to calibrate on, again and again. " * 100_000)
    (tmp_path / "out").mkdir()
    calibration = ["--recipe", "gptq", "--calibration", text, "--calibration-tokens", 1_000_000]
    arguments = {
        "run": ["run", file, "x", "--raw", "--max-tokens", 1 << 19, "--logit-bias", f"{ord('x')}=1000"],
        "quantize": ["quantize", file, tmp_path / "out" / "q.gguf", *calibration],
    }[command]
    # Calls of Python functions tell that the command has begun.
    script = textwrap.dedent("""
        import signal, sys
        from nybble import cli
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup ignores it, and commands leave that so.
        run = cli._run
        cli._run = lambda arguments: (print("begun", flush=True), run(arguments))[1]
        sys.exit(cli.main(sys.argv[1:]))
    """)
    with subprocess.Popen(
        [*ALONE, sys.executable, "-c", script, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    ) as outer:
        assert outer.stdout is not None
        try:
            assert outer.stdout.readline() == b"begun\n"
            children = Path(f"/proc/{outer.pid}/task/{outer.pid}/children").read_text().split()
            os.kill(int(children[0]), number)
            outer.stdout.read()
            assert outer.wait(60) == 128 + number
        finally:
            outer.kill()
    assert all(".resume" in path.name for path in (tmp_path / "out").iterdir())


SHARED = """
import sys
from nybble import Model, _native
from nybble.models import locks
locks.log.info = lambda message, *_: message.startswith("waiting") and print("waiting", flush=True)
native, calls = _native.quantize, []
def quantize(*arguments, **options):
    calls.append(1)
    sys.stdout.write("quantizing\\n")
    sys.stdout.flush()
    sys.stdin.readline()
    return native(*arguments, **options)
_native.quantize = quantize
with Model.load(sys.argv[1], quantize="int4:g64:gptq", threads=1) as model:
    print(len(calls), model.generate("hello", max_tokens=3, temperature=0).tokens)
"""


def _line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline()


def test_processes_that_quantize_the_same_model_share_one_file(tmp_path: Path) -> None:
    folder = shutil.copytree(GOLDENS / "llama", tmp_path / "model")
    cache = tmp_path / "cache"
    environment = os.environ | {"NYBBLE_CACHE": str(cache)}
    command = [sys.executable, "-c", SHARED, str(folder)]
    with (
        subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as first,
        subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as second,
    ):
        processes = [first, second]
        # The one that has the lock quantizes only after the other waits for it.
        assert sorted(_line(process) for process in processes) == ["quantizing\n", "waiting\n"]
        for process in processes:
            assert process.stdin is not None
            process.stdin.write("\n")
            process.stdin.flush()
        answers = [process.communicate(timeout=120)[0] for process in processes]
        assert [process.returncode for process in processes] == [0, 0]
    lines = [answer.splitlines()[-1] for answer in answers]
    assert sorted(line[0] for line in lines) == ["0", "1"], "one quantizes, the other waits for it"
    assert lines[0][1:] == lines[1][1:]
    assert len(list((cache / "quantized").glob("*.gguf"))) == 1
