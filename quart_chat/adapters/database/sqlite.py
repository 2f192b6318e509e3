"""SQLite: one connection and one thread, which runs a whole operation at a time.

A statement takes SQLite some ten microseconds, the way to another thread and back a hundred. So an
operation does not cross over for every statement: its coroutine is driven to its end in the
database's thread, where nothing that it awaits ever waits.
"""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

R = TypeVar("R")

CACHED_STATEMENTS = 256

INSERTED_ROWS = 64
"""Rows of one INSERT at most; halves of it for the rest, so that few statements are prepared."""


class SQLite:
    """The connection; its statements are for the operations that ``run`` drives."""

    def __init__(self, path: str, pragmas: Mapping[str, Any]) -> None:
        self._path = path
        self._pragmas = pragmas
        self._thread = ThreadPoolExecutor(1, "quart_chat-sqlite")
        self._connection: sqlite3.Connection | None = None

    async def open(self) -> None:
        """Connect. Raises sqlite3.Error."""
        await asyncio.get_running_loop().run_in_executor(self._thread, self._connect)

    def _connect(self) -> None:
        connection = sqlite3.connect(
            self._path, isolation_level=None, cached_statements=CACHED_STATEMENTS
        )
        for name, value in self._pragmas.items():
            connection.execute(f"PRAGMA {name}={value}")
        self._connection = connection

    async def close(self) -> None:
        """Disconnect."""
        if self._connection is not None:
            close = self._connection.close
            await asyncio.get_running_loop().run_in_executor(self._thread, close)
            self._connection = None
        self._thread.shutdown(wait=False)

    def run(self, operation: Coroutine[Any, Any, R]) -> asyncio.Future[R]:
        """Begin an operation, which nothing ends early; the future has its result."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[R] = loop.create_future()

        def work() -> None:
            result: R | None = None
            failure: BaseException | None = None
            try:
                result = _drive(operation)
            except BaseException as error:
                failure = error
            loop.call_soon_threadsafe(_settle, future, result, failure)

        self._thread.submit(work)
        return future

    def fetch(self, sql: str, values: Sequence[Any]) -> list[dict[str, Any]]:
        """The rows of a statement."""
        cursor = self._cursor().execute(sql, values)
        names = [column[0] for column in cursor.description or ()]
        return [dict(zip(names, row, strict=True)) for row in cursor.fetchall()]

    def execute(self, sql: str, values: Sequence[Any]) -> int:
        """The number of rows that a statement changed."""
        return self._cursor().execute(sql, values).rowcount

    def execute_many(self, sql: str, rows: Sequence[Sequence[Any]]) -> None:
        """One statement for many rows."""
        self._cursor().executemany(sql, rows)

    def insert(self, into: str, rows: Sequence[Sequence[Any]]) -> None:
        """Insert rows, many in a statement: between two steps the interpreter may be taken away."""
        left, size = list(rows), INSERTED_ROWS
        while left:
            while size > len(left):
                size //= 2
            values = f"({', '.join('?' * len(left[0]))})"
            statement = f"{into} VALUES {', '.join([values] * size)}"
            self._cursor().execute(statement, [each for row in left[:size] for each in row])
            del left[:size]

    def _cursor(self) -> sqlite3.Cursor:
        if self._connection is None:
            raise sqlite3.OperationalError("the database is closed")
        return self._connection.cursor()


def _settle(future: asyncio.Future[Any], result: Any, failure: BaseException | None) -> None:
    if future.cancelled():
        return
    if failure is None:
        future.set_result(result)
    else:
        future.set_exception(failure)


def _drive(operation: Coroutine[Any, Any, R]) -> R:
    try:
        operation.send(None)
    except StopIteration as done:
        result: R = done.value
        return result
    operation.close()
    raise RuntimeError("a database operation awaited something that is not the database")
