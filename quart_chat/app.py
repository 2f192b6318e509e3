"""``create_app``: a whole chat server from configuration."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

from quart import Quart, Response, request
from quart_schema import Info, QuartSchema

from .extension import QuartChat
from .transports.health import health_blueprint
from .transports.server import EXTENSION, as_chat_error, error_response, secured
from .transports.sse import sse_blueprint
from .transports.threads import threads_blueprint
from .transports.websocket import websocket_blueprint

MOUNT = "/chat"
DOCS = "/docs"


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
    app.config["MAX_CONTENT_LENGTH"] = None  # ours says which bound was broken
    QuartSchema(
        app,
        info=Info(title="quart_chat", version=version("quart-chat")),
        redoc_ui_path=None,
        scalar_ui_path=None,
    )
    (chat or QuartChat()).init_app(app)
    protocol = app.extensions[EXTENSION].settings.protocol
    if protocol in ("websocket", "both"):
        app.register_blueprint(websocket_blueprint, url_prefix=MOUNT)
    if protocol in ("sse", "both"):
        app.register_blueprint(sse_blueprint, url_prefix=f"{MOUNT}/sse")
    app.register_blueprint(threads_blueprint, url_prefix=MOUNT)
    app.register_blueprint(health_blueprint)

    @app.after_request
    async def finish(response: Response) -> Response:
        if request.path == DOCS:  # the page loads its scripts and styles from a CDN
            response.headers["Content-Security-Policy"] = "frame-ancestors 'none'"
        return secured(response)

    @app.errorhandler(Exception)
    async def refuse(error: Exception) -> Response:
        return error_response(as_chat_error(error))

    return app
