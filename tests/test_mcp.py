"""Tools of MCP servers: real server processes of the official package, over stdio and HTTP."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import SECONDS, Serve, Server, answer, connect, post, start
from endpoint import END, Endpoint, Exchange, calls, text
from transcript import check_request

SCRIPT = str(Path(__file__).parent / "mcp_server_for_tests.py")
STDIO = {"things": {"command": sys.executable, "args": [SCRIPT]}}


@pytest.fixture(autouse=True)
async def _all_that_was_sent_up_is_valid(endpoint: Endpoint) -> AsyncIterator[None]:
    yield
    for body in endpoint.requests:
        check_request(body)


@asynccontextmanager
async def over_http(port: int) -> AsyncIterator[asyncio.subprocess.Process]:
    """The MCP server on a port of loopback."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, SCRIPT, str(port), stderr=asyncio.subprocess.DEVNULL
    )
    try:
        async with asyncio.timeout(SECONDS):
            while True:
                try:
                    _, writer = await asyncio.open_connection("127.0.0.1", port)
                    break
                except OSError:
                    await asyncio.sleep(0.05)
        writer.close()
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
    return port


async def call(server: Server, endpoint: Endpoint, name: str, **arguments: Any) -> dict[str, Any]:
    """The result of a tool that the scripted model calls once."""

    async def once(exchange: Exchange) -> None:
        if exchange.body["messages"][-1]["role"] == "user":
            await exchange.send(calls(("c1", name, arguments)))
        else:
            await exchange.send(text("done") + END)

    endpoint.scripts["once"] = once
    events = await post(server, {"content": "script:once", "tools": [name]})
    assert events[-1]["status"] == "completed", events
    assert answer(events) == "done"
    (result,) = [event for event in events if event["type"] == "tool_result"]
    return result


@pytest.mark.parametrize("transport", ["stdio", "http"])
async def test_tools_are_listed_called_and_may_fail(
    serve: Serve, endpoint: Endpoint, transport: str
) -> None:
    port = free_port()
    servers: Any = STDIO if transport == "stdio" else {"things": {"url": mcp_url(port)}}
    async with over_http(port):
        server = await serve(mcp_servers=servers)
        result = await call(server, endpoint, "things_multiply", a=6, b=7)
        assert (result["content"], result["is_error"]) == ("42", False)
        (offered,) = endpoint.requests[-1]["tools"]
        assert offered["function"]["name"] == "things_multiply"
        assert offered["function"]["description"] == "Multiply two numbers."
        assert offered["function"]["parameters"]["required"] == ["a"]
        failed = await call(server, endpoint, "things_broken")
        assert failed["is_error"] is True
        assert "The shelf is empty." in failed["content"]
        wrong = await call(server, endpoint, "things_multiply", a="many")
        assert wrong["is_error"] is True
        assert "a" in wrong["content"]
        async with connect(server) as chat:
            await chat.send({"content": "x", "tools": ["multiply"]})
            assert (await chat.receive())["code"] == "unknown_tool"
        await server.stop()


def mcp_url(port: int) -> str:
    return f"http://127.0.0.1:{port}/mcp"


async def test_a_name_that_providers_refuse_is_made_one_that_they_take(
    serve: Serve, endpoint: Endpoint
) -> None:
    server = await serve(mcp_servers=STDIO)
    result = await call(server, endpoint, "things_files_read", path="a.txt")
    assert result["content"] == "contents of a.txt"


async def test_a_server_that_dies_is_started_again(serve: Serve, endpoint: Endpoint) -> None:
    server = await serve(mcp_servers=STDIO, tool_timeout=5)
    first = int((await call(server, endpoint, "things_whoami"))["content"])
    os.kill(first, signal.SIGKILL)
    async with asyncio.timeout(SECONDS):
        while (again := await call(server, endpoint, "things_whoami"))["is_error"]:
            assert "things" in again["content"] or "took over" in again["content"]
            await asyncio.sleep(0.05)
    second = int(again["content"])
    assert second != first
    assert await server.stop() == 0
    assert not psutil.pid_exists(second)


