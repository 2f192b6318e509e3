"""The wire protocol of a plain turn, to the letter, over WebSocket and SSE."""

from __future__ import annotations

import asyncio
import json
import re
import uuid
from typing import Any

import pytest
import websockets
from conftest import (
    SECONDS,
    Server,
    answer,
    client,
    connect,
    events_of,
    frames,
    post,
    unique,
)
from endpoint import Endpoint

UUID7 = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}")
TEXT = "Hello, wörld 😀!"


@pytest.mark.parametrize("binary", [False, True], ids=["json", "msgpack"])
async def test_a_turn_over_websocket(server: Server, binary: bool) -> None:
    thread = unique()
    async with connect(server, binary=binary) as socket:
        events = await socket.ask("hi", thread_id=thread, id="my-id", metadata={"a": [1, None]})
    start, *deltas, stored, end = events
    assert [event["type"] for event in events] == [
        "start",
        *["content"] * len(deltas),
        "message",
        "end",
    ]
    assert {event["thread_id"] for event in events} == {thread}
    assert len({event["run_id"] for event in events}) == 1
    assert UUID7.fullmatch(start["run_id"])
    numbers = [event["seq"] for event in events]
    assert numbers[0] == 1
    assert numbers == sorted(set(numbers))
    assert set(start) == {
        *("type", "thread_id", "run_id", "seq", "message_id", "user_message_id"),
        *("parent_id", "model", "provider"),
    }
    assert start["user_message_id"] == "my-id"
    assert start["parent_id"] is None
    assert (start["model"], start["provider"]) == ("m", "scripted")
    assert answer(events) == TEXT
    message = stored["message"]
    assert message["id"] == start["message_id"]
    assert message["parent_id"] == "my-id"
    assert (message["role"], message["content"]) == ("assistant", TEXT)
    assert message["status"] == "completed"
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d+Z", message["created_at"])
    usage = {"prompt_tokens": 11, "completion_tokens": 7, "total_tokens": 18, "estimated": False}
    assert {k: v for k, v in end.items() if k not in ("thread_id", "run_id", "seq")} == {
        "type": "end",
        "status": "completed",
        "finish_reason": "stop",
        "usage": usage,
    }


async def test_a_turn_over_sse(server: Server) -> None:
    thread = unique()
    async with client(server) as http:
        response = await http.post("/chat/sse", json={"content": "hi", "thread_id": thread})
    assert response.status_code == 200
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert response.headers["cache-control"] == "no-cache"
    assert response.headers["x-accel-buffering"] == "no"
    assert response.headers["x-thread-id"] == thread
    assert "content-encoding" not in response.headers
    found = frames(response.text)
    assert found[0] == {"comment": "open"}
    for frame in found[1:]:
        event = frame["data"]
        assert frame["id"] == f"{event['run_id']}:{event['seq']}"
        named = event["type"] in ("error", "end", "generation_stopped")
        assert frame.get("event") == (event["type"] if named else None)
    assert found[-1]["data"]["type"] == "end"
    assert answer(events_of(response.text)) == TEXT


async def test_the_stream_opens_before_the_provider_answers(
    server: Server, shared_endpoint: Endpoint
) -> None:
    async with (
        client(server) as http,
        http.stream("POST", "/chat/sse", json={"content": "script:mute"}) as response,
    ):
        body = response.aiter_text()
        text = await anext(body)
        while '"start"' not in text:
            text += await anext(body)
        assert text.startswith(": open\nid: ")
        thread = response.headers["x-thread-id"]
        await http.post(f"/chat/threads/{thread}/stop")


async def test_ids_are_made_where_none_are_given(server: Server) -> None:
    async with connect(server) as socket:
        start = (await socket.ask("hi"))[0]
    assert UUID7.fullmatch(start["thread_id"])
    assert uuid.UUID(start["user_message_id"]).version == 7
    assert uuid.UUID(start["message_id"]).version == 7


@pytest.mark.parametrize("thread", ["thread_123", "a/b c", "ü😀", "x" * 128, "%2F", "..", "a.b"])
async def test_thread_ids_of_clients_are_kept(server: Server, thread: str) -> None:
    mine = thread if len(thread) == 128 else unique(thread)
    assert (await post(server, {"content": "hi", "thread_id": mine}))[0]["thread_id"] == mine


