"""Export, erasure, retention and migrations: the command line as processes, on both databases."""

from __future__ import annotations

import asyncio
import json
import sqlite3
import sys
import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from conftest import SECONDS, Serve, clean_environment, client, connect, post, start, unique
from endpoint import Endpoint

from quart_chat.adapters import stores
from quart_chat.config import resolve
from quart_chat.core.messages import Message, Thread

TABLES = ("chat_threads", "chat_messages", "chat_runs", "chat_events")
DAY = 86_400_000_000
PROVIDERS = '{"p": {"base_url": "http://127.0.0.1:9/v1", "default_model": "m"}}'


@dataclass
class Database:
    """A database with ways into it around the server, and the command line on it."""

    url: str
    cwd: Path

    async def execute(self, sql: str) -> list[tuple[Any, ...]]:
        if self.url.startswith("sqlite"):
            connection = sqlite3.connect(self.url.removeprefix("sqlite://"), isolation_level=None)
            try:
                return connection.execute(sql).fetchall()
            finally:
                connection.close()
        import asyncpg

        connected = await asyncpg.connect(self.url)
        try:
            return [tuple(row) for row in await connected.fetch(sql)]
        finally:
            await connected.close()

    async def counts(self) -> dict[str, int]:
        return {
            table: (await self.execute(f"SELECT count(*) FROM {table}"))[0][0] for table in TABLES
        }

    async def run(
        self, *arguments: str, answer: str | None = None, **environ: str
    ) -> tuple[int, str, str]:
        """The exit code, output and complaints of ``quart_chat`` with these arguments."""
        ours = {"QUART_CHAT_DATABASE_URL": self.url, "QUART_CHAT_PROVIDERS": PROVIDERS}
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "quart_chat", *arguments),
            env={**clean_environment(), **ours, **environ},
            cwd=self.cwd,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        given = None if answer is None else answer.encode()
        try:
            out, complaints = await asyncio.wait_for(process.communicate(given), 60)
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        assert b"Traceback" not in complaints, complaints.decode()
        return process.returncode or 0, out.decode(), complaints.decode()


@pytest.fixture(params=["sqlite", "postgres"])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> Database:
    """A new, empty database."""
    if request.param == "sqlite":
        return Database(f"sqlite://{tmp_path / 'chat.sqlite3'}", tmp_path)
    return Database(request.getfixturevalue("postgres")(), tmp_path)


async def fill(database: Database, user: str, words: str) -> None:
    async with AsyncExitStack() as stack:
        kept = await stores(resolve({"CHAT_DATABASE_URL": database.url}, {}), stack)
        message = Message(id="m", thread_id="ü/1", role="user", content=words)
        await kept.storage.add_messages(user, [message], create=True)
        await kept.storage.create_thread(user, Thread(id="empty", title=words))


async def test_export_writes_everything_of_one_user_as_json_lines(
    database: Database, serve: Serve
) -> None:
    server = await serve(database_url=database.url)
    events = await post(server, {"content": "mine ü\u2028😀", "thread_id": "t", "id": "q"})
    await post(server, {"content": "edit", "thread_id": "t", "parent_id": "q"})
    await fill(database, "other", "theirs")
    code, out, complaints = await database.run("export", "--user", "1")
    assert (code, complaints) == (0, "")
    records = [json.loads(line) for line in out.removesuffix("\n").split("\n")]
    assert [record["type"] for record in records].count("message") == 4
    assert "theirs" not in out
    async with client(server) as http:
        thread = (await http.get("/chat/threads/t")).json()
        messages = (await http.get("/chat/threads/t/messages?branch=all")).json()["messages"]
    assert [r for r in records if r["type"] == "thread"] == [{"type": "thread", **thread}]
    shown = [{"type": "message", **message} for message in messages]
    assert [r for r in records if r["type"] == "message"] == shown
    runs = {r["id"]: r for r in records if r["type"] == "run"}
    assert len(runs) == 2
    assert runs[events[0]["run_id"]]["message_id"] == events[0]["message_id"]
    nothing = "Nothing is kept of 'nobody'.\n"
    assert await database.run("export", "--user", "nobody") == (0, "", nothing)


