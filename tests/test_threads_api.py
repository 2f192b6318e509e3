"""Conversations as JSON, protocol section 6: every call, its errors, branches, search, deletion."""

from __future__ import annotations

import asyncio
import base64
import json
import re
import sqlite3
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pytest
from conftest import (
    SECONDS,
    Serve,
    Server,
    answer,
    client,
    connect,
    post,
    providers,
    start,
    unique,
)
from endpoint import END, Endpoint, Exchange, text

from quart_chat.adapters import Stores, stores
from quart_chat.adapters.database.search import query_grams
from quart_chat.config import resolve
from quart_chat.core.messages import Message, Thread

TEXT = "Hello, wörld 😀!"
RFC3339 = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d+Z")
TABLES = ("chat_threads", "chat_messages", "chat_runs", "chat_events")


@dataclass
class Api:
    """A server on one database, and ways around it into that database."""

    server: Server
    url: str
    beside: Stores

    @property
    def is_sqlite(self) -> bool:
        return self.url.startswith("sqlite")

    async def value(self, sql: str) -> Any:
        """The one value of a statement, asked of the database itself."""
        if self.is_sqlite:
            connection = sqlite3.connect(self.url.removeprefix("sqlite://"))
            try:
                return connection.execute(sql).fetchone()[0]
            finally:
                connection.close()
        import asyncpg

        connected = await asyncpg.connect(self.url)
        try:
            return await connected.fetchval(sql)
        finally:
            await connected.close()


@pytest.fixture(scope="module", params=["sqlite", "postgres"])
async def api(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    shared_endpoint: Endpoint,
) -> AsyncIterator[Api]:
    """The important calls on both databases."""
    cwd = tmp_path_factory.mktemp(request.param)
    url = f"sqlite://{cwd / 'chat.sqlite3'}"
    if request.param == "postgres":
        url = request.getfixturevalue("postgres")()
    server = await start(
        providers=providers(shared_endpoint),
        protocol="both",
        on_busy="queue",
        database_url=url,
        cwd=cwd,
    )
    async with AsyncExitStack() as stack:
        yield Api(server, url, await stores(resolve({"CHAT_DATABASE_URL": url}, {}), stack))
    assert await server.stop() == 0
    assert "Traceback" not in server.log(), server.log()


def of(thread: str, rest: str = "") -> str:
    """A path; a segment of dots alone would be taken for a step up by any client."""
    escaped = quote(thread, safe="")
    return f"/chat/threads/{escaped if escaped.strip('.') else escaped.replace('.', '%2E')}{rest}"


async def call(
    server: Server, method: str, path: str, status: int = 200, **options: Any
) -> dict[str, Any]:
    """The decoded answer, which has to have this status."""
    async with client(server) as http:
        response = await http.request(method, path, **options)
    assert response.status_code == status, (method, path, response.status_code, response.text)
    assert "internal_error" not in response.text
    found: dict[str, Any] = response.json() if response.content else {}
    return found


async def refused(
    server: Server, method: str, path: str, status: int, code: str, **options: Any
) -> str:
    """The sentence of a refusal."""
    error = (await call(server, method, path, status, **options))["error"]
    assert set(error) == {"code", "message", "retryable"}
    assert (error["code"], error["retryable"]) == (code, False)
    assert error["message"]
    return str(error["message"])


async def messages(server: Server, thread: str, **query: Any) -> list[dict[str, Any]]:
    """All pages of a thread's messages."""
    found: list[dict[str, Any]] = []
    while True:
        page = await call(server, "GET", of(thread, "/messages"), params=query)
        found += page["messages"]
        if page["next"] is None:
            return found
        query = {**query, "cursor": page["next"]}


async def search(server: Server, query: str) -> list[str]:
    page = await call(server, "GET", "/chat/threads", params={"q": query, "limit": 200})
    return [thread["id"] for thread in page["threads"]]


async def eventually(holds: Callable[[], Awaitable[Any]]) -> None:
    async with asyncio.timeout(SECONDS):
        while not await holds():
            await asyncio.sleep(0.02)


# Threads


async def test_a_thread_is_made_shown_changed_and_deleted(server: Server) -> None:
    thread = unique()
    body = {"id": thread, "title": "Ü", "metadata": {"a": [1, None, {"b": "😀"}]}}
    made = await call(server, "POST", "/chat/threads", 201, json=body)
    assert set(made) == {
        *("id", "title", "created_at", "updated_at", "message_count", "active_run_id", "metadata")
    }
    assert made | body == made
    assert (made["message_count"], made["active_run_id"]) == (0, None)
    assert RFC3339.fullmatch(made["created_at"])
    assert RFC3339.fullmatch(made["updated_at"])
    assert await call(server, "GET", of(thread)) == made
    assert made in (await call(server, "GET", "/chat/threads"))["threads"]
    changed = await call(server, "PATCH", of(thread), json={"title": "New"})
    assert (changed["title"], changed["metadata"]) == ("New", body["metadata"])
    changed = await call(server, "PATCH", of(thread), json={"metadata": {"c": 1}})
    assert (changed["title"], changed["metadata"]) == ("New", {"c": 1})
    assert await call(server, "PATCH", of(thread), json={}) == changed
    assert await call(server, "GET", of(thread)) == changed
    assert await call(server, "DELETE", of(thread), 204) == {}
    for method, rest in (("GET", ""), ("DELETE", ""), ("GET", "/messages")):
        await refused(server, method, of(thread, rest), 404, "not_found")


