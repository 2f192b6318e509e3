"""What is asked of the database for a turn or a page does not grow with what is kept there.

Held against the database's own plans and counts of its steps, never against a clock.
"""

from __future__ import annotations

import re
import sqlite3
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from conftest import Serve, answer, client, post
from endpoint import Endpoint

from quart_chat.adapters import stores
from quart_chat.adapters.database.connection import Database
from quart_chat.adapters.database.event_log import DatabaseEventLog
from quart_chat.adapters.database.storage import DatabaseStorage
from quart_chat.adapters.database.user_data import DatabaseUserData
from quart_chat.config import resolve
from quart_chat.core.events import ContentDelta, End
from quart_chat.core.messages import Message, now
from quart_chat.core.ports import RunRecord, Window

MANY = 10_000
NUMBERS_SQLITE = (
    "WITH RECURSIVE n(i) AS (SELECT {first} UNION ALL SELECT i + 1 FROM n WHERE i < {last}) "
)
NUMBERS_POSTGRES = "WITH n(i) AS (SELECT generate_series({first}, {last})) "


def thread_of_messages(thread: str, count: int, numbers: str) -> list[str]:
    """Statements that make a thread of user 1: questions and answers in turns, no branches."""
    with_numbers = numbers.format(first=1, last=count)
    return [
        with_numbers + "INSERT INTO chat_messages (user_id, thread_id, id, position, branch, "
        "lineage, parent_id, role, text, status, metadata, options, created_at) "
        f"SELECT '1', '{thread}', '{thread}.' || i, i, 1, '[]', "
        f"CASE WHEN i = 1 THEN NULL ELSE '{thread}.' || (i - 1) END, "
        "CASE WHEN i % 2 = 1 THEN 'user' ELSE 'assistant' END, "
        "'words of message ' || i, 'completed', '{}', '{}', i FROM n",
        "INSERT INTO chat_threads (user_id, id, title, preview, metadata, message_count, "
        "newest_id, newest_branch, newest_lineage, created_at, updated_at) "
        f"VALUES ('1', '{thread}', NULL, 'words', '{{}}', {count}, '{thread}.{count}', 1, "
        f"'[]', 1, {count})",
    ]


def many_threads(count: int, numbers: str) -> str:
    return (
        numbers.format(first=1, last=count)
        + "INSERT INTO chat_threads (user_id, id, metadata, message_count, newest_branch, "
        "newest_lineage, created_at, updated_at) "
        "SELECT '1', 'many.' || i, '{}', 0, 1, '[]', i, i / 7 FROM n"
    )


def many_runs(count: int, numbers: str) -> str:
    return (
        numbers.format(first=1, last=count)
        + "INSERT INTO chat_runs (id, user_id, thread_id, user_message_id, message_id, owner, "
        "seen_at, last_seq, created_at, ended_at, has_events) "
        "SELECT 'run.' || i, '1', 'many.' || i, 'q', 'a', 'gone', i, 9, i, i, 1 = 0 FROM n"
    )


