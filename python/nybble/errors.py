"""What can go wrong, as exceptions.

Missing files are `FileNotFoundError`, other trouble with files and networks is `OSError`, an argument out of range is
`ValueError`; the classes here are for what only a model runner knows, and one for what should not be.
"""

from __future__ import annotations


class ModelError(ValueError):
    """A model that cannot be used: its file is damaged, contradicts itself, or asks for something not supported.

    The message names the file, the key or tensor, what was found and what was expected.
    """


class ContextFullError(ModelError):
    """The tokens do not fit into the model's context.

    Attributes:
        used: tokens that the context held already.
        requested: tokens that were to be added.
        context: tokens that fit in all.
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
    """An engine has as many requests waiting as it was told to take. Later there is room again.

    Attributes:
        waiting: requests that wait for a place.
    """

    def __init__(self, waiting: int) -> None:
        super().__init__(waiting)
        self.waiting = waiting

    def __str__(self) -> str:
        return f"the queue is full: {self.waiting} requests wait for a place; try again later"


class InternalError(RuntimeError):
    """A bug in nybble, not in your program, your model or your prompt.

    The model remains usable, but the call has not done what it should. The message holds what a report needs.
    """

    def __str__(self) -> str:
        from importlib.metadata import version

        words = " ".join(str(argument) for argument in self.args)
        return (
            f"{words} - this is a bug in nybble {version('nybble')}: please report it, "
            "with these words, the lines above and what you called"
        )
