"""The connection to an MCP server: pages of tools, changes of the list, hangs, a second start."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import SECONDS

from quart_chat.adapters import mcp
from quart_chat.config import MCPServer
from quart_chat.core.tools import ToolRegistry, tool

SCRIPT = str(Path(__file__).parent / "mcp_pages_for_tests.py")
ALL = {f"p_tool{number}" for number in range(25)} | {"p_grow", "p_whoami"}


def server(*arguments: str) -> MCPServer:
    return MCPServer(command=sys.executable, args=(SCRIPT, *arguments))


async def eventually(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(SECONDS):
        while not holds():
            await asyncio.sleep(0.01)


async def call(tools: ToolRegistry, name: str) -> Any:
    (found,) = tools.choose("u", [name])
    return await found.invoke(None, {})  # type: ignore[arg-type]


async def test_every_page_is_read_and_a_change_is_heard() -> None:
    tools = ToolRegistry()
    source = mcp.MCPTools("p", server(), tools)
    await source.open()
    try:
        assert set(tools.names()) == ALL
        await call(tools, "p_grow")
        await eventually(lambda: "p_grown" in tools.names())
        assert set(tools.names()) == ALL - {"p_tool0"} | {"p_grown"}
        assert await call(tools, "p_grown") == "grown"
    finally:
        await source.close()
    assert tools.names() == []


async def test_a_registry_can_be_served_twice() -> None:
    tools = ToolRegistry()
    for _ in range(2):
        source = mcp.MCPTools("p", server(), tools)
        await source.open()
        assert set(tools.names()) == ALL
        await source.close()


async def test_a_tool_of_the_application_is_not_replaced() -> None:
    @tool(name="p_tool3")
    def own() -> str:
        """Belong to the application."""
        return "own"

    tools = ToolRegistry([own])
    source = mcp.MCPTools("p", server(), tools)
    with pytest.raises(mcp.ConfigurationError, match="two tools named 'p_tool3'"):
        await source.open()
    assert tools.names() == ["p_tool3"]


async def test_a_reconnect_that_hangs_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tools = ToolRegistry()
    starts = tmp_path / "starts"
    source = mcp.MCPTools("p", server(str(starts)), tools)
    await source.open()
    monkeypatch.setattr(mcp, "START_SECONDS", 4)
    try:
        os.kill(int(await call(tools, "p_whoami")), signal.SIGKILL)
        with pytest.raises(mcp.ToolError):
            await call(tools, "p_whoami")
        await eventually(lambda: len(starts.read_text().splitlines()) == 3)
        await eventually(lambda: source._session is not None)
        assert int(await call(tools, "p_whoami"))
    finally:
        await source.close()
