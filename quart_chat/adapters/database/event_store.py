"""Store of runs and their events: the statements under the durable event log."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ...core.events import Numbered, merge
from ...core.messages import now
from ...core.ports import RunRecord
from .batches import decode
from .connection import Database, database_operation, reading
from .ownership import is_dead
from .rows import micros

PAGE_BYTES = 32 * 1024
PAGE_ROWS = 500
SWEPT_RUNS = 100
CLAIMED_RUNS = 100

HEARTBEAT_SECONDS = 5
"""How often a process that has runs renews its lease on them."""

CRASH_GAP = 1_000_000
"""Above every number that a dead process can have sent and not have written."""

INTO_EVENTS = "INSERT INTO chat_events (run_id, last_seq, data)"


@dataclass(frozen=True, slots=True)
class Batch:
    """What a run has said after event ``after``; ``ended`` if that is all.

    ``uncertain`` if it was tried before, and nobody knows whether it was written.
    """

    run_id: str
    after: int
    rows: Sequence[tuple[int, bytes]]
    upto: int
    ended: bool
    uncertain: bool


class EventStore:
    """Rows of ``chat_runs`` and ``chat_events``; ``owner`` names this process's lease."""

    def __init__(self, database: Database, owner: str, retention: float) -> None:
        self._database = database
        self._owner = owner
        self._retention = retention
        self._beat_at = 0.0

    @database_operation
    async def begin(self, run: RunRecord, rows: Sequence[tuple[int, bytes]]) -> None:
        """Insert a run and its first events; a row of ours that nobody drives begins anew."""
        now_sql, moment = self._now()
        async with self._database.transaction():
            inserted = await self._database.fetch(
                "INSERT INTO chat_runs (id, user_id, thread_id, user_message_id, message_id, "
                "owner, seen_at, last_seq, created_at, has_events) "
                f"VALUES (?, ?, ?, ?, ?, ?, {now_sql}, 0, {now_sql}, ?) "
                "ON CONFLICT (id) DO NOTHING RETURNING id",
                run.id,
                run.user,
                run.thread_id,
                run.user_message_id,
                run.message_id,
                self._owner,
                *moment,
                *moment,
                True,
            )
            if not inserted:
                await self._database.execute("DELETE FROM chat_events WHERE run_id = ?", run.id)
            if rows:
                await self._database.insert(INTO_EVENTS, [(run.id, *row) for row in rows])

    @property
    def heartbeat_is_due(self) -> bool:
        """Whether the lease has to be renewed."""
        return time.monotonic() - self._beat_at > HEARTBEAT_SECONDS

    @database_operation
    async def write(self, batches: Sequence[Batch]) -> None:
        """Write what all runs have said since the last time, in one transaction."""
        joined, locked = ("group_concat", "")
        if not self._database.is_sqlite:
            joined, locked = ("string_agg", " FOR UPDATE")
        (now_sql, moment), beats = self._now(), self.heartbeat_is_due
        async with self._database.transaction():
            # A run that another process has taken over is not ours to write to any more.
            found = await self._database.fetch(
                f"SELECT {joined}(id, ',') AS ids FROM (SELECT id FROM chat_runs "
                f"WHERE owner = ? AND ended_at IS NULL{locked}) AS mine",
                self._owner,
            )
            mine = {*(found[0]["ids"] or "").split(",")}
            kept = [batch for batch in batches if batch.run_id in mine]
            for batch in kept:
                if batch.uncertain:
                    await self._database.execute(
                        "DELETE FROM chat_events WHERE run_id = ? AND last_seq > ?",
                        batch.run_id,
                        batch.after,
                    )
            rows = [(batch.run_id, *row) for batch in kept for row in batch.rows]
            if rows:
                await self._database.insert(INTO_EVENTS, rows)
            ends = [(*moment, batch.upto, batch.run_id) for batch in kept if batch.ended]
            if ends:
                await self._database.execute_many(
                    f"UPDATE chat_runs SET ended_at = {now_sql}, last_seq = ? WHERE id = ?", ends
                )
            if beats:
                await self._database.execute(
                    f"UPDATE chat_runs SET seen_at = {now_sql} "
                    "WHERE owner = ? AND ended_at IS NULL",
                    *moment,
                    self._owner,
                )
        if beats:
            self._beat_at = time.monotonic()

    @database_operation
    async def end(self, run_id: str) -> None:
        """Make a run's end final, with the number of its last event."""
        now_sql, moment = self._now()
        await self._database.execute(
            f"UPDATE chat_runs SET ended_at = {now_sql}, last_seq = ? WHERE id = ? AND owner = ?",
            *moment,
            await self._last(run_id),
            run_id,
            self._owner,
        )

    @database_operation
    async def release(self, unwritten: Collection[str]) -> None:
        """Leave the runs that did not end to the next process.

        Those with ``unwritten`` events keep their owner: whoever claims them has to leave a gap.
        """
        marks = ", ".join("?" * len(unwritten))
        await self._database.execute(
            "UPDATE chat_runs SET owner = '' WHERE owner = ? AND ended_at IS NULL"
            + (f" AND id NOT IN ({marks})" if unwritten else ""),
            self._owner,
            *unwritten,
        )

    @reading
    async def run(self, run_id: str) -> dict[str, Any] | None:
        """Return a run's row."""
        rows = await self._database.fetch("SELECT * FROM chat_runs WHERE id = ?", run_id)
        return rows[0] if rows else None

    @reading
    async def read(self, run_id: str, after: int) -> list[Numbered]:
        """Return a page of events after a number. Raises UnreadableLog."""
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

    @reading
    async def find(self, user: str, run_id: str | None, thread_id: str | None) -> RunRecord | None:
        """Return the user's run of that id, or the newest of that thread."""
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

    @database_operation
    async def claim(self, driven: Collection[str]) -> list[tuple[RunRecord, int]]:
        """Claim runs that nobody drives, each with the number after which it may be written on.

        ``driven`` are this process's own that somebody drives, or that it knows to be abandoned.
        """
        claimed: list[tuple[RunRecord, int]] = []
        for row in (await self._abandoned(driven))[:CLAIMED_RUNS]:
            last = max(await self._last(row["id"]), row["last_seq"])
            # The gap is written down: a process that dies before it ends the run must not give
            # the same numbers again to its successor.
            last += 0 if not row["owner"] else CRASH_GAP
            now_sql, moment = self._now()
            changed = await self._database.execute(
                f"UPDATE chat_runs SET owner = ?, seen_at = {now_sql}, last_seq = ? "
                "WHERE id = ? AND owner = ? AND seen_at = ? AND ended_at IS NULL",
                self._owner,
                *moment,
                last,
                row["id"],
                row["owner"],
                row["seen_at"],
            )
            if changed:
                claimed.append((_record(row), last))
        return claimed

    async def _abandoned(self, driven: Collection[str]) -> list[dict[str, Any]]:
        now_sql, moment = self._now()
        owners = await self._database.fetch(
            f"SELECT owner, {now_sql} - max(seen_at) AS silence FROM chat_runs "
            "WHERE ended_at IS NULL GROUP BY owner",
            *moment,
        )
        rows: list[dict[str, Any]] = []
        for row in owners:
            ours = row["owner"] == self._owner
            if ours or is_dead(row["owner"], row["silence"] / 1e6):
                found = await self._database.fetch(
                    "SELECT * FROM chat_runs WHERE ended_at IS NULL AND owner = ?", row["owner"]
                )
                rows += [each for each in found if not ours or each["id"] not in driven]
        return rows

    def _now(self) -> tuple[str, tuple[int, ...]]:
        """Return the present moment for a statement: on PostgreSQL by the database's own clock."""
        if self._database.is_sqlite:
            return "CAST(? AS INTEGER)", (micros(now()),)
        return "(extract(epoch FROM clock_timestamp()) * 1000000)::bigint", ()

    @database_operation
    async def forget(self, user: str, thread_id: str | None) -> None:
        """Delete the runs of a thread or of a user, and their events."""
        where, values = "WHERE user_id = ?", [user]
        if thread_id is not None:
            where, values = f"{where} AND thread_id = ?", [user, thread_id]
        async with self._database.transaction():
            if not self._database.is_sqlite:  # a process that writes events holds the run's row
                await self._database.fetch(f"SELECT id FROM chat_runs {where} FOR UPDATE", *values)
            await self._database.execute(
                f"DELETE FROM chat_events WHERE run_id IN (SELECT id FROM chat_runs {where})",
                *values,
            )
            await self._database.execute(f"DELETE FROM chat_runs {where}", *values)

    @database_operation
    async def expire(self) -> int:
        """Delete the events of a bounded number of runs that ended long ago, and count them."""
        now_sql, moment = self._now()
        rows = await self._database.fetch(
            "SELECT id FROM chat_runs WHERE has_events = ? "
            f"AND ended_at < {now_sql} - CAST(? AS BIGINT) LIMIT ?",
            True,
            *moment,
            int(self._retention * 1e6),
            SWEPT_RUNS,
        )
        if rows:
            ids = [row["id"] for row in rows]
            marks = ", ".join("?" * len(ids))
            async with self._database.transaction():
                await self._database.execute(
                    f"DELETE FROM chat_events WHERE run_id IN ({marks})", *ids
                )
                await self._database.execute(
                    f"UPDATE chat_runs SET has_events = FALSE WHERE id IN ({marks})", *ids
                )
        return len(rows)


def _record(row: dict[str, Any]) -> RunRecord:
    return RunRecord(
        id=row["id"],
        user=row["user_id"],
        thread_id=row["thread_id"],
        user_message_id=row["user_message_id"],
        message_id=row["message_id"],
        ended=row["ended_at"] is not None,
        last_seq=row["last_seq"],
        kept=bool(row["has_events"]),
    )