async def test_fields_of_the_original_are_accepted_when_empty(server: Server) -> None:
    command = {
        "type": "message",
        "role": "user",
        "content": "hi",
        "thread_id": unique(),
        "model": "m",
        "provider": "scripted",
        "tools": None,
        "workflow_id": None,
        "graph": None,
        "agent_mode": False,
        "help_mode": False,
        "workflow_assistant": False,
        "collections": [],
        "input_files": [],
        "output_files": None,
        "created_at": "",
        "error_type": None,
        "metadata": None,
    }
    assert answer(await post(server, command)) == TEXT
    async with connect(server) as socket:
        await socket.send(command | {"agent_mode": True, "id": "x1"})
        refused = await socket.receive()
    assert refused["code"] == "unsupported_field"
    assert refused["reply_to"] == "x1"
    assert refused["message"].startswith("agent_mode")
    assert "seq" not in refused


async def test_ping_and_many_threads_over_one_socket(server: Server) -> None:
    one, two = unique(), unique()
    async with connect(server) as socket:
        await socket.send({"type": "ping"})
        assert await socket.receive() == {"type": "pong"}
        await socket.send({"content": "script:silent", "thread_id": one})
        await socket.until("content", thread_id=one)
        events = await socket.ask("hi", thread_id=two)
        assert {event["thread_id"] for event in events} == {two}
        await socket.send({"type": "stop", "thread_id": one})
        ended = await socket.until("end")
    assert ended[-1]["status"] == "stopped"


async def test_answers_come_in_the_encoding_of_the_question(server: Server) -> None:
    async with connect(server) as socket:
        await socket.send({"type": "ping"})
        await socket.receive()
        socket.binary = True
        assert answer(await socket.ask("hi")) == TEXT
        await socket.connection.send(b"\xc1")
        assert (await socket.receive())["code"] == "invalid_message"
        socket.binary = False
        assert answer(await socket.ask("hi")) == TEXT


async def test_options_are_passed_on(server: Server, shared_endpoint: Endpoint) -> None:
    options: dict[str, Any] = {
        "temperature": 0.5,
        "top_p": 1,
        "max_tokens": 5,
        "stop": ["x"],
        "seed": 7,
        "response_format": {"type": "json_object"},
        "reasoning_effort": "low",
    }
    await post(server, {"content": "hi", "model": "other", **options})
    sent = shared_endpoint.requests[-1]
    assert sent["model"] == "other"
    assert sent["stream"] is True
    assert sent["stream_options"] == {"include_usage": True}
    assert {name: sent[name] for name in options} == options
    assert shared_endpoint.headers[-1]["authorization"] == "Bearer sk-secret"
    assert sent["messages"] == [{"role": "user", "content": "hi"}]


async def test_parts_are_stored_and_passed_on(server: Server, shared_endpoint: Endpoint) -> None:
    parts = [
        {"type": "text", "text": "look"},
        {"type": "image_url", "image_url": {"url": "https://x.example/a.png", "detail": "low"}},
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}},
        {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}},
        {"type": "file", "file": {"file_data": "AAAA", "filename": "a.pdf"}},
    ]
    thread = unique()
    await post(server, {"content": parts, "thread_id": thread})
    assert shared_endpoint.requests[-1]["messages"] == [{"role": "user", "content": parts}]
    async with client(server) as http:
        stored = (await http.get(f"/chat/threads/{thread}/messages")).json()["messages"]
    assert stored[0]["content"] == parts


async def test_reasoning_has_events_and_a_field_of_its_own(server: Server) -> None:
    events = await post(server, {"content": "script:reasoning"})
    thought = [event["content"] for event in events if event["type"] == "reasoning"]
    assert "".join(thought) == "think hard"
    assert answer(events) == "answer"
    assert events[-2]["message"]["reasoning"] == "think hard"


async def test_the_second_turn_knows_the_first(server: Server) -> None:
    thread = unique()
    async with connect(server) as socket:
        first = await socket.ask("one", thread_id=thread)
        events = await socket.ask("script:echo", thread_id=thread)
        assert answer(events) == f"user:one|assistant:{TEXT}|user:script:echo"
        assert events[0]["parent_id"] == first[0]["message_id"]
    again = await post(server, {"content": "script:echo again", "thread_id": thread})
    assert answer(again).count("|") == 6


