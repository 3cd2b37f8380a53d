"""The options of `nybble serve`, and the settings of a service. Nothing here imports a web framework."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """The options of `nybble serve`.

    Raises:
        ValueError: the API key is empty or contains characters that an HTTP header cannot hold.
    """

    host: str = field(
        default="127.0.0.1", metadata={"help": "Address to listen on; 0.0.0.0 listens on the whole network."}
    )
    port: int = field(default=8000, metadata={"help": "Port to listen on; 0 for any free port.", "range": (0, 65535)})
    api_key: str | None = field(
        default=None,
        metadata={
            "help": "Key that clients must send. Other users see it in the process list; the environment variable is "
            "safer.",
            "envvar": "NYBBLE_API_KEY",
        },
    )
    name: str | None = field(
        default=None, metadata={"help": "Name of the model for clients; by default that of its repository or file."}
    )
    max_batch: int = field(default=16, metadata={"help": "Answers to generate at the same time.", "range": (1, 1024)})
    max_queue: int = field(
        default=128, metadata={"help": "Answers that may wait for a slot; more are refused.", "range": (0, None)}
    )
    cache_gb: float | None = field(
        default=None,
        metadata={"help": "Memory for the KV cache in GB; by default half of the free memory.", "range": (0, None)},
    )
    speculation: Literal["off", "on", "auto"] = field(
        default="off",
        metadata={"help": "Draft tokens from repetitions and confirm several per step. Output does not change."},
    )
    draft: str | None = field(
        default=None, metadata={"help": "Smaller model of the same vocabulary that drafts tokens.", "metavar": "MODEL"}
    )
    pooling: Literal["mean", "last"] = field(
        default="mean", metadata={"help": "Pooling of embeddings; see the card of the embedding model."}
    )
    timeout: float = field(default=600, metadata={"help": "Time limit of an answer in seconds.", "range": (0.1, None)})
    drain: float = field(
        default=30, metadata={"help": "Seconds that running answers get after SIGTERM.", "range": (0, None)}
    )
    max_body_mb: float | None = field(
        default=None,
        metadata={
            "help": "Largest request body in MB; by default 16 bytes per token of the context, at least 1 MB.",
            "range": (0.001, None),
        },
    )
    allow_host: Sequence[str] = field(
        default=(),
        metadata={"help": "Host name that requests may use in addition to localhost; repeatable.", "metavar": "NAME"},
    )

    def __post_init__(self) -> None:
        if self.api_key is None:
            return
        key = self.api_key.strip()  # Keys from files often end with a line break, which a header cannot hold.
        if not key:
            raise ValueError("api_key: found an empty key, expected at least one character; omit it to need no key")
        if not (key.isascii() and key.isprintable()):
            raise ValueError("api_key: found characters that no header can hold, expected printable ASCII")
        object.__setattr__(self, "api_key", key)

    @property
    def cache_bytes(self) -> int | None:
        """Memory for the KV cache in bytes; None for the engine's default."""
        return None if self.cache_gb is None else int(self.cache_gb * 1e9)

    def settings(self, *, context: int, allowed_hosts: frozenset[str] | None) -> Settings:
        """The settings of the service.

        Args:
            context: the context of the model in tokens, which bounds the default size of a request.
            allowed_hosts: the host names that requests may use; None for any.
        """
        default_body_bytes = max(16 * context, 1_000_000)
        return Settings(
            api_key=self.api_key,
            allowed_hosts=allowed_hosts,
            max_body_bytes=default_body_bytes if self.max_body_mb is None else int(self.max_body_mb * 1e6),
            max_answers=self.max_batch + self.max_queue,
            pooling=self.pooling,
            request_seconds=self.timeout,
            drain_seconds=self.drain,
        )


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The limits of a service. Times are in seconds."""

    api_key: str | None = None
    """The key that clients must send; None for no key."""
    allowed_hosts: frozenset[str] | None = None
    """The host names that requests may use; None for any."""
    max_body_bytes: int = 1_000_000
    max_answers: int = 144
    """Answers that are generated or wait at the same time."""
    pooling: Literal["mean", "last"] = "mean"
    """How the vectors of an input's tokens become one vector."""
    max_connections: int = 1024
    request_seconds: float = 600.0
    """From the last byte of a request to the end of its answer."""
    receive_seconds: float = 30.0
    """From the first byte of a request to its last."""
    stall_seconds: float = 30.0
    """How long a client may leave an answer unread."""
    drain_seconds: float = 30.0
    """How long running answers may continue after SIGTERM."""
