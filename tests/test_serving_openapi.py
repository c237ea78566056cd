"""Requests that are generated from /openapi.json, valid ones and others, get the answers that it tells of."""

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from policy_server import StubPolicy, running
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)


CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]


@pytest.fixture(scope="module")
def server():
    with running(StubPolicy()) as made:
        yield made


@pytest.fixture(scope="module")
def description(server):
    return httpx.get(f"{server.url}/openapi.json").json()


def test_every_route_is_described(description):
    assert set(description["paths"]) == {"/", "/act", "/reset", "/healthz", "/readyz", "/metrics", "/status"}


def test_the_examples_are_answered(server, description):
    examples = description["paths"]["/act"]["post"]["requestBody"]["content"]["application/json"]["examples"]
    for example in examples.values():
        assert httpx.post(f"{server.url}/act", json=example["value"]).status_code == 200


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE], ids=lambda mode: mode.value)
@pytest.mark.parametrize("path", ["/act", "/reset"])
def test_generated_requests(server, description, path, mode):
    operation = schemathesis.openapi.from_dict(description)[path]["POST"]

    @settings(max_examples=40, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(case=operation.as_strategy(mode))
    def check(case):
        response = case.call(base_url=server.url, timeout=10)
        case.validate_response(response, checks=CHECKS)

    check()
