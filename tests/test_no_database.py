"""``--no-database``: memory for a socket, history from the client over SSE."""

from __future__ import annotations

from typing import Any

import pytest
from conftest import Serve, answer, client, connect, post

TEXT = "Hello, wörld 😀!"


async def test_a_socket_remembers_both_sides(serve: Serve) -> None:
    server = await serve("--no-database")
    async with connect(server) as socket:
        await socket.ask("one", thread_id="t")
        events = await socket.ask("script:echo", thread_id="t")
        assert answer(events) == f"user:one|assistant:{TEXT}|user:script:echo"
        other = await socket.ask("script:echo", thread_id="u")
        assert answer(other) == "user:script:echo"


async def test_sse_takes_history_and_the_new_message(serve: Serve) -> None:
    server = await serve("--no-database")
    call = {"id": "c1", "name": "add", "arguments": {"a": 1}}
    history: list[dict[str, Any]] = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "u", "thread_id": "t", "created_at": None},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "2", "tool_call_id": "c1", "name": "add"},
        {"role": "assistant", "content": "a"},
    ]
    events = await post(server, {"content": "script:echo", "history": history, "thread_id": "t"})
    assert answer(events) == "system:s|user:u|assistant:None|tool:2|assistant:a|user:script:echo"
    alone = await post(server, {"content": "script:echo", "history": []})
    assert answer(alone) == "user:script:echo"


async def test_history_is_for_sse_without_a_database_alone(serve: Serve) -> None:
    server = await serve("--no-database")
    async with connect(server) as socket:
        await socket.send({"content": "x", "history": []})
        assert (await socket.receive())["code"] == "unsupported_field"


async def test_the_json_calls_serve_what_is_in_memory(serve: Serve) -> None:
    server = await serve("--no-database")
    async with connect(server) as socket, client(server) as http:
        await socket.ask("one", thread_id="t")
        thread = (await http.get("/chat/threads/t")).json()
        assert (thread["title"], thread["message_count"]) == ("one", 2)
        messages = (await http.get("/chat/threads/t/messages")).json()["messages"]
        assert [m["content"] for m in messages] == ["one", TEXT]


async def test_memory_goes_when_the_socket_has_been_gone_for_a_while(serve: Serve) -> None:
    server = await serve("--no-database", resume_window=0.2)
    async with client(server) as http:
        async with connect(server) as socket, connect(server) as second:
            await socket.ask("one", thread_id="t")
            await second.ask("two", thread_id="u")
            await socket.connection.close()
            await gone(http, "t")
            assert (await http.get("/chat/threads/u")).status_code == 200
        await gone(http, "u")


async def gone(http: Any, thread: str) -> None:
    for _ in range(2000):
        if (await http.get(f"/chat/threads/{thread}")).status_code == 404:
            return
    pytest.fail(f"{thread} is still there")


async def test_a_run_can_be_resumed_within_the_window(serve: Serve, endpoint: Any) -> None:
    server = await serve("--no-database")
    async with connect(server) as socket:
        await socket.send({"content": "script:gated", "thread_id": "t"})
        seen = await socket.until("content")
    endpoint.gate("go").set()
    async with connect(server) as socket:
        run_id, last = seen[-1]["run_id"], seen[-1]["seq"]
        await socket.send({"type": "resume", "run_id": run_id, "last_seq": last})
        events = await socket.until("end")
    assert answer(seen) + answer(events) == "first second"
