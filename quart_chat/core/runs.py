"""Runs: the one place where runs are born, found, stopped and drained in this process.

What must not be cut in half by a caller who goes away (a client, a cancelled handler) runs as an
*operation*: a task of its own that is finished whatever becomes of the caller.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from ..errors import InternalError, RateLimited, ServerDraining
from .agent_loop import RunInput
from .parts import Parts
from .queues import MessageQueues, ThreadKey
from .run import Run, RunPhase
from .run_state import RunState

logger = logging.getLogger("quart_chat.runs")

T = TypeVar("T")

STOPPED_BY_USER = "Generation stopped by user"

LOOK_SECONDS = 0.25
"""How often a drain looks at what has changed."""

GRACE_SECONDS = 1.5
"""How long interrupted runs may take to store their text before they are left to recovery."""


class Runs:
    """The runs that are alive in this process, at most one in a thread."""

    def __init__(self, parts: Parts) -> None:
        self.draining = False
        self.queues = MessageQueues(parts.policy.queue_limit)
        self._parts = parts
        self._runs: dict[str, Run] = {}
        self._threads: dict[ThreadKey, Run] = {}
        self._per_user: Counter[str] = Counter()
        self._locks: dict[ThreadKey, tuple[asyncio.Lock, int]] = {}
        self._unfinished: dict[Run, None] = {}
        self._operations: dict[asyncio.Task[Any], None] = {}
        self._leftovers: set[asyncio.Task[Any]] = set()

    def __len__(self) -> int:
        return len(self._runs)

    def active(self, user: str, thread_id: str) -> Run | None:
        """Return the thread's running run."""
        return self._threads.get((user, thread_id))

    def get(self, user: str, run_id: str) -> Run | None:
        """Return the user's running run of that id."""
        run = self._runs.get(run_id)
        return run if run is not None and run.record.user == user else None

    @asynccontextmanager
    async def lock(self, user: str, thread_id: str) -> AsyncIterator[None]:
        """Hold a thread while it is decided what happens next in it."""
        key = (user, thread_id)
        lock, holders = self._locks.get(key, (None, 0))
        lock = lock or asyncio.Lock()
        self._locks[key] = (lock, holders + 1)
        try:
            async with lock:
                yield
        finally:
            lock, holders = self._locks[key]
            if holders == 1:
                del self._locks[key]
            else:
                self._locks[key] = (lock, holders - 1)

    async def operation(
        self, work: Coroutine[Any, Any, T], on_gone: Callable[[T], None] | None = None
    ) -> T:
        """Do something that goes on to its end even if the caller is cancelled.

        Then ``on_gone`` gets the result that the caller does not.
        """
        task = self._begin_operation(work)
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            caller = asyncio.current_task()
            if not task.cancelled() or (caller is not None and caller.cancelling()):
                if on_gone is not None:
                    task.add_done_callback(lambda task: _hand_on(task, on_gone))
                raise
            # Not the caller was cancelled but the operation, from inside an adapter.
            error = InternalError()
            logger.error("an operation was cancelled; reference %s", error.reference)
            raise error from None

    def _begin_operation(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = asyncio.create_task(work)
        self._operations[task] = None
        task.add_done_callback(self._operation_done)
        return task

    def _operation_done(self, task: asyncio.Task[Any]) -> None:
        self._operations.pop(task, None)
        if not task.cancelled():
            task.exception()

    def admit_message(self) -> None:
        """Raise ServerDraining if the process is about to end."""
        if self.draining:
            raise ServerDraining

    def admit(self, user: str) -> None:
        """Refuse a run that may not begin.

        Raises:
            ServerDraining: The process is about to end.
            RateLimited: The user has as many runs as ``CHAT_MAX_RUNS_PER_USER`` allows.
        """
        self.admit_message()
        bound = self._parts.policy.max_runs_per_user
        if bound is not None and self._per_user[user] >= bound:
            raise RateLimited(
                f"{bound} answers are being made for you already. Wait for one to end.",
                code="too_many_runs",
                retry_after=1,
            )

    async def begin(self, run_input: RunInput) -> Run:
        """Bring a run to life. Call it inside an operation that holds the thread.

        Raises:
            StorageUnavailable: The run may or may not be in the log; recovery takes care of it.
        """
        await self._parts.log.open(run_input.record, [run_input.first_event()])
        return self.take_over(run_input)

    def take_over(self, run_input: RunInput, resumed: RunState | None = None) -> Run:
        """Bring to life a run that the log has, after its first event or where it was left."""
        run = Run(run_input, self._parts)
        record = run.record
        self._runs[run.id] = run
        self._threads[record.user, record.thread_id] = run
        self._per_user[record.user] += 1
        run.on_finished = self._discard
        self._unfinished[run] = None
        run.start(resumed).add_done_callback(lambda _: self._unfinished.pop(run, None))
        return run

    def _discard(self, run: Run) -> None:
        if self._runs.get(run.id) is not run:
            return
        del self._runs[run.id]
        record = run.record
        key = (record.user, record.thread_id)
        if self._threads.get(key) is run:
            del self._threads[key]
        self._per_user[record.user] -= 1
        if not self._per_user[record.user]:
            del self._per_user[record.user]
        if run.work is not None and not run.work.done():
            self._leftovers.add(run.work)
            run.work.add_done_callback(self._leftovers.discard)
        if self.queues.waiting(*key) and not self.draining:
            self._begin_operation(self._begin_next(key, run))

    async def _begin_next(self, key: ThreadKey, ended: Run) -> None:
        await ended.finished.wait()
        async with self.lock(*key):
            while key not in self._threads and (queued := self.queues.pop(*key)) is not None:
                await queued.begin_now()

    async def stop(self, run: Run, message: str = STOPPED_BY_USER) -> None:
        """Stop a run and wait until what it said is stored."""
        run.stop(message)
        await run.finished.wait()

    async def stop_all(self, user: str) -> None:
        """Stop every run of a user, and drop what waits."""
        self.queues.drop_user(user)
        for run in [run for run in self._runs.values() if run.record.user == user]:
            await self.stop(run)

    async def drain(self, seconds: float, *, durable: bool) -> set[str]:
        """Take no more, let runs end for so long, and interrupt the rest.

        Runs that wait for an approval are left to the next process if the log is ``durable``.
        Returns within ``seconds`` and a little more, whatever a run does, the ids of those runs
        that did not end.
        """
        self.draining = True
        self.queues.drop_all(ServerDraining())
        left: set[str] = set()
        await self._wait(seconds, lambda: self._hand_over(left, durable=durable))

        def interrupt() -> None:
            self._hand_over(left, durable=durable)
            for run in list(self._runs.values()):
                run.interrupt()

        await self._wait(GRACE_SECONDS, interrupt)
        for run in list(self._unfinished):
            logger.warning("run %s did not end in time; recovery will store its text", run.id)
            run.abandon()
        return left

    def _hand_over(self, left: set[str], *, durable: bool) -> None:
        for run in list(self._runs.values()):
            if durable and run.phase is RunPhase.AWAITING_APPROVAL:
                run.hand_over()
                left.add(run.id)

    async def _wait(self, seconds: float, meanwhile: Callable[[], None]) -> None:
        """Wait until nothing is alive; runs that begin meanwhile are seen to as well."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + seconds
        while self._unfinished or self._operations:
            meanwhile()
            left = deadline - loop.time()
            if left <= 0:
                return
            alive = [*self._operations, *(run.task for run in self._unfinished if run.task)]
            await asyncio.wait(alive, timeout=min(left, LOOK_SECONDS))


def _hand_on(task: asyncio.Task[T], on_gone: Callable[[T], None]) -> None:
    if not task.cancelled() and task.exception() is None:
        on_gone(task.result())
