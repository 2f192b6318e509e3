"""The database itself: files that cannot be used, options of URLs, readers, pools, locks."""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import sqlite3
import ssl
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager, closing
from pathlib import Path
from typing import Any

import pytest
from conftest import clean_environment, unique

from quart_chat.adapters import Stores, stores
from quart_chat.adapters.database import connection as connections
from quart_chat.adapters.database.connection import Database, reading, searching
from quart_chat.adapters.database.urls import CONNECTION, tortoise_config
from quart_chat.adapters.memory.storage import OVERHEAD, MemoryStorage
from quart_chat.config import resolve
from quart_chat.core.messages import Message, Thread
from quart_chat.core.ports import Window
from quart_chat.errors import ConfigurationError, NotFound, StorageUnavailable


@asynccontextmanager
async def opened(url: str, **options: Any) -> AsyncIterator[Stores]:
    async with AsyncExitStack() as stack:
        yield await stores(resolve({"CHAT_DATABASE_URL": url}, {}), stack, **options)


def said(message_id: str, content: str = "text", thread: str = "t") -> Message:
    return Message(id=message_id, thread_id=thread, role="user", content=content)


OPEN = (
    "import asyncio, concurrent.futures.thread, os, sys\n"
    "from quart_chat.adapters.database.connection import Database\n"
    "from quart_chat.errors import ConfigurationError\n"
    "database = Database(sys.argv[1])\n"
    "async def main():\n"
    "    await database.open()\n"
    "    await database.close()\n"
    "if os.geteuid() == 0:\n"
    "    os.setuid(65534)\n"
    "try:\n"
    "    asyncio.run(main())\n"
    "except ConfigurationError as error:\n"
    "    sys.exit(str(error))\n"
)


def open_as_nobody(path: Path) -> str:
    """Open a database as a user whom modes of files bind; return what it complains of."""
    process = subprocess.run(
        [sys.executable, "-c", OPEN, f"sqlite://{path}"],
        env=clean_environment(),
        cwd="/",
        capture_output=True,
        text=True,
        timeout=60,
    )
    return process.stderr


@pytest.fixture
def folder() -> Any:
    """A folder that any user may enter."""
    import tempfile

    path = Path(tempfile.mkdtemp(dir="/tmp"))
    path.chmod(0o755)
    yield path
    path.chmod(0o755)
    shutil.rmtree(path)


def test_a_folder_that_cannot_be_written(folder: Path) -> None:
    folder.chmod(0o555)
    complaint = open_as_nobody(folder / "chat.sqlite3")
    assert "cannot be opened for writing" in complaint
    assert "Traceback" not in complaint


def test_a_file_that_cannot_be_written(folder: Path) -> None:
    with closing(sqlite3.connect(folder / "chat.sqlite3")) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("CREATE TABLE t (a)")
    (folder / "chat.sqlite3").chmod(0o444)
    folder.chmod(0o777)
    complaint = open_as_nobody(folder / "chat.sqlite3")
    assert "cannot be opened for writing" in complaint
    assert "Traceback" not in complaint


async def test_what_is_no_database_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "garbage").write_bytes(b"this is not a database" * 1000)
    (tmp_path / "folder").mkdir()
    for name, sentence in {
        "garbage": "is not an SQLite database",
        "folder": "is a directory",
        "nowhere/chat.sqlite3": "does not exist",
    }.items():
        async with asyncio.timeout(10):
            with pytest.raises(ConfigurationError, match=sentence):
                async with opened(f"sqlite://{tmp_path / name}"):
                    pass
    assert (tmp_path / "garbage").read_bytes()[:7] == b"this is"


async def test_a_file_is_not_created_where_it_must_exist(tmp_path: Path) -> None:
    url = f"sqlite://{tmp_path / 'chat.sqlite3'}"
    with pytest.raises(ConfigurationError, match="There is no database at"):
        async with opened(url, create=False):
            pass
    assert list(tmp_path.iterdir()) == []
    async with opened(url):
        pass
    async with opened(url, create=False) as kept:
        await kept.storage.create_thread("u", Thread(id="t"))


