"""An answer is never lost: cut anywhere, resume, and the whole is there, once."""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import sqlite3
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from conftest import (
    SECONDS,
    Serve,
    Server,
    answer,
    client,
    connect,
    events_of,
    frames,
    post,
    unique,
)
from endpoint import DONE, Endpoint, Exchange, chunk, text
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

COUNT = 60
WHOLE = "".join(f"{number} " for number in range(COUNT))
QUESTION = f"script:numbers {COUNT}"


async def resumed(server: Server, run_id: str, after: int, transport: str) -> list[dict[str, Any]]:
    """The events after a number, over one of the transports."""
    if transport == "sse":
        async with client(server) as http:
            response = await http.get(
                "/chat/sse",
                headers={"Last-Event-ID": f"{run_id}:{after}"} if after else None,
                params={"run_id": run_id},
            )
            return events_of(response.text) if response.status_code == 200 else []
    async with connect(server, binary=transport == "msgpack") as socket:
        await socket.send({"type": "resume", "run_id": run_id, "last_seq": after})
        first = await socket.receive()
        if first["type"] == "error" and first["code"] == "nothing_to_resume":
            return []
        return [first] if first["type"] == "end" else [first, *await socket.until("end")]


def check(events: list[dict[str, Any]], after: int, all_events: list[dict[str, Any]]) -> None:
    """Joined with what was seen before, the events are the whole answer: no loss, no repeat."""
    before = [event for event in all_events if event["seq"] <= after]
    assert [event["seq"] for event in events] == sorted({event["seq"] for event in events})
    assert all(event["seq"] > after for event in events)
    assert answer(before) + answer(events) == WHOLE
    assert [e for e in before + events if e["type"] != "content"] == [
        e for e in all_events if e["type"] != "content"
    ]


async def one_by_one(server: Server, endpoint: Endpoint, thread: str) -> list[dict[str, Any]]:
    """An answer of which every delta was seen by itself."""

    async def script(exchange: Exchange) -> None:
        for number in range(COUNT):
            await exchange.send(text(f"{number} "))
            await steps[number].wait()
        await exchange.send(chunk({}, "stop") + DONE)

    steps = [asyncio.Event() for _ in range(COUNT)]
    endpoint.scripts["steps"] = script
    events: list[dict[str, Any]] = []
    async with connect(server) as socket:
        await socket.send({"content": "script:steps", "thread_id": thread})
        for step in steps:
            events += await socket.until("content")
            step.set()
        events += await socket.until("end")
    assert len([event for event in events if event["type"] == "content"]) == COUNT
    return events


@pytest.mark.parametrize("transport", ["json", "msgpack", "sse"])
async def test_every_prefix_can_be_resumed_in_the_same_process(
    server: Server, shared_endpoint: Endpoint, transport: str
) -> None:
    events = await one_by_one(server, shared_endpoint, unique())
    run_id, last = events[0]["run_id"], events[-1]["seq"]
    for after in range(0, last, 3 if transport != "json" else 1):
        check(await resumed(server, run_id, after, transport), after, events)
    assert await resumed(server, run_id, last, transport) == []


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
async def test_every_prefix_can_be_resumed_after_a_restart(
    serve: Serve, endpoint: Endpoint, how: signal.Signals
) -> None:
    server = await serve()
    events = await one_by_one(server, endpoint, "t")
    async with client(server) as http:  # the end is durable when the thread is free
        assert (await http.get("/chat/threads/t")).json()["active_run_id"] is None
    await flushed(server)
    await server.stop(how)
    server = await serve()
    run_id = events[0]["run_id"]
    for transport in ("json", "msgpack", "sse"):
        for after in range(0, events[-1]["seq"], 7):
            check(await resumed(server, run_id, after, transport), after, events)


async def flushed(server: Server) -> None:
    """A turn that ended after another one has the other's events written before its own message."""
    await post(server, {"content": "hi"})
    await post(server, {"content": "hi"})


async def test_an_answer_is_followed_while_it_is_made(
    server: Server, shared_endpoint: Endpoint
) -> None:
    thread = unique()
    shared_endpoint.gates.pop("go", None)
    async with connect(server) as socket:
        await socket.send({"content": "script:gated", "thread_id": thread})
        seen = await socket.until("content")
        async with (
            client(server) as http,
            connect(server, binary=True) as other,
            http.stream("GET", "/chat/sse", params={"thread_id": thread}) as stream,
        ):
            active = (await http.get(f"/chat/threads/{thread}")).json()["active_run_id"]
            assert active == seen[0]["run_id"]
            assert stream.headers["x-thread-id"] == thread
            await other.send({"type": "resume", "thread_id": thread, "last_seq": 1})
            assert (await other.receive())["content"] == "first "
            shared_endpoint.gate("go").set()
            body = "".join([part async for part in stream.aiter_text()])
            assert events_of(body)[0] == seen[0]
            assert answer(events_of(body)) == "first second"
            assert answer(await other.until("end")) == "second"
            ended = await http.get("/chat/sse", params={"thread_id": thread})
            assert (ended.status_code, ended.content) == (204, b"")
    run = seen[0]["run_id"]
    async with client(server) as http:
        last = frames(body)[-1]["id"]
        for query, status in (
            ({"last_event_id": last}, 204),
            ({"run_id": run}, 200),
            ({"run_id": "nope"}, 404),
            ({"thread_id": "nope"}, 404),
            ({"last_event_id": "nope:1"}, 404),
            ({"last_event_id": "nonsense"}, 422),
            ({}, 422),
        ):
            assert (await http.get("/chat/sse", params=query)).status_code == status


