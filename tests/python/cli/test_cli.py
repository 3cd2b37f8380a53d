"""The command line: what it prints, where, and with which exit code."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import select
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny
from fake_hub import FakeHub
from serving import REASONING_TEMPLATE

from nybble import SamplingOptions
from nybble.cli import main, terminal
from nybble.load_options import LoadOptions
from nybble.models import hub
from nybble.server.options import ServeOptions

FORBID_END = f"{tiny.IM_END}=-inf"
WRITE_X = f"{ord('x')}=1000"
needs_pty = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no pseudo-terminals of this kind")


@pytest.fixture(scope="session")
def endless_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a context larger than any test fills."""
    path = tmp_path_factory.mktemp("endless") / "endless.gguf"
    return tiny.write_model(path, llama__context_length=1_000_000)


def nybble(*arguments: str | Path, stdin: str = "") -> subprocess.CompletedProcess[str]:
    """Runs the command as a process with pipes."""
    command = [sys.executable, "-m", "nybble", *map(str, arguments)]
    return subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=120, check=False)


class FailedError(Exception):
    pass


def run(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """Runs the command in this process and returns what it printed; raises `FailedError` with code and message."""
    code = main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    if code:
        assert out == ""
        assert err.count("\n") == 1, f"one line, but found {err!r}"
        raise FailedError(f"{code} {err}")
    return out


# --- run


def test_run_prints_the_completion_and_nothing_else(tiny_file: Path) -> None:
    done = nybble("run", tiny_file, "abc", "--max-tokens", "5", "--logit-bias", WRITE_X)
    assert (done.returncode, done.stdout, done.stderr) == (0, "xxxxx\n", "")


def test_run_reads_the_prompt_from_standard_input(tiny_file: Path) -> None:
    done = nybble("run", "--raw", tiny_file, "-", "--max-tokens", "1", "--json", stdin="twelve bytes")
    assert json.loads(done.stdout)["usage"]["prompt_tokens"] == 12


def test_run_json_is_one_object_with_the_completion(tiny_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    done = json.loads(
        run(capsys, "run", "--raw", tiny_file, "abc", "--json", "--max-tokens", "2", "--logit-bias", WRITE_X)
    )
    assert (done["text"], done["tokens"], done["finish_reason"]) == ("xx", [120, 120], "length")
    assert done["usage"] == {"prompt_tokens": 3, "completion_tokens": 2, "cached_tokens": 0}


def test_run_answers_with_a_chat_template_and_continues_without(
    tiny_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    no_template = tiny.write_model(tmp_path / "base.gguf", tokenizer__chat_template=None)

    def prompt_tokens(*arguments: str | Path) -> int:
        done = json.loads(run(capsys, "run", *arguments, "Hello", "--json", "--max-tokens", "1"))
        return int(done["usage"]["prompt_tokens"])

    assert prompt_tokens(tiny_file) == len("user\nHello\nassistant\n") + 3
    assert prompt_tokens("--raw", tiny_file) == len("Hello")
    assert prompt_tokens(no_template) == len("Hello")


def test_every_sampling_option_is_an_option_of_run_and_chat(capsys: pytest.CaptureFixture[str]) -> None:
    only_python = {"logprobs", "logits_processor", "dry_sequence_breakers", "early_stopping"}
    names = [name for name in SamplingOptions.__dataclass_fields__ if name not in only_python]
    for command in ("run", "chat"):
        output = run(capsys, command, "--help")
        assert all(f"--{name.replace('_', '-')} " in output for name in names)


@pytest.mark.parametrize(("command", "group"), [("run", LoadOptions), ("bench", LoadOptions), ("serve", ServeOptions)])
def test_every_field_with_help_becomes_an_option(command: str, group: Any, capsys: pytest.CaptureFixture[str]) -> None:
    output = run(capsys, command, "--help")
    # Options of other commands, --cache-gb, --cache-dir-gb and --speculation.
    other = ("quantize", "cache_bytes", "cache_dir_bytes", "mtp")
    names = [field.name for field in dataclasses.fields(group) if "help" in field.metadata and field.name not in other]
    assert len(names) > 5
    assert all(f"--{name.replace('_', '-')} " in output for name in names)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--port", "70000"], "port: found 70000, expected 0 to 65535"),
        (["--max-batch", "0"], "max_batch: found 0, expected 1 to 1024"),
        (["--max-queue", "-1"], "max_queue: found -1, expected 0 or more"),
        (["--timeout", "0"], "timeout: found 0.0, expected 0.1 or more"),
    ],
)
def test_serve_checks_the_range_of_its_options(
    arguments: Sequence[str], message: str, tiny_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(FailedError, match=f"^2 nybble: .*{message}"):
        run(capsys, "serve", tiny_file, *arguments)


def test_sampling_options_reach_the_model(tiny_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("run", tiny_file, "abc", "--max-tokens", "9", "--logit-bias", WRITE_X, "--stop", "y", "--stop", "xxx")
    assert run(capsys, *arguments) == "\n"
    seeded = ("run", tiny_file, "abc", "--max-tokens", "20", "--temperature", "2", "--json", "--seed")
    tokens = [json.loads(run(capsys, *seeded, seed))["tokens"] for seed in ("1", "1", "2")]
    assert tokens[0] == tokens[1] != tokens[2]


def test_run_needs_a_prompt_besides_a_model(tiny_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(FailedError, match=r"^2 nybble: .*PROMPT is missing"):
        run(capsys, "run", tiny_file)


# --- Errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run"], "Missing argument"),
        (["run", "a", "b", "c"], "needs quotes"),
        (["run", "prompt", "--frobnicate"], "No such option"),
        (["run", "prompt", "--top-p", "7"], "top_p: found 7.0, expected"),
        (["run", "prompt", "--top-p", "many"], "--top-p"),
        (["run", "prompt", "--logit-bias", "x"], "expected ID=BIAS"),
        (["frobnicate"], "No such command"),
        (["bench", "--rounds", "0"], "--rounds"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(
    arguments: Sequence[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(FailedError, match=f"^2 nybble: .*{message}"):
        run(capsys, *arguments)


def test_failure_is_one_line_and_exit_code_1(
    tiny_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(FailedError, match=r"^1 nybble: .*nowhere\.gguf: no such file or folder"):
        run(capsys, "run", tmp_path / "nowhere.gguf", "abc")
    with pytest.raises(FailedError, match=r"^1 nybble: .*kernel.*frob.*scalar"):
        run(capsys, "run", tiny_file, "abc", "--kernel", "frob")
    with pytest.raises(FailedError, match=r"^1 nybble: the prompt has 200 tokens, but the context holds 128"):
        run(capsys, "run", "--raw", tiny_file, "a" * 200)
    (tmp_path / "broken.gguf").write_bytes(tiny_file.read_bytes()[:5000])
    with pytest.raises(FailedError, match=r"^1 nybble: .*broken\.gguf: .*found .*expected"):
        run(capsys, "run", tmp_path / "broken.gguf", "abc")


def test_a_failing_process_prints_no_traceback(tmp_path: Path) -> None:
    done = nybble("inspect", tmp_path / "nowhere.gguf")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("nybble: ")
    assert done.stderr.count("\n") == 1


def test_a_closed_pipe_is_not_an_error(tiny_file: Path) -> None:
    command = [sys.executable, "-m", "nybble", "inspect", str(tiny_file), "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""


def test_a_warning_is_one_line_without_source_code(capsys: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        terminal.show_warnings()
        warnings.warn("17 of 48900 merges\x1b[2J are left out", stacklevel=1)
    assert capsys.readouterr().err == "nybble: 17 of 48900 merges[2J are left out\n"


def test_without_a_command_the_help_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    output = run(capsys)
    assert all(command in output for command in ("run", "chat", "inspect", "bench", "models"))
    assert run(capsys, "--version").startswith("nybble ")


# --- inspect


def test_inspect_shows_metadata_and_tensors_in_80_columns(tiny_file: Path) -> None:
    done = nybble("inspect", tiny_file)
    lines = done.stdout.splitlines()
    assert done.returncode == 0
    assert "\x1b" not in done.stdout
    assert max(map(len, lines[3:])) <= 80
    assert any(line.split() == ["general.name", "tiny"] for line in lines)
    assert any("tokenizer.ggml.tokens" in line and "(259 items)" in line for line in lines)
    assert any(line.split() == ["token_embd.weight", "Q8_0", "64", "x", "259", "17.6", "kB"] for line in lines)
    assert any("blk.*.ffn_up.weight (2 times)" in line and "Q4_0" in line for line in lines)
    assert "blk.1.ffn_up.weight" in nybble("inspect", tiny_file, "--all").stdout


def test_inspect_json_has_every_key_and_tensor(tiny_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(run(capsys, "inspect", tiny_file, "--json"))
    assert found["metadata"]["tokenizer.ggml.tokens"][65] == "A"
    assert found["metadata"]["llama.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-5)
    assert len(found["tensors"]) == 20
    embedding = next(tensor for tensor in found["tensors"] if tensor["name"] == "token_embd.weight")
    assert (embedding["type"], embedding["shape"], embedding["bytes"]) == ("Q8_0", [64, 259], 17_612)


def test_inspect_prints_no_control_characters_of_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = {
        "general.architecture": "llama",
        "general.name": "\x1b[2Jboo [red]markup[/red] :smile:",
        "general.bytes": b"\xff\xfe",
        "general.endless": float("inf"),
    }
    tiny.write_gguf(tmp_path / "evil.gguf", values)
    output = run(capsys, "inspect", tmp_path / "evil.gguf")
    assert "\x1b" not in output
    assert "[2Jboo [red]markup[/red] :smile:" in output
    found = json.loads(run(capsys, "inspect", tmp_path / "evil.gguf", "--json"))["metadata"]
    assert found["general.bytes"] == "\ufffd\ufffd"
    assert found["general.endless"] == "inf"


# --- bench and models


FAST = ("--prompt", "16", "--generate", "4", "--rounds", "1")


def test_bench_json_is_one_object_with_all_measurements(tiny_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--threads", "1,2", "--prompt", "16,8", "--batch", "1,3", "--generate", "4", "--rounds", "1", "--json")
    found = json.loads(run(capsys, "bench", tiny_file, *arguments))
    assert found["model"] == "tiny"
    assert isinstance(found["kernel"], str)
    for name in ("load_seconds", "peak_rss_bytes", "weight_bytes", "cache_bytes"):
        assert found[name] > 0, name
    assert found["peak_rss_bytes"] > found["weight_bytes"]
    assert found["huge_page_bytes"] is None or found["huge_page_bytes"] >= 0
    for choice in found["tuning"]:
        assert choice["kernel"] in choice["gops"], choice
    assert [limit["threads"] for limit in found["limits"]] == [1, 2]
    assert all(limit["bandwidth_gb_s"] > 0 and limit["int8_gops"] > 0 for limit in found["limits"])
    combinations = {(speed["threads"], speed["length"], speed["batch"]) for speed in found["speeds"]}
    assert combinations == {(t, n, b) for t in (1, 2) for n in (16, 8) for b in (1, 3)}
    assert len(found["speeds"]) == 8
    for speed in found["speeds"]:
        assert all(value > 0 for value in speed.values()), speed


def test_bench_shows_what_kernels_were_chosen_by(
    tiny_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nybble._native.tuning", list)
    assert "no choice of kernels" in run(capsys, "bench", tiny_file, "--tuning", *FAST)
    choice = ("int4, groups of 32 with minimums", 64, 2, "narrow", [("wide", 310.4), ("narrow", 342.0)])
    monkeypatch.setattr("nybble._native.tuning", lambda: [choice])
    lines = run(capsys, "bench", tiny_file, "--tuning", *FAST).splitlines()
    row = next(line for line in lines if line.startswith("int4, groups of 32"))
    assert " ".join(row.split()) == "int4, groups of 32 with minimums 64 2 narrow wide 310, narrow 342"
    assert max(map(len, lines)) <= 80


def test_bench_prints_a_table_in_80_columns(tiny_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = run(capsys, "bench", tiny_file, "--threads", "2", "--batch", "1,2", *FAST)
    assert max(map(len, output.splitlines())) <= 80
    header = next(line for line in output.splitlines() if line.startswith("threads"))
    assert header.split() == [
        "threads",
        "length",
        "batch",
        "prompt",
        "t/s",
        "of",
        "INT8",
        "decoding",
        "t/s",
        "of",
        "reads",
    ]
    rows = [line.split() for line in output[output.index(header) :].splitlines()[1:]]
    assert [row[:3] for row in rows] == [["2", "16", "1"], ["2", "16", "2"]]
    assert all(row[4].endswith("%") and row[6].endswith("%") for row in rows)


def test_bench_compares_with_an_earlier_run(
    tiny_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    earlier = tmp_path / "earlier.json"
    earlier.write_text(run(capsys, "bench", tiny_file, "--threads", "1", *FAST, "--json"))
    slow = json.loads(earlier.read_text())
    slow["speeds"][0] |= {"prompt_tokens_per_second": 12.5, "decode_tokens_per_second": 6.25}
    earlier.write_text(json.dumps(slow))
    output = run(capsys, "bench", tiny_file, "--threads", "1", "--batch", "1,2", *FAST, "--compare", earlier)
    assert max(map(len, output.splitlines())) <= 80
    rows = [line.split() for line in output.splitlines() if line.split()[:2] == ["1", "16"]]
    assert [row[2] for row in rows] == ["1", "2"]
    for now, before, ratio in (rows[0][3:6], rows[0][6:9]):
        assert float(before) in (12.5, 6.2)
        assert float(ratio) == pytest.approx(float(now) / float(before), rel=0.02)
    assert rows[1][4:6] == ["-", "-"], "nothing to compare a batch of 2 with"
    both = json.loads(run(capsys, "bench", tiny_file, "--threads", "1", *FAST, "--compare", earlier, "--json"))
    assert both["before"] == slow


def test_bench_refuses_to_compare_with_another_file(
    tiny_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other.json"
    for text in ("[]", "{}", "no JSON", '{"speeds": [{"threads": 1}]}'):
        other.write_text(text)
        with pytest.raises(FailedError, match=r"^1 nybble: .*other\.json: "):
            run(capsys, "bench", tiny_file, "--compare", other)


@pytest.mark.parametrize("option", ["--prompt", "--batch", "--threads"])
@pytest.mark.parametrize("value", ["", "0", "1,,2", "x", "-1"])
def test_bench_refuses_malformed_lists_of_numbers(
    option: str, value: str, tiny_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(FailedError, match=rf"^2 nybble: .*{option}: found .* expected positive numbers"):
        run(capsys, "bench", tiny_file, f"{option}={value}")


def test_bench_refuses_lengths_beyond_the_context(tiny_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(FailedError, match=r"^2 nybble: .*--prompt 120 and --generate 64 do not fit into 128"):
        run(capsys, "bench", tiny_file, "--prompt", "16,120")


def test_models_lists_cached_models(
    fake_hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("NYBBLE_CACHE", str(tmp_path / "cache"))
    assert "no models in the cache" in run(capsys, "models")
    fake_hub.repositories["maker/model"] = {"m.Q4_0.gguf": bytes(2_500_000)}
    path = hub.resolve("maker/model")
    assert any(
        line.split() == ["maker/model", "m.Q4_0.gguf", "2.5", "MB"] for line in run(capsys, "models").splitlines()
    )
    assert json.loads(run(capsys, "models", "--json")) == [
        {"source": "maker/model", "filename": "m.Q4_0.gguf", "path": str(path), "bytes": 2_500_000, "default": False}
    ]


# --- chat


def test_chat_answers_each_line_of_a_pipe(tiny_file: Path) -> None:
    arguments = ("chat", tiny_file, "--max-tokens", "3", "--logit-bias", WRITE_X)
    done = nybble(*arguments, stdin="Hello\n\nAgain\n/exit\nnever\n")
    assert (done.returncode, done.stdout) == (0, "xxx\nxxx\n")


def test_chat_keeps_the_conversation_until_clear(tiny_file: Path) -> None:
    arguments = ("chat", tiny_file, "--max-tokens", "1", "--logit-bias", WRITE_X)
    message = "a" * 50  # One message fits into the context of 128 tokens, two do not.
    done = nybble(*arguments, stdin=f"{message}\n{message}\n/clear\n{message}\n")
    assert (done.returncode, done.stdout) == (0, "x\nx\n")
    assert done.stderr.count("/clear starts a new conversation") == 1


class Terminal:
    """A command on a pseudo-terminal of 80 columns."""

    def __init__(self, *arguments: str | Path) -> None:
        import pty

        self.seen = ""
        self.pid, self._fd = pty.fork()
        if self.pid == 0:
            os.environ["TERM"] = "xterm"
            os.execv(sys.executable, [sys.executable, "-m", "nybble", *map(str, arguments)])

    def wait_for(self, text: str, typing: str = "") -> str:
        """Reads until `text` has come, typing `typing` every second. Returns and drops what came before it."""
        deadline = time.monotonic() + 60
        typed = 0.0
        while text not in self.seen:
            assert time.monotonic() < deadline, f"{text!r} did not come; found {self.seen[-2000:]!r}"
            if typing and time.monotonic() - typed > 1:
                self.type(typing)
                typed = time.monotonic()
            if select.select([self._fd], [], [], 0.1)[0]:
                try:
                    self.seen += os.read(self._fd, 4096).decode(errors="replace")
                except OSError:  # Linux raises this at the end of the output.
                    pytest.fail(f"{text!r} did not come before the end; found {self.seen!r}")
        before, _, self.seen = self.seen.partition(text)
        return before

    def type(self, text: str) -> None:
        os.write(self._fd, text.encode())

    def end(self) -> int:
        """Waits for the end and returns the exit code."""
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            if select.select([self._fd], [], [], 0.05)[0]:
                with contextlib.suppress(OSError):
                    os.read(self._fd, 4096)
            done, status = os.waitpid(self.pid, os.WNOHANG)
            if done:
                os.close(self._fd)
                return os.waitstatus_to_exitcode(status)
        os.kill(self.pid, signal.SIGKILL)
        return pytest.fail("the command did not end")


@needs_pty
def test_ctrl_c_stops_an_answer_but_not_the_chat(endless_file: Path) -> None:
    terminal = Terminal(
        "chat", endless_file, "--max-tokens", "900000", "--logit-bias", WRITE_X, "--logit-bias", FORBID_END
    )
    terminal.wait_for("> ")
    terminal.type("Hello\n")
    terminal.wait_for("xxxxxxxx")
    terminal.wait_for("[stopped]", typing="\x03")
    terminal.wait_for("> ")
    terminal.wait_for("Ctrl-D leaves", typing="\x03")  # Without a running answer, Ctrl-C shows how to leave.
    terminal.type("Once more\n")
    terminal.wait_for("xxxxxxxx")
    terminal.wait_for("[stopped]", typing="\x03")
    terminal.type("/exit\n")
    assert terminal.end() == 0


@needs_pty
def test_ctrl_c_ends_run_with_exit_code_130(endless_file: Path) -> None:
    terminal = Terminal("run", endless_file, "Hello", "--max-tokens", "900000", "--logit-bias", WRITE_X)
    terminal.wait_for("xxxxxxxx")
    terminal.type("\x03")
    assert terminal.end() == 130


@needs_pty
def test_a_terminal_gets_no_control_characters_of_the_model(tiny_file: Path) -> None:
    escape = f"{0x1B}=1000"
    terminal = Terminal("run", tiny_file, "abc", "--max-tokens", "5", "--logit-bias", escape)
    assert "\x1b\x1b" not in terminal.wait_for("tokens/s")
    assert terminal.end() == 0
    piped = nybble("run", tiny_file, "abc", "--max-tokens", "5", "--logit-bias", escape)
    assert piped.stdout == "\x1b" * 5 + "\n", "a pipe gets the text unchanged"


@pytest.fixture(scope="session")
def reasoning_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a chat template that opens reasoning."""
    path = tmp_path_factory.mktemp("thinks") / "thinks.gguf"
    return tiny.write_model(path, llama__context_length=512, tokenizer__chat_template=REASONING_TEMPLATE)


REASONS = ("--max-tokens", "17", "--reasoning-budget", "4", "--logit-bias", WRITE_X)
"""Four tokens of reasoning, eleven that end it, and two of the answer."""


@pytest.mark.parametrize("command", ["run", "chat"])
def test_a_pipe_receives_the_answer_without_the_reasoning(command: str, reasoning_file: Path) -> None:
    prompt = ("Hi",) if command == "run" else ()
    done = nybble(command, reasoning_file, *prompt, *REASONS, stdin="Hi\n")
    assert (done.returncode, done.stdout) == (0, "xx\n")
    off = nybble(command, reasoning_file, *prompt, *REASONS, "--no-think", stdin="Hi\n")
    assert off.stdout == "x" * 17 + "\n"


def test_json_has_the_reasoning(reasoning_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(run(capsys, "run", "--json", reasoning_file, "Hi", *REASONS))
    assert (found["reasoning"], found["text"]) == ("xxxx", "xx")
    longer = json.loads(run(capsys, "run", "--json", reasoning_file, "Hi", "--reasoning-effort", "low", *REASONS))
    assert longer["usage"]["prompt_tokens"] > found["usage"]["prompt_tokens"]


@needs_pty
@pytest.mark.parametrize("command", ["run", "chat"])
def test_reasoning_is_dim_on_a_terminal(command: str, reasoning_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    terminal = Terminal(command, reasoning_file, *(("Hi",) if command == "run" else ()), *REASONS)
    if command == "chat":
        terminal.wait_for("> ")
        terminal.type("Hi\n")
    assert terminal.wait_for("\r\n\r\nxx").endswith("\x1b[2mx\x1b[0m" * 4)
    terminal.wait_for("tokens/s")
    if command == "chat":
        terminal.type("/exit\n")
    assert terminal.end() == 0


# --- Start-up


def test_a_run_imports_only_what_it_needs(tiny_file: Path) -> None:
    program = (
        "import sys; from nybble.cli import main\n"
        f"assert main(['run', '--raw', {str(tiny_file)!r}, 'abc', '--max-tokens', '1']) == 0\n"
        "slow = {'numpy', 'rich', 'jinja2', 'huggingface_hub', 'httpx', 'httpx2', 'requests'} & set(sys.modules)\n"
        "assert not slow, slow"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60, stdout=subprocess.DEVNULL)


def test_standard_output_may_be_any_text_stream(tiny_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    assert main(["run", str(tiny_file), "abc", "--max-tokens", "1", "--logit-bias", WRITE_X]) == 0
    assert out.getvalue() == "x\n"
