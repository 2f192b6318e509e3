"""The durable event log: followers read from memory, one task writes for all runs together."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ...core.events import Event, Numbered, merge
from ...core.messages import now
from ...core.ports import RunRecord
from ...core.tail import Tail
from ...errors import NothingToResume, StorageUnavailable
from .batches import decode, encode
from .connection import Database, inside
from .ownership import HEARTBEAT_SECONDS, claim_name, is_dead, release_name
from .rows import micros

logger = logging.getLogger("quart_chat.event_log")

FLUSH_SECONDS = 0.2
"""What a killed process can lose at most; the protocol allows 0.25."""

KEPT_CHARS = 512 * 1024
PAGE_BYTES = 256 * 1024
PAGE_ROWS = 500
SWEEP_RUNS = 100
CLAIMED_RUNS = 100

INTO_EVENTS = "INSERT INTO chat_events (run_id, last_seq, data)"

CRASH_GAP = 1_000_000
"""Above every number that a dead process can have sent and not have written."""


@dataclass(eq=False)
class _Live:
    record: RunRecord
    tail: Tail = field(default_factory=Tail)
    written: int = 0
    dirty: bool = False


class DatabaseEventLog:
    """Keeps events ``retention`` seconds after their run's end."""

    durable = True

    def __init__(self, database: Database, retention: float) -> None:
        self._database = database
        self._retention = retention
        self._owner = claim_name()
        self._live: dict[str, _Live] = {}
        self._dirty: list[_Live] = []
        self._work = asyncio.Event()
        self._hurry = asyncio.Event()
        self._written: asyncio.Future[None] | None = None
        self._signed_at = 0.0
        self._failures = 0
        self._closing = False
        self._writer: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to write in the background."""
        self._writer = asyncio.create_task(self._write_for_ever(), name="quart_chat event log")

    async def close(self) -> None:
        """Write what is left, and leave to the next process the runs that did not end."""
        self._closing = True
        self._work.set()
        self._hurry.set()
        if self._writer is not None:
            await self._writer
        try:
            await self._release()
        except StorageUnavailable:
            logger.warning("the last events could not be written")
        for live in self._live.values():
            live.tail.close()
        release_name(self._owner)

    @inside
    async def _release(self) -> None:
        await self._database.execute(
            "UPDATE chat_runs SET owner = '' WHERE owner = ? AND ended_at IS NULL", self._owner
        )

    async def open(self, run: RunRecord, first: Sequence[Event] = ()) -> None:
        live = _Live(run)
        live.written = live.tail.append(first)
        await self._open(run, encode(live.tail.between(0, live.written)))
        self._live[run.id] = live
        self._work.set()

    @inside
    async def _open(self, run: RunRecord, rows: Sequence[tuple[int, bytes]]) -> None:
        moment = micros(now())
        async with self._database.transaction():
            await self._database.fetch(
                "INSERT INTO chat_runs (id, user_id, thread_id, user_message_id, message_id, "
                "owner, seen_at, last_seq, created_at, has_events) "
                "VALUES (?, ?, ?, ?, ?, ?, ?, 0, ?, ?) RETURNING id",
                run.id,
                run.user,
                run.thread_id,
                run.user_message_id,
                run.message_id,
                self._owner,
                moment,
                moment,
                True,
            )
            if rows:
                await self._database.insert(INTO_EVENTS, [(run.id, *row) for row in rows])

    def append(self, run_id: str, events: Sequence[Event]) -> int:
        live = self._live[run_id]
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
            if self._written is None:
                self._written = asyncio.get_running_loop().create_future()
            self._work.set()
            self._hurry.set()
            await asyncio.shield(self._written)

    async def _write_for_ever(self) -> None:
        while not self._closing or (self._dirty and not self._failures):
            await _wait(self._work, HEARTBEAT_SECONDS if self._live else None)
            if self._dirty:
                await _wait(self._hurry, self._pause())
            self._work.clear()
            self._hurry.clear()
            waiting, self._written = self._written, None
            try:
                await self._write()
            except StorageUnavailable as error:
                self._failures += 1
                self._work.set()
                _settle(waiting, error)
            except Exception:
                logger.exception("the event log could not be written")
                self._failures += 1
                self._work.set()
                _settle(waiting, StorageUnavailable())
            else:
                self._failures = 0
                _settle(waiting, None)

    def _pause(self) -> float:
        return min(FLUSH_SECONDS * 2.0 ** min(self._failures, 10), HEARTBEAT_SECONDS)

    async def _write(self) -> None:
        """Write what all runs have said since the last time, in one transaction."""
        taken, self._dirty = self._dirty, []
        batches = [(live, live.tail.last, live.tail.ended) for live in taken]
        for live in taken:
            live.dirty = False
        try:
            if batches or time.monotonic() - self._signed_at > HEARTBEAT_SECONDS:
                await self._insert(batches)
        except BaseException:
            for live in taken:
                if not live.dirty:
                    self._mark(live)
            raise
        for live, upto, ended in batches:
            live.written = upto
            if ended and live.tail.last == upto:
                self._live.pop(live.record.id, None)
            else:
                live.tail.trim(upto, KEPT_CHARS)

    @inside
    async def _insert(self, batches: Sequence[tuple[_Live, int, bool]]) -> None:
        joined, locked = ("group_concat", "")
        if not self._database.is_sqlite:
            joined, locked = ("string_agg", " FOR UPDATE")
        moment = micros(now())
        async with self._database.transaction():
            # A run that another process has taken over is not ours to write to any more.
            found = await self._database.fetch(
                f"SELECT {joined}(id, ',') AS ids FROM (SELECT id FROM chat_runs "
                f"WHERE owner = ? AND ended_at IS NULL{locked}) AS mine",
                self._owner,
            )
            mine = {*(found[0]["ids"] or "").split(",")}
            rows = [
                (live.record.id, last, data)
                for live, upto, _ in batches
                if live.record.id in mine
                for last, data in encode(live.tail.between(live.written, upto))
            ]
            if rows:
                await self._database.insert(INTO_EVENTS, rows)
            ends = [
                (moment, upto, live.record.id)
                for live, upto, ended in batches
                if ended and live.record.id in mine
            ]
            if ends:
                await self._database.execute_many(
                    "UPDATE chat_runs SET ended_at = ?, last_seq = ? WHERE id = ?", ends
                )
            if time.monotonic() - self._signed_at > HEARTBEAT_SECONDS:
                await self._database.execute(
                    "UPDATE chat_runs SET seen_at = ? WHERE owner = ? AND ended_at IS NULL",
                    moment,
                    self._owner,
                )
                self._signed_at = time.monotonic()

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
            elif pages := await self._stored(run_id, after):
                after = pages[-1][0]
                yield pages
            elif live is not None:
                after = live.tail.first - 1
            else:  # it has ended, or another process lives it
                over = await self._is_over(run_id) or not wait
                if not over:
                    await asyncio.sleep(FLUSH_SECONDS)
                elif not await self._stored(run_id, after):  # nothing came while we asked
                    return

    async def _is_over(self, run_id: str) -> bool:
        row = await self._run(run_id)
        if row is None or (row["ended_at"] is not None and not row["has_events"]):
            raise NothingToResume("The events of this run are not kept any more.")
        return row["ended_at"] is not None

    @inside
    async def _run(self, run_id: str) -> dict[str, Any] | None:
        rows = await self._database.fetch("SELECT * FROM chat_runs WHERE id = ?", run_id)
        return rows[0] if rows else None

    @inside
    async def _stored(self, run_id: str, after: int) -> list[Numbered]:
        sizes = await self._database.fetch(
            "SELECT last_seq, length(data) AS size FROM chat_events "
            "WHERE run_id = ? AND last_seq > ? ORDER BY last_seq LIMIT ?",
            run_id,
            after,
            PAGE_ROWS,
        )
        upto = total = 0
        for row in sizes:
            if total and total + row["size"] > PAGE_BYTES:
                break
            upto, total = row["last_seq"], total + row["size"]
        if not upto:
            return []
        rows = await self._database.fetch(
            "SELECT data FROM chat_events WHERE run_id = ? AND last_seq > ? AND last_seq <= ? "
            "ORDER BY last_seq",
            run_id,
            after,
            upto,
        )
        return merge(each for row in rows for each in decode(row["data"], after))

    async def find(
        self, user: str, *, run_id: str | None = None, thread_id: str | None = None
    ) -> RunRecord | None:
        live = self._live.get(run_id or "")
        if live is None:
            return await self._find(user, run_id, thread_id)
        record = live.record
        if record.user != user or thread_id not in (None, record.thread_id):
            return None
        return replace(record, ended=live.tail.ended, last_seq=live.tail.last)

    @inside
    async def _find(self, user: str, run_id: str | None, thread_id: str | None) -> RunRecord | None:
        where, values = "user_id = ?", [user]
        for column, value in (("id", run_id), ("thread_id", thread_id)):
            if value is not None:
                where, values = f"{where} AND {column} = ?", [*values, value]
        rows = await self._database.fetch(
            f"SELECT * FROM chat_runs WHERE {where} ORDER BY created_at DESC LIMIT 1", *values
        )
        if not rows:
            return None
        record = _record(rows[0])
        return record if record.ended else replace(record, last_seq=await self._last(record.id))

    async def _last(self, run_id: str) -> int:
        rows = await self._database.fetch(
            "SELECT max(last_seq) AS last FROM chat_events WHERE run_id = ?", run_id
        )
        return rows[0]["last"] or 0

    @inside
    async def claim_abandoned(self) -> Sequence[RunRecord]:
        rows = await self._database.fetch(
            "SELECT * FROM chat_runs WHERE ended_at IS NULL AND owner <> ?", self._owner
        )
        moment = micros(now())
        dead = [row for row in rows if is_dead(row["owner"], (moment - row["seen_at"]) / 1e6)]
        claimed = []
        for row in dead[:CLAIMED_RUNS]:
            changed = await self._database.execute(
                "UPDATE chat_runs SET owner = ?, seen_at = ? "
                "WHERE id = ? AND owner = ? AND seen_at = ? AND ended_at IS NULL",
                self._owner,
                moment,
                row["id"],
                row["owner"],
                row["seen_at"],
            )
            if changed:
                claimed.append(await self._adopt(_record(row), left_on_purpose=not row["owner"]))
        return claimed

    async def _adopt(self, record: RunRecord, *, left_on_purpose: bool) -> RunRecord:
        last = await self._last(record.id)
        live = _Live(record)
        live.tail.first = last + 1 + (0 if left_on_purpose else CRASH_GAP)
        live.written = live.tail.first - 1
        self._live[record.id] = live
        return record

    async def forget(self, user: str, thread_id: str) -> None:
        for run_id, live in list(self._live.items()):
            if (live.record.user, live.record.thread_id) == (user, thread_id):
                del self._live[run_id]
                live.tail.close()
        await self._forget(user, thread_id)

    @inside
    async def _forget(self, user: str, thread_id: str) -> None:
        of_thread = "WHERE user_id = ? AND thread_id = ?"
        async with self._database.transaction():
            await self._database.execute(
                f"DELETE FROM chat_events WHERE run_id IN (SELECT id FROM chat_runs {of_thread})",
                user,
                thread_id,
            )
            await self._database.execute(f"DELETE FROM chat_runs {of_thread}", user, thread_id)

    @inside
    async def expire(self) -> int:
        rows = await self._database.fetch(
            "SELECT id FROM chat_runs WHERE has_events = ? AND ended_at < ? LIMIT ?",
            True,
            micros(now()) - int(self._retention * 1e6),
            SWEEP_RUNS,
        )
        ids = [(row["id"],) for row in rows]
        if ids:
            async with self._database.transaction():
                await self._database.execute_many("DELETE FROM chat_events WHERE run_id = ?", ids)
                await self._database.execute_many(
                    "UPDATE chat_runs SET has_events = FALSE WHERE id = ?", ids
                )
        return len(ids)


def _record(row: dict[str, Any]) -> RunRecord:
    return RunRecord(
        id=row["id"],
        user=row["user_id"],
        thread_id=row["thread_id"],
        user_message_id=row["user_message_id"],
        message_id=row["message_id"],
        ended=row["ended_at"] is not None,
        last_seq=row["last_seq"],
    )


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
