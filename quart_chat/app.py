"""``create_app``: a whole chat server from configuration."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

from quart import Quart, Response, request
from quart_schema import hide

from .compat.hypercorn import bound_connections
from .config import merge_keywords
from .errors import NotFound
from .extension import QuartChat
from .transports.documents import DOCS, add_documents
from .transports.health import health_blueprint
from .transports.http import DISCARDED_BYTES, error_response, refusal, secured
from .transports.sse import sse_blueprint
from .transports.state import EXTENSION, current_state
from .transports.threads import threads_blueprint
from .transports.websocket import websocket_blueprint

MOUNT = "/chat"
VERSION = version("quart-chat")


def create_app(
    config: Mapping[str, Any] | None = None, chat: QuartChat | None = None, **keywords: Any
) -> Quart:
    """Make a Quart application that is a chat server, mounted at ``/chat``.

    Args:
        config: Keys with the prefix ``CHAT_``; they win over ``QUART_CHAT_…`` in the environment.
        chat: An extension that has tools, providers or an ``authenticate`` function of its own.
        keywords: Settings in lower case without the prefix (``on_busy="queue"``); they win.

    Raises:
        ConfigurationError: A key or value is invalid; the message names it.
    """
    app = Quart("quart_chat", static_folder=None)
    app.config.from_prefixed_env()
    app.config.update(merge_keywords(config, keywords))
    add_documents(app, VERSION, MOUNT)
    (chat or QuartChat()).init_app(app)
    settings = app.extensions[EXTENSION].settings
    # Quart keeps no more of a body that nobody reads.
    app.config["MAX_CONTENT_LENGTH"] = settings.max_message_bytes + DISCARDED_BYTES
    left_out = _left_out(app, settings.protocol)
    for blueprint in (websocket_blueprint, sse_blueprint, threads_blueprint):
        if blueprint is not left_out:
            app.register_blueprint(blueprint, url_prefix=MOUNT)
    app.register_blueprint(health_blueprint)
    _guard_the_rest(app)

    @app.before_serving
    async def bound() -> None:
        bound_connections()

    return app


def _left_out(app: Quart, protocol: str) -> Any:
    """Answer with 404 and the reason at the transport that the server leaves out."""
    if protocol == "both":
        return None
    error = NotFound(
        f"This server runs with --protocol {protocol}. "
        + (f"Connect a WebSocket to {MOUNT}." if protocol == "websocket" else f"Use {MOUNT}/sse.")
    )

    @hide
    async def left_out() -> Response:
        return secured(error_response(error))

    if protocol == "websocket":
        app.add_url_rule(f"{MOUNT}/sse", "left_out", left_out, methods=["GET", "POST"])
        return sse_blueprint
    app.add_url_rule(MOUNT, "left_out", left_out)
    app.add_websocket(MOUNT, "left_out_socket", left_out)
    return websocket_blueprint


def _guard_the_rest(app: Quart) -> None:
    """Apply the same checks, errors and headers to routes outside the blueprints."""

    @app.before_request
    async def check() -> None:
        if request.blueprint is None:
            current_state().guard.check_origin(request)

    @app.after_request
    async def finish(response: Response) -> Response:
        if request.path == DOCS:  # the page loads its scripts and styles from a CDN
            response.headers["Content-Security-Policy"] = "frame-ancestors 'none'"
        return secured(response)

    @app.errorhandler(Exception)
    async def refuse(error: Exception) -> Response:
        return await refusal(error, request)
