"""Database of the chat, separate from the host application's Tortoise.

Every operation runs as a task in a copy of our context; a copy, because a transaction puts its
connection into the context.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

from tortoise.transactions import in_transaction

from ...compat.tortoise import KeptContext, migrate, pending_migrations
from ...errors import ChatError, ConfigurationError, StorageUnavailable
from .sqlite import SQLite, SQLiteReader, current
from .sqlite_file import FileIdentity, ServingLock, locked_folder, probe
from .urls import APP, COMMAND_TIMEOUT, CONNECTION, tortoise_config

__all__ = [
    "APP",
    "CONNECTION",
    "Database",
    "database_operation",
    "reading",
    "searching",
    "tortoise_config",
]

logger = logging.getLogger("quart_chat.database")

MIGRATION_LOCK = 0x7175617274  # "quart" in ASCII, a key for PostgreSQL's advisory locks
OPEN_SECONDS = 30
READ_SECONDS = 5.0
SEARCH_SECONDS = 2.0
WAITING_READS = 1000
WAITING_SEARCHES = 32
CONNECTION_WAIT = 0.2
TOO_MANY_CONNECTIONS = "53300"  # SQLSTATE

SEARCH_TOO_LONG = "The search took too long. Use longer words."
FILE_REPLACED = "The database file was removed or replaced while the server runs. Restart it."

P = ParamSpec("P")
R = TypeVar("R")


class OperationRefused(Exception):
    """Error that an operation raises for its caller; it passes unchanged."""


class HasDatabase(Protocol):
    """An adapter that keeps its connection in ``_database``."""

    _database: Database


S = TypeVar("S", bound=HasDatabase)
Operation = Callable[Concatenate[S, P], Coroutine[Any, Any, R]]


def database_operation(method: Operation[S, P, R]) -> Operation[S, P, R]:
    """Run an adapter's method with the chat's database; it awaits nothing else."""

    async def call(self: S, /, *args: P.args, **kwargs: P.kwargs) -> R:
        return await self._database.run(method(self, *args, **kwargs))

    return call


def reading(method: Operation[S, P, R]) -> Operation[S, P, R]:
    """Run an adapter's method that only reads, beside those that write."""

    async def call(self: S, /, *args: P.args, **kwargs: P.kwargs) -> R:
        return await self._database.read(method(self, *args, **kwargs))

    return call


def searching(method: Operation[S, P, R]) -> Operation[S, P, R]:
    """Run an adapter's method that searches, within its own bound of time."""

    async def call(self: S, /, *args: P.args, **kwargs: P.kwargs) -> R:
        return await self._database.search(method(self, *args, **kwargs))

    return call


@functools.lru_cache(maxsize=512)
def _numbered(sql: str) -> str:
    pieces = sql.split("?")
    return "".join(f"{piece}${i}" for i, piece in enumerate(pieces[:-1], 1)) + pieces[-1]


