"""Threads and messages in SQLite or PostgreSQL."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from typing import Any, TypeVar

from ...core.messages import Message, Thread, now, text_of, title_from
from ...core.ports import MAX_BRANCHES, TOO_MANY_BRANCHES, Window
from ...errors import IdConflict, InvalidMessage, NotFound
from .connection import Database, database_operation, reading, searching
from .deletion import DeletionPending, Marked, empty, mark, refuse_pending
from .pages import BranchPosition, MessagePages, only
from .rows import dump, micros, thread_of
from .search import Search, add_entry, entry_id, grams, remove_entry

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


R = TypeVar("R")


class DatabaseStorage:
    """Storage of the conversations of all users; every statement names the user."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._pages = MessagePages(database)

    async def create_thread(self, user: str, thread: Thread) -> Thread:
        return await self._after_deletion(
            user, thread.id, lambda: self._create_thread(user, thread)
        )

    async def _after_deletion(
        self, user: str, thread_id: str, work: Callable[[], Awaitable[R]]
    ) -> R:
        """Do the work; if a thread of this id is being deleted, wait for the deletion."""
        while True:
            try:
                return await work()
            except DeletionPending as pending:
                await empty(self._database, Marked(pending.row_id, user, thread_id))

    @database_operation
    async def _create_thread(self, user: str, thread: Thread) -> Thread:
        async with self._database.transaction():
            rows = await self._database.fetch(
                "INSERT INTO chat_threads (user_id, id, title, metadata, message_count, "
                "newest_branch, newest_lineage, created_at, updated_at) "
                "VALUES (?, ?, ?, ?, 0, 1, '[]', ?, ?) "
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
            await refuse_pending(self._database, user, thread.id)
            title = grams(user, thread.title or "")
            await add_entry(self._database, entry_id(rows[0]["row_id"], 0), title)
        return thread

    async def threads(
        self, user: str, *, query: str | None, after: tuple[datetime, str] | None, limit: int
    ) -> Sequence[Thread]:
        if query:
            return await self._search(user, query, after, limit)
        return await self._list(user, after, limit)

    @searching
    async def _search(
        self, user: str, query: str, after: tuple[datetime, str] | None, limit: int
    ) -> Sequence[Thread]:
        return await Search(self._database, user, query, after, limit).threads()

    @reading
    async def _list(
        self, user: str, after: tuple[datetime, str] | None, limit: int
    ) -> Sequence[Thread]:
        where, values = "user_id = ?", list[Any]([user])
        if after is not None:
            where += " AND (updated_at, id) < (?, ?)"
            values += [micros(after[0]), after[1]]
        rows = await self._database.fetch(
            f"SELECT * FROM chat_threads WHERE {where} ORDER BY updated_at DESC, id DESC LIMIT ?",
            *values,
            limit,
        )
        return [thread_of(row) for row in rows]

    @reading
    async def thread(self, user: str, thread_id: str) -> Thread:
        return thread_of(await self._pages.thread_row(user, thread_id))

    @database_operation
    async def update_thread(
        self, user: str, thread_id: str, changes: Mapping[str, Any], *, only_untitled: bool = False
    ) -> Thread:
        async with self._database.transaction():
            row = await self._pages.thread_row(
                user, thread_id, "" if self._database.is_sqlite else " FOR UPDATE"
            )
            if changes and not (only_untitled and row["title"] is not None):
                await self._change_thread(user, row, changes)
                row = await self._pages.thread_row(user, thread_id)
        return thread_of(row)

    async def _change_thread(
        self, user: str, row: Mapping[str, Any], changes: Mapping[str, Any]
    ) -> None:
        values = {name: changes[name] for name in ("title", "metadata") if name in changes}
        if "metadata" in values:
            values["metadata"] = dump(values["metadata"])
        columns = ", ".join(f"{name} = ?" for name in values)
        await self._database.execute(
            f"UPDATE chat_threads SET {columns} WHERE row_id = ?", *values.values(), row["row_id"]
        )
        if "title" in values and values["title"] != row["title"]:
            entry = entry_id(row["row_id"], 0)
            await remove_entry(self._database, entry, grams(user, row["title"] or ""))
            await add_entry(self._database, entry, grams(user, values["title"] or ""))

    async def delete_thread(self, user: str, thread_id: str) -> None:
        if (marked := await self._mark(user, thread_id)) is None:
            raise NotFound("There is no such thread.")
        await empty(self._database, marked)

    @database_operation
    async def _mark(self, user: str, thread_id: str) -> Marked | None:
        return await mark(self._database, user, thread_id)

    async def add_messages(
        self, user: str, messages: Sequence[Message], *, create: bool = False
    ) -> Sequence[Message]:
        return await self._after_deletion(
            user, messages[0].thread_id, lambda: self._add_messages(user, messages, create)
        )

    @database_operation
    async def _add_messages(
        self, user: str, messages: Sequence[Message], create: bool
    ) -> Sequence[Message]:
        thread_id = messages[0].thread_id
        moment = micros(now())
        async with self._database.transaction():
            thread = await self._touch(user, thread_id, moment, create)
            count, preview = thread["message_count"], thread["preview"]
            if create and not count:
                await refuse_pending(self._database, user, thread_id)
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
                    stored.append(await self._pages.message(user, thread_id, message.id))
                    continue
                stored.append(message)
                count += 1
                entry, text = entry_id(thread["row_id"], count), text_of(message.content)
                await add_entry(self._database, entry, grams(user, text))
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
        """Lock the thread's row until the transaction ends, creating it if that is allowed."""
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
        return only(rows, "There is no such thread.")

    async def _branch(
        self,
        user: str,
        thread_id: str,
        parent_id: str | None,
        newest_id: str | None,
        newest: BranchPosition,
        position: int,
    ) -> tuple[int, str]:
        """Return the branch and lineage of a message that continues from its parent."""
        if parent_id is None:
            return position, "[]"
        if parent_id == newest_id:
            return newest[0], newest[2]
        branch, parent_position, lineage = await self._pages.place(user, thread_id, parent_id)
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
        if rows and lineage.count("[") - 1 > MAX_BRANCHES:
            raise InvalidMessage(TOO_MANY_BRANCHES)
        return bool(rows)

    @reading
    async def messages(self, user: str, thread_id: str, window: Window) -> Sequence[Message]:
        return await self._pages.read(user, thread_id, window)

    @database_operation
    async def set_feedback(
        self, user: str, thread_id: str, message_id: str, feedback: Mapping[str, Any] | None
    ) -> None:
        changed = await self._database.execute(
            "UPDATE chat_messages SET feedback = ? WHERE user_id = ? AND thread_id = ? AND id = ? "
            "AND EXISTS (SELECT 1 FROM chat_threads t WHERE t.user_id = chat_messages.user_id "
            "AND t.id = chat_messages.thread_id)",
            None if feedback is None else dump(feedback),
            user,
            thread_id,
            message_id,
        )
        if not changed:
            raise NotFound("There is no such message in this thread.")
