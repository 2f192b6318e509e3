"""Places where Quart's own connection classes do not fit what a chat needs."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any, Protocol, cast
from urllib.parse import unquote

from quart import Quart, Websocket
from quart.asgi import ASGIHTTPConnection, ASGIWebsocketConnection
from werkzeug.exceptions import HTTPException, NotFound
from werkzeug.routing import BaseConverter

from ..core.commands import is_id
from .codec import Frame

WAITING_FRAMES = 16
"""Frames of one socket that were received and not yet handled; then the client has to wait."""

SLASH = "\x1f"
"""Stands for an encoded slash while the path is matched; ids hold no control characters."""

CONVERTER = "chat_id"

HAND_OFF = "quart_chat.keeper"
"""The key in a socket's scope."""


class IdConverter(BaseConverter):
    """An id in a path, with any character in it."""

    def to_python(self, value: str) -> str:
        found = value.replace(SLASH, "/")
        if not is_id(found):
            raise NotFound  # the HTTP exception, which routing understands
        return found

    def to_url(self, value: Any) -> str:
        return str(super().to_url(str(value))).replace("/", "%2F")


class Socket(Protocol):
    """An accepted socket: Quart's, or the server's own."""

    async def receive(self) -> Frame | None: ...

    async def send(self, data: Frame) -> None: ...

    async def close(self, code: int, reason: str) -> None: ...


Serve = Callable[[Socket], Awaitable[None]]


class Disconnected(Exception):
    """The client has gone."""


class ASGISocket:
    """The server's own socket; ``waiting`` are frames that have come already."""

    __slots__ = ("_receive", "_send", "_waiting", "closed")

    def __init__(self, waiting: Iterable[Frame], receive: Any, send: Any) -> None:
        self.closed = False
        self._waiting = iter(waiting)
        self._receive = receive
        self._send = send

    async def receive(self) -> Frame | None:
        """The next frame. Raises Disconnected."""
        for frame in self._waiting:
            return frame
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


class ChatWebsocketConnection(ASGIWebsocketConnection):
    """Quart's connection, which a handler may leave for the server's own socket.

    Quart keeps two tasks, a queue, a context and a request for every socket, and passes each frame
    through them; an idle socket is a third smaller without, and a token has a shorter way. So the
    chat's handler lets Quart route, run the host's hooks and authenticate, and goes on below it:
    see ``keeper``. Every other socket of the application stays with Quart. Its queue has a bound
    here, which holds back a client that sends faster than it is answered.
    """

    def __init__(self, app: Quart, scope: Any) -> None:
        super().__init__(app, cast("Any", {**scope, HAND_OFF: self._keep}))
        self.queue: Frames = Frames(WAITING_FRAMES)
        self._gone = False
        self._serve: Serve | None = None

    def _keep(self, serve: Serve) -> None:
        self._serve = serve

    async def __call__(self, receive: Any, send: Any) -> None:
        await super().__call__(receive, send)
        if self._serve is None or self._gone:
            return
        wire = ASGISocket(self.queue.left(), receive, send)
        del self.queue, self.scope
        async with self.app.app_context():
            await self._serve(wire)
        if not wire.closed:
            await wire.close(1000, "")

    async def handle_messages(self, receive: Any) -> None:
        await super().handle_messages(receive)
        self._gone = True

    async def handle_websocket(self, websocket: Websocket, send: Any) -> None:
        async def unless_handed_off(event: Any) -> None:
            if self._serve is None:
                await send(event)

        await super().handle_websocket(websocket, unless_handed_off)


class Frames(asyncio.Queue[Frame]):
    """A queue that loses nothing when who puts is cancelled."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self._late: list[Frame] = []

    async def put(self, item: Frame) -> None:
        try:
            await super().put(item)
        except asyncio.CancelledError:
            self._late.append(item)
            raise

    def left(self) -> list[Frame]:
        """Take all that nobody got."""
        return [*(self.get_nowait() for _ in range(self.qsize())), *self._late]


def hand_off(socket: Websocket) -> Callable[[Serve], None] | None:
    """Lets a handler say how its socket is served once it has returned.

    None where the application has a connection class of its own.
    """
    scope: Mapping[str, Any] = cast("Any", socket.scope)
    return scope.get(HAND_OFF)


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
        app.asgi_websocket_class = ChatWebsocketConnection
