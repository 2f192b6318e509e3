"""The runs that one socket follows: a task for each, in order within a thread."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from contextlib import ExitStack, aclosing
from typing import Any

from ..core.ports import RunRecord
from ..core.subscription import Subscription
from ..errors import ChatError
from .asgi import Socket
from .codec import Frame, error_event, json_events, msgpack_events, to_json, to_msgpack
from .state import ChatState
from .timers import SendTimeout


class Deliveries:
    """The tasks of one socket, and the threads that it uses."""

    __slots__ = (
        "_chat",
        "_followed",
        "_followers",
        "_last_of_thread",
        "_server",
        "_socket",
        "_tasks",
        "_threads",
        "_timeout",
        "_user",
    )

    def __init__(self, server: ChatState, socket: Socket, user: str, timeout: SendTimeout) -> None:
        self._server = server
        self._chat = server.conversation
        self._socket = socket
        self._user = user
        self._timeout = timeout
        self._followers: dict[str, asyncio.Task[None]] = {}
        self._followed: dict[str, RunRecord] = {}
        self._last_of_thread: dict[str, asyncio.Task[None]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._threads: set[str] = set()

    def records(self) -> list[RunRecord]:
        """Return the runs that are followed."""
        return list(self._followed.values())

    def follow(self, subscription: Subscription, *, text: bool) -> None:
        """Follow a run in a task of its own, after the thread's run before it has ended here."""
        record = subscription.record
        self.expect(record.thread_id)
        before = self._last_of_thread.get(record.thread_id)
        watching = ExitStack()
        watching.enter_context(self._chat.watching(subscription))
        if (known := self._followers.get(record.id)) is not None:
            known.cancel()
            before = None if before is known else before
        task = self.spawn(self._deliver(subscription, text, before))
        self._followed[record.id] = record
        self._followers[record.id] = self._last_of_thread[record.thread_id] = task
        self._server.deliveries[task] = record.id

        def delivered(task: asyncio.Task[None]) -> None:
            # Here and not in the task, which may be cancelled before its first step.
            watching.close()
            self._server.deliveries.pop(task)
            self._forget(record, task)

        task.add_done_callback(delivered)

    def _forget(self, record: RunRecord, task: asyncio.Task[None]) -> None:
        if self._followers.get(record.id) is task:
            del self._followers[record.id]
            del self._followed[record.id]
        if self._last_of_thread.get(record.thread_id) is task:
            del self._last_of_thread[record.thread_id]

    async def _deliver(
        self, subscription: Subscription, text: bool, before: asyncio.Task[None] | None
    ) -> None:
        record, send, timeout = subscription.record, self._socket.send, self._timeout
        make = json_events if text else msgpack_events
        encode: Callable[[Any], Frame] = make(record)
        if before is not None:
            await asyncio.wait([before])
        try:
            async with aclosing(self._chat.follow(subscription)) as pages:
                async for page in pages:
                    timeout.begin()
                    try:
                        for numbered in page:
                            if frame := encode(numbered):
                                await send(frame)
                                timeout.sent += 1
                    finally:
                        timeout.end()
        except ChatError as error:
            body = error_event(error, thread_id=record.thread_id, run_id=record.id)
            await send(to_json(body) if text else to_msgpack(body))

    def expect(self, thread_id: str | None) -> None:
        """Count the socket among those that use a thread."""
        expiry = self._chat.expiry
        if expiry is None or thread_id is None or thread_id in self._threads:
            return
        self._threads.add(thread_id)
        expiry.arrive(self._user, thread_id)

    def spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run something until it ends or the socket closes."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def close(self) -> None:
        """Cancel the tasks and leave the threads."""
        for task in self._tasks:
            task.cancel()
        if (expiry := self._chat.expiry) is not None:
            for thread_id in self._threads:
                expiry.leave(self._user, thread_id)
