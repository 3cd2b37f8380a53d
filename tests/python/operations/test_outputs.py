"""No command and no function writes over what it reads, or replaces what is not a regular file."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import socket
import stat
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tiny
from goldens import GOLDENS

import nybble
from nybble import Model, _native
from nybble.cli import main
from nybble.quantization.options import QuantizeOptions
from nybble.server.addresses import bind_unix

TEXT = "A line of prose, and another one after it.\n" * 200


def _state(folder: Path) -> dict[str, tuple[int, str]]:
    """The kind of everything in a folder, and the contents of files and links."""
    found = {}
    for path in sorted(folder.rglob("*")):
        kind = stat.S_IFMT(path.lstat().st_mode)
        content = str(path.readlink()) if path.is_symlink() else ""
        if stat.S_ISREG(kind):
            content = hashlib.sha256(path.read_bytes()).hexdigest()
        found[str(path.relative_to(folder))] = (kind, content)
    return found


class Inputs:
    """Everything that the writers read, in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.root = folder
        self.folder = folder / "checkpoint"
        shutil.copytree(GOLDENS / "llama", self.folder, ignore=shutil.ignore_patterns("*.npz"))
        (self.folder / "sub").mkdir()
        (self.folder / "sub" / "notes.txt").write_text("notes")
        self.file = folder / "model.gguf"
        _native.convert(self.folder, self.file, "f32")
        self.text = folder / "prose.txt"
        self.text.write_text(TEXT)
        self.tiny = tiny.write_model(folder / "tiny.gguf")


def _convert(source: Path, out: Path, inputs: Inputs) -> None:
    main(["convert", str(source), str(out), "--force"])


def _quantize(source: Path, out: Path, inputs: Inputs) -> None:
    main(["quantize", str(source), str(out), "--recipe", "rtn", "--calibration", str(inputs.text), "--force"])


def _report(source: Path, out: Path, inputs: Inputs) -> None:
    main(["quantize", str(source), str(inputs.root / "q.gguf"), "--recipe", "rtn", "--report", str(out), "--force"])


def _data_of_report(source: Path, out: Path, inputs: Inputs) -> None:
    """The page gets a new name, and the file of JSON next to it the name of the output."""
    page = out.with_suffix(".html")
    main(["quantize", str(source), str(inputs.root / "q.gguf"), "--recipe", "rtn", "--report", str(page), "--force"])


def _convert_natively(source: Path, out: Path, inputs: Inputs) -> None:
    _native.convert(source, out, "q8_0")


def _quantize_natively(source: Path, out: Path, inputs: Inputs) -> None:
    windows = np.zeros((1, 32), dtype=np.int32)
    for recipe in ("gptq", "auto"):
        options = QuantizeOptions(recipe=recipe, force=True)
        _native.quantize(source, out, options, windows=windows, evaluation=windows, read=[inputs.text])


def _quantize_in_python(source: Path, out: Path, inputs: Inputs) -> None:
    nybble.quantize(source, out, recipe="rtn", evaluation=inputs.text, measure=True, force=True)


def _save_report(source: Path, out: Path, inputs: Inputs) -> None:
    made = inputs.root / "r.gguf"
    report = nybble.quantize(source, made, recipe="rtn", force=True)
    made.unlink()
    report.save(out)


def _measure_importance(source: Path, out: Path, inputs: Inputs) -> None:
    made = inputs.root / "i.gguf"
    nybble.quantize(
        source, made, recipe="rtn", calibration=inputs.text, calibration_tokens=512, imatrix=out, force=True
    )


def _spend_bits(source: Path, out: Path, inputs: Inputs) -> None:
    nybble.quantize(source, out, recipe="rtn", bits_per_weight=6, calibration=inputs.text, force=True)


def _listen(source: Path, out: Path, inputs: Inputs) -> None:
    with bind_unix(out):
        pass


def _save_session(source: Path, out: Path, inputs: Inputs) -> None:
    with Model.load(source, threads=1, quantize="stored") as model:
        session = model.session()
        session.generate([1, 2, 3], max_tokens=1)
        session.save(out)


WRITERS = [
    _convert,
    _quantize,
    _report,
    _convert_natively,
    _quantize_natively,
    _quantize_in_python,
    _save_report,
    _measure_importance,
    _spend_bits,
    _save_session,
    _data_of_report,
    _listen,
]


def _attempt(writer: Callable[[Path, Path, Inputs], None], source: Path, out: Path, inputs: Inputs) -> None:
    """Runs a writer, and checks that nothing that existed has changed."""
    before = _state(inputs.root)
    with contextlib.suppress(ValueError, OSError):
        writer(source, out, inputs)
    after = _state(inputs.root)
    changed = [name for name, value in before.items() if after.get(name) != value]
    assert not changed, f"{writer.__name__} has changed {changed}"
    for name in after.keys() - before.keys():
        path = inputs.root / name
        assert not path.name.endswith(".tmp"), f"{writer.__name__} has left {name}"
        if not path.is_dir():
            path.unlink()


@pytest.fixture
def inputs(tmp_path: Path) -> Inputs:
    """Files and folders that may be read and must not change."""
    return Inputs(tmp_path)


