"""The end of the process: signals, answers, tools that do not end, and clients that do not read."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import time
from pathlib import Path
from typing import Any

import pytest
import websockets
from conftest import SECONDS, Serve, Server, connect, providers
from endpoint import END, Endpoint, Exchange, calls, text
from hosts import hypercorn

SLACK = 5
"""Seconds after the drain's time in which the process has to be gone."""

TOOLS = '''
import asyncio, os, time
from pathlib import Path
from quart_chat import tool

@tool
async def block() -> str:
    """Block the event loop."""
    Path("began").touch()
    time.sleep(600)

@tool
async def swallow() -> str:
    """Go on, whoever cancels."""
    Path("began").touch()
    while True:
        try:
            await asyncio.sleep(600)
        except asyncio.CancelledError:
            pass

@tool
def stay() -> str:
    """Occupy a thread."""
    Path("began").touch()
    time.sleep(600)
'''


async def until(condition: Any) -> None:
    async with asyncio.timeout(SECONDS):
        while not condition():
            await asyncio.sleep(0.02)


async def in_a_tool(serve: Serve, endpoint: Endpoint, folder: Path, tool: str) -> Server:
    """Start a server, and an answer that is in a tool."""

    async def call(exchange: Exchange) -> None:
        await exchange.send(calls(("c1", tool, {})))

    endpoint.scripts["call"] = call
    (folder / "stubborn.py").write_text(TOOLS)
    server: Server = await serve("--tools", "stubborn", cwd=folder, drain_timeout=1)
    async with connect(server, close_timeout=0.1) as client:
        await client.send({"content": "script:call", "tools": [tool]})
        await until((folder / "began").exists)
    return server


async def ended(server: Server, seconds: float) -> int:
    """Return the exit code of a server that has so long to end."""
    async with asyncio.timeout(seconds + 1):  # the machine may be busy
        return await server.process.wait()


@pytest.mark.parametrize("tool", ["block", "swallow", "stay"])
async def test_a_tool_cannot_keep_the_process(
    serve: Serve, endpoint: Endpoint, tmp_path: Path, tool: str
) -> None:
    server = await in_a_tool(serve, endpoint, tmp_path, tool)
    server.process.send_signal(signal.SIGTERM)
    code = await ended(server, 1 + SLACK)
    if tool == "stay":
        assert code == 0
    await server.stop(0)
    if tool == "block":
        assert code == 1
        assert "did not end in time" in server.log()


async def test_a_second_signal_ends_a_blocked_process_at_once(
    serve: Serve, endpoint: Endpoint, tmp_path: Path
) -> None:
    server = await in_a_tool(serve, endpoint, tmp_path, "block")
    server.process.send_signal(signal.SIGINT)
    server.process.send_signal(signal.SIGTERM)
    began = time.monotonic()
    await ended(server, SLACK)
    assert time.monotonic() - began < SLACK


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
async def test_a_signal_says_what_it_waits_for(
    serve: Serve, endpoint: Endpoint, number: signal.Signals
) -> None:
    server = await serve(drain_timeout=60)
    endpoint.gates.pop("go", None)
    async with connect(server) as client:
        await client.send({"content": "script:gated"})
        await client.until("content")
        server.process.send_signal(number)
        line = "Waiting up to 60 s for 1 answer; press Ctrl-C again to end now."
        await until(lambda: line in server.log())
        endpoint.gate("go").set()
        assert (await client.until("end"))[-1]["status"] == "completed"
        await client.connection.wait_closed()
        assert client.connection.close_code == 1001
    assert await server.stop(0) == 0


async def test_a_socket_that_does_not_read_does_not_keep_the_process(
    serve: Serve, endpoint: Endpoint
) -> None:
    async def flood(exchange: Exchange) -> None:
        for _ in range(400):
            await exchange.send(text("x" * 20_000))
        await exchange.send(END)

    endpoint.scripts["flood"] = flood
    server = await serve(drain_timeout=1)
    async with connect(server) as reader:
        await reader.send({"content": "script:flood", "thread_id": "t"})
        run = (await reader.until("start"))[-1]["run_id"]
        with socket.socket() as deaf:
            deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            deaf.connect((server.host, server.port))
            request = f"GET /chat/sse?run_id={run} HTTP/1.1\r\nHost: {server.host}\r\n\r\n"
            deaf.sendall(request.encode())
            assert deaf.recv(12) == b"HTTP/1.1 200"
            await reader.until("end")
            began = time.monotonic()
            assert await server.stop() == 0
            assert time.monotonic() - began < 1 + SLACK
    assert "Traceback" not in server.log(), server.log()


@pytest.mark.parametrize("application", ["quart_chat:create_app()", "hosts:bounded_app()"])
async def test_a_host_s_shutdown_closes_sockets_with_1001(
    endpoint: Endpoint, tmp_path: Path, application: str
) -> None:
    tests = Path(__file__).parent
    environ = {"QUART_CHAT_PROVIDERS": json.dumps(providers(endpoint))}
    async with hypercorn(application, tests, tmp_path, environ) as host:
        async with websockets.connect(host.ws, proxy=None) as client:
            await client.send('{"type": "ping"}')
            assert json.loads(await asyncio.wait_for(client.recv(), SECONDS)) == {"type": "pong"}
            host.process.send_signal(signal.SIGTERM)
            await asyncio.wait_for(client.wait_closed(), SECONDS)
            assert client.close_code == 1001
        await asyncio.wait_for(host.process.wait(), SECONDS)
    assert "Traceback" not in host.log(), host.log()