async def test_a_thread_without_anything(server: Server) -> None:
    for body in (b"", b"{}", b'{"id":null,"title":null,"metadata":null}'):
        made = await call(server, "POST", "/chat/threads", 201, content=body)
        assert re.fullmatch(r"[0-9a-f]{8}-[0-9a-f]{4}-7.{21}", made["id"])
        assert (made["title"], made["metadata"]) == (None, {})
        page = await call(server, "GET", of(made["id"], "/messages"))
        assert page == {"messages": [], "next": None}


async def test_an_id_is_taken_once(api: Api) -> None:
    thread = unique()
    await post(api.server, {"content": "hi", "thread_id": thread})
    for _ in range(2):
        await refused(api.server, "POST", "/chat/threads", 409, "id_conflict", json={"id": thread})
    assert (await call(api.server, "GET", of(thread)))["message_count"] == 2
    await api.beside.storage.create_thread("other", Thread(id=unique("theirs")))
    theirs = (await api.beside.storage.threads("other", query=None, after=None, limit=1))[0].id
    await call(api.server, "POST", "/chat/threads", 201, json={"id": theirs})


async def test_a_thread_made_first_gets_messages(server: Server) -> None:
    thread = unique()
    made = await call(server, "POST", "/chat/threads", 201, json={"id": thread})
    events = await post(server, {"content": "the first words", "thread_id": thread})
    assert events[0]["parent_id"] is None
    found = await call(server, "GET", of(thread))
    assert (found["title"], found["message_count"]) == ("the first words", 2)
    assert found["created_at"] == made["created_at"]
    assert found["updated_at"] > made["updated_at"]


@pytest.mark.parametrize(
    "thread",
    [
        *("a/b", "a//b", "/", "/a/", "..", ".", "a.b", "../x", "a b", " ", " a ", "ü😀", "e\u0301"),
        *("%", "%2F", "a%20b", "%25", "?x=1#y", "a+b", "a;b=c", "a,b", "a:b", "a@b", "a\\b"),
        *("'\"", "<b>", "{a}", "[a]", "|", "`", "messages", "stop", "x" * 128, "😀" * 128),
        *("\ue02f", "a\ue02fb/c", "\u2028", "\ufeff", "​"),
    ],
)
async def test_ids_hold_any_characters(api: Api, thread: str) -> None:
    server = api.server
    await call(server, "POST", "/chat/threads", 201, json={"id": thread})
    try:
        events = await post(server, {"content": "hi", "thread_id": thread, "id": thread})
        assert events[0]["thread_id"] == thread
        assert (await call(server, "GET", of(thread)))["id"] == thread
        changed = await call(server, "PATCH", of(thread), json={"title": "T"})
        assert (changed["id"], changed["message_count"]) == (thread, 2)
        found = await messages(server, thread)
        assert [each["thread_id"] for each in found] == [thread, thread]
        assert found[0]["id"] == thread
        feedback = of(thread, of(thread).replace("/chat/threads", "/messages") + "/feedback")
        await call(server, "PUT", feedback, 204, json={"score": 1})
        assert (await messages(server, thread))[0]["feedback"] == {"score": 1}
        assert await call(server, "POST", of(thread, "/stop")) == {"stopped": False}
    finally:
        await call(server, "DELETE", of(thread), 204)
    await refused(server, "GET", of(thread), 404, "not_found")


async def test_lower_case_escapes_and_unneeded_escapes_name_the_same_thread(
    server: Server,
) -> None:
    thread = unique("a/b ü")
    await call(server, "POST", "/chat/threads", 201, json={"id": thread})
    for path in (
        of(thread).lower(),
        "/chat/threads/" + "".join(f"%{b:02x}" for b in thread.encode()),
    ):
        assert (await call(server, "GET", path))["id"] == thread


@pytest.mark.parametrize(
    ("body", "status", "field"),
    [
        (b"{", 400, ""),
        (b"\xff", 400, ""),
        (b'{"title": NaN}', 400, ""),
        (b'{"metadata": {"a": Infinity}}', 400, ""),
        (b"[" * 50_000, 400, ""),
        (b"[]", 422, ""),
        (b"null", 422, ""),
        (b'"text"', 422, ""),
        (b'{"surprise": 1}', 422, "surprise"),
        (b'{"title": 5}', 422, "title"),
        (b'{"title": "' + b"x" * 501 + b'"}', 422, "title"),
        (b'{"title": "a\\u0000b"}', 422, ""),
        (b'{"title": "a\\ud800b"}', 422, ""),
        (b'{"metadata": []}', 422, "metadata"),
        (b'{"metadata": "x"}', 422, "metadata"),
        (b'{"metadata": {"a": "\\u0000"}}', 422, ""),
        (b'{"metadata": {"\\u0000": 1}}', 422, ""),
        (b'{"metadata": {"a": 1e400}}', 422, ""),
        (b'{"metadata": {"a": 99999999999999999999}}', 422, ""),
        (b'{"metadata": {"a":' + b"[" * 40 + b"]" * 40 + b"}}", 422, ""),
    ],
)
async def test_bodies_that_are_refused(
    server: Server, body: bytes, status: int, field: str
) -> None:
    thread = unique()
    await call(server, "POST", "/chat/threads", 201, json={"id": thread})
    for method, path in (("POST", "/chat/threads"), ("PATCH", of(thread))):
        message = await refused(server, method, path, status, "invalid_message", content=body)
        assert field in message
    found = await call(server, "GET", of(thread))
    assert (found["title"], found["metadata"]) == (None, {})


@pytest.mark.parametrize("bad", ["", "x" * 129, "a\nb", "a\x7fb", "a\x85b", "\t", 5, ["a"], "\0"])
async def test_ids_that_are_refused(server: Server, bad: Any) -> None:
    await refused(server, "POST", "/chat/threads", 422, "invalid_message", json={"id": bad})


