"""All that is kept of a user: to hand out, to erase, to let expire."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from datetime import datetime
from typing import Any

from ...core.messages import rfc3339
from .connection import Database, inside
from .rows import delete_thread, message_of, micros, moment, thread_of

EXPORT_PAGE = 500


class DatabaseUserData:
    """The archive of the tables that ``DatabaseStorage`` and ``DatabaseEventLog`` fill."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def export(self, user: str) -> AsyncGenerator[dict[str, Any], None]:
        tables = (("thread", "chat_threads"), ("message", "chat_messages"), ("run", "chat_runs"))
        for kind, table in tables:
            key = "id" if table == "chat_runs" else "row_id"
            after: Any = "" if key == "id" else 0
            while rows := await self._page(table, key, user, after):
                for row in rows:
                    yield _exported(kind, row)
                after = rows[-1][key]

    @inside
    async def _page(self, table: str, key: str, user: str, after: Any) -> list[dict[str, Any]]:
        return await self._database.fetch(
            f"SELECT * FROM {table} WHERE user_id = ? AND {key} > ? ORDER BY {key} LIMIT ?",
            user,
            after,
            EXPORT_PAGE,
        )

    async def erase(self, user: str) -> int:
        count = 0
        while rows := await self._page("chat_threads", "row_id", user, 0):
            for row in rows:
                await self._erase_one(user, row["id"])
            count += len(rows)
        await self._erase_rest(user)
        return count

    @inside
    async def _erase_rest(self, user: str) -> None:
        """What a thread's deletion by another process may have left."""
        of_user = "WHERE user_id = ?"
        async with self._database.transaction():
            await self._database.execute(
                f"DELETE FROM chat_events WHERE run_id IN (SELECT id FROM chat_runs {of_user})",
                user,
            )
            for table in ("chat_runs", "chat_messages"):
                await self._database.execute(f"DELETE FROM {table} {of_user}", user)

    @inside
    async def _erase_one(self, user: str, thread_id: str) -> bool:
        return await delete_thread(self._database, user, thread_id)

    @inside
    async def expire(self, before: datetime, limit: int) -> int:
        rows = await self._database.fetch(
            "SELECT user_id, id FROM chat_threads WHERE updated_at < ? LIMIT ?",
            micros(before),
            limit,
        )
        for row in rows:
            await delete_thread(self._database, row["user_id"], row["id"])
        return len(rows)


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
