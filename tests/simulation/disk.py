"""The database of a simulated world: SQLite in memory, operations in line after a drawn delay."""

from __future__ import annotations

import asyncio
import functools
import os
import sqlite3
import tempfile
from collections.abc import AsyncIterator, Coroutine, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

from simloom import draw

from quart_chat.adapters.database.connection import Database
from quart_chat.adapters.database.sqlite import SQLite, _drive
from quart_chat.errors import ChatError, StorageUnavailable

TEMPLATE = "QUART_CHAT_SIMULATION_TEMPLATE"
"""The variable that names the file of a migrated, empty database, for all processes."""


@contextmanager
def prepared() -> Iterator[None]:
    """Make the database that every schedule begins with."""

    async def migrate(path: Path) -> None:
        database = Database(f"sqlite://{path}?journal_mode=DELETE")
        await database.open()
        await database.close()

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "template.sqlite3"
        asyncio.run(migrate(path))
        os.environ[TEMPLATE] = str(path)
        try:
            yield
        finally:
            del os.environ[TEMPLATE]


@functools.cache
def template(path: str) -> bytes:
    """Return the database that every schedule begins with."""
    return Path(path).read_bytes()


class Disk:
    """What survives a crash: what was committed. ``away`` is an outage."""

    def __init__(self) -> None:
        self.away = False
        self.faults = False
        self.connection = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)
        self.connection.deserialize(template(os.environ[TEMPLATE]))

    def rows(self, sql: str, *values: Any) -> list[tuple[Any, ...]]:
        """Return the rows of a statement, for the checks at the end."""
        return self.connection.execute(sql, values).fetchall()

    def close(self) -> None:
        """Throw it away."""
        self.connection.close()


class SimulatedDatabase:
    """One process's way to the disk, with the methods of ``Database`` that the adapters use."""

    is_sqlite = True

    def __init__(self, disk: Disk) -> None:
        self.dead = False
        self._disk = disk
        self._sqlite = SQLite(":memory:", {})
        self._sqlite._connection = disk.connection
        self._sqlite._thread.shutdown(wait=False)

    async def run(self, operation: Coroutine[Any, Any, Any]) -> Any:
        """Do it to the end, also if the caller is cancelled, as the real one does."""
        task = asyncio.create_task(self._run(operation))
        task.add_done_callback(lambda done: done.cancelled() or done.exception())
        return await asyncio.shield(task)

    read = search = run

    async def _run(self, operation: Coroutine[Any, Any, Any]) -> Any:
        fault = draw("disk.fault", 40) if self._disk.faults else 0
        try:
            await self._delay()
        except asyncio.CancelledError:
            operation.close()
            raise
        if self.dead or self._disk.away or fault == 1:
            operation.close()
            raise StorageUnavailable
        try:
            result = _drive(operation)
        except ChatError:
            raise
        except Exception as error:
            raise StorageUnavailable from error
        await self._delay()
        if fault == 2:  # it is done, and nobody knows
            raise StorageUnavailable
        return result

    async def _delay(self) -> None:
        steps = draw("disk.delay", 4)
        if steps == 3:
            await asyncio.sleep(0.05)
        else:
            for _ in range(steps):
                await asyncio.sleep(0)

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[None]:
        self._sqlite.execute("BEGIN IMMEDIATE", ())
        try:
            yield
        except BaseException:
            self._sqlite.execute("ROLLBACK", ())
            raise
        self._sqlite.execute("COMMIT", ())

    async def fetch(self, sql: str, *values: Any) -> list[dict[str, Any]]:
        return self._sqlite.fetch(sql, values)

    async def execute(self, sql: str, *values: Any) -> int:
        return self._sqlite.execute(sql, values)

    async def insert(self, into: str, rows: Sequence[Sequence[Any]]) -> None:
        self._sqlite.insert(into, rows)

    async def execute_many(self, sql: str, rows: Sequence[Sequence[Any]]) -> None:
        self._sqlite.execute_many(sql, rows)