class Observed(Database):
    """The database that writes down what it is asked."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.url = url
        self.asked: list[tuple[str, tuple[Any, ...]]] = []
        self.read_rows = self.read_chars = 0

    async def fetch(self, sql: str, *values: Any) -> list[dict[str, Any]]:
        self.asked.append((sql, values))
        rows = await super().fetch(sql, *values)
        self.read_rows += len(rows)
        self.read_chars += sum(len(v) for row in rows for v in row.values() if isinstance(v, str))
        return rows

    async def execute(self, sql: str, *values: Any) -> int:
        self.asked.append((sql, values))
        return await super().execute(sql, *values)


@pytest.fixture(scope="module", params=["sqlite", "postgres"])
async def database(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Observed]:
    """One thread of 10,000 messages, one of 100, 10,000 threads and as many runs, of one user."""
    if request.param == "sqlite":
        url = f"sqlite://{tmp_path_factory.mktemp('scale') / 'chat.sqlite3'}"
    else:
        url = request.getfixturevalue("postgres")()
    observed = Observed(url)
    await observed.open()
    numbers = NUMBERS_SQLITE if observed.is_sqlite else NUMBERS_POSTGRES
    statements = [
        *thread_of_messages("big", MANY, numbers),
        *thread_of_messages("small", 100, numbers),
        many_threads(MANY, numbers),
        many_runs(MANY, numbers),
    ]
    if not observed.is_sqlite:
        statements += ["ANALYZE chat_messages", "ANALYZE chat_threads", "ANALYZE chat_runs"]
    for statement in statements:
        await observed.run(observed.execute(statement))
    yield observed
    await observed.close()


async def plans(database: Observed) -> list[tuple[str, str]]:
    """Each statement that was asked, with the database's plan for it."""
    found = []
    for sql, values in database.asked:
        if sql.startswith("EXPLAIN"):
            continue
        explain = "EXPLAIN QUERY PLAN " if database.is_sqlite else "EXPLAIN (FORMAT JSON) "
        rows = await database.run(Database.fetch(database, explain + sql, *values))
        lines = [row["detail"] if database.is_sqlite else str([*row.values()]) for row in rows]
        found.append((sql, "\n".join(lines)))
    return found


TABLE = r"(chat_\w+\b|[tms]\b)"
READS_ALL = {True: rf"^SCAN {TABLE}(?! VIRTUAL)", False: r"Seq Scan"}


async def uses_indexes_alone(database: Observed, work: Callable[[], Any]) -> None:
    """Do some work, and look at the plan of every statement in it."""
    database.asked = []
    await work()
    asked = await plans(database)
    assert asked
    for sql, plan in asked:
        if "FROM chat_deletions" in sql and "ORDER BY" in sql:  # a queue, read from its beginning
            continue
        assert not re.search(READS_ALL[database.is_sqlite], plan, re.MULTILINE), f"{sql}\n{plan}"


PAGES = [
    Window(limit=51),
    Window(limit=51, order="desc"),
    Window(limit=100, order="desc", leaf="big.9000"),
    Window(limit=51, after=5000, leaf="big.10000"),
    Window(limit=51, order="desc", after=5000, leaf="big.10000"),
    Window(limit=51, branch="all"),
    Window(limit=51, branch="all", order="desc", after=5000),
    Window(limit=1, order="desc", leaf="big.9000"),
]


@pytest.mark.parametrize("window", PAGES, ids=str)
async def test_a_page_of_messages_is_read_by_an_index(database: Observed, window: Window) -> None:
    storage = DatabaseStorage(database)
    await uses_indexes_alone(database, lambda: storage.messages("1", "big", window))
    if database.is_sqlite:
        assert not any("TEMP B-TREE" in plan for sql, plan in await plans(database)) or (
            window.branch == "current"
        )


async def test_adding_a_message_is_done_by_indexes(database: Observed) -> None:
    storage = DatabaseStorage(database)
    on = Message(id="on", thread_id="big", role="user", content="x")
    edit = Message(id="edit", thread_id="big", role="user", content="x", parent_id="big.5000")
    for message in (on, edit, on):
        await uses_indexes_alone(
            database, lambda message=message: storage.add_messages("1", [message], create=True)
        )


async def test_a_page_of_threads_is_read_by_an_index(database: Observed) -> None:
    storage = DatabaseStorage(database)
    middle = (await storage.threads("1", query=None, after=None, limit=5000))[-1]
    for after in (None, (middle.updated_at, middle.id)):
        await uses_indexes_alone(
            database, lambda after=after: storage.threads("1", query=None, after=after, limit=51)
        )


WORDS = ["alpha", "beta", "gamma", "delta", "epsilon"]


