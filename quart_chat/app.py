"""``create_app``: a whole chat server from configuration."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

from quart import Quart, Response, jsonify, request
from quart_schema import Info, QuartSchema, hide
from quart_schema.openapi import OpenAPIProvider

from .extension import QuartChat
from .transports.asyncapi import asyncapi, event_schemas
from .transports.health import health_blueprint
from .transports.sse import sse_blueprint
from .transports.state import EXTENSION, as_chat_error, error_response, secured
from .transports.threads import threads_blueprint
from .transports.websocket import websocket_blueprint

MOUNT = "/chat"
DOCS = "/docs"
VERSION = version("quart-chat")


NO_CONTENT = (
    ("/threads/{thread_id}", "delete", "The thread is gone"),
    ("/threads/{thread_id}/messages/{message_id}/feedback", "put", "The feedback is stored"),
)
NOTHING_MORE = {"description": "There is nothing (more) to follow"}


class ChatOpenAPI(OpenAPIProvider):
    """Shows the streams as what they are, with a schema for every event."""

    def schema(self) -> dict[str, Any]:
        document = super().schema()
        schemas = document["components"]["schemas"]
        events = {f"event.{kind}": schema for kind, schema in event_schemas(schemas).items()}
        schemas.update(events)
        one_of = [{"$ref": f"#/components/schemas/{name}"} for name in events]
        for method, operation in document["paths"].get(f"{MOUNT}/sse", {}).items():
            answers = {str(status): told for status, told in operation["responses"].items()}
            answers["200"]["content"] = {"text/event-stream": {"schema": {"oneOf": one_of}}}
            if method == "get":
                operation["responses"][204] = NOTHING_MORE
        for path, method, says in NO_CONTENT:
            if (operation := document["paths"].get(f"{MOUNT}{path}", {}).get(method)) is not None:
                operation["responses"].pop(200, None)
                operation["responses"][204] = {"description": says}
        return document


def create_app(config: Mapping[str, Any] | None = None, chat: QuartChat | None = None) -> Quart:
    """Make a Quart application that is a chat server, mounted at ``/chat``.

    Args:
        config: Keys with the prefix ``CHAT_``; they win over ``QUART_CHAT_…`` in the environment.
        chat: An extension that has tools, providers or an ``authenticate`` function of its own.

    Raises:
        ConfigurationError: A key or value is wrong; the sentence names it.
    """
    app = Quart("quart_chat", static_folder=None)
    app.config.from_prefixed_env()
    app.config.update(config or {})
    QuartSchema(
        app,
        info=Info(title="quart_chat", version=VERSION),
        openapi_provider_class=ChatOpenAPI,
        redoc_ui_path=None,
        scalar_ui_path=None,
    )
    (chat or QuartChat()).init_app(app)
    settings = app.extensions[EXTENSION].settings
    app.config["MAX_CONTENT_LENGTH"] = 2 * settings.max_message_bytes  # ours refuses it earlier
    protocol = settings.protocol
    if protocol in ("websocket", "both"):
        app.register_blueprint(websocket_blueprint, url_prefix=MOUNT)
    if protocol in ("sse", "both"):
        app.register_blueprint(sse_blueprint, url_prefix=f"{MOUNT}/sse")
    app.register_blueprint(threads_blueprint, url_prefix=MOUNT)
    app.register_blueprint(health_blueprint)

    @app.get("/asyncapi.json")
    @hide
    async def async_api() -> Response:
        found: Response = jsonify(asyncapi(VERSION, MOUNT))
        return found

    @app.after_request
    async def finish(response: Response) -> Response:
        if request.path == DOCS:  # the page loads its scripts and styles from a CDN
            response.headers["Content-Security-Policy"] = "frame-ancestors 'none'"
        return secured(response)

    @app.errorhandler(Exception)
    async def refuse(error: Exception) -> Response:
        return error_response(as_chat_error(error))

    return app
