"""Connection classes for Quart that fit what a chat needs."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import Awaitable, Callable, Iterable, Mapping
from functools import partial
from typing import Any, Protocol, cast
from urllib.parse import unquote

from quart import Quart, Websocket
from quart.asgi import ASGIHTTPConnection, ASGIWebsocketConnection
from werkzeug.exceptions import HTTPException, NotFound
from werkzeug.routing import BaseConverter, Rule

from ..compat.quart import (
    EndingConnection,
    LeavableConnection,
    has_converter,
    leavable_connection,
)
from ..core.commands import is_id
from .codec import Frame

WAITING_FRAMES = 2
"""Frames of one socket that were received and not yet handled; then the client has to wait."""

SLASH = "\x1f"
"""Stands for an encoded slash while the path is matched; ids hold no control characters."""

CONVERTER = "chat_id"

HAND_OFF = "quart_chat.hand_off"
"""The key in a socket's scope."""

EXTENSION = "quart_chat"
BLUEPRINTS = ".quart_chat_"
"""What the endpoints of our blueprints have in common."""

BODILESS = frozenset({"GET", "HEAD", "DELETE", "OPTIONS"})

GO_AWAY_SECONDS = 2.0


class IdConverter(BaseConverter):
    """An id in a path, with any character in it."""

    def to_python(self, value: str) -> str:
        decoded = value.replace(SLASH, "/")
        if not is_id(decoded):
            raise NotFound  # the HTTP exception, which routing understands
        return decoded

    def to_url(self, value: Any) -> str:
        return str(super().to_url(str(value))).replace("/", "%2F")


class Socket(Protocol):
    """An accepted socket: Quart's, or the server's own."""

    async def receive(self) -> Frame | None: ...

    async def send(self, data: Frame) -> None: ...

    async def close(self, code: int, reason: str) -> None: ...


Serve = Callable[[Socket], Awaitable[None]]


class Disconnected(Exception):
    """The client has disconnected."""


class ASGISocket:
    """The server's own socket; ``waiting`` are frames that have come already."""

    __slots__ = ("_receive", "_send", "_waiting", "closed")

    def __init__(self, waiting: Iterable[Frame], receive: Any, send: Any) -> None:
        self.closed = False
        self._waiting = iter(waiting)
        self._receive = receive
        self._send = send

    async def receive(self) -> Frame | None:
        """Return the next frame. Raises Disconnected."""
        for frame in self._waiting:
            return frame
        event = await self._receive()
        if event["type"] == "websocket.connect":  # Quart need not have taken it
            event = await self._receive()
        if event["type"] == "websocket.disconnect":
            self.closed = True
            raise Disconnected
        text: str | None = event.get("text")
        return event.get("bytes") if text is None else text

    async def send(self, data: Frame) -> None:
        """Send a frame."""
        kind = "text" if isinstance(data, str) else "bytes"
        await self._send({"type": "websocket.send", kind: data})

    async def close(self, code: int, reason: str) -> None:
        """Close the socket."""
        self.closed = True
        await self._send({"type": "websocket.close", "code": code, "reason": reason})


class _ChatConnection:
    """Quart connection whose socket the chat serves below Quart after the handler has returned.

    Quart keeps two tasks, a queue, a context and a request for every socket, and passes each frame
    through them; an idle socket is a third smaller without, and a token has a shorter way. So the
    chat's handler lets Quart route, run the host's hooks and authenticate, and goes on below it:
    see ``hand_off``. Every other socket of the application stays with Quart.
    """

    def __init__(self, plain: Callable[..., LeavableConnection], app: Quart, scope: Any) -> None:
        self._app = app
        self._serve: Serve | None = None
        self._quart = plain(app, {**scope, HAND_OFF: self._keep}, WAITING_FRAMES)

    def _keep(self, serve: Serve) -> None:
        self._serve = serve
        self._quart.leave_open()

    async def __call__(self, receive: Any, send: Any) -> None:
        await self._quart(receive, send)
        serve, waiting = self._serve, self._quart.waiting
        if serve is None or not self._quart.left_open:
            return
        del self._quart
        socket = ASGISocket(waiting.take_all(), receive, send)
        try:
            async with self._app.app_context():
                await serve(socket)
        except asyncio.CancelledError:  # the server ends, and has not asked the application
            await _go_away(socket)
            raise
        if not socket.closed:
            await socket.close(1000, "")


async def _go_away(socket: ASGISocket) -> None:
    if not socket.closed:
        with contextlib.suppress(Exception):
            async with asyncio.timeout(GO_AWAY_SECONDS):
                await socket.close(1001, "Server going away")


def hand_off(socket: Websocket) -> Callable[[Serve], None] | None:
    """Register how a socket is served after its handler has returned.

    None if the application has its own connection class.
    """
    scope: Mapping[str, Any] = cast("Any", socket.scope)
    return scope.get(HAND_OFF)


class ChatHTTPConnection(EndingConnection):
    """Quart's connection, with a bound for bodies that nobody reads and for slashes in ids.

    * Quart collects a body as it comes, before a handler asks for it. What is over the bound, and
      what a route of ours does not want, is dropped here.
    * Ids in our paths may hold a slash, sent as ``%2F``; ASGI's path has it decoded already.
    """

    def __init__(self, app: Quart, scope: Any) -> None:
        raw: bytes = scope.get("raw_path") or b""
        if b"%2f" in raw.lower() and b"%1f" not in raw.lower():
            path = unquote(raw.decode("latin-1").replace("%2F", SLASH).replace("%2f", SLASH))
            rule = _rule(app, path, scope["method"])
            if rule is not None and has_converter(rule, IdConverter, CONVERTER):
                scope = {**scope, "path": path}
        super().__init__(app, scope)

    async def __call__(self, receive: Any, send: Any) -> None:
        bound: int | None = None
        length = 0

        async def receive_within_bound() -> Any:
            nonlocal bound, length
            event = await receive()
            while bound is not None and length > bound and event["type"] == "http.request":
                event = await receive()
            if event["type"] != "http.request" or not event.get("body"):
                return event
            if bound is None:
                bound = _kept_bytes(self.app, self.scope)
            length += len(event["body"])
            if length > bound:  # Quart takes this for the end, and answers
                event = {**event, "body": event["body"] if bound else b"", "more_body": False}
            return event

        await super().__call__(receive_within_bound, send)


def _kept_bytes(app: Quart, scope: Any) -> int:
    """Return the bytes of a body that are kept until the handler asks for them."""
    rule = _rule(app, scope["path"], scope["method"])
    chat = app.extensions.get(EXTENSION)
    if rule is not None and BLUEPRINTS in f".{rule.endpoint}" and chat is not None:
        return 0 if scope["method"] in BODILESS else int(chat.settings.max_message_bytes)
    bound: int | None = app.config["MAX_CONTENT_LENGTH"]
    return sys.maxsize if bound is None else bound


def _rule(app: Quart, path: str, method: str) -> Rule | None:
    try:
        rule, _ = app.url_map.bind("localhost").match(path, method, return_rule=True)
    except HTTPException:
        return None
    return rule


def prepare(app: Quart) -> None:
    """Use these classes and the converter in an application that has not chosen its own."""
    app.url_map.converters[CONVERTER] = IdConverter
    if app.asgi_http_class is ASGIHTTPConnection:
        app.asgi_http_class = ChatHTTPConnection
    plain = leavable_connection()
    if app.asgi_websocket_class is ASGIWebsocketConnection and plain is not None:
        app.asgi_websocket_class = cast("Any", partial(_ChatConnection, plain))
