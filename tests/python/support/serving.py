"""A server in a thread of this process, on a free port."""

from __future__ import annotations

import contextlib
import dataclasses
import http.client
import json
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from nybble import LoadOptions, Model, SamplingOptions
from nybble.chat.reasoning import reasoning_format
from nybble.chat.reasoning_splitter import Specials, Splitter, new_splitter
from nybble.engine import Engine, Piece
from nybble.generation import Usage
from nybble.server import ServeOptions, Service, Settings, http_server
from nybble.server.pool.entry import Entry
from nybble.server.pool.pool import Pool
from nybble.server.pool.sources import new_pool
from nybble.server.pool.spec import ModelSpec

TOOL_TEMPLATE = (
    "{% if tools %}<|im_start|>system\n{% for t in tools %}{{ t | tojson }}\n{% endfor %}"
    "Write <tool_call>JSON</tool_call>.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

REASONING_TEMPLATE = (
    "{% if tools %}<|im_start|>system\n{% for t in tools %}{{ t | tojson }}\n{% endfor %}"
    "Write <tool_call>JSON</tool_call>.<|im_end|>\n{% endif %}"
    "{% if reasoning_effort %}<|im_start|>system\nEffort: {{ reasoning_effort }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.reasoning_content %}<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% else %}<think>\n{% endif %}"
    "{% endif %}"
)
"""Opens the reasoning in the prompt, and writes that of earlier answers."""


@dataclasses.dataclass(frozen=True)
class Reply:
    """The answer to a request."""

    status: int
    headers: dict[str, str]
    """By name in lower case."""
    text: str

    @property
    def json(self) -> Any:
        """The body, parsed."""
        return json.loads(self.text)

    @property
    def choice(self) -> Any:
        """The first choice of a successful answer."""
        assert self.status == 200, f"{self.status}: {self.text}"
        return self.json["choices"][0]

    @property
    def calls(self) -> list[tuple[str, Any]]:
        """The name and the arguments of each tool call of the first choice."""
        found = self.choice["message"].get("tool_calls") or []
        return [(call["function"]["name"], json.loads(call["function"]["arguments"])) for call in found]

    @property
    def error(self) -> str:
        """The message of an error."""
        assert self.status >= 400, f"{self.status}: {self.text}"
        return str(self.json["error"]["message"])

    @property
    def events(self) -> list[Any]:
        """The parsed server-sent events of a stream, without the last one, "[DONE]"."""
        assert self.status == 200, self.text
        lines = [line.removeprefix("data: ") for line in self.text.splitlines() if line.startswith("data: ")]
        return [json.loads(line) for line in lines if line != "[DONE]"]


@dataclasses.dataclass
class Client:
    """A client of a running server."""

    url: str

    @property
    def address(self) -> tuple[str, int]:
        host, port = self.url.removeprefix("http://").split(":")
        return host, int(port)

    def request(self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> Reply:
        """Sends one request: `body` as it is if it is bytes, otherwise as JSON."""
        connection = http.client.HTTPConnection(*self.address, timeout=60)
        try:
            data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
            kind = {} if data is None or isinstance(body, bytes) else {"Content-Type": "application/json"}
            connection.request(method, path, data, {**kind, **(headers or {})})
            response = connection.getresponse()
            named = {name.lower(): value for name, value in response.getheaders()}
            return Reply(response.status, named, response.read().decode())
        finally:
            connection.close()

    def chat(self, messages: Any = None, **parameters: Any) -> Reply:
        """Asks for a short greedy answer to a conversation."""
        turns = messages or [{"role": "user", "content": "Hi"}]
        body = {"messages": turns, "max_tokens": 4, "temperature": 0, **parameters}
        return self.request("POST", "/v1/chat/completions", body)

    def complete(self, **parameters: Any) -> Reply:
        """Asks for a short greedy completion."""
        return self.request(
            "POST", "/v1/completions", {"prompt": "he", "max_tokens": 3, "temperature": 0, **parameters}
        )

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


@dataclasses.dataclass
class Running(Client):
    """A running server of one model."""

    service: Service


@dataclasses.dataclass
class RunningPool(Client):
    """A running server of several models."""

    pool: Pool

    def entry(self, name: str) -> Entry:
        """A model."""
        return self.pool.names.find(name)

    def loaded(self) -> list[str]:
        """The names of the models that are loaded."""
        return [entry.name for entry in self.pool.entries if entry.state == "loaded"]


def wait(condition: Callable[[], bool]) -> None:
    """Waits until the condition holds, at most a minute."""
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "the condition did not hold in time"
        time.sleep(0.005)


@contextlib.contextmanager
def serving(engine: Engine, **settings: Any) -> Iterator[Running]:
    """Serves an engine under the name "tiny"."""
    with http_server.bind("127.0.0.1", 0) as listener:
        hosts = http_server.allowed_hosts(listener, [])
        service = Service(engine, "tiny", Settings(**{"allowed_hosts": hosts, **settings}))
        with _in_thread(Pool.of(service), listener) as url:
            yield Running(url, service)


@contextlib.contextmanager
def serving_several(specs: Sequence[ModelSpec], **options: Any) -> Iterator[RunningPool]:
    """Serves models that are loaded on demand."""
    with http_server.bind("127.0.0.1", 0) as listener:
        pool = new_pool(specs, ServeOptions(**options), http_server.allowed_hosts(listener, []))
        with contextlib.closing(pool), _in_thread(pool, listener) as url:
            yield RunningPool(url, pool)


def spec(name: str, source: str | Path, **changes: Any) -> ModelSpec:
    """A model to serve with one thread. `changes` are fields of `ModelSpec`, and options of `ServeOptions`."""
    fields = {each.name for each in dataclasses.fields(ModelSpec)}
    options = ServeOptions(**{key: value for key, value in changes.items() if key not in fields})
    own = {key: value for key, value in changes.items() if key in fields}
    return ModelSpec(**{"name": name, "source": str(source), "load": LoadOptions(threads=1), "options": options, **own})


@contextlib.contextmanager
def _in_thread(pool: Pool, listener: socket.socket) -> Iterator[str]:
    """Runs a server in a thread during the block. Yields its URL."""
    found: list[str] = []
    server = http_server.make_server(pool, found.append)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        wait(lambda: bool(found) or not thread.is_alive())
        yield found[0]
    finally:
        server.should_exit = True
        pool.stop()
        thread.join()


@contextlib.contextmanager
def served(model: Model, max_batch: int = 16, **settings: Any) -> Iterator[Running]:
    """Serves a model under the name "tiny"."""
    with Engine(model, max_batch=max_batch) as engine, serving(engine, **settings) as running:
        yield running


class Scripted:
    """An engine that gives scripted answers, one character per token."""

    def __init__(self, model: Model, answers: Sequence[str]) -> None:
        self.model = model
        self.answers = list(answers)
        self.prompts: list[str] = []
        self.options: list[SamplingOptions] = []

    def submit(self, prompt: Sequence[int], options: SamplingOptions, *, separate_reasoning: bool = False) -> Any:
        tokenizer = self.model.tokenizer
        self.prompts.append(b"".join(map(tokenizer.token_bytes, prompt)).decode())
        self.options.append(options)
        known = reasoning_format(tokenizer) if separate_reasoning else None
        splitter = None if known is None else new_splitter(known, self.prompts[-1], Specials())
        return _ScriptedRequest(self.answers.pop(0), splitter)

    def stats(self) -> Any:
        return SimpleNamespace()


class _ScriptedRequest:
    def __init__(self, text: str, splitter: Splitter | None) -> None:
        self._text = text
        self._splitter = splitter
        self.completion = SimpleNamespace(
            text=text,
            finish_reason="stop",
            usage=Usage(1, len(text)),
            logprobs=None,
            stop_string=None,
            reasoning_tokens=0,
        )

    async def __aiter__(self) -> AsyncIterator[Piece]:
        for char in self._text:
            if self._splitter is None:
                yield Piece(text=char, tokens=(ord(char),))
            elif parts := self._splitter.push(char):
                yield Piece(text="", tokens=(ord(char),), parts=tuple(parts))
        if self._splitter is not None and (parts := self._splitter.finish()):
            yield Piece(text="", tokens=(), parts=tuple(parts))

    def cancel(self) -> None:
        pass


def scripted(model: Model, *answers: str) -> tuple[Engine, Scripted]:
    """A scripted engine, typed as an engine and as itself."""
    engine = Scripted(model, answers)
    return cast("Engine", engine), engine