@pytest.mark.parametrize("change", ["removed", "replaced"])
async def test_a_file_that_goes_under_a_server_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any, change: str
) -> None:
    file = tmp_path / "chat.sqlite3"
    monkeypatch.setattr("quart_chat.adapters.database.sqlite_file.CHECK_SECONDS", 0.0)
    async with opened(f"sqlite://{file}") as kept:
        await kept.storage.create_thread("u", Thread(id="t"))
        if change == "replaced":
            shutil.copy(file, tmp_path / "copy")
            (tmp_path / "copy").replace(file)
        else:
            file.unlink()
        for attempt in (
            lambda: kept.storage.create_thread("u", Thread(id="t2")),
            lambda: kept.storage.thread("u", "t"),
            lambda: kept.storage.threads("u", query="t", after=None, limit=5),
        ):
            with pytest.raises(StorageUnavailable):
                await attempt()
        lines = [r for r in caplog.records if "removed or replaced" in r.getMessage()]
        assert [line.levelno for line in lines] == [logging.ERROR]


async def test_a_second_server_on_a_file_is_named(tmp_path: Path, caplog: Any) -> None:
    url = f"sqlite://{tmp_path / 'chat.sqlite3'}"

    def warnings() -> list[str]:
        return [r.getMessage() for r in caplog.records if "Another server" in r.getMessage()]

    async with opened(url, serving=True):
        async with opened(url):  # the command line
            assert warnings() == []
        async with opened(url, serving=True):
            assert len(warnings()) == 1
            assert f"(process {os.getpid()})" in warnings()[0]
    async with opened(url, serving=True):
        assert len(warnings()) == 1


class Reader:
    """An adapter with operations that read for long."""

    ENDLESS = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT sum(i) FROM n"

    def __init__(self, database: Database) -> None:
        self._database = database

    @searching
    async def search(self) -> None:
        await self._database.fetch(
            self.ENDLESS if self._database.is_sqlite else "SELECT pg_sleep(60)"
        )

    @reading
    async def quick(self) -> int:
        rows = await self._database.fetch("SELECT 1 AS one")
        return int(rows[0]["one"])

    @reading
    async def write(self) -> None:
        await self._database.fetch("DELETE FROM chat_threads")


@pytest.fixture(params=["sqlite", "postgres"])
async def database(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Database]:
    if request.param == "sqlite":
        found = Database(f"sqlite://{tmp_path / 'a b#c?'.strip('?')}.sqlite3")
    else:
        found = Database(request.getfixturevalue("postgres")())
    await found.open()
    yield found
    await found.close()


async def test_a_search_that_takes_too_long_ends_and_delays_nobody(database: Database) -> None:
    reader = Reader(database)
    searches = [asyncio.ensure_future(reader.search()) for _ in range(2)]
    assert await reader.quick() == 1
    await database.run(database.execute("DELETE FROM chat_threads"))
    assert not any(search.done() for search in searches)
    searches[1].cancel()
    with pytest.raises(StorageUnavailable, match="Use longer words"):
        await asyncio.wait_for(searches[0], 20)
    with pytest.raises(asyncio.CancelledError):
        await searches[1]


async def test_a_search_whose_caller_went_away_ends(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = Reader(database)
    for each in database._readers.values():
        each._seconds = 60
    monkeypatch.setattr(connections, "SEARCH_SECONDS", 60)
    left = asyncio.ensure_future(reader.search())
    await reader.quick()
    left.cancel()
    await asyncio.wait([left])
    again = asyncio.ensure_future(database.search(database.fetch("SELECT 1 AS one")))
    assert await asyncio.wait_for(again, 20) == [{"one": 1}]


async def test_too_many_searches_are_refused(tmp_path: Path) -> None:
    database = Database(f"sqlite://{tmp_path / 'chat.sqlite3'}")
    await database.open()
    reader = Reader(database)
    waiting = [asyncio.ensure_future(reader.search()) for _ in range(60)]
    done, left = await asyncio.wait(waiting, timeout=0.5)
    assert len(done) == 60 - connections.WAITING_SEARCHES
    assert all(isinstance(each.exception(), StorageUnavailable) for each in done)
    for each in left:
        each.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)
    await database.close()


