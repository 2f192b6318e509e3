"""Recovery: runs that nobody drives any more are stored from the log, or continued.

Their process died, or the storage was away for too long, or their task was lost. Each record is
taken care of by itself, as often as it takes.
"""

from __future__ import annotations

import logging
from collections import Counter

from ..errors import ChatError, NotFound, RunError, StorageUnavailable, UnreadableLog
from .conversation import Conversation
from .events import End, Event, Failed
from .messages import Status, Usage
from .parts import Parts
from .ports import RunRecord, Window
from .run import DRAINED
from .run_state import RunState, replay
from .run_writer import RunWriter
from .runs import Runs

logger = logging.getLogger("quart_chat.recovery")

MAX_ATTEMPTS = 5
"""After so many unexpected failures a run is closed without its text."""


class Recovery:
    """Closes abandoned runs, and takes over those that wait for an approval."""

    def __init__(self, conversation: Conversation, runs: Runs, parts: Parts) -> None:
        self._conversation = conversation
        self._runs = runs
        self._log = parts.log
        self._storage = parts.storage
        self._attempts: Counter[str] = Counter()

    async def run(self) -> int:
        """Take care of every abandoned run once, and return how many are settled.

        Raises:
            StorageUnavailable: The log cannot be asked which there are.
        """
        count = 0
        failed: list[RunRecord] = []
        try:
            while records := await self._log.claim_abandoned():
                for record in records:
                    if await self._settle(record):
                        count += 1
                    else:
                        failed.append(record)
        finally:
            for record in failed:
                self._log.abandon(record.id)
        return count

    async def _settle(self, record: RunRecord) -> bool:
        async with self._runs.lock(record.user, record.thread_id):
            if self._runs.get(record.user, record.id) is not None:
                return True
            try:
                await self._rescue(record)
            except StorageUnavailable:
                return False
            except Exception as error:
                return await self._failed(record, error)
        self._attempts.pop(record.id, None)
        return True

    async def _failed(self, record: RunRecord, error: Exception) -> bool:
        self._attempts[record.id] += 1
        logger.error("run %s could not be recovered", record.id, exc_info=error)
        if not isinstance(error, UnreadableLog) and self._attempts[record.id] < MAX_ATTEMPTS:
            return False
        try:
            await self._close(record, RunState(), [], "interrupted")
        except ChatError:
            return False
        return True

    async def _rescue(self, record: RunRecord) -> None:
        state = await replay(self._log, record.id)
        if state.awaits_approval and state.end is None and await self._resume_run(record, state):
            return
        status: Status = state.end.status if state.end else "interrupted"
        if state.end is None and (ended := state.estimated_round()) is not None:
            state.take(self._log.append(record.id, [ended]), ended)
        writer = RunWriter(record, state, self._log, self._storage, patience=0)
        try:
            events = await writer.store_answer(status)
        except NotFound:  # the thread was deleted
            events = []
        await self._close(record, state, events, writer.answer_status or status)

    async def _close(
        self, record: RunRecord, state: RunState, events: list[Event], status: Status
    ) -> None:
        if state.end is None:
            if status == "interrupted":
                events = [Failed(**RunError(DRAINED, code="interrupted").to_dict()), *events]
            usage = state.usage if state.usage.completion_tokens else Usage(estimated=True)
            self._log.append(record.id, [*events, End(status, None, usage.to_dict())])
        await self._log.settle(record.id)

    async def _resume_run(self, record: RunRecord, state: RunState) -> bool:
        if self._runs.active(record.user, record.thread_id) is not None:
            return False  # the conversation has gone on without it
        window = Window(limit=1, order="desc", leaf=record.user_message_id)
        try:
            question = (await self._storage.messages(record.user, record.thread_id, window))[0]
            run_input = await self._conversation.prepare(record, question, leaf=state.parent_id)
        except StorageUnavailable:
            raise
        except ChatError as error:
            logger.warning("run %s cannot go on: %s", record.id, error.code)
            return False
        self._log.resume(record.id)
        self._runs.take_over(run_input, state)
        return True
