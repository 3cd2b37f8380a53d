"""`nybble serve`: serves a model to OpenAI's clients and on a chat page."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING

from nybble.cli import terminal
from nybble.cli.options import ModelArgument, load_model, takes_options
from nybble.load_options import LoadOptions
from nybble.server.options import ServeOptions

if TYPE_CHECKING:
    from nybble.model import ModelInfo

_PAGE_TOKENS = 64
"""Tokens of a page of the KV cache."""


@takes_options
def serve(options: ServeOptions, load: LoadOptions, source: ModelArgument = None) -> None:
    """Serve a model to OpenAI's clients at /v1, and a chat page at /.

    Without MODEL, it serves the default model, which is downloaded on first use.
    """
    try:
        from nybble.server import http_server
        from nybble.server.certificate import Certificate
        from nybble.server.service import Service
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("nybble"):
            raise
        raise ValueError(f"nybble serve needs {error.name}: pip install 'nybble[serve]'") from None
    from nybble.engine import Engine

    certificate = None
    if options.ssl_cert is not None and options.ssl_key is not None:
        certificate = Certificate(Path(options.ssl_cert), Path(options.ssl_key))
    # The address is bound before the model loads, which may take minutes, so that an address in use fails at once.
    with contextlib.ExitStack() as stack:
        if options.unix_socket is not None:
            listener = stack.enter_context(http_server.bind_unix(Path(options.unix_socket)))
        else:
            listener = stack.enter_context(http_server.bind(options.host, options.port))
        if options.api_key is None and not http_server.is_loopback(listener):
            terminal.note("nybble: anyone who can reach this address may use the model; --api-key restricts access")
        terminal.log_with_times("nybble.server", options.log_level)
        model = stack.enter_context(load_model(source, load, adapters=options.adapters()))
        if options.cache_bytes is not None:
            _check_cache(options.cache_bytes, model.info)
        draft = None if options.draft is None else stack.enter_context(load_model(options.draft, load))
        engine = Engine(model, options.engine(), draft=draft)
        allowed_hosts = http_server.allowed_hosts(listener, list(options.allow_host))
        settings = options.settings(context=model.info.context, allowed_hosts=allowed_hosts)
        name = options.name or source_name(source, model.info.file.name)
        service = Service(stack.enter_context(engine), name, settings)

        def ready(url: str) -> None:
            terminal.note(f"{name}\n  page  {url}\n  API   {url}/v1")

        http_server.serve(service, listener, ready, certificate)


def _check_cache(cache_bytes: int, info: ModelInfo) -> None:
    """Refuses a cache smaller than a page, and notes one that is smaller than the context."""
    # A model of recurrent layers alone takes nothing per token. A step computes its states in a second buffer.
    least = _PAGE_TOKENS * info.cache_bytes_per_token + 2 * info.state_bytes
    if cache_bytes < least:
        expected = f"at least {least / 1e9:.3g} for {_PAGE_TOKENS} tokens"
        raise ValueError(f"cache_gb: found {cache_bytes / 1e9:g}, expected {expected}")
    if cache_bytes < info.cache_bytes:
        tokens = (cache_bytes - info.state_bytes) // max(info.cache_bytes_per_token, 1)
        capacity = f"{tokens:,} tokens, less than the context of {info.context:,}"
        terminal.note(f"nybble: --cache-gb holds requests of up to {capacity}")


def source_name(source: str | None, file: str) -> str:
    """The default name of a model: that of its repository, or else that of its file."""
    is_repository = source is not None and source.count("/") == 1 and not source.startswith((".", "/", "~"))
    if source is not None and is_repository and not source.endswith(".gguf") and not Path(source).exists():
        return source
    # Clients receive the name as JSON, which has no characters for bytes that are not UTF-8.
    return os.fsencode(file).decode("utf-8", "replace").removesuffix(".gguf")