async def test_a_body_has_a_largest_size(server: Server) -> None:
    body = b'{"title": "' + b"x" * 1024 * 1024 + b'"}'
    for method, path in (("POST", "/chat/threads"), ("PATCH", of("any"))):
        await refused(server, method, path, 413, "too_large", content=body)


async def test_metadata_has_a_largest_size(server: Server) -> None:
    thread = unique()
    fits = {"a": "ü" * ((16 * 1024 - len('{"a":""}')) // 2)}
    over = {"a": fits["a"] + "ü"}
    made = await call(server, "POST", "/chat/threads", 201, json={"id": thread, "metadata": fits})
    assert made["metadata"] == fits
    events = await post(server, {"content": "x", "thread_id": thread, "metadata": fits})
    assert (await messages(server, thread))[0]["metadata"] == fits
    assert events[-1]["type"] == "end"
    for method, path, body in (
        ("POST", "/chat/threads", {"metadata": over}),
        ("PATCH", of(thread), {"metadata": over}),
        ("POST", "/chat/sse", {"content": "x", "metadata": over}),
    ):
        says = await refused(server, method, path, 422, "invalid_message", json=body)
        assert "metadata" in says
    cleared = await call(server, "PATCH", of(thread), json={"metadata": None})
    assert cleared["metadata"] == {}


async def test_what_is_not_there_is_not_found(api: Api) -> None:
    theirs, mine = unique("theirs"), unique()
    await api.beside.storage.add_messages(
        "other", [Message(id="m", thread_id=theirs, role="user", content="x")], create=True
    )
    await call(api.server, "POST", "/chat/threads", 201, json={"id": mine})
    for thread in (theirs, "nowhere", "\ue000"):
        for method, rest, body in (
            ("GET", "", None),
            ("PATCH", "", {"title": "x"}),
            ("PATCH", "", {}),
            ("DELETE", "", None),
            ("GET", "/messages", None),
            ("GET", "/messages?branch=all&order=desc", None),
            ("POST", "/stop", None),
            ("PUT", "/messages/m/feedback", {"score": 1}),
        ):
            await refused(api.server, method, of(thread, rest), 404, "not_found", json=body)
    feedback = of(mine, "/messages/m/feedback")
    await refused(api.server, "PUT", feedback, 404, "not_found", json={"score": 1})
    assert (await api.beside.storage.thread("other", theirs)).message_count == 1


async def test_ids_in_paths_that_no_thread_can_have(api: Api) -> None:
    """They name nothing; they break nothing."""
    for raw in ("%00", "a%00b", "%0A", "%FF%FE", "%ED%A0%80", "x" * 3000, "%F0%9F%98%80" * 300):
        for method, rest, body in (
            ("GET", "", None),
            ("PATCH", "", {"title": "x"}),
            ("DELETE", "", None),
            ("GET", "/messages", None),
            ("POST", "/stop", None),
            ("PUT", f"/messages/{raw}/feedback", {"score": 1}),
        ):
            async with client(api.server) as http:
                found = await http.request(method, f"/chat/threads/{raw}{rest}", json=body)
            assert found.status_code in (404, 422), (method, raw, found.text)


async def test_other_methods_are_refused(server: Server) -> None:
    for method, path in (
        ("PUT", "/chat/threads"),
        ("POST", of("t")),
        ("DELETE", of("t", "/messages")),
        ("GET", of("t", "/stop")),
        ("POST", of("t", "/messages/m/feedback")),
        ("POST", "/chat/models"),
    ):
        await refused(server, method, path, 405, "invalid_message")


# Pages


@pytest.mark.parametrize("limit", ["0", "201", "-1", "x", "1.5", "1e2", "99999999999999999999"])
async def test_limits_that_are_refused(server: Server, limit: str) -> None:
    thread = unique()
    await call(server, "POST", "/chat/threads", 201, json={"id": thread})
    for path in ("/chat/threads", of(thread, "/messages")):
        says = await refused(server, "GET", path, 422, "invalid_message", params={"limit": limit})
        assert "limit" in says


@pytest.mark.parametrize(("name", "value"), [("order", "up"), ("branch", "mine"), ("order", "")])
async def test_choices_that_are_refused(server: Server, name: str, value: str) -> None:
    says = await refused(
        server, "GET", of("t", "/messages"), 422, "invalid_message", params={name: value}
    )
    assert name in says


def cursor(value: Any) -> str:
    raw = value if isinstance(value, bytes) else json.dumps(value).encode()
    return base64.urlsafe_b64encode(raw).decode().rstrip("=")


MOMENT = "2026-01-01T00:00:00.000000Z"


@pytest.mark.parametrize(
    "bad",
    [
        *("x", "äöü", "!!!!", "AAAA", "=", "a" * 2000, "\0"),
        *(cursor(value) for value in (5, None, True, "x", [], {}, [1], ["a"], [[]], {"a": 1})),
        *(cursor(value) for value in (["a", "b"], ["now", "t"], [None, None], [1.5, "m"])),
        *(cursor(value) for value in ([True, "m"], ["1", 2], [1, 2, 3], ["2026-01-01", "t"])),
        *(cursor([number, "m"]) for number in (10**30, -(10**30), 2**63, 2**31, -1)),
        *(cursor([1, "nowhere"]), cursor([1, "\0"]), cursor([1, "x" * 5000])),
        *(cursor(["2026-01-01T00:00:00+05:00", "t"]), cursor(["9" * 30, "t"])),
        *(cursor(b'[1,"\\ud800"]'), cursor(b'["' + MOMENT.encode() + b'","\\ud800"]')),
        *(cursor(b"[" * 4000), cursor(b"[1e999,1]"), cursor(b"\xff\xfe"), cursor(b"[NaN]")),
        cursor([MOMENT, "\0"]),
    ],
)
async def test_cursors_that_are_refused(api: Api, bad: str) -> None:
    thread = unique()
    await post(api.server, {"content": "hi", "thread_id": thread})
    for path in (
        "/chat/threads",
        of(thread, "/messages"),
        of(thread, "/messages?branch=all"),
        of(thread, "/messages?order=desc"),
    ):
        where, _, rest = path.partition("?")
        query = dict([rest.split("=")]) if rest else {}
        await refused(
            api.server, "GET", where, 422, "invalid_message", params={**query, "cursor": bad}
        )


async def test_a_cursor_of_another_thread_is_refused(api: Api) -> None:
    one, two = unique(), unique()
    for thread in (one, two):
        await post(api.server, {"content": "hi", "thread_id": thread})
    for branch in ("current", "all"):
        query = {"limit": 1, "branch": branch}
        page = await call(api.server, "GET", of(one, "/messages"), params=query)
        await refused(
            api.server,
            "GET",
            of(two, "/messages"),
            422,
            "invalid_message",
            params={**query, "cursor": page["next"]},
        )


async def test_threads_are_paged_once_each_while_others_are_made(api: Api) -> None:
    before = [unique() for _ in range(25)]
    for thread in before:
        await call(api.server, "POST", "/chat/threads", 201, json={"id": thread})
    found, query = list[str](), dict[str, Any](limit=4)
    async with client(api.server) as http:
        while True:
            response = await http.get("/chat/threads", params=query)
            page = response.json()
            assert len(page["threads"]) <= 4
            found += [thread["id"] for thread in page["threads"]]
            if page["next"] is None:
                break
            query["cursor"] = page["next"]
            await asyncio.gather(
                *(http.post("/chat/threads", json={"id": unique("late")}) for _ in range(3))
            )
    assert len(found) == len(set(found))
    assert [thread for thread in found if thread in set(before)] == before[::-1]
    assert not [thread for thread in found if thread.startswith("late")]


async def test_the_last_page_says_so(server: Server) -> None:
    thread = unique()
    for _ in range(2):
        await post(server, {"content": "hi", "thread_id": thread})
    path = of(thread, "/messages")
    for branch in ("current", "all"):
        for order in ("asc", "desc"):
            query = {"branch": branch, "order": order}
            for limit, sizes in ((1, [1] * 4), (3, [3, 1]), (4, [4]), (2, [2, 2]), (200, [4])):
                page = await call(server, "GET", path, params={**query, "limit": limit})
                found = [page]
                while page["next"] is not None:
                    more = {**query, "limit": limit, "cursor": page["next"]}
                    page = await call(server, "GET", path, params=more)
                    found.append(page)
                assert [len(each["messages"]) for each in found] == sizes
                roles = [m["role"] for each in found for m in each["messages"]]
                expected = ["user", "assistant"] * 2
                assert roles == (expected if order == "asc" else expected[::-1])


async def test_fifty_come_where_no_limit_is_given(api: Api) -> None:
    user_messages = [
        Message(id=f"m{n}", thread_id="fifty", role="user", content=str(n)) for n in range(51)
    ]
    await api.beside.storage.add_messages("1", user_messages, create=True)
    page = await call(api.server, "GET", of("fifty", "/messages"))
    assert [m["content"] for m in page["messages"]] == [str(n) for n in range(50)]
    page = await call(api.server, "GET", of("fifty", "/messages"), params={"cursor": page["next"]})
    assert [m["content"] for m in page["messages"]] == ["50"]
    assert page["next"] is None
    await call(api.server, "DELETE", of("fifty"), 204)


async def test_a_page_of_messages_keeps_its_path_while_a_branch_begins(api: Api) -> None:
    thread = unique()
    first = await post(api.server, {"content": "one", "thread_id": thread})
    await post(api.server, {"content": "two", "thread_id": thread})
    old = await messages(api.server, thread)
    page = await call(api.server, "GET", of(thread, "/messages"), params={"limit": 3})
    edit = {"content": "edit", "thread_id": thread, "parent_id": first[0]["message_id"]}
    await post(api.server, edit)
    rest = await call(
        api.server, "GET", of(thread, "/messages"), params={"limit": 3, "cursor": page["next"]}
    )
    assert page["messages"] + rest["messages"] == old
    assert rest["next"] is None


# Runs


async def test_the_active_run_is_true_at_every_moment(api: Api, shared_endpoint: Endpoint) -> None:
    thread, gate = unique(), shared_endpoint.gate("go")
    gate.clear()
    made = await call(api.server, "POST", "/chat/threads", 201, json={"id": thread})
    assert made["active_run_id"] is None
    async with connect(api.server) as socket:
        await socket.send({"content": "script:gated", "thread_id": thread})
        began = await socket.receive()
        assert began["type"] == "start"
        run_id = began["run_id"]
        assert (await call(api.server, "GET", of(thread)))["active_run_id"] == run_id
        await socket.until("content")
        changed = await call(api.server, "PATCH", of(thread), json={"title": "T"})
        assert changed["active_run_id"] == run_id
        listed = (await call(api.server, "GET", "/chat/threads?limit=1"))["threads"][0]
        assert (listed["id"], listed["active_run_id"]) == (thread, run_id)
        gate.set()
        await socket.until("end")
        found = await call(api.server, "GET", of(thread))
        assert (found["active_run_id"], found["message_count"]) == (None, 2)
        for n in range(10):
            await socket.ask("hi", thread_id=thread)
            found = await call(api.server, "GET", of(thread))
            assert (found["active_run_id"], found["message_count"]) == (None, 4 + 2 * n)


async def test_an_answer_is_whole_when_its_end_is_seen(api: Api) -> None:
    thread = unique()
    events = await post(api.server, {"content": "hi", "thread_id": thread, "id": "q"})
    question, reply = await messages(api.server, thread)
    assert reply == events[-2]["message"]
    assert question | {"id": "q", "role": "user", "content": "hi", "parent_id": None} == question
    assert question["run_id"] == reply["run_id"] == events[0]["run_id"]
    assert (reply["parent_id"], reply["content"], reply["status"]) == ("q", TEXT, "completed")
    assert (reply["model"], reply["provider"]) == ("m", "scripted")
    assert reply["usage"] == events[-1]["usage"]
    assert "options" not in question
    assert "feedback" not in reply


async def test_stop_answers_what_it_did(api: Api) -> None:
    thread = unique()
    async with connect(api.server) as socket:
        await socket.send({"content": "script:silent", "thread_id": thread})
        run_id = (await socket.until("content"))[0]["run_id"]
        found = await call(api.server, "POST", of(thread, "/stop"))
        assert found == {"stopped": True, "run_id": run_id}
        assert (await call(api.server, "GET", of(thread)))["active_run_id"] is None
        assert await call(api.server, "POST", of(thread, "/stop")) == {"stopped": False}
        events = await socket.until("end")
    assert [e["type"] for e in events].count("generation_stopped") == 1
    assert events[-1]["status"] == "stopped"
    kept = (await messages(api.server, thread))[-1]
    assert (kept["content"], kept["status"]) == ("partial ", "stopped")


# Deletion


async def rows_of(api: Api, thread: str, run_ids: list[str]) -> dict[str, int]:
    """How many rows of each table, and of the search index, belong to a thread."""
    runs = ", ".join(f"'{run_id}'" for run_id in run_ids)
    counts = {
        table: await api.value(f"SELECT count(*) FROM {table} WHERE {column} = '{thread}'")
        for table, column in zip(TABLES, ("id", "thread_id", "thread_id"), strict=False)
    }
    counts["chat_events"] = await api.value(
        f"SELECT count(*) FROM chat_events WHERE run_id IN ({runs})"
    )
    counts["orphans"] = await api.value(
        "SELECT count(*) FROM chat_events WHERE run_id NOT IN (SELECT id FROM chat_runs)"
    )
    return counts


NOTHING = dict.fromkeys([*TABLES, "orphans"], 0)


async def test_a_deleted_thread_with_a_run_in_progress_leaves_no_row(api: Api) -> None:
    thread, word = unique(), unique("zebra")
    async with connect(api.server) as socket:
        first = await socket.ask(f"{word} ended", thread_id=thread)
        await socket.send({"content": f"script:endless {word}", "thread_id": thread})
        began = await socket.until("content")
        runs = [first[0]["run_id"], began[0]["run_id"]]
        await eventually(lambda: has_events(api, runs[1]))
        assert await search(api.server, word) == [thread]
        await socket.send({"content": "waits", "thread_id": thread, "id": "waits"})
        await socket.until("queued")
        await call(api.server, "DELETE", of(thread), 204)
        assert await rows_of(api, thread, runs) == NOTHING
        events = await socket.until("end")
        stopped = [e for e in events if e["type"] == "generation_stopped"]
        assert len(stopped) == 2 if len(stopped) > 1 else stopped
        assert any("delete" in event["message"] for event in stopped)
        assert events[-1]["status"] == "stopped"
    assert await search(api.server, word) == []
    for run_id in runs:
        async with client(api.server) as http:
            assert (await http.get(f"/chat/sse?run_id={run_id}")).status_code == 404
    await refused(api.server, "GET", of(thread), 404, "not_found")
    if api.is_sqlite:
        terms = " AND ".join(f"{number:x}" for number in query_grams("1", [word]))
        match = f"SELECT count(*) FROM chat_search WHERE chat_search MATCH '{terms}'"
        assert await api.value(match) == 0
    # What is written in the background has been written when a later run's events are there.
    later = await post(api.server, {"content": "later"})
    await eventually(lambda: has_events(api, later[0]["run_id"]))
    assert await rows_of(api, thread, runs) == NOTHING


async def has_events(api: Api, run_id: str) -> bool:
    sql = f"SELECT count(*) FROM chat_events WHERE run_id = '{run_id}'"
    return bool(await api.value(sql))


async def test_deleting_at_any_moment_of_a_run_leaves_no_row(api: Api) -> None:
    threads = {unique(): 0.002 * n for n in range(10)}
    runs: list[str] = []

    async def live(thread: str, pause: float) -> None:
        async with connect(api.server) as socket:
            await socket.send({"content": "script:numbers 30", "thread_id": thread})
            runs.append((await socket.until("start"))[-1]["run_id"])
            await asyncio.sleep(pause)
            await call(api.server, "DELETE", of(thread), 204)
            await socket.until("end")

    await asyncio.gather(*(live(thread, pause) for thread, pause in threads.items()))
    for thread in threads:
        assert await rows_of(api, thread, runs) == NOTHING


async def test_a_deleted_threads_id_begins_anew(api: Api) -> None:
    thread = unique()
    await post(api.server, {"content": "old", "thread_id": thread, "id": "same"})
    await call(api.server, "DELETE", of(thread), 204)
    events = await post(api.server, {"content": "script:echo", "thread_id": thread, "id": "same"})
    assert answer(events) == "user:script:echo"
    assert events[0]["parent_id"] is None
    assert len(await messages(api.server, thread)) == 2


# Titles


async def test_titles_come_from_the_first_message(server: Server) -> None:
    thread = unique()
    await post(server, {"content": "  The first\n line " + "word " * 40, "thread_id": thread})
    await post(server, {"content": "another", "thread_id": thread})
    title = (await call(server, "GET", of(thread)))["title"]
    assert title.startswith("The first line word")
    assert len(title) <= 80
    assert (await call(server, "PATCH", of(thread), json={"title": "Mine"}))["title"] == "Mine"
    assert (await call(server, "PATCH", of(thread), json={"title": None}))["title"] == title
    assert (await call(server, "GET", of(thread)))["title"] == title


async def test_a_set_title_stays(server: Server) -> None:
    thread = unique()
    await call(server, "POST", "/chat/threads", 201, json={"id": thread, "title": "Set"})
    await post(server, {"content": "hi", "thread_id": thread})
    assert (await call(server, "GET", of(thread)))["title"] == "Set"


async def titled(exchange: Exchange) -> None:
    """The title model waits for its gate; the chat model answers at once."""
    if exchange.body["model"] == "titler":
        await exchange.endpoint.gate("title").wait()
        if "refuse" in exchange.said:
            await exchange.refuse(500, {"message": "oops"})
        else:
            await exchange.send(text(' "A made\n title." ') + END)
    else:
        await exchange.send(text("answer") + END)


async def test_a_model_makes_titles_without_delaying_the_answer(
    serve: Serve, endpoint: Endpoint
) -> None:
    endpoint.scripts["titled"] = titled
    server = await serve(title_model="titler")
    mine = await call(server, "POST", "/chat/threads", 201, json={"title": "Mine"})
    for thread, words in (("made", "x"), ("changed", "x"), ("broken", "refuse"), ("gone", "x")):
        events = await post(server, {"content": f"script:titled {words}", "thread_id": thread})
        assert answer(events) == "answer"
        assert (await call(server, "GET", of(thread)))["title"] == f"script:titled {words}"
    assert answer(await post(server, {"content": "script:titled", "thread_id": mine["id"]}))
    await post(server, {"content": "script:titled second", "thread_id": "made"})
    await call(server, "PATCH", of("changed"), json={"title": "Changed"})
    await call(server, "DELETE", of("gone"), 204)
    endpoint.gate("title").set()

    async def made() -> bool:
        return (await call(server, "GET", of("made")))["title"] == "A made title"

    await eventually(made)
    await eventually(lambda: asyncio.sleep(0, not endpoint.open))
    titles = {
        thread["id"]: thread["title"]
        for thread in (await call(server, "GET", "/chat/threads"))["threads"]
    }
    assert titles == {
        "made": "A made title",
        "changed": "Changed",
        "broken": "script:titled refuse",
        mine["id"]: "Mine",
    }
    asked = [body for body in endpoint.requests if body["model"] == "titler"]
    assert {body["messages"][-1]["content"] for body in asked} <= {
        *("script:titled x", "script:titled refuse", "script:titled")
    }
    assert (await call(server, "GET", of("made")))["message_count"] == 4


async def test_a_title_model_that_the_provider_does_not_offer_harms_nothing(
    serve: Serve, endpoint: Endpoint
) -> None:
    given = providers(endpoint, models=["m"])
    server = await serve(title_model="titler", providers=given)
    assert answer(await post(server, {"content": "hi there", "thread_id": "t"})) == TEXT
    assert (await call(server, "GET", of("t")))["title"] == "hi there"


# Feedback and models


async def test_feedback_is_kept_with_its_message(api: Api) -> None:
    thread = unique()
    events = await post(api.server, {"content": "hi", "thread_id": thread})
    message_id = events[0]["message_id"]
    path = of(thread, f"/messages/{message_id}/feedback")
    for feedback in (
        {"score": 1},
        {"score": -1, "comment": "ü😀"},
        {"score": 0},
        {"score": 1, "comment": "x" * 4000},
    ):
        await call(api.server, "PUT", path, 204, json=feedback)
        found = await messages(api.server, thread)
        assert found[1]["feedback"] == feedback
        assert "feedback" not in found[0]
    await call(api.server, "PUT", path, 204, json={"score": 0, "comment": None})
    assert (await messages(api.server, thread))[1]["feedback"] == {"score": 0}


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 422),
        (b"{}", 422),
        (b"{", 400),
        (b"[1]", 422),
        (b'{"score": 2}', 422),
        (b'{"score": "1"}', 422),
        (b'{"score": 0.5}', 422),
        (b'{"score": true}', 422),
        (b'{"score": null}', 422),
        (b'{"score": 1, "comment": 5}', 422),
        (b'{"score": 1, "comment": "a\\u0000"}', 422),
        (b'{"score": 1, "surprise": 5}', 422),
    ],
)
async def test_feedback_that_is_refused(server: Server, body: bytes, status: int) -> None:
    thread = unique()
    await post(server, {"content": "hi", "thread_id": thread, "id": "q"})
    path = of(thread, "/messages/q/feedback")
    await refused(server, "PUT", path, status, "invalid_message", content=body)
    assert "feedback" not in (await messages(server, thread))[0]