async def test_a_search_reads_the_users_own_candidates_alone(database: Observed) -> None:
    """A user with one message, beside another's thousand that have the same words."""
    storage = DatabaseStorage(database)
    for start in range(0, 1000, 100):
        chain = [
            Message(id=f"m{n}", thread_id="many", role="user", content=" ".join(WORDS))
            for n in range(start, start + 100)
        ]
        await storage.add_messages("rich", chain, create=True)
    lone = Message(id="m", thread_id="lone", role="user", content="alpha words")
    await storage.add_messages("poor", [lone], create=True)
    for query, found in {"alpha": 1, "alph": 1, "beta": 0, "alpha beta": 0, "a_": 0}.items():
        database.read_rows, database.asked = 0, []
        threads = await storage.threads("poor", query=query, after=None, limit=51)
        assert len(threads) == found, query
        assert database.read_rows <= 5
    database.read_rows = 0
    threads = await storage.threads("rich", query="gamma", after=None, limit=51)
    assert [thread.id for thread in threads] == ["many"]
    assert database.read_rows <= 1100


async def test_a_search_goes_by_the_index(database: Observed) -> None:
    storage = DatabaseStorage(database)
    rare = Message(id="rare", thread_id="rare", role="user", content="a kingfisher")
    await storage.add_messages("1", [rare], create=True)
    if not database.is_sqlite:
        for statement in (
            "INSERT INTO chat_search (id, grams) SELECT (1::bigint << 60) + i, ARRAY[i, i + 1] "
            "FROM generate_series(1, 50000) AS i",
            "SELECT gin_clean_pending_list('chat_search_grams')",
            "ANALYZE chat_search",
        ):
            await database.run(Database.execute(database, statement))
    await uses_indexes_alone(
        database, lambda: storage.threads("1", query="kingfisher", after=None, limit=51)
    )
    index = "VIRTUAL TABLE INDEX" if database.is_sqlite else "chat_search"
    assert any(index in plan for _, plan in await plans(database))


async def test_a_page_reads_no_more_text_than_it_may(database: Observed) -> None:
    storage = DatabaseStorage(database)
    chain = [
        Message(id=f"m{n}", thread_id="wide", role="user", content="x" * 100_000) for n in range(60)
    ]
    await storage.add_messages("1", chain, create=True)
    database.read_chars = 0
    window = Window(limit=200, order="desc", max_chars=250_000)
    assert len(await storage.messages("1", "wide", window)) == 3
    assert database.read_chars < 310_000


async def test_a_deletion_is_many_short_transactions(database: Observed) -> None:
    storage = DatabaseStorage(database)
    chain = [
        Message(id=f"m{n}", thread_id="gone", role="user", content="word " * 10_000)
        for n in range(60)
    ]
    await storage.add_messages("1", chain, create=True)
    database.asked = []
    await storage.delete_thread("1", "gone")
    deleted = [
        len(values) for sql, values in database.asked if sql.startswith("DELETE FROM chat_messages")
    ]
    assert sum(deleted) == 60
    assert max(deleted) <= 7


async def test_the_other_calls_use_indexes(database: Observed) -> None:
    storage = DatabaseStorage(database)
    for work in (
        lambda: storage.thread("1", "many.5000"),
        lambda: storage.update_thread("1", "many.5000", {"title": "x"}),
        lambda: storage.set_feedback("1", "big", "big.5000", {"score": 1}),
        lambda: storage.delete_thread("1", "many.6000"),
    ):
        await uses_indexes_alone(database, work)


async def test_sweeping_uses_indexes(database: Observed) -> None:
    """It is done all the time, by every process."""
    user_data = DatabaseUserData(database)
    await uses_indexes_alone(
        database, lambda: user_data.expire(now() - timedelta(days=365 * 200), 100)
    )
    log = DatabaseEventLog(database, 600)
    await uses_indexes_alone(database, log.expire)
    await uses_indexes_alone(database, log.claim_abandoned)


