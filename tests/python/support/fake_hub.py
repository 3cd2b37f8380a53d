"""A Hugging Face Hub on this machine, with the few endpoints that its client uses for a download."""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import json
import threading
import urllib.parse
from dataclasses import dataclass, field


@dataclass
class FakeHub:
    """Serves `repositories` (name to file name to bytes). `requests` records requests as "GET /path"."""

    repositories: dict[str, dict[str, bytes]] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    requests: list[str] = field(default_factory=list)
    broken: bool = False
    tampered: int = 0
    """The number of next files that are sent with a wrong last byte."""
    stall_after: int | None = None
    """Bytes after which a download stops until `stalled` is set."""
    stalling: threading.Event = field(default_factory=threading.Event)
    stalled: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        hub = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                hub._answer(self, body=True)

            def do_HEAD(self) -> None:
                hub._answer(self, body=False)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        host, port = self._server.server_address[:2]
        return f"http://{host!s}:{port}"

    def reset(self) -> None:
        self.repositories.clear()
        self.gated.clear()
        self.requests.clear()
        self.broken = False
        self.tampered = 0
        self.stall_after = None
        self.stalling.clear()
        self.stalled.set()
        self.stalled = threading.Event()

    @staticmethod
    def commit(repository: str) -> str:
        """The one commit of a repository."""
        return hashlib.sha1(repository.encode()).hexdigest()

    def _answer(self, request: http.server.BaseHTTPRequestHandler, body: bool) -> None:
        path = urllib.parse.unquote(urllib.parse.urlsplit(request.path).path)
        self.requests.append(f"{request.command} {path}")
        if self.broken:
            return self._send(request, 503, b"", body)
        parts = path.strip("/").split("/")
        is_api = parts[:2] == ["api", "models"]
        if is_api:
            parts = parts[2:]
        repository, rest = "/".join(parts[:2]), parts[2:]
        files = self.repositories.get(repository)
        if repository in self.gated and not is_api:  # Anyone may list the files, but not download them.
            return self._send(request, 403, b"", body, {"X-Error-Code": "GatedRepo"})
        if files is None:
            return self._send(request, 401, b"", body, {"X-Error-Code": "RepoNotFound"})
        commit = self.commit(repository)
        if len(rest) > 1 and rest[1] not in ("main", commit):
            return self._send(request, 404, b"", body, {"X-Error-Code": "RevisionNotFound"})
        if is_api and rest[:1] == ["tree"]:
            listing = [
                {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for name, data in files.items()
            ]
            return self._send(request, 200, json.dumps(listing).encode(), body)
        if is_api:
            siblings = [self._sibling(name, data) for name, data in files.items()]
            info = {"id": repository, "sha": commit, "siblings": siblings}
            return self._send(request, 200, json.dumps(info).encode(), body)
        data = files.get("/".join(rest[2:]))
        if data is None:
            return self._send(request, 404, b"", body, {"X-Error-Code": "EntryNotFound"})
        headers = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": commit}
        if body and self.tampered:
            self.tampered -= 1
            data = data[:-1] + bytes([data[-1] ^ 1])
        start = int(request.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")[0])
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        return self._send(request, 206 if start else 200, data[start:], body, headers)

    @staticmethod
    def _sibling(name: str, data: bytes) -> dict[str, object]:
        """The Hub's description of a file, with the hash for large files."""
        sibling: dict[str, object] = {"rfilename": name, "size": len(data)}
        if name.endswith((".gguf", ".safetensors")):
            sibling["lfs"] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest(), "pointerSize": 130}
        return sibling

    def _send(
        self,
        request: http.server.BaseHTTPRequestHandler,
        status: int,
        data: bytes,
        body: bool,
        headers: dict[str, str] | None = None,
    ) -> None:
        request.send_response(status)
        request.send_header("Content-Length", str(len(data)))
        for name, value in (headers or {}).items():
            request.send_header(name, value)
        request.end_headers()
        if body:
            first = data if self.stall_after is None else data[: self.stall_after]
            request.wfile.write(first)
            if len(first) < len(data):
                self.stalling.set()
                self.stalled.wait(120)
                with contextlib.suppress(OSError):  # The client may have disconnected.
                    request.wfile.write(data[len(first) :])
