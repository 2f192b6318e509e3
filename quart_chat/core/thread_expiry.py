"""Which threads have a connection open; what happens when the last one has gone for a while."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable

ThreadKey = tuple[str, str]


class ThreadExpiry:
    """Counts connections; calls ``forget`` some seconds (``window``) after a thread's last one."""

    def __init__(self, window: float, forget: Callable[[str, str], Awaitable[bool]]) -> None:
        self._window = window
        self._forget = forget
        self._connections: Counter[ThreadKey] = Counter()
        self._timers: dict[ThreadKey, asyncio.TimerHandle] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def arrive(self, user: str, thread_id: str) -> None:
        """A connection uses the thread."""
        key = (user, thread_id)
        self._connections[key] += 1
        if (timer := self._timers.pop(key, None)) is not None:
            timer.cancel()

    def leave(self, user: str, thread_id: str) -> None:
        """A connection that used the thread has closed."""
        key = (user, thread_id)
        self._connections[key] -= 1
        if self._connections[key] <= 0:
            del self._connections[key]
            self._later(key)

    def close(self) -> None:
        """Cancel what is planned."""
        for timer in self._timers.values():
            timer.cancel()
        self._timers.clear()
        for task in self._tasks:
            task.cancel()

    def _later(self, key: ThreadKey) -> None:
        loop = asyncio.get_running_loop()
        self._timers[key] = loop.call_later(self._window, self._expire, key)

    def _expire(self, key: ThreadKey) -> None:
        self._timers.pop(key, None)
        task = asyncio.ensure_future(self._forget_unless_used(key))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _forget_unless_used(self, key: ThreadKey) -> None:
        forgotten = await self._forget(*key)
        if not forgotten and key not in self._connections and key not in self._timers:
            self._later(key)
