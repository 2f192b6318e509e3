"""What becomes of runs whose process died: rescued from the log, or continued where they waited."""

from __future__ import annotations

import logging

from ..errors import ChatError, NotFound, RunError
from .conversation import Conversation
from .draft import Draft, final_answer, fold, tool_unit, unfinished
from .events import End, Event, Failed, MessageStored
from .limits import Limits
from .messages import Message, Status, Usage
from .ports import EventLog, RunRecord, Storage, Window
from .run import DRAINED, Run
from .runs import Runs

logger = logging.getLogger("quart_chat.recovery")


class Recovery:
    """Closes abandoned runs, and takes over those that wait for a person."""

    def __init__(
        self,
        conversation: Conversation,
        runs: Runs,
        log: EventLog,
        storage: Storage,
        limits: Limits,
    ) -> None:
        self._conversation = conversation
        self._runs = runs
        self._log = log
        self._storage = storage
        self._limits = limits

    async def run(self) -> int:
        """Take care of every abandoned run, and count them."""
        count = 0
        while records := await self._log.abandoned():
            for record in records:
                await self._rescue(record)
            count += len(records)
        return count

    async def _rescue(self, record: RunRecord) -> None:
        draft = await fold(self._log, record.id, 0)
        if draft.awaits_approval and await self._goes_on(record, draft):
            return
        status: Status
        try:
            stored, status = await self._store(record, draft)
        except NotFound:
            stored, status = [], "interrupted"
        events: list[Event] = []
        if status == "interrupted":
            events.append(Failed(**RunError(DRAINED, code="interrupted").as_json()))
        usage = (stored[-1].usage if stored else None) or Usage(estimated=True).as_json()
        events += [MessageStored.of(message) for message in stored]
        events.append(End(status, None, usage))
        self._log.append(record.id, events)
        await self._log.flush(record.id)

    async def _store(self, record: RunRecord, draft: Draft) -> tuple[list[Message], Status]:
        parent_id = draft.parent_id or record.user_message_id
        usage = Usage(0, -(-sum(map(len, draft.texts)) // 4), estimated=True)
        told = {
            "model": draft.start.model if draft.start else None,
            "provider": draft.start.provider if draft.start else None,
            "status": "interrupted",
            "usage": usage.as_json(),
        }
        messages: list[Message] = []
        if draft.calls:
            self._log.append(record.id, unfinished(draft.missing))
            messages = tool_unit(draft, record, parent_id, told)
            parent_id, draft = messages[-1].id, Draft()
        messages.append(final_answer(draft, record, parent_id, told))
        stored = await self._storage.add_messages(record.user, messages)
        return list(stored), stored[-1].status

    async def _goes_on(self, record: RunRecord, draft: Draft) -> bool:
        window = Window(limit=1, order="desc", leaf=record.user_message_id)
        try:
            question = (await self._storage.messages(record.user, record.thread_id, window))[0]
            turn = await self._conversation.turn(record, question, leaf=draft.parent_id)
        except ChatError as error:
            logger.warning("run %s can not go on: %s", record.id, error.code)
            return False
        run = Run(turn, self._log, self._storage, self._limits)
        self._runs.add(run)
        run.go_on(draft)
        return True
