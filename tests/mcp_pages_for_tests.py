"""An MCP server over stdio whose list of tools has pages and grows; it may begin with a silence.

With a file's path as argument, the second process of that path says nothing.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from pathlib import Path
from typing import Any

import mcp_types as types
from mcp.server.lowlevel.server import NotificationOptions, Server
from mcp.server.stdio import stdio_server

PAGE = 10
names = [f"tool{number}" for number in range(25)] + ["grow", "whoami"]


async def list_tools(context: Any, params: Any) -> types.ListToolsResult:
    start = int(params.cursor) if params is not None and params.cursor else 0
    page = [
        types.Tool(name=name, description=name, input_schema={"type": "object"})
        for name in names[start : start + PAGE]
    ]
    following = start + PAGE
    return types.ListToolsResult(
        tools=page, next_cursor=str(following) if following < len(names) else None
    )


async def call_tool(context: Any, params: Any) -> types.CallToolResult:
    if params.name == "grow":
        names.append("grown")
        names.remove("tool0")
        await context.session.send_tool_list_changed()
    text = str(os.getpid()) if params.name == "whoami" else params.name
    return types.CallToolResult(content=[types.TextContent(type="text", text=text)])


async def main() -> None:
    server: Any = Server("pages", on_list_tools=list_tools, on_call_tool=call_tool)
    options = server.create_initialization_options(NotificationOptions(tools_changed=True))
    async with stdio_server() as (read, write):
        await server.run(read, write, options)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        starts = Path(sys.argv[1])
        with starts.open("a") as file:
            file.write("started\n")
        if len(starts.read_text().splitlines()) == 2:
            while sys.stdin.read(1):
                time.sleep(0)
    asyncio.run(main())