async def test_models_are_listed(serve: Serve, endpoint: Endpoint) -> None:
    given = providers(endpoint, models=["m", "big"]) | {
        "second": {"base_url": endpoint.url, "models": ["small"]},
        "third": {"base_url": endpoint.url},
    }
    server = await serve(providers=given)
    assert await call(server, "GET", "/chat/models") == {
        "models": [
            {"id": "m", "provider": "scripted", "default": True},
            {"id": "big", "provider": "scripted", "default": False},
            {"id": "small", "provider": "second", "default": False},
        ]
    }


# Search


async def test_search_over_titles_and_text(api: Api) -> None:
    word = unique("ocelot").replace("_", "x")
    by_text, by_answer, by_title = unique(), unique(), unique()
    await post(api.server, {"content": f"I saw an {word.upper()} run", "thread_id": by_text})
    await post(api.server, {"content": f"script:echo {word}", "thread_id": by_answer})
    body = {"id": by_title, "title": f"About {word}s"}
    await call(api.server, "POST", "/chat/threads", 201, json=body)
    secret = Message(id="m", thread_id="s", role="user", content=f"{word} theirs run user")
    await api.beside.storage.add_messages("other", [secret], create=True)
    await api.beside.storage.create_thread("other", Thread(id=unique(), title=f"{word} theirs"))
    for query, found in {
        word: [by_title, by_answer, by_text],
        word[:-2]: [by_title, by_answer, by_text],
        f"{word} run": [by_text],
        f"run {word[:-1]} saw": [by_text],
        f"user {word}": [by_answer],
        f"about {word}": [by_title],
        f"theirs {word}": [],
        f'"{word}"': [],
        f"bout {word}": [by_title],
        f"{word} OR nothing": [],
        f"NOT {word}": [],
        f"{word} AND run": [],
        f"{word}*": [],
        f"{word}s": [by_title],
        f"body:{word}": [],
        f"'{word}": [],
        f"{word} & !run": [],
        f"({word}": [],
        "\\": [],
        '"': [],
        "%": [],
    }.items():
        assert await search(api.server, query) == found, query
    page = await call(api.server, "GET", "/chat/threads", params={"q": word, "limit": 2})
    assert [thread["id"] for thread in page["threads"]] == [by_title, by_answer]
    rest = {"q": word, "limit": 2, "cursor": page["next"]}
    page = await call(api.server, "GET", "/chat/threads", params=rest)
    assert [thread["id"] for thread in page["threads"]] == [by_text]
    assert page["next"] is None
    await call(api.server, "PATCH", of(by_title), json={"title": "else"})
    await call(api.server, "DELETE", of(by_text), 204)
    assert await search(api.server, word) == [by_answer]


