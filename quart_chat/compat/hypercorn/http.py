"""HTTP/1.1 and nothing else, with a time for a request's head and one for its body.

Hypercorn also accepts HTTP/2 in clear text (``h2c``, ``PRI``), hands targets to the application
that are no paths, and lets a head or a body take any time.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from typing import Any, cast
from urllib.parse import urlsplit

import h11
from hypercorn.events import Closed, Event, RawData
from hypercorn.protocol.events import Request
from hypercorn.protocol.h11 import STREAM_ID, H11Protocol, H11WSConnection
from hypercorn.protocol.http_stream import HTTPStream
from hypercorn.typing import ASGISendEvent

from .config import body_timeout
from .websocket import BoundedWebSocket, EndsWithApp

PIECE_BYTES = 32 * 1024

ANSWER_SECONDS = 2.0
"""The application has its own limit for a body; its answer is better than a cut."""


class BoundedHTTP(EndsWithApp, HTTPStream):
    """A request and its answer."""

    app_put: Any = None

    async def app_send(self, message: ASGISendEvent | None) -> None:
        """Take a part of the answer; None if the application has returned."""
        if message is None:
            self.forget_messages()
        elif message["type"] == "http.response.body" and len(message["body"]) > PIECE_BYTES:
            await self._send_pieces(message["body"])
            message = {**message, "body": b""}
        await super().app_send(message)

    async def _send_pieces(self, body: bytes) -> None:
        """Send a long body without copying all of it into the frames of HTTP."""
        for start in range(0, len(body), PIECE_BYTES):
            piece = body[start : start + PIECE_BYTES]
            event: Any = {"type": "http.response.body", "body": piece, "more_body": True}
            await super().app_send(event)


class Ended(Exception):
    """Signal that the connection has ended and reads nothing more."""


class Readable:
    """Event that allows reading to continue; it ends with the connection."""

    def __init__(self) -> None:
        self._event = asyncio.Event()
        self.ended = False

    async def clear(self) -> None:
        self._event.clear()

    async def set(self) -> None:
        self._event.set()

    def is_set(self) -> bool:
        return self._event.is_set()

    async def wait(self) -> None:
        """Wait for ``set``. Raises Ended."""
        if not self.ended:
            await self._event.wait()
        if self.ended:
            raise Ended

    def end(self) -> None:
        self.ended = True
        self._event.set()


class BoundedH11(H11Protocol):
    """One connection's requests, one after another."""

    _awaits: str | None = None
    _timer: asyncio.TimerHandle | None = None
    _cut: Callable[[], None]
    _readable: Readable

    @classmethod
    def instead_of(cls, plain: H11Protocol, cut: Callable[[], None]) -> BoundedH11:
        """Return a protocol for a connection on which nothing has been read."""
        protocol = cls(
            plain.app,
            plain.config,
            plain.context,
            plain.task_group,
            plain.connection_state,
            plain.ssl,
            plain.client,
            plain.server,
            plain.send,
        )
        protocol._cut = cut
        protocol._readable = Readable()
        protocol.can_read = cast("Any", protocol._readable)
        return protocol

    def end(self) -> None:
        """Forget whatever still arrives."""
        self._readable.end()
        self._expect(None)

    async def handle(self, event: Event) -> None:
        """Take what the connection has received, or its end."""
        if not isinstance(event, RawData):
            await super().handle(event)
        elif not self._readable.ended:
            with suppress(Ended):
                await super().handle(event)
            self._expect(self._missing())

    def _missing(self) -> str | None:
        """Return which part of a request has begun and not ended."""
        if self._readable.ended or isinstance(self.connection, H11WSConnection):
            return None
        state = self.connection.their_state
        if state is h11.SEND_BODY:
            return "body"
        if state is h11.IDLE and self.connection.trailing_data[0]:
            return "head"
        return None

    def _expect(self, part: str | None) -> None:
        if part == self._awaits:
            return
        self._awaits = part
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if part is not None:
            seconds = body_timeout(self.config) + (ANSWER_SECONDS if part == "body" else 0)
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(seconds, self._too_slow)

    def _too_slow(self) -> None:
        with suppress(RuntimeError):
            self.task_group.spawn(self._refuse, 408)

    async def _refuse(self, status: int) -> None:
        """Answer with an error, unless an answer has begun, and end the connection."""
        if self.connection.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            await self._send_error_response(status)
        await self.send(Closed())
        await super().handle(Closed())

    async def _check_protocol(self, event: h11.Request) -> None:
        """Ignore offers of HTTP/2, which Hypercorn would accept here."""

    async def _create_stream(self, request: h11.Request) -> None:
        if not request.http_version.startswith(b"1."):
            await self._refuse(505)
        elif (target := path_of(request)) is None:
            await self._refuse(400)
        else:
            await self._start_stream(request, target)

    async def _start_stream(self, request: h11.Request, target: bytes) -> None:
        names = [name for name, _ in request.headers]
        if b"transfer-encoding" in names and b"content-length" in names:
            # RFC 9112, section 6.1: answer, and close the connection.
            self.keep_alive_requests = self.config.keep_alive_max_requests
        self.stream = self._stream_for(request)
        await self.stream.handle(
            Request(
                stream_id=STREAM_ID,
                headers=list(request.headers),
                http_version=request.http_version.decode(),
                method=request.method.decode().upper(),
                raw_path=target,
                state=self.connection_state,
            )
        )
        self.keep_alive_requests += 1
        await self.context.mark_request()

    def _stream_for(self, request: h11.Request) -> BoundedHTTP | BoundedWebSocket:
        kind = BoundedWebSocket if asks_for_websocket(request) else BoundedHTTP
        stream = kind(
            self.app,
            self.config,
            self.context,
            self.task_group,
            self.ssl,
            self.client,
            self.server,
            self.stream_send,
            STREAM_ID,
        )
        if isinstance(stream, BoundedWebSocket):
            stream.cut = self._cut
            self.connection = H11WSConnection(cast("h11.Connection", self.connection))
        return stream


def asks_for_websocket(request: h11.Request) -> bool:
    """Return whether a request asks for a WebSocket (RFC 6455, section 4.2.1)."""
    headers: dict[bytes, bytes] = {}
    for name, value in request.headers:
        headers[name] = headers[name] + b"," + value if name in headers else value
    tokens = headers.get(b"connection", b"").lower().split(b",")
    return (
        request.method == b"GET"
        and b"upgrade" in (token.strip() for token in tokens)
        and headers.get(b"upgrade", b"").strip().lower() == b"websocket"
    )


def path_of(request: h11.Request) -> bytes | None:
    """Return a target's path and query, or None if it has none (RFC 9112, section 3.2)."""
    target = request.target
    if target.startswith(b"/"):
        return target
    if not target.lower().startswith((b"http://", b"https://")):
        return None
    try:
        parts = urlsplit(target)
    except ValueError:
        return None
    path = parts.path or b"/"
    return path + b"?" + parts.query if parts.query else path