async def test_erase_asks_first_and_leaves_nothing(database: Database, serve: Serve) -> None:
    server = await serve(database_url=database.url)
    for n in range(3):
        await post(server, {"content": f"zebra {n}", "thread_id": f"t{n}"})
    await fill(database, "other", "zebra")
    await server.stop()
    before = await database.counts()
    code, out, _ = await database.run("erase", "--user", "1", answer="n\n")
    assert code == 1
    assert "'1'" in out
    code, _, _ = await database.run("erase", "--user", "1", answer="")
    assert code == 1
    assert await database.counts() == before
    code, out, _ = await database.run("erase", "--user", "1", answer="y\n")
    assert code == 0
    assert "3 threads" in out
    assert await database.run("export", "--user", "1") == (0, "", "Nothing is kept of '1'.\n")
    rest = {"chat_threads": 2, "chat_messages": 1, "chat_runs": 0, "chat_events": 0}
    assert await database.counts() == rest
    code, out, _ = await database.run("erase", "--user", "other", "--yes")
    assert (code, out) == (0, "2 threads were deleted for user 'other'.\n")
    assert await database.counts() == dict.fromkeys(TABLES, 0)


async def test_erasing_beside_a_running_server_leaves_nothing(
    database: Database, serve: Serve
) -> None:
    """The run that is being made then ends; nothing of it is written any more."""
    server = await serve(database_url=database.url)
    async with connect(server) as socket:
        await socket.send({"content": "script:endless", "thread_id": "t"})
        await socket.until("content")
        code, _, _ = await database.run("erase", "--user", "1", "--yes")
        assert code == 0
        await socket.send({"type": "stop"})
        await socket.until("end")
    await server.stop()
    assert await database.counts() == dict.fromkeys(TABLES, 0)


@pytest.mark.parametrize("command", ["export", "erase", "migrate"])
async def test_memory_has_nothing_to_work_on(tmp_path: Path, command: str) -> None:
    database = Database("", tmp_path)
    user = ["--user", "1", "--yes"] if command == "erase" else ["--user", "1"]
    arguments = [command, *(user if command != "migrate" else [])]
    code, _, complaints = await database.run(*arguments, QUART_CHAT_STORAGE="memory")
    assert code != 0
    assert "memory" in complaints


async def test_a_database_that_can_not_be_opened_is_a_sentence(tmp_path: Path) -> None:
    for url in ("sqlite:///nowhere/at/all.sqlite3", "mysql://x/y", "postgres://u@127.0.0.1:1/x"):
        code, out, complaints = await Database(url, tmp_path).run("migrate")
        assert (code, out) == (1, "")
        assert complaints.startswith("Error: CHAT_DATABASE_URL")


async def test_quiet_threads_go_after_the_days_of_retention(
    database: Database, serve: Serve
) -> None:
    server = await serve(database_url=database.url, retention_days=7, event_retention=1)
    for thread in ("old", "older", "young", "renewed"):
        await post(server, {"content": f"zebra {thread}", "thread_id": thread})
    now = time.time_ns() // 1000
    ages = {"old": 7.01, "older": 3000, "young": 6.9, "renewed": 8}
    await post(server, {"content": "again", "thread_id": "renewed"})
    for thread, days in ages.items():
        if thread != "renewed":
            moment = now - int(days * DAY)
            await database.execute(
                f"UPDATE chat_threads SET updated_at = {moment} WHERE id = '{thread}'"
            )

    async def swept() -> bool:
        return (await database.counts())["chat_threads"] == 2

    async with asyncio.timeout(SECONDS), client(server) as http:
        while not await swept():
            await asyncio.sleep(0.05)
        listed = (await http.get("/chat/threads?q=zebra")).json()["threads"]
        assert [thread["id"] for thread in listed] == ["renewed", "young"]
        assert (await http.get("/chat/threads/old")).status_code == 404
    for table in ("chat_messages", "chat_runs"):
        found = await database.execute(f"SELECT DISTINCT thread_id FROM {table} ORDER BY 1")
        assert found == [("renewed",), ("young",)]


async def schema(database: Database) -> list[tuple[Any, ...]]:
    if database.url.startswith("sqlite"):
        return await database.execute("SELECT type, name FROM sqlite_master ORDER BY 1, 2")
    return await database.execute(
        "SELECT 'index', indexname::text FROM pg_indexes WHERE tablename LIKE 'chat_%' "
        "UNION SELECT table_name::text, column_name::text FROM information_schema.columns "
        "WHERE table_name LIKE 'chat_%' ORDER BY 1, 2"
    )


async def test_migrate_makes_an_empty_database_ready(database: Database, serve: Serve) -> None:
    for _ in range(2):
        assert await database.run("migrate") == (0, "The database is up to date.\n", "")
    made = await schema(database)
    assert {"chat_threads", "chat_messages", "chat_runs", "chat_events"} <= {
        name for row in made for name in row
    }
    server = await serve("--no-migrate", database_url=database.url)
    await post(server, {"content": "hi", "thread_id": "t"})
    assert await schema(database) == made


