"""schemathesis reads the server's own OpenAPI and asks what it allows, and what it does not.

Its plugin for pytest is left out: it follows pytest's private names, which change.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import positive_data_acceptance

from server_helpers import MODEL, FakeEngine, Served, serving

# What is in the vocabulary, how long the context is, and which fields go together no schema can say.
EXCLUDED = [positive_data_acceptance]
OPERATIONS = [
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/completions"),
    ("GET", "/v1/models"),
    ("POST", "/tokenize"),
    ("POST", "/detokenize"),
    ("GET", "/health"),
    ("GET", "/metrics"),
    ("GET", "/version"),
]


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving(FakeEngine("hello")) as served:
        yield served


@pytest.fixture(scope="module")
def schema(served: Served) -> Any:
    return schemathesis.openapi.from_url(f"{served.url}/openapi.json")


@pytest.mark.parametrize(
    ("method", "path", "mode"),
    [
        (method, path, mode)
        for method, path in OPERATIONS
        for mode in GenerationMode
        if method == "POST" or mode is GenerationMode.POSITIVE  # else there is nothing that could be wrong
    ],
)
def test_every_operation_keeps_its_promises(served: Served, schema: Any, method: str, path: str, mode: GenerationMode):
    """Statuses and bodies are those of the schema, and nothing is a failure of the server."""
    operation = schema[path][method]

    @seed(20261125)
    @settings(
        max_examples=40 if method == "POST" else 3,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def ask(case: Any) -> None:
        if mode is GenerationMode.POSITIVE and method == "POST":
            case.body["model"] = MODEL
        response = case.call()
        assert response.status_code < 500, (case.body, response.text)
        if response.status_code != 413:  # as good a refusal, though schemathesis does not know it
            case.validate_response(response, excluded_checks=EXCLUDED)

    ask()
    assert served.answers()


def test_the_schema_has_every_route_of_the_api(served: Served):
    paths = served.client.get("/openapi.json").json()["paths"]

    assert {(method.upper(), path) for path, methods in paths.items() for method in methods} == set(OPERATIONS)