async def test_resuming_on_a_socket_that_follows_starts_over(server: Server) -> None:
    async with connect(server) as socket:
        await socket.send({"content": "script:silent"})
        first = await socket.until("content")
        await socket.send({"type": "resume", "run_id": first[0]["run_id"]})
        assert await socket.until("content") == first
        for last_seq in (3, 99):
            await socket.send(
                {"type": "resume", "run_id": first[0]["run_id"], "last_seq": last_seq}
            )
            assert (await socket.receive())["code"] == "nothing_to_resume"
        await socket.send({"type": "stop"})
        ends = [event for event in await socket.until("end") if event["type"] == "end"]
        assert len(ends) == 1
        await socket.send({"type": "ping"})
        assert (await socket.receive())["type"] == "pong"


async def test_a_long_answer_is_replayed_in_a_handful_of_frames(server: Server) -> None:
    events = await post(server, {"content": "script:numbers 4000"})
    replay = await resumed(server, events[0]["run_id"], 0, "json")
    assert len(replay) <= 20
    assert answer(replay) == answer(events)


async def test_a_killed_process_loses_the_last_moment_at_most(
    serve: Serve, endpoint: Endpoint
) -> None:
    server = await serve()
    endpoint.gates.pop("go", None)
    async with connect(server) as socket:
        await socket.send({"content": "script:gated", "thread_id": "t"})
        seen = await socket.until("content")
    run_id = seen[0]["run_id"]
    await durable(Path(server_file(server, serve)), run_id, seen[-1]["seq"])
    await server.kill()
    server = await serve()
    async with client(server) as http:
        thread = (await http.get("/chat/threads/t")).json()
        assert thread["active_run_id"] is None
        stored = (await http.get("/chat/threads/t/messages")).json()["messages"]
    assert (stored[-1]["content"], stored[-1]["status"]) == ("first ", "interrupted")
    assert stored[-1]["id"] == seen[0]["message_id"]
    for transport in ("json", "msgpack", "sse"):
        rest = await resumed(server, run_id, seen[-1]["seq"], transport)
        assert [event["type"] for event in rest] == ["error", "message", "end"]
        assert rest[0]["code"] == "interrupted"
        assert rest[0]["retryable"] is True
        assert rest[-1]["status"] == "interrupted"
        assert rest[0]["seq"] > seen[-1]["seq"] + 1000
        whole = await resumed(server, run_id, 0, transport)
        assert answer(whole) == "first "
    assert (await post(server, {"content": "hi", "thread_id": "t"}))[-1]["status"] == "completed"


def server_file(server: Server, serve: Serve) -> str:
    return os.path.join(psutil.Process(server.process.pid).cwd(), "quart_chat.sqlite3")


async def durable(path: Path, run_id: str, seq: int) -> None:
    """Wait until the log has an event on disk, which takes a quarter of a second at most."""
    loop = asyncio.get_running_loop()
    until = loop.time() + SECONDS
    while loop.time() < until:
        with sqlite3.connect(f"file:{path}?mode=ro", uri=True) as database:
            found = database.execute(
                "SELECT max(last_seq) FROM chat_events WHERE run_id = ?", (run_id,)
            ).fetchone()
        database.close()
        if (found[0] or 0) >= seq:
            return
        await asyncio.sleep(0.02)
    pytest.fail("the event was not written")


async def test_the_question_is_durable_before_the_provider_is_asked(
    serve: Serve, endpoint: Endpoint
) -> None:
    server = await serve()
    asked = asyncio.Event()

    async def script(exchange: Exchange) -> None:
        asked.set()
        await asyncio.Event().wait()

    endpoint.scripts["asked"] = script
    async with connect(server) as socket:
        await socket.send({"content": "script:asked", "thread_id": "t", "id": "q"})
        await asyncio.wait_for(asked.wait(), SECONDS)
        await server.kill()
    server = await serve()
    endpoint.scripts["asked"] = endpoint.scripts.get("nothing", _short)
    async with client(server) as http:
        stored = (await http.get("/chat/threads/t/messages")).json()["messages"]
        assert stored[0]["id"] == "q"
    again = await post(server, {"content": "script:asked", "thread_id": "t", "id": "q"})
    assert again[-1]["status"] == "interrupted"


