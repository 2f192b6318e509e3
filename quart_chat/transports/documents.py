"""``/openapi.json``, ``/asyncapi.json`` and ``/docs``, made once."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from typing import Any

from quart import Quart, Response, request
from quart_schema import Info, QuartSchema, hide
from quart_schema.openapi import OpenAPIProvider, Server

from .asyncapi import asyncapi, event_schemas

OPENAPI = "/openapi.json"
ASYNCAPI = "/asyncapi.json"
DOCS = "/docs"

CACHE_SECONDS = 3600
NO_CONTENT = {
    "deleteThread": "The thread is gone",
    "approveToolCall": "The answer was taken",
    "sendToolResult": "The result was taken",
    "setFeedback": "The feedback is stored",
}
PUBLIC = frozenset({"getHealth", "getReady"})
TAGS = {
    "stream": "Messages in, events out",
    "threads": "Conversations",
    "messages": "What a conversation holds",
    "runs": "Answers that are being made",
    "models": "What may answer",
    "server": "The process",
}


class ChatOpenAPI(OpenAPIProvider):
    """OpenAPI schema provider that describes streams as events."""

    def schema(self) -> dict[str, Any]:
        """Return the document."""
        document = super().schema()
        schemas = document["components"]["schemas"]
        events = {f"event.{kind}": schema for kind, schema in event_schemas(schemas).items()}
        schemas.update(events)
        one_of = [{"$ref": f"#/components/schemas/{name}"} for name in events]
        for operations in document["paths"].values():
            for operation in operations.values():
                _complete(operation, one_of)
        document["tags"] = [{"name": name, "description": what} for name, what in TAGS.items()]
        return document

    def operation_id(self, method: str, path: str, func: Callable[..., Any]) -> str | None:
        """Return the name that was given by hand, without the method before it."""
        return getattr(func, "_quart_schema_operation_id", None) or super().operation_id(
            method, path, func
        )


def _complete(operation: dict[str, Any], one_of: list[dict[str, str]]) -> None:
    name, responses = operation.get("operationId"), operation["responses"]
    if name in ("sendMessage", "followRun"):
        stream = {"text/event-stream": {"schema": {"oneOf": one_of}}}
        responses[200] = {**responses[200], "content": stream}
        operation["responses"] = {**responses, 204: {"description": "Nothing (more) to follow"}}
    elif name in NO_CONTENT:
        left = {status: response for status, response in responses.items() if status != 200}
        operation["responses"] = {**left, 204: {"description": NO_CONTENT[name]}}
    if name in PUBLIC:
        operation["security"] = []


def add_documents(app: Quart, version: str, mount: str) -> None:
    """Serve the documents of an application, which are made at their first use."""
    schema = QuartSchema(
        app,
        info=Info(title="quart_chat", version=version),
        servers=[Server(url="/")],
        security_schemes={
            "bearer": {"type": "http", "scheme": "bearer", "bearer_format": "JWT"},
        },
        security=[{}, {"bearer": []}],
        openapi_provider_class=ChatOpenAPI,
        redoc_ui_path=None,
        scalar_ui_path=None,
    )
    openapi = Document(lambda: schema.openapi_provider.schema())
    app.view_functions["openapi"] = openapi.respond
    app.add_url_rule(ASYNCAPI, "asyncapi", Document(lambda: asyncapi(version, mount)).respond)


class Document:
    """A JSON document that does not change while the process runs."""

    def __init__(self, make: Callable[[], dict[str, Any]]) -> None:
        self._make = make
        self._made: tuple[bytes, str] | None = None

    @hide
    async def respond(self) -> Response:
        """Return the document, or 304 to a client that has it."""
        if self._made is None:
            body = json.dumps(self._make(), sort_keys=True, separators=(",", ":")).encode()
            self._made = (body, hashlib.sha256(body).hexdigest()[:32])
        body, tag = self._made
        if tag in request.if_none_match:
            response = Response("", 304)
        else:
            response = Response(body, content_type="application/json")
        response.set_etag(tag)
        response.headers["Cache-Control"] = f"public, max-age={CACHE_SECONDS}"
        return response
