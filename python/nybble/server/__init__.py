"""An HTTP server for one model or several: OpenAI's API and a chat page. Needs `nybble[serve]`.

`nybble serve` runs it; `create_app` makes an ASGI application. A request passes these modules:

1. `middleware` checks the API key and the host, and reads the body.
2. `pool` chooses the model, and loads it if needed.
3. `protocols` validates the body and translates it to a `generation.GenerationRequest`.
4. `generation` runs it on the engine and reports `events`.
5. `delivery` sends the answers in the format of the protocol, as a whole or as a stream.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nybble.server.app import create_app
    from nybble.server.http_server import serve
    from nybble.server.options import ServeOptions, Settings
    from nybble.server.service import Service

__all__ = ["ServeOptions", "Service", "Settings", "create_app", "serve"]

_MODULES = {
    "ServeOptions": "options",
    "Service": "service",
    "Settings": "options",
    "create_app": "app",
    "serve": "http_server",
}


def __getattr__(name: str) -> Any:
    """Imports a name on first use (PEP 562): `nybble serve --help` needs no web framework."""
    if (module := _MODULES.get(name)) is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = globals()[name] = getattr(import_module(f"nybble.server.{module}"), name)
    return value
