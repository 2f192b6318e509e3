"""Hypercorn: the socket, the event loop, the signals, and the drain before the end."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import sys
from collections.abc import Callable
from typing import Any

from hypercorn.asyncio import serve as hypercorn_serve
from hypercorn.config import Config
from hypercorn.protocol import h2, h11
from hypercorn.protocol.events import Event
from hypercorn.protocol.ws_stream import WSStream
from quart import Quart
from wsproto.events import Ping

from .config import Settings
from .errors import ConfigurationError
from .extension import ChatLifetime
from .transports.codec import CLOSE_FACTOR
from .transports.server import EXTENSION

logger = logging.getLogger("quart_chat.serving")

PING_SECONDS = 20
DEAD_PEER_SECONDS = 40
"""Unacknowledged for so long, a connection is dropped; with the pings, within a minute."""

GRACE_SECONDS = 3.0
"""What Hypercorn waits for connections after we have closed ours."""

BACKLOG = 1024


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
    config.graceful_timeout = GRACE_SECONDS
    config.include_server_header = False
    config.accesslog = None
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


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    if sys.platform == "win32":
        return None
    try:
        import uvloop
    except ImportError:
        return None
    factory: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop
    return factory


class PingedStream(WSStream):
    """Hypercorn's WebSocket with a timer for its pings.

    Hypercorn's own task for them sleeps on for up to 20 s after the socket has gone, and keeps its
    connection and file open for so long.
    """

    _timer: asyncio.TimerHandle | None = None

    async def handle(self, event: Event) -> None:
        await super().handle(event)
        if self.closed and self._timer is not None:
            self._timer.cancel()

    async def _send_pings(self) -> None:
        await self._send_wsproto_event(Ping())
        if not self.closed and self.config.websocket_ping_interval is not None:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(self.config.websocket_ping_interval, self._again)

    def _again(self) -> None:
        if not self.closed:
            self.task_group.spawn(self._send_pings)


class _Serving:
    def __init__(self, app: Quart, listener: socket.socket, ready: Callable[[], None]) -> None:
        self._app = app
        self._listener = listener
        self._ready = ready
        self._chat: ChatLifetime = app.extensions[EXTENSION]
        self._told = asyncio.Event()
        self._told_again = asyncio.Event()
        self._drained = asyncio.Event()

    async def run(self) -> None:
        await self._chat.open()
        self._listen_to_signals()
        h11.WSStream = h2.WSStream = PingedStream  # type: ignore[attr-defined]
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
        if self._told.is_set():
            self._told_again.set()
        self._told.set()
        self._chat.begin_drain()

    async def _until_drained(self) -> None:
        self._ready()
        await self._told.wait()
        drain = asyncio.create_task(self._chat.drain(self._chat.settings.drain_timeout))
        again = asyncio.create_task(self._told_again.wait())
        await asyncio.wait({drain, again}, return_when=asyncio.FIRST_COMPLETED)
        again.cancel()
        if not drain.done():
            drain.cancel()
            await self._chat.drain(0)
        self._drained.set()
