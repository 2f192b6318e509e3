"""Applications that embed the chat, each run by ``hypercorn`` as a process of its own."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from conftest import clean_environment
from quart import Quart, Request, Websocket, websocket

from quart_chat import QuartChat, create_app, sse_blueprint, threads_blueprint, websocket_blueprint
from quart_chat.compat.hypercorn import bound_connections

KEYS = {"key-of-ada": "ada", "key-of-grace": "grace"}


class Host:
    """An application under hypercorn; looks to the small clients like our own server."""

    def __init__(self, process: asyncio.subprocess.Process, port: int) -> None:
        self.process = process
        self.host, self.port = "127.0.0.1", port
        self.stderr: list[str] = []
        self.reader = asyncio.ensure_future(self._read())

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"

    @property
    def ws(self) -> str:
        return f"ws://{self.host}:{self.port}/chat"

    def log(self) -> str:
        return "".join(self.stderr)

    async def _read(self) -> None:
        assert self.process.stderr
        async for line in self.process.stderr:
            self.stderr.append(line.decode())


@asynccontextmanager
async def hypercorn(
    application: str, folder: Path, cwd: Path, environ: dict[str, str]
) -> AsyncIterator[Any]:
    """``hypercorn application`` on a free port, ended with SIGTERM."""
    path = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "hypercorn", application, "--bind", "127.0.0.1:0"),
        env={**clean_environment(), "PYTHONPATH": os.pathsep.join(path), **environ},
        cwd=cwd,
        stderr=asyncio.subprocess.PIPE,
    )
    assert process.stderr
    said = ""
    while (found := re.search(r"Running on http://127\.0\.0\.1:(\d+)", said)) is None:
        line = await asyncio.wait_for(process.stderr.readline(), 60)
        assert line, said
        said += line.decode()
    host = Host(process, int(found[1]))
    try:
        yield host
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGTERM)
        await asyncio.wait_for(process.wait(), 60)
        await host.reader


def keyed_app() -> Quart:
    """A host whose users have API keys, some of which do harm."""
    app = Quart(__name__)
    app.config.from_prefixed_env()
    chat = QuartChat(app)
    app.register_blueprint(websocket_blueprint, url_prefix="/chat")
    app.register_blueprint(sse_blueprint, url_prefix="/chat")
    app.register_blueprint(threads_blueprint, url_prefix="/chat")

    @chat.authenticate
    def by_key(connection: Request | Websocket) -> str | None:
        key = connection.headers.get("X-API-Key", "")
        if key == "crash":
            raise LookupError("the password of the database is hunter2")
        return KEYS.get(key)

    return app


def bounded_app() -> Quart:
    """A host that bounds the connections of its Hypercorn."""
    assert bound_connections()
    return create_app()


def gated_app() -> Quart:
    """A host that lets nobody in before ``/open`` was asked for, with a socket of its own."""
    app = Quart(__name__)
    app.config.from_prefixed_env()
    chat = QuartChat(app)
    app.register_blueprint(websocket_blueprint, url_prefix="/chat")
    opened = asyncio.Event()
    ended: list[BaseException | None] = []

    @chat.authenticate
    async def when_open(connection: Request | Websocket) -> str:
        await opened.wait()
        return "ada"

    @app.before_websocket
    async def not_the_banned() -> tuple[str, int] | None:
        return ("banned", 403) if "X-Banned" in websocket.headers else None

    @app.teardown_websocket
    async def count(error: BaseException | None) -> None:
        ended.append(error)

    @app.get("/ended")
    async def how_many() -> dict[str, int]:
        return {"ended": len(ended)}

    @app.post("/open")
    async def open_gate() -> tuple[str, int]:
        opened.set()
        return "", 204

    @app.websocket("/echo")
    async def echo() -> None:
        while True:
            await websocket.send(await websocket.receive())

    return app
