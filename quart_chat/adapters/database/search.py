"""Search by an index of grams: on SQLite in FTS5, on PostgreSQL in a GIN index.

A gram is three letters in a row within a word; of Chinese, Japanese, Korean and emoji one or two as
well. It stands in the index as a number made of it and the user, so that a search reads that user's
entries alone. The index names candidates, whose texts are then read. What has no grams (``a_``) is
looked for in the user's texts, newest activity first.
"""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Any

from ...core.messages import Thread
from ...core.search import SEARCHED_CHARS, contains, fold, pieces
from .connection import Database
from .rows import micros, thread_of

GRAM = 3
WIDE = "\u2e80"
"""From here on a letter alone says much: it is a gram by itself."""

POSITION_BITS = 24
"""An entry's id is its thread's row and its message's position; 0 is the title."""

MAX_CANDIDATES = 2000
CHUNK = 100
TEXTS = 32

Row = dict[str, Any]


def entry_id(thread_row: int, position: int) -> int:
    """Return the id of a message's entry in the index, or of a title's (position 0)."""
    return thread_row << POSITION_BITS | position


def grams(user: str, text: str) -> set[int]:
    """Return the numbers under which a text stands in the index."""
    return _numbers(user, {gram for word in set(fold(text).split()) for gram in _grams(word)})


def query_grams(user: str, pieces: Iterable[str]) -> set[int]:
    """Return the numbers that a text needs to have to contain all pieces; perhaps none."""
    needed: set[str] = set()
    for piece in pieces:
        wide = [letter >= WIDE for letter in piece]
        if len(piece) >= GRAM:
            needed.update(piece[n : n + GRAM] for n in range(len(piece) - GRAM + 1))
        elif all(wide):
            needed.add(piece)
        else:
            needed.update(letter for letter, is_wide in zip(piece, wide, strict=True) if is_wide)
    return _numbers(user, needed)


def _grams(word: str) -> Iterable[str]:
    yield from (word[n : n + GRAM] for n in range(len(word) - GRAM + 1))
    if not word.isascii():
        yield from (letter for letter in word if letter >= WIDE)
        yield from (
            one + two for one, two in itertools.pairwise(word) if one >= WIDE and two >= WIDE
        )


def _numbers(user: str, texts: Iterable[str]) -> set[int]:
    seed, crc = zlib.crc32(f"{user}\0".encode()), zlib.crc32
    return {crc(gram.encode(), seed) for gram in texts}


def _as_terms(numbers: Iterable[int]) -> str:
    return " ".join(f"{number:x}" for number in numbers)


def _as_integers(numbers: Iterable[int]) -> list[int]:
    return [number - (1 << 31) for number in numbers]


async def add_entry(database: Database, entry: int, numbers: set[int]) -> None:
    """Add a text's grams to the index."""
    if not numbers:
        return
    value: Any = _as_terms(numbers) if database.is_sqlite else _as_integers(numbers)
    await database.insert(
        "INSERT INTO chat_search (" + COLUMNS[database.is_sqlite], [(entry, value)]
    )


COLUMNS = {True: "rowid, grams)", False: "id, grams)"}


async def remove_entry(database: Database, entry: int, numbers: set[int]) -> None:
    """Remove a text's grams from the index; they have to be those that were added."""
    if not database.is_sqlite:
        await database.execute("DELETE FROM chat_search WHERE id = ?", entry)
    elif numbers:
        await database.execute(
            "INSERT INTO chat_search (chat_search, rowid, grams) VALUES ('delete', ?, ?)",
            entry,
            _as_terms(numbers),
        )


