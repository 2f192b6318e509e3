"""Turns in a thread: interrupt, reject, queue, stop from anywhere, safe retry."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from conftest import (
    Serve,
    Server,
    answer,
    client,
    connect,
    events_of,
    post,
    unique,
)
from endpoint import Endpoint


async def test_a_new_message_interrupts_the_running_one(server: Server) -> None:
    thread = unique()
    async with connect(server) as socket, client(server) as http:
        await socket.send({"content": "script:silent", "thread_id": thread})
        await socket.until("content")
        await socket.send({"content": "script:echo", "thread_id": thread})
        old = await socket.until("end")
        new = await socket.until("end")
        stored = (await http.get(f"/chat/threads/{thread}/messages")).json()["messages"]
    stops = [event["message"] for event in old if event["type"] == "generation_stopped"]
    assert stops == ["Generation stopped by a new message"]
    assert old[-1]["status"] == "stopped"
    assert new[0]["type"] == "start"
    assert new[-1]["status"] == "completed"
    assert [m["content"] for m in stored][:3] == ["script:silent", "partial ", "script:echo"]
    assert stored[1]["status"] == "stopped"


async def test_a_busy_thread_may_reject(serve: Serve, endpoint: Endpoint) -> None:
    server = await serve(on_busy="reject")
    async with connect(server) as socket, client(server) as http:
        await socket.send({"content": "script:gated", "thread_id": "t"})
        await socket.until("content")
        refused = await http.post("/chat/sse", json={"content": "x", "thread_id": "t"})
        assert refused.status_code == 409
        assert refused.json()["error"]["code"] == "thread_busy"
        assert refused.json()["error"]["retryable"] is True
        await socket.send({"content": "x", "thread_id": "t", "id": "m2"})
        busy = await socket.receive()
        assert (busy["code"], busy["reply_to"]) == ("thread_busy", "m2")
        endpoint.gate("go").set()
        assert (await socket.until("end"))[-1]["status"] == "completed"
        assert (await socket.ask("hi", thread_id="t"))[-1]["status"] == "completed"


async def test_messages_may_wait_in_a_queue(serve: Serve, endpoint: Endpoint) -> None:
    server = await serve(on_busy="queue", queue_limit=2)
    async with connect(server) as socket, connect(server) as other:
        await socket.send({"content": "script:gated", "thread_id": "t"})
        await socket.until("content")
        await socket.send({"content": "script:echo 1", "thread_id": "t", "id": "q1"})
        queued = await socket.receive()
        assert queued == {"type": "queued", "thread_id": "t", "position": 1, "reply_to": "q1"}
        await other.send({"content": "script:echo 2", "thread_id": "t", "id": "q2"})
        assert (await other.receive())["position"] == 2
        await other.send({"content": "x", "thread_id": "t", "id": "q3"})
        assert (await other.receive())["code"] == "thread_busy"
        await other.send({"content": "script:echo 2", "thread_id": "t", "id": "q2"})
        assert (await other.receive())["position"] == 2
        await other.send({"content": "different", "thread_id": "t", "id": "q2"})
        assert (await other.receive())["code"] == "id_conflict"
        endpoint.gate("go").set()
        first = await socket.until("end")
        second = await socket.until("end")
        third = await other.until("end")
    assert first[-1]["status"] == second[-1]["status"] == "completed"
    assert [second[0]["type"], second[0]["user_message_id"]] == ["start", "q1"]
    assert answer(second).endswith("user:script:echo 1")
    assert answer(third).endswith("user:script:echo 2")
    assert third[0]["parent_id"] == second[0]["message_id"]


async def test_a_queue_is_seen_over_sse_and_dropped_by_stop(
    serve: Serve, endpoint: Endpoint
) -> None:
    server = await serve(on_busy="queue")
    async with connect(server) as socket, client(server) as http:
        await socket.send({"content": "script:silent", "thread_id": "t"})
        await socket.until("content")
        waiting = asyncio.ensure_future(
            http.post("/chat/sse", json={"content": "x", "thread_id": "t", "id": "q"})
        )
        await socket.send({"content": "y", "thread_id": "t"})
        await socket.until("queued", position=1)
        while (await http.get("/chat/threads/t")).json()["message_count"] != 1:
            pass
        async with connect(server) as probe:
            await probe.send({"content": "probe", "thread_id": "t"})
            while (await probe.receive())["position"] < 3:
                await probe.send({"content": "probe", "thread_id": "t"})
            stopped = await http.post("/chat/threads/t/stop")
            assert stopped.json()["stopped"] is True
        body = events_of((await waiting).text)
        assert [event["type"] for event in body] == ["queued", "generation_stopped"]
        events = await socket.until("end")
        assert {"end", "generation_stopped"} <= {event["type"] for event in events}
        assert (await http.get("/chat/threads/t")).json()["message_count"] == 2
        assert len(endpoint.requests) == 1


async def test_stop_by_run_id_lets_the_next_one_start(serve: Serve) -> None:
    server = await serve(on_busy="queue")
    async with connect(server) as socket:
        await socket.send({"content": "script:silent", "thread_id": "t"})
        run_id = (await socket.until("content"))[-1]["run_id"]
        await socket.send({"content": "hi", "thread_id": "t"})
        await socket.until("queued")
        await socket.send({"type": "stop", "run_id": run_id})
        assert (await socket.until("end"))[-1]["status"] == "stopped"
        assert (await socket.until("end"))[-1]["status"] == "completed"


async def test_stop_from_another_socket_and_over_http(server: Server) -> None:
    one, two = unique(), unique()
    async with connect(server) as socket, connect(server, binary=True) as other:
        for thread in (one, two):
            await socket.send({"content": "script:silent", "thread_id": thread})
            await socket.until("content")
        await other.send({"type": "stop", "thread_id": one})
        seen = await other.receive()
        assert (seen["type"], seen["thread_id"]) == ("generation_stopped", one)
        assert seen["seq"] > 1
        ended = await socket.until("end")
        stops = [event for event in ended if event["type"] == "generation_stopped"]
        assert [event["seq"] for event in stops] == [seen["seq"]]
        async with client(server) as http:
            stopped = await http.post(f"/chat/threads/{two}/stop")
            run_id = (await socket.until("end"))[-1]["run_id"]
            assert stopped.json() == {"stopped": True, "run_id": run_id}
            assert (await http.post(f"/chat/threads/{two}/stop")).json() == {"stopped": False}
            missing = await http.post(f"/chat/threads/{unique()}/stop")
            assert missing.status_code == 404
        for command, code in (
            ({"type": "stop"}, "not_running"),
            ({"type": "stop", "thread_id": one}, "not_running"),
            ({"type": "stop", "run_id": run_id}, "not_running"),
            ({"type": "stop", "thread_id": unique()}, "not_found"),
            ({"type": "stop", "run_id": unique()}, "not_found"),
        ):
            await other.send(command)
            assert (await other.receive())["code"] == code


async def test_a_bare_stop_stops_all_that_the_socket_follows(server: Server) -> None:
    threads = [unique() for _ in range(3)]
    async with connect(server) as socket:
        for thread in threads:
            await socket.send({"content": "script:silent", "thread_id": thread})
            await socket.until("content", thread_id=thread)
        await socket.send({"type": "stop"})
        ended = set()
        while len(ended) < 3:
            event = (await socket.until("end"))[-1]
            assert event["status"] == "stopped"
            ended.add(event["thread_id"])
    assert ended == set(threads)


async def test_a_run_outlives_its_connection(server: Server, shared_endpoint: Endpoint) -> None:
    thread = unique()
    async with connect(server) as socket:
        await socket.send({"content": "script:gated", "thread_id": thread})
        await socket.until("content")
    shared_endpoint.gate("go").set()
    assert await text_of_last(server, thread) == "first second"


async def text_of_last(server: Server, thread: str) -> str:
    async with client(server) as http:
        while (await http.get(f"/chat/threads/{thread}")).json()["active_run_id"]:
            pass
        messages = (await http.get(f"/chat/threads/{thread}/messages")).json()["messages"]
    text: str = messages[-1]["content"]
    return text


async def test_a_run_may_stop_with_its_last_follower(serve: Serve, endpoint: Endpoint) -> None:
    server = await serve(on_disconnect="stop")
    async with connect(server) as watcher:
        async with connect(server) as socket:
            await socket.send({"content": "script:silent", "thread_id": "t"})
            run_id = (await socket.until("content"))[-1]["run_id"]
            await watcher.send({"type": "resume", "run_id": run_id})
            await watcher.until("content")
        await watcher.send({"type": "ping"})
        assert (await watcher.receive())["type"] == "pong"
        assert endpoint.open == 1
    assert await endpoint.closed.get() == "silent"
    async with client(server) as http:
        while (await http.get("/chat/threads/t")).json()["active_run_id"]:
            pass
        stored = (await http.get("/chat/threads/t/messages")).json()["messages"]
    assert (stored[-1]["status"], stored[-1]["content"]) == ("stopped", "partial ")


async def test_a_retry_attaches_to_the_running_run(
    server: Server, shared_endpoint: Endpoint
) -> None:
    thread, key = unique(), unique("message")
    command = {"content": "script:silent", "thread_id": thread, "id": key}
    before = len(shared_endpoint.requests)
    async with connect(server) as one, connect(server) as two:
        await one.send(command)
        first = await one.until("content")
        await two.send(command)
        second = await two.until("content")
        assert second == first
        await two.send({"type": "stop"})
        await two.until("end")
    assert len(shared_endpoint.requests) == before + 1


async def test_a_retry_after_the_end_replays_and_other_content_conflicts(server: Server) -> None:
    key = unique("message")
    first = await post(server, {"content": "hi", "id": key})
    again = await post(server, {"content": "hi", "id": key})
    header = await post(server, {"content": "hi"}, headers={"Idempotency-Key": key})
    assert again[0] == header[0] == first[0]
    assert answer(again) == answer(header) == answer(first)
    assert again[-1] == first[-1]
    thread = first[0]["thread_id"]
    async with client(server) as http:
        assert (await http.get(f"/chat/threads/{thread}")).json()["message_count"] == 2
        for change in ({"content": "ho"}, {"model": "x"}, {"provider": "scripted"}):
            conflict = await http.post(
                "/chat/sse", json={"content": "hi", "id": key, "thread_id": thread} | change
            )
            assert conflict.status_code == 409
            assert conflict.json()["error"]["code"] == "id_conflict"
        other = await http.post(
            "/chat/sse", json={"content": "x", "id": "a"}, headers={"Idempotency-Key": "b"}
        )
        assert other.status_code == 422


@pytest.mark.parametrize("database", ["sqlite", "postgres", "memory"])
async def test_racing_retries_make_one_message_and_one_run(
    serve: Serve, endpoint: Endpoint, postgres: Any, database: str
) -> None:
    options = {"database_url": postgres()} if database == "postgres" else {}
    server = await serve(*(["--no-database"] if database == "memory" else []), **options)
    command = {"content": "hi", "thread_id": "t", "id": "same"}
    runs = await asyncio.gather(*(post(server, command) for _ in range(12)))
    assert len({events[0]["run_id"] for events in runs}) == 1
    assert {answer(events) for events in runs} == {"Hello, wörld 😀!"}
    assert len(endpoint.requests) == 1
    async with client(server) as http:
        assert (await http.get("/chat/threads/t")).json()["message_count"] == 2


@pytest.mark.parametrize("memory", [False, True], ids=["database", "memory"])
async def test_after_the_retention_the_stored_answer_is_played(
    serve: Serve, endpoint: Endpoint, memory: bool
) -> None:
    server = await serve(*(["--no-database"] if memory else []), event_retention=0)
    command = {"content": "hi", "thread_id": "t", "id": "same"}
    first = await post(server, command)
    async with client(server) as http:
        while (await http.get(f"/chat/sse?run_id={first[0]['run_id']}")).status_code == 200:
            await asyncio.sleep(0.05)
    played = await post(server, command)
    assert [event["type"] for event in played] == ["start", "content", "message", "end"]
    assert [event["seq"] for event in played] == [1, 2, 3, 4]
    assert played[0] == first[0]
    assert answer(played) == answer(first)
    assert played[2]["message"] == first[-2]["message"]
    assert len(endpoint.requests) == 1
