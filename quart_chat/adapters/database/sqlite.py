"""SQLite: connections with a thread each, which run a whole operation at a time.

A statement takes SQLite some ten microseconds, the way to another thread and back a hundred. So an
operation does not cross over for every statement: its coroutine is driven to its end in the
connection's thread, where nothing that it awaits ever waits.
"""

from __future__ import annotations

import asyncio
import sqlite3
import threading
import time
from collections.abc import Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from ...errors import StorageUnavailable

R = TypeVar("R")

CACHED_STATEMENTS = 256

INSERTED_ROWS = 64
"""Rows of one INSERT at most; halves of it for the rest, so that few statements are prepared."""

CHECKED_STEPS = 20_000
"""Steps of SQLite's machine between two looks at the clock, some milliseconds."""

_thread = threading.local()


def current() -> SQLite:
    """Return the connection whose thread this is."""
    connection: SQLite = _thread.connection
    return connection


class SQLite:
    """A connection; its statements are for the operations that ``run`` drives."""

    def __init__(self, path: str, pragmas: Mapping[str, Any], name: str = "sqlite") -> None:
        self._path = path
        self._pragmas = pragmas
        self._thread = ThreadPoolExecutor(1, f"quart_chat-{name}")
        self._connection: sqlite3.Connection | None = None

    async def open(self) -> None:
        """Connect. Raises sqlite3.Error."""
        await asyncio.get_running_loop().run_in_executor(self._thread, self._connect)

    def _connect(self) -> None:
        self._connection = self._connected()
        _thread.connection = self

    def _connected(self) -> sqlite3.Connection:
        connection = sqlite3.connect(
            self._path, isolation_level=None, cached_statements=CACHED_STATEMENTS
        )
        for name, value in self._pragmas.items():
            connection.execute(f"PRAGMA {name}={value}")
        return connection

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
                result = self._drive(operation, future)
            except BaseException as error:
                failure = error
            loop.call_soon_threadsafe(_settle, future, result, failure)

        self._thread.submit(work)
        return future

    def _drive(self, operation: Coroutine[Any, Any, R], _: asyncio.Future[R]) -> R:
        return _drive(operation)

    def fetch(self, sql: str, values: Sequence[Any]) -> list[dict[str, Any]]:
        """Return the rows of a statement."""
        cursor = self._cursor().execute(sql, values)
        names = [column[0] for column in cursor.description or ()]
        return [dict(zip(names, row, strict=True)) for row in cursor.fetchall()]

    def execute(self, sql: str, values: Sequence[Any]) -> int:
        """Return the number of rows that a statement changed."""
        return self._cursor().execute(sql, values).rowcount

    def execute_many(self, sql: str, rows: Sequence[Sequence[Any]]) -> None:
        """Run one statement for many rows."""
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


class SQLiteReader(SQLite):
    """A read-only connection whose operations see one state of the database each.

    An operation ends early after ``seconds``, or when nobody waits for it any more.
    """

    def __init__(
        self, path: str, pragmas: Mapping[str, Any], name: str, *, seconds: float, waiting: int
    ) -> None:
        kept = {k: v for k, v in pragmas.items() if k not in ("journal_mode", "synchronous")}
        super().__init__(f"{Path(path).absolute().as_uri()}?mode=ro", kept, name)
        self._seconds = seconds
        self._free = waiting
        self._until = 0.0
        self._future: asyncio.Future[Any] | None = None

    def _connected(self) -> sqlite3.Connection:
        connection = sqlite3.connect(
            self._path, isolation_level=None, cached_statements=CACHED_STATEMENTS, uri=True
        )
        for name, value in self._pragmas.items():
            connection.execute(f"PRAGMA {name}={value}")
        connection.set_progress_handler(self._is_over, CHECKED_STEPS)
        return connection

    def run(self, operation: Coroutine[Any, Any, R]) -> asyncio.Future[R]:
        """Begin an operation, which ends early if its future is cancelled.

        Raises:
            StorageUnavailable: Too many operations wait already.
        """
        if self._free <= 0:
            operation.close()
            raise StorageUnavailable
        self._free -= 1
        future = super().run(operation)
        future.add_done_callback(self._done)
        return future

    def _done(self, _: asyncio.Future[Any]) -> None:
        self._free += 1

    def _drive(self, operation: Coroutine[Any, Any, R], future: asyncio.Future[R]) -> R:
        if future.cancelled():
            operation.close()
            raise asyncio.CancelledError
        connection = self._connection
        if connection is None:
            operation.close()
            raise sqlite3.OperationalError("the database is closed")
        self._until, self._future = time.monotonic() + self._seconds, future
        try:
            connection.execute("BEGIN")
            return _drive(operation)
        finally:
            operation.close()
            self._until, self._future = 0.0, None
            if connection.in_transaction:
                connection.execute("ROLLBACK")

    def fetch(self, sql: str, values: Sequence[Any]) -> list[dict[str, Any]]:
        if self._is_over():
            raise sqlite3.OperationalError("interrupted")
        return super().fetch(sql, values)

    def _is_over(self) -> bool:
        future = self._future
        return future is not None and (future.cancelled() or time.monotonic() > self._until)


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
