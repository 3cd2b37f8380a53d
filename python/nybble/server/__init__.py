"""The server: one model for OpenAI's clients and for people, by `nybble serve` or `create_app`. Needs `nybble[serve]`.

A request goes through `guard` (who may ask, and how much), `requests` (is it well formed?), `chat` or `completions`
(what is meant), `generation` (the engine, watched for clients that leave) and back through `responses`.
"""

from nybble.server.app import create_app
from nybble.server.run import serve
from nybble.server.service import Service, Settings

__all__ = ["Service", "Settings", "create_app", "serve"]