async def test_a_reader_cannot_write_and_holds_no_transaction(tmp_path: Path) -> None:
    database = Database(f"sqlite://{tmp_path / 'chat.sqlite3'}")
    await database.open()
    reader = Reader(database)
    with pytest.raises(StorageUnavailable):
        await reader.write()
    await reader.quick()
    assert not any(each._connection.in_transaction for each in database._readers.values())  # type: ignore[union-attr]
    rows = await database.run(database.fetch("PRAGMA wal_checkpoint(TRUNCATE)"))
    assert rows[0]["busy"] == 0
    await database.close()


async def test_what_was_written_is_read(tmp_path: Path) -> None:
    async with opened(f"sqlite://{tmp_path / 'chat.sqlite3'}") as kept:
        for n in range(200):
            await kept.storage.add_messages("u", [said(f"m{n}", f"text {n}")], create=True)
            newest = await kept.storage.messages("u", "t", Window(limit=1, order="desc"))
            assert newest[0].id == f"m{n}"
            assert await kept.storage.threads("u", query=f"text {n}", after=None, limit=1)


def credentials(query: str) -> dict[str, Any]:
    config = tortoise_config(f"postgres://ada:s%40@db.example:6543/chat?{query}")
    found: dict[str, Any] = config["connections"][CONNECTION]["credentials"]
    return found


def test_options_of_a_postgres_url_reach_asyncpg() -> None:
    found = credentials(
        "statement_cache_size=0&connect_timeout=3&command_timeout=4.5&maxsize=2&minsize=0"
        "&target_session_attrs=read-write&application_name=mine&sslmode=require"
        "&options=-c%20statement_timeout%3D5s&search_path=chat&passfile=/p"
    )
    assert found == found | {
        "host": "db.example",
        "port": 6543,
        "user": "ada",
        "password": "s@",
        "database": "chat",
        "statement_cache_size": 0,
        "timeout": 3,
        "command_timeout": 4.5,
        "maxsize": 2,
        "minsize": 0,
        "target_session_attrs": "read-write",
        "application_name": "mine",
        "ssl": "require",
        "passfile": "/p",
        "server_settings": {"options": "-c statement_timeout=5s", "search_path": "chat"},
    }


def test_certificates_of_a_postgres_url(tmp_path: Path) -> None:
    roots = ssl.get_default_verify_paths().cafile
    if roots is None or not Path(roots).exists():
        import certifi

        roots = certifi.where()
    full = credentials(f"sslmode=verify-full&sslrootcert={roots}")["ssl"]
    assert isinstance(full, ssl.SSLContext)
    assert full.check_hostname
    assert full.verify_mode is ssl.CERT_REQUIRED
    assert full.cert_store_stats()["x509_ca"] > 0
    authority = credentials(f"sslmode=verify-ca&sslrootcert={roots}")["ssl"]
    assert (authority.check_hostname, authority.verify_mode) == (False, ssl.CERT_REQUIRED)
    (tmp_path / "bad").write_text("no certificate")
    for query, sentence in {
        f"sslmode=verify-full&sslrootcert={tmp_path / 'nowhere'}": "sslrootcert cannot be read",
        f"sslmode=verify-full&sslrootcert={tmp_path / 'bad'}": "sslrootcert cannot be read",
        f"sslrootcert={roots}": "needs sslmode",
        "sslmode=mandatory": "sslmode must be one of",
    }.items():
        with pytest.raises(ConfigurationError, match=sentence):
            credentials(query)


@pytest.mark.parametrize(
    ("query", "sentence"),
    [
        ("pgbouncer=true", "the option 'pgbouncer' is not known"),
        ("statment_cache_size=0", "the option 'statment_cache_size' is not known"),
        ("statement_cache_size=many", "statement_cache_size must be a number"),
        ("maxsize=0", "maxsize must be at least 1"),
        ("maxsize=2&minsize=3", "maxsize must be at least 1"),
        ("port=x", "port must be a number"),
    ],
)
def test_what_a_postgres_url_cannot_say_is_refused(query: str, sentence: str) -> None:
    with pytest.raises(ConfigurationError, match=sentence):
        credentials(query)


def with_options(url: str, options: str) -> str:
    return f"{url}{'&' if '?' in url else '?'}{options}"


