"""The routes of the chat page."""

from __future__ import annotations

import base64
import hashlib
from dataclasses import dataclass
from pathlib import Path

from fastapi import FastAPI, Request, Response

from nybble.server.errors import ApiError

PREFIX = "/page/"
"""Beginning of the paths of all files but the page itself, which is `/`."""

_FOLDER = Path(__file__).parent

_TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
"""The types of the files that are sent, by suffix. Others stay in the package."""

POLICY = "; ".join(
    [
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        # Strings become markup only through the sanitizer's policy.
        "require-trusted-types-for 'script'",
        "trusted-types dompurify",
    ]
)
"""The page may load its own files and send requests to this server, and nothing else."""


@dataclass(frozen=True)
class PageFile:
    """A file of the page."""

    content: bytes
    media_type: str
    etag: str


def page_files() -> dict[str, PageFile]:
    """The files of the page, by their paths below the folder."""
    found = {}
    for path in sorted(_FOLDER.rglob("*")):
        if path.is_file() and (media_type := _TYPES.get(path.suffix)) is not None:
            content = path.read_bytes()
            digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).decode().rstrip("=")
            found[path.relative_to(_FOLDER).as_posix()] = PageFile(content, media_type, f'"{digest}"')
    return found


def add_page_routes(app: FastAPI) -> None:
    """Adds the page and its files, which are read once: a request can reach no other file."""
    files = page_files()

    def respond(request: Request, file: PageFile, policy: str) -> Response:
        headers = {
            # Browsers keep a copy, and ask whether it is current.
            "Cache-Control": "no-cache",
            "ETag": file.etag,
            "Content-Security-Policy": policy,
            "Referrer-Policy": "no-referrer",
            "Cross-Origin-Resource-Policy": "same-origin",
        }
        if file.etag in (
            each.strip().removeprefix("W/") for each in request.headers.get("if-none-match", "").split(",")
        ):
            return Response(status_code=304, headers=headers)
        return Response(file.content, headers=headers, media_type=file.media_type)

    @app.get("/", include_in_schema=False)
    async def index(request: Request) -> Response:
        return respond(request, files["index.html"], POLICY)

    @app.get(PREFIX + "{name:path}", include_in_schema=False)
    async def page_file(request: Request, name: str) -> Response:
        file = files.get(name)
        if file is None or name == "index.html":
            raise ApiError(404, f"the page has no file {name!r:.200}", code="not_found")
        return respond(request, file, "default-src 'none'")
