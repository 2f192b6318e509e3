"""Pages of a thread's messages, along a path through its branches or over all of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ...core.messages import Message
from ...core.ports import Window
from ...errors import NotFound
from .connection import Database
from .rows import MESSAGE_SIZE, message_of, within

MAX_SEGMENTS = 400
"""SQLite joins at most 500 selects in a statement."""

MEASURED_ROWS = 25
"""SQLite reads a text to know its length, so that few are measured at once."""

BranchPosition = tuple[int, int, str]
"""Where a message stands: its branch, its position, and its branch's lineage as JSON."""

Row = dict[str, Any]


class MessagePages:
    """Reads of messages; the statements run inside an operation of the database."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def thread_row(self, user: str, thread_id: str, locked: str = "") -> Row:
        """Return a thread's row. Raises NotFound."""
        rows = await self._database.fetch(
            f"SELECT * FROM chat_threads WHERE user_id = ? AND id = ?{locked}", user, thread_id
        )
        return only(rows, "There is no such thread.")

    async def place(self, user: str, thread_id: str, message_id: str) -> BranchPosition:
        """Return where a message stands. Raises NotFound."""
        rows = await self._database.fetch(
            "SELECT branch, position, lineage FROM chat_messages "
            "WHERE user_id = ? AND thread_id = ? AND id = ?",
            user,
            thread_id,
            message_id,
        )
        row = only(rows, f"There is no message {message_id!r} in this thread.")
        return row["branch"], row["position"], row["lineage"]

    async def message(self, user: str, thread_id: str, message_id: str) -> Message:
        """Return a message. Raises NotFound."""
        rows = await self._database.fetch(
            "SELECT * FROM chat_messages WHERE user_id = ? AND thread_id = ? AND id = ?",
            user,
            thread_id,
            message_id,
        )
        return message_of(only(rows, "There is no such message in this thread."))

    async def read(self, user: str, thread_id: str, window: Window) -> Sequence[Message]:
        """Return a window of messages in its order. Raises NotFound."""
        thread = await self.thread_row(user, thread_id)
        leaf_alone = window.limit == 1 and window.order == "desc" and window.after is None
        if leaf_alone and window.leaf is not None:
            return [await self.message(user, thread_id, window.leaf)]
        place = (thread["newest_branch"], thread["message_count"], thread["newest_lineage"])
        if window.leaf is not None:
            place = await self.place(user, thread_id, window.leaf)
        segments = [*json.loads(place[2]), [place[0], place[1]]]
        if window.max_chars is not None:
            return await self._measured(user, thread_id, window, segments, window.max_chars)
        return [message_of(row) for row in await self._rows(user, thread_id, window, segments, "*")]

    async def _measured(
        self,
        user: str,
        thread_id: str,
        window: Window,
        segments: list[list[int]],
        chars: int,
    ) -> list[Message]:
        """Return the first messages of a window, up to the one with which they pass ``chars``."""
        messages: list[Message] = []
        columns = f"row_id, position, {MESSAGE_SIZE} AS size"
        while chars >= 0 and len(messages) < window.limit:
            part = replace(window, limit=min(MEASURED_ROWS, window.limit - len(messages)))
            sizes = await self._rows(user, thread_id, part, segments, columns)
            chosen = within(sizes, chars)
            if not chosen:
                break
            chars -= sum(row["size"] for row in chosen)
            messages += await self._chosen([row["row_id"] for row in chosen], window)
            if len(sizes) < part.limit:
                break
            window = replace(window, after=chosen[-1]["position"])
        return messages

    async def _chosen(self, row_ids: Sequence[int], window: Window) -> list[Message]:
        rows = await self._database.fetch(
            f"SELECT * FROM chat_messages WHERE row_id IN ({', '.join('?' * len(row_ids))}) "
            f"ORDER BY position {window.order.upper()}",
            *row_ids,
        )
        return [message_of(row) for row in rows]

    async def _rows(
        self,
        user: str,
        thread_id: str,
        window: Window,
        segments: list[list[int]],
        columns: str,
    ) -> list[Row]:
        """Return each segment of the path by its index, a page of it, and a page of all those."""
        if window.branch == "all":
            return await self._some(user, thread_id, window, None, columns)
        ascending = window.order == "asc"
        if window.after is not None and ascending:
            segments = [s for s in segments if s[1] > window.after]
        if not ascending:
            segments = segments[::-1]
        rows: list[Row] = []
        for start in range(0, len(segments), MAX_SEGMENTS):
            chunk = segments[start : start + MAX_SEGMENTS]
            rows += await self._some(user, thread_id, window, chunk, columns)
            if len(rows) >= window.limit:
                break
        return rows[: window.limit]

    async def _some(
        self,
        user: str,
        thread_id: str,
        window: Window,
        segments: list[list[int]] | None,
        columns: str,
    ) -> list[Row]:
        order = window.order.upper()
        paging, after = "", []
        if window.after is not None:
            paging, after = f" AND position {'>' if order == 'ASC' else '<'} ?", [window.after]
        whole = f"SELECT {columns} FROM chat_messages WHERE user_id = ? AND thread_id = ?"
        selects: list[str] = []
        values: list[Any] = []
        for branch, upto in segments or ():
            part = f"{whole} AND branch = ? AND position <= ?{paging}"
            part += f" ORDER BY position {order} LIMIT ?"
            selects.append(f"SELECT * FROM ({part}) AS s{len(selects)}")
            values += [user, thread_id, branch, upto, *after, window.limit]
        if segments is None:
            selects, values = [f"{whole}{paging}"], [user, thread_id, *after]
        return await self._database.fetch(
            f"{' UNION ALL '.join(selects)} ORDER BY position {order} LIMIT ?",
            *values,
            window.limit,
        )


def only(rows: Sequence[Row], otherwise: str) -> Row:
    """Return the one row. Raises NotFound with this sentence if there is none."""
    if not rows:
        raise NotFound(otherwise)
    return rows[0]
