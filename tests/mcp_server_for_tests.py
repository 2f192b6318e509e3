"""An MCP server of the official package, as a process: over stdio, or HTTP on the port given."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from mcp.server.mcpserver import MCPServer
from mcp.server.mcpserver.exceptions import ToolError

server = MCPServer("for tests", log_level="ERROR")


@server.tool()
def multiply(a: int, b: int = 2) -> int:
    """Multiply two numbers."""
    return a * b


@server.tool()
def broken() -> str:
    """Fail."""
    raise ToolError("The shelf is empty.")


@server.tool()
def whoami() -> str:
    """The process that answers."""
    return str(os.getpid())


@server.tool(name="files.read")
def read(path: str) -> str:
    """Have a name that MCP allows and models' providers do not."""
    return f"contents of {path}"


@server.tool()
async def hang(mark: str) -> str:
    """Answer never."""
    import asyncio

    Path(f"{mark}.started").touch()
    await asyncio.Event().wait()
    return "never"


if __name__ == "__main__":
    if len(sys.argv) > 1:
        server.run("streamable-http", host="127.0.0.1", port=int(sys.argv[1]))
    else:
        server.run()
