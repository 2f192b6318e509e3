"""The durable event log: subscribers read from memory, one task writes for all runs together."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field, replace

from ...core.events import Event, Numbered
from ...core.ports import RunRecord
from ...core.tail import Tail
from ...errors import NothingToResume, StorageUnavailable
from .batches import encode
from .connection import Database
from .event_store import HEARTBEAT_SECONDS, Batch, EventStore
from .ownership import claim_name, release_name

logger = logging.getLogger("quart_chat.event_log")

FLUSH_SECONDS = 0.2
"""What a killed process can lose at most; the protocol allows 0.25."""

LAST_ATTEMPTS = 3
"""How often a log that closes tries to write what is left."""

KEPT_BYTES = 512 * 1024
"""What stays in memory of a run, once it is written."""

MAX_HALF_OPEN = 10_000
"""Runs whose opening failed, so that nobody knows whether they are in the database."""

EXPIRED = "The events of this run are not kept any more."


@dataclass(eq=False)
class _Live:
    """A run of this process.

    ``abandoned`` if nobody drives it, ``unsettled`` if its end is not final yet, ``uncertain`` if
    the last write failed and may have been done all the same.
    """

    record: RunRecord
    tail: Tail = field(default_factory=Tail)
    written: int = 0
    dirty: bool = False
    abandoned: bool = False
    unsettled: bool = False
    uncertain: bool = False


class DatabaseEventLog:
    """Keeps events ``retention`` seconds after their run's end."""

    durable = True

    def __init__(self, database: Database, retention: float) -> None:
        self.on_available: Callable[[], None] = lambda: None
        self._owner = claim_name()
        self._store = EventStore(database, self._owner, retention)
        self._live: dict[str, _Live] = {}
        self._opening: set[str] = set()
        self._half_open: dict[str, None] = {}
        self._dirty: list[_Live] = []
        self._work = asyncio.Event()
        self._hurry = asyncio.Event()
        self._written: asyncio.Future[None] | None = None
        self._failures = 0
        self._closing = False
        self._writer: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to write in the background."""
        self._writer = asyncio.create_task(self._keep_writing(), name="quart_chat event log")

    async def close(self) -> None:
        """Write what is left, and leave to the next process the runs that did not end."""
        self._closing = True
        self._work.set()
        self._hurry.set()
        if self._writer is not None:
            await self._writer
        try:
            unwritten = [live.record.id for live in self._live.values() if live.dirty]
            await self._store.release(unwritten)
        except StorageUnavailable:
            logger.warning("the last events could not be written")
        for live in self._live.values():
            live.tail.close()
        release_name(self._owner)

    async def open(self, run: RunRecord, first: Sequence[Event] = ()) -> None:
        live = _Live(run)
        live.written = live.tail.append(first)
        self._opening.add(run.id)
        try:
            await self._store.begin(run, encode(live.tail.between(0, live.written)))
            self._live[run.id] = live
            self._half_open.pop(run.id, None)
        except BaseException:
            self._half_open[run.id] = None
            if len(self._half_open) > MAX_HALF_OPEN:
                del self._half_open[next(iter(self._half_open))]
            raise
        finally:
            self._opening.discard(run.id)
        self._work.set()

    def append(self, run_id: str, events: Sequence[Event]) -> int:
        live = self._live.get(run_id)
        if live is None:
            return 0
        if not live.dirty:
            self._mark(live)
        return live.tail.append(events)

    def _mark(self, live: _Live) -> None:
        live.dirty = True
        self._dirty.append(live)
        self._work.set()

    async def flush(self, run_id: str) -> None:
        live = self._live.get(run_id)
        if live is None:
            return
        upto = live.tail.last
        while live.written < upto and self._live.get(run_id) is live:
            if self._writer is None or self._writer.done():
                raise StorageUnavailable
            if self._written is None:
                self._written = asyncio.get_running_loop().create_future()
            self._work.set()
            self._hurry.set()
            await asyncio.shield(self._written)

    def abandon(self, run_id: str) -> None:
        if (live := self._live.get(run_id)) is not None:
            live.abandoned = live.unsettled = True

    def resume(self, run_id: str) -> None:
        if (live := self._live.get(run_id)) is not None:
            live.unsettled = False

    async def settle(self, run_id: str) -> None:
        await self.flush(run_id)
        await self._store.end(run_id)
        if (live := self._live.pop(run_id, None)) is not None:
            live.tail.close()

    async def _keep_writing(self) -> None:
        attempts = 0
        while not self._closing or (self._dirty and attempts < LAST_ATTEMPTS):
            attempts += self._closing
            await _wait(self._work, HEARTBEAT_SECONDS if self._live else None)
            if self._dirty:
                await _wait(self._hurry, self._pause())
            self._work.clear()
            self._hurry.clear()
            waiting, self._written = self._written, None
            try:
                await self._write()
            except StorageUnavailable as error:
                self._write_failed(waiting, error)
            except Exception:
                logger.exception("the event log could not be written")
                self._write_failed(waiting, StorageUnavailable())
            except asyncio.CancelledError:
                task = asyncio.current_task()
                self._write_failed(waiting, StorageUnavailable())
                if task is None or task.cancelling():
                    raise
            else:
                failures, self._failures = self._failures, 0
                _settle(waiting, None)
                if failures:
                    self.on_available()
        _settle(self._written, StorageUnavailable())

    def _write_failed(self, waiting: asyncio.Future[None] | None, error: Exception) -> None:
        self._failures += 1
        self._work.set()
        _settle(waiting, error)

    def _pause(self) -> float:
        if self._closing:
            return FLUSH_SECONDS
        return min(FLUSH_SECONDS * 2.0 ** min(self._failures, 10), HEARTBEAT_SECONDS)

    async def _write(self) -> None:
        """Write what all runs have said since the last time."""
        taken, self._dirty = self._dirty, []
        for live in taken:
            live.dirty = False
        try:
            batches = [self._batch(live, live.tail.ended and not live.unsettled) for live in taken]
            if batches or (self._live and self._store.heartbeat_is_due):
                await self._store.write(batches)
        except BaseException:
            for live in taken:
                live.uncertain = True
                if not live.dirty:
                    self._mark(live)
            raise
        for live, batch in zip(taken, batches, strict=True):
            live.written, live.uncertain = batch.upto, False
            if batch.ended and live.tail.last == batch.upto:
                self._live.pop(batch.run_id, None)
            else:
                live.tail.trim(batch.upto, KEPT_BYTES)

    def _batch(self, live: _Live, ended: bool) -> Batch:
        after, upto = live.written, live.tail.last
        rows = encode(live.tail.between(after, upto))
        return Batch(live.record.id, after, rows, upto, ended, live.uncertain)

    async def follow(
        self, run_id: str, after: int, *, wait: bool = True
    ) -> AsyncGenerator[Sequence[Numbered], None]:
        live = self._live.get(run_id)
        while True:
            if live is not None and after + 1 >= live.tail.first:
                tail = live.tail
                if after < tail.last:
                    page = tail.after(after)
                    after = page[-1][0]
                    yield page
                elif tail.ended or not wait:
                    return
                else:
                    await tail.more(after)
            elif pages := await self._store.read(run_id, after):
                after = pages[-1][0]
                yield pages
            elif live is not None:
                after = live.tail.first - 1
            else:  # it has ended, or another process drives it
                over = await self._is_over(run_id) or not wait
                if not over:
                    await asyncio.sleep(FLUSH_SECONDS)
                elif not await self._store.read(run_id, after):  # nothing came meanwhile
                    return

    async def _is_over(self, run_id: str) -> bool:
        row = await self._store.run(run_id)
        if row is None or (row["ended_at"] is not None and not row["has_events"]):
            raise NothingToResume(EXPIRED)
        return row["ended_at"] is not None

    async def find(
        self, user: str, *, run_id: str | None = None, thread_id: str | None = None
    ) -> RunRecord | None:
        live = self._live.get(run_id or "")
        if live is not None:
            record = live.record
            if record.user != user or thread_id not in (None, record.thread_id):
                return None
        else:
            found = await self._store.find(user, run_id, thread_id)
            if found is None:
                return None
            record = found
            live = self._live.get(record.id)
            if live is None:
                orphaned = record.id in self._half_open and not record.ended
                return replace(record, orphaned=orphaned)
        return replace(record, ended=live.tail.ended, last_seq=live.tail.last)

    async def claim_abandoned(self) -> Sequence[RunRecord]:
        records = []
        for live in self._live.values():
            if live.abandoned:
                live.abandoned = False
                records.append(replace(live.record, ended=live.tail.ended, last_seq=live.tail.last))
        if records:
            return records
        for record, last in await self._store.claim({*self._live, *self._opening}):
            if record.id in self._live or record.id in self._opening:
                continue  # it was born while the store looked
            live = self._live[record.id] = _Live(record)
            live.tail.first = last + 1
            live.written = last
            records.append(record)
        return records

    async def forget(self, user: str, thread_id: str | None = None) -> None:
        for run_id, live in list(self._live.items()):
            if live.record.user == user and thread_id in (None, live.record.thread_id):
                del self._live[run_id]
                live.tail.close()
        await self._store.forget(user, thread_id)

    async def expire(self) -> int:
        return await self._store.expire()


async def _wait(event: asyncio.Event, seconds: float | None) -> None:
    try:
        async with asyncio.timeout(seconds):
            await event.wait()
    except TimeoutError:
        pass


def _settle(waiting: asyncio.Future[None] | None, error: Exception | None) -> None:
    if waiting is None or waiting.done():
        return
    if error is None:
        waiting.set_result(None)
    else:
        waiting.set_exception(error)
        waiting.exception()
