"""Timers of a connection: keep-alive, and timeout of clients that do not read."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

logger = logging.getLogger("quart_chat.transports")

T = TypeVar("T")

DROPPED = "a client that takes nothing was dropped"


class SendTimeout:
    """Send timeout: calls ``drop`` when a client does not read pending data for so long.

    ``begin`` and ``end`` stand around what is sent, and ``sent`` counts it. The timer runs only
    while something waits, and looks twice within the time-out; nothing is done for a frame but the
    count.
    """

    __slots__ = ("_drop", "_interval", "_seen", "_timer", "_waiting", "sent")

    def __init__(self, seconds: float, drop: Callable[[], None]) -> None:
        self.sent = 0
        self._drop = drop
        self._interval = seconds / 2
        self._waiting = 0
        self._seen: tuple[int, int] = (-1, 0)
        self._timer: asyncio.TimerHandle | None = None

    def begin(self) -> None:
        """Start the timer: something is about to be sent."""
        self._waiting += 1
        if self._timer is None:
            self._seen = (self.sent, 0)
            self._timer = asyncio.get_running_loop().call_later(self._interval, self._check)

    def end(self) -> None:
        """Note that what began has been sent, or never will be."""
        self._waiting -= 1

    def stop(self) -> None:
        """Cancel the timer."""
        if self._timer is not None:
            self._timer.cancel()

    def _check(self) -> None:
        self._timer = None
        if not self._waiting:
            return
        sent, looks = self._seen
        self._seen = (self.sent, looks + 1 if sent == self.sent else 0)
        if self._seen[1] >= 2:
            logger.info(DROPPED)
            self._drop()
        else:
            self._timer = asyncio.get_running_loop().call_later(self._interval, self._check)


class KeepAlive:
    """Keep-alive of a stream's body, and its send timeout, with one timer.

    While the body waits for events, ``wait`` returns None after ``keepalive`` seconds of silence.
    While the server waits for the client to take what was sent, the task is cancelled after
    ``send_timeout`` seconds, which breaks the body off.
    """

    def __init__(self, keepalive: float, send_timeout: float, task: asyncio.Task[Any]) -> None:
        self._loop = asyncio.get_running_loop()
        self._keepalive = keepalive
        self._send_timeout = send_timeout
        self._task = task
        self._since = self._loop.time()
        self._waiting = False
        self._silent = False
        self._timer = self._loop.call_later(min(keepalive, send_timeout), self._check)

    async def wait(self, begin: Callable[[], Awaitable[T]]) -> T | None:
        """Return what ``begin`` returns, or None after a silence, when it was cancelled."""
        self._since = self._loop.time()
        self._waiting = True
        try:
            return await begin()
        except asyncio.CancelledError:
            silent, self._silent = self._silent, False
            if silent and self._task.uncancel() == 0:
                return None
            raise
        finally:
            self._waiting = False
            self._since = self._loop.time()

    def stop(self) -> None:
        """Cancel the timer."""
        self._timer.cancel()

    def _check(self) -> None:
        bound = self._keepalive if self._waiting else self._send_timeout
        left = self._since + bound - self._loop.time()
        if left > 0.001:
            # The client may begin or cease to take what is sent before that.
            left = min(left, self._keepalive, self._send_timeout)
        else:
            self._silent = self._waiting
            if not self._waiting:
                logger.info(DROPPED)
            self._task.cancel()
            left = bound
        self._timer = self._loop.call_later(left, self._check)
