"""Housekeeping: retention and recovery, every now and then and when the storage is back."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable
from datetime import UTC, datetime, timedelta

from .messages import now
from .ports import LogMaintenance, UserData
from .recovery import Recovery

logger = logging.getLogger("quart_chat.housekeeping")

SWEEP_SECONDS = 30
EXPIRED_THREADS = 100
BEGINNING = datetime(1970, 1, 2, tzinfo=UTC)


class Housekeeping:
    """Deletes what is too old, a bounded number at a time until nothing is left, and recovers."""

    def __init__(
        self,
        log: LogMaintenance,
        user_data: UserData,
        recovery: Recovery,
        *,
        event_retention: float,
        retention_days: float | None,
    ) -> None:
        self._log = log
        self._user_data = user_data
        self._recovery = recovery
        self._seconds = min(SWEEP_SECONDS, max(1.0, event_retention))
        self._retention_days = retention_days
        self._woken = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Recover what a dead process left, and go on in the background."""
        if recovered := await self._safely(self._recovery.run()):
            logger.info("%d answers of a process that ended were recovered", recovered)
        self._task = asyncio.create_task(self._sweep(), name="quart_chat housekeeping")

    def wake(self) -> None:
        """Recover at once: the storage is available again."""
        self._woken.set()

    async def close(self) -> None:
        """Stop."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _sweep(self) -> None:
        while True:
            try:
                async with asyncio.timeout(self._seconds):
                    await self._woken.wait()
            except TimeoutError:
                pass
            self._woken.clear()
            await self._safely(self._recovery.run())
            await self._safely(self._expire_events())
            await self._safely(self._expire_threads())

    async def _expire_events(self) -> int:
        while await self._log.expire():
            pass
        return 0

    async def _expire_threads(self) -> int:
        """Delete quiet threads, and what a crash left of threads that were being deleted."""
        before = BEGINNING
        if self._retention_days is not None:
            before = now() - timedelta(days=self._retention_days)
        while await self._user_data.expire(before, EXPIRED_THREADS) >= EXPIRED_THREADS:
            pass
        return 0

    async def _safely(self, work: Awaitable[int]) -> int:
        try:
            return await work
        except Exception as error:
            logger.warning("housekeeping failed: %s: %s", type(error).__name__, error)
            return 0
