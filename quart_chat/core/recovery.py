"""What becomes of runs whose process died: rescued from the log, or continued where they waited."""

from __future__ import annotations

import logging

from ..errors import ChatError, NotFound, RunError
from .conversation import Conversation
from .events import End, Event, Failed, MessageStored
from .messages import Message, Status, Usage
from .policy import Policy
from .ports import EventLog, RunRecord, Storage, Window
from .run import DRAINED, Run
from .run_state import RunState, final_answer, missing_results, replay, tool_messages
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
        policy: Policy,
    ) -> None:
        self._conversation = conversation
        self._runs = runs
        self._log = log
        self._storage = storage
        self._policy = policy

    async def run(self) -> int:
        """Take care of every abandoned run, and count them."""
        count = 0
        while records := await self._log.claim_abandoned():
            for record in records:
                await self._rescue(record)
            count += len(records)
        return count

    async def _rescue(self, record: RunRecord) -> None:
        state = await replay(self._log, record.id, 0)
        if state.awaits_approval and await self._resume_run(record, state):
            return
        status: Status
        try:
            stored, status = await self._store(record, state)
        except NotFound:
            stored, status = [], "interrupted"
        events: list[Event] = []
        if status == "interrupted":
            events.append(Failed(**RunError(DRAINED, code="interrupted").to_dict()))
        usage = (stored[-1].usage if stored else None) or Usage(estimated=True).to_dict()
        events += [MessageStored.of(message) for message in stored]
        events.append(End(status, None, usage))
        self._log.append(record.id, events)
        await self._log.flush(record.id)

    async def _store(self, record: RunRecord, state: RunState) -> tuple[list[Message], Status]:
        parent_id = state.parent_id or record.user_message_id
        usage = Usage(0, -(-sum(map(len, state.texts)) // 4), estimated=True)
        told = {
            "model": state.start.model if state.start else None,
            "provider": state.start.provider if state.start else None,
            "status": "interrupted",
            "usage": usage.to_dict(),
        }
        messages: list[Message] = []
        if state.calls:
            self._log.append(record.id, missing_results(state.missing))
            messages = tool_messages(state, record, parent_id, told)
            parent_id, state = messages[-1].id, RunState()
        messages.append(final_answer(state, record, parent_id, told))
        stored = await self._storage.add_messages(record.user, messages)
        return list(stored), stored[-1].status

    async def _resume_run(self, record: RunRecord, state: RunState) -> bool:
        window = Window(limit=1, order="desc", leaf=record.user_message_id)
        try:
            question = (await self._storage.messages(record.user, record.thread_id, window))[0]
            turn = await self._conversation.prepare(record, question, leaf=state.parent_id)
        except ChatError as error:
            logger.warning("run %s can not go on: %s", record.id, error.code)
            return False
        run = Run(turn, self._log, self._storage, self._policy)
        self._runs.add(run)
        run.go_on(state)
        return True
