"""Conversation: the use cases. Send, answer again, follow, stop, approve, delete."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from ..errors import NotFound, NothingToResume, NotRunning, ThreadBusy, UnsupportedField
from .agent_loop import RunInput
from .commands import PastMessage, Regenerate, SendMessage
from .events import Numbered
from .messages import Message, derived_id, new_id
from .parts import Parts
from .ports import RunRecord
from .preparation import Preparation
from .queues import QueuedMessage
from .retries import Retries
from .run import Run
from .runs import Runs
from .subscription import Subscription
from .thread_expiry import ThreadExpiry
from .titles import TitleMaker
from .tool_executor import CallReply

BY_NEW_MESSAGE = "Generation stopped by a new message"
BY_DELETION = "Generation stopped: the thread was deleted"
BY_DISCONNECT = "Generation stopped: the client disconnected"


@dataclass(frozen=True)
class Queued:
    """A message that waits for the running one to end."""

    thread_id: str
    position: int
    queued: QueuedMessage

    async def started(self) -> Subscription | None:
        """Return the run's subscription once it has begun, or None if the queue was dropped."""
        return await asyncio.shield(self.queued.started)


class Conversation:
    """What clients can do, whatever transport they speak.

    Whatever changes something goes on to its end although the client has gone: it is an operation
    of ``Runs``.
    """

    def __init__(self, parts: Parts, runs: Runs, titles: TitleMaker | None = None) -> None:
        self.storage = parts.storage
        self.models = parts.models
        self.runs = runs
        self._log = parts.log
        self._policy = parts.policy
        self._preparation = Preparation(parts)
        self._retries = Retries(parts, runs)
        self._titles = titles
        window = parts.policy.resume_window
        self.expiry = (
            ThreadExpiry(window, self._forget) if parts.policy.forget_after_window else None
        )

    def active_run_id(self, user: str, thread_id: str) -> str | None:
        """Return the id of the thread's running run."""
        run = self.runs.active(user, thread_id)
        return run.id if run else None

    async def send(
        self, user: str, command: SendMessage, *, history_allowed: bool = False
    ) -> Subscription | Queued:
        """Store a message and have it answered, or attach to the answer that it started.

        Raises:
            ChatError: With the code that the protocol names.
        """
        if command.history is not None and not history_allowed:
            raise UnsupportedField("history: send it over SSE to a server without a database.")
        self._preparation.check(user, command)
        thread_id = command.thread_id or self._new_thread_id(user, command)
        work = self._send(user, thread_id, command)
        return await self.runs.operation(work, self._nobody_follows)

    def _nobody_follows(self, sent: Subscription | Queued) -> None:
        """Stop the run of a client that has gone before it could follow, if that is policy."""
        if isinstance(sent, Subscription):
            self._followers_left(self.runs.get(sent.record.user, sent.record.id))

    async def _send(self, user: str, thread_id: str, command: SendMessage) -> Subscription | Queued:
        async with self.runs.lock(user, thread_id):
            begin = functools.partial(self._begin, user, thread_id, command)
            if command.id is not None:
                if (waiting := self._retries.queued(user, thread_id, command)) is not None:
                    return Queued(thread_id, waiting[1], waiting[0])
                stored = await self._retries.stored(user, thread_id, command)
                if stored is not None:
                    subscription = await self._retries.subscription(user, stored)
                    if subscription is not None:
                        return subscription
                    begin = functools.partial(self._answer_again, user, stored, command)
            return await self._in_turn(user, thread_id, begin, command)

    async def regenerate(self, user: str, command: Regenerate) -> Subscription | Queued:
        """Answer a message again.

        Raises:
            NotFound: The user has no such thread or message.
        """
        work = self._regenerate(user, command.thread_id, command.message_id)
        return await self.runs.operation(work, self._nobody_follows)

    async def _regenerate(
        self, user: str, thread_id: str, message_id: str | None
    ) -> Subscription | Queued:
        async def begin() -> Subscription:
            question = await self._preparation.question(user, thread_id, message_id)
            return await self._answer(user, question)

        async with self.runs.lock(user, thread_id):
            await self._preparation.question(user, thread_id, message_id)
            return await self._in_turn(user, thread_id, begin)

    async def _in_turn(
        self,
        user: str,
        thread_id: str,
        begin: Callable[[], Awaitable[Subscription]],
        command: SendMessage | None = None,
    ) -> Subscription | Queued:
        self.runs.admit_message()
        running = self.runs.active(user, thread_id)
        if running is not None or self.runs.queues.waiting(user, thread_id):
            if self._policy.on_busy == "reject":
                raise ThreadBusy
            if self._policy.on_busy == "queue":
                key = (command.id or "", command.fingerprint) if command else ("", "")
                queued = QueuedMessage(*key, begin)
                position = self.runs.queues.add(user, thread_id, queued)
                return Queued(thread_id, position, queued)
            if running is not None:
                await self.runs.stop(running, BY_NEW_MESSAGE)
        self.runs.admit(user)
        return await begin()

    async def _begin(self, user: str, thread_id: str, command: SendMessage) -> Subscription:
        message = self._preparation.message(thread_id, command)
        stored = (await self.storage.add_messages(user, [message], create=True))[0]
        if stored.run_id != message.run_id:  # another process was quicker
            self._retries.check(stored, command)
            known = await self._retries.subscription(user, stored)
            return known or await self._answer_again(user, stored, command)
        subscription = await self._answer(user, stored, command.history)
        if self._titles is not None and stored.position == 1:
            self._titles.make(user, stored)
        return subscription

    async def _answer_again(
        self, user: str, question: Message, command: SendMessage
    ) -> Subscription:
        """Answer a message that was stored, if its run was never begun or left nothing."""
        record = await self._retries.record(user, question)
        if record is not None and not record.orphaned:
            question, record = replace(question, run_id=new_id()), None
        return await self._answer(user, question, command.history, record)

    async def _answer(
        self,
        user: str,
        question: Message,
        history: Sequence[PastMessage] | None = None,
        orphan: RunRecord | None = None,
    ) -> Subscription:
        assert question.run_id is not None
        record = RunRecord(
            id=question.run_id,
            user=user,
            thread_id=question.thread_id,
            user_message_id=question.id,
            message_id=orphan.message_id if orphan else new_id(),
        )
        run_input = await self._preparation.run_input(record, question, history)
        await self.runs.begin(run_input)
        return Subscription(record)

    async def prepare(
        self, record: RunRecord, question: Message, leaf: str | None = None
    ) -> RunInput:
        """Return what a run needs to go on after the message ``leaf``. Raises ChatError."""
        return await self._preparation.run_input(record, question, leaf=leaf)

    async def resume(
        self, user: str, *, run_id: str | None, thread_id: str | None, after: int
    ) -> Subscription:
        """Find the run to follow.

        Raises:
            NotFound: The user has no such run or thread.
            NothingToResume: Nothing runs there, or nothing follows event ``after``.
        """
        if run_id is None:
            run = self.runs.active(user, thread_id or "")
            if run is None:
                await self.storage.thread(user, thread_id or "")
                raise NothingToResume("Nothing is running in this thread.")
            run_id = run.id
        record = await self._log.find(user, run_id=run_id)
        if record is None or (thread_id is not None and record.thread_id != thread_id):
            raise NotFound("There is no such run.")
        beyond = after >= record.last_seq if record.ended else after > record.last_seq
        if beyond:
            raise NothingToResume("Nothing follows that event.")
        if not record.kept:
            raise NothingToResume("The events of this run are not kept any more.")
        return Subscription(record, after)

    @contextmanager
    def watching(self, subscription: Subscription) -> Iterator[None]:
        """Count a follower for as long as its client is there."""
        record = subscription.record
        run = self.runs.get(record.user, record.id)
        if run is not None:
            run.followers += 1
        try:
            yield
        finally:
            if run is not None:
                run.followers -= 1
                self._followers_left(run)

    def _followers_left(self, run: Run | None) -> None:
        if run is not None and not run.followers and self._policy.on_disconnect == "stop":
            run.stop(BY_DISCONNECT)

    def follow(self, subscription: Subscription) -> AsyncGenerator[Sequence[Numbered], None]:
        """Yield the run's events, a page at a time, until its end."""
        if subscription.stored is not None:
            return _one_page(subscription.stored)
        return self._log.follow(subscription.record.id, subscription.after)

    async def stop(
        self, user: str, *, thread_id: str | None = None, run_id: str | None = None
    ) -> tuple[RunRecord, Numbered]:
        """Stop a run, wherever it was started, and return the event that says so.

        Raises:
            NotFound: The user has no such thread or run.
            NotRunning: Nothing runs there.
        """
        run = await self._to_stop(user, thread_id, run_id)
        if run_id is None and thread_id is not None:
            self.runs.queues.drop(user, thread_id)
        if run is not None:
            await self.runs.stop(run)
            if run.stopped is not None:
                return run.record, run.stopped
        raise NotRunning

    async def _to_stop(self, user: str, thread_id: str | None, run_id: str | None) -> Run | None:
        if run_id is not None:
            run = self.runs.get(user, run_id)
            known = run.record if run else await self._log.find(user, run_id=run_id)
            if known is None or (thread_id is not None and known.thread_id != thread_id):
                raise NotFound("There is no such run.")
            return run
        run = self.runs.active(user, thread_id or "")
        if run is None:
            await self.storage.thread(user, thread_id or "")
        return run

    def answer_call(self, user: str, run_id: str, call_id: str, reply: CallReply) -> None:
        """Hand in an approval or a client's tool result.

        Raises:
            NotFound: The user has no such run, or it does not wait for that.
        """
        run = self.runs.get(user, run_id)
        if run is None:
            raise NotFound("There is no such run that waits for an answer.")
        run.answer(call_id, reply)

    async def delete_thread(self, user: str, thread_id: str) -> None:
        """Stop what runs in a thread and delete all of it. Raises NotFound."""
        await self.runs.operation(self._delete_thread(user, thread_id))

    async def _delete_thread(self, user: str, thread_id: str) -> None:
        async with self.runs.lock(user, thread_id):
            self.runs.queues.drop(user, thread_id)
            if (run := self.runs.active(user, thread_id)) is not None:
                await self.runs.stop(run, BY_DELETION)
            await self.storage.delete_thread(user, thread_id)
            await self._log.forget(user, thread_id)

    async def forget_runs(self, user: str) -> None:
        """Stop every run of a user and delete the events of all of them."""
        await self.runs.stop_all(user)
        await self._log.forget(user)

    async def _forget(self, user: str, thread_id: str) -> bool:
        if self.runs.active(user, thread_id) is not None:
            return False
        try:
            await self.delete_thread(user, thread_id)
        except NotFound:
            pass
        return True

    def _new_thread_id(self, user: str, command: SendMessage) -> str:
        if command.id is None:
            return new_id()
        return derived_id("thread", user, command.id)


async def _one_page(page: Sequence[Numbered]) -> AsyncGenerator[Sequence[Numbered], None]:
    yield page