async def _short(exchange: Exchange) -> None:
    await exchange.send(text("short") + chunk({}, "stop") + DONE)


async def test_a_hundred_runs_at_sigterm_are_completed_or_stored(
    serve: Serve, endpoint: Endpoint
) -> None:
    server = await serve(drain_timeout=1)
    endpoint.gates.pop("go", None)
    async with connect(server) as socket:
        for number in range(100):
            script = "gated" if number % 2 else "silent"
            await socket.send({"content": f"script:{script}", "thread_id": f"t{number}"})
        waiting = {f"t{number}" for number in range(100)}
        while waiting:
            event = (await socket.until("content"))[-1]
            waiting.discard(event["thread_id"])
        server.process.send_signal(signal.SIGTERM)
        while True:
            await socket.send({"content": "late", "thread_id": "late", "id": "late"})
            reply = await socket.receive()
            if reply["type"] == "error":
                break
        assert (reply["code"], reply["reply_to"]) == ("server_draining", "late")
        endpoint.gate("go").set()
        ended: dict[str, str] = {}
        while len(ended) < 100:
            event = (await socket.until("end"))[-1]
            ended[event["thread_id"]] = event["status"]
        await socket.connection.wait_closed()
        assert socket.connection.close_code == 1001
    assert await server.stop(0) == 0
    statuses = [ended[f"t{number}"] for number in range(100)]
    assert statuses == ["interrupted", "completed"] * 50
    server = await serve()
    async with client(server) as http:
        for number in range(0, 100, 9):
            stored = (await http.get(f"/chat/threads/t{number}/messages")).json()["messages"]
            kept = ("first second", "completed") if number % 2 else ("partial ", "interrupted")
            assert (stored[-1]["content"], stored[-1]["status"]) == kept


async def test_streams_are_broken_off_without_a_clean_end(serve: Serve) -> None:
    server = await serve(drain_timeout=0)
    rest, clean = "", True
    async with (
        client(server) as http,
        http.stream("POST", "/chat/sse", json={"content": "script:mute"}) as stream,
    ):
        body = stream.aiter_text()
        async for part in body:
            if '"start"' in part:
                break
        server.process.send_signal(signal.SIGTERM)
        try:
            async for part in body:
                rest += part
        except httpx.RemoteProtocolError:
            clean = False
    assert '"interrupted"' in rest or not clean
    assert await server.stop(0) == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_a_second_signal_ends_at_once(serve: Serve, number: signal.Signals) -> None:
    server = await serve(drain_timeout=60)
    async with connect(server) as socket:
        await socket.send({"content": "script:silent"})
        await socket.until("content")
        server.process.send_signal(number)
        while True:
            await socket.send({"content": "late"})
            if (await socket.until("error"))[-1]["code"] == "server_draining":
                break
        server.process.send_signal(number)
        assert (await socket.until("end"))[-1]["status"] == "interrupted"
    assert await server.stop(0) == 0


async def test_a_follower_that_never_reads_hurts_nobody(serve: Serve, endpoint: Endpoint) -> None:
    block = text("x" * 16_000)
    begin = asyncio.Event()

    async def flood(exchange: Exchange) -> None:
        await begin.wait()
        for _ in range(50_000_000 // 16_000):
            await exchange.send(block)
        await asyncio.Event().wait()

    endpoint.scripts["flood"] = flood
    server = await serve(max_answer_chars=60_000_000)
    process = psutil.Process(server.process.pid)
    async with connect(server) as reader, connect(server, max_queue=1) as lazy:
        await reader.ask("hi")
        await reader.send({"content": "script:flood", "thread_id": "t"})
        await reader.until("start")
        await lazy.send({"type": "resume", "thread_id": "t"})
        await lazy.until("start")
        before = process.memory_info().rss
        begin.set()
        got = largest = 0
        while got < 50_000_000 // 16_000 * 16_000:
            got += len((await reader.receive())["content"])
            largest = max(largest, process.memory_info().rss - before)
        assert largest < 10_000_000
        await reader.send({"type": "stop", "thread_id": "t"})
        await reader.until("generation_stopped")
        await lazy.connection.close()


async def test_connect_send_vanish_leaves_nothing_behind(serve: Serve) -> None:
    server = await serve()
    process = psutil.Process(server.process.pid)

    async def vanish(number: int) -> None:
        reader, writer = await asyncio.open_connection(server.host, server.port)
        if number % 2:
            body = b'{"content":"hi"}'
            writer.write(
                b"POST /chat/sse HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body)
                + body
            )
        else:
            writer.write(
                b"GET /chat HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
            )
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"\x81\x90\x00\x00\x00\x00" + b'{"content":"hi"}')
        await writer.drain()
        writer.transport.abort()

    async def settled() -> int:
        async with client(server) as http:
            while any(
                thread["active_run_id"]
                for thread in (await http.get("/chat/threads?limit=200")).json()["threads"]
            ):
                pass
        return process.num_fds()

    for _ in range(4):
        await asyncio.gather(*(vanish(number) for number in range(25)))
    files = await settled()
    for _ in range(20):
        await asyncio.gather(*(vanish(number) for number in range(25)))
    loop = asyncio.get_running_loop()
    until = loop.time() + SECONDS
    while await settled() > files + 5:
        assert loop.time() < until, "open files grow"