class Database:
    """Connections, transactions and migrations of the chat's tables."""

    def __init__(self, url: str) -> None:
        self._config = tortoise_config(url)
        self._credentials = self._config["connections"][CONNECTION]["credentials"]
        self._sqlite: SQLite | None = None
        self._readers: dict[str, SQLiteReader] = {}
        self._file: FileIdentity | None = None
        self._lock: ServingLock | None = None
        if url.startswith("sqlite"):
            self._prepare_sqlite(self._credentials["file_path"])
        self._kept = KeptContext()
        self._under_way: set[asyncio.Task[Any]] = set()
        self._released = asyncio.Event()
        self._open = False
        self._warned = False

    def _prepare_sqlite(self, path: str) -> None:
        pragmas = {k: v for k, v in self._credentials.items() if k != "file_path"}
        self._sqlite = SQLite(path, pragmas)
        self._readers = {
            name: SQLiteReader(path, pragmas, f"sqlite-{name}", seconds=seconds, waiting=waiting)
            for name, seconds, waiting in (
                ("read", READ_SECONDS, WAITING_READS),
                ("search", SEARCH_SECONDS, WAITING_SEARCHES),
            )
        }

    @property
    def is_sqlite(self) -> bool:
        """Return whether statements are written for SQLite."""
        return self._sqlite is not None

    async def open(
        self, *, migrate: bool = True, create: bool = True, serving: bool = False
    ) -> None:
        """Connect, and bring the tables up to date.

        Without ``create`` an SQLite file must exist. With ``serving`` a warning names another
        process that serves the same file.

        Raises:
            ConfigurationError: The database cannot be reached or is not ours to use.
        """
        if self._sqlite is not None:
            path = self._credentials["file_path"]
            await asyncio.to_thread(probe, path, create=create)
            if serving:
                self._take_lock(path)
        self._kept.enter()
        self._open = True
        try:
            if self._sqlite is None:
                await self._in_tortoise(self._start(migrate))
                return
            async with locked_folder(self._credentials["file_path"]):
                await self._in_tortoise(self._start(migrate))
                await self._in_tortoise(self._kept.tortoise.close_connections())
                await self._open_sqlite(self._sqlite)
        except Exception as error:
            await self.close()
            if isinstance(error, ConfigurationError):
                raise
            raise ConfigurationError(_sentence(error)) from error

    async def _open_sqlite(self, writer: SQLite) -> None:
        await writer.open()
        for reader in self._readers.values():
            await reader.open()
        self._file = FileIdentity(self._credentials["file_path"])

    def _take_lock(self, path: str) -> None:
        self._lock = ServingLock(path)
        if (holder := self._lock.take()) is not None:
            logger.warning(
                "Another server (process %s) serves the database %s. Two servers do not see each "
                "other's answers under way: use one server for an SQLite file.",
                holder,
                path,
            )

    async def _in_tortoise(self, work: Coroutine[Any, Any, None]) -> None:
        await asyncio.create_task(work, context=self._kept.inside)

    async def _start(self, migrate: bool) -> None:
        async with asyncio.timeout(OPEN_SECONDS):
            await self._kept.tortoise.init(config=self._config)
            await self._client().execute_query("SELECT 1")
        if migrate:
            await self._migrate()
        elif pending := await pending_migrations(self._client(), self._config["apps"], APP):
            raise ConfigurationError(
                f"The database lacks migrations ({', '.join(pending)}). Run: quart_chat migrate"
            )

    async def _migrate(self) -> None:
        if self._sqlite is not None:
            await self._apply()
            return
        async with in_transaction(CONNECTION):
            await self.fetch("SELECT pg_advisory_xact_lock(?)", MIGRATION_LOCK)
            await self._apply()

    async def _apply(self) -> None:
        await migrate(self._client(), self._config["apps"], APP)

    async def close(self) -> None:
        """Wait for running operations, and disconnect."""
        if self._lock is not None:
            self._lock.release()
        if not self._open:
            return
        self._open = False
        if self._under_way:
            await asyncio.wait(set(self._under_way), timeout=COMMAND_TIMEOUT)
        for connection in (*self._readers.values(), self._sqlite):
            if connection is not None:
                await connection.close()
        await self._in_tortoise(self._kept.tortoise.close_connections())
        self._kept.leave()

    def check(self) -> None:
        """Check that the database is open and its file still the one that was opened.

        Raises:
            StorageUnavailable: It is not.
        """
        if not self._open:
            raise StorageUnavailable("The database is closed.")
        if self._file is None:
            return
        same = self._file.is_same()
        if not same and not self._warned:
            logger.error("%s (%s)", FILE_REPLACED, self._credentials["file_path"])
        self._warned = not same
        if not same:
            raise StorageUnavailable

    def _check(self, operation: Coroutine[Any, Any, Any]) -> None:
        try:
            self.check()
        except StorageUnavailable:
            operation.close()
            raise

    async def run(self, operation: Coroutine[Any, Any, R]) -> R:
        """Run an operation with the chat's database as the current one.

        It finishes even if the caller is cancelled: a statement is never cut.

        Raises:
            StorageUnavailable: The database does not answer, or has no room.
        """
        self._check(operation)
        with _readable_errors():
            if self._sqlite is not None:
                return await self._sqlite.run(operation)
            return await asyncio.shield(self._task(operation))

    async def read(self, operation: Coroutine[Any, Any, R]) -> R:
        """Run an operation that only reads; it ends when the caller is cancelled.

        It sees all that was written before it began, and waits for no operation that writes.

        Raises:
            StorageUnavailable: The database does not answer in time.
        """
        return await self._read(operation, "read", READ_SECONDS)

    async def search(self, operation: Coroutine[Any, Any, R]) -> R:
        """Run an operation that may read much, within two seconds.

        Raises:
            StorageUnavailable: It takes longer, or too many wait already.
        """
        return await self._read(operation, "search", SEARCH_SECONDS, SEARCH_TOO_LONG)

    async def _read(
        self,
        operation: Coroutine[Any, Any, R],
        reader: str,
        seconds: float,
        too_long: str | None = None,
    ) -> R:
        self._check(operation)
        with _readable_errors(too_long):
            if self._sqlite is not None:
                return await self._readers[reader].run(operation)
            async with asyncio.timeout(max(seconds, 0 if too_long else COMMAND_TIMEOUT)):
                return await self._task(operation)

    def _task(self, operation: Coroutine[Any, Any, R]) -> asyncio.Task[R]:
        task = asyncio.create_task(operation, context=self._kept.inside.copy())
        self._under_way.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._under_way.discard(task)
        self._released.set()
        if not task.cancelled():
            task.exception()

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[None]:
        """Make the statements inside one unit."""
        if self._sqlite is None:
            transaction = in_transaction(CONNECTION)
            async with AsyncExitStack() as stack:
                await self._patiently(transaction.__aenter__)
                stack.push_async_exit(transaction)
                yield
            return
        self._sqlite.execute("BEGIN IMMEDIATE", ())
        try:
            yield
        except BaseException:
            self._sqlite.execute("ROLLBACK", ())
            raise
        self._sqlite.execute("COMMIT", ())

    async def fetch(self, sql: str, *values: Any) -> list[dict[str, Any]]:
        """Return the rows of a statement; ``?`` stands for a value."""
        if self._sqlite is not None:
            return current().fetch(sql, values)
        rows: list[dict[str, Any]] = await self._patiently(
            lambda: self._client().execute_query_dict(_numbered(sql), _bare(values))
        )
        return rows

    async def execute(self, sql: str, *values: Any) -> int:
        """Return the number of rows that an UPDATE or DELETE changed."""
        if self._sqlite is not None:
            return self._sqlite.execute(sql, values)
        count, _ = await self._patiently(
            lambda: self._client().execute_query(_numbered(sql), _bare(values))
        )
        return int(count)

    async def insert(self, into: str, rows: Sequence[Sequence[Any]]) -> None:
        """Insert rows; ``into`` is the statement up to its ``VALUES``."""
        if self._sqlite is not None:
            self._sqlite.insert(into, rows)
            return
        await self.execute_many(f"{into} VALUES ({', '.join('?' * len(rows[0]))})", rows)

    async def execute_many(self, sql: str, rows: Sequence[Sequence[Any]]) -> None:
        """Run one statement for many rows."""
        if self._sqlite is not None:
            self._sqlite.execute_many(sql, rows)
            return
        bare = [_bare(row) for row in rows]
        await self._patiently(lambda: self._client().execute_many(_numbered(sql), bare))

    def _client(self) -> Any:
        return self._kept.client(CONNECTION)

    async def _patiently(self, statement: Callable[[], Awaitable[R]]) -> R:
        """Run a statement; wait for a connection of ours when the server has no more of them."""
        until = time.monotonic() + COMMAND_TIMEOUT
        while True:
            self._released.clear()
            try:
                return await statement()
            except Exception as error:
                full = getattr(error, "sqlstate", None) == TOO_MANY_CONNECTIONS
                if not full or time.monotonic() > until:
                    raise
            await _wait(self._released, CONNECTION_WAIT)


@contextmanager
def _readable_errors(too_long: str | None = None) -> Iterator[None]:
    try:
        yield
    except (ChatError, OperationRefused, asyncio.CancelledError):
        raise
    except Exception as error:
        if isinstance(error, TimeoutError) or str(error) == "interrupted":
            raise StorageUnavailable(too_long) from error
        logger.warning("database: %s: %s", type(error).__name__, _first_line(error))
        raise StorageUnavailable from error


async def _wait(event: asyncio.Event, seconds: float) -> None:
    try:
        async with asyncio.timeout(seconds):
            await event.wait()
    except TimeoutError:
        pass


def _bare(values: Sequence[Any]) -> list[Any]:
    """Return values without NUL, which PostgreSQL's text cannot hold."""
    return [
        value.replace("\0", "") if isinstance(value, str) and "\0" in value else value
        for value in values
    ]


def _sentence(error: Exception) -> str:
    if isinstance(error, TimeoutError):
        return f"CHAT_DATABASE_URL: the database did not answer within {OPEN_SECONDS} seconds."
    return (
        f"CHAT_DATABASE_URL: the database cannot be opened ({type(error).__name__}: "
        f"{_first_line(error)})."
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0][:200]
