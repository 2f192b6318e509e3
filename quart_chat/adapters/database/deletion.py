"""Deletion in two parts: a thread is marked, and then emptied in short transactions.

The mark takes the thread out of sight at once. Emptying may take long; between its steps other
operations run. What a crash leaves half emptied keeps its mark, and a later sweep goes on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ...core.messages import now
from ...core.search import SEARCHED_CHARS
from .connection import Database, OperationRefused
from .rows import micros, within
from .search import entry_id, grams, remove_entry

STEP_CHARS = 256 * 1024
"""Text of messages and bytes of events after which a step ends."""

STEP_ROWS = 32
STEP_RUNS = 64

Row = dict[str, Any]


class DeletionPending(OperationRefused):
    """A thread of this id is marked and not empty yet."""

    def __init__(self, row_id: int) -> None:
        super().__init__(row_id)
        self.row_id = row_id


@dataclass(frozen=True)
class Marked:
    """A thread that is out of sight."""

    row_id: int
    user: str
    thread_id: str


async def mark(
    database: Database, user: str, thread_id: str, before: int | None = None
) -> Marked | None:
    """Take a thread out of sight; with ``before`` only if it is still quiet since then."""
    async with database.transaction():
        rows = await database.fetch(
            "DELETE FROM chat_threads WHERE user_id = ? AND id = ?"
            + ("" if before is None else " AND updated_at < ?")
            + " RETURNING row_id, title",
            user,
            thread_id,
            *(() if before is None else (before,)),
        )
        if not rows:
            return None
        row_id = rows[0]["row_id"]
        await remove_entry(database, entry_id(row_id, 0), grams(user, rows[0]["title"] or ""))
        await database.insert(
            "INSERT INTO chat_deletions (row_id, user_id, id, marked_at)",
            [(row_id, user, thread_id, micros(now()))],
        )
    return Marked(row_id, user, thread_id)


async def refuse_pending(database: Database, user: str, thread_id: str) -> None:
    """Check that nothing is left of a deleted thread of this id. Raises DeletionPending."""
    rows = await database.fetch(
        "SELECT row_id FROM chat_deletions WHERE user_id = ? AND id = ?", user, thread_id
    )
    if rows:
        raise DeletionPending(rows[0]["row_id"])


async def pending(database: Database, limit: int, user: str | None = None) -> list[Marked]:
    """Return threads that are marked and not empty yet, of a user or of all."""
    rows = await database.fetch(
        "SELECT row_id, user_id, id FROM chat_deletions "
        + ("" if user is None else "WHERE user_id = ? ")
        + "ORDER BY row_id LIMIT ?",
        *(() if user is None else (user,)),
        limit,
    )
    return [Marked(row["row_id"], row["user_id"], row["id"]) for row in rows]


async def empty(database: Database, marked: Marked) -> None:
    """Delete all that belongs to a marked thread, a step at a time."""
    while await database.run(_step(database, marked)):
        pass


async def _step(database: Database, marked: Marked) -> bool:
    """Delete a part; return whether more may be left."""
    async with database.transaction():
        if await delete_runs(database, marked.user, marked.thread_id):
            return True
        if await _delete_messages(database, marked):
            return True
        await database.execute("DELETE FROM chat_deletions WHERE row_id = ?", marked.row_id)
    return False


async def delete_runs(database: Database, user: str, thread_id: str | None) -> bool:
    """Delete some runs of a thread, or of a user, with their events; whether more may be left."""
    # Locked first: a process that writes a run's events holds its row.
    locked = "" if database.is_sqlite else " FOR UPDATE"
    runs = await database.fetch(
        "SELECT id FROM chat_runs WHERE user_id = ?"
        + ("" if thread_id is None else " AND thread_id = ?")
        + f" LIMIT ?{locked}",
        user,
        *(() if thread_id is None else (thread_id,)),
        STEP_RUNS,
    )
    budget = STEP_CHARS
    for run in runs:
        rows = await database.fetch(
            "SELECT row_id, length(data) AS size FROM chat_events WHERE run_id = ? "
            "ORDER BY last_seq LIMIT ?",
            run["id"],
            STEP_ROWS,
        )
        chosen = within(rows, budget)
        await _delete(database, "chat_events", [row["row_id"] for row in chosen])
        if len(chosen) < len(rows) or len(rows) == STEP_ROWS:
            return True
        await database.execute("DELETE FROM chat_runs WHERE id = ?", run["id"])
        budget -= sum(row["size"] for row in chosen)
        if budget <= 0:
            return True
    return len(runs) == STEP_RUNS


async def _delete_messages(database: Database, marked: Marked) -> bool:
    rows = await database.fetch(
        "SELECT row_id, position, length(text) + coalesce(length(parts), 0) "
        "+ coalesce(length(reasoning), 0) AS size FROM chat_messages "
        "WHERE user_id = ? AND thread_id = ? ORDER BY position LIMIT ?",
        marked.user,
        marked.thread_id,
        STEP_ROWS,
    )
    chosen = within(rows, STEP_CHARS)
    if database.is_sqlite:
        await _delete_entries(database, marked, chosen)
    elif chosen:
        await database.execute(
            "DELETE FROM chat_search WHERE id BETWEEN ? AND ?",
            entry_id(marked.row_id, chosen[0]["position"]),
            entry_id(marked.row_id, chosen[-1]["position"]),
        )
    await _delete(database, "chat_messages", [row["row_id"] for row in chosen])
    return len(chosen) < len(rows) or len(rows) == STEP_ROWS


async def _delete_entries(database: Database, marked: Marked, rows: Sequence[Row]) -> None:
    for row in rows:
        texts = await database.fetch(
            f"SELECT substr(text, 1, {SEARCHED_CHARS}) AS text FROM chat_messages WHERE row_id = ?",
            row["row_id"],
        )
        numbers = grams(marked.user, texts[0]["text"])
        await remove_entry(database, entry_id(marked.row_id, row["position"]), numbers)


async def _delete(database: Database, table: str, row_ids: Sequence[int]) -> None:
    if row_ids:
        marks = ", ".join("?" * len(row_ids))
        await database.execute(f"DELETE FROM {table} WHERE row_id IN ({marks})", *row_ids)
