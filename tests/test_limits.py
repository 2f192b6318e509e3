"""What one client may cost: messages, answers, connections, bytes, depth, tokens, models."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, aclosing
from pathlib import Path
from typing import Any

import httpx
import msgpack
import psutil
import pytest
from auth_server import AuthServer, auth_server, bearer, close_of, closed, remote_server
from conftest import SECONDS, Server, answer, client, connect, events_of, post, providers, unique
from endpoint import Endpoint

BOUND = 1024 * 1024
RETRYABLE = {"rate_limited", "too_many_runs"}


@pytest.fixture(scope="module")
async def auth() -> AsyncIterator[AuthServer]:
    async with auth_server() as found:
        yield found


@pytest.fixture(scope="module")
async def limited(
    auth: AuthServer, shared_endpoint: Endpoint, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Server]:
    """A server with small bounds; every test takes a user of its own."""
    settings: dict[str, Any] = {
        "rate_limit": "4/hour",
        "max_runs_per_user": 2,
        "max_connections_per_user": 3,
    }
    cwd = tmp_path_factory.mktemp("limited")
    async with remote_server(auth, shared_endpoint, cwd, **settings) as found:
        yield found


def refused(response: httpx.Response, status: int, code: str) -> dict[str, Any]:
    assert response.status_code == status, response.text
    error: dict[str, Any] = response.json()["error"]
    assert (error["code"], error["retryable"]) == (code, code in RETRYABLE)
    return error


async def send(server: Server, token: str, **command: Any) -> httpx.Response:
    async with client(server, headers=bearer(token)) as http:
        return await http.post("/chat/sse", json={"content": "hi", **command})


async def running(server: Server, token: str, stack: AsyncExitStack) -> str:
    """Begin an answer that does not end by itself, and give its thread."""
    thread = unique()
    socket = await stack.enter_async_context(connect(server, additional_headers=bearer(token)))
    await socket.send({"content": "script:silent", "thread_id": thread})
    await socket.until("content")
    return thread


async def test_messages_are_counted_over_both_transports(
    limited: Server, auth: AuthServer, shared_endpoint: Endpoint
) -> None:
    token = auth.token(unique("user"))
    async with connect(limited, additional_headers=bearer(token)) as socket:
        for _ in range(2):
            assert (await send(limited, token)).status_code == 200
            assert (await socket.ask("hi"))[-1]["status"] == "completed"
        before = len(shared_endpoint.requests)
        late = await send(limited, token)
        refused(late, 429, "rate_limited")
        assert 800 <= int(late.headers["retry-after"]) <= 900
        await socket.send({"content": "hi", "id": "m1"})
        error = await socket.receive()
        assert (error["type"], error["code"], error["retryable"]) == ("error", "rate_limited", True)
        assert error["reply_to"] == "m1"
        assert 800 <= error["retry_after"] <= 900
        await socket.send({"type": "regenerate", "thread_id": "t"})
        assert (await socket.receive())["code"] == "rate_limited"
        await socket.send({"type": "ping"})
        assert await socket.receive() == {"type": "pong"}
    assert len(shared_endpoint.requests) == before
    async with client(limited, headers=bearer(token)) as http:
        assert (await http.get("/chat/threads")).status_code == 200
    assert (await send(limited, auth.token(unique("user")))).status_code == 200


async def test_the_rate_is_refilled_evenly(serve: Any) -> None:
    server = await serve(rate_limit="2/second")
    async with client(server) as http:
        statuses = [
            (await http.post("/chat/sse", json={"content": "hi"})).status_code for _ in range(12)
        ]
        assert 429 in statuses
        deadline = time.monotonic() + SECONDS
        while (await http.post("/chat/sse", json={"content": "hi"})).status_code != 200:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.05)


async def test_what_is_no_message_is_not_counted(limited: Server, auth: AuthServer) -> None:
    token = auth.token(unique("user"))
    async with client(limited, headers=bearer(token)) as http:
        for _ in range(6):
            refused(await http.post("/chat/sse", content=b"{"), 400, "invalid_message")
    async with connect(limited, additional_headers=bearer(token)) as socket:
        for _ in range(6):
            await socket.connection.send("{")
            assert (await socket.receive())["code"] == "invalid_message"
    assert (await send(limited, token)).status_code == 200


async def test_answers_at_once_are_bounded(
    limited: Server, auth: AuthServer, shared_endpoint: Endpoint
) -> None:
    user = unique("user")
    token = auth.token(user)
    async with AsyncExitStack() as stack:
        threads = [await running(limited, token, stack) for _ in range(2)]
        before = len(shared_endpoint.requests)
        late = await send(limited, token, thread_id="one-too-many")
        refused(late, 429, "too_many_runs")
        assert int(late.headers["retry-after"]) >= 1
        async with connect(limited, additional_headers=bearer(token)) as socket:
            await socket.send({"content": "hi", "id": "m", "thread_id": "one-too-many"})
            error = await socket.receive()
            assert (error["code"], error["reply_to"]) == ("too_many_runs", "m")
            assert error["retry_after"] > 0
        assert len(shared_endpoint.requests) == before
        async with client(limited, headers=bearer(token)) as http:
            assert (await http.get("/chat/threads/one-too-many")).status_code == 404
            for thread in threads:
                assert (await http.post(f"/chat/threads/{thread}/stop")).json()["stopped"]
    async with connect(limited, additional_headers=bearer(auth.token(unique("user")))) as socket:
        assert (await socket.ask("hi"))[-1]["status"] == "completed"


async def test_an_answer_makes_room_for_the_next_one_in_its_thread(
    limited: Server, auth: AuthServer
) -> None:
    token = auth.token(unique("user"))
    async with AsyncExitStack() as stack:
        threads = [await running(limited, token, stack) for _ in range(2)]
        answered = await send(limited, token, thread_id=threads[0])
        assert events_of(answered.text)[-1]["status"] == "completed"
        async with client(limited, headers=bearer(token)) as http:
            await http.post(f"/chat/threads/{threads[1]}/stop")


async def test_connections_of_a_user_are_bounded(
    limited: Server, auth: AuthServer, shared_endpoint: Endpoint
) -> None:
    token = auth.token(unique("user"))
    async with AsyncExitStack() as stack:
        await running(limited, token, stack)
        for _ in range(2):
            await stack.enter_async_context(connect(limited, additional_headers=bearer(token)))
        late = await closed(limited, additional_headers=bearer(token))
        assert late == (1013, "Too many connections")
        before = len(shared_endpoint.requests)
        response = await send(limited, token, thread_id="refused")
        assert response.status_code == 429
        assert response.json()["error"]["retryable"] is True
        assert int(response.headers["retry-after"]) >= 1
        async with client(limited, headers=bearer(token)) as http:
            assert (await http.get("/chat/threads/refused")).status_code == 404
        assert len(shared_endpoint.requests) == before
        other = bearer(auth.token(unique("user")))
        async with connect(limited, additional_headers=other) as socket:
            assert (await socket.ask("hi"))[-1]["status"] == "completed"
    deadline = time.monotonic() + SECONDS
    while (await send(limited, token)).status_code != 200:
        assert time.monotonic() < deadline
        await asyncio.sleep(0.05)


async def test_streams_count_as_connections(limited: Server, auth: AuthServer) -> None:
    token = auth.token(unique("user"))
    async with AsyncExitStack() as stack:
        thread = await running(limited, token, stack)
        http = await stack.enter_async_context(client(limited, headers=bearer(token)))
        path = f"/chat/sse?thread_id={thread}"
        for _ in range(2):
            stream = await stack.enter_async_context(http.stream("GET", path))
            assert stream.status_code == 200
            await stack.enter_async_context(aclosing(body := stream.aiter_text()))
            assert (await anext(body)).startswith(": open")
        assert (await http.get(path)).status_code == 429
        assert (await closed(limited, additional_headers=bearer(token)))[0] == 1013
        await http.post(f"/chat/threads/{thread}/stop")


async def test_connections_of_all_are_bounded(serve: Any) -> None:
    server = await serve(max_connections=3)
    async with AsyncExitStack() as stack:
        sockets = [await stack.enter_async_context(connect(server)) for _ in range(3)]
        assert await closed(server) == (1013, "Too many connections")
        async with client(server) as http:
            assert (await http.post("/chat/sse", json={"content": "x"})).status_code == 429
            assert (await http.get("/health")).status_code == 200
        assert (await sockets[0].ask("hi"))[-1]["status"] == "completed"


async def test_connections_begun_at_once_are_counted_too(limited: Server, auth: AuthServer) -> None:
    token = auth.token(unique("user"))
    async with AsyncExitStack() as stack:
        thread = await running(limited, token, stack)
        http = await stack.enter_async_context(client(limited, headers=bearer(token)))
        request = http.build_request("GET", "/chat/sse", params={"thread_id": thread})
        answers = await asyncio.gather(*(http.send(request, stream=True) for _ in range(12)))
        assert sum(each.status_code == 200 for each in answers) == 2
        for each in answers:
            await each.aclose()
        await http.post(f"/chat/threads/{thread}/stop")


def sized(size: int, encoding: str) -> str | bytes:
    """A command of so many bytes in its encoding."""
    if encoding == "msgpack":
        frame = msgpack.packb({"content": "x" * 100_000, "thread_id": unique()})
        return bytes(msgpack.packb({"content": "x" * (100_000 + size - len(frame))}))
    letter = "é" if encoding == "umlauts" else "x"
    room = size - len('{"content": ""}')
    letters = letter * (room // len(letter.encode()))
    letters += "x" * (room - len(letters.encode()))
    return f'{{"content": "{letters}"}}'


@pytest.mark.parametrize("encoding", ["json", "umlauts", "msgpack"])
async def test_a_frame_has_a_largest_size(server: Server, encoding: str) -> None:
    binary = encoding == "msgpack"
    async with connect(server, binary=binary) as socket:
        await socket.connection.send(sized(BOUND + 4000, encoding))
        error = await socket.receive()
        assert (error["code"], error["retryable"]) == ("too_large", False)
        assert str(BOUND) in error["message"]
        await socket.connection.send(sized(BOUND * 4 - 4000, encoding))
        assert (await socket.receive())["code"] == "too_large"
        await socket.send({"type": "ping"})
        assert await socket.receive() == {"type": "pong"}
        await socket.connection.send(sized(BOUND * 4 + 4000, encoding))
        assert (await close_of(socket))[0] == 1009


async def test_a_frame_of_just_the_largest_size_is_taken(server: Server) -> None:
    frame = sized(BOUND, "json")
    assert len(frame) == BOUND
    async with connect(server) as socket:
        await socket.connection.send(frame)
        assert (await socket.until("end"))[-1]["status"] == "completed"


@pytest.mark.parametrize(("method", "path"), [("POST", "/chat/sse"), ("POST", "/chat/threads")])
async def test_a_body_has_a_largest_size(server: Server, method: str, path: str) -> None:
    async with client(server) as http:
        refused(
            await http.request(method, path, content=sized(BOUND + 1, "json")), 413, "too_large"
        )


@pytest.mark.parametrize("path", ["/chat/sse", "/chat/threads"])
async def test_a_body_without_a_length_is_bounded_as_well(serve: Any, path: str) -> None:
    server = await serve()
    process = psutil.Process(server.process.pid)
    before = process.memory_info().rss
    sent = 0
    reader, writer = await asyncio.open_connection(server.host, server.port)
    writer.write(
        f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
    )
    try:
        async with asyncio.timeout(SECONDS):
            for _ in range(96):
                writer.write(b"100000\r\n" + b" " * BOUND + b"\r\n")
                await writer.drain()
                sent += BOUND
            writer.write(b"0\r\n\r\n")
            head = await reader.readuntil(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 413")
    except ConnectionError:
        assert sent < 96 * BOUND
    finally:
        writer.close()
    assert process.memory_info().rss - before < 48 * BOUND
    async with client(server) as http:
        assert (await http.get("/health")).status_code == 200


async def test_parts_are_counted(server: Server) -> None:
    part = {"type": "text", "text": "x"}
    assert (await post(server, {"content": [part] * 64}))[-1]["status"] == "completed"
    async with client(server) as http:
        many = await http.post("/chat/sse", json={"content": [part] * 65})
        assert "content" in refused(many, 422, "invalid_message")["message"]


def nested(depth: int, kind: type) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value] if kind is list else {"a": value}
    return value


@pytest.mark.parametrize("kind", [list, dict])
async def test_nesting_is_bounded(server: Server, kind: type) -> None:
    shallow = {"content": "x", "metadata": {"a": nested(20, kind)}}
    deep = {"content": "x", "metadata": {"a": nested(60, kind)}}
    async with client(server) as http:
        assert (await http.post("/chat/sse", json=shallow)).status_code == 200
        refused(await http.post("/chat/sse", json=deep), 422, "invalid_message")
        body = {"metadata": {"a": nested(60, kind)}}
        refused(await http.post("/chat/threads", json=body), 422, "invalid_message")
    for binary in (False, True):
        async with connect(server, binary=binary) as socket:
            await socket.send(deep)
            assert (await socket.receive())["code"] == "invalid_message"


@pytest.mark.parametrize(
    "bomb",
    [
        b"[" * 500_000,
        b'{"a":' * 150_000,
        b"[" * 500_000 + b"]" * 500_000,
        b'{"content": ' + b"9" * 200_000 + b"}",
        b'{"content": "x", "seed": ' + b"9" * 4000 + b"}",
        b'{"content": 1e999999}',
        b'{"content": "x", "temperature": NaN}',
        b'{"content": "x", "temperature": -Infinity}',
        b'{"content": "\\u0000"}',
        b'{"content": "\\ud800"}',
        b'{"content": "\xff"}',
    ],
    ids=range(11),
)
async def test_a_json_bomb_is_answered(server: Server, bomb: bytes) -> None:
    async with client(server) as http:
        for path in ("/chat/sse", "/chat/threads"):
            response = await http.post(path, content=bomb)
            assert response.status_code in (400, 422), response.text
            assert response.json()["error"]["code"] == "invalid_message"
    if bomb.isascii():
        async with connect(server) as socket:
            await socket.connection.send(bomb.decode())
            assert (await socket.receive())["code"] == "invalid_message"


def packed_map(inside: bytes) -> bytes:
    return b"\x81\xa7content" + inside


MSGPACK_BOMBS = {
    "array of four billion": b"\xdd\xff\xff\xff\xff",
    "map of four billion": b"\xdf\xff\xff\xff\xff",
    "text of four billion": b"\xdb\xff\xff\xff\xff",
    "bytes of four billion": b"\xc6\xff\xff\xff\xff",
    "extension of four billion": b"\xc9\xff\xff\xff\xff\x01",
    "many nils": b"\xdd\x00\x0f\x00\x00" + b"\xc0" * 0xF0000,
    "deep arrays": b"\x91" * 500_000 + b"\xc0",
    "deep maps": b"\x81\xa1a" * 300_000 + b"\xc0",
    "deep arrays without an end": b"\x91" * 500_000,
    "a map as key": b"\x81\x81\xa1a\xc0\xc0",
    "a list as key": b"\x81\x91\xc0\xc0",
    "number as key": b"\x81\x01\xc0",
    "extension": packed_map(b"\xd4\x05\x00"),
    "empty extension": packed_map(b"\xc7\x00\x05"),
    "timestamp": packed_map(b"\xd6\xff\x00\x00\x00\x00"),
    "timestamp of twelve bytes": packed_map(b"\xc7\x0c\xff" + b"\x7f" * 12),
    "bytes for text": packed_map(b"\xc4\x01x"),
    "no UTF-8": packed_map(b"\xa1\xff"),
    "half a surrogate pair": packed_map(b"\xa3\xed\xa0\x80"),
    "infinity": packed_map(b"\xca\x7f\x80\x00\x00"),
    "reserved byte": b"\xc1",
    "empty frame": b"",
    "two values": b"\x80\x80",
}


@pytest.mark.parametrize("name", MSGPACK_BOMBS)
async def test_a_messagepack_bomb_is_answered(server: Server, name: str) -> None:
    async with connect(server, binary=True) as socket:
        await socket.connection.send(MSGPACK_BOMBS[name])
        error = await socket.receive()
        assert (error["type"], error["code"]) == ("error", "invalid_message")
        assert "reference" not in error
        await socket.send({"type": "ping"})
        assert await socket.receive() == {"type": "pong"}


async def test_bombs_cost_no_memory(serve: Any) -> None:
    server = await serve()
    process = psutil.Process(server.process.pid)
    async with connect(server, binary=True) as socket:
        await socket.send({"type": "ping"})
        await socket.receive()
        before = process.memory_info().rss
        for name in MSGPACK_BOMBS:
            if "billion" in name or "deep" in name:
                await socket.connection.send(MSGPACK_BOMBS[name])
                assert (await socket.receive())["code"] == "invalid_message"
        assert process.memory_info().rss - before < 64 * BOUND


async def test_max_tokens_has_a_bound(serve: Any, endpoint: Endpoint) -> None:
    server = await serve(max_tokens=100)
    assert (await post(server, {"content": "hi", "max_tokens": 100}))[-1]["status"] == "completed"
    assert endpoint.requests[-1]["max_tokens"] == 100
    async with client(server) as http:
        over = await http.post("/chat/sse", json={"content": "hi", "max_tokens": 101})
    error = refused(over, 422, "invalid_message")
    assert "max_tokens" in error["message"]
    assert "100" in error["message"]
    async with connect(server) as socket:
        await socket.send({"content": "hi", "max_tokens": 10**9})
        assert (await socket.receive())["code"] == "invalid_message"
    assert len(endpoint.requests) == 1
    await post(server, {"content": "hi"})
    assert endpoint.requests[-1].get("max_tokens", 0) <= 100


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", 2.1),
        ("temperature", -0.1),
        ("top_p", 1.1),
        ("max_tokens", 0),
        ("stop", ["x"] * 5),
        ("reasoning_effort", "x" * 40),
        ("model", "x" * 300),
        ("thread_id", "x" * 129),
        ("id", "x" * 129),
        ("thread_id", "a\nb"),
        ("tools", ["x"] * 200),
        ("client_tools", [{"name": f"t{n}"} for n in range(33)]),
        ("client_tools", [{"name": "t", "parameters": {"x": "y" * 33_000}}]),
        ("metadata", {"x": "y" * 17_000}),
    ],
)
async def test_parameters_are_bounded(
    server: Server, shared_endpoint: Endpoint, field: str, value: Any
) -> None:
    before = len(shared_endpoint.requests)
    async with client(server) as http:
        response = await http.post("/chat/sse", json={"content": "hi", field: value})
    assert field in refused(response, 422, "invalid_message")["message"]
    assert len(shared_endpoint.requests) == before


async def test_only_the_models_of_a_provider_that_are_listed(
    serve: Any, endpoint: Endpoint
) -> None:
    given = {
        **providers(endpoint, models=["m", "n"]),
        "free": {"base_url": endpoint.url, "api_key": "sk-free", "default_model": "f"},
    }
    server = await serve(providers=given, default_provider="scripted")
    async with client(server) as http:
        listed = (await http.get("/chat/models")).json()["models"]
        assert [(m["id"], m["provider"], m["default"]) for m in listed] == [
            ("m", "scripted", True),
            ("n", "scripted", False),
            ("f", "free", False),
        ]
        for command in ({"model": "x"}, {"model": "f"}, {"model": "x", "provider": "scripted"}):
            response = await http.post("/chat/sse", json={"content": "hi", **command})
            error = refused(response, 422, "unknown_model")
            assert "m, n" in error["message"]
        other = await http.post("/chat/sse", json={"content": "hi", "provider": endpoint.url})
        refused(other, 422, "unknown_provider")
        for field in ("base_url", "api_key"):
            other = await http.post("/chat/sse", json={"content": "hi", field: "http://x"})
            refused(other, 422, "invalid_message")
    assert not endpoint.requests
    for command in ({}, {"model": "n"}, {"model": "anything", "provider": "free"}):
        assert answer(await post(server, {"content": "hi", **command}))
    assert [sent["model"] for sent in endpoint.requests] == ["m", "n", "anything"]
    assert [sent["authorization"] for sent in endpoint.headers] == [
        *["Bearer sk-secret"] * 2,
        "Bearer sk-free",
    ]


async def test_defaults_of_remote_auth_bound_a_user(
    auth: AuthServer, endpoint: Endpoint, tmp_path: Path
) -> None:
    async with (
        remote_server(auth, endpoint, tmp_path) as server,
        AsyncExitStack() as stack,
        client(server, headers=bearer(auth.token())) as http,
    ):
        begun, answered = time.monotonic(), 0
        while (await http.post("/chat/sse", json={"content": "hi"})).status_code == 200:
            answered += 1
        assert 60 <= answered <= 61 + time.monotonic() - begun
        token = auth.token("user-2")
        for _ in range(8):
            await running(server, token, stack)
        refused(await send(server, token), 429, "too_many_runs")
        sockets = [connect(server, additional_headers=bearer(token)) for _ in range(24)]
        for socket in sockets:
            await stack.enter_async_context(socket)
        assert (await closed(server, additional_headers=bearer(token)))[0] == 1013


async def test_a_client_that_sends_faster_than_it_reads_is_held_back(server: Server) -> None:
    """Pings without end: memory stays bounded, and every one of them is answered."""
    async with connect(server) as socket:
        frame = json.dumps({"type": "ping", "id": "x" * 100})
        for _ in range(3000):
            await socket.connection.send(frame)
        for _ in range(3000):
            assert (await socket.receive())["type"] == "pong"