async def test_an_export_reads_each_row_once_by_indexes(database: Observed) -> None:
    user_data = DatabaseUserData(database)

    async def export() -> None:
        assert len([record async for record in user_data.export("1")]) > 20_000

    await uses_indexes_alone(database, export)
    if database.is_sqlite:
        assert not any("TEMP B-TREE FOR ORDER" in plan for _, plan in await plans(database))


async def test_a_run_is_logged_by_indexes(database: Observed) -> None:
    log = DatabaseEventLog(database, 600)
    record = RunRecord("logged", "1", "big", "q", "a")

    async def live() -> None:
        await log.open(record)
        log.append("logged", [ContentDelta("a")])
        await log.flush("logged")
        log.append("logged", [End("completed", "stop", {})])
        await log.flush("logged")
        assert await log.find("1", run_id="logged")
        assert [page async for page in log.follow("logged", 0)]

    log.start()
    try:
        await uses_indexes_alone(database, live)
    finally:
        await log.close()


async def steps(database: Observed, work: Callable[[], Any]) -> int:
    """How many steps SQLite's machine makes for the reading statements of some work."""
    database.asked = []
    await work()
    count = 0

    def step() -> int:
        nonlocal count
        count += 1
        return 0

    connection = sqlite3.connect(database.url.removeprefix("sqlite://"))
    try:
        for sql, values in database.asked:
            if sql.startswith("SELECT"):
                connection.set_progress_handler(step, 10)
                connection.execute(sql, values).fetchall()
                connection.set_progress_handler(None, 0)
    finally:
        connection.close()
    assert count
    return count


@pytest.mark.parametrize(
    ("order", "branch", "limit"),
    [("desc", "current", 100), ("asc", "current", 51), ("desc", "all", 51), ("asc", "all", 51)],
)
async def test_a_page_of_a_long_thread_costs_what_one_of_a_short_thread_costs(
    database: Observed, order: Any, branch: Any, limit: int
) -> None:
    if not database.is_sqlite:
        pytest.skip("PostgreSQL does not count its steps")
    storage, window = DatabaseStorage(database), Window(limit, order, branch)
    short = await steps(database, lambda: storage.messages("1", "small", window))
    long = await steps(database, lambda: storage.messages("1", "big", window))
    assert long <= 1.2 * short


async def test_a_server_with_ten_thousand_of_each(
    serve: Serve, endpoint: Endpoint, tmp_path: Path
) -> None:
    """A turn and pages in a thread of 10,000 messages, and 10,000 threads paged completely."""
    file = tmp_path / "chat.sqlite3"
    async with AsyncExitStack() as stack:
        await stores(resolve({"CHAT_DATABASE_URL": f"sqlite://{file}"}, {}), stack)
    connection = sqlite3.connect(file)
    for statement in (
        *thread_of_messages("big", MANY, NUMBERS_SQLITE),
        many_threads(MANY - 1, NUMBERS_SQLITE),
    ):
        connection.execute(statement)
    connection.commit()
    connection.close()
    server = await serve(database_url=f"sqlite://{file}")
    events = await post(server, {"content": "script:echo", "thread_id": "big"})
    assert events[0]["parent_id"] == f"big.{MANY}"
    assert answer(events).count("|") == 99
    assert answer(events).startswith("assistant:words of message 9902|user:")
    async with client(server) as http:
        newest = (await http.get("/chat/threads/big/messages?order=desc&limit=2")).json()
        assert newest["messages"][0]["id"] == events[0]["message_id"]
        found, query = list[str](), dict[str, Any](limit=200)
        while True:
            page = (await http.get("/chat/threads", params=query)).json()
            found += [thread["id"] for thread in page["threads"]]
            if page["next"] is None:
                break
            query["cursor"] = page["next"]
            await http.post("/chat/threads", json={})
    assert len(found) == len(set(found)) == MANY
    assert set(found) == {"big", *(f"many.{n}" for n in range(1, MANY))}
