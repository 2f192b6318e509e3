"""Connections below Quart: what a client can make the server hold, and for how long."""

from __future__ import annotations

import asyncio
import json
import socket
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import SECONDS, Serve, Server, connect, providers, unique
from endpoint import END, Endpoint, Exchange, text
from hosts import hypercorn

MEGABYTE = 1024 * 1024
SENT = 256 * MEGABYTE
GROWTH = 5 * MEGABYTE
UPGRADE = (
    "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
    "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
)
TEXT, BINARY, PING, PONG, CLOSE = 1, 2, 9, 10, 8


def request(line: str, headers: str = "") -> bytes:
    return f"{line} HTTP/1.1\r\nHost: 127.0.0.1\r\n{headers}\r\n".encode()


def frame(kind: int, payload: bytes = b"", *, last: bool = True) -> bytes:
    """A frame of a client, with a mask of zeros."""
    first, size = (0x80 if last else 0) | kind, len(payload)
    if size < 126:
        head = bytes((first, 0x80 | size))
    elif size < 65_536:
        head = struct.pack("!BBH", first, 0x80 | 126, size)
    else:
        head = struct.pack("!BBQ", first, 0x80 | 127, size)
    return head + bytes(4) + payload


def frames_of(data: bytes) -> list[tuple[int, bytes]]:
    """The kind and payload of each short frame of a server."""
    found, at = [], 0
    while at < len(data):
        size = data[at + 1]
        start = at + 2
        if size == 126:
            size, start = int.from_bytes(data[start : start + 2]), start + 2
        found.append((data[at] & 15, data[start : start + size]))
        at = start + size
    return found


Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@asynccontextmanager
async def open_raw(server: Any, first: bytes = b"") -> AsyncIterator[Streams]:
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(first)
    try:
        yield reader, writer
    finally:
        writer.close()


@asynccontextmanager
async def open_socket(server: Any) -> AsyncIterator[Streams]:
    """A WebSocket after its handshake and the server's first ping, which our own server sends."""
    async with open_raw(server, request("GET /chat", UPGRADE)) as (reader, writer):
        head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), SECONDS)
        assert b" 101 " in head
        yield reader, writer


async def rest(reader: asyncio.StreamReader) -> bytes:
    """All that still comes until the server closes; a reset is a close."""
    data = bytearray()
    try:
        async with asyncio.timeout(SECONDS):
            while piece := await reader.read(65_536):
                data += piece
    except ConnectionError:
        pass
    return bytes(data)


async def until_the_end(reader: asyncio.StreamReader, tail: bytes = b"") -> None:
    """Read to the end of a chunked body."""
    async with asyncio.timeout(SECONDS):
        while not tail.endswith(b"\r\n0\r\n\r\n"):
            data = await reader.read(65_536)
            assert data, "the body was cut"
            tail = (tail + data)[-7:]


def process_of(server: Any) -> psutil.Process:
    """The process that serves; a host's Hypercorn has it as a child."""
    process = psutil.Process(server.process.pid)
    return next((c for c in process.children() if "spawn_main" in " ".join(c.cmdline())), process)


def connections(server: Any) -> int:
    return len([c for c in process_of(server).net_connections() if c.status != "LISTEN"])


async def until(condition: Callable[[], bool], seconds: float = SECONDS) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.02)


async def warmed_up(server: Any) -> int:
    """The server's memory once it has done everything once."""
    async with connect(server) as client:
        assert (await client.ask("hi"))[-1]["status"] == "completed"
    async with open_socket(server) as (_, writer):
        writer.write(frame(TEXT, b"x" * 65_536) * 4)
        await writer.drain()
    return int(process_of(server).memory_info().rss)


FLOODS = {
    "one frame": (
        request("GET /chat", UPGRADE),
        bytes((0x81, 0xFF)) + struct.pack("!Q", 1 << 40) + bytes(4),
        b"x" * 65_536,
    ),
    "fragments": (
        request("GET /chat", UPGRADE),
        frame(TEXT, b"x", last=False),
        frame(0, "ü".encode() * 30_000, last=False),
    ),
    "chunked body": (
        request("POST /chat/sse", "Transfer-Encoding: chunked\r\n"),
        b"",
        b"10000\r\n" + b"x" * 65_536 + b"\r\n",
    ),
    "long body": (
        request("POST /chat/threads", f"Content-Length: {1 << 40}\r\n"),
        b"",
        b"x" * 65_536,
    ),
    "body of a GET": (
        request("GET /chat/threads", "Transfer-Encoding: chunked\r\n"),
        b"",
        b"10000\r\n" + b"x" * 65_536 + b"\r\n",
    ),
}


