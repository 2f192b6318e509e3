"""A process of a simulated world: the real core, its housekeeping, and what a crash does to it."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Coroutine, Iterator
from typing import Any, TypeVar

from quart_chat.adapters.database.event_log import DatabaseEventLog
from quart_chat.adapters.database.ownership import release_name
from quart_chat.adapters.database.storage import DatabaseStorage
from quart_chat.adapters.database.user_data import DatabaseUserData
from quart_chat.adapters.memory import MemoryEventLog, MemoryStorage
from quart_chat.core.conversation import Conversation
from quart_chat.core.housekeeping import Housekeeping
from quart_chat.core.models import ConfiguredProvider, ModelRegistry
from quart_chat.core.parts import Parts
from quart_chat.core.policy import Policy
from quart_chat.core.recovery import Recovery
from quart_chat.core.run import Run
from quart_chat.core.runs import Runs
from quart_chat.core.tools import ToolRegistry

from .disk import Disk, SimulatedDatabase
from .provider import SimulatedProvider

T = TypeVar("T")

RETENTION = 100_000.0
HERE: contextvars.ContextVar[Any] = contextvars.ContextVar("process", default=None)


class Disconnected(Exception):
    """The process is gone."""


class OneAtATime(dict[Any, Run]):
    """Notes where a second run begins in a thread, or with the same id."""

    def __init__(self, violations: list[str]) -> None:
        super().__init__()
        self._violations = violations

    def __setitem__(self, key: Any, run: Run) -> None:
        if key in self:
            self._violations.append(f"two runs at once: {key}")
        super().__setitem__(key, run)


class Process:
    """A server without sockets."""

    def __init__(
        self,
        disk: Disk | None,
        policy: Policy,
        tools: ToolRegistry,
        memory: MemoryStorage,
        numbers: Iterator[int],
        violations: list[str],
    ) -> None:
        self.alive = False
        self._database = SimulatedDatabase(disk) if disk is not None else None
        provider = ConfiguredProvider("p", SimulatedProvider(numbers), "model")
        user_data: Any
        if self._database is None:
            storage: Any = memory
            user_data, log = memory, MemoryEventLog(RETENTION)
        else:
            database: Any = self._database
            storage, user_data = DatabaseStorage(database), DatabaseUserData(database)
            log = DatabaseEventLog(database, RETENTION)
        self.log: Any = log
        self.parts = Parts(storage, self.log, ModelRegistry([provider]), tools, policy)
        self.runs = Runs(self.parts)
        self.runs._threads = OneAtATime(violations)
        self.runs._runs = OneAtATime(violations)
        self.conversation = Conversation(self.parts, self.runs)
        self._housekeeping = Housekeeping(
            self.log,
            user_data,
            Recovery(self.conversation, self.runs, self.parts),
            event_retention=RETENTION,
            retention_days=None,
        )
        self.log.on_available = self._housekeeping.wake
        self._context = contextvars.copy_context()
        self._context.run(HERE.set, self)

    def spawn(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Do something inside the process."""
        return asyncio.create_task(work, context=self._context.copy())

    async def start(self) -> None:
        """Start, recovering what the process before has left."""
        await self.spawn(self._start())

    async def _start(self) -> None:
        if self._database is not None:
            self.log.start()
        await self._housekeeping.start()
        self.alive = True

    async def call(self, work: Coroutine[Any, Any, T], patience: float | None) -> T:
        """Ask as a client; after ``patience`` seconds it vanishes, which cancels the handler.

        Raises:
            Disconnected: The process went, or the client did.
        """
        if not self.alive:
            work.close()
            raise Disconnected
        task = self.spawn(work)
        await asyncio.wait({task}, timeout=patience)
        if not task.done():
            task.cancel()
            await asyncio.wait({task})
        if task.cancelled():
            raise Disconnected
        return task.result()

    async def shut_down(self, seconds: float) -> float:
        """Drain and close; return how long the drain took."""
        loop = asyncio.get_running_loop()
        began = loop.time()
        await self.spawn(self.runs.drain(seconds, durable=self.log.durable))
        took = loop.time() - began
        self.alive = False
        await self.spawn(self._close())
        return took

    async def _close(self) -> None:
        await self._housekeeping.close()
        if self._database is not None:
            await self.log.close()

    async def crash(self) -> None:
        """End as kill -9 does: nothing more reaches the disk, and no task goes on."""
        self.alive = False
        if self._database is not None:
            self._database.dead = True
        while mine := [t for t in asyncio.all_tasks() if self._owns(t)]:
            for task in sorted(mine, key=lambda t: t.get_name()):
                task.cancel()
            await asyncio.wait(mine, timeout=1)
        if self._database is not None:
            release_name(self.log._owner)

    def _owns(self, task: asyncio.Task[Any]) -> bool:
        return not task.done() and task.get_context().get(HERE) is self

    def has_unwritten_events(self) -> bool:
        """Return whether the log could not write all before it closed."""
        return self._database is not None and any(log.dirty for log in self.log._live.values())

    def left_behind(self) -> list[str]:
        """Return what should be gone once nothing runs."""
        runs = self.runs
        left = {
            "runs": len(runs._runs),
            "threads": len(runs._threads),
            "counts per user": len(runs._per_user),
            "locks": len(runs._locks),
            "operations": len(runs._operations),
            "unfinished": len(runs._unfinished),
            "queues": len(runs.queues._queues),
        }
        return [f"{count} {what}" for what, count in left.items() if count]
