"""What the guard lets pass: rates, bodies, refused frames, origins, expired tokens, slots."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
import websockets
from auth_server import AuthServer, auth_server, bearer, remote_server
from conftest import SECONDS, Server, client, connect, unique
from endpoint import Endpoint, Exchange, text

from quart_chat.config import loopback
from quart_chat.core.commands import MAX_VALUES, check_values
from quart_chat.errors import InvalidMessage
from quart_chat.transports.limits import ConnectionSlots, TooManyConnections
from quart_chat.transports.origins import LOOPBACK_ORIGIN

BOUND = 1024 * 1024
SKEW_SECONDS = 10


@pytest.fixture(scope="module")
async def auth() -> AsyncIterator[AuthServer]:
    async with auth_server() as found:
        yield found


@pytest.fixture(scope="module")
async def limited(
    auth: AuthServer, shared_endpoint: Endpoint, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Server]:
    cwd = tmp_path_factory.mktemp("guarded")
    settings: dict[str, Any] = {
        "request_rate_limit": "12/hour",
        "max_connections_per_user": 2,
        "body_timeout": 1.0,
    }
    async with remote_server(auth, shared_endpoint, cwd, **settings) as found:
        yield found


async def test_calls_and_refusals_have_a_rate(limited: Server, auth: AuthServer) -> None:
    token = bearer(auth.token(unique("user")))
    async with client(limited, headers=token) as http:
        for _ in range(4):
            assert (await http.get("/chat/models")).status_code == 200
            assert (await http.post("/chat/sse", content=b"{")).status_code == 400
        async with connect(limited, additional_headers=token) as socket:
            for _ in range(4):
                await socket.connection.send("{")
                assert (await socket.receive())["code"] == "invalid_message"
            await socket.connection.send("{")
            late = await socket.receive()
            assert (late["code"], late["retryable"]) == ("rate_limited", True)
            assert 200 <= late["retry_after"] <= 300
            await socket.send({"type": "ping"})
            assert (await socket.receive())["type"] == "pong"
            assert (await socket.ask("hi"))[-1]["status"] == "completed"
        for method, path in (("GET", "/chat/models"), ("POST", "/chat/threads")):
            response = await http.request(method, path)
            assert response.status_code == 429
            assert response.json()["error"]["code"] == "rate_limited"
            assert 200 <= int(response.headers["retry-after"]) <= 301
    async with client(limited, headers=bearer(auth.token(unique("user")))) as http:
        assert (await http.get("/chat/models")).status_code == 200


async def test_a_local_user_has_no_rate(server: Server) -> None:
    async with client(server) as http:
        statuses = {(await http.get("/chat/models")).status_code for _ in range(650)}
    assert statuses == {200}


async def begun(server: Server, path: str, headers: str, body: bytes = b"") -> Any:
    reader, writer = await asyncio.open_connection(server.host, server.port)
    host = f"Host: {server.host}:{server.port}\r\n"
    writer.write(f"POST {path} HTTP/1.1\r\n{host}{headers}\r\n".encode() + body)
    return reader, writer


@pytest.mark.parametrize("path", ["/chat/sse", "/chat/threads"])
@pytest.mark.parametrize("length", [BOUND + 1, 10**12])
async def test_a_body_that_says_it_is_too_large_is_refused_at_once(
    server: Server, path: str, length: int
) -> None:
    reader, writer = await begun(server, path, f"Content-Length: {length}\r\n", b"x")
    try:
        head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5)
        assert head.startswith(b"HTTP/1.1 413")
        size = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
        error = json.loads(await asyncio.wait_for(reader.readexactly(size), 5))["error"]
        assert error["code"] == "too_large"
        assert str(BOUND) in error["message"]
        assert b"connection: close" in head.lower()
    finally:
        writer.close()


@pytest.mark.parametrize("path", ["/chat/sse", "/chat/threads"])
@pytest.mark.parametrize("size", [BOUND + 1, 8 * BOUND])
async def test_a_client_that_sends_on_still_reads_why(server: Server, path: str, size: int) -> None:
    async with client(server) as http:
        for _ in range(5):
            assert (await http.post(path, content=b"x" * size)).status_code == 413


@pytest.mark.parametrize("path", ["/chat/sse", "/chat/threads"])
async def test_a_body_that_never_ends_is_given_up(
    limited: Server, auth: AuthServer, path: str
) -> None:
    """A client that drips is refused after the time-out, and took no place meanwhile."""
    token = auth.token(unique("user"))
    headers = f"Authorization: Bearer {token}\r\nContent-Length: 1000\r\n"
    async with AsyncExitStack() as stack:
        opened = [await begun(limited, path, headers, b"{") for _ in range(2)]
        for _, writer in opened:
            stack.callback(writer.close)
        for _ in range(2):
            await stack.enter_async_context(connect(limited, additional_headers=bearer(token)))

        async def drip() -> None:
            while True:
                for _, writer in opened:
                    writer.write(b" ")
                await asyncio.sleep(0.1)

        dripping = asyncio.create_task(drip())
        stack.callback(dripping.cancel)
        for reader, _ in opened:
            head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5)
            assert head.startswith(b"HTTP/1.1 408")


@pytest.mark.parametrize("path", ["/chat/sse", "/chat/threads"])
async def test_requests_at_once_are_bounded(limited: Server, auth: AuthServer, path: str) -> None:
    """As many as connections, and counted apart from them."""
    token = auth.token(unique("user"))
    headers = f"Authorization: Bearer {token}\r\nContent-Length: 1000\r\n"
    async with AsyncExitStack() as stack, client(limited, headers=bearer(token)) as http:
        for _ in range(2):
            _, writer = await begun(limited, path, headers, b"{")
            stack.callback(writer.close)
        deadline = time.monotonic() + SECONDS
        while (late := await http.get("/chat/models")).status_code == 200:
            assert time.monotonic() < deadline
        assert late.status_code == 429
        assert "at once" in late.json()["error"]["message"]
        assert int(late.headers["retry-after"]) >= 1


COSTLY = {
    "history": '{"content":"x","history":[' + ",".join(["{}"] * 349_000) + "]}",
    "unknown fields": "{" + ",".join(f'"a{n}":1' for n in range(90_000)) + "}",
    "numbers": '{"content":"x","metadata":{"a":[' + ",".join(["1"] * 500_000) + "]}}",
    "lists": '{"content":"x","metadata":{"a":[' + ",".join(["[]"] * 349_000) + "]}}",
    "text": '{"content":"x","metadata":{"a":"' + "x" * 1_000_000 + '"}}',
}


@pytest.mark.parametrize("name", COSTLY)
async def test_a_costly_frame_does_not_hold_others_up(server: Server, name: str) -> None:
    """While four sockets send them without a pause, another one's ping comes back soon."""
    stopped = asyncio.Event()

    async def flood() -> int:
        count = 0
        async with connect(server) as socket:
            while not stopped.is_set():
                await socket.connection.send(COSTLY[name])
                assert (await socket.receive())["code"] == "invalid_message"
                count += 1
        return count

    async with connect(server) as socket:
        floods = [asyncio.create_task(flood()) for _ in range(4)]
        taken: list[float] = []
        for _ in range(20):
            await asyncio.sleep(0.1)  # between measurements
            begin = time.perf_counter()
            await socket.send({"type": "ping"})
            await socket.receive()
            taken.append(time.perf_counter() - begin)
        stopped.set()
        await asyncio.gather(*floods)
    assert sorted(taken)[10] < 0.3, taken


