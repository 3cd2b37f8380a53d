"""`nybble serve`: serves models to OpenAI's clients and on a chat page."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nybble.cli import guide, terminal
from nybble.cli.options import load_model, takes_options
from nybble.load_options import LoadOptions
from nybble.server.options import ServeOptions, check_cache_dir, check_certificate
from nybble.server.pool.spec import source_name

if TYPE_CHECKING:
    import socket

    from nybble.engine import Engine
    from nybble.model import Model, ModelInfo
    from nybble.server.pool.pool import Pool
    from nybble.server.pool.spec import ModelSpec
    from nybble.server.service import Service

ModelsArgument = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[MODEL]...",
        help="GGUF files, folders or Hub repositories.",
        show_default=False,
        autocompletion=guide.models,
    ),
]
"""The models of the command; None for the default model."""


@takes_options
def serve(command: typer.Context, options: ServeOptions, load: LoadOptions, sources: ModelsArgument = None) -> None:
    """Serve models to the clients of OpenAI, Anthropic and Ollama, and a chat page at /.

    Without MODEL, it serves the default model, which is downloaded on first use. Several models are loaded when
    requests ask for them, and unloaded when others need the memory.
    """
    try:
        from nybble.server import http_server
        from nybble.server.certificate import Certificate
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("nybble"):
            raise
        raise ValueError(f"nybble serve needs {error.name}: pip install 'nybble[serve]'") from None

    specs: list[ModelSpec] | None = None
    if len(sources or ()) > 1 or options.loads_on_demand:
        options, specs = _several(command, sources or [], options, load)
    try:
        check_certificate(options)
        check_cache_dir([options] if specs is None else [options, *(spec.options for spec in specs)])
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
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
        served: Service | Pool
        if specs is None:
            served = _one(stack, sources[0] if sources else None, options, load, listener)
            title = served.name
        else:
            from nybble.server.pool.sources import new_pool

            terminal.show_log()
            served = new_pool(specs, options, http_server.allowed_hosts(listener, list(options.allow_host)))
            stack.callback(served.close)
            title = "\n".join(spec.name for spec in specs)

        def ready(url: str) -> None:
            terminal.note(f"{title}\n  page  {url}\n  API   {url}/v1")

        http_server.serve(served, listener, ready, certificate)


def _one(
    stack: contextlib.ExitStack,
    source: str | None,
    options: ServeOptions,
    load: LoadOptions,
    listener: socket.socket,
) -> Service:
    """Loads the only model, which `stack` closes."""
    from nybble.engine import Engine
    from nybble.server import http_server
    from nybble.server.service import Service

    draft = None if options.draft is None else stack.enter_context(load_model(options.draft, load.for_draft()))
    engine: Engine
    if options.stages is not None:
        engine = stack.enter_context(_pipeline(source, options, load, draft))
    else:
        model = stack.enter_context(load_model(source, load, adapters=options.adapters()))
        engine = stack.enter_context(Engine(model, options.engine(), draft=draft))
    model = engine.model
    if options.cache_bytes is not None:
        _check_cache(options.cache_bytes, model.info)
    allowed_hosts = http_server.allowed_hosts(listener, list(options.allow_host))
    settings = options.settings(context=model.info.context, allowed_hosts=allowed_hosts)
    name = options.name or source_name(source, model.info.file.name)
    return Service(engine, name, settings)


def _pipeline(source: str | None, options: ServeOptions, load: LoadOptions, draft: Model | None) -> Engine:
    """Starts the stages of a model, on this machine or on a Ray cluster, and an engine over them."""
    chosen, stages = options.engine(), options.stages or 1
    if options.ray is None:
        from nybble import pipeline

        return pipeline.processes(source, stages=stages, load=load, options=chosen, draft=draft)
    from nybble.integrations import ray

    threads = load.threads or 1
    return ray.pipeline(
        source, stages=stages, threads=threads, address=options.ray, load=load, options=chosen, draft=draft
    )


def _several(
    command: typer.Context, sources: Sequence[str], options: ServeOptions, load: LoadOptions
) -> tuple[ServeOptions, list[ModelSpec]]:
    """The options with those of the configuration file, and the models of the command line, the file and the folder."""
    from nybble.server.pool.config import configured_models, read_config, with_config
    from nybble.server.pool.sources import models_in, named_models

    specs = []
    config = None
    if options.config is not None:
        config = read_config(Path(options.config))
        options, load = with_config(
            config, options, load, [name for name in command.params if _is_given(command, name)]
        )
    has_others = bool(options.models_dir or (config is not None and config.models))
    if sources or not has_others or options.name or options.adapter:
        specs += named_models(sources if has_others else sources or [None], options, load)
    if config is not None:
        specs += configured_models(config, options, load)
    if options.models_dir is not None:
        specs += models_in(Path(options.models_dir), options, load)
    return options, specs


def _is_given(command: typer.Context, name: str) -> bool:
    """Whether the command line or the environment sets an option."""
    source = command.get_parameter_source(name)
    return source is not None and source.name != "DEFAULT"


def _check_cache(cache_bytes: int, info: ModelInfo) -> None:
    """Refuses a cache smaller than a page, and notes one that is smaller than the context."""
    from nybble.server.pool.needs import check_cache_bytes

    check_cache_bytes(cache_bytes, info)
    if cache_bytes < info.cache_bytes:
        tokens = (cache_bytes - info.state_bytes) // max(info.cache_bytes_per_token, 1)
        capacity = f"{tokens:,} tokens, less than the context of {info.context:,}"
        terminal.note(f"nybble: --cache-gb holds requests of up to {capacity}")