async def test_searches_that_can_not_be_are_refused(server: Server) -> None:
    for query in ("a\0b", "x" * 501):
        await refused(server, "GET", "/chat/threads", 422, "invalid_message", params={"q": query})
    everything = await call(server, "GET", "/chat/threads", params={"q": ""})
    assert everything == await call(server, "GET", "/chat/threads")


# Branches


async def ids(server: Server, thread: str, **query: Any) -> list[str]:
    return [message["id"] for message in await messages(server, thread, **query)]


async def test_an_edit_begins_a_branch_and_is_answered_from_it(
    api: Api, shared_endpoint: Endpoint
) -> None:
    thread = unique()
    async with connect(api.server) as socket:

        async def ask(message_id: str, **more: Any) -> str:
            """The sent message's id becomes ``id``; gives the answer's id."""
            events = await socket.ask(message_id, id=message_id, thread_id=thread, **more)
            parent = more.get("parent_id")
            assert parent is None or events[0]["parent_id"] == parent
            return str(events[0]["message_id"])

        a1 = await ask("u1")
        a2 = await ask("u2")
        edited = await ask("u2e", parent_id=a1)
        sent = shared_endpoint.requests[-1]["messages"]
        assert [m["content"] for m in sent] == ["u1", TEXT, "u2e"]
        assert await ids(api.server, thread) == ["u1", a1, "u2e", edited]
        assert await ids(api.server, thread, order="desc") == [edited, "u2e", a1, "u1"]
        stored = ["u1", a1, "u2", a2, "u2e", edited]
        assert await ids(api.server, thread, branch="all") == stored
        assert await ids(api.server, thread, branch="all", order="desc") == stored[::-1]
        assert await ids(api.server, thread, branch="all", limit=1) == stored
        a3 = await ask("u3")
        assert await ids(api.server, thread) == ["u1", a1, "u2e", edited, "u3", a3]
        b3 = await ask("back", parent_id=a2)
        assert await ids(api.server, thread) == ["u1", a1, "u2", a2, "back", b3]
        sent = shared_endpoint.requests[-1]["messages"]
        assert [m["content"] for m in sent] == ["u1", TEXT, "u2", TEXT, "back"]
        assert await ids(api.server, thread, limit=2) == ["u1", a1, "u2", a2, "back", b3]
        assert (await call(api.server, "GET", of(thread)))["message_count"] == 10
        await socket.send({"content": "x", "thread_id": thread, "parent_id": "no", "id": "r"})
        error = await socket.receive()
        assert (error["code"], error["reply_to"]) == ("not_found", "r")
        other = unique()
        await socket.send({"content": "x", "thread_id": other, "parent_id": a1})
        assert (await socket.receive())["code"] == "not_found"
    await refused(api.server, "GET", of(other), 404, "not_found")


