"""Threads for plain tool functions: bounded, since a thread cannot be stopped."""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections import deque
from collections.abc import Callable
from typing import Any

MAX_THREADS = 64


class ToolThreads:
    """Runs plain functions in threads of their own, at most ``limit`` at a time.

    A thread whose tool has timed out keeps its place until the function returns; whoever comes
    then waits, within the tool's own time.
    """

    def __init__(self, limit: int = MAX_THREADS) -> None:
        self._free = limit
        self._waiting: deque[asyncio.Future[None]] = deque()

    async def run(self, function: Callable[[], Any]) -> Any:
        """Return what a function returns; neither a cancelled run nor the exit waits for it."""
        await self._take_place()
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Any] = loop.create_future()
        context = contextvars.copy_context()

        def settle(result: Any, error: BaseException | None) -> None:
            self._leave_place()
            if future.done():
                return
            if error is None:
                future.set_result(result)
            else:
                future.set_exception(error)

        def work() -> None:
            result: Any = None
            error: BaseException | None = None
            try:
                result = context.run(function)
            except StopIteration as raised:
                error = RuntimeError(str(raised))
            except BaseException as raised:
                error = raised
            if not loop.is_closed():
                loop.call_soon_threadsafe(settle, result, error)

        try:
            threading.Thread(target=work, name="quart_chat-tool", daemon=True).start()
        except RuntimeError:  # no more threads from the operating system
            self._leave_place()
            raise
        return await future

    async def _take_place(self) -> None:
        if self._free > 0:
            self._free -= 1
            return
        place: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(place)
        try:
            await place
        except asyncio.CancelledError:
            if place.done() and not place.cancelled():
                self._leave_place()
            elif place in self._waiting:
                self._waiting.remove(place)
            raise

    def _leave_place(self) -> None:
        while self._waiting:
            place = self._waiting.popleft()
            if not place.done():
                place.set_result(None)
                return
        self._free += 1
