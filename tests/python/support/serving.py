"""A server in a thread of this process, on a free port."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any, cast

from nybble import Model, SamplingOptions
from nybble.engine import Engine, Piece
from nybble.server import Service, Settings, http_server

TOOL_TEMPLATE = (
    "{% if tools %}<|im_start|>system\n{% for t in tools %}{{ t | tojson }}\n{% endfor %}"
    "Write <tool_call>JSON</tool_call>.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclasses.dataclass
class Running:
    """A running server."""

    url: str
    service: Service

    @property
    def address(self) -> tuple[str, int]:
        host, port = self.url.removeprefix("http://").split(":")
        return host, int(port)

    def wait(self, condition: Callable[[], bool]) -> None:
        """Waits until the condition holds."""
        wait(condition)

    @contextlib.contextmanager
    def connection(self) -> Iterator[socket.socket]:
        """A raw connection."""
        with socket.create_connection(self.address, timeout=60) as connection:
            yield connection

    def post(self, path: str, body: dict[str, Any], headers: str = "") -> bytes:
        """The bytes of a request."""
        text = json.dumps(body)
        head = f"POST {path} HTTP/1.1\r\nHost: {self.url[7:]}\r\nContent-Type: application/json\r\n{headers}"
        return f"{head}Content-Length: {len(text)}\r\n\r\n{text}".encode()


def wait(condition: Callable[[], bool]) -> None:
    """Waits until the condition holds, at most a minute."""
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "the condition did not hold in time"
        time.sleep(0.005)


@contextlib.contextmanager
def serving(engine: Engine, **settings: Any) -> Iterator[Running]:
    """Serves an engine under the name "tiny"."""
    listener = http_server.bind("127.0.0.1", 0)
    hosts = http_server.allowed_hosts(listener, [])
    service = Service(engine, "tiny", Settings(**{"allowed_hosts": hosts, **settings}))
    found: list[str] = []
    server = http_server.make_server(service, found.append)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        wait(lambda: bool(found) or not thread.is_alive())
        yield Running(found[0], service)
    finally:
        server.should_exit = True
        service.stop()
        thread.join()
        listener.close()


class Scripted:
    """An engine that gives scripted answers, one character per token."""

    def __init__(self, model: Model, answers: Sequence[str]) -> None:
        self.model = model
        self.answers = list(answers)
        self.prompts: list[str] = []
        self.options: list[SamplingOptions] = []

    def submit(self, prompt: Sequence[int], options: SamplingOptions) -> Any:
        self.prompts.append(b"".join(map(self.model.tokenizer.token_bytes, prompt)).decode())
        self.options.append(options)
        return _ScriptedRequest(self.answers.pop(0))

    def stats(self) -> Any:
        return SimpleNamespace()


class _ScriptedRequest:
    def __init__(self, text: str) -> None:
        self._text = text
        usage = SimpleNamespace(prompt_tokens=1, completion_tokens=len(text), cached_tokens=0)
        self.completion = SimpleNamespace(text=text, finish_reason="stop", usage=usage, logprobs=None)

    async def __aiter__(self) -> AsyncIterator[Piece]:
        for char in self._text:
            yield Piece(text=char, tokens=(ord(char),), logprobs=None)

    def cancel(self) -> None:
        pass


def scripted(model: Model, *answers: str) -> tuple[Engine, Scripted]:
    """A scripted engine, typed as an engine and as itself."""
    engine = Scripted(model, answers)
    return cast("Engine", engine), engine
