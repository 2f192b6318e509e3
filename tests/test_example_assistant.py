"""The assistant of the examples, as its reader runs it: a server, and a client in a terminal."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from conftest import SECONDS, clean_environment, providers
from endpoint import END, Endpoint, Exchange, calls, text
from hosts import hypercorn
from transcript import check_request

EXAMPLES = Path(__file__).parent.parent / "examples"


class Terminal:
    """The client's standard input and output."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process

    async def type(self, line: str) -> None:
        assert self.process.stdin
        self.process.stdin.write(line.encode() + b"\n")
        await self.process.stdin.drain()

    async def shows(self, ending: str) -> str:
        """What is shown, up to and with an ending."""
        assert self.process.stdout
        shown = await asyncio.wait_for(self.process.stdout.readuntil(ending.encode()), SECONDS)
        return shown.decode()


@pytest.fixture
async def host(tmp_path: Path, endpoint: Endpoint) -> AsyncIterator[Any]:
    environ = {"QUART_CHAT_PROVIDERS": json.dumps(providers(endpoint))}
    async with hypercorn("assistant:app", EXAMPLES, tmp_path, environ) as host:
        yield host
    assert "Traceback" not in host.log(), host.log()
    for body in endpoint.requests:
        check_request(body)


@asynccontextmanager
async def terminal(host: Any) -> AsyncIterator[Terminal]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, str(EXAMPLES / "assistant.py"), host.ws),
        env=clean_environment(),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        yield Terminal(process)
        assert process.stdin
        process.stdin.close()
        assert await asyncio.wait_for(process.wait(), SECONDS) == 0
        assert process.stderr
        assert await process.stderr.read() == b""
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


def once(endpoint: Endpoint, script: str, final: str, name: str, **arguments: Any) -> None:
    """A script that calls a tool, and says something after its result."""

    async def play(exchange: Exchange) -> None:
        if exchange.body["messages"][-1]["role"] == "tool":
            await exchange.send(text(final) + END)
        else:
            number = len(exchange.body["messages"])
            await exchange.send(text("Just a moment.") + calls((f"c{number}", name, arguments)))

    endpoint.scripts[script] = play


async def test_the_assistant_keeps_errands_and_asks_first(host: Any, endpoint: Endpoint) -> None:
    once(endpoint, "write", "Done.", "add_errand", what="Buy bread", due="2030-05-01")
    once(endpoint, "cross", "As you wish.", "cross_out", number=1)
    once(endpoint, "beyond", "I see.", "cross_out", number=7)
    once(endpoint, "list", "That is all.", "list_errands")
    async with terminal(host) as user:
        await user.shows("You: ")
        await user.type("script:write")
        shown = await user.shows("You: ")
        assert shown.startswith("Just a moment.")
        assert "[add_errand: Written down: Buy bread (by 2030-05-01)]" in shown
        assert shown.endswith("Done.\n\nYou: ")
        await user.type("script:cross")
        assert "May I call cross_out(number=1)?" in await user.shows("[y/N] ")
        await user.type("n")
        assert "[cross_out: The user refused the call.]" in await user.shows("You: ")
        await user.type("script:list")
        assert "1. Buy bread (by 2030-05-01)" in await user.shows("You: ")
        await user.type("script:cross")
        await user.shows("[y/N] ")
        await user.type("y")
        assert "[cross_out: Crossed out: Buy bread (by 2030-05-01)]" in await user.shows("You: ")
        await user.type("script:beyond")
        await user.shows("[y/N] ")
        await user.type("yes")
        assert "There is no errand 7; there are 0." in await user.shows("You: ")
    first = endpoint.requests[0]
    assert first["messages"][0]["role"] == "system"
    described = {tool["function"]["name"]: tool["function"] for tool in first["tools"]}
    assert described.keys() == {"list_errands", "add_errand", "cross_out"}
    assert set(described["add_errand"]["parameters"]["properties"]) == {"what", "due"}


async def test_text_is_shown_as_it_comes(host: Any, endpoint: Endpoint) -> None:
    async with terminal(host) as user:
        await user.type("script:gated")
        await user.shows("first ")
        endpoint.gate("go").set()
        await user.shows("second\n\nYou: ")
        await user.type("script:broken")
        assert "\nYou: " in await user.shows("You: ")
