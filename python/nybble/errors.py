"""Exceptions of nybble.

Python's own exceptions are used where they fit: `FileNotFoundError` and other `OSError`s for files and networks,
`ValueError` and `TypeError` for arguments, `MemoryError` for failed allocations.
"""

from __future__ import annotations


class ModelError(ValueError):
    """A model cannot be used: its file is damaged, inconsistent or not supported, or the model or engine is closed.

    The message about a file names the file, the key or tensor, what was found and what was expected.
    """


class ContextFullError(ModelError):
    """The tokens do not fit into the model's context.

    Attributes:
        used: Tokens in the context before the call.
        requested: Tokens that the call would have added.
        context: Tokens that fit in total.
    """

    def __init__(self, used: int, requested: int, context: int) -> None:
        super().__init__(used, requested, context)
        self.used = used
        self.requested = requested
        self.context = context

    def __str__(self) -> str:
        if self.used == 0:
            return (
                f"the prompt has {self.requested} tokens, but the context holds {self.context}: "
                "shorten it, or load the model with a larger context"
            )
        return (
            f"the context is full: {self.used} tokens used and {self.requested} more requested, "
            f"but it holds {self.context}"
        )


class QueueFullError(RuntimeError):
    """The queue of an engine is full: `max_queue` requests are waiting. Try again later.

    Attributes:
        waiting: Requests that wait for a slot.
    """

    def __init__(self, waiting: int) -> None:
        super().__init__(waiting)
        self.waiting = waiting

    def __str__(self) -> str:
        return f"the queue is full: {self.waiting} requests wait for a slot; try again later"


class EngineError(RuntimeError):
    """The engine failed while it computed this request and others. It accepts requests again.

    The cause is in `__cause__`.
    """


class InternalError(RuntimeError):
    """A bug in nybble, not in your program, model or prompt.

    The call has failed, but the model stays usable. The message contains what a bug report needs.
    """

    def __str__(self) -> str:
        from importlib.metadata import version

        message = " ".join(str(argument) for argument in self.args)
        return (
            f"{message} - this is a bug in nybble {version('nybble')}: please report it, "
            "with this message, the lines above it and the call that failed"
        )
