"""The runs that are alive in this process: one at a time in a thread, found and stopped by id."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter, deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from ..errors import RateLimited, ServerDraining, ThreadBusy
from .events import Numbered
from .policy import Policy
from .ports import RunRecord
from .run import Run

logger = logging.getLogger("quart_chat.runs")

STOPPED_BY_USER = "Generation stopped by user"
ThreadKey = tuple[str, str]
"""A user and a thread id."""


@dataclass(frozen=True)
class Subscription:
    """A run and the event after which it is followed; ``stored`` where only its answer is kept."""

    record: RunRecord
    after: int = 0
    stored: tuple[Numbered, ...] | None = None


@dataclass(eq=False)
class QueuedMessage:
    """A message that waits for its turn; ``started`` gives its run, or None where it is dropped."""

    message_id: str
    fingerprint: str
    begin: Callable[[], Awaitable[Subscription]]
    started: asyncio.Future[Subscription | None] = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )


class Runs:
    """Starts, finds, stops and drains runs, and keeps the queue of every thread."""

    def __init__(self, policy: Policy) -> None:
        self.draining = False
        self._policy = policy
        self._runs: dict[str, Run] = {}
        self._threads: dict[ThreadKey, Run] = {}
        self._queues: dict[ThreadKey, deque[QueuedMessage]] = {}
        self._per_user: Counter[str] = Counter()
        self._locks: dict[ThreadKey, tuple[asyncio.Lock, int]] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def __len__(self) -> int:
        return len(self._runs)

    def active(self, user: str, thread_id: str) -> Run | None:
        """The thread's running run."""
        return self._threads.get((user, thread_id))

    def get(self, user: str, run_id: str) -> Run | None:
        """The user's running run of that id."""
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

    def admit_message(self) -> None:
        """Raises ServerDraining where the process is about to end."""
        if self.draining:
            raise ServerDraining

    def admit(self, user: str) -> None:
        """Refuse a run that may not begin.

        Raises:
            ServerDraining: The process is about to end.
            RateLimited: The user has as many runs as ``CHAT_MAX_RUNS_PER_USER`` allows.
        """
        self.admit_message()
        bound = self._policy.max_runs_per_user
        if bound is not None and self._per_user[user] >= bound:
            raise RateLimited(
                f"{bound} answers are being made for you already. Wait for one to end.",
                code="too_many_runs",
                retry_after=1,
            )

    def add(self, run: Run) -> None:
        """Count a run among the living; it has to be started next."""
        record = run.record
        self._runs[run.id] = run
        self._threads[record.user, record.thread_id] = run
        self._per_user[record.user] += 1
        run.on_finished = self._discard

    def _discard(self, run: Run) -> None:
        if self._runs.pop(run.id, None) is None:
            return
        record = run.record
        key = (record.user, record.thread_id)
        if self._threads.get(key) is run:
            del self._threads[key]
        self._per_user[record.user] -= 1
        if not self._per_user[record.user]:
            del self._per_user[record.user]
        if key in self._queues and not self.draining:
            self._spawn(self._begin_next(key, run))

    def queued(
        self, user: str, thread_id: str, message_id: str
    ) -> tuple[QueuedMessage, int] | None:
        """A waiting message and its position, from 1."""
        for position, waiting in enumerate(self._queues.get((user, thread_id), ()), 1):
            if waiting.message_id == message_id:
                return waiting, position
        return None

    def has_queue(self, user: str, thread_id: str) -> bool:
        """Whether messages wait in a thread."""
        return bool(self._queues.get((user, thread_id)))

    def enqueue(self, user: str, thread_id: str, waiting: QueuedMessage) -> int:
        """Let a message wait, and give its position, from 1.

        Raises:
            ThreadBusy: ``CHAT_QUEUE_LIMIT`` messages wait already.
        """
        queue = self._queues.setdefault((user, thread_id), deque())
        if len(queue) >= self._policy.queue_limit:
            raise ThreadBusy(f"{len(queue)} messages wait in this thread already.")
        queue.append(waiting)
        return len(queue)

    def drop_queue(self, user: str, thread_id: str, error: Exception | None = None) -> int:
        """Forget who waits in a thread, telling them why, and count them."""
        queue = self._queues.pop((user, thread_id), deque())
        for waiting in queue:
            if not waiting.started.done():
                if error is None:
                    waiting.started.set_result(None)
                else:
                    waiting.started.set_exception(error)
                    waiting.started.exception()
        return len(queue)

    async def _begin_next(self, key: ThreadKey, ended: Run) -> None:
        await ended.finished.wait()
        async with self.lock(*key):
            queue = self._queues.get(key)
            while queue and key not in self._threads:
                waiting = queue.popleft()
                try:
                    following = await waiting.begin()
                except Exception as error:
                    if not waiting.started.done():
                        waiting.started.set_exception(error)
                        waiting.started.exception()
                else:
                    if not waiting.started.done():
                        waiting.started.set_result(following)
            if queue is not None and not queue and self._queues.get(key) is queue:
                del self._queues[key]

    def _spawn(self, work: Awaitable[None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def stop(self, run: Run, message: str = STOPPED_BY_USER) -> None:
        """Stop a run and wait until what it said is stored."""
        run.stop(message)
        await run.finished.wait()

    async def stop_all(self, user: str) -> None:
        """Stop every run of a user, and drop what waits."""
        for owner, thread_id in list(self._queues):
            if owner == user:
                self.drop_queue(owner, thread_id)
        for run in [run for run in self._runs.values() if run.record.user == user]:
            await self.stop(run)

    async def drain(self, seconds: float, *, durable: bool) -> set[str]:
        """Take no more, let runs end for so long, and store the rest as interrupted.

        Gives the ids of those that did not end.

        Runs that wait for a person's approval are left to the next process where the log is
        ``durable``.
        """
        self.draining = True
        for user, thread_id in list(self._queues):
            self.drop_queue(user, thread_id, ServerDraining())
        left = [run for run in self._runs.values() if durable and run.waits_for_people]
        for run in left:
            run.suspend()
        living = list(self._runs.values())
        if living and seconds > 0:
            waits = [asyncio.ensure_future(run.finished.wait()) for run in living]
            _, late = await asyncio.wait(waits, timeout=seconds)
            for wait in late:
                wait.cancel()
        for run in living:
            if durable and run.waits_for_people:
                left.append(run)
                run.suspend()
            else:
                run.interrupt()
        for run in living:
            await run.finished.wait()
        return {run.id for run in left}
