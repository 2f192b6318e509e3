"""Quart, with Werkzeug: sockets that a handler may leave, unread bodies, routes.

Checked against Quart 0.20 to 0.23 and Werkzeug 3.

Hooks: ``app.asgi_websocket_class`` gets a subclass of ``ASGIWebsocketConnection``. Its
``handle_messages`` and ``handle_websocket`` are overridden. In Quart 0.22 the frames that wait are
in the connection's ``queue``; from 0.23 on they are in the ``_queue`` of the websocket's
``buffer``, and ``handle_messages`` gets the websocket and its task. The class is chosen by that
signature. If neither form is there, Quart's own class stays, and the chat serves its sockets
through it.

``app.asgi_http_class`` gets a subclass of ``ASGIHTTPConnection`` that only wraps what ASGI defines.
From Quart 0.23 on, a handler that cancels itself leaves the connection open: ``handle_request`` and
``handle_messages`` are overridden to end it.

``Rule._converters`` of Werkzeug names the converters of a route; without it the route's own text is
searched.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from quart import Quart
from quart.asgi import ASGIHTTPConnection, ASGIWebsocketConnection
from quart.wrappers import Websocket
from werkzeug.routing import BaseConverter, Rule

from .version import Checked, missing_names, other_parameters, parameters, warn_once

QUART = Checked("quart", "0.20", "0.24")
WERKZEUG = Checked("werkzeug", "3.0", "4")

Frame = str | bytes

QUEUE_FORM = ("receive",)
BUFFER_FORM = ("websocket", "receive", "websocket_task")
PLAIN = "Quart serves the chat's sockets in its plain way, which takes more memory for each."


def quart_problem() -> str | None:
    """Return a sentence if Quart's connection classes are not as expected, else None."""
    sockets = ASGIWebsocketConnection
    differences = [
        *other_parameters(sockets, "__init__", ("app", "scope")),
        *other_parameters(sockets, "__call__", ("receive", "send")),
        *other_parameters(sockets, "handle_messages", QUEUE_FORM, BUFFER_FORM),
        *other_parameters(sockets, "handle_websocket", ("websocket", "send")),
        *other_parameters(sockets, "_create_websocket_from_scope", ("send",)),
    ]
    if not differences and parameters(sockets.handle_messages) == BUFFER_FORM:
        buffer = getattr(Websocket, "buffer_class", None)
        differences += ["Websocket has no buffer_class"] if buffer is None else []
        if buffer is not None:
            differences += missing_names(buffer(), ("_queue", "put", "get", "disconnect"))
    return QUART.problem(differences)


def werkzeug_problem() -> str | None:
    """Return a sentence if Werkzeug's rules do not name their converters, else None."""
    rule = Rule("/")
    return WERKZEUG.problem(missing_names(rule, ("_converters",)))


def has_converter(rule: Rule, kind: type[BaseConverter], name: str) -> bool:
    """Return whether a route has a converter of a kind, registered under a name."""
    converters = getattr(rule, "_converters", None)
    if converters is None:
        return f"<{name}:" in rule.rule
    return any(isinstance(each, kind) for each in converters.values())


class WaitingFrames(asyncio.Queue[Frame]):
    """A queue that loses nothing when whoever puts is cancelled."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self._late: list[Frame] = []

    async def put(self, item: Frame) -> None:
        """Put a frame, and keep it if there is no time left to wait for room."""
        try:
            await super().put(item)
        except asyncio.CancelledError:
            self._late.append(item)
            raise

    def take_all(self) -> list[Frame]:
        """Take all that nobody has received."""
        return [*(self.get_nowait() for _ in range(self.qsize())), *self._late]


class LeavableConnection(ASGIWebsocketConnection):
    """Quart's connection of a socket, whose handler may return and leave the socket open.

    A subclass calls ``leave_open`` while the handler runs. When ``__call__`` returns and
    ``left_open`` is true, the socket is still open, and ``waiting`` has the frames that the handler
    has not received. Its queue has a bound, which holds back a client that sends faster than it is
    answered.
    """

    waiting: WaitingFrames

    def __init__(self, app: Quart, scope: Any, size: int) -> None:
        super().__init__(app, scope)
        self.waiting = WaitingFrames(size)
        self._leaves = False
        self._client_left = False

    def leave_open(self) -> None:
        """Keep Quart from closing the socket when the handler returns."""
        self._leaves = True

    @property
    def left_open(self) -> bool:
        """Return whether the handler has returned and left the socket open."""
        return self._leaves and not self._client_left

    async def handle_websocket(self, websocket: Websocket, send: Any) -> None:
        """Run the handler."""

        async def unless_left_open(event: Any) -> None:
            if not self._leaves:
                await send(event)

        await super().handle_websocket(websocket, unless_left_open)


class QueueConnection(LeavableConnection):
    """Up to Quart 0.22."""

    def __init__(self, app: Quart, scope: Any, size: int) -> None:
        super().__init__(app, scope, size)
        self.queue = self.waiting

    async def handle_messages(self, *arguments: Any) -> None:
        """Take frames until the client leaves."""
        await super().handle_messages(*arguments)
        self._client_left = True


class BufferConnection(LeavableConnection):
    """From Quart 0.23 on."""

    _left = False
    _reading: asyncio.Task[Any] | None = None

    def _create_websocket_from_scope(self, send: Any) -> Websocket:
        websocket = super()._create_websocket_from_scope(send)
        websocket.buffer._queue = self.waiting  # type: ignore[attr-defined, unused-ignore]
        return websocket

    async def handle_messages(self, *arguments: Any) -> None:
        """Take frames until the client leaves, or the handler leaves the socket open."""
        if self._left:  # before this task had its first step
            return
        self._reading = asyncio.current_task()
        await super().handle_messages(*arguments)
        self._client_left = True

    async def handle_websocket(self, websocket: Websocket, send: Any) -> None:
        """Run the handler."""
        await super().handle_websocket(websocket, send)
        self._left = self._leaves
        if self._left and self._reading is not None:
            self._reading.cancel()  # the task group would wait for the client to leave


class EndingConnection(ASGIHTTPConnection):
    """An HTTP connection that ends with its handler, however that ends."""

    _cancelled = False
    _reading: asyncio.Task[Any] | None = None

    async def handle_messages(self, *arguments: Any) -> None:
        """Take the body until the client leaves."""
        if self._cancelled:
            return
        self._reading = asyncio.current_task()
        await super().handle_messages(*arguments)

    async def handle_request(self, request: Any, send: Any) -> None:
        """Run the handler and send its answer."""
        try:
            await super().handle_request(request, send)
        except asyncio.CancelledError:
            self._cancelled = True
            if self._reading is not None:
                self._reading.cancel()
            raise


def leavable_connection() -> Callable[..., LeavableConnection] | None:
    """Return the class that fits the installed Quart, or None if Quart's own has to do."""
    problem = quart_problem()
    if problem is not None:
        warn_once(problem, PLAIN)
        return None
    form = parameters(ASGIWebsocketConnection.handle_messages)
    return QueueConnection if form == QUEUE_FORM else BufferConnection