async def test_an_answer_is_made_again_beside_the_old_one(
    api: Api, shared_endpoint: Endpoint
) -> None:
    thread = unique()
    async with connect(api.server) as socket:
        first = await socket.ask("script:echo one", id="u1", thread_id=thread, temperature=0.5)
        a1 = first[0]["message_id"]
        second = await socket.ask("script:echo two", id="u2", thread_id=thread)
        a2 = second[0]["message_id"]
        await socket.send({"type": "regenerate", "thread_id": thread})
        again = await socket.until("end")
        b2 = again[0]["message_id"]
        assert (again[0]["type"], again[0]["seq"]) == ("start", 1)
        assert (again[0]["user_message_id"], again[0]["parent_id"]) == ("u2", a1)
        assert again[0]["run_id"] not in (first[0]["run_id"], second[0]["run_id"])
        assert answer(again) == answer(second)
        assert again[-2]["message"]["parent_id"] == "u2"
        assert await ids(api.server, thread) == ["u1", a1, "u2", b2]
        await socket.send({"type": "regenerate", "thread_id": thread, "message_id": a1})
        b1 = (await socket.until("end"))[0]["message_id"]
        sent = shared_endpoint.requests[-1]
        assert [m["content"] for m in sent["messages"]] == ["script:echo one"]
        assert sent["temperature"] == 0.5
        assert await ids(api.server, thread) == ["u1", b1]
        await socket.send({"type": "regenerate", "thread_id": thread, "message_id": "u2"})
        c2 = (await socket.until("end"))[0]["message_id"]
        assert await ids(api.server, thread) == ["u1", a1, "u2", c2]
        stored = ["u1", a1, "u2", a2, b2, b1, c2]
        assert await ids(api.server, thread, branch="all") == stored
        for command in (
            {"thread_id": "nowhere"},
            {"thread_id": thread, "message_id": "nowhere"},
            {"thread_id": thread, "message_id": "nowhere", "id": "r1"},
        ):
            await socket.send({"type": "regenerate", **command})
            error = await socket.receive()
            assert (error["code"], error.get("reply_to")) == ("not_found", command.get("id"))
        empty = (await call(api.server, "POST", "/chat/threads", 201))["id"]
        await socket.send({"type": "regenerate", "thread_id": empty})
        assert (await socket.receive())["code"] == "not_found"