def test_a_message_holds_so_many_values() -> None:
    check_values({"a": [1] * (MAX_VALUES - 1)})
    for many in ([1] * (MAX_VALUES + 1), {"a": [1] * MAX_VALUES}, [[1] * 5000, [1] * 5000]):
        with pytest.raises(InvalidMessage, match="10,000 values"):
            check_values(many)


async def test_refusals_without_end_are_slowed_down(server: Server) -> None:
    """Only the client that is refused waits, and only until a frame of it is taken."""
    async with connect(server) as socket, connect(server) as other:
        begin = time.monotonic()
        for _ in range(10):
            await socket.connection.send("{")
            await socket.receive()
        quick = time.monotonic() - begin
        begin = time.monotonic()
        for _ in range(40):
            await socket.connection.send("{")
            await socket.receive()
        assert time.monotonic() - begin > quick + 1
        await socket.connection.send("{")
        await socket.receive()
        await other.send({"type": "ping"})
        await other.receive()
        await socket.send({"type": "ping"})
        await socket.receive()


async def test_an_unknown_field_is_named_first(server: Server) -> None:
    async with client(server) as http:
        for path, body, field in (
            ("/chat/sse", {"contnt": "x"}, "contnt"),
            ("/chat/sse", {"content": 1, "temprature": 1}, "temprature"),
            ("/chat/sse", {"content": [{"type": "text", "txt": "x"}]}, "txt"),
            ("/chat/threads", {"id": 1, "titel": "x"}, "titel"),
        ):
            response = await http.post(path, json=body)
            assert response.status_code == 422
            message = response.json()["error"]["message"]
            assert f"{field}: unknown field" in message, message


