"""The OpenAPI description and the documentation match the server, which random requests verify."""

from __future__ import annotations

import contextlib
import re
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import requests
import schemathesis
from drawn import Drawn
from pydantic import BaseModel
from schemathesis import GenerationMode
from schemathesis.specs.openapi import checks as openapi_checks
from serving import Running, served

from nybble import Model
from nybble.cli import main
from nybble.server.protocols.anthropic.schema import MessagesRequest
from nybble.server.protocols.chat_schema import ChatRequest
from nybble.server.protocols.completions.adapter import CompletionRequest
from nybble.server.protocols.embeddings import EmbeddingRequest
from nybble.server.protocols.reasoning import Reasoned
from nybble.server.protocols.responses.schema import ResponsesRequest
from nybble.server.protocols.schema import Sampler

CHECKS: list[Any] = [
    schemathesis.checks.not_a_server_error,
    openapi_checks.status_code_conformance,
    openapi_checks.content_type_conformance,
    openapi_checks.response_schema_conformance,
    openapi_checks.negative_data_rejection,
    openapi_checks.unsupported_method,
]


@pytest.fixture(scope="module")
def running(tiny_model: Model) -> Iterator[Running]:
    with served(tiny_model) as server:
        yield server


@pytest.fixture(scope="module")
def session() -> Iterator[requests.Session]:
    """Connections of all requests. Without it, each request makes its own, which takes longer than the request."""
    with requests.Session() as session:
        yield session


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
def test_random_requests_match_the_openapi_description(
    running: Running, session: requests.Session, mode: GenerationMode, pytestconfig: pytest.Config
) -> None:
    url = f"{running.url}/openapi.json"
    schema = schemathesis.openapi.from_url(url)
    # A string that is longer than the description allows may make the whole body too large.
    refused = schema.config.checks.negative_data_rejection
    refused.expected_statuses = [*refused.expected_statuses, "413"]
    drawn = Drawn(pytestconfig.cache, session.get(url, timeout=60).text, mode.value)
    tried = []
    for found in schema.get_all_operations():
        operation = found.ok()  # type: ignore[union-attr]
        before = drawn.cases(operation)
        for case in before or []:
            send(case, session)
        if before is None:
            drawn.begin(operation)

            @hypothesis.given(case=operation.as_strategy(generation_mode=mode))
            @hypothesis.settings(max_examples=50, suppress_health_check=list(hypothesis.HealthCheck))
            def holds(case: Any) -> None:
                drawn.add(case)
                send(case, session)

            # A route without parameters has no invalid requests.
            with contextlib.suppress(hypothesis.errors.Unsatisfiable):
                holds()
        if drawn.cases(operation):
            tried.append(operation.path)
    assert {"/v1/chat/completions", "/v1/responses", "/v1/messages", "/v1/responses/{response_id}"} <= {*tried}
    drawn.save()


def send(case: Any, session: requests.Session) -> None:
    case.call_and_validate(session=session, checks=CHECKS, timeout=60)


DOCUMENT = (Path(__file__).parents[3] / "docs/serving.md").read_text(encoding="utf-8")


def test_the_documentation_names_all_parameters() -> None:
    found = re.findall(r"^\| ((?:both|chat|completions|embeddings)[^|]*) \| (.*) \|$", DOCUMENT, re.MULTILINE)
    named: dict[str, set[str]] = {}
    for what, row in found:
        named.setdefault(what.partition(",")[0], set()).update(re.findall(r"`([a-z_]+)`", row))
    both = named["both"] | {"model", "stream_options"}
    assert both | named["chat"] == set(ChatRequest.model_fields)
    assert both | named["completions"] == set(CompletionRequest.model_fields)
    assert named["embeddings"] | {"model", "user"} == set(EmbeddingRequest.model_fields)


@pytest.mark.parametrize(("section", "request_type"), [("Responses", ResponsesRequest), ("Messages", MessagesRequest)])
def test_the_documentation_names_the_parameters_of_other_protocols(section: str, request_type: type[BaseModel]) -> None:
    text = DOCUMENT.split(f"\n## {section}\n")[1].split("\n## ")[0]
    shared = {*Sampler.model_fields, *Reasoned.model_fields, "model", "stream", "stream_options"}
    own = {
        name
        for name, field in request_type.model_fields.items()
        if name not in shared and not (field.description or "").startswith("Ignored")
    }
    assert own - set(re.findall(r"`([a-z_]+)", text)) == set()


def test_the_documentation_names_only_existing_options(capsys: pytest.CaptureFixture[str]) -> None:
    main(["serve", "--help"])
    known = set(re.findall(r"--[a-z-]+", capsys.readouterr().out))
    named = set(re.findall(r"`(--[a-z-]+)", DOCUMENT))
    assert {"--api-key", "--timeout"} <= named - {"--group"} <= known


def test_the_documentation_names_only_existing_metrics(running: Running) -> None:
    with urllib.request.urlopen(running.url + "/metrics") as answer:
        text = answer.read().decode()
    section = DOCUMENT.split("## Metrics")[1].split("##")[0]
    for name in re.findall(r"`(\w+)`", section):
        assert f"# TYPE {name if name.startswith('nybble_') else f'nybble_{name}_total'} " in text
