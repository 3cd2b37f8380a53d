"""`nybble serve`: a model for OpenAI's clients, and a page to talk to it."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from nybble.cli import terminal
from nybble.cli.options import LoadOptions, takes_options

if TYPE_CHECKING:
    from nybble.model import ModelInfo

_PAGE = 64
"""Tokens whose keys and values are kept together."""


@takes_options
def serve(
    load: LoadOptions,
    source: Annotated[
        str | None,
        typer.Argument(metavar="MODEL", help="A GGUF file, a folder or a Hub repository.", show_default=False),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for the whole network.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 for any that is free.")] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option(
            envvar="NYBBLE_API_KEY",
            help="What clients must know. Other users see it in the list of processes; "
            "the environment variable is better.",
            show_default=False,
        ),
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="What clients call the model; the name of its file or repository if not given.")
    ] = None,
    max_batch: Annotated[int, typer.Option(min=1, max=1024, help="Answers that are written at the same time.")] = 16,
    max_queue: Annotated[int, typer.Option(min=0, help="Answers that may wait; more are refused.")] = 128,
    cache_gb: Annotated[
        float | None, typer.Option("--cache-gb", min=0, help="Memory for keys and values, in GB.", show_default=False)
    ] = None,
    speculation: Annotated[
        Literal["off", "on", "auto"], typer.Option(help="Guess tokens from what the text repeats; same texts, faster.")
    ] = "off",
    draft: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="A smaller model of the same vocabulary to guess with.", show_default=False),
    ] = None,
    pooling: Annotated[
        Literal["mean", "last"], typer.Option(help="How embeddings are made; the card of a model for them tells.")
    ] = "mean",
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds that an answer may take.")] = 600,
    drain: Annotated[float, typer.Option(min=0, help="Seconds that running answers have after SIGTERM.")] = 30,
    max_body_mb: Annotated[
        float | None,
        typer.Option(
            "--max-body-mb",
            min=0.001,
            help="The largest request, in MB; 16 bytes a token of the context and 1 MB at least if not given.",
        ),
    ] = None,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="A name besides localhost that requests may be addressed to."),
    ] = None,
) -> None:
    """Serve a model to OpenAI's clients at /v1, and to people at /.

    Without MODEL, the default model is used and fetched if needed.
    """
    try:
        from nybble import server
        from nybble.server import run
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("nybble"):
            raise
        raise ValueError(f"the server needs {error.name}, which is not here: pip install 'nybble[serve]'") from None
    from nybble.engine import Engine

    if api_key is not None:
        api_key = api_key.strip()  # Files and copies end with line breaks, and headers with none.
        if not api_key:
            raise typer.BadParameter("api_key: found an empty one; leave it out to let everyone in")
        if not (api_key.isascii() and api_key.isprintable()):
            raise typer.BadParameter("api_key: found letters that no header can hold, expected printable ASCII")
    # Before the model is loaded, which may take minutes: an address that cannot be had should be known at once.
    with run.bind(host, port) as listener, contextlib.ExitStack() as stack:
        if api_key is None and not run.is_loopback(listener):
            terminal.note("nybble: whoever reaches this address may use the model; --api-key changes that")
        model = stack.enter_context(load.load(source))
        cache_bytes = None if cache_gb is None else int(cache_gb * 1e9)
        if cache_bytes is not None:
            _check_cache(cache_bytes, model.info)
        engine = Engine(
            model,
            max_batch=max_batch,
            max_queue=max_queue,
            cache_bytes=cache_bytes,
            speculation=speculation,
            draft=None if draft is None else stack.enter_context(load.load(draft)),
        )
        settings = server.Settings(
            api_key=api_key,
            allowed_hosts=run.allowed_hosts(listener, allow_host or []),
            max_body_bytes=max(16 * model.info.context, 1_000_000) if max_body_mb is None else int(max_body_mb * 1e6),
            max_answers=max_batch + max_queue,
            pooling=pooling,
            request_seconds=timeout,
            drain_seconds=drain,
        )
        known = name or source_name(source, model.info.file.name)
        service = server.Service(stack.enter_context(engine), known, settings)
        run.serve(service, listener, lambda url: terminal.note(f"{known}\n  page  {url}\n  API   {url}/v1"))


def _check_cache(cache_bytes: int, info: ModelInfo) -> None:
    """Refuses memory in which no text has room, and tells where some have none."""
    fit = cache_bytes // info.cache_bytes_per_token
    if fit < _PAGE:
        least = f"{_PAGE * info.cache_bytes_per_token / 1e9:.3g}"
        raise ValueError(f"cache_gb: found {cache_bytes / 1e9:g}, expected at least {least} for keys and values")
    if cache_bytes < info.cache_bytes:
        room = f"{fit:,} tokens, fewer than the context of {info.context:,}"
        terminal.note(f"nybble: --cache-gb has room for texts of {room}")


def source_name(source: str | None, file: str) -> str:
    """What a model is called if nobody says: a repository by its name, anything else by its file's."""
    is_repository = source is not None and source.count("/") == 1 and not source.startswith((".", "/", "~"))
    if source is not None and is_repository and not source.endswith(".gguf") and not Path(source).exists():
        return source
    return file.removesuffix(".gguf")
