"""The OpenAPI document: valid, complete, and true of the server that serves it."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from conftest import Server, client, post
from jsonschema import Draft202012Validator, ValidationError
from openapi_spec_validator import OpenAPIV31SpecValidator, validate

ROUTES = {
    ("get", "/chat/threads"),
    ("post", "/chat/threads"),
    ("get", "/chat/threads/{thread_id}"),
    ("patch", "/chat/threads/{thread_id}"),
    ("delete", "/chat/threads/{thread_id}"),
    ("get", "/chat/threads/{thread_id}/messages"),
    ("post", "/chat/threads/{thread_id}/stop"),
    ("put", "/chat/threads/{thread_id}/messages/{message_id}/feedback"),
    ("get", "/chat/models"),
    ("post", "/chat/sse"),
    ("get", "/chat/sse"),
}


@pytest.fixture(scope="module")
async def document(server: Server) -> dict[str, Any]:
    async with client(server) as http:
        response = await http.get("/openapi.json")
    assert response.status_code == 200
    found: dict[str, Any] = response.json()
    return found


async def test_the_document_is_valid(document: dict[str, Any]) -> None:
    validate(document)
    assert document["openapi"].startswith("3.1")
    assert not list(OpenAPIV31SpecValidator(document).iter_errors())


async def test_every_route_is_described(document: dict[str, Any]) -> None:
    described = {
        (method, path): operation
        for path, operations in document["paths"].items()
        for method, operation in operations.items()
    }
    assert set(described) >= ROUTES
    for (method, path), operation in described.items():
        assert operation.get("summary"), (method, path)
        if (method, path) in ROUTES:
            named = {p["name"] for p in operation["parameters"] if p["in"] == "path"}
            assert named == {part[1:-1] for part in path.split("/") if part.startswith("{")}
            assert {"401", "422", "500"} <= set(operation["responses"]), (method, path)


async def test_queries_bodies_and_answers_are_described(document: dict[str, Any]) -> None:
    paths = document["paths"]
    for path, names in {
        "/chat/threads": {"limit", "cursor", "q"},
        "/chat/threads/{thread_id}/messages": {"limit", "cursor", "order", "branch"},
        "/chat/sse": {"thread_id", "run_id", "last_event_id", "token"},
    }.items():
        parameters = paths[path]["get"]["parameters"]
        assert {p["name"] for p in parameters if p["in"] == "query"} == names
    for method, path in (
        ("post", "/chat/threads"),
        ("patch", "/chat/threads/{thread_id}"),
        ("put", "/chat/threads/{thread_id}/messages/{message_id}/feedback"),
        ("post", "/chat/sse"),
    ):
        assert "application/json" in paths[path][method]["requestBody"]["content"]
    for method, path, status in (
        ("post", "/chat/threads", "201"),
        ("get", "/chat/threads", "200"),
        ("delete", "/chat/threads/{thread_id}", "204"),
        ("put", "/chat/threads/{thread_id}/messages/{message_id}/feedback", "204"),
    ):
        assert status in paths[path][method]["responses"], (method, path)
    assert "200" not in paths["/chat/threads/{thread_id}"]["delete"]["responses"]


async def test_the_stream_is_described_as_events(document: dict[str, Any]) -> None:
    for method in ("get", "post"):
        content = document["paths"]["/chat/sse"][method]["responses"]["200"]["content"]
        assert set(content) == {"text/event-stream"}
    assert "204" in document["paths"]["/chat/sse"]["get"]["responses"]


async def test_the_pages_for_people_are_there(server: Server) -> None:
    async with client(server) as http:
        page = await http.get("/docs")
    assert page.status_code == 200
    assert page.headers["content-type"].startswith("text/html")


@pytest.mark.timeout(120)
async def test_made_up_requests_are_answered_as_the_document_says(server: Server) -> None:
    """Nothing that schemathesis makes of the document breaks the server."""
    await asyncio.to_thread(_make_up_requests, server.url)


def _make_up_requests(url: str) -> None:
    import schemathesis
    from hypothesis import HealthCheck, Phase, given, settings
    from schemathesis.checks import not_a_server_error
    from schemathesis.specs.openapi.checks import (
        content_type_conformance,
        response_schema_conformance,
        status_code_conformance,
    )

    checks = [
        not_a_server_error,
        status_code_conformance,
        content_type_conformance,
        response_schema_conformance,
    ]
    failures: list[str] = []

    def ask(operation: Any) -> None:
        # A stream's schema is that of its events; the next test holds them against it.
        wanted = checks[: 3 if operation.path == "/chat/sse" else 4]

        @settings(
            max_examples=12,
            deadline=None,
            database=None,
            derandomize=True,
            phases=[Phase.explicit, Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(case=operation.as_strategy())
        def one(case: Any) -> None:
            case.call_and_validate(checks=wanted, timeout=20)

        one()

    for found in schemathesis.openapi.from_url(f"{url}/openapi.json").get_all_operations():
        operation = found.ok()
        try:
            ask(operation)
        except (Exception, BaseExceptionGroup) as error:
            failures.append(f"{operation.label}: {error}")
    assert not failures, "\n\n".join(failures)


async def test_events_are_as_the_document_says(server: Server, document: dict[str, Any]) -> None:
    schema = document["paths"]["/chat/sse"]["post"]["responses"]["200"]["content"]
    event = {**schema["text/event-stream"]["schema"], "components": document["components"]}
    validator = Draft202012Validator(event)
    events = [
        *await post(server, {"content": "hi"}),
        *await post(server, {"content": "script:reasoning"}),
        *await post(server, {"content": "script:broken"}),
    ]
    assert {each["type"] for each in events} >= {"start", "content", "reasoning", "error", "end"}
    for each in events:
        validator.validate(each)
    with pytest.raises(ValidationError):
        validator.validate({"type": "nothing"})
