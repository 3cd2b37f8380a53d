"""The options of `nybble serve`, and the settings of a service. Nothing here imports a web framework."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from nybble.engine_options import EngineOptions


def _option(help: str, **more: Any) -> dict[str, Any]:
    """The metadata of a field, from which its command-line option is generated.

    `range` holds the least and the greatest value; None stands for no limit.
    """
    return {"help": help, **more}


_LARGEST_CONTEXT = 1 << 22
"""Tokens that a model whose files have not been read may take."""


@dataclass(frozen=True, kw_only=True)
class ServeOptions(EngineOptions):
    """Options of `nybble serve`, those of the engine included.

    Raises:
        ValueError: A number is out of range, or the API key is empty or cannot be sent in an HTTP header.
    """

    host: str = field(
        default="127.0.0.1", metadata=_option("Address to listen on; 0.0.0.0 listens on the whole network.")
    )
    port: int = field(default=8000, metadata=_option("Port to listen on; 0 picks a free one.", range=(0, 65535)))
    unix_socket: str | None = field(
        default=None, metadata=_option("Unix socket to listen on instead of an address.", metavar="PATH")
    )
    ssl_cert: str | None = field(
        default=None, metadata=_option("Certificate in PEM, with which the server speaks HTTPS.", metavar="FILE")
    )
    ssl_key: str | None = field(default=None, metadata=_option("Key of the certificate in PEM.", metavar="FILE"))
    log_level: Literal["debug", "info", "warning", "error"] = field(
        default="info", metadata=_option("Lowest level of the log; info has a line for each request.")
    )
    api_key: str | None = field(
        default=None,
        metadata=_option(
            "Key that clients must send. The environment variable hides it from the process list.",
            envvar="NYBBLE_API_KEY",
        ),
    )
    name: str | None = field(
        default=None, metadata=_option("Name of the model for clients; by default that of its repository or file.")
    )
    allow_host: Sequence[str] = field(
        default=(),
        metadata=_option("Host name that requests and pages may use besides localhost. Repeatable.", metavar="NAME"),
    )
    allow_origin: Sequence[str] = field(
        default=(),
        metadata=_option(
            "Site whose pages may send requests, such as https://a.org; * for any. Repeatable.",
            metavar="ORIGIN",
        ),
    )
    max_body_mb: float | None = field(
        default=None,
        metadata=_option(
            "Largest request in MB; by default 16 bytes per token of the context, at least 8 MB.",
            range=(0.001, None),
        ),
    )
    timeout: float = field(default=600, metadata=_option("Seconds that an answer may take.", range=(0.1, None)))
    drain: float = field(
        default=30, metadata=_option("Seconds that running answers get after SIGTERM.", range=(0, None))
    )
    store_mb: float = field(
        default=64,
        metadata=_option(
            "Memory for responses that clients continue by their id, in MB; 0 keeps none.", range=(0, None)
        ),
    )
    bare_calls: bool = field(
        default=True,
        metadata=_option("Treat an answer that is only a call in JSON, without the model's markers, as a tool call."),
    )
    max_batch: int = field(
        default=16, metadata=_option("Answers generated at the same time.", range=(1, 1024), panel="Engine")
    )
    max_queue: int = field(default=128, metadata=_option("Answers that may wait; more are refused.", range=(0, None)))
    cache_gb: float | None = field(
        default=None,
        metadata=_option(
            "Memory for the KV cache in GB; by default half of the free memory.", range=(0, None), panel="Engine"
        ),
    )
    """Sets `cache_bytes`."""
    cache_dir: str | None = field(
        default=None,
        metadata=_option(
            "Folder that keeps the prefix cache between runs, with prompts and answers.",
            metavar="DIR",
            panel="Prefix cache on disk",
        ),
    )
    cache_dir_gb: float | None = field(
        default=None,
        metadata=_option(
            "Limit of that folder in GB; by default 10, but at most a tenth of the disk.",
            range=(0, None),
            panel="Prefix cache on disk",
        ),
    )
    """Sets `cache_dir_bytes`."""
    draft: str | None = field(
        default=None,
        metadata=_option("Smaller model of the same vocabulary that drafts tokens.", metavar="MODEL", panel="Engine"),
    )
    adapter: Sequence[str] = field(
        default=(),
        metadata=_option(
            "LoRA adapter to serve as the model BASE:NAME: a folder that PEFT has saved, or a GGUF file. Repeatable.",
            metavar="NAME=PATH",
            panel="Adapters",
        ),
    )
    adapter_folder: str | None = field(
        default=None,
        metadata=_option(
            "Folder from which clients may load LoRA adapters with /v1/load_lora_adapter; otherwise they may not.",
            metavar="FOLDER",
            panel="Adapters",
        ),
    )
    stages: int | None = field(
        default=None,
        metadata=_option(
            "Divide the model into this many processes, each with some of the layers.", range=(1, 256), panel="Stages"
        ),
    )
    ray: str | None = field(
        default=None,
        metadata=_option(
            "Address of a Ray cluster that runs the stages, such as auto; by default this machine does.",
            metavar="ADDRESS",
            panel="Stages",
        ),
    )
    pooling: Literal["mean", "cls", "last"] | None = field(
        default=None,
        metadata=_option(
            "Pooling of embeddings; by default that of the model's file, otherwise mean. See the model's card.",
            panel="Engine",
        ),
    )

    config: str | None = field(
        default=None,
        metadata=_option("File in TOML with models and options of the server.", metavar="FILE", panel="Several models"),
    )
    models_dir: str | None = field(
        default=None,
        metadata=_option(
            "Folder whose models are served: GGUF files and folders with safetensors files.",
            metavar="FOLDER",
            panel="Several models",
        ),
    )
    max_memory: str | None = field(
        default=None,
        metadata=_option(
            "Memory for loaded models, such as 16GB; by default nine tenths of what is free at the start.",
            metavar="SIZE",
            panel="Several models",
        ),
    )
    max_loaded: int | None = field(
        default=None,
        metadata=_option(
            "Models that may be loaded at the same time; all that fit if not given.",
            range=(1, None),
            panel="Several models",
        ),
    )
    unload_after: float | None = field(
        default=None,
        metadata=_option(
            "Seconds without a request after which a model is unloaded; never if not given.",
            range=(0, None),
            panel="Several models",
        ),
    )

    matryoshka: bool = field(
        default=False,
        metadata=_option("Let clients cut embeddings to fewer dimensions, for models trained for it.", panel="Engine"),
    )

    def __post_init__(self) -> None:
        for each in dataclasses.fields(self):
            least, greatest = each.metadata.get("range", (None, None))
            value = getattr(self, each.name)
            if value is None:
                continue
            if each.name in _SIZES and not value < _LARGEST_GB:
                raise ValueError(f"{each.name}: found {value}, expected less than {_LARGEST_GB:g}")
            if (least is not None and not value >= least) or (greatest is not None and not value <= greatest):
                expected = f"{least} or more" if greatest is None else f"{least} to {greatest}"
                raise ValueError(f"{each.name}: found {value}, expected {expected}")
        if self.api_key is not None:
            object.__setattr__(self, "api_key", _checked_key(self.api_key))
        if self.cache_gb is not None:
            object.__setattr__(self, "cache_bytes", int(self.cache_gb * 1e9))
        if self.cache_dir_gb is not None:
            object.__setattr__(self, "cache_dir_bytes", int(self.cache_dir_gb * 1e9))
        self.adapters()
        self._check_stages()
        if self.max_memory is not None:
            parse_size("max_memory", self.max_memory)
        if self.adapter_folder is not None and not Path(self.adapter_folder).is_dir():
            raise ValueError(f"adapter_folder: found {self.adapter_folder!r}, expected a folder")
        super().__post_init__()

    def _check_stages(self) -> None:
        if self.stages is None:
            if self.ray is not None:
                raise ValueError(f"ray: found {self.ray!r}, but no stages, expected their number as well")
            return
        for name in ("adapter", "adapter_folder", "cache_dir"):
            if found := getattr(self, name):
                raise ValueError(f"{name}: found {found!r}, expected none together with stages")
        if self.loads_on_demand:
            raise ValueError(f"stages: found {self.stages} together with several models, expected one model")

    def adapters(self) -> dict[str, Path]:
        """The paths of the adapters by name.

        Raises:
            ValueError: An entry is not NAME=PATH, or a name occurs twice.
        """
        found: dict[str, Path] = {}
        for entry in self.adapter:
            name, equals, path = entry.partition("=")
            if not equals or not path:
                raise ValueError(f"adapter: found {entry!r}, expected NAME=PATH")
            check_adapter_name(name)
            if name in found:
                raise ValueError(f"adapter: found the name {name!r} twice, expected different names")
            found[name] = Path(path)
        return found

    @property
    def max_memory_bytes(self) -> int | None:
        """The memory for loaded models in bytes; None if it was not given."""
        return None if self.max_memory is None else parse_size("max_memory", self.max_memory)

    @property
    def loads_on_demand(self) -> bool:
        """Whether models are loaded by requests, not when the server starts."""
        given = (self.config, self.models_dir, self.max_memory, self.max_loaded, self.unload_after)
        return any(value is not None for value in given)

    def engine(self) -> EngineOptions:
        """The options of the engine alone."""
        return EngineOptions(**{each.name: getattr(self, each.name) for each in dataclasses.fields(EngineOptions)})

    def settings(self, *, context: int | None, allowed_hosts: frozenset[str] | None) -> Settings:
        """The settings of the service.

        Args:
            context: The context of the model in tokens, which bounds the default size of a request; None if it is not
                known yet.
            allowed_hosts: The host names that requests may use; None for any.
        """
        default_body_bytes = max(16 * (_LARGEST_CONTEXT if context is None else context), 8_000_000)
        return Settings(
            api_key=self.api_key,
            allowed_hosts=allowed_hosts,
            allowed_origins=frozenset(
                [*(name.lower() for name in self.allow_host), *(name.rstrip("/").lower() for name in self.allow_origin)]
            ),
            max_body_bytes=default_body_bytes if self.max_body_mb is None else int(self.max_body_mb * 1e6),
            max_answers=self.max_batch + self.max_queue,
            pooling=self.pooling,
            matryoshka=self.matryoshka,
            adapter_folder=None if self.adapter_folder is None else Path(self.adapter_folder),
            bare_calls=self.bare_calls,
            store_bytes=int(self.store_mb * 1e6),
            request_seconds=self.timeout,
            drain_seconds=self.drain,
        )


_SIZES = ("cache_gb", "cache_dir_gb", "store_mb", "max_body_mb")
"""Options that are sizes, which must be finite."""
_LARGEST_GB = 1e9
"""The end of their range, below which bytes fit into 64 bits."""

_UNITS = {"B": 1, **{f"{letter}B": 1000**n for n, letter in enumerate("KMGT", 1)}} | {
    f"{letter}iB": 1024**n for n, letter in enumerate("KMGT", 1)
}
"""Bytes of the units of sizes."""


def parse_size(name: str, text: str) -> int:
    """The bytes of a size such as `16GB` or `500 MiB`.

    Raises:
        ValueError: It is not a size, or 0. The message begins with `name`.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]+)", text.strip())
    units = {unit.lower(): factor for unit, factor in _UNITS.items()}
    unit = None if match is None else units.get(match[2].lower(), units.get(f"{match[2]}b".lower()))
    # The largest sizes have more digits than a float.
    amount = 0.0 if match is None else min(float(match[1]), 1e15)
    if match is None or unit is None or (found := int(amount * unit)) <= 0:
        raise ValueError(f"{name}: found {text!r:.100}, expected a size with its unit, such as 16GB or 500MB")
    return found


