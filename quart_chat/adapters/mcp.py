"""Tools of MCP servers, through the official package."""

from __future__ import annotations

import asyncio
import logging
import re
from contextlib import AsyncExitStack
from typing import Any

from ..compat.mcp import http_client, is_connection_closed
from ..config import MCPServer, install_command
from ..core.tools import Tool, ToolContext, ToolError, ToolRegistry
from ..errors import ConfigurationError

logger = logging.getLogger("quart_chat.mcp")

FIRST_PAUSE = 0.5
LONGEST_PAUSE = 30.0
START_SECONDS = 30
MAX_PAGES = 100
"""Bounds for connecting, and for the pages of a server's list of tools."""


class MCPTools:
    """Connection to one MCP server, whose tools are registered as ``<server>_<tool>``."""

    def __init__(self, name: str, server: MCPServer, tools: ToolRegistry) -> None:
        self._name = name
        self._server = server
        self._tools = tools
        self._names: list[str] = []
        self._session: Any = None
        self._changed = asyncio.Event()
        self._lost = False
        self._ready = asyncio.Event()
        self._failure: Exception | None = None
        self._task: asyncio.Task[None] | None = None

    async def open(self) -> None:
        """Connect, and register the tools.

        Raises:
            ConfigurationError: The extra is missing, or the server cannot be reached.
        """
        try:
            import mcp  # noqa: F401
        except ImportError:
            raise ConfigurationError(
                f"CHAT_MCP_SERVERS needs the package mcp. Run: {install_command('mcp')}"
            ) from None
        self._task = asyncio.create_task(
            self._stay_connected(), name=f"quart_chat mcp {self._name}"
        )
        try:
            async with asyncio.timeout(START_SECONDS):
                await self._ready.wait()
        except TimeoutError:
            self._failure = TimeoutError(f"no answer in {START_SECONDS} s")
        if self._failure is not None:
            await self.close()
            raise ConfigurationError(
                f"CHAT_MCP_SERVERS ({self._name}): the server cannot be used "
                f"({_reason(self._failure)})."
            )

    async def close(self) -> None:
        """Disconnect, and unregister the tools."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        self._register([])

    async def _stay_connected(self) -> None:
        pause = FIRST_PAUSE
        while True:
            try:
                async with AsyncExitStack() as stack:
                    async with asyncio.timeout(START_SECONDS):
                        session = await self._connect(stack)
                    pause = FIRST_PAUSE
                    await self._listen(session)
            except Exception as error:
                if not self._ready.is_set():
                    self._failure = error
                    self._ready.set()
                    return
                logger.warning("MCP server %s is not connected: %s", self._name, _reason(error))
            finally:
                self._session = None
            await asyncio.sleep(pause)
            pause = min(pause * 2, LONGEST_PAUSE)

    async def _connect(self, stack: AsyncExitStack) -> Any:
        from mcp import ClientSession, StdioServerParameters, stdio_client
        from mcp.client.streamable_http import streamable_http_client

        server = self._server
        if server.command is not None:
            parameters = StdioServerParameters(
                command=server.command, args=list(server.args), env=server.env
            )
            streams = await stack.enter_async_context(stdio_client(parameters))
        else:
            assert server.url is not None
            http = await stack.enter_async_context(http_client(server.headers))
            streams = await stack.enter_async_context(
                streamable_http_client(server.url, http_client=http)
            )
        session = await stack.enter_async_context(
            ClientSession(streams[0], streams[1], message_handler=self._heard)
        )
        self._lost = False
        self._changed.clear()
        await session.initialize()
        self._register(await _all_tools(session))
        self._session = session
        self._ready.set()
        return session

    async def _heard(self, message: Any) -> None:
        inner = getattr(message, "root", message)
        if getattr(inner, "method", None) == "notifications/tools/list_changed":
            self._changed.set()

    async def _listen(self, session: Any) -> None:
        """Read the list of tools again whenever it changes, until the connection is lost."""
        while True:
            await self._changed.wait()
            if self._lost:
                return
            self._changed.clear()
            async with asyncio.timeout(START_SECONDS):
                self._register(await _all_tools(session))

    def _lose(self) -> None:
        self._lost = True
        self._changed.set()

    def _register(self, listed: list[Any]) -> None:
        tools = {tool.name: tool for tool in map(self._tool, listed)}
        for name in tools.keys() & (set(self._tools.names()) - set(self._names)):
            raise ValueError(f"There are two tools named {name!r}.")
        self._tools.replace(self._names, list(tools.values()))
        self._names = list(tools)

    def _tool(self, described: Any) -> Tool:
        remote = described.name

        async def invoke(context: ToolContext, arguments: dict[str, Any]) -> str:
            return await self._call(remote, arguments)

        schema = getattr(described, "input_schema", None) or getattr(described, "inputSchema", {})
        return Tool(
            name=re.sub(r"[^a-zA-Z0-9_-]", "_", f"{self._name}_{remote}")[:64],
            description=described.description or "",
            parameters=dict(schema),
            invoke=invoke,
            needs_approval=self._server.needs_approval,
        )

    async def _call(self, remote: str, arguments: dict[str, Any]) -> str:
        if self._session is None:
            raise ToolError(f"The MCP server {self._name} is not connected.")
        try:
            result = await self._session.call_tool(remote, arguments)
        except Exception as error:
            if is_connection_closed(error):
                self._lose()
            logger.warning("a call to the MCP server %s failed: %s", self._name, _reason(error))
            raise ToolError(f"The MCP server {self._name} failed.") from None
        text = "\n".join(
            part.text if part.type == "text" else f"[{part.type}]" for part in result.content
        )
        if getattr(result, "is_error", False) or getattr(result, "isError", False):
            raise ToolError(text or "The tool failed.")
        return text


async def _all_tools(session: Any) -> list[Any]:
    """Return the tools of all pages of a server's list."""
    from mcp.types import PaginatedRequestParams

    tools: list[Any] = []
    cursor: str | None = None
    for _ in range(MAX_PAGES):
        page = await session.list_tools(params=PaginatedRequestParams(cursor=cursor))
        tools += page.tools
        cursor = getattr(page, "next_cursor", None)
        if not cursor:
            break
    return tools


def _reason(error: BaseException) -> str:
    if isinstance(error, BaseExceptionGroup):
        return _reason(error.exceptions[0])
    return f"{type(error).__name__}: {str(error)[:200]}"
