"""`nybble serve`: serves a model to OpenAI's clients and on a chat page."""

from __future__ import annotations

import contextlib
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
        from nybble.server.service import Service
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("nybble"):
            raise
        raise ValueError(f"nybble serve needs {error.name}: pip install 'nybble[serve]'") from None
    from nybble.engine import Engine

    # The address is bound before the model loads, which may take minutes, so that an address in use fails at once.
    with http_server.bind(options.host, options.port) as listener, contextlib.ExitStack() as stack:
        if options.api_key is None and not http_server.is_loopback(listener):
            terminal.note("nybble: anyone who can reach this address may use the model; --api-key restricts access")
        model = stack.enter_context(load_model(source, load))
        if options.cache_bytes is not None:
            _check_cache(options.cache_bytes, model.info)
        engine = Engine(
            model,
            max_batch=options.max_batch,
            max_queue=options.max_queue,
            cache_bytes=options.cache_bytes,
            speculation=options.speculation,
            draft=None if options.draft is None else stack.enter_context(load_model(options.draft, load)),
        )
        allowed_hosts = http_server.allowed_hosts(listener, list(options.allow_host))
        settings = options.settings(context=model.info.context, allowed_hosts=allowed_hosts)
        name = options.name or source_name(source, model.info.file.name)
        service = Service(stack.enter_context(engine), name, settings)
        http_server.serve(service, listener, lambda url: terminal.note(f"{name}\n  page  {url}\n  API   {url}/v1"))


def _check_cache(cache_bytes: int, info: ModelInfo) -> None:
    """Refuses a cache smaller than a page, and notes one that is smaller than the context."""
    tokens = cache_bytes // info.cache_bytes_per_token
    if tokens < _PAGE_TOKENS:
        least = f"{_PAGE_TOKENS * info.cache_bytes_per_token / 1e9:.3g}"
        raise ValueError(f"cache_gb: found {cache_bytes / 1e9:g}, expected at least {least} for {_PAGE_TOKENS} tokens")
    if cache_bytes < info.cache_bytes:
        capacity = f"{tokens:,} tokens, less than the context of {info.context:,}"
        terminal.note(f"nybble: --cache-gb holds requests of up to {capacity}")


def source_name(source: str | None, file: str) -> str:
    """The default name of a model: that of its repository, or else that of its file."""
    is_repository = source is not None and source.count("/") == 1 and not source.startswith((".", "/", "~"))
    if source is not None and is_repository and not source.endswith(".gguf") and not Path(source).exists():
        return source
    return file.removesuffix(".gguf")