def check_certificate(options: ServeOptions) -> None:
    """Refuses a certificate without its key, and a key without its certificate.

    Args:
        options: The options, complete with those of a configuration file.

    Raises:
        ValueError: One of them is missing.
    """
    if (options.ssl_cert is None) != (options.ssl_key is None):
        found, missing = ("ssl_cert", "ssl_key") if options.ssl_key is None else ("ssl_key", "ssl_cert")
        raise ValueError(f"{missing}: found {found} alone, expected both or neither")


def check_cache_dir(models: Iterable[ServeOptions]) -> None:
    """Refuses a limit of the prefix cache on disk where no model has a folder for it.

    Args:
        models: The options of all models, complete with those of a configuration file.

    Raises:
        ValueError: The limit is refused.
    """
    found = [*models]
    if any(each.cache_dir_gb is not None for each in found) and all(each.cache_dir is None for each in found):
        raise ValueError("cache_dir_gb: found a limit, but no cache_dir, expected both or neither")


def check_adapter_name(name: str) -> None:
    """Refuses a name that would not reach its adapter as the model `base:name`.

    Raises:
        ValueError: The name is refused.
    """
    if name == "latest":  # Ollama's clients add it to the name of the base.
        raise ValueError("adapter: found the name 'latest', which stands for the model alone, expected another")
    if not re.fullmatch(r"[A-Za-z0-9._-]{1,128}", name):
        raise ValueError(
            f"adapter: found the name {name!r:.200}, expected 1 to 128 characters of A-Z, a-z, 0-9, '.', '_' and '-'"
        )