async def test_migrate_migrates_also_where_servers_may_not(database: Database) -> None:
    """CHAT_MIGRATE is what servers do at their start; the command is there for that very case."""
    code, out, _ = await database.run("migrate", QUART_CHAT_MIGRATE="false")
    assert (code, out) == (0, "The database is up to date.\n")
    assert await database.counts() == dict.fromkeys(TABLES, 0)


async def test_no_migrate_refuses_a_database_that_is_not_up_to_date(database: Database) -> None:
    code, out, complaints = await database.run("chat-server", "--port", "0", "--no-migrate")
    assert (code, out) == (1, "")
    assert "0001_initial" in complaints
    assert "quart_chat migrate" in complaints
    with pytest.raises(Exception, match="chat_threads"):
        await database.counts()


async def test_the_same_tables_come_of_migrate_and_of_a_start(
    tmp_path: Path, endpoint: Endpoint
) -> None:
    one, two = (Database(f"sqlite://{tmp_path / name}", tmp_path) for name in ("a", "b"))
    await one.run("migrate")
    server = await start(
        cwd=tmp_path,
        database_url=two.url,
        providers={"p": {"base_url": endpoint.url, "default_model": "m"}},
    )
    await server.stop()
    assert await schema(one) == await schema(two)


async def test_two_processes_may_begin_at_once(database: Database) -> None:
    ends = await asyncio.gather(*(database.run("migrate") for _ in range(3)))
    assert ends == [(0, "The database is up to date.\n", "")] * 3
    assert await database.counts() == dict.fromkeys(TABLES, 0)


async def test_two_servers_may_begin_at_once(postgres: Callable[[], str], serve: Serve) -> None:
    url = postgres()
    one, two = await asyncio.gather(serve(database_url=url), serve(database_url=url))
    thread = unique()
    await post(one, {"content": "hi", "thread_id": thread})
    async with client(two) as http:
        found = (await http.get(f"/chat/threads/{thread}")).json()
    assert found["message_count"] == 2


async def test_every_migration_keeps_what_is_there(database: Database) -> None:
    """Step by step, as databases of earlier versions come: old rows are kept and found."""
    script = (
        "import asyncio, sys\n"
        "from tortoise.context import TortoiseContext\n"
        "from tortoise.migrations.executor import MigrationExecutor, MigrationTarget\n"
        "from quart_chat.adapters.database.connection import APP, CONNECTION, tortoise_config\n"
        "async def main():\n"
        "    config = tortoise_config(sys.argv[1])\n"
        "    async with TortoiseContext() as context:\n"
        "        await context.init(config=config)\n"
        "        client = context.connections.get(CONNECTION)\n"
        "        executor = MigrationExecutor(client, config['apps'])\n"
        "        await executor.migrate([MigrationTarget(APP, '0001_initial')])\n"
        "asyncio.run(main())\n"
    )
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", script, database.url, cwd=database.cwd
    )
    assert await asyncio.wait_for(process.wait(), 60) == 0
    await database.execute(
        "INSERT INTO chat_threads (user_id, id, title, preview, metadata, message_count, "
        "newest_id, newest_branch, newest_lineage, created_at, updated_at) "
        "VALUES ('1', 't', 'Old Title', NULL, '{}', 1, 'm', 1, '[]', 1, 1)"
    )
    await database.execute(
        "INSERT INTO chat_messages (user_id, thread_id, id, position, branch, lineage, role, "
        "text, status, metadata, options, created_at) "
        "VALUES ('1', 't', 'm', 1, 1, '[]', 'user', 'Ancient Words', 'completed', '{}', '{}', 1)"
    )
    code, _, _ = await database.run("chat-server", "--port", "0", "--no-migrate")
    assert code == 1
    assert (await database.run("migrate"))[0] == 0
    async with AsyncExitStack() as stack:
        kept = await stores(resolve({"CHAT_DATABASE_URL": database.url}, {}), stack)
        for query in ("ancient", "old title"):
            found = await kept.storage.threads("1", query=query, after=None, limit=5)
            assert [thread.id for thread in found] == ["t"], query
        more = Message(id="n", thread_id="t", role="user", content="new")
        stored = await kept.storage.add_messages("1", [more])
        assert (stored[0].position, stored[0].parent_id) == (2, "m")