@pytest.mark.parametrize("writer", WRITERS, ids=lambda writer: writer.__name__.strip("_"))
def test_no_source_is_overwritten(writer: Callable[[Path, Path, Inputs], None], inputs: Inputs) -> None:
    links = inputs.root / "links"
    links.mkdir()
    targets: dict[Path, list[Path]] = {
        inputs.file: [inputs.file],
        inputs.folder: [*inputs.folder.iterdir(), inputs.folder / "sub" / "notes.txt"],
    }
    for source, outs in targets.items():
        for number, target in enumerate(outs):
            symbolic, hard = links / f"{source.name}-{number}.symbolic", links / f"{source.name}-{number}.hard"
            symbolic.symlink_to(target)
            ways = [target, symbolic, target.parent / ".." / target.parent.name / target.name]
            if target.is_file():
                os.link(target, hard)
                ways.append(hard)
            for out in ways:
                _attempt(writer, source, out, inputs)


@pytest.mark.parametrize("writer", WRITERS, ids=lambda writer: writer.__name__.strip("_"))
def test_what_is_not_a_regular_file_is_never_replaced(
    writer: Callable[[Path, Path, Inputs], None], inputs: Inputs
) -> None:
    places = inputs.root / "places"
    places.mkdir()
    os.mkfifo(places / "pipe")
    (places / "folder").mkdir()
    (places / "dangling").symlink_to(places / "nowhere")
    (places / "loop").symlink_to(places / "loop")
    (places / "link").symlink_to(places / "pipe")
    with contextlib.suppress(PermissionError):  # Only root makes devices.
        os.mknod(places / "device", 0o666 | stat.S_IFCHR, os.makedev(1, 3))
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(places / "socket"))
        server.listen()
        for out in sorted(places.iterdir()):
            _attempt(writer, inputs.file, out, inputs)


@pytest.mark.parametrize("writer", [_quantize, _quantize_natively], ids=["command", "native"])
def test_a_text_that_is_read_is_not_overwritten(writer: Callable[[Path, Path, Inputs], None], inputs: Inputs) -> None:
    hard = inputs.root / "hard.txt"
    os.link(inputs.text, hard)
    for out in (inputs.text, hard):
        _attempt(writer, inputs.folder, out, inputs)


@pytest.mark.parametrize("native", [False, True], ids=["python", "native"])
def test_an_importance_matrix_is_not_overwritten(native: bool, inputs: Inputs) -> None:
    imatrix, hard, new = (inputs.root / name for name in ("i.gguf", "hard.gguf", "new.gguf"))
    made = inputs.root / "made.gguf"
    nybble.quantize(inputs.folder, made, recipe="rtn", calibration=inputs.text, calibration_tokens=512, imatrix=imatrix)
    before = imatrix.read_bytes()
    os.link(imatrix, hard)
    for out in (imatrix, hard):
        options = QuantizeOptions(recipe="rtn", imatrix=imatrix, force=True)
        writer: Callable[..., object] = _native.quantize if native else nybble.quantize
        with pytest.raises(ValueError, match="which is read"):
            writer(inputs.folder, out, options)
        assert imatrix.read_bytes() == before
    with pytest.raises(ValueError, match="another output"):
        nybble.quantize(inputs.folder, new, recipe="rtn", calibration=inputs.text, imatrix=new)
    assert not new.exists()


def test_a_source_named_like_unfinished_work_is_kept(inputs: Inputs) -> None:
    for suffix in (".resume", ".resume-state", ".resume-text", ".resume-report", ".bits.resume"):
        source = inputs.root / f"own.gguf{suffix}"
        shutil.copy(inputs.file, source)
        with pytest.raises(ValueError, match="which is read"):
            nybble.quantize(source, inputs.root / "own.gguf", recipe="gptq", force=True)
        assert source.read_bytes() == inputs.file.read_bytes()
        source.unlink()


def test_no_shard_is_overwritten(inputs: Inputs) -> None:
    first, second = (inputs.root / f"split-0000{number}-of-00002.gguf" for number in (1, 2))
    first.write_bytes(b"GGUF, the first shard")
    second.write_bytes(b"GGUF, the second shard")
    with pytest.raises(ValueError, match=r"second|which is read with"):
        _native.check_output(second, [first])
    with pytest.raises(ValueError, match="which is read"):
        _native.check_output(first, [second])


def test_a_report_and_its_model_are_two_files(inputs: Inputs, capsys: pytest.CaptureFixture[str]) -> None:
    out = inputs.root / "new.json"
    code = main(["quantize", str(inputs.folder), str(out), "--recipe", "rtn", "--report", str(out)])
    assert code == 1
    assert "which is the output" in capsys.readouterr().err
    assert not out.exists()


def test_a_session_never_replaces_the_source_of_a_quantized_copy(
    inputs: Inputs, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("NYBBLE_CACHE", str(tmp_path / "cache"))
    with Model.load(inputs.folder, quantize="int4:rtn", threads=1) as model:
        for name in ("config.json", "model.safetensors"):
            with pytest.raises(ValueError, match="file of the folder"):
                model.session().save(inputs.folder / name)
        model.session().save(tmp_path / "new.session")


def test_a_new_file_in_the_folder_of_the_source_is_written(inputs: Inputs) -> None:
    _native.convert(inputs.folder, inputs.folder / "converted.gguf", "q8_0")
    assert (inputs.folder / "converted.gguf").stat().st_size > 0
