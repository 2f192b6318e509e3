"""Tools of MCP servers, by the official package."""

from __future__ import annotations

import asyncio
import logging
import re
from contextlib import AsyncExitStack
from typing import Any

from ..config import MCPServer
from ..core.tools import Tool, ToolContext, ToolError, ToolRegistry
from ..errors import ConfigurationError

logger = logging.getLogger("quart_chat.mcp")

FIRST_PAUSE = 0.5
LONGEST_PAUSE = 30.0
START_SECONDS = 30

CONNECTION_CLOSED = -32000
"""The MCP package's own error code for a server that is gone."""


class MCPTools:
    """Stays connected to one server and registers its tools as ``<server>_<tool>``."""

    def __init__(self, name: str, server: MCPServer, tools: ToolRegistry) -> None:
        self._name = name
        self._server = server
        self._tools = tools
        self._names: list[str] = []
        self._session: Any = None
        self._lost = asyncio.Event()
        self._ready = asyncio.Event()
        self._failure: Exception | None = None
        self._task: asyncio.Task[None] | None = None

    async def open(self) -> None:
        """Connect, and register the tools.

        Raises:
            ConfigurationError: The extra is missing, or the server can not be reached.
        """
        try:
            import mcp  # noqa: F401
        except ImportError:
            raise ConfigurationError(
                "CHAT_MCP_SERVERS: it needs the package mcp. Run: pip install 'quart-chat[mcp]'"
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
                f"CHAT_MCP_SERVERS ({self._name}): the server can not be used "
                f"({_reason(self._failure)})."
            )

    async def close(self) -> None:
        """Disconnect."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _stay_connected(self) -> None:
        pause = FIRST_PAUSE
        while True:
            try:
                async with AsyncExitStack() as stack:
                    await self._connect(stack)
                    pause = FIRST_PAUSE
                    await self._lost.wait()
            except Exception as error:
                if not self._ready.is_set():
                    self._failure = error
                    self._ready.set()
                    return
                logger.warning("the MCP server %s is away: %s", self._name, _reason(error))
            finally:
                self._session = None
            await asyncio.sleep(pause)
            pause = min(pause * 2, LONGEST_PAUSE)

    async def _connect(self, stack: AsyncExitStack) -> None:
        from mcp import ClientSession, StdioServerParameters, stdio_client
        from mcp.client.streamable_http import streamable_http_client
        from mcp.shared._httpx_utils import create_mcp_http_client

        server = self._server
        if server.command is not None:
            parameters = StdioServerParameters(
                command=server.command, args=list(server.args), env=server.env
            )
            streams = await stack.enter_async_context(stdio_client(parameters))
        else:
            assert server.url is not None
            http = await stack.enter_async_context(create_mcp_http_client(headers=server.headers))
            streams = await stack.enter_async_context(
                streamable_http_client(server.url, http_client=http)
            )
        session = await stack.enter_async_context(ClientSession(streams[0], streams[1]))
        await session.initialize()
        self._register(await session.list_tools())
        self._lost.clear()
        self._session = session
        self._ready.set()

    def _register(self, listed: Any) -> None:
        found = [self._tool(each) for each in listed.tools]
        self._tools.replace(self._names, found)
        self._names = [tool.name for tool in found]

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
            raise ToolError(f"The tool's server ({self._name}) is away at the moment.")
        try:
            result = await self._session.call_tool(remote, arguments)
        except Exception as error:
            code = getattr(getattr(error, "error", None), "code", None)
            if code in (None, CONNECTION_CLOSED):
                self._lost.set()
            logger.warning("a call to the MCP server %s failed: %s", self._name, _reason(error))
            raise ToolError(f"The tool's server ({self._name}) failed.") from None
        words = "\n".join(
            part.text if part.type == "text" else f"[{part.type}]" for part in result.content
        )
        if getattr(result, "is_error", False) or getattr(result, "isError", False):
            raise ToolError(words or "The tool failed.")
        return words


def _reason(error: BaseException) -> str:
    if isinstance(error, BaseExceptionGroup):
        return _reason(error.exceptions[0])
    return f"{type(error).__name__}: {str(error)[:200]}"
