"""The mcp package: the HTTP client that its transports expect, and the code of a lost connection.

Checked with mcp 2.0 to 2.3; ``pyproject.toml`` allows 2.x. The client's time-outs come from a
private module. If a version has moved it, a plain ``httpx2.AsyncClient`` with the same time-outs is
used instead.
"""

from __future__ import annotations

from typing import Any

CONNECT_SECONDS = 30.0
READ_SECONDS = 300.0
CLOSED_CODE = -32000


def problem() -> str | None:
    """Return what this version of the package lacks, or None."""
    from importlib.metadata import version

    try:
        from mcp.shared._httpx_utils import create_mcp_http_client  # noqa: F401
    except ImportError:
        return f"mcp {version('mcp')} has no create_mcp_http_client in mcp.shared._httpx_utils"
    try:
        from mcp_types import CONNECTION_CLOSED
    except ImportError:
        return f"mcp {version('mcp')}: mcp_types has no CONNECTION_CLOSED"
    if CONNECTION_CLOSED != CLOSED_CODE:
        return f"mcp {version('mcp')}: CONNECTION_CLOSED is {CONNECTION_CLOSED}, not {CLOSED_CODE}"
    return None


def http_client(headers: dict[str, str] | None) -> Any:
    """Return an HTTP client for the streamable HTTP transport."""
    try:
        from mcp.shared._httpx_utils import create_mcp_http_client
    except ImportError:
        return plain_http_client(headers)
    return create_mcp_http_client(headers=headers)


def plain_http_client(headers: dict[str, str] | None) -> Any:
    """Return the same client without the package's help."""
    import httpx2

    timeout = httpx2.Timeout(CONNECT_SECONDS, read=READ_SECONDS)
    return httpx2.AsyncClient(headers=headers, timeout=timeout)


def is_connection_closed(error: Exception) -> bool:
    """Return whether a failed call means that the server's connection is gone."""
    code = getattr(getattr(error, "error", None), "code", None)
    return code is None or code == CLOSED_CODE
