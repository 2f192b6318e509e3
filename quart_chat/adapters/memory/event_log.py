"""Event log in memory, bounded: the reference implementation."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field, replace

from ...core.events import Event, Numbered
from ...core.ports import RunRecord
from ...core.tail import Tail
from ...errors import NothingToResume

MAX_LOG_BYTES = 64 * 1024 * 1024
"""All event logs together take about so much; beyond it the logs that ended first go."""

MAX_EXPIRED = 100_000
"""Runs that are still known after their events have gone."""

EXPIRED = "The events of this run are not kept any more."


@dataclass
class _Log:
    record: RunRecord
    tail: Tail = field(default_factory=Tail)
    ended_at: float = 0.0
    abandoned: bool = False
    unsettled: bool = False


class MemoryEventLog:
    """The events of runs of this process, kept for ``retention`` seconds after their end."""

    durable = False

    def __init__(self, retention: float, max_bytes: int = MAX_LOG_BYTES) -> None:
        self.on_available: Callable[[], None] = lambda: None
        self._retention = retention
        self._max_bytes = max_bytes
        self._logs: dict[str, _Log] = {}
        self._expired: OrderedDict[str, RunRecord] = OrderedDict()
        self._ended: OrderedDict[str, _Log] = OrderedDict()
        self._bytes = 0

    async def open(self, run: RunRecord, first: Sequence[Event] = ()) -> None:
        self._logs[run.id] = _Log(run)
        self.append(run.id, first)

    def append(self, run_id: str, events: Sequence[Event]) -> int:
        log = self._logs.get(run_id)
        if log is None:
            return 0
        before = log.tail.size
        seq = log.tail.append(events)
        self._bytes += log.tail.size - before
        if log.tail.ended and not log.unsettled:
            self._end(log)
        while self._bytes > self._max_bytes and self._ended:
            self._drop(next(iter(self._ended)))
        return seq

    def _end(self, log: _Log) -> None:
        log.ended_at = time.monotonic()
        self._ended[log.record.id] = log

    async def flush(self, run_id: str) -> None:
        """Return at once: nothing in memory is durable."""

    def abandon(self, run_id: str) -> None:
        if (log := self._logs.get(run_id)) is not None:
            log.abandoned = log.unsettled = True

    def resume(self, run_id: str) -> None:
        if (log := self._logs.get(run_id)) is not None:
            log.unsettled = False

    async def settle(self, run_id: str) -> None:
        if (log := self._logs.get(run_id)) is not None:
            log.unsettled = False
            self._end(log)

    async def follow(
        self, run_id: str, after: int, *, wait: bool = True
    ) -> AsyncGenerator[Sequence[Numbered], None]:
        if (log := self._logs.get(run_id)) is None:
            raise NothingToResume(EXPIRED)
        tail = log.tail
        while True:
            if after < tail.last:
                page = tail.after(after)
                after = page[-1][0]
                yield page
            elif tail.ended or not wait:
                return
            else:
                await tail.more(after)

    async def find(
        self, user: str, *, run_id: str | None = None, thread_id: str | None = None
    ) -> RunRecord | None:
        if run_id is not None:
            found = [self._record(run_id)]
        else:
            found = [self._record(each) for each in [*self._expired, *self._logs]]
        mine = [
            record
            for record in found
            if record is not None
            and record.user == user
            and (thread_id is None or record.thread_id == thread_id)
        ]
        return mine[-1] if mine else None

    def _record(self, run_id: str) -> RunRecord | None:
        if (log := self._logs.get(run_id)) is None:
            return self._expired.get(run_id)
        return replace(log.record, ended=log.tail.ended, last_seq=log.tail.last)

    async def claim_abandoned(self) -> Sequence[RunRecord]:
        claimed = [log for log in self._logs.values() if log.abandoned]
        for log in claimed:
            log.abandoned = False
        return [
            replace(log.record, ended=log.tail.ended, last_seq=log.tail.last) for log in claimed
        ]

    async def forget(self, user: str, thread_id: str | None = None) -> None:
        for run_id in [*self._expired, *self._logs]:
            record = self._record(run_id)
            if record is None or record.user != user:
                continue
            if thread_id in (None, record.thread_id):
                self._drop(run_id)
                self._expired.pop(run_id, None)

    async def expire(self) -> int:
        count, before = 0, time.monotonic() - self._retention
        while self._ended and next(iter(self._ended.values())).ended_at < before:
            self._drop(next(iter(self._ended)))
            count += 1
        return count

    def _drop(self, run_id: str) -> None:
        record = self._record(run_id)
        self._ended.pop(run_id, None)
        if (log := self._logs.pop(run_id, None)) is not None and record is not None:
            self._bytes -= log.tail.size
            log.tail.close()
            self._expired[run_id] = replace(record, kept=False)
            if len(self._expired) > MAX_EXPIRED:
                self._expired.popitem(last=False)
