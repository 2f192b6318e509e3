"""One database of our own, beside whatever Tortoise the host application has.

Tortoise keeps its state in a context variable with one fallback for the whole process, which
belongs to the host. So ours is entered once inside a context of its own, and every operation runs
as a task in a copy of it; a copy, because a transaction puts its connection into the context.
"""

from __future__ import annotations

import asyncio
import contextvars
import functools
import logging
import os
import re
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar
from urllib.parse import parse_qsl, unquote, urlsplit

from tortoise.context import TortoiseContext
from tortoise.migrations.executor import MigrationExecutor, MigrationTarget, PlanStep
from tortoise.transactions import in_transaction

from ...errors import ChatError, ConfigurationError, StorageUnavailable
from .sqlite import SQLite

logger = logging.getLogger("quart_chat.database")

CONNECTION = "chat"
APP = "quart_chat"
MIGRATION_LOCK = 0x7175617274  # "quart" in ASCII, a key for PostgreSQL's advisory locks
COMMAND_TIMEOUT = 15
POOL_SIZE = 10

P = ParamSpec("P")
R = TypeVar("R")


class HasDatabase(Protocol):
    """An adapter that keeps its connection in ``_database``."""

    _database: Database


S = TypeVar("S", bound=HasDatabase)


def inside(
    method: Callable[Concatenate[S, P], Coroutine[Any, Any, R]],
) -> Callable[Concatenate[S, P], Coroutine[Any, Any, R]]:
    """Let an adapter's method run where our database is the current one; it awaits nothing else."""

    async def call(self: S, /, *args: P.args, **kwargs: P.kwargs) -> R:
        return await self._database.run(method(self, *args, **kwargs))

    return call


def tortoise_config(url: str) -> dict[str, Any]:
    """What Tortoise is told for a database URL.

    Raises:
        ConfigurationError: It is neither SQLite nor PostgreSQL, or its folder is not there.
    """
    scheme, _, rest = url.partition("://")
    if scheme == "sqlite" and rest:
        engine, credentials = "tortoise.backends.sqlite", _sqlite(rest)
    elif scheme in ("postgres", "postgresql") and rest:
        engine, credentials = "tortoise.backends.asyncpg", _postgres(url)
    else:
        raise ConfigurationError(
            f"CHAT_DATABASE_URL: {scheme or url!r} is not known; allowed are sqlite://PATH, "
            "postgres://… and postgresql://…."
        )
    return {
        "connections": {CONNECTION: {"engine": engine, "credentials": credentials}},
        "apps": {
            APP: {
                "models": ["quart_chat.adapters.database.models"],
                "default_connection": CONNECTION,
                "migrations": "quart_chat.adapters.database.migrations",
            }
        },
    }


def _sqlite(rest: str) -> dict[str, Any]:
    path, _, query = rest.partition("?")
    if path == ":memory:":
        raise ConfigurationError("CHAT_DATABASE_URL: for memory set CHAT_STORAGE=memory.")
    if not Path(path).expanduser().absolute().parent.is_dir():
        raise ConfigurationError(f"CHAT_DATABASE_URL: the folder of {path} does not exist.")
    pragmas: dict[str, Any] = {
        "journal_mode": "WAL",
        "synchronous": "NORMAL",
        "busy_timeout": 5000,
    }
    pragmas |= {k: v for k, v in parse_qsl(query) if re.fullmatch(r"\w+", k + v)}
    return {"file_path": str(Path(path).expanduser()), **pragmas}


def _postgres(url: str) -> dict[str, Any]:
    try:
        import asyncpg  # noqa: F401
    except ImportError:
        raise ConfigurationError(
            "CHAT_DATABASE_URL: PostgreSQL needs asyncpg. Run: pip install 'quart-chat[postgres]'"
        ) from None
    parts = urlsplit(url)
    options: dict[str, Any] = dict(parse_qsl(parts.query))
    credentials: dict[str, Any] = {
        "host": options.pop("host", None) or parts.hostname or "localhost",
        "port": int(options.pop("port", 0) or parts.port or 5432),
        "user": options.pop("user", None) or unquote(parts.username or "") or None,
        "password": options.pop("password", None) or unquote(parts.password or "") or None,
        "database": unquote(parts.path.lstrip("/")) or options.pop("dbname", None) or "postgres",
        "minsize": 1,
        "maxsize": int(options.pop("maxsize", POOL_SIZE)),
        "command_timeout": COMMAND_TIMEOUT,
        "application_name": "quart_chat",
    }
    if sslmode := options.pop("sslmode", None):
        credentials["ssl"] = sslmode
    return credentials


@functools.lru_cache(maxsize=512)
def _numbered(sql: str) -> str:
    pieces = sql.split("?")
    return "".join(f"{piece}${i}" for i, piece in enumerate(pieces[:-1], 1)) + pieces[-1]


