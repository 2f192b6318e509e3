"""Two users whose ids collide: each sees what a server of their own would have shown."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest
from auth_server import AuthServer, auth_server, bearer, remote_server
from conftest import SECONDS, Server, Socket, answer, client, connect, events_of, unique
from endpoint import Endpoint
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

UNBOUNDED = {
    "rate_limit": "100000/second",
    "max_runs_per_user": 1000,
    "max_connections_per_user": 1000,
}


@pytest.fixture(scope="module")
async def auth() -> AsyncIterator[AuthServer]:
    async with auth_server() as found:
        yield found


@pytest.fixture(scope="module")
async def servers(
    auth: AuthServer, shared_endpoint: Endpoint, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[list[Server]]:
    """A server that two users share, and one for each of them alone."""
    async with AsyncExitStack() as stack:
        yield [
            await stack.enter_async_context(
                remote_server(
                    auth, shared_endpoint, tmp_path_factory.mktemp("isolation"), **UNBOUNDED
                )
            )
            for _ in range(3)
        ]


@dataclass
class Person:
    """A user at a server, with an HTTP client and a socket."""

    name: str
    http: httpx.AsyncClient
    socket: Socket
    stack: AsyncExitStack = field(default_factory=AsyncExitStack)

    async def ask(self, **command: Any) -> list[dict[str, Any]]:
        response = await self.http.post("/chat/sse", json=command)
        assert response.status_code == 200, response.text
        return events_of(response.text)

    async def say(self, **command: Any) -> dict[str, Any]:
        """A command over the socket and the next event."""
        await self.socket.send(command)
        return await self.socket.receive()

    async def begin(self, thread: str) -> str:
        """Have something answered that does not end by itself; gives the run."""
        stream = await self.stack.enter_async_context(
            self.http.stream("POST", "/chat/sse", json={"content": HELD, "thread_id": thread})
        )
        assert stream.status_code == 200
        body = await self.stack.enter_async_context(aclosing(stream.aiter_text()))
        said = ""
        while "partial" not in said:
            said += await anext(body)
        return await self.active(thread)

    async def active(self, thread: str) -> str:
        run = (await self.http.get(f"/chat/threads/{thread}")).json()["active_run_id"]
        assert isinstance(run, str)
        return run


HELD = "script:silent"


@pytest.fixture
async def people(servers: list[Server], auth: AuthServer) -> AsyncIterator[tuple[Person, Person]]:
    """Ada and Bob, new to the shared server."""
    async with AsyncExitStack() as stack:
        found = [await person(stack, servers[0], auth, unique(name)) for name in ("ada", "bob")]
        yield found[0], found[1]
        for each in found:
            for thread in (await each.http.get("/chat/threads")).json()["threads"]:
                await each.http.post(f"/chat/threads/{thread['id']}/stop")


async def person(stack: AsyncExitStack, server: Server, auth: AuthServer, name: str) -> Person:
    headers = bearer(auth.token(name))
    http = await stack.enter_async_context(client(server, headers=headers))
    socket = await stack.enter_async_context(connect(server, additional_headers=headers))
    own = await stack.enter_async_context(AsyncExitStack())
    return Person(name, http, socket, own)


async def test_the_same_ids_are_two_threads_and_two_messages(
    people: tuple[Person, Person],
) -> None:
    for each in people:
        events = await each.ask(content=f"of {each.name}", thread_id="thread_123", id="m1")
        assert events[0]["user_message_id"] == "m1"
        assert events[0]["parent_id"] is None
    for each in people:
        page = (await each.http.get("/chat/threads/thread_123/messages")).json()["messages"]
        assert [m["content"] for m in page if m["role"] == "user"] == [f"of {each.name}"]
        threads = (await each.http.get("/chat/threads")).json()["threads"]
        assert [(t["title"], t["message_count"]) for t in threads] == [(f"of {each.name}", 2)]
        events = await each.ask(content="script:echo", thread_id="thread_123", id="m2")
        assert f"user:of {each.name}|" in answer(events)
        assert answer(events).count("user:of") == 1


async def test_a_retry_attaches_to_the_own_message_alone(people: tuple[Person, Person]) -> None:
    ada, bob = people
    first = await ada.ask(content="script:echo same", id="m1", thread_id="t")
    other = await bob.ask(content="script:echo same", id="m1", thread_id="t")
    assert first[0]["run_id"] != other[0]["run_id"]
    again = await ada.ask(content="script:echo same", id="m1", thread_id="t")
    assert again[0]["run_id"] == first[0]["run_id"]
    assert (await bob.ask(content="x", id="m-only"))[0]["thread_id"] != (
        (await ada.ask(content="x", id="m-only"))[0]["thread_id"]
    )


def masked(value: Any, *ids: str) -> str:
    """An answer without the ids that the question named, and without what is new each time."""
    text = json.dumps(value, sort_keys=True)
    for each in ids:
        text = text.replace(each, "ID")
    return text


async def same_answer(
    ada: Person, method: str, path: str, foreign: str, missing: str, body: Any = None
) -> None:
    answers = []
    for each in (foreign, missing):
        where = path.replace("ID", each)
        response = await ada.http.request(method, where, json=body)
        assert response.status_code in (204, 404), response.text
        headers = {
            name: value
            for name, value in response.headers.items()
            if name not in ("date", "content-length")
        }
        shown = response.json() if response.content else None
        answers.append((response.status_code, headers, masked(shown, each)))
    assert answers[0] == answers[1]


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("GET", "/chat/threads/ID", None),
        ("PATCH", "/chat/threads/ID", {"title": "mine"}),
        ("DELETE", "/chat/threads/ID", None),
        ("GET", "/chat/threads/ID/messages", None),
        ("GET", "/chat/threads/ID/messages?branch=all&order=desc", None),
        ("POST", "/chat/threads/ID/stop", None),
        ("PUT", "/chat/threads/ID/messages/m1/feedback", {"score": 1}),
        ("GET", "/chat/sse?thread_id=ID", None),
    ],
)
async def test_a_thread_of_somebody_else_is_one_that_is_not_there(
    people: tuple[Person, Person], method: str, path: str, body: Any
) -> None:
    ada, bob = people
    await bob.ask(content="secret of bob", thread_id="only-bobs", id="m1")
    before = (await bob.http.get("/chat/threads/only-bobs/messages")).json()
    await same_answer(ada, method, path, "only-bobs", "no-bodys", body)
    await bob.begin("bobs-running")
    await same_answer(ada, method, path, "bobs-running", "no-bodys", body)
    await bob.active("bobs-running")
    assert (await bob.http.get("/chat/threads/only-bobs/messages")).json() == before


async def test_a_run_of_somebody_else_is_one_that_is_not_there(
    people: tuple[Person, Person],
) -> None:
    ada, bob = people
    ended = (await bob.ask(content="secret of bob", thread_id="t"))[0]["run_id"]
    running = await bob.begin("t")
    missing = ended[:-6] + "000000"
    for foreign in (ended, running):
        await same_answer(ada, "GET", "/chat/sse?run_id=ID", foreign, missing)
        await same_answer(ada, "GET", "/chat/sse?last_event_id=ID:0", foreign, missing)
        await same_answer(ada, "GET", "/chat/sse?last_event_id=ID:9999", foreign, missing)
        for command in (
            {"type": "stop", "run_id": foreign},
            {"type": "stop", "run_id": foreign, "thread_id": "t"},
            {"type": "resume", "run_id": foreign},
            {"type": "resume", "run_id": foreign, "last_seq": 1},
            {"type": "resume", "run_id": foreign, "last_seq": 10_000},
            {"type": "resume", "run_id": foreign, "thread_id": "t"},
            {"type": "tool_result", "run_id": foreign, "tool_call_id": "c", "content": "x"},
            {"type": "approve", "run_id": foreign, "tool_call_id": "c", "approved": True},
        ):
            refused = await ada.say(**command)
            unknown = await ada.say(**command | {"run_id": missing})
            assert refused["type"] == "error"
            wanted = "nothing_to_resume" if command["type"] == "resume" else "not_found"
            assert refused["code"] == wanted
            assert masked(refused, foreign) == masked(unknown, missing)
    assert await bob.active("t") == running


async def test_commands_on_a_thread_of_somebody_else(people: tuple[Person, Person]) -> None:
    ada, bob = people
    answered = (await bob.ask(content="secret of bob", thread_id="bobs-thread", id="m1"))[0][
        "message_id"
    ]
    await bob.begin("bobs-running")
    for thread in ("bobs-thread", "bobs-running"):
        for command in (
            {"type": "stop", "thread_id": thread},
            {"type": "resume", "thread_id": thread},
            {"type": "regenerate", "thread_id": thread},
            {"type": "regenerate", "thread_id": thread, "message_id": answered},
        ):
            refused = await ada.say(**command)
            unknown = await ada.say(**command | {"thread_id": "no-bodys"})
            assert refused["code"] in ("not_found", "nothing_to_resume")
            assert masked(refused, thread) == masked(unknown, "no-bodys")
    assert (await ada.say(type="stop"))["code"] == "not_running"
    for parent in ("m1", answered):
        refused = await ada.say(content="x", thread_id="bobs-thread", parent_id=parent)
        assert refused["code"] == "not_found"
    assert (await ada.http.get("/chat/threads")).json()["threads"] == []
    await bob.active("bobs-running")


async def test_stop_and_delete_reach_the_own_thread_alone(people: tuple[Person, Person]) -> None:
    ada, bob = people
    runs = {each.name: await each.begin("t") for each in people}
    stopped = (await ada.http.post("/chat/threads/t/stop")).json()
    assert stopped == {"stopped": True, "run_id": runs[ada.name]}
    assert await bob.active("t") == runs[bob.name]
    assert (await ada.http.delete("/chat/threads/t")).status_code == 204
    assert await bob.active("t") == runs[bob.name]
    assert (await ada.http.get("/chat/threads/t")).status_code == 404
    await ada.ask(content="new", thread_id="t")
    assert await bob.active("t") == runs[bob.name]
    page = (await bob.http.get("/chat/threads/t/messages")).json()["messages"]
    assert [m["content"] for m in page] == [HELD]


async def test_a_new_message_interrupts_the_own_run_alone(people: tuple[Person, Person]) -> None:
    ada, bob = people
    run = await bob.begin("t")
    assert (await ada.ask(content="hi", thread_id="t"))[-1]["status"] == "completed"
    assert await bob.active("t") == run


async def test_search_finds_the_own_words_alone(people: tuple[Person, Person]) -> None:
    ada, bob = people
    await bob.ask(content="the zebra of bob", thread_id="t")
    await ada.ask(content="the horse of ada", thread_id="t")
    for query in ("zebra", "bob", "z", "%", "_", "the zebra"):
        found = (await ada.http.get("/chat/threads", params={"q": query})).json()["threads"]
        assert all("zebra" not in json.dumps(thread) for thread in found)
    assert not (await ada.http.get("/chat/threads", params={"q": "zebra"})).json()["threads"]
    assert (await bob.http.get("/chat/threads", params={"q": "zebra"})).json()["threads"]


async def test_a_cursor_of_somebody_else_opens_nothing(people: tuple[Person, Person]) -> None:
    ada, bob = people
    for each in people:
        for number in range(3):
            await each.ask(content=f"{each.name} {number}", thread_id="t")
            await each.ask(content=f"{each.name} {number}", thread_id=f"t{number}")
    for path in ("/chat/threads?limit=1", "/chat/threads/t/messages?limit=1"):
        cursor = (await bob.http.get(path)).json()["next"]
        shown = await ada.http.get(path, params={"limit": 50, "cursor": cursor})
        assert shown.status_code in (200, 404, 422)
        assert bob.name not in shown.text


IDS = st.sampled_from(["t1", "t2"])
MESSAGES = st.sampled_from(["m1", "m2", None])
COMMANDS = st.one_of(
    st.tuples(st.just("send"), IDS, MESSAGES, st.sampled_from(["hi", "script:echo"])),
    st.tuples(st.just("begin"), IDS),
    st.tuples(st.just("stop"), IDS),
    st.tuples(st.just("create"), IDS),
    st.tuples(st.just("rename"), IDS, st.sampled_from(["one", "two"])),
    st.tuples(st.just("delete"), IDS),
    st.tuples(st.just("rate"), IDS, st.sampled_from(["m1", "m2"])),
    st.tuples(st.just("branch"), IDS, st.sampled_from(["m1", "m2"])),
    st.tuples(st.just("search"), st.sampled_from(["hi", "one", "script"])),
    st.tuples(st.just("follow foreign"), st.sampled_from(["GET", "resume", "stop"])),
    st.tuples(st.just("regenerate"), IDS, st.sampled_from(["m1", "m2"])),
)
STEPS = st.lists(st.tuples(st.integers(0, 1), COMMANDS), min_size=6, max_size=12)
UUID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")
MOMENT = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d+Z")


class View:
    """What one user sees at one server, with ids named in the order of their appearance."""

    def __init__(self, person: Person) -> None:
        self.person = person
        self.runs: list[str] = []
        self._names: dict[str, str] = {}

    def plain(self, value: Any) -> Any:
        def name(found: re.Match[str]) -> str:
            return self._names.setdefault(found[0], f"#{len(self._names)}")

        text = MOMENT.sub("NOW", UUID.sub(name, json.dumps(value)))
        return json.loads(text)

    async def do(self, step: tuple[Any, ...], foreign: str) -> Any:
        http = self.person.http
        match step:
            case ("send", thread, message, content):
                command = {"content": content, "thread_id": thread, "id": message}
                response = await http.post("/chat/sse", json=command)
                return await self._stream(response, thread)
            case ("begin", thread):
                self.runs.append(await self.person.begin(thread))
                return None
            case ("stop", thread):
                return self._json(await http.post(f"/chat/threads/{thread}/stop"))
            case ("create", thread):
                return self._json(await http.post("/chat/threads", json={"id": thread}))
            case ("rename", thread, title):
                path = f"/chat/threads/{thread}"
                return self._json(await http.patch(path, json={"title": title}))
            case ("delete", thread):
                return self._json(await http.delete(f"/chat/threads/{thread}"))
            case ("rate", thread, message):
                path = f"/chat/threads/{thread}/messages/{message}/feedback"
                return self._json(await http.put(path, json={"score": 1}))
            case ("branch", thread, parent):
                command = {"content": "branch", "thread_id": thread, "parent_id": parent}
                response = await http.post("/chat/sse", json=command)
                return await self._stream(response, thread)
            case ("search", query):
                return self._json(await http.get("/chat/threads", params={"q": query}))
            case ("follow foreign", "GET"):
                return self._json(await http.get(f"/chat/sse?run_id={foreign}"))
            case ("follow foreign", kind):
                return self.plain(await self.person.say(type=kind, run_id=foreign))
            case ("regenerate", thread, message):
                again = {"type": "regenerate", "thread_id": thread, "message_id": message}
                await self.person.socket.send(again)
                first = await self.person.socket.receive()
                if first["type"] == "error":
                    return self.plain(first)
                events = [first, *await self.person.socket.until("end")]
                return await self._settled(events, thread)
        raise AssertionError(step)

    def _json(self, response: httpx.Response) -> Any:
        assert response.status_code < 500, response.text
        return response.status_code, self.plain(response.json() if response.content else None)

    async def _stream(self, response: httpx.Response, thread: str) -> Any:
        if response.status_code != 200:
            return self._json(response)
        return await self._settled(events_of(response.text), thread)

    async def _settled(self, events: list[dict[str, Any]], thread: str) -> Any:
        """A run's events without the way in which its text was cut, once it is over."""
        self.runs.append(events[0]["run_id"])
        deadline = time.monotonic() + SECONDS
        path = f"/chat/threads/{thread}"
        while (await self.person.http.get(path)).json()["active_run_id"] == self.runs[-1]:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.005)
        rest = [{**event, "seq": 0} for event in events if event["type"] != "content"]
        return self.plain([answer(events), *rest])

    async def everything(self) -> Any:
        """All that the user can read."""
        http = self.person.http
        listed = (await http.get("/chat/threads")).json()
        shown = [listed]
        for thread in ("t1", "t2"):
            for branch in ("all", "current"):
                path = f"/chat/threads/{thread}/messages?branch={branch}"
                shown.append((await http.get(path)).json())
        return self.plain(shown)

    async def leave(self) -> None:
        for thread in ("t1", "t2"):
            await self.person.http.post(f"/chat/threads/{thread}/stop")


@settings(
    max_examples=15,
    phases=[Phase.generate],
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
@given(steps=STEPS)
async def test_each_of_two_users_sees_a_server_of_their_own(
    servers: list[Server], auth: AuthServer, steps: list[tuple[int, tuple[Any, ...]]]
) -> None:
    shared, *private = servers
    names = [unique("left"), unique("right")]
    async with AsyncExitStack() as stack:
        here = [View(await person(stack, shared, auth, name)) for name in names]
        alone = [
            View(await person(stack, server, auth, name))
            for server, name in zip(private, names, strict=True)
        ]
        for who, step in steps:
            others = here[1 - who].runs
            foreign = others[-1] if others else "00000000-0000-7000-8000-000000000000"
            assert await here[who].do(step, foreign) == await alone[who].do(step, foreign)
        for who in (0, 1):
            assert await here[who].everything() == await alone[who].everything()
        for view in (*here, *alone):
            await view.leave()
