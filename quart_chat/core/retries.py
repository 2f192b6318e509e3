"""Safe retry: a message id that was used before finds the run that it started."""

from __future__ import annotations

from ..errors import IdConflict, NotFound
from .commands import SendMessage
from .events import ContentDelta, End, MessageStored, Start
from .messages import Message, Usage
from .parts import Parts
from .ports import RunRecord, Window
from .queues import QueuedMessage
from .runs import Runs
from .subscription import Subscription

TAKEN = "This message id was used with other content. Use a new id."


class Retries:
    """Finds what became of a message that was sent before."""

    def __init__(self, parts: Parts, runs: Runs) -> None:
        self._storage = parts.storage
        self._log = parts.log
        self._runs = runs

    def queued(
        self, user: str, thread_id: str, command: SendMessage
    ) -> tuple[QueuedMessage, int] | None:
        """Return the message if it waits still, and its position. Raises IdConflict."""
        found = self._runs.queues.find(user, thread_id, command.id or "")
        if found is not None and found[0].fingerprint != command.fingerprint:
            raise IdConflict(TAKEN)
        return found

    async def stored(self, user: str, thread_id: str, command: SendMessage) -> Message | None:
        """Return the message if it is stored. Raises IdConflict."""
        window = Window(limit=1, order="desc", leaf=command.id)
        try:
            message = (await self._storage.messages(user, thread_id, window))[0]
        except NotFound:
            return None
        self.check(message, command)
        return message

    def check(self, stored: Message, command: SendMessage) -> None:
        """Compare a stored message with the one that was sent. Raises IdConflict."""
        fingerprint = stored.options.get("fingerprint")
        if stored.role != "user" or fingerprint != command.fingerprint:
            raise IdConflict(TAKEN)

    async def record(self, user: str, question: Message) -> RunRecord | None:
        """Return the run that answers a stored message; None if none was ever begun."""
        return await self._log.find(user, run_id=question.run_id)

    async def subscription(self, user: str, question: Message) -> Subscription | None:
        """Return what follows a message's run from its start.

        None if there is no such run, nobody drives it, or nothing of its answer is kept.
        """
        record = await self.record(user, question)
        return None if record is None else await self._following(user, question, record)

    async def _following(
        self, user: str, question: Message, record: RunRecord
    ) -> Subscription | None:
        if record.orphaned:
            return None
        if record.kept:
            return Subscription(record)
        try:
            return await self._stored_answer(user, question, record)
        except NotFound:
            pass
        newest = await self._log.find(user, thread_id=question.thread_id)
        if newest is None or newest.user_message_id != question.id or newest.id == record.id:
            return None
        return await self._following(user, question, newest)

    async def _stored_answer(self, user: str, question: Message, record: RunRecord) -> Subscription:
        """Play the answer as four events, if its own events are not kept any more."""
        window = Window(limit=1, order="desc", leaf=record.message_id)
        answer = (await self._storage.messages(user, record.thread_id, window))[0]
        start = Start(
            answer.id, question.id, question.parent_id, answer.model or "", answer.provider or ""
        )
        text = answer.content if isinstance(answer.content, str) else ""
        events = (
            start,
            ContentDelta(text),
            MessageStored.from_message(answer),
            End(
                answer.status,
                "stop" if answer.status == "completed" else None,
                answer.usage or Usage().to_dict(),
            ),
        )
        return Subscription(record, stored=tuple(enumerate(events, 1)))