@pytest.mark.parametrize("path", ["/openapi.json", "/asyncapi.json", "/docs", "/health", "/nope"])
async def test_a_rebound_name_reads_no_document(server: Server, path: str) -> None:
    async with client(server) as http:
        evil = {"Host": f"evil.example:{server.port}"}
        assert (await http.get(path, headers=evil)).status_code == 403
        assert (await http.get(path, headers={"Origin": "http://evil.example"})).status_code == 403
        assert (await http.get(path)).status_code in (200, 404)


@pytest.mark.parametrize("origin", ["http://[::1].evil.example", "http://localhost#.evil.example"])
async def test_an_origin_has_to_be_loopback_as_a_whole(server: Server, origin: str) -> None:
    async with client(server) as http:
        response = await http.get("/chat/models", headers={"Origin": origin})
    assert response.status_code == 403


def test_what_loopback_is() -> None:
    for address in ("localhost", "127.0.0.1", "127.8.8.8", "::1", "[::1]", "::ffff:127.0.0.1"):
        assert loopback(address)
    for address in ("0.0.0.0", "::", "::ffff:10.0.0.1", "127.0.0.1.evil.example", "", "128.0.0.1"):
        assert not loopback(address)
    for origin in ("http://localhost", "https://127.0.0.1:1", "http://[::1]:8080"):
        assert LOOPBACK_ORIGIN.fullmatch(origin)
    for origin in ("null", "file://", "http://localhost:8080:1", "http://127.0.0.1\n"):
        assert not LOOPBACK_ORIGIN.fullmatch(origin)


async def test_a_server_on_all_addresses_knows_loopback(serve: Any) -> None:
    """An IPv6 socket names an IPv4 peer ::ffff:127.0.0.1."""
    server = await serve("--host", "::")
    url = f"http://127.0.0.1:{server.port}"
    async with httpx.AsyncClient(trust_env=False, base_url=url) as http:
        try:
            assert (await http.get("/chat/models")).status_code == 200
        except httpx.ConnectError:
            pytest.skip("IPv6 sockets take no IPv4 here")
        evil = {"Host": "evil.example", "Origin": "http://evil.example"}
        assert (await http.get("/chat/models", headers=evil)).status_code == 403


async def test_a_star_is_everybody(serve: Any) -> None:
    server = await serve(allowed_origins=["*"])
    async with client(server) as http:
        for headers in (
            {"Host": "chat.example"},
            {"Host": "chat.example", "Origin": "https://page.example"},
            {"Origin": "null"},
        ):
            assert (await http.get("/chat/models", headers=headers)).status_code == 200


async def test_a_socket_that_does_not_read_does_not_outlive_its_token(
    auth: AuthServer, endpoint: Endpoint, tmp_path: Path
) -> None:
    """No command is taken after it has expired, and its place is free again."""

    async def flood(exchange: Exchange) -> None:
        while True:
            await exchange.send(text("x" * 20_000))
            await asyncio.sleep(0.005)

    endpoint.scripts["flood"] = flood
    async with remote_server(
        auth, endpoint, tmp_path, max_connections=1, max_answer_chars=10**9
    ) as server:
        other = bearer(auth.token("ada"))
        async with AsyncExitStack() as stack, client(server, headers=other) as http:
            token = bearer(auth.token("ada", lasts=3 - SKEW_SECONDS))
            socket = await stack.enter_async_context(
                connect(server, additional_headers=token, max_queue=1, close_timeout=0.5)
            )
            expired = time.monotonic() + 3
            await socket.send({"content": "script:flood", "thread_id": "t"})
            with suppress(websockets.ConnectionClosed):
                while time.monotonic() < expired + 3:
                    before = time.monotonic() < expired
                    await socket.send({"content": "hi", "thread_id": f"{before} {unique()}"})
                    await asyncio.sleep(0.25)
            threads = (await http.get("/chat/threads?limit=200")).json()["threads"]
            assert not [each["id"] for each in threads if each["id"].startswith("False")]
            async with connect(server, additional_headers=other) as again:
                await again.send({"type": "stop", "thread_id": "t"})
                assert (await again.receive())["type"] == "generation_stopped"


def test_slots_are_counted_as_a_whole_and_given_back_once() -> None:
    slots = ConnectionSlots(3, 2, TooManyConnections)
    ada, grace = [slots.take("ada"), slots.take("ada")], slots.take("grace")
    for user in ("ada", "grace", "hopper"):
        with pytest.raises(TooManyConnections):
            slots.take(user)
    grace.release()
    grace.release()
    assert slots.total == 2
    with pytest.raises(TooManyConnections):
        slots.take("ada")
    for slot in ada:
        slot.release()
    assert slots.total == 0
    assert not slots._per_user