async def test_a_call_that_runs_when_its_server_dies_fails_soon(
    serve: Serve, endpoint: Endpoint, tmp_path: Path
) -> None:
    server = await serve(mcp_servers=STDIO, tool_timeout=60)
    pid = int((await call(server, endpoint, "things_whoami"))["content"])
    hanging = asyncio.ensure_future(
        call(server, endpoint, "things_hang", mark=str(tmp_path / "hang"))
    )
    async with asyncio.timeout(SECONDS):
        while not (tmp_path / "hang.started").exists():
            await asyncio.sleep(0.01)
        os.kill(pid, signal.SIGKILL)
        assert (await hanging)["is_error"] is True


async def test_a_stop_gives_up_a_call_and_keeps_the_server(
    serve: Serve, endpoint: Endpoint, tmp_path: Path
) -> None:
    server = await serve(mcp_servers=STDIO)
    pid = (await call(server, endpoint, "things_whoami"))["content"]

    async def hang(exchange: Exchange) -> None:
        await exchange.send(calls(("c1", "things_hang", {"mark": str(tmp_path / "hang")})))

    endpoint.scripts["hang"] = hang
    async with connect(server) as chat:
        await chat.send({"content": "script:hang", "tools": ["things_hang"]})
        await chat.until("tool_call")
        async with asyncio.timeout(SECONDS):
            while not (tmp_path / "hang.started").exists():
                await asyncio.sleep(0.01)
        await chat.send({"type": "stop"})
        assert (await chat.until("end"))[-1]["status"] == "stopped"
    assert (await call(server, endpoint, "things_whoami"))["content"] == pid


async def test_a_server_over_http_may_come_back(serve: Serve, endpoint: Endpoint) -> None:
    port = free_port()
    async with over_http(port) as process:
        server = await serve(mcp_servers={"things": {"url": mcp_url(port)}}, tool_timeout=5)
        assert not (await call(server, endpoint, "things_multiply", a=1))["is_error"]
        process.kill()
        await process.wait()
        assert (await call(server, endpoint, "things_multiply", a=1))["is_error"]
    async with over_http(port), asyncio.timeout(SECONDS):
        while (await call(server, endpoint, "things_multiply", a=4))["content"] != "8":
            await asyncio.sleep(0.05)
        await server.stop()


async def test_every_call_may_need_approval(serve: Serve, endpoint: Endpoint) -> None:
    server = await serve(mcp_servers={"things": {**STDIO["things"], "needs_approval": True}})

    async def once(exchange: Exchange) -> None:
        if exchange.body["messages"][-1]["role"] == "user":
            await exchange.send(calls(("c1", "things_multiply", {"a": 1})))
        else:
            await exchange.send(text("done") + END)

    endpoint.scripts["once"] = once
    async with connect(server) as chat:
        await chat.send({"content": "script:once", "tools": ["things_multiply"]})
        asked = (await chat.until("tool_call"))[-1]
        assert asked["needs"] == "approval"
        ids = {key: asked[key] for key in ("run_id", "tool_call_id")}
        await chat.send({"type": "approve", "approved": True, **ids})
        events = await chat.until("end")
    assert [e["content"] for e in events if e["type"] == "tool_result"] == ["2"]


@pytest.mark.parametrize(
    "server",
    [
        {"command": "no-such-command"},
        {"command": sys.executable, "args": ["-c", "raise SystemExit(1)"]},
        {"url": "http://127.0.0.1:9/mcp"},
    ],
    ids=["no command", "ends at once", "nobody listens"],
)
async def test_a_server_that_can_not_be_had_is_a_sentence(
    tmp_path: Path, server: dict[str, Any]
) -> None:
    async with asyncio.timeout(SECONDS):
        with pytest.raises(AssertionError) as raised:
            await start(mcp_servers={"things": server}, cwd=tmp_path)
    assert "CHAT_MCP_SERVERS (things)" in str(raised.value)
    assert "Traceback" not in str(raised.value)
