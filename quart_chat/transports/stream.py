"""The body of one event stream."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

from ..core.conversation import Queued
from ..core.messages import User
from ..core.runs import STOPPED_BY_USER
from ..core.subscription import Subscription
from ..errors import ChatError
from .codec import error_event, sse_events, sse_frame
from .state import ChatState
from .timers import KeepAlive

JOINED_CHARS = 16 * 1024
"""Frames that are there already go out together, up to about so much."""

OPEN = ": open\n"
KEEP_ALIVE = ": keep-alive\n"
"""One LF: some clients take the blank line after a comment for an empty event."""


class Stream:
    """One response body. It ends after ``end``; when the server closes, it is broken off.

    What is ``held`` (a slot, a follower, the thread's use) is released when the body ends, or with
    the task that answers the request if the body never begins.
    """

    def __init__(
        self,
        server: ChatState,
        user: User,
        held: ExitStack,
        sent: Subscription | Queued,
        reply_to: str | None = None,
    ) -> None:
        self.thread_id = sent.thread_id if isinstance(sent, Queued) else sent.record.thread_id
        self._server = server
        self._sent = sent
        self._more = {"reply_to": reply_to} if reply_to else {}
        self._begun = False
        if (expiry := server.conversation.expiry) is not None:
            expiry.arrive(user.id, self.thread_id)
            held.callback(expiry.leave, user.id, self.thread_id)
        if isinstance(sent, Subscription):
            held.enter_context(server.conversation.watching(sent))
        self._held = held.pop_all()
        task = asyncio.current_task()
        assert task is not None
        task.add_done_callback(self._answered)

    def _answered(self, task: asyncio.Task[Any]) -> None:
        if not self._begun:
            self._held.close()

    async def frames(self) -> AsyncGenerator[str, None]:
        """Yield the body, a frame or several at a time."""
        self._begun = True
        task = asyncio.current_task()
        assert task is not None

        def break_off() -> None:
            task.cancel()

        settings = self._server.settings
        self._server.closers.add(break_off)
        keep_alive = KeepAlive(settings.keepalive, settings.send_timeout, task)
        try:
            yield OPEN
            async for frames in self._frames(keep_alive):
                yield frames
        finally:
            keep_alive.stop()
            self._server.closers.discard(break_off)
            self._held.close()

    async def _frames(self, keep_alive: KeepAlive) -> AsyncGenerator[str, None]:
        if isinstance(self._sent, Subscription):
            async for frames in self._delivered(self._sent, keep_alive):
                yield frames
            return
        yield sse_frame(self._message_fields("queued", position=self._sent.position))
        try:
            while (begun := await keep_alive.wait(self._turn)) is None:
                yield KEEP_ALIVE
        except ChatError as error:
            yield sse_frame(error_event(error, thread_id=self.thread_id, **self._more))
            return
        if (subscription := begun[0]) is None:
            yield sse_frame(self._message_fields("generation_stopped", message=STOPPED_BY_USER))
            return
        self._held.enter_context(self._server.conversation.watching(subscription))
        async for frames in self._delivered(subscription, keep_alive):
            yield frames

    async def _delivered(
        self, subscription: Subscription, keep_alive: KeepAlive
    ) -> AsyncGenerator[str, None]:
        """Yield a run's frames; the drain waits for the last of them."""
        delivered: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._server.deliveries[delivered] = subscription.record.id
        try:
            async for frames in self._events(subscription, keep_alive):
                yield frames
        finally:
            del self._server.deliveries[delivered]
            delivered.cancel()

    def _message_fields(self, kind: str, **fields: Any) -> dict[str, Any]:
        return {"type": kind, "thread_id": self.thread_id, **fields, **self._more}

    async def _turn(self) -> tuple[Subscription | None]:
        assert isinstance(self._sent, Queued)
        return (await self._sent.started(),)

    async def _events(
        self, subscription: Subscription, keep_alive: KeepAlive
    ) -> AsyncGenerator[str, None]:
        encode = sse_events(subscription.record)
        follow = self._server.conversation.follow
        pages = follow(subscription)
        try:
            while True:
                try:
                    page = await keep_alive.wait(pages.__anext__)
                except StopAsyncIteration:
                    return
                if page is None:
                    pages = follow(subscription)
                    yield KEEP_ALIVE
                else:
                    subscription = replace(subscription, after=page[-1][0])
                    for frames in _joined(map(encode, page)):
                        yield frames
        except ChatError as error:
            yield sse_frame(error_event(error, thread_id=self.thread_id))
        finally:
            await pages.aclose()


def _joined(frames: Iterable[str]) -> Iterator[str]:
    waiting: list[str] = []
    chars = 0
    for frame in frames:
        waiting.append(frame)
        chars += len(frame)
        if chars >= JOINED_CHARS:
            yield "".join(waiting)
            waiting, chars = [], 0
    if chars:
        yield "".join(waiting)