async def test_a_pool_of_one_connection_is_enough(postgres: Callable[[], str]) -> None:
    url = with_options(postgres(), "maxsize=1&statement_cache_size=0&options=-c%20work_mem%3D5MB")
    async with asyncio.timeout(60), opened(url) as kept:
        await asyncio.gather(
            *(kept.storage.add_messages("u", [said(f"m{n}")], create=True) for n in range(20))
        )
        assert (await kept.storage.thread("u", "t")).message_count == 20
        await kept.storage.delete_thread("u", "t")
    database = Database(url)
    await database.open()
    rows = await database.run(database.fetch("SELECT current_setting('work_mem') AS size"))
    assert rows == [{"size": "5MB"}]
    await database.close()


async def test_a_server_with_fewer_connections_than_the_pool(postgres: Callable[[], str]) -> None:
    """Operations wait for a connection of ours, instead of failing for want of a new one."""
    url = postgres()
    role = unique("role")
    name = url.partition("?")[0].rpartition("/")[2]
    database = Database(url)
    await database.open()
    for statement in (
        f"CREATE ROLE {role} LOGIN CONNECTION LIMIT 3",
        f"GRANT ALL ON SCHEMA public TO {role}",
        f"GRANT ALL ON ALL TABLES IN SCHEMA public TO {role}",
        f"GRANT ALL ON ALL SEQUENCES IN SCHEMA public TO {role}",
        f"GRANT ALL ON DATABASE {name} TO {role}",
    ):
        await database.run(database.execute(statement))
    async with opened(with_options(url, f"user={role}&maxsize=10")) as kept:
        stored = await asyncio.gather(
            *(
                kept.storage.add_messages("u", [said("m", thread=f"t{n}")], create=True)
                for n in range(80)
            ),
            *(kept.storage.threads("u", query=None, after=None, limit=5) for _ in range(20)),
            return_exceptions=True,
        )
        failures = [each for each in stored if isinstance(each, BaseException)]
        assert failures == []
    await database.close()


async def test_no_nul_reaches_the_database(postgres: Callable[[], str]) -> None:
    async with opened(postgres()) as kept:
        await kept.storage.create_thread("u", Thread(id="t", title="a\0b"))
        await kept.storage.add_messages("u", [said("m", "one\0two")])
        await kept.storage.update_thread("u", "t", {"title": "c\0d", "metadata": {"a": "e\0f"}})
        assert (await kept.storage.thread("u", "t")).title == "cd"
        assert (await kept.storage.messages("u", "t", Window(limit=1)))[0].content == "onetwo"


async def test_memory_is_bounded_by_characters_and_fair() -> None:
    storage = MemoryStorage(max_chars=100_000)
    await storage.add_messages("quiet", [said("m", "small")], create=True)
    for n in range(50):
        await storage.add_messages("loud", [said("m", "x" * 10_000, f"t{n}")], create=True)
    assert (await storage.thread("quiet", "t")).message_count == 1
    kept = await storage.threads("loud", query=None, after=None, limit=100)
    assert [thread.id for thread in kept] == [f"t{n}" for n in range(49, 49 - len(kept), -1)]
    assert 5 <= len(kept) <= 9


async def test_memory_counts_threads_without_messages() -> None:
    storage = MemoryStorage(max_chars=100 * OVERHEAD)
    await storage.create_thread("quiet", Thread(id="open"))
    for n in range(300):
        await storage.create_thread("loud", Thread(id=f"t{n}"))
    assert (await storage.thread("quiet", "open")).id == "open"
    assert len(await storage.threads("loud", query=None, after=None, limit=500)) <= 99
    with pytest.raises(NotFound):
        await storage.thread("loud", "t0")


async def test_memory_has_no_room_for_one_thread_of_all() -> None:
    storage = MemoryStorage(max_chars=50_000)
    await storage.add_messages("quiet", [said("m", "small")], create=True)
    for n in range(4):
        await storage.add_messages("loud", [said(f"m{n}", "x" * 10_000)], create=True)
    with pytest.raises(StorageUnavailable, match="Start a new thread"):
        await storage.add_messages("loud", [said("m4", "x" * 10_000)])
    assert (await storage.thread("quiet", "t")).message_count == 1
    await storage.delete_thread("loud", "t")
    assert await storage.add_messages("loud", [said("m", "x" * 10_000)], create=True)
