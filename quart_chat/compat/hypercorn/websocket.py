"""A WebSocket without compression, with a bound for messages, control frames and closing.

Hypercorn's own goes on collecting a message that is too big, counts its characters and not its
bytes, answers every ping by itself, and leaves the connection of a refused handshake open.
"""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

from hypercorn.protocol.events import Body, Data, Event, Request, StreamClosed
from hypercorn.protocol.ws_stream import ASGIWebsocketState, WSStream
from hypercorn.typing import ASGISendEvent
from wsproto.connection import ConnectionState
from wsproto.events import CloseConnection, Message, Ping
from wsproto.events import Event as WebSocketEvent
from wsproto.frame_protocol import CloseReason

from .config import body_timeout, kept_bytes
from .message import MessageBuffer, received, websocket_frame

EXTENSIONS = b"sec-websocket-extensions"
NO_CONTEXT = contextvars.Context()

CLOSE_SECONDS = 5.0
"""So long after our close frame the connection is cut, if it is still there."""

CONTROL_FRAMES = 300
"""Control frames and tiny fragments in a second; a client that sends more is closed with 1008."""

TINY = 64
"""Bytes of a fragment below which it counts as a control frame."""

EVENTS_AT_ONCE = 100
"""Frames that are handled before other connections have their turn."""


class EndsWithApp:
    """A stream that keeps no messages for an application that has returned."""

    app_put: Any

    def forget_messages(self) -> None:
        """Make room for whoever waits to put a message; nobody will ever take it."""
        queue = getattr(self.app_put, "__self__", None)
        while isinstance(queue, asyncio.Queue) and not queue.empty():
            queue.get_nowait()