async def test_a_stopped_answer_can_be_made_again(api: Api) -> None:
    thread = unique()
    async with connect(api.server) as socket:
        await socket.send({"content": "script:silent", "id": "u", "thread_id": thread})
        await socket.until("content")
        await socket.send({"type": "stop", "thread_id": thread})
        old = (await socket.until("end"))[-1]
        assert old["status"] == "stopped"
        await socket.send({"type": "regenerate", "thread_id": thread})
        began = await socket.until("content")
        assert began[0]["user_message_id"] == "u"
        await socket.send({"type": "stop", "thread_id": thread})
        await socket.until("end")
    found = await messages(api.server, thread, branch="all")
    assert [(m["role"], m["parent_id"]) for m in found] == [
        ("user", None),
        ("assistant", "u"),
        ("assistant", "u"),
    ]


async def test_answering_again_without_the_tools_of_then(
    serve: Serve, endpoint: Endpoint, tmp_path: Path
) -> None:
    """The tool was registered when the question was asked and is not any more."""
    (tmp_path / "my_tools.py").write_text(
        "from quart_chat import tool\n\n@tool\ndef add(a: int, b: int) -> int:\n"
        '    """Add."""\n    return a + b\n'
    )
    server = await serve("--tools", "my_tools")
    await post(server, {"content": "hi", "thread_id": "t", "tools": ["add"]})
    assert endpoint.requests[-1]["tools"][0]["function"]["name"] == "add"
    async with connect(server) as socket:
        await socket.send({"type": "regenerate", "thread_id": "t"})
        assert answer(await socket.until("end")) == TEXT
    assert endpoint.requests[-1]["tools"][0]["function"]["name"] == "add"
    await server.stop()
    asked = len(endpoint.requests)
    server = await serve()
    async with connect(server) as socket:
        await socket.send({"type": "regenerate", "thread_id": "t", "id": "r"})
        error = await socket.receive()
        assert (error["type"], error["code"], error["reply_to"]) == ("error", "unknown_tool", "r")
        assert len(endpoint.requests) == asked
        found = await call(server, "GET", of("t"))
        assert (found["active_run_id"], found["message_count"]) == (None, 3)
        assert answer(await socket.ask("on", thread_id="t")) == TEXT


