"""Hypercorn: the socket, the event loop, the signals, and the drain before the end."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import logging
import signal
import socket
import struct
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from hypercorn.asyncio import serve as hypercorn_serve
from hypercorn.config import Config
from hypercorn.protocol import h2, h11
from hypercorn.protocol.events import Data, Event, Request
from hypercorn.protocol.ws_stream import ASGIWebsocketState, WSStream
from hypercorn.typing import ASGISendEvent
from quart import Quart
from wsproto.connection import ConnectionState
from wsproto.events import Ping

from .config import Settings
from .errors import ConfigurationError
from .extension import ChatLifespan
from .transports.codec import CLOSE_FACTOR
from .transports.state import EXTENSION

logger = logging.getLogger("quart_chat.serving")

PING_SECONDS = 20
DEAD_PEER_SECONDS = 40
"""Unacknowledged for so long, a connection is dropped; with the pings, within a minute."""

KEEP_ALIVE_SECONDS = 75
"""An idle connection stays so long: longer than the 60 s after which proxies give theirs up."""

GRACE_SECONDS = 3.0
"""What Hypercorn waits for connections after we have closed ours."""

BACKLOG = 1024

GC_THRESHOLDS = (20_000, 20, 50)
SWITCH_SECONDS = 0.0005
NO_CONTEXT = contextvars.Context()

EXTENSIONS = b"sec-websocket-extensions"


def bind(host: str, port: int) -> socket.socket:
    """Listen on an address; port 0 takes a free one.

    Raises:
        ConfigurationError: The address can not be had.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host.strip("[]"), port))
    except OSError as error:
        listener.close()
        raise ConfigurationError(
            f"--host {host} --port {port}: the address can not be used ({error.strerror})."
        ) from None
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        milliseconds = DEAD_PEER_SECONDS * 1000
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, milliseconds)
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    listener.setblocking(False)
    return listener


def hypercorn_config(settings: Settings, descriptor: int) -> Config:
    """Hypercorn as a chat needs it."""
    config = Config()
    config.bind = [f"fd://{descriptor}"]
    config.backlog = BACKLOG
    config.websocket_ping_interval = PING_SECONDS
    config.websocket_max_message_size = settings.max_message_bytes * CLOSE_FACTOR + 1
    config.keep_alive_timeout = KEEP_ALIVE_SECONDS
    config.graceful_timeout = GRACE_SECONDS
    config.include_server_header = False
    config.accesslog = logging.getLogger("hypercorn.access") if settings.access_log else None
    config.errorlog = logging.getLogger("hypercorn.error")
    config.loglevel = "WARNING"
    return config


def serve(app: Quart, listener: socket.socket, ready: Callable[[], None]) -> None:
    """Serve until a signal, then drain; a second signal ends at once.

    Raises:
        ConfigurationError: An adapter can not be opened.
    """
    with listener, asyncio.Runner(loop_factory=_loop_factory()) as runner:
        runner.get_loop().set_exception_handler(_quiet_about_cancelled)
        runner.run(_Serving(app, listener, ready).run())


