"""Threads and messages in SQLite or PostgreSQL."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from typing import Any

from ...core.messages import Message, Thread, now, text_of, title_from
from ...core.ports import Window
from ...errors import IdConflict, NotFound
from .connection import Database, inside
from .rows import delete_thread, dump, message_of, micros, thread_of
from .search import search

MAX_SEGMENTS = 400
"""SQLite joins at most 500 selects in a statement."""

MESSAGE_COLUMNS = (
    "user_id, thread_id, id, position, branch, lineage, parent_id, run_id, role, text, parts, "
    "reasoning, tool_calls, tool_call_id, name, model, provider, status, token_usage, feedback, "
    "metadata, options, created_at"
)
INSERT_MESSAGE = (
    f"INSERT INTO chat_messages ({MESSAGE_COLUMNS}) "
    f"VALUES ({', '.join('?' * len(MESSAGE_COLUMNS.split(', ')))}) "
    "ON CONFLICT (user_id, thread_id, id) DO NOTHING RETURNING row_id"
)


BranchPosition = tuple[int, int, str]
"""Where a message stands: its branch, its position, and its branch's lineage as JSON."""


class DatabaseStorage:
    """Keeps the conversations of all users; every statement names the user."""

    def __init__(self, database: Database) -> None:
        self._database = database

    @inside
    async def create_thread(self, user: str, thread: Thread) -> Thread:
        rows = await self._database.fetch(
            "INSERT INTO chat_threads (user_id, id, title, metadata, message_count, newest_branch, "
            "newest_lineage, created_at, updated_at) VALUES (?, ?, ?, ?, 0, 1, '[]', ?, ?) "
            "ON CONFLICT (user_id, id) DO NOTHING RETURNING row_id",
            user,
            thread.id,
            thread.title,
            dump(thread.metadata),
            micros(thread.created_at),
            micros(thread.updated_at),
        )
        if not rows:
            raise IdConflict(f"There is a thread {thread.id!r} already.")
        return thread

    @inside
    async def threads(
        self, user: str, *, query: str | None, after: tuple[datetime, str] | None, limit: int
    ) -> Sequence[Thread]:
        where: list[str] = ["t.user_id = ?"]
        values: list[Any] = [user]
        if query:
            words = re.findall(r"\w+", query.lower())
            if not words:
                return []
            condition, searched = search(self._database, user, words)
            where.append(condition)
            values += searched
        if after is not None:
            where.append("(t.updated_at, t.id) < (?, ?)")
            values += [micros(after[0]), after[1]]
        rows = await self._database.fetch(
            f"SELECT t.* FROM chat_threads t WHERE {' AND '.join(where)} "
            "ORDER BY t.updated_at DESC, t.id DESC LIMIT ?",
            *values,
            limit,
        )
        return [thread_of(row) for row in rows]

    @inside
    async def thread(self, user: str, thread_id: str) -> Thread:
        return thread_of(await self._thread_row(user, thread_id))

    async def _thread_row(self, user: str, thread_id: str) -> dict[str, Any]:
        rows = await self._database.fetch(
            "SELECT * FROM chat_threads WHERE user_id = ? AND id = ?", user, thread_id
        )
        return _only(rows, "There is no such thread.")

    @inside
    async def update_thread(
        self, user: str, thread_id: str, changes: Mapping[str, Any], *, only_untitled: bool = False
    ) -> Thread:
        if changes:
            columns = ", ".join(f"{name} = ?" for name in ("title", "metadata") if name in changes)
            values = [changes["title"]] if "title" in changes else []
            values += [dump(changes["metadata"])] if "metadata" in changes else []
            await self._database.execute(
                f"UPDATE chat_threads SET {columns} WHERE user_id = ? AND id = ?"
                + (" AND title IS NULL" if only_untitled else ""),
                *values,
                user,
                thread_id,
            )
        return thread_of(await self._thread_row(user, thread_id))

    @inside
    async def delete_thread(self, user: str, thread_id: str) -> None:
        if not await delete_thread(self._database, user, thread_id):
            raise NotFound("There is no such thread.")

    @inside
    async def add_messages(
        self, user: str, messages: Sequence[Message], *, create: bool = False
    ) -> Sequence[Message]:
        thread_id = messages[0].thread_id
        moment = micros(now())
        async with self._database.transaction():
            thread = await self._touch(user, thread_id, moment, create)
            count, preview = thread["message_count"], thread["preview"]
            newest_id = thread["newest_id"]
            place: BranchPosition = (thread["newest_branch"], count, thread["newest_lineage"])
            stored: list[Message] = []
            for message in messages:
                parent_id = message.parent_id
                if parent_id is None and message.role == "user":
                    parent_id = newest_id
                branch, lineage = await self._branch(
                    user, thread_id, parent_id, newest_id, place, count + 1
                )
                message = replace(message, parent_id=parent_id, position=count + 1)
                if not await self._insert(user, message, branch, lineage):
                    stored.append(await self._get(user, thread_id, message.id))
                    continue
                stored.append(message)
                count += 1
                newest_id, place = message.id, (branch, count, lineage)
                if preview is None and message.role == "user":
                    preview = title_from(message.content)
            await self._database.execute(
                "UPDATE chat_threads SET message_count = ?, newest_id = ?, newest_branch = ?, "
                "newest_lineage = ?, preview = ? WHERE row_id = ?",
                count,
                newest_id,
                place[0],
                place[2],
                preview,
                thread["row_id"],
            )
        return stored

    async def _touch(self, user: str, thread_id: str, moment: int, create: bool) -> dict[str, Any]:
        """Lock the thread's row until the transaction ends, making it where that is allowed."""
        returning = (
            "RETURNING row_id, message_count, newest_id, newest_branch, newest_lineage, preview"
        )
        if create:
            rows = await self._database.fetch(
                "INSERT INTO chat_threads (user_id, id, metadata, message_count, newest_branch, "
                "newest_lineage, created_at, updated_at) VALUES (?, ?, '{}', 0, 1, '[]', ?, ?) "
                "ON CONFLICT (user_id, id) DO UPDATE SET updated_at = excluded.updated_at "
                + returning,
                user,
                thread_id,
                moment,
                moment,
            )
        else:
            rows = await self._database.fetch(
                f"UPDATE chat_threads SET updated_at = ? WHERE user_id = ? AND id = ? {returning}",
                moment,
                user,
                thread_id,
            )
        return _only(rows, "There is no such thread.")

    async def _branch(
        self,
        user: str,
        thread_id: str,
        parent_id: str | None,
        newest_id: str | None,
        newest: BranchPosition,
        position: int,
    ) -> tuple[int, str]:
        """The branch and lineage of a message that continues from its parent."""
        if parent_id is None:
            return position, "[]"
        if parent_id == newest_id:
            return newest[0], newest[2]
        branch, parent_position, lineage = await self._place(user, thread_id, parent_id)
        continued = await self._database.fetch(
            "SELECT 1 FROM chat_messages WHERE user_id = ? AND thread_id = ? AND branch = ? "
            "AND position > ? ORDER BY position LIMIT 1",
            user,
            thread_id,
            branch,
            parent_position,
        )
        if not continued:
            return branch, lineage
        return position, dump([*json.loads(lineage), [branch, parent_position]])

    async def _place(self, user: str, thread_id: str, message_id: str) -> BranchPosition:
        rows = await self._database.fetch(
            "SELECT branch, position, lineage FROM chat_messages "
            "WHERE user_id = ? AND thread_id = ? AND id = ?",
            user,
            thread_id,
            message_id,
        )
        row = _only(rows, f"There is no message {message_id!r} in this thread.")
        return row["branch"], row["position"], row["lineage"]

    async def _insert(self, user: str, message: Message, branch: int, lineage: str) -> bool:
        calls = [call.to_dict() for call in message.tool_calls]
        rows = await self._database.fetch(
            INSERT_MESSAGE,
            user,
            message.thread_id,
            message.id,
            message.position,
            branch,
            lineage,
            message.parent_id,
            message.run_id,
            message.role,
            text_of(message.content),
            None if isinstance(message.content, str) else dump(message.content),
            message.reasoning,
            dump(calls) if calls else None,
            message.tool_call_id,
            message.name,
            message.model,
            message.provider,
            message.status,
            dump(message.usage) if message.usage is not None else None,
            None,
            dump(message.metadata),
            dump(message.options),
            micros(message.created_at),
        )
        return bool(rows)

    async def _get(self, user: str, thread_id: str, message_id: str) -> Message:
        rows = await self._database.fetch(
            "SELECT * FROM chat_messages WHERE user_id = ? AND thread_id = ? AND id = ?",
            user,
            thread_id,
            message_id,
        )
        return message_of(_only(rows, "There is no such message in this thread."))

    @inside
    async def messages(self, user: str, thread_id: str, window: Window) -> Sequence[Message]:
        leaf_alone = window.limit == 1 and window.order == "desc" and window.after is None
        if leaf_alone and window.leaf is not None:
            return [await self._get(user, thread_id, window.leaf)]
        if window.branch == "all":
            await self._thread_row(user, thread_id)
            if window.leaf is not None:
                await self._place(user, thread_id, window.leaf)
            return await self._read_some(user, thread_id, window, None)
        if window.leaf is not None:
            place = await self._place(user, thread_id, window.leaf)
        else:
            row = await self._thread_row(user, thread_id)
            place = (row["newest_branch"], row["message_count"], row["newest_lineage"])
        segments = [*json.loads(place[2]), [place[0], place[1]]]
        return await self._read(user, thread_id, window, segments)

    async def _read(
        self, user: str, thread_id: str, window: Window, segments: list[list[int]]
    ) -> list[Message]:
        """Each segment of the path by its index, at most a page of it, and a page of all those."""
        ascending = window.order == "asc"
        if window.after is not None and ascending:
            segments = [s for s in segments if s[1] > window.after]
        if not ascending:
            segments = segments[::-1]
        found: list[Message] = []
        for start in range(0, len(segments), MAX_SEGMENTS):
            chunk = segments[start : start + MAX_SEGMENTS]
            found += await self._read_some(user, thread_id, window, chunk)
            if len(found) >= window.limit:
                break
        return found[: window.limit]

    async def _read_some(
        self, user: str, thread_id: str, window: Window, segments: list[list[int]] | None
    ) -> list[Message]:
        order = window.order.upper()
        paging, after = "", []
        if window.after is not None:
            paging, after = f" AND position {'>' if order == 'ASC' else '<'} ?", [window.after]
        whole = "SELECT * FROM chat_messages WHERE user_id = ? AND thread_id = ?"
        selects: list[str] = []
        values: list[Any] = []
        for branch, upto in segments or ():
            part = f"{whole} AND branch = ? AND position <= ?{paging}"
            part += f" ORDER BY position {order} LIMIT ?"
            selects.append(f"SELECT * FROM ({part}) AS s{len(selects)}")
            values += [user, thread_id, branch, upto, *after, window.limit]
        if segments is None:
            selects, values = [f"{whole}{paging}"], [user, thread_id, *after]
        rows = await self._database.fetch(
            f"{' UNION ALL '.join(selects)} ORDER BY position {order} LIMIT ?",
            *values,
            window.limit,
        )
        return [message_of(row) for row in rows]

    @inside
    async def set_feedback(
        self, user: str, thread_id: str, message_id: str, feedback: Mapping[str, Any] | None
    ) -> None:
        changed = await self._database.execute(
            "UPDATE chat_messages SET feedback = ? WHERE user_id = ? AND thread_id = ? AND id = ?",
            None if feedback is None else dump(feedback),
            user,
            thread_id,
            message_id,
        )
        if not changed:
            raise NotFound("There is no such message in this thread.")


def _only(rows: Sequence[dict[str, Any]], otherwise: str) -> dict[str, Any]:
    if not rows:
        raise NotFound(otherwise)
    return rows[0]