async def test_the_newest_messages_are_sent_up(serve: Any) -> None:
    server = await serve(history_messages=3, system_prompt="Be brief.")
    async with connect(server) as socket:
        await socket.ask("one", thread_id="t")
        await socket.ask("two", thread_id="t")
        events = await socket.ask("script:echo", thread_id="t")
    assert answer(events) == f"system:Be brief.|user:two|assistant:{TEXT}|user:script:echo"


async def test_characters_of_history_are_bounded(serve: Any) -> None:
    server = await serve(history_chars=30)
    async with connect(server) as socket:
        await socket.ask("x" * 100, thread_id="t")
        events = await socket.ask("script:echo", thread_id="t")
    assert answer(events) == f"assistant:{TEXT}|user:script:echo"


async def test_health_says_the_protocol(server: Server) -> None:
    async with client(server) as http:
        assert (await http.get("/health")).json() == {"status": "healthy", "protocol": "both"}


@pytest.mark.parametrize("protocol", ["websocket", "sse"])
async def test_one_protocol_is_served_alone(serve: Any, protocol: str) -> None:
    server = await serve("--protocol", protocol, protocol="both")
    async with client(server) as http:
        assert (await http.get("/health")).json()["protocol"] == protocol
        posted = await http.post("/chat/sse", json={"content": "hi"})
        assert posted.status_code == (200 if protocol == "sse" else 404)
        assert (await http.get("/chat/models")).status_code == 200
    if protocol == "websocket":
        async with connect(server) as socket:
            assert answer(await socket.ask("hi")) == TEXT
    else:
        assert posted.headers["content-type"].startswith("text/event-stream")
        with pytest.raises(websockets.InvalidStatus):
            async with connect(server):
                pass


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (b"{", 400, "invalid_message"),
        (b"", 400, "invalid_message"),
        (b"[]", 422, "invalid_message"),
        (b"null", 422, "invalid_message"),
        (b"{}", 422, "invalid_message"),
        (b'{"content": ""}', 422, "invalid_message"),
        (b'{"content": "x", "surprise": 1}', 422, "invalid_message"),
        (b'{"content": "x", "tools": ["nope"]}', 422, "unknown_tool"),
        (b'{"content": "x", "provider": "nope"}', 422, "unknown_provider"),
        (b'{"content": "x", "provider": "anthropic"}', 422, "provider_not_configured"),
        (b'{"content": "x", "graph": {"a": 1}}', 422, "unsupported_field"),
        (b'{"content": "x", "history": []}', 422, "unsupported_field"),
        (b'{"content": "x", "parent_id": "nope"}', 404, "not_found"),
        (b'{"type": "stop"}', 422, "invalid_message"),
        (b'{"content": "' + b"x" * 1024 * 1024 + b'"}', 413, "too_large"),
    ],
)
async def test_what_can_be_refused_is_refused_with_a_status(
    server: Server, shared_endpoint: Endpoint, body: bytes, status: int, code: str
) -> None:
    before = len(shared_endpoint.requests)
    async with client(server) as http:
        response = await http.post("/chat/sse", content=body)
    assert response.status_code == status
    error = response.json()["error"]
    assert (error["code"], error["retryable"]) == (code, False)
    assert set(error) == {"code", "message", "retryable"}
    assert len(shared_endpoint.requests) == before


async def test_a_reply_id_is_named_and_unknown_fields_are_listed(server: Server) -> None:
    async with connect(server) as socket:
        await socket.send({"content": "x", "surprise": 1, "id": "abc"})
        refused = await socket.receive()
    assert refused["reply_to"] == "abc"
    assert "surprise" in refused["message"]
    assert "content" in refused["message"]


async def test_a_lone_client_of_http_1_0_and_garbage_do_no_harm(server: Server) -> None:
    for data in (b"GET /health HTTP/1.0\r\n\r\n", b"\x00\x01\x02\r\n\r\n", b"GET\r\n\r\n"):
        reader, writer = await asyncio.open_connection(server.host, server.port)
        writer.write(data)
        await asyncio.wait_for(reader.read(), SECONDS)
        writer.close()
    async with client(server) as http:
        assert (await http.get("/health")).status_code == 200
        missing = await http.get("/nothing")
        assert missing.status_code == 404
        assert missing.json()["error"]["code"] == "not_found"
        wrong = await http.put("/chat/models")
        assert wrong.status_code == 405
        assert json.loads(wrong.text)["error"]["code"] == "invalid_message"
