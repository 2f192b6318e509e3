"""The use cases: send, answer again, stop, follow, delete. May this user? What happens next?"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, replace

from ..errors import (
    IdConflict,
    InvalidMessage,
    NotFound,
    NothingToResume,
    NotRunning,
    ThreadBusy,
    UnsupportedField,
)
from .commands import PastMessage, Regenerate, SendMessage, plain_content
from .events import ContentDelta, End, MessageStored, Numbered, Start
from .messages import Message, derived_id, history_for_provider, new_id
from .models import ModelRegistry
from .policy import Policy
from .ports import EventLog, RunRecord, Storage, Window
from .run import Run, RunInput
from .runs import QueuedMessage, Runs, Subscription
from .thread_expiry import ThreadExpiry
from .titles import TitleMaker
from .tool_executor import CallReply, Toolbox
from .tools import ToolRegistry

BY_NEW_MESSAGE = "Generation stopped by a new message"
BY_DELETION = "Generation stopped: the thread was deleted"
BY_DISCONNECT = "Generation stopped: the client disconnected"
PATH_PAGE = 200


@dataclass(frozen=True)
class Queued:
    """A message that waits for the running one to end."""

    thread_id: str
    position: int
    waiting: QueuedMessage

    async def started(self) -> Subscription | None:
        """The run, once it has begun, or None where the queue was dropped."""
        return await asyncio.shield(self.waiting.started)


class Conversation:
    """What clients can do, whatever transport they speak."""

    def __init__(
        self,
        storage: Storage,
        log: EventLog,
        models: ModelRegistry,
        tools: ToolRegistry,
        runs: Runs,
        policy: Policy,
        titles: TitleMaker | None = None,
    ) -> None:
        self.storage = storage
        self.models = models
        self.runs = runs
        self._log = log
        self._tools = tools
        self._policy = policy
        self._titles = titles
        forgetful = policy.forget_after_window
        self.expiry = ThreadExpiry(policy.resume_window, self._forget) if forgetful else None

    def active_run_id(self, user: str, thread_id: str) -> str | None:
        """The id of the thread's running run."""
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
        self._choose(user, command)
        thread_id = command.thread_id or self._new_thread_id(user, command)
        async with self.runs.lock(user, thread_id):
            if command.id is not None:
                known = await self._known(user, thread_id, command)
                if known is not None:
                    return known

            async def begin() -> Subscription:
                return await self._begin(user, thread_id, command)

            return await self._in_turn(
                user, thread_id, command.id or "", command.fingerprint(), begin
            )

    async def regenerate(self, user: str, command: Regenerate) -> Subscription | Queued:
        """Answer a message again.

        Raises:
            NotFound: The user has no such thread or message.
        """
        thread_id = command.thread_id

        async def begin() -> Subscription:
            question = await self._question(user, thread_id, command.message_id)
            return await self._answer(user, replace(question, run_id=new_id()), None)

        async with self.runs.lock(user, thread_id):
            await self._question(user, thread_id, command.message_id)
            return await self._in_turn(user, thread_id, "", "", begin)

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
        if record.ended and not await self._kept(record.id, after):
            raise NothingToResume("The events of this run are not kept any more.")
        return Subscription(record, after)

    @contextmanager
    def watching(self, following: Subscription) -> Iterator[None]:
        """Count a follower for as long as its client is there."""
        record = following.record
        run = self.runs.get(record.user, record.id)
        if run is not None:
            run.followers += 1
        try:
            yield
        finally:
            if run is not None:
                run.followers -= 1
                if not run.followers and self._policy.on_disconnect == "stop":
                    run.stop(BY_DISCONNECT)

    def follow(self, following: Subscription) -> AsyncGenerator[Sequence[Numbered], None]:
        """The run's events, a page at a time, until its end."""
        if following.stored is not None:
            return _one_page(following.stored)
        return self._log.follow(following.record.id, following.after)

    async def stop(
        self, user: str, *, thread_id: str | None = None, run_id: str | None = None
    ) -> tuple[RunRecord, Numbered]:
        """Stop a run, wherever it was started, and give the event that says so.

        Raises:
            NotFound: The user has no such thread or run.
            NotRunning: Nothing runs there.
        """
        run = await self._to_stop(user, thread_id, run_id)
        if run_id is None and thread_id is not None:
            self.runs.drop_queue(user, thread_id)
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
        async with self.runs.lock(user, thread_id):
            self.runs.drop_queue(user, thread_id)
            if (run := self.runs.active(user, thread_id)) is not None:
                await self.runs.stop(run, BY_DELETION)
            await self.storage.delete_thread(user, thread_id)
            await self._log.forget(user, thread_id)

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

    def _choose(self, user: str, command: SendMessage) -> Toolbox:
        self.models.choose(command.provider, command.model)
        bound = self._policy.max_tokens
        if bound is not None and (command.max_tokens or 0) > bound:
            raise InvalidMessage(f"max_tokens: at most {bound} are allowed here.")
        tools = self._tools.choose(user, command.tools or ())
        names = {tool.name for tool in tools}
        for client_tool in command.client_tools or ():
            if client_tool.name in names:
                raise InvalidMessage(f"client_tools: {client_tool.name!r} is a server's tool.")
        return Toolbox(tools)

    async def _in_turn(
        self,
        user: str,
        thread_id: str,
        message_id: str,
        fingerprint: str,
        begin: Callable[[], Awaitable[Subscription]],
    ) -> Subscription | Queued:
        self.runs.admit_message()
        running = self.runs.active(user, thread_id)
        if running is None and not self.runs.has_queue(user, thread_id):
            self.runs.admit(user)
            return await begin()
        if self._policy.on_busy == "reject":
            raise ThreadBusy
        if self._policy.on_busy == "queue":
            waiting = QueuedMessage(message_id, fingerprint, begin)
            position = self.runs.enqueue(user, thread_id, waiting)
            return Queued(thread_id, position, waiting)
        if running is not None:
            await self.runs.stop(running, BY_NEW_MESSAGE)
        self.runs.admit(user)
        return await begin()

    async def _known(
        self, user: str, thread_id: str, command: SendMessage
    ) -> Subscription | Queued | None:
        assert command.id is not None
        if (queued := self.runs.queued(user, thread_id, command.id)) is not None:
            waiting, position = queued
            if waiting.fingerprint != command.fingerprint():
                raise IdConflict
            return Queued(thread_id, position, waiting)
        window = Window(limit=1, order="desc", leaf=command.id)
        try:
            stored = (await self.storage.messages(user, thread_id, window))[0]
        except NotFound:
            return None
        return await self._attached(user, stored, command)

    async def _attached(self, user: str, stored: Message, command: SendMessage) -> Subscription:
        fingerprint = stored.options.get("fingerprint")
        if stored.role != "user" or fingerprint != command.fingerprint():
            raise IdConflict("This message id was used with other content. Use a new id.")
        record = await self._log.find(user, run_id=stored.run_id)
        if record is None:
            self.runs.admit(user)
            return await self._answer(user, stored, command.history)
        if not record.ended or await self._kept(record.id, 0):
            return Subscription(record)
        return await self._stored_answer(user, stored, record)

    async def _kept(self, run_id: str, after: int) -> bool:
        try:
            async with aclosing(self._log.follow(run_id, after, wait=False)) as pages:
                async for _ in pages:
                    return True
        except NothingToResume:
            pass
        return False

    async def _stored_answer(self, user: str, question: Message, record: RunRecord) -> Subscription:
        """The answer as four events, where its own events are not kept any more."""
        window = Window(limit=1, order="desc", leaf=record.message_id)
        answer = (await self.storage.messages(user, record.thread_id, window))[0]
        start = Start(
            answer.id, question.id, question.parent_id, answer.model or "", answer.provider or ""
        )
        text = answer.content if isinstance(answer.content, str) else ""
        usage = answer.usage or {}
        events = (
            start,
            ContentDelta(text),
            MessageStored.of(answer),
            End(answer.status, "stop" if answer.status == "completed" else None, usage),
        )
        return Subscription(record, stored=tuple(enumerate(events, 1)))

    async def _begin(self, user: str, thread_id: str, command: SendMessage) -> Subscription:
        source, model = self.models.choose(command.provider, command.model)
        message = Message(
            id=command.id or new_id(),
            thread_id=thread_id,
            role="user",
            content=command.plain,
            parent_id=command.parent_id,
            run_id=new_id(),
            model=model,
            provider=source.name,
            metadata=command.metadata or {},
            options={**command.options(), "fingerprint": command.fingerprint()},
        )
        stored = (await self.storage.add_messages(user, [message], create=True))[0]
        if stored.run_id != message.run_id:
            return await self._attached(user, stored, command)
        following = await self._answer(user, stored, command.history)
        if self._titles is not None and stored.position == 1:
            self._titles.make(user, stored)
        return following

    async def _answer(
        self, user: str, question: Message, history: Sequence[PastMessage] | None
    ) -> Subscription:
        assert question.run_id is not None
        record = RunRecord(
            id=question.run_id,
            user=user,
            thread_id=question.thread_id,
            user_message_id=question.id,
            message_id=new_id(),
        )
        run_input = await self.prepare(record, question, history)
        await self._log.open(record, [run_input.first_event()])
        run = Run(run_input, self._log, self.storage, self._policy)
        self.runs.add(run)
        run.start()
        return Subscription(record)

    async def prepare(
        self,
        record: RunRecord,
        question: Message,
        history: Sequence[PastMessage] | None = None,
        leaf: str | None = None,
    ) -> RunInput:
        """Everything that a run needs to answer a stored question."""
        source, model = self.models.choose(question.provider, question.model)
        options = {k: v for k, v in question.options.items() if k != "fingerprint"}
        tools = self._tools.choose(record.user, options.pop("tools", ()))
        return RunInput(
            record=record,
            question=question,
            provider_name=source.name,
            provider=source.provider,
            model=model,
            transcript=await self._transcript(record, question, history, leaf),
            toolbox=Toolbox(tools, options.pop("client_tools", ())),
            options=options,
        )

    async def _transcript(
        self,
        record: RunRecord,
        question: Message,
        history: Sequence[PastMessage] | None,
        leaf: str | None,
    ) -> list[Message]:
        if history is not None:
            past = [_past(message, question.thread_id) for message in history]
            newest = [*past, question][-self._policy.history_messages :]
        elif leaf is None and question.parent_id is None:
            newest = [question]
        else:
            window = Window(
                limit=self._policy.history_messages, order="desc", leaf=leaf or question.id
            )
            found = await self.storage.messages(record.user, record.thread_id, window)
            newest = list(reversed(found))
        return history_for_provider(newest, self._policy.history_chars)

    async def _question(self, user: str, thread_id: str, message_id: str | None) -> Message:
        """The user's message that led to a message: the nearest one on the way to the root."""
        leaf = message_id
        while True:
            window = Window(limit=PATH_PAGE, order="desc", leaf=leaf)
            path = await self.storage.messages(user, thread_id, window)
            for message in path:
                if message.role == "user":
                    return message
            if not path or path[-1].parent_id is None:
                raise NotFound("There is no user's message to answer again.")
            leaf = path[-1].parent_id


async def _one_page(page: Sequence[Numbered]) -> AsyncGenerator[Sequence[Numbered], None]:
    yield page


def _past(message: PastMessage, thread_id: str) -> Message:
    return Message(
        id=new_id(),
        thread_id=thread_id,
        role=message.role,
        content=plain_content(message.content or ""),
        tool_calls=message.calls,
        tool_call_id=message.tool_call_id,
        name=message.name,
    )
