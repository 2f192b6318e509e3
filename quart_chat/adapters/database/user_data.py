"""User data in the database: export, erasure and expiry."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from datetime import datetime
from typing import Any

from ...core.messages import rfc3339
from .connection import Database, database_operation, reading
from .deletion import Marked, delete_runs, empty, mark, pending
from .rows import MESSAGE_SIZE, message_of, micros, moment, thread_of, within

EXPORT_PAGE = 200
EXPORT_CHARS = 4 * 1024 * 1024
ERASED_THREADS = 100

EXPORTED = {
    "thread": ("chat_threads", ("id",)),
    "message": ("chat_messages", ("thread_id", "position")),
    "run": ("chat_runs", ("thread_id", "created_at", "id")),
}
"""Tables and the keys of their pages, each an index's columns after the user."""

NOT_DELETED = (
    " AND NOT EXISTS (SELECT 1 FROM chat_deletions d "
    "WHERE d.user_id = {table}.user_id AND d.id = {table}.thread_id)"
)


class DatabaseUserData:
    """User data in the tables that ``DatabaseStorage`` and ``DatabaseEventLog`` fill."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def export(self, user: str) -> AsyncGenerator[dict[str, Any], None]:
        for kind, (table, keys) in EXPORTED.items():
            after: list[Any] | None = None
            while rows := await self._page(table, keys, user, after):
                for row in rows:
                    yield _exported(kind, row)
                after = [rows[-1][key] for key in keys]

    @reading
    async def _page(
        self, table: str, keys: Sequence[str], user: str, after: list[Any] | None
    ) -> list[dict[str, Any]]:
        columns, where, values = ", ".join(keys), "user_id = ?", list[Any]([user])
        if after is not None:
            where += f" AND ({columns}) > ({', '.join('?' * len(keys))})"
            values += after
        if table != "chat_threads":
            where += NOT_DELETED.format(table=table)
        size = MESSAGE_SIZE if table == "chat_messages" else "1"
        sizes = await self._database.fetch(
            f"SELECT {size} AS size FROM {table} WHERE {where} ORDER BY {columns} LIMIT ?",
            *values,
            EXPORT_PAGE,
        )
        if not sizes:
            return []
        return await self._database.fetch(
            f"SELECT * FROM {table} WHERE {where} ORDER BY {columns} LIMIT ?",
            *values,
            len(within(sizes, EXPORT_CHARS)),
        )

    async def erase(self, user: str) -> int:
        count = 0
        while rows := await self._page("chat_threads", ("id",), user, None):
            for row in rows:
                count += await self._delete(user, row["id"])
        while left := await self._pending(ERASED_THREADS, user):
            for marked in left:
                await empty(self._database, marked)
        while await self._delete_rest(user):
            pass
        return count

    async def expire(self, before: datetime, limit: int) -> int:
        left = await self._pending(limit)
        for marked in left:
            await empty(self._database, marked)
        count = len(left)
        for row in await self._quiet(micros(before), limit - count):
            count += await self._delete(row["user_id"], row["id"], micros(before))
        return count

    async def _delete(self, user: str, thread_id: str, before: int | None = None) -> bool:
        marked = await self._mark(user, thread_id, before)
        if marked is not None:
            await empty(self._database, marked)
        return marked is not None

    @database_operation
    async def _mark(self, user: str, thread_id: str, before: int | None) -> Marked | None:
        return await mark(self._database, user, thread_id, before)

    @reading
    async def _pending(self, limit: int, user: str | None = None) -> list[Marked]:
        return await pending(self._database, limit, user)

    @reading
    async def _quiet(self, before: int, limit: int) -> list[dict[str, Any]]:
        return await self._database.fetch(
            "SELECT user_id, id FROM chat_threads WHERE updated_at < ? LIMIT ?", before, limit
        )

    @database_operation
    async def _delete_rest(self, user: str) -> bool:
        """Delete some of what another process wrote for threads that are deleted already."""
        async with self._database.transaction():
            if await delete_runs(self._database, user, None):
                return True
            rows = await self._database.fetch(
                "SELECT m.row_id FROM chat_messages m WHERE m.user_id = ? AND NOT EXISTS (SELECT 1 "
                "FROM chat_threads t WHERE t.user_id = m.user_id AND t.id = m.thread_id) LIMIT ?",
                user,
                ERASED_THREADS,
            )
            ids = [row["row_id"] for row in rows]
            if ids:
                await self._database.execute(
                    f"DELETE FROM chat_messages WHERE row_id IN ({', '.join('?' * len(ids))})", *ids
                )
        return bool(rows)


def _exported(kind: str, row: Mapping[str, Any]) -> dict[str, Any]:
    if kind == "thread":
        return {"type": kind, **thread_of(row).to_dict(None)}
    if kind == "message":
        return {"type": kind, **message_of(row).to_dict()}
    ended = row["ended_at"]
    return {
        "type": kind,
        "id": row["id"],
        "thread_id": row["thread_id"],
        "user_message_id": row["user_message_id"],
        "message_id": row["message_id"],
        "created_at": rfc3339(moment(row["created_at"])),
        "ended_at": rfc3339(moment(ended)) if ended is not None else None,
    }