class Search:
    """One search of a user: at most ``limit`` threads after a place, newest activity first."""

    def __init__(
        self,
        database: Database,
        user: str,
        query: str,
        after: tuple[datetime, str] | None,
        limit: int,
    ) -> None:
        self._database = database
        self._user = user
        self._pieces = pieces(query)
        self._numbers = query_grams(user, self._pieces)
        self._after = None if after is None else (micros(after[0]), after[1])
        self._limit = limit

    async def threads(self) -> list[Thread]:
        """Return the threads whose title, or one of whose messages, contains every piece."""
        if not self._pieces:
            return []
        entries = await self._entries() if self._numbers else None
        if entries is None or len(entries) > MAX_CANDIDATES:
            return await self._walk()
        return await self._among(entries)

    async def _entries(self) -> list[int]:
        """Return the candidates, at most one over the bound."""
        value: Any = _as_integers(self._numbers)
        sql = "SELECT id FROM chat_search WHERE grams @> ? LIMIT ?"
        if self._database.is_sqlite:
            value = " AND ".join(f"{number:x}" for number in self._numbers)
            sql = "SELECT rowid AS id FROM chat_search WHERE chat_search MATCH ? LIMIT ?"
        rows = await self._database.fetch(sql, value, MAX_CANDIDATES + 1)
        return [row["id"] for row in rows]

    async def _among(self, entries: Sequence[int]) -> list[Thread]:
        """Return the threads of these candidates whose text has the pieces."""
        positions: dict[int, list[int]] = {}
        for entry in entries:
            row, position = entry >> POSITION_BITS, entry & (1 << POSITION_BITS) - 1
            positions.setdefault(row, []).append(position)
        results: list[Thread] = []
        for _, _, row_id in await self._order(list(positions)):
            threads = await self._rows("row_id = ?", [row_id], 1)
            if threads and await self._matches(threads[0], positions[row_id]):
                results.append(thread_of(threads[0]))
            if len(results) == self._limit:
                break
        return results

    async def _order(self, row_ids: Sequence[int]) -> list[tuple[int, str, int]]:
        """Return activity, id and row of the user's threads among these, newest first."""
        entries: list[tuple[int, str, int]] = []
        for start in range(0, len(row_ids), 500):
            chunk = row_ids[start : start + 500]
            rows = await self._database.fetch(
                "SELECT updated_at, id, row_id FROM chat_threads "
                f"WHERE row_id IN ({', '.join('?' * len(chunk))}) AND user_id = ?",
                *chunk,
                self._user,
            )
            entries += [(row["updated_at"], row["id"], row["row_id"]) for row in rows]
        if self._after is not None:
            entries = [each for each in entries if each[:2] < self._after]
        return sorted(entries, reverse=True)

    async def _walk(self) -> list[Thread]:
        """Read the user's texts, newest activity first, until enough threads are found.

        What has too many candidates is common, so that it is found soon.
        """
        matches: list[Thread] = []
        after = self._after
        while True:
            where, values = "user_id = ?", list[Any]([self._user])
            if after is not None:
                where, values = f"{where} AND (updated_at, id) < (?, ?)", [self._user, *after]
            rows = await self._rows(where, values, CHUNK)
            for row in rows:
                if await self._matches(row, None):
                    matches.append(thread_of(row))
                    if len(matches) == self._limit:
                        return matches
            if len(rows) < CHUNK:
                return matches
            after = (rows[-1]["updated_at"], rows[-1]["id"])

    async def _rows(self, where: str, values: Sequence[Any], limit: int) -> list[Row]:
        return await self._database.fetch(
            f"SELECT * FROM chat_threads WHERE {where} ORDER BY updated_at DESC, id DESC LIMIT ?",
            *values,
            limit,
        )

    async def _matches(self, thread: Row, positions: Sequence[int] | None) -> bool:
        """Return whether the title or a message contains all pieces; None stands for all."""
        if (positions is None or 0 in positions) and contains(thread["title"] or "", self._pieces):
            return True
        if positions is None:
            return await self._any_text(thread)
        places = sorted((each for each in positions if each), reverse=True)
        for start in range(0, len(places), TEXTS):
            chunk = places[start : start + TEXTS]
            marks = ", ".join("?" * len(chunk))
            if self._found_in(await self._texts(thread, f"position IN ({marks})", chunk)):
                return True
        return False

    async def _any_text(self, thread: Row) -> bool:
        upto = int(thread["message_count"])
        while upto > 0:
            where, upto = [upto, upto - TEXTS], upto - TEXTS
            if self._found_in(await self._texts(thread, "position <= ? AND position > ?", where)):
                return True
        return False

    async def _texts(self, thread: Row, where: str, values: Sequence[int]) -> list[Row]:
        return await self._database.fetch(
            f"SELECT substr(text, 1, {SEARCHED_CHARS}) AS text FROM chat_messages "
            f"WHERE user_id = ? AND thread_id = ? AND {where}",
            self._user,
            thread["id"],
            *values,
        )

    def _found_in(self, rows: Sequence[Row]) -> bool:
        return any(contains(row["text"], self._pieces) for row in rows)
