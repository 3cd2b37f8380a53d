"""The OpenAPI description: what it promises, random requests hold the server to."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import hypothesis
import pytest
import schemathesis
from schemathesis.specs.openapi import checks as openapi_checks
from serving import Running, serving

from nybble import Model
from nybble.engine import Engine

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
    with Engine(tiny_model) as engine, serving(engine) as server:
        yield server


@pytest.fixture
def described(running: Running) -> Any:
    return schemathesis.openapi.from_url(f"{running.url}/openapi.json")


schema = schemathesis.pytest.from_fixture("described")


@schema.parametrize()
@hypothesis.settings(max_examples=40)
def test_random_requests_find_no_fault_of_the_server(case: Any) -> None:
    case.call_and_validate(checks=CHECKS, timeout=60)
