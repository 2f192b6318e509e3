"""Writer of a run's messages: what the log has and the storage has not becomes stored messages."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

from ..errors import StorageUnavailable
from .events import Event, MessageStored
from .messages import Message, Status
from .ports import EventLog, RunRecord, Storage
from .run_state import (
    RunState,
    final_answer,
    message_fields,
    missing_results,
    replay,
    tool_messages,
)

T = TypeVar("T")

FIRST_RETRY = 0.05
"""Seconds before a failed write is tried again; doubled each time."""


class RunWriter:
    """Stores the messages of one run; ``state`` is the run's as of the last one stored."""

    def __init__(
        self, record: RunRecord, state: RunState, log: EventLog, storage: Storage, patience: float
    ) -> None:
        self.state = state
        self.answer_status: Status | None = None
        self._record = record
        self._log = log
        self._storage = storage
        self._patience = patience

    @property
    def parent_id(self) -> str:
        """The message that the next one continues from."""
        return self.state.parent_id or self._record.user_message_id

    async def replayed(self) -> RunState:
        """Return the state after all events so far. Raises StorageUnavailable."""
        return await self.patiently(lambda: replay(self._log, self._record.id, self.state))

    async def store_calls(self, status: Status = "completed") -> list[Message]:
        """Store the assistant's message with its calls and their results, as one unit.

        Raises:
            NotFound: The thread was deleted.
            StorageUnavailable: Also after ``patience`` seconds of trying.
        """
        state = await self.replayed()
        fields = message_fields(state, status)
        unit = tool_messages(state, self._record, self.parent_id, fields)
        stored = await self._store(unit)
        self.state = state.after()
        self.state.parent_id = stored[-1].id
        return list(stored)

    async def store_answer(self, status: Status) -> list[Event]:
        """Store what the run has said, and return the events that the log lacks.

        Calls whose results are missing get one that says so. Raises as ``store_calls``.
        """
        events: list[Event] = []
        state = await self.replayed()
        if state.answer_status is not None:
            self.answer_status = state.answer_status
            return events
        if state.calls:
            if state.end is None:
                self._log.append(self._record.id, missing_results(state.missing))
            events += map(MessageStored.from_message, await self.store_calls(status))
            state = self.state
        answer = final_answer(state, self._record, self.parent_id, message_fields(state, status))
        stored = await self._store([answer])
        self.answer_status = stored[0].status
        return [*events, *map(MessageStored.from_message, stored)]

    async def _store(self, messages: Sequence[Message]) -> Sequence[Message]:
        async def store() -> Sequence[Message]:
            await self._log.flush(self._record.id)
            return await self._storage.add_messages(self._record.user, messages)

        return await self.patiently(store)

    async def patiently(self, attempt: Callable[[], Awaitable[T]]) -> T:
        """Try again, ever more rarely, while the storage is unavailable."""
        loop = asyncio.get_running_loop()
        until, pause = loop.time() + self._patience, FIRST_RETRY
        while True:
            try:
                return await attempt()
            except StorageUnavailable:
                if loop.time() + pause > until:
                    raise
            await asyncio.sleep(pause)
            pause *= 2