@pytest.mark.parametrize("name", FLOODS)
async def test_what_is_too_big_is_not_kept(server: Server, name: str) -> None:
    head, first, block = FLOODS[name]
    before = await warmed_up(server)
    most = before
    async with open_raw(server, head) as (reader, writer):
        if b"websocket" in head:
            await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), SECONDS)
        answer = asyncio.ensure_future(rest(reader))
        try:
            writer.write(first)
            for number in range(SENT // len(block)):
                writer.write(block)
                await writer.drain()
                if number % 64 == 0:
                    most = max(most, process_of(server).memory_info().rss)
        except ConnectionError:
            pass  # it is cut
        data = await answer
    assert most - before < GROWTH
    if b"websocket" in head:
        assert (CLOSE, struct.pack("!H", 1009) + b"Message too big") in frames_of(data)
    else:
        assert data.startswith(b"HTTP/1.1 200" if head.startswith(b"GET") else b"HTTP/1.1 413")


@pytest.mark.parametrize("application", ["hosts:bounded_app()"])
async def test_a_host_may_bound_the_connections_of_its_hypercorn(
    endpoint: Endpoint, tmp_path: Path, application: str
) -> None:
    environ = {"QUART_CHAT_PROVIDERS": json.dumps(providers(endpoint))}
    tests = Path(__file__).parent
    async with hypercorn(application, tests, tmp_path, environ) as host:
        async with open_socket(host) as (reader, writer):
            writer.write(frame(PING, b"a") * 100 + frame(PING, b"last"))
            assert frames_of(await reader.read(1000)) == [(PONG, b"last")]
        async with open_raw(host, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n") as (reader, _):
            assert (await rest(reader)).startswith(b"HTTP/1.1 505")
        await until(lambda: connections(host) == 0, 3)


async def test_a_body_that_is_announced_too_long_is_refused_at_once(server: Server) -> None:
    head = request("POST /chat/sse", "Content-Length: 1000000000000\r\n")
    async with open_raw(server, head + b"x") as (reader, _):
        assert (await rest(reader)).startswith(b"HTTP/1.1 413")


@pytest.mark.parametrize(
    "head",
    [
        b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\nX: ",
        request("POST /chat/sse", "Content-Length: 1000\r\n"),
        request("POST /chat/threads", "Transfer-Encoding: chunked\r\n") + b"3e8\r\n",
    ],
    ids=["head", "body", "chunk"],
)
async def test_what_drips_is_cut(serve: Serve, head: bytes) -> None:
    server = await serve(body_timeout=1, max_connections=1)
    async with open_raw(server, head) as (reader, writer):

        async def drip() -> None:
            while True:
                writer.write(b"x")
                await writer.drain()
                await asyncio.sleep(0.1)

        dripping = asyncio.ensure_future(drip())
        assert (await rest(reader))[:9] == b"HTTP/1.1 "
        dripping.cancel()
        await asyncio.gather(dripping, return_exceptions=True)
    await until(lambda: connections(server) == 0)
    async with connect(server) as client:  # no slot is held
        await client.send({"type": "ping"})
        assert (await client.receive())["type"] == "pong"


async def test_a_message_that_is_never_finished_ends(serve: Serve) -> None:
    server = await serve(body_timeout=1)
    async with open_socket(server) as (reader, writer):
        writer.write(frame(TEXT, b"{" * 100, last=False))
        closing = struct.pack("!H", 1008) + b"A message took too long"
        assert frames_of(await rest(reader))[-1] == (CLOSE, closing)


async def test_a_frame_over_the_size_is_refused_and_the_socket_stays(serve: Serve) -> None:
    server = await serve(max_message_bytes=1000)
    async with open_socket(server) as (reader, writer):
        for message in (frame(TEXT, b"x" * 3000), frame(TEXT, b"x" * 900, last=False)):
            writer.write(message)
        writer.write(frame(0, "ü".encode() * 300) + frame(TEXT, b'{"type":"ping"}'))
        answers: list[tuple[int, bytes]] = []
        while len(answers) < 3:
            found = frames_of(await asyncio.wait_for(reader.read(65_536), SECONDS))
            answers += [each for each in found if each[0] == TEXT]
        codes = [json.loads(body).get("code", "pong") for _, body in answers]
        assert codes == ["too_large", "too_large", "pong"]
        writer.write(frame(TEXT, b"x" * 4001))
        assert frames_of(await rest(reader))[-1][1][:2] == struct.pack("!H", 1009)


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"505"),
        (b"GET / HTTP/3.0\r\nHost: 127.0.0.1\r\n\r\n", b"505"),
        (request("CONNECT example.org:443"), b"400"),
        (request("GET ?x"), b"400"),
        (request("OPTIONS *"), b"400"),
        (request("GET http://[/"), b"400"),
        (b"GET /\xff HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n", b"400"),
        (request("GET /chat", "Connection: Upgrade\r\nUpgrade: websocket\r\n"), b"400"),
        (
            request("POST /chat/sse", "Transfer-Encoding: chunked\r\nContent-Length: 3\r\n")
            + b"0\r\n\r\n",
            b"400",
        ),
    ],
)
async def test_odd_requests_are_refused_and_the_connection_closed(
    server: Server, head: bytes, status: bytes
) -> None:
    async with open_raw(server, head) as (reader, _):
        assert (await rest(reader))[9:12] == status
    assert "Traceback" not in server.log(), server.log()