async def test_keep_alives_come_in_silence_alone(serve: Serve, endpoint: Endpoint) -> None:
    server = await serve(keepalive=0.1)
    endpoint.gates.pop("go", None)
    async with (
        client(server) as http,
        http.stream("POST", "/chat/sse", json={"content": "script:gated"}) as stream,
    ):
        body = ""
        async for part in stream.aiter_text():
            body += part
            if body.count(": keep-alive\n") >= 3:
                endpoint.gate("go").set()
    events = events_of(body)
    assert answer(events) == "first second"
    assert events[-1]["type"] == "end"
    assert body.endswith("\n\n")
    assert body.index(": open") == 0


async def test_the_client_gets_its_stream_while_the_database_is_away(
    serve: Serve, endpoint: Endpoint, postgres: Any
) -> None:
    import asyncpg

    url = postgres()
    server = await serve(database_url=url, storage_retry=0.5)
    endpoint.gates.pop("go", None)
    async with connect(server) as socket:
        await socket.send({"content": "script:gated", "thread_id": "t"})
        await socket.until("content")
        admin = await asyncpg.connect(url)
        await admin.execute("ALTER TABLE chat_messages RENAME TO hidden_messages")
        await admin.execute("ALTER TABLE chat_events RENAME TO hidden_events")
        endpoint.gate("go").set()
        events = await socket.until("end")
        assert answer(events) == "second"
        errors = [event["code"] for event in events if event["type"] == "error"]
        assert errors == ["storage_unavailable"]
        assert events[-1]["status"] == "failed"
        await socket.send({"content": "hi", "thread_id": "u", "id": "r"})
        refused = await socket.receive()
        assert (refused["code"], refused["retryable"]) == ("storage_unavailable", True)
        assert len(endpoint.requests) == 1
        await admin.execute("ALTER TABLE hidden_messages RENAME TO chat_messages")
        await admin.execute("ALTER TABLE hidden_events RENAME TO chat_events")
        await admin.close()
        assert (await socket.ask("hi", thread_id="u"))[-1]["status"] == "completed"


async def test_storing_is_tried_again_until_the_database_is_back(
    serve: Serve, endpoint: Endpoint, postgres: Any
) -> None:
    import asyncpg

    url = postgres()
    server = await serve(database_url=url, storage_retry=SECONDS)
    endpoint.gates.pop("go", None)
    async with connect(server) as socket:
        await socket.send({"content": "script:gated", "thread_id": "t"})
        await socket.until("content")
        admin = await asyncpg.connect(url)
        await admin.execute("ALTER TABLE chat_messages RENAME TO hidden_messages")
        endpoint.gate("go").set()
        await socket.until("content")
        while not any("chat_messages" in line for line in server.stderr):
            await asyncio.sleep(0.02)
        await admin.execute("ALTER TABLE hidden_messages RENAME TO chat_messages")
        await admin.close()
        events = await socket.until("end")
    assert [event["type"] for event in events] == ["message", "end"]
    assert events[0]["message"]["content"] == "first second"


@given(cuts=st.lists(st.tuples(st.integers(1, 8), st.booleans()), min_size=1, max_size=30))
@settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_cutting_again_and_again_loses_nothing(
    server: Server, runner: Any, cuts: list[tuple[int, bool]]
) -> None:
    runner.run_until_complete(cut_again_and_again(server, cuts))


async def cut_again_and_again(server: Server, cuts: list[tuple[int, bool]]) -> None:
    async with connect(server) as socket:
        await socket.send({"content": QUESTION, "thread_id": unique()})
        start = (await socket.until("start"))[-1]
    after, whole, ended = start["seq"], "", False
    for count, binary in itertools.cycle(cuts):
        async with connect(server, binary=binary) as socket:
            await socket.send({"type": "resume", "run_id": start["run_id"], "last_seq": after})
            for _ in range(count):
                event = await socket.receive()
                assert event["seq"] > after
                after = event["seq"]
                whole += event["content"] if event["type"] == "content" else ""
                ended = event["type"] == "end"
                if ended:
                    assert whole == WHOLE
                    return
