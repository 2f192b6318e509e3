"""Tools that one message selected, on the server and at the client."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, Literal

from .events import ToolCalled
from .messages import ToolCall
from .tools import Tool, function_schema

logger = logging.getLogger("quart_chat.tools")


class Toolbox:
    """The tools that one message selected, on the server and at the client."""

    def __init__(
        self, tools: Iterable[Tool] = (), client: Iterable[Mapping[str, Any]] = ()
    ) -> None:
        self._server = {tool.name: tool for tool in tools}
        self._client = {spec["name"]: spec for spec in client}

    def schemas(self) -> list[dict[str, Any]]:
        """All of them in OpenAI's form."""
        return [tool.schema() for tool in self._server.values()] + [
            function_schema(spec["name"], spec["description"], spec["parameters"])
            for spec in self._client.values()
        ]

    def get(self, name: str) -> Tool | None:
        """A tool of the server, or None."""
        return self._server.get(name)

    def needs(self, call: ToolCall) -> Literal["approval", "client"] | None:
        """What a call waits for before its result can be there.

        Raises:
            Exception: Whatever the tool's own predicate raises.
        """
        if call.name in self._client:
            return "client"
        tool = self._server.get(call.name)
        return "approval" if tool is not None and tool.asks_first(call.arguments) else None

    def announce(self, calls: Sequence[ToolCall], refused: Collection[str]) -> list[ToolCalled]:
        """Return the events that say what the model calls, before any of it runs."""
        return [
            ToolCalled(
                call.id,
                call.name,
                call.arguments,
                None if call.id in refused else self._needs_now(call),
            )
            for call in calls
        ]

    def _needs_now(self, call: ToolCall) -> Literal["approval", "client"] | None:
        try:
            return self.needs(call)
        except Exception:
            logger.exception("the approval predicate of %s failed", call.name)
            return "approval"
