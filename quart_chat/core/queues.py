"""Queues: the messages that wait in a thread for the answer before them."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from ..errors import ThreadBusy
from .subscription import Subscription

ThreadKey = tuple[str, str]
"""A user and a thread id."""


@dataclass(eq=False)
class QueuedMessage:
    """A message that waits; ``started`` is its subscription, or None if it was dropped."""

    message_id: str
    fingerprint: str
    begin: Callable[[], Awaitable[Subscription]]
    started: asyncio.Future[Subscription | None] = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )

    async def begin_now(self) -> None:
        """Begin the run, or tell whoever waits why it cannot begin."""
        try:
            self.settle(await self.begin())
        except BaseException as error:
            self.fail(error)
            if not isinstance(error, Exception):
                raise

    def settle(self, subscription: Subscription | None) -> None:
        """Tell whoever waits what has become of the message."""
        if not self.started.done():
            self.started.set_result(subscription)

    def fail(self, error: BaseException) -> None:
        """Tell whoever waits why the message is not answered."""
        if not self.started.done():
            if isinstance(error, asyncio.CancelledError):
                self.started.cancel()
            else:
                self.started.set_exception(error)
                self.started.exception()


class MessageQueues:
    """One queue for each thread in which messages wait, each with at most ``limit``."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._queues: dict[ThreadKey, deque[QueuedMessage]] = {}

    def waiting(self, user: str, thread_id: str) -> bool:
        """Return whether messages wait in a thread."""
        return (user, thread_id) in self._queues

    def find(self, user: str, thread_id: str, message_id: str) -> tuple[QueuedMessage, int] | None:
        """Return a waiting message and its position, from 1."""
        for position, queued in enumerate(self._queues.get((user, thread_id), ()), 1):
            if queued.message_id == message_id:
                return queued, position
        return None

    def add(self, user: str, thread_id: str, queued: QueuedMessage) -> int:
        """Add a message and return its position, from 1.

        Raises:
            ThreadBusy: The queue is full.
        """
        queue = self._queues.setdefault((user, thread_id), deque())
        if len(queue) >= self._limit:
            raise ThreadBusy(f"{len(queue)} messages wait in this thread already.")
        queue.append(queued)
        return len(queue)

    def pop(self, user: str, thread_id: str) -> QueuedMessage | None:
        """Return the message that is next, and take it out."""
        queue = self._queues.get((user, thread_id))
        if queue is None:
            return None
        queued = queue.popleft()
        if not queue:
            del self._queues[user, thread_id]
        return queued

    def drop(self, user: str, thread_id: str, error: Exception | None = None) -> None:
        """Drop who waits in a thread, with an error or silently."""
        for queued in self._queues.pop((user, thread_id), ()):
            if error is None:
                queued.settle(None)
            else:
                queued.fail(error)

    def drop_user(self, user: str) -> None:
        """Drop who waits in any thread of a user."""
        for owner, thread_id in list(self._queues):
            if owner == user:
                self.drop(owner, thread_id)

    def drop_all(self, error: Exception) -> None:
        """Drop everybody who waits."""
        for user, thread_id in list(self._queues):
            self.drop(user, thread_id, error)