class Database:
    """Connections, transactions and migrations of our own tables."""

    def __init__(self, url: str) -> None:
        self._config = tortoise_config(url)
        self._credentials = self._config["connections"][CONNECTION]["credentials"]
        self._sqlite: SQLite | None = None
        if url.startswith("sqlite"):
            pragmas = {k: v for k, v in self._credentials.items() if k != "file_path"}
            self._sqlite = SQLite(self._credentials["file_path"], pragmas)
        self._context = TortoiseContext()
        self._inside = contextvars.copy_context()
        self._under_way: set[asyncio.Task[Any]] = set()
        self._open = False

    @property
    def is_sqlite(self) -> bool:
        """Whether statements are written for SQLite."""
        return self._sqlite is not None

    async def open(self, *, migrate: bool = True) -> None:
        """Connect, and bring the tables up to date.

        Raises:
            ConfigurationError: The database can not be reached or is not ours to use.
        """
        self._inside.run(self._context.__enter__)
        self._open = True
        try:
            await self._in_tortoise(self._start(migrate))
            if self._sqlite is not None:
                await self._in_tortoise(self._context.close_connections())
                await self._sqlite.open()
        except ConfigurationError:
            await self.close()
            raise
        except Exception as error:
            await self.close()
            raise ConfigurationError(
                f"CHAT_DATABASE_URL: the database can not be opened ({type(error).__name__}: "
                f"{_first_line(error)})."
            ) from error

    async def _in_tortoise(self, work: Coroutine[Any, Any, None]) -> None:
        await asyncio.create_task(work, context=self._inside)

    async def _start(self, migrate: bool) -> None:
        await self._context.init(config=self._config)
        if migrate:
            await self._migrate()
        elif pending := await self._pending():
            names = ", ".join(step.migration.name for step in pending)
            raise ConfigurationError(
                f"The database lacks migrations ({names}). Run: quart_chat migrate"
            )

    async def close(self) -> None:
        """Wait for what is under way, and disconnect."""
        if not self._open:
            return
        self._open = False
        if self._under_way:
            await asyncio.wait(set(self._under_way), timeout=COMMAND_TIMEOUT)
        if self._sqlite is not None:
            await self._sqlite.close()
        await self._in_tortoise(self._context.close_connections())
        self._inside.run(self._context.__exit__, None, None, None)

    async def run(self, operation: Coroutine[Any, Any, R]) -> R:
        """Run an operation where our database is the current one.

        It goes on to its end also where the caller is cancelled: a statement is never cut in half.

        Raises:
            StorageUnavailable: The database does not answer, or has no room.
        """
        if not self._open:
            operation.close()
            raise StorageUnavailable("The database is closed.")
        try:
            if self._sqlite is not None:
                return await self._sqlite.run(operation)
            task = asyncio.create_task(operation, context=self._inside.copy())
            self._under_way.add(task)
            task.add_done_callback(self._done)
            return await asyncio.shield(task)
        except (ChatError, asyncio.CancelledError):
            raise
        except Exception as error:
            logger.warning("database: %s: %s", type(error).__name__, _first_line(error))
            raise StorageUnavailable from error

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._under_way.discard(task)
        if not task.cancelled():
            task.exception()

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[None]:
        """Make the statements inside one unit."""
        if self._sqlite is None:
            async with in_transaction(CONNECTION):
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
        """The rows of a statement; ``?`` stands for a value."""
        if self._sqlite is not None:
            return self._sqlite.fetch(sql, values)
        client = self._context.connections.get(CONNECTION)
        return await client.execute_query_dict(_numbered(sql), list(values))

    async def execute(self, sql: str, *values: Any) -> int:
        """The number of rows that an UPDATE or DELETE changed."""
        if self._sqlite is not None:
            return self._sqlite.execute(sql, values)
        client = self._context.connections.get(CONNECTION)
        count, _ = await client.execute_query(_numbered(sql), list(values))
        return int(count)

    async def insert(self, into: str, rows: Sequence[Sequence[Any]]) -> None:
        """Insert rows; ``into`` is the statement up to its ``VALUES``."""
        if self._sqlite is not None:
            self._sqlite.insert(into, rows)
            return
        await self.execute_many(f"{into} VALUES ({', '.join('?' * len(rows[0]))})", rows)

    async def execute_many(self, sql: str, rows: Sequence[Sequence[Any]]) -> None:
        """One statement for many rows."""
        if self._sqlite is not None:
            self._sqlite.execute_many(sql, rows)
            return
        client = self._context.connections.get(CONNECTION)
        await client.execute_many(_numbered(sql), [list(row) for row in rows])

    def _executor(self) -> MigrationExecutor:
        client = self._context.connections.get(CONNECTION)
        return MigrationExecutor(client, self._config["apps"])

    async def _pending(self) -> list[PlanStep]:
        return await self._executor().plan([MigrationTarget(APP, "__latest__")])

    async def _migrate(self) -> None:
        if self._sqlite is not None:
            with await asyncio.to_thread(_locked_folder, str(self._credentials["file_path"])):
                await self._apply()
            return
        outside = contextvars.copy_context()
        async with in_transaction(CONNECTION):
            await self.fetch("SELECT pg_advisory_xact_lock(?)", MIGRATION_LOCK)
            await asyncio.create_task(self._apply(), context=outside)

    async def _apply(self) -> None:
        await self._executor().migrate([MigrationTarget(APP, "__latest__")])


class _locked_folder:
    """Keeps other processes from migrating a file of this folder at the same time."""

    def __init__(self, path: str) -> None:
        self._handle: int | None = None
        try:
            import fcntl
        except ImportError:  # Windows, where one process serves a file
            return
        self._handle = os.open(Path(path).absolute().parent, os.O_RDONLY)
        fcntl.flock(self._handle, fcntl.LOCK_EX)

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        if self._handle is not None:
            os.close(self._handle)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0][:200]
