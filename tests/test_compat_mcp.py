"""What is used of the mcp package beyond its public interface."""

from __future__ import annotations

from typing import Any

from quart_chat.compat import mcp as compat


def test_the_installed_version_has_it() -> None:
    found = compat.problem()
    assert found is None, f"{found}. See quart_chat/compat/mcp.py for what depends on it."


async def test_the_plain_client_has_the_same_time_outs() -> None:
    async with (
        compat.http_client({"X-Key": "k"}) as theirs,
        compat.plain_http_client({"X-Key": "k"}) as plain,
    ):
        assert theirs.timeout == plain.timeout
        assert plain.headers["x-key"] == theirs.headers["x-key"] == "k"


def test_a_lost_connection_is_told_from_a_refused_call() -> None:
    from mcp.shared.exceptions import MCPError

    def error(code: int) -> Any:
        return MCPError(code=code, message="x")

    assert compat.is_connection_closed(error(compat.CLOSED_CODE))
    assert compat.is_connection_closed(OSError())
    assert not compat.is_connection_closed(error(-32602))
