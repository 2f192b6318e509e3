"""Two places where Quart's own connection classes do not fit what a chat needs."""

from __future__ import annotations

import asyncio
from typing import Any
from urllib.parse import unquote

from quart import Quart
from quart.asgi import ASGIHTTPConnection, ASGIWebsocketConnection
from werkzeug.exceptions import HTTPException, NotFound
from werkzeug.routing import BaseConverter

from ..core.commands import is_id

WAITING_FRAMES = 16
"""Frames of one socket that were received and not yet handled; then the client has to wait."""

SLASH = "\x1f"
"""Stands for an encoded slash while the path is matched; ids hold no control characters."""

CONVERTER = "chat_id"


class IdConverter(BaseConverter):
    """An id in a path, with any character in it."""

    def to_python(self, value: str) -> str:
        found = value.replace(SLASH, "/")
        if not is_id(found):
            raise NotFound  # the HTTP exception, which routing understands
        return found

    def to_url(self, value: Any) -> str:
        return str(super().to_url(str(value))).replace("/", "%2F")


class BoundedWebsocketConnection(ASGIWebsocketConnection):
    """Holds back a client that sends faster than it is answered; Quart's own queue has no bound."""

    def __init__(self, app: Quart, scope: Any) -> None:
        super().__init__(app, scope)
        self.queue = asyncio.Queue(WAITING_FRAMES)


class EncodedSlashConnection(ASGIHTTPConnection):
    """Lets ids in our paths hold a slash, sent as ``%2F``; ASGI's path has it decoded already."""

    def __init__(self, app: Quart, scope: Any) -> None:
        raw: bytes = scope.get("raw_path") or b""
        if b"%2f" in raw.lower() and b"%1f" not in raw.lower():
            path = unquote(raw.decode("latin-1").replace("%2F", SLASH).replace("%2f", SLASH))
            if _is_ours(app, path, scope["method"]):
                scope = {**scope, "path": path}
        super().__init__(app, scope)


def _is_ours(app: Quart, path: str, method: str) -> bool:
    try:
        rule, _ = app.url_map.bind("localhost").match(path, method, return_rule=True)
    except HTTPException:
        return False
    return any(isinstance(each, IdConverter) for each in rule._converters.values())


def prepare(app: Quart) -> None:
    """Use these classes and the converter in an application that has not chosen its own."""
    app.url_map.converters[CONVERTER] = IdConverter
    if app.asgi_http_class is ASGIHTTPConnection:
        app.asgi_http_class = EncodedSlashConnection
    if app.asgi_websocket_class is ASGIWebsocketConnection:
        app.asgi_websocket_class = BoundedWebsocketConnection