async def test_the_newest_window_follows_the_path(serve: Serve, endpoint: Endpoint) -> None:
    server = await serve(history_messages=3)
    async with connect(server) as socket:
        first = await socket.ask("u1", thread_id="t")
        for n in range(2, 5):
            await socket.ask(f"u{n}", thread_id="t")
        events = await socket.ask("edit", thread_id="t", parent_id=first[0]["message_id"])
        assert [m["content"] for m in endpoint.requests[-1]["messages"]] == ["u1", TEXT, "edit"]
        await socket.ask("on", thread_id="t")
        assert [m["content"] for m in endpoint.requests[-1]["messages"]] == ["edit", TEXT, "on"]
        assert events[0]["parent_id"] == first[0]["message_id"]


# Memory


async def test_memory_serves_the_same_calls(serve: Serve) -> None:
    server = await serve("--no-database")
    events = await post(server, {"content": "an ocelot", "thread_id": "t", "id": "q"})
    edit = {"content": "edit", "thread_id": "t", "parent_id": events[0]["message_id"]}
    await post(server, edit)
    assert len(await messages(server, "t")) == 4
    assert len(await messages(server, "t", limit=1, order="desc", branch="all")) == 4
    assert await search(server, "ocel") == ["t"]
    path = of("t", "/messages/q/feedback")
    await call(server, "PUT", path, 204, json={"score": 1})
    assert (await messages(server, "t"))[0]["feedback"] == {"score": 1}
    for bad in (cursor([1, "nowhere"]), cursor(b"[" * 4000), cursor([MOMENT, 1]), "x"):
        for where in ("/chat/threads", of("t", "/messages")):
            await refused(server, "GET", where, 422, "invalid_message", params={"cursor": bad})
    assert (await call(server, "PATCH", of("t"), json={"title": None}))["title"] == "an ocelot"
    await call(server, "DELETE", of("t"), 204)
    assert (await call(server, "GET", "/chat/threads"))["threads"] == []


async def test_a_refused_request_leaves_a_connection_usable(server: Server) -> None:
    async with client(server, limits=httpx.Limits(max_connections=1)) as http:
        for _ in range(3):
            assert (await http.post("/chat/threads", content=b"{")).status_code == 400
            assert (await http.get("/chat/threads?limit=1")).status_code == 200
