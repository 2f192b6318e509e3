"""File of an SQLite database: probe, identity and locks."""

from __future__ import annotations

import asyncio
import errno
import os
import sqlite3
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from pathlib import Path

from ...errors import ConfigurationError

try:
    import fcntl
except ImportError:  # Windows, where one process serves a file
    fcntl = None  # type: ignore[assignment]

CHECK_SECONDS = 1.0
BUSY = ("database is locked", "database table is locked")


def probe(path: str, *, create: bool) -> None:
    """Open the file and write to it, before anything else does.

    Raises:
        ConfigurationError: It cannot be read or written, is no database, or does not exist
            although it must.
    """
    if Path(path).is_dir():
        raise ConfigurationError(f"CHAT_DATABASE_URL: {path} is a directory. Name a file in it.")
    if not create and not Path(path).exists():
        raise ConfigurationError(f"There is no database at {path}.")
    try:
        with closing(sqlite3.connect(path, timeout=2, isolation_level=None)) as connection:
            _write(connection)
    except sqlite3.DatabaseError as error:
        raise ConfigurationError(_sentence(path, error)) from error


def _write(connection: sqlite3.Connection) -> None:
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    try:
        connection.execute("BEGIN IMMEDIATE")
        connection.execute(f"PRAGMA user_version = {version}")
        connection.execute("COMMIT")
    except sqlite3.OperationalError as error:
        if str(error) not in BUSY:  # somebody else writes, so it can be written
            raise


def _sentence(path: str, error: sqlite3.DatabaseError) -> str:
    reason = str(error)
    if "not a database" in reason or "malformed" in reason:
        return f"CHAT_DATABASE_URL: {path} is not an SQLite database. Choose another file."
    if "full" in reason:
        return f"CHAT_DATABASE_URL: there is no room on the disk of {path}."
    return (
        f"CHAT_DATABASE_URL: {path} cannot be opened for writing ({reason}). "
        "Make the file and its folder writable, or choose another path."
    )


class FileIdentity:
    """Identity of an opened file, compared with the file at its path."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._opened = self._now()
        self._checked_at = time.monotonic()
        self._same = True

    def is_same(self) -> bool:
        """Return whether the file is still the one that was opened; look once a second."""
        moment = time.monotonic()
        if moment - self._checked_at >= CHECK_SECONDS:
            self._checked_at = moment
            self._same = self._now() == self._opened
        return self._same

    def _now(self) -> tuple[int, int] | None:
        try:
            status = os.stat(self._path)
        except OSError:
            return None
        return status.st_dev, status.st_ino


class ServingLock:
    """A lock file beside the database, held while a process serves it."""

    def __init__(self, path: str) -> None:
        self._path = f"{path}.lock"
        self._handle: int | None = None

    def take(self) -> str | None:
        """Take the lock; return the process id of the holder if another has it."""
        if fcntl is None:
            return None
        try:
            handle = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError:
            return None
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.read(handle, 20).decode(errors="replace").strip()
            os.close(handle)
            return (holder or "unknown") if error.errno in (errno.EAGAIN, errno.EACCES) else None
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"{os.getpid()}\n".encode(), 0)
        self._handle = handle
        return None

    def release(self) -> None:
        """Release the lock, if it is held."""
        if self._handle is not None:
            os.ftruncate(self._handle, 0)
            os.close(self._handle)
            self._handle = None


@asynccontextmanager
async def locked_folder(path: str) -> AsyncIterator[None]:
    """Keep other processes from migrating a file of this folder at the same time."""
    if fcntl is None:
        yield
        return
    handle = os.open(Path(path).absolute().parent, os.O_RDONLY)
    try:
        await asyncio.to_thread(fcntl.flock, handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
