"""Providers and tools of a simulated world: whatever real ones do, and what they should not."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import AsyncGenerator, Iterator, Sequence

from simloom import draw

from quart_chat.core.ports import (
    CallDelta,
    Delta,
    FinishDelta,
    ProviderRequest,
    TextDelta,
    UsageDelta,
)
from quart_chat.core.tools import Tool, ToolContext, ToolRegistry, tool
from quart_chat.errors import ProviderError

KINDS = ("text", "text", "text", "calls", "error", "cancelled", "silent", "endless", "stubborn")


class SimulatedProvider:
    """Answers as the draw says; every piece of text is another."""

    def __init__(self, numbers: Iterator[int]) -> None:
        self._numbers = numbers

    async def stream(self, request: ProviderRequest) -> AsyncGenerator[Sequence[Delta], None]:
        kind = KINDS[draw("provider.kind", len(KINDS))]
        if request.tools and draw("provider.calls", 2):
            kind = "calls"
        for _ in range(draw("provider.deltas", 5)):
            yield [self._text()]
            await self._pause()
        if kind == "error":
            raise ProviderError
        if kind == "cancelled":
            raise asyncio.CancelledError
        if kind == "silent":
            await asyncio.sleep(1000)
        while kind == "endless":
            yield [self._text()]
            await asyncio.sleep(0.5)
        if kind == "stubborn":
            try:
                await asyncio.sleep(4)
            except asyncio.CancelledError:
                await asyncio.sleep(draw("provider.stubborn", 6))
                raise
        if kind == "calls" and request.tools:
            yield self._calls(request)
        yield [UsageDelta(1, 2), FinishDelta("stop")]

    def _text(self) -> TextDelta:
        return TextDelta(f"{next(self._numbers)} ", reasoning=not draw("provider.reasoning", 6))

    def _calls(self, request: ProviderRequest) -> list[Delta]:
        deltas: list[Delta] = []
        for index in range(1 + draw("provider.parallel", 3)):
            number = next(self._numbers)
            chosen = request.tools[draw("provider.tool", len(request.tools))]
            name = chosen["function"]["name"]
            arguments = json.dumps({} if name == "page" else {"n": number})
            deltas.append(CallDelta(index, f"call_{number}", name, arguments))
        return deltas

    async def _pause(self) -> None:
        match draw("provider.pause", 4):
            case 1:
                await asyncio.sleep(0)
            case 2:
                await asyncio.sleep(0.1)
            case 3:
                await asyncio.sleep(1)


def simulated_tools(paid: Counter[tuple[str, str]], acting: asyncio.Event) -> ToolRegistry:
    """Return a tool that looks something up, and one that acts and needs an approval.

    ``acting`` is set while the latter acts.
    """

    @tool
    async def look(n: int) -> str:
        """Look something up."""
        await asyncio.sleep(draw("tool.seconds", 8))
        return f"seen {n}"

    @tool(needs_approval=True)
    async def pay(n: int, context: ToolContext) -> str:
        """Pay."""
        paid[context.run_id, context.tool_call_id] += 1
        acting.set()
        await asyncio.sleep(draw("tool.seconds", 3))
        return f"paid {n}"

    tools: list[Tool] = [look, pay]
    return ToolRegistry(tools)
