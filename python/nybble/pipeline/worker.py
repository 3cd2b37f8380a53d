"""A stage in a process of its own, and the link to it.

Messages go through the standard input and output of the process, each with its length (U64, little-endian) before it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import struct
import subprocess
import sys
from collections.abc import Sequence
from typing import BinaryIO, cast

from nybble.load_options import LoadOptions
from nybble.pipeline.relay import Relay
from nybble.pipeline.stages import StageInfo, Units, describe, load_stage

_LENGTH = struct.Struct("<Q")
_PIPE_BYTES = 1 << 20


def _write(to: BinaryIO, *messages: bytes) -> None:
    for message in messages:
        to.write(_LENGTH.pack(len(message)))
        to.write(message)
    to.flush()


def _read(of: BinaryIO) -> bytes:
    """Reads a message.

    Raises:
        EOFError: The other process has ended.
    """
    (length,) = _LENGTH.unpack(_read_exactly(of, _LENGTH.size))
    return _read_exactly(of, length)


def _read_exactly(of: BinaryIO, length: int) -> bytes:
    found = of.read(length)
    if len(found) < length:
        raise EOFError("its process has ended")
    return found


def _enlarge(pipe: BinaryIO) -> None:
    """Lets a pipe hold the rows of a step, where the system permits it. Otherwise they take several system calls."""
    if sys.platform == "linux":
        import fcntl

        with contextlib.suppress(OSError):
            fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)


class ProcessLink:
    """A stage in another process of this machine.

    Args:
        path: The model's file or folder.
        options: How to load it.
        units: The units of the stage.
        command: A command that runs the process, before the interpreter.
    """

    def __init__(self, path: str, options: LoadOptions, units: Units, command: Sequence[str] = ()) -> None:
        python = [sys.executable, "-c", "from nybble.pipeline.worker import main; main()"]
        # The interpreter of this program, and the command of the caller.
        self._process = subprocess.Popen(  # noqa: S603
            [*command, *python],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)},
        )
        for pipe in (self._process.stdin, self._process.stdout):
            _enlarge(cast("BinaryIO", pipe))
        try:
            setup = {"path": os.fspath(path), "options": dataclasses.asdict(options), "units": units}
            _write(cast("BinaryIO", self._process.stdin), json.dumps(setup).encode())
            found = json.loads(_read(cast("BinaryIO", self._process.stdout)))
            if "error" in found:
                raise _ERRORS.get(found["kind"], RuntimeError)(found["error"])
            self.info: StageInfo = StageInfo(**found)
        except (EOFError, BrokenPipeError):
            self.close()
            status = self._process.wait()
            raise ConnectionError(f"the process of a stage ended while it loaded, with status {status}") from None
        except BaseException:
            self.close()
            raise

    @property
    def pid(self) -> int:
        """The id of the process."""
        return self._process.pid

    def send(self, plan: bytes, received: bytes) -> None:
        """Hands the stage a plan, and the reply of the stage before it.

        Raises:
            OSError: The process has ended.
        """
        _write(cast("BinaryIO", self._process.stdin), plan, received)

    def receive(self) -> bytes:
        """Waits for the reply to the oldest plan that has got none.

        Raises:
            EOFError, OSError: The process has ended.
        """
        return _read(cast("BinaryIO", self._process.stdout))

    def close(self) -> None:
        """Ends the process."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):  # What was not written yet.
                    pipe.close()


def processes(path: str, units: Sequence[Units], command: Sequence[str] = ()) -> Relay:
    """Stages in processes of this machine."""
    return Relay(lambda options, own: ProcessLink(path, options, own, command), units)


_ERRORS: dict[str, type[Exception]] = {
    "MemoryError": MemoryError,
    "ValueError": ValueError,
    "FileNotFoundError": FileNotFoundError,
}


def main() -> None:
    """Runs the stage of this process until the other end of its input closes."""
    # Ctrl-C reaches all processes of a terminal, and the driver ends its stages when its requests have ended.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    of, to = sys.stdin.buffer, os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    # What anything else prints must not look like a message.
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    setup = json.loads(_read(of))
    try:
        stage = load_stage(setup["path"], LoadOptions(**setup["options"]), tuple(setup["units"]))
    except Exception as error:
        _write(to, json.dumps({"error": str(error), "kind": type(error).__name__}).encode())
        return
    _write(to, json.dumps(describe(stage)).encode())
    try:
        while True:
            plan, received = _read(of), _read(of)
            _write(to, stage.run(plan, received))
    except (EOFError, BrokenPipeError):
        return
