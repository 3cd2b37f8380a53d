"""A stage in a process of its own, and the link to it.

Messages go through the standard input and output of the process, each with its length (U64, little-endian) before it.
While the process lives, it also sends a beat every second: the greatest length, without a message.
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
import threading
import time
from collections.abc import Callable, Sequence
from typing import BinaryIO, cast

from nybble.load_options import LoadOptions
from nybble.pipeline.relay import Relay
from nybble.pipeline.stages import StageInfo, Units, describe, load_stage

_LENGTH = struct.Struct("<Q")
_BEAT = (1 << 64) - 1
_BEAT_SECONDS = 1.0
_PIPE_BYTES = 1 << 20
SILENT_SECONDS = 60.0
"""How long a stage may send nothing before it counts as ended."""


def _write(to: BinaryIO, *messages: bytes) -> None:
    for message in messages:
        to.write(_LENGTH.pack(len(message)))
        to.write(message)
    to.flush()


def _read(of: BinaryIO, hear: Callable[[], None] = lambda: None) -> bytes:
    """Reads a message. Calls `hear` after each beat before it.

    Raises:
        EOFError: The other process has ended.
    """
    while (length := _LENGTH.unpack(_read_exactly(of, _LENGTH.size))[0]) == _BEAT:
        hear()
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
        silent_seconds: The process is killed if it is to reply and sends nothing for as long.
    """

    def __init__(
        self,
        path: str,
        options: LoadOptions,
        units: Units,
        command: Sequence[str] = (),
        silent_seconds: float = SILENT_SECONDS,
    ) -> None:
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
        self._silent_seconds = silent_seconds
        self._silent_beats = 0
        """Beats of this process without one of the other."""
        self._is_waiting = self._was_silent = False
        self._closed = threading.Event()
        threading.Thread(target=self._watch, name="nybble-stage-watch", daemon=True).start()
        try:
            setup = {"path": os.fspath(path), "options": dataclasses.asdict(options), "units": units}
            _write(cast("BinaryIO", self._process.stdin), json.dumps(setup).encode())
            found = json.loads(self.receive())
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
            TimeoutError: It was silent for too long and was killed.
        """
        self._silent_beats, self._is_waiting = 0, True
        try:
            return _read(cast("BinaryIO", self._process.stdout), self._hear)
        except EOFError:
            if self._was_silent:
                raise TimeoutError(f"sent nothing for {self._silent_seconds:g} seconds and was killed") from None
            raise
        finally:
            self._is_waiting = False

    def _hear(self) -> None:
        self._silent_beats = 0

    def _watch(self) -> None:
        """In a thread: kills a process that is to reply and no longer beats.

        It counts its own beats instead of seconds, so a pause of both processes, or of the machine, does not count.
        """
        while not self._closed.wait(_BEAT_SECONDS):
            self._silent_beats += 1
            if self._is_waiting and self._silent_beats * _BEAT_SECONDS > self._silent_seconds:
                self._was_silent = True
                self._process.kill()

    def close(self) -> None:
        """Ends the process."""
        self._closed.set()
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):  # What was not written yet.
                    pipe.close()


def processes(
    path: str, units: Sequence[Units], command: Sequence[str] = (), silent_seconds: float = SILENT_SECONDS
) -> Relay:
    """Stages in processes of this machine."""
    return Relay(lambda options, own: ProcessLink(path, options, own, command, silent_seconds), units)


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
    lock = threading.Lock()

    def reply(message: bytes) -> None:
        with lock:
            _write(to, message)

    def beat() -> None:
        # The end of the process ends this thread. The lock keeps a beat out of a message.
        with contextlib.suppress(OSError, ValueError):
            while True:
                with lock:
                    to.write(_LENGTH.pack(_BEAT))
                    to.flush()
                time.sleep(_BEAT_SECONDS)

    threading.Thread(target=beat, name="nybble-beat", daemon=True).start()
    try:
        stage = load_stage(setup["path"], LoadOptions(**setup["options"]), tuple(setup["units"]))
    except Exception as error:
        reply(json.dumps({"error": str(error), "kind": type(error).__name__}).encode())
        return
    reply(json.dumps(describe(stage)).encode())
    try:
        while True:
            plan, received = _read(of), _read(of)
            reply(stage.run(plan, received))
    except (EOFError, BrokenPipeError):
        return
