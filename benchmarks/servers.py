"""The server under test and its competitors, started the way that their users start them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from .processes import Process, free_port

MESSAGE = "Tell me about the quick brown fox."


@dataclass(frozen=True)
class Way:
    """How to speak to a server."""

    name: str
    path: str
    encoding: str


SOCKET = Way("WebSocket JSON", "/ws", "json")
STREAM = Way("SSE", "/sse", "sse")
OURS = (
    Way("WebSocket JSON", "/chat", "json"),
    Way("WebSocket MessagePack", "/chat", "msgpack"),
    Way("SSE", "/chat/sse", "sse"),
)
MERGED = Way("WebSocket JSON, merged", "/ws-merged", "json")


@dataclass(frozen=True)
class Kind:
    """A server that can be started; ``start`` takes the endpoint's URL and a folder of its own."""

    name: str
    ways: tuple[Way, ...]
    start: Callable[[str, Path], tuple[Process, int]]
    full: bool = True
    """Whether it is measured in every workload, or in (a) and (b) alone."""


def _chat(*options: str) -> Callable[[str, Path], tuple[Process, int]]:
    def start(endpoint: str, folder: Path) -> tuple[Process, int]:
        provider = {"base_url": endpoint, "api_key": "benchmark", "default_model": "fast-10"}
        arguments = ["-m", "quart_chat", "chat-server", "--port", "0", "--protocol", "both"]
        settings = {"QUART_CHAT_PROVIDERS": json.dumps({"benchmark": provider})}
        process = Process([*arguments, *options], cwd=folder, environ=settings)
        port = 0
        while "Try it" not in (line := process.line()):
            if found := re.search(r"ws://\S+?:(\d+)/", line):
                port = int(found[1])
        return process, port

    return start


def _fastapi(endpoint: str, folder: Path) -> tuple[Process, int]:
    port = free_port()
    arguments = ["-m", "uvicorn", "benchmarks.competitors.fastapi_app:app", "--loop", "uvloop"]
    options = ["--port", str(port), "--log-level", "warning", "--backlog", "1024"]
    return _competitor([*arguments, *options], endpoint, folder, port)


def _relay(endpoint: str, folder: Path) -> tuple[Process, int]:
    port = free_port()
    arguments = ["-m", "hypercorn", "benchmarks.competitors.relay:app", "--worker-class", "uvloop"]
    options = ["--bind", f"127.0.0.1:{port}", "--workers", "0", "--backlog", "1024"]
    return _competitor([*arguments, *options], endpoint, folder, port)


def _competitor(
    arguments: list[str], endpoint: str, folder: Path, port: int
) -> tuple[Process, int]:
    process = Process(arguments, cwd=folder, environ={"BENCHMARK_BASE_URL": endpoint})
    process.wait_for_port(port)
    return process, port


CHAT = Kind("quart_chat, SQLite", OURS, _chat())
MEMORY = Kind("quart_chat, memory", OURS, _chat("--no-database"), full=False)
FASTAPI = Kind("FastAPI + openai SDK + SQLAlchemy", (SOCKET, STREAM), _fastapi)
RELAY = Kind("bare relay (Hypercorn)", (SOCKET, MERGED, STREAM), _relay)
KINDS = (CHAT, MEMORY, FASTAPI, RELAY)


@dataclass(frozen=True)
class Server:
    """A server that runs."""

    kind: Kind
    process: Process
    port: int
    folder: Path


@contextmanager
def running(kind: Kind, endpoint: str, folder: Path) -> Iterator[Server]:
    """A server in a folder of its own, until the block ends."""
    folder.mkdir()
    process, port = kind.start(endpoint, folder)
    with process:
        yield Server(kind, process, port, folder)


@contextmanager
def scripted_endpoint(folder: Path) -> Iterator[str]:
    """The endpoint's base URL."""
    with Process(["-m", "benchmarks.endpoint"], cwd=folder) as process:
        yield f"http://127.0.0.1:{int(process.line())}/v1"


@contextmanager
def all_running(endpoint: str, folder: Path) -> Iterator[list[Server]]:
    """All of them side by side; the ones that are not being measured have nothing to do."""
    with ExitStack() as stack:
        yield [
            stack.enter_context(running(kind, endpoint, folder / f"server{number}"))
            for number, kind in enumerate(KINDS)
        ]