def _checked_key(key: str) -> str:
    key = key.strip()  # Keys from files often end with a line break, which an HTTP header cannot carry.
    if not key:
        raise ValueError("api_key: found an empty key, expected at least one character; omit it to require no key")
    if not (key.isascii() and key.isprintable()):
        raise ValueError("api_key: found characters that an HTTP header cannot carry, expected printable ASCII")
    return key


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The limits of a service. Times are in seconds."""

    api_key: str | None = None
    """The key that clients must send; None for no key."""
    allowed_hosts: frozenset[str] | None = None
    """The host names that requests may use; None for any."""
    allowed_origins: frozenset[str] = frozenset()
    """Web pages that may send requests besides the server's own: host names, origins with their scheme, or `*` for any.

    Only origins with a scheme, and `*`, get the headers that browsers ask for (CORS).
    """
    max_body_bytes: int = 1_000_000
    max_answers: int = 144
    """Answers that are generated or wait at the same time."""
    pooling: Literal["mean", "cls", "last"] | None = None
    """How the vectors of an input's tokens become one vector; None is what the model's file says."""
    matryoshka: bool = False
    """Whether clients may cut embeddings to fewer dimensions."""
    adapter_folder: Path | None = None
    """The folder from which clients may load LoRA adapters; None if they may not."""
    bare_calls: bool = True
    """Whether an answer that is only a call in JSON, without the model's markers, is a tool call."""
    store_bytes: int = 64_000_000
    """Size of the responses that are kept for `previous_response_id`."""
    max_connections: int = 1024
    request_seconds: float = 600.0
    """From the last byte of a request to the end of its answer."""
    receive_seconds: float = 30.0
    """From the first byte of a request to its last."""
    stall_seconds: float = 30.0
    """How long a client may leave an answer unread."""
    drain_seconds: float = 30.0
    """How long running answers may continue after SIGTERM."""