async def test_an_upgrade_to_http2_is_ignored(server: Server) -> None:
    offer = "Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\n"
    async with open_raw(server, request("GET /health", offer)) as (reader, _):
        head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), SECONDS)
        assert head.startswith(b"HTTP/1.1 200")
    async with open_raw(server, request("GET http://127.0.0.1/health")) as (reader, _):
        head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), SECONDS)
        assert head.startswith(b"HTTP/1.1 200")


async def test_the_last_ping_of_a_read_is_answered(server: Server) -> None:
    async with open_socket(server) as (reader, writer):
        writer.write(b"".join(frame(PING, b"%d" % number) for number in range(200)))
        pongs: list[bytes] = []
        while not pongs or pongs[-1] != b"199":
            data = await asyncio.wait_for(reader.read(65_536), SECONDS)
            pongs += [payload for kind, payload in frames_of(data) if kind == PONG]
        assert len(pongs) < 10


@pytest.mark.parametrize(
    "flood",
    [frame(PING), frame(PONG), frame(0, last=False), frame(0, b"a", last=False)],
    ids=["pings", "pongs", "empty fragments", "tiny fragments"],
)
async def test_a_flood_of_control_frames_is_closed(server: Server, flood: bytes) -> None:
    async with open_socket(server) as (reader, writer):
        writer.write(frame(TEXT, b"a", last=False) + flood * 5000)
        answers = frames_of(await rest(reader))
        closing = struct.pack("!H", 1008) + b"Too many control frames"
        assert answers[-1] == (CLOSE, closing)
        assert len(answers) < 10


async def test_a_broken_frame_is_closed_with_its_code(server: Server) -> None:
    async with open_socket(server) as (reader, writer):
        writer.write(frame(TEXT, b"\xff\xfe"))
        assert frames_of(await rest(reader))[-1][1][:2] == struct.pack("!H", 1007)


@asynccontextmanager
async def answered(serve: Serve, endpoint: Endpoint, **settings: Any) -> AsyncIterator[Any]:
    """A server with an ended answer of 2 MB, and the run's id."""

    async def long(exchange: Exchange) -> None:
        for _ in range(100):
            await exchange.send(text("x" * 20_000))
        await exchange.send(END)

    endpoint.scripts["long"] = long
    server = await serve(**settings)
    async with connect(server) as client:
        events = await client.ask("script:long", thread_id=unique())
        assert events[-1]["status"] == "completed"
    await until(lambda: connections(server) == 0)
    yield server, events[-1]["run_id"]


async def test_clients_that_leave_leave_nothing(serve: Serve, endpoint: Endpoint) -> None:
    async with answered(serve, endpoint) as (server, run):
        follow = request(f"GET /chat/sse?run_id={run}")

        async def leave_after(size: int) -> None:
            async with open_raw(server, follow) as (reader, _):
                await asyncio.wait_for(reader.readexactly(size), SECONDS)

        async def leave_at_the_end() -> None:
            async with open_raw(server, follow) as (reader, _):
                await until_the_end(reader)

        descriptors = process_of(server).num_fds()
        await asyncio.gather(*(leave_after(10_000) for _ in range(20)))
        await asyncio.gather(*(leave_at_the_end() for _ in range(20)))
        await until(lambda: connections(server) == 0, 2)
        await until(lambda: process_of(server).num_fds() <= descriptors, 2)


@pytest.mark.parametrize("kind", ["websocket", "sse"])
async def test_a_client_that_takes_nothing_is_dropped(
    serve: Serve, endpoint: Endpoint, kind: str
) -> None:
    async with answered(serve, endpoint, send_timeout=1) as (server, run):
        with socket.socket() as deaf:
            deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            deaf.connect(("127.0.0.1", server.port))
            if kind == "sse":
                deaf.sendall(request(f"GET /chat/sse?run_id={run}"))
            else:
                resume = json.dumps({"type": "resume", "run_id": run}).encode()
                deaf.sendall(request("GET /chat", UPGRADE))
                assert b" 101 " in deaf.recv(1000)
                deaf.sendall(frame(TEXT, resume))
            await until(lambda: connections(server) == 1)
            await until(lambda: connections(server) == 0)
        await until(lambda: "was dropped" in server.log())


async def test_a_client_that_takes_little_is_not_dropped(serve: Serve, endpoint: Endpoint) -> None:
    async with answered(serve, endpoint, send_timeout=3) as (server, run):
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port, limit=4096)
        writer.write(request(f"GET /chat/sse?run_id={run}"))
        tail = b""
        for _ in range(60):  # twice as long as one may take nothing
            tail = (tail + await asyncio.wait_for(reader.read(20_000), SECONDS))[-7:]
            await asyncio.sleep(0.1)
        await until_the_end(reader, tail)
        writer.close()
        assert "was dropped" not in server.log()
