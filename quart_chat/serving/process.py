"""One process, from its start to its end."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from socket import socket

from hypercorn.asyncio import serve as hypercorn_serve
from quart import Quart

from ..compat.hypercorn import bound_connections
from ..compat.hypercorn.config import BoundedConfig
from ..config import Settings
from ..extension import ChatLifespan
from ..transports.codec import CLOSE_FACTOR
from ..transports.state import EXTENSION
from .loop import settle_down
from .signals import Deadline, EndSignals

logger = logging.getLogger("quart_chat.serving")

PING_SECONDS = 20

KEEP_ALIVE_SECONDS = 75
"""An idle connection stays so long: longer than the 60 s after which proxies give theirs up."""

BACKLOG = 1024

QUEUED_EVENTS = 2
"""Frames of one client that are handled before other clients have their turn."""

DRAIN_SLACK = 3.0
"""What a drain may take beyond its time, to store and to send last events."""

GOODBYE_SECONDS = 0.8
"""What clients get to close their side, before connections are cut; then Hypercorn gets it."""

END_SLACK = 4.7
"""The process ends so long after the drain's time, whatever happens."""

AT_ONCE_SECONDS = 2.0
"""What storing gets after a second signal."""


def hypercorn_config(settings: Settings, descriptor: int) -> BoundedConfig:
    """Return Hypercorn's settings for a chat."""
    config = BoundedConfig()
    config.bind = [f"fd://{descriptor}"]
    config.backlog = BACKLOG
    config.websocket_ping_interval = PING_SECONDS
    config.websocket_max_message_size = settings.max_message_bytes * CLOSE_FACTOR
    config.websocket_kept_bytes = settings.max_message_bytes
    config.body_timeout = settings.body_timeout
    config.send_timeout = settings.send_timeout
    config.keep_alive_timeout = KEEP_ALIVE_SECONDS
    config.graceful_timeout = 3 * GOODBYE_SECONDS
    config.max_app_queue_size = QUEUED_EVENTS
    config.include_server_header = False
    config.accesslog = logging.getLogger("hypercorn.access") if settings.access_log else None
    config.errorlog = logging.getLogger("hypercorn.error")
    config.loglevel = "WARNING"
    return config


class Process:
    """Process that serves an application until a signal ends it."""

    def __init__(
        self, app: Quart, listener: socket, ready: Callable[[], None], deadline: Deadline
    ) -> None:
        self._app = app
        self._listener = listener
        self._ready = ready
        self._chat: ChatLifespan = app.extensions[EXTENSION]
        self._drain_seconds = self._chat.settings.drain_timeout
        self._deadline = deadline
        self._signals = EndSignals(deadline, self._drain_seconds + END_SLACK, AT_ONCE_SECONDS)
        self._drained = asyncio.Event()

    async def run(self) -> None:
        """Open the chat, serve, drain, close."""
        await self._chat.open()
        self._signals.listen(self._begin_drain)
        bound_connections()
        config = hypercorn_config(self._chat.settings, self._listener.detach())
        server = asyncio.create_task(
            hypercorn_serve(self._app, config, shutdown_trigger=self._until_drained)
        )
        drained = asyncio.create_task(self._drained.wait())
        await asyncio.wait({server, drained}, return_when=asyncio.FIRST_COMPLETED)
        drained.cancel()
        await self._end_server(server, config)
        await self._chat.close()
        if self._drained.is_set():
            self._deadline.end_within(1.0, code=0)  # a tool's thread may not end

    def _begin_drain(self) -> None:
        self._chat.begin_drain()
        answers = len(self._chat.server.conversation.runs)
        if answers and self._drain_seconds:
            logger.info(
                "Waiting up to %g s for %d answer%s; press Ctrl-C again to end now.",
                self._drain_seconds,
                answers,
                "" if answers == 1 else "s",
            )

    async def _until_drained(self) -> None:
        settle_down()
        self._ready()
        await self._signals.first.wait()
        drain = asyncio.create_task(self._chat.drain(self._drain_seconds))
        again = asyncio.create_task(self._signals.second.wait())
        await asyncio.wait(
            {drain, again},
            timeout=self._drain_seconds + DRAIN_SLACK,
            return_when=asyncio.FIRST_COMPLETED,
        )
        if again.done() and not drain.done():
            drain.cancel()
            drain = asyncio.create_task(self._chat.drain(0))
            await asyncio.wait({drain}, timeout=AT_ONCE_SECONDS)
        again.cancel()
        if not drain.done():
            logger.warning("The drain did not end in time; the server ends without it.")
            drain.cancel()
        self._drained.set()

    async def _end_server(self, server: asyncio.Task[None], config: BoundedConfig) -> None:
        """End Hypercorn, which waits forever for some connections (its issue 308)."""
        if self._drained.is_set():
            await asyncio.wait({server}, timeout=GOODBYE_SECONDS)
        if not server.done():
            config.cut_connections()
            await asyncio.wait({server}, timeout=GOODBYE_SECONDS)
        if not server.done():
            server.cancel()
            await asyncio.wait({server}, timeout=GOODBYE_SECONDS)
        error = server.exception() if server.done() and not server.cancelled() else None
        if error is not None and not self._drained.is_set():
            raise error
        if error is not None:
            logger.warning("Hypercorn did not end in order: %r", error)