class BoundedWebSocket(EndsWithApp, WSStream):
    """One socket.

    * ``permessage-deflate`` is not agreed to: it keeps a quarter of a megabyte for every socket,
      inflates a frame whole before its size is checked, and a token's frame has little to squeeze.
    * Pings need a timer only. Hypercorn's task for them holds the connection for up to 20 s more.
    * A frame without extensions is a few bytes before the payload (RFC 6455, section 5.2). Every
      token is one, and wsproto takes a tenth of a token's whole way for it.
    """

    cut: Callable[[], None]
    _ping_timer: asyncio.TimerHandle | None = None
    _close_timer: asyncio.TimerHandle | None = None
    _message_timer: asyncio.TimerHandle | None = None
    _control_frames = 0
    _control_since = 0.0

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        kept, bound = kept_bytes(self.config), self.config.websocket_max_message_size
        self.buffer: MessageBuffer = MessageBuffer(kept, bound)  # type: ignore[assignment]

    async def handle(self, event: Event) -> None:
        """Take the handshake, what the connection has received, or its end."""
        if self.closed:
            return
        if isinstance(event, Request):
            headers = [each for each in event.headers if _is_understood(*each)]
            await super().handle(replace(event, headers=headers))
            if self.closed:  # the handshake was refused; Hypercorn leaves the connection open
                await self.send(StreamClosed(self.stream_id))
        elif isinstance(event, Body | Data):
            await self._received(event.data)
        else:
            await super().handle(event)
        if self.closed:
            self._stop_timers()

    async def _received(self, data: bytes) -> None:
        if not self.handshake.accepted:
            await self._send_error_response(400)
            await self.send(StreamClosed(self.stream_id))
        elif self.connection.state is not ConnectionState.CLOSED:
            self.connection.receive_data(data)
            await self._handle_events()

    async def app_send(self, message: ASGISendEvent | None) -> None:
        """Take an event of the application; None if it has returned."""
        if (
            message is not None
            and message["type"] == "websocket.send"
            and self.state is ASGIWebsocketState.CONNECTED
            and self.connection.state is ConnectionState.OPEN
            and not self.closed
        ):
            text = message.get("text")
            data = websocket_frame(text if text is not None else message.get("bytes") or b"")
            await self.send(Data(self.stream_id, data))
        else:
            if message is None:
                self.forget_messages()
            await super().app_send(message)

    async def _handle_events(self) -> None:
        ping: Ping | None = None
        for number, event in enumerate(self.connection.events(), 1):
            if isinstance(event, CloseConnection):
                await self._peer_closed(event)
                return
            if self.connection.state is not ConnectionState.OPEN:
                continue
            if isinstance(event, Message):
                await self._message(event)
            elif isinstance(event, Ping):
                ping = event
            if _costs_more_than_it_carries(event) and self._too_many_control_frames():
                await self._fail(CloseReason.POLICY_VIOLATION, "Too many control frames")
            if number % EVENTS_AT_ONCE == 0:
                await asyncio.sleep(0)
            if self.closed:
                return
        if ping is not None:  # the last one of a read stands for all (RFC 6455, section 5.5.3)
            await self._send_wsproto_event(ping.response())

    async def _message(self, event: Message[Any]) -> None:
        if event.message_finished and self.buffer.empty and self._fits(event):
            await self._to_app(received(cast("str | bytes", event.data)))
        elif not self.buffer.add(event):
            self.buffer.clear()
            await self._fail(CloseReason.MESSAGE_TOO_BIG, "Message too big")
        elif event.message_finished:
            self._stop_message_timer()
            await self._to_app(self.buffer.take())
        elif self._message_timer is None:
            self._message_timer = self._later(body_timeout(self.config), self._unfinished)

    def _fits(self, event: Message[Any]) -> bool:
        return len(event.data) * 4 <= self.config.websocket_max_message_size

    async def _to_app(self, message: dict[str, Any]) -> None:
        if self.app_put is not None:
            await self.app_put(message)

    def _too_many_control_frames(self) -> bool:
        now = asyncio.get_running_loop().time()
        if now - self._control_since >= 1:
            self._control_since, self._control_frames = now, 0
        self._control_frames += 1
        return self._control_frames > CONTROL_FRAMES

    async def _peer_closed(self, event: CloseConnection) -> None:
        match self.connection.state:
            case ConnectionState.REMOTE_CLOSING:
                await self._send_wsproto_event(event.response())
            case ConnectionState.OPEN:  # a frame that is none: wsproto has only said so
                await self._send_wsproto_event(CloseConnection(event.code, event.reason))
        await self.send(StreamClosed(self.stream_id))

    async def _fail(self, code: CloseReason, reason: str) -> None:
        """Close the socket for what the client has sent, and forget the rest of it."""
        await self._send_wsproto_event(CloseConnection(code, reason))
        self.state = ASGIWebsocketState.CLOSED
        await self.send(StreamClosed(self.stream_id))

    async def go_away(self) -> None:
        """Close the socket because the server ends."""
        if self.state is ASGIWebsocketState.CONNECTED:
            await self._fail(CloseReason.GOING_AWAY, "Server going away")

    def _unfinished(self) -> None:
        if not self.closed:
            reason = "A message took too long"
            self.task_group.spawn(self._fail, CloseReason.POLICY_VIOLATION, reason)

    async def _send_wsproto_event(self, event: Any) -> None:
        if isinstance(event, CloseConnection) and self._close_timer is None:
            self._close_timer = self._later(CLOSE_SECONDS, self.cut)
        await super()._send_wsproto_event(event)

    async def _send_pings(self) -> None:
        await self._send_wsproto_event(Ping())
        if not self.closed and self.config.websocket_ping_interval is not None:
            self._ping_timer = self._later(self.config.websocket_ping_interval, self._ping_again)

    def _ping_again(self) -> None:
        if not self.closed:
            self.task_group.spawn(self._send_pings)

    def _later(self, seconds: float, call: Callable[[], None]) -> asyncio.TimerHandle:
        # In a context of its own: ours holds the request for as long as the timer runs.
        return asyncio.get_running_loop().call_later(seconds, call, context=NO_CONTEXT)

    def _stop_message_timer(self) -> None:
        if self._message_timer is not None:
            self._message_timer.cancel()
            self._message_timer = None

    def _stop_timers(self) -> None:
        self._stop_message_timer()
        for timer in (self._ping_timer, self._close_timer):
            if timer is not None:
                timer.cancel()


def _costs_more_than_it_carries(event: WebSocketEvent) -> bool:
    """Return whether a frame is a control frame or a tiny fragment."""
    if isinstance(event, Message):
        return event.frame_finished and not event.message_finished and len(event.data) < TINY
    return True


def _is_understood(name: bytes, value: bytes) -> bool:
    """Return whether the handshake may see a header; wsproto decodes its own as ASCII."""
    name = name.lower()
    return name != EXTENSIONS and (value.isascii() or not name.startswith(b"sec-websocket-"))