def _quiet_about_cancelled(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Hypercorn cancels connections that outstay the end; the streams of asyncio report that."""
    if not isinstance(context.get("exception"), asyncio.CancelledError):
        loop.default_exception_handler(context)


def _settle_down() -> None:
    """Keep the interpreter's own work out of the way of tokens, once everything is loaded.

    What was loaded is never garbage, so collections need not look at it again and again. And the
    loop and the database's thread wait half a millisecond for each other's turn to end, not five.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(*GC_THRESHOLDS)
    sys.setswitchinterval(SWITCH_SECONDS)


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    if sys.platform == "win32":
        return None
    try:
        import uvloop
    except ImportError:
        return None
    factory: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop
    return factory


class ChatStream(WSStream):
    """Hypercorn's WebSocket, without compression, with a timer for its pings, and a short way out.

    * ``permessage-deflate`` is not agreed to: it keeps a quarter of a megabyte for every socket,
      inflates a frame whole before its size is checked, and a token's frame has little to squeeze.
    * Hypercorn's own task for pings sleeps on for up to 20 s after the socket has gone, and keeps
      its connection and file open for so long.
    * A frame without extensions is a few bytes before the payload (RFC 6455, 5.2). Every token is
      one, and wsproto takes a tenth of a token's whole way for it.
    """

    _timer: asyncio.TimerHandle | None = None

    async def handle(self, event: Event) -> None:
        if isinstance(event, Request):
            headers = [each for each in event.headers if each[0].lower() != EXTENSIONS]
            event = replace(event, headers=headers)
        await super().handle(event)
        if self.closed and self._timer is not None:
            self._timer.cancel()

    async def app_send(self, message: ASGISendEvent | None) -> None:
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
            await super().app_send(message)

    async def _send_pings(self) -> None:
        await self._send_wsproto_event(Ping())
        if not self.closed and self.config.websocket_ping_interval is not None:
            loop = asyncio.get_running_loop()
            seconds = self.config.websocket_ping_interval
            # In a context of its own: ours holds the request for as long as the socket lives.
            self._timer = loop.call_later(seconds, self._again, context=NO_CONTEXT)

    def _again(self) -> None:
        if not self.closed:
            self.task_group.spawn(self._send_pings)


def websocket_frame(message: str | bytes) -> bytes:
    """A whole message of a server, unmasked, as one frame."""
    first, payload = (0x81, message.encode()) if isinstance(message, str) else (0x82, message)
    size = len(payload)
    if size < 126:
        return bytes((first, size)) + payload
    if size < 65_536:
        return struct.pack("!BBH", first, 126, size) + payload
    return struct.pack("!BBQ", first, 127, size) + payload


class _Serving:
    def __init__(self, app: Quart, listener: socket.socket, ready: Callable[[], None]) -> None:
        self._app = app
        self._listener = listener
        self._ready = ready
        self._chat: ChatLifespan = app.extensions[EXTENSION]
        self._message_fields = asyncio.Event()
        self._told_again = asyncio.Event()
        self._drained = asyncio.Event()

    async def run(self) -> None:
        await self._chat.open()
        self._listen_to_signals()
        h11.WSStream = h2.WSStream = ChatStream  # type: ignore[attr-defined]
        config = hypercorn_config(self._chat.settings, self._listener.detach())
        server = asyncio.create_task(
            hypercorn_serve(self._app, config, shutdown_trigger=self._until_drained)
        )
        drained = asyncio.create_task(self._drained.wait())
        await asyncio.wait({server, drained}, return_when=asyncio.FIRST_COMPLETED)
        drained.cancel()
        if not server.done():
            await asyncio.wait({server}, timeout=GRACE_SECONDS + 2)
        if not server.done():  # Hypercorn waits for ever for some connections, its issue 308
            server.cancel()
        await asyncio.gather(server, return_exceptions=True)
        await self._chat.close()
        if not server.cancelled() and (error := server.exception()) is not None:
            raise error

    def _listen_to_signals(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                loop.add_signal_handler(number, self._signalled)
            except NotImplementedError:  # Windows
                signal.signal(number, lambda *_: loop.call_soon_threadsafe(self._signalled))

    def _signalled(self) -> None:
        if self._message_fields.is_set():
            self._told_again.set()
        self._message_fields.set()
        self._chat.begin_drain()

    async def _until_drained(self) -> None:
        _settle_down()
        self._ready()
        await self._message_fields.wait()
        drain = asyncio.create_task(self._chat.drain(self._chat.settings.drain_timeout))
        again = asyncio.create_task(self._told_again.wait())
        await asyncio.wait({drain, again}, return_when=asyncio.FIRST_COMPLETED)
        again.cancel()
        if not drain.done():
            drain.cancel()
            await self._chat.drain(0)
        self._drained.set()
