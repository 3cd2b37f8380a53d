"""An app that is made before its workers are forked, as `gunicorn --preload` does."""

from __future__ import annotations

import http.client
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from nybble import Model

SCRIPT = """
    import os, socket, sys, warnings
    import uvicorn
    from fastapi.testclient import TestClient
    from nybble import Engine, Model
    from nybble.server import Service, create_app

    warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of any fork with threads.
    app = create_app(Service(Engine(Model.load(sys.argv[1], threads=2)), "tiny"))
    if sys.argv[2] == "used":
        with TestClient(app, base_url="http://localhost") as client:
            answer = client.post("/v1/completions", json={"prompt": "he", "max_tokens": 3})
            assert answer.status_code == 200, answer.text
    for _ in range(2):
        listener = socket.create_server(("127.0.0.1", 0))
        if os.fork() == 0:
            sys.stdin.close()
            uvicorn.Server(uvicorn.Config(app, log_level="error")).run(sockets=[listener])
            os._exit(0)
        print(listener.getsockname()[1], flush=True)
        listener.close()
    sys.stdin.read()
    os.killpg(0, 15)
"""
"""Serves one app in two forked processes until standard input ends."""


def _post(port: int, path: str, body: object) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    try:
        connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    finally:
        connection.close()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
@pytest.mark.parametrize("before", ["unused", "used"])
def test_an_app_made_before_a_fork_answers_in_each_worker(before: str, tiny_file: Path, tiny_model: Model) -> None:
    expected = tiny_model.generate("he", max_tokens=3, temperature=0).text
    command = [sys.executable, "-c", textwrap.dedent(SCRIPT), str(tiny_file), before]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True, text=True
    ) as parent:
        assert parent.stdin is not None
        assert parent.stdout is not None
        try:
            ports = [int(parent.stdout.readline()) for _ in range(2)]
            for port in ports * 2:
                status, text = _post(port, "/v1/completions", {"prompt": "he", "max_tokens": 3, "temperature": 0})
                assert status == 200, text
                assert json.loads(text)["choices"][0]["text"] == expected
                status, text = _post(port, "/v1/embeddings", {"input": "he"})
                assert status == 200, text
        finally:
            parent.stdin.close()
