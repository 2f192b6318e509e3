"""Tools, directly: bounds on calls and threads, results as they come."""

from __future__ import annotations

import asyncio
import threading

from core import calls, codes, core, end_of, eventually

from quart_chat import tool
from quart_chat.core.events import ToolReturned
from quart_chat.core.parts import Parts
from quart_chat.core.tool_threads import ToolThreads


def returned(events: object) -> dict[str, tuple[str, bool]]:
    return {
        event.tool_call_id: (event.content, event.is_error)
        for event in events  # type: ignore[attr-defined]
        if isinstance(event, ToolReturned)
    }


async def test_a_result_is_there_before_slower_ones() -> None:
    gate = asyncio.Event()

    @tool
    async def slow() -> str:
        """Wait."""
        await gate.wait()
        return "slow"

    @tool
    async def fast() -> str:
        """Return."""
        return "fast"

    house = core(calls("slow", "fast"), tools=[slow, fast])
    sent = await house.send(tools=["slow", "fast"])
    await house.until(sent, ToolReturned)
    gate.set()
    events = await house.events(sent)
    results = [event.content for event in events if isinstance(event, ToolReturned)]
    assert results == ["fast", "slow"]
    tools = [m.content for m in await house.messages() if m.role == "tool"]
    assert tools == ["slow", "fast"], "stored in the order of the calls"


async def test_calls_beyond_the_bound_get_an_error() -> None:
    made = []

    @tool
    async def count() -> str:
        """Count."""
        made.append(1)
        return "counted"

    house = core(calls(*["count"] * 5), tools=[count], max_tool_calls=3)
    events = await house.events(await house.send(tools=["count"]))
    assert end_of(events).status == "completed"
    assert len(made) == 3
    results = returned(events)
    assert [is_error for _, is_error in results.values()].count(True) == 2
    assert "one round may have 3 calls" in results["c4"][0]


async def test_the_last_allowed_round_of_tools_is_no_failure() -> None:
    @tool
    async def look() -> str:
        """Look."""
        return "seen"

    house = core(calls("look"), tools=[look], max_tool_rounds=1)
    events = await house.events(await house.send(tools=["look"]))
    assert (codes(events), end_of(events).status) == ([], "completed")


async def test_threads_of_tools_are_bounded_and_a_stuck_one_keeps_its_place() -> None:
    gate, running, most = threading.Event(), 0, 0
    lock = threading.Lock()

    @tool
    def block() -> str:
        """Block a thread."""
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        gate.wait(20)
        with lock:
            running -= 1
        return "free"

    house = core(calls(*["block"] * 6), tools=[block], tool_timeout=0.2)
    parts = house.parts
    object.__setattr__(parts, "tool_threads", ToolThreads(2))
    assert isinstance(parts, Parts)
    events = await house.events(await house.send(tools=["block"]))
    assert all("took over" in content for content, _ in returned(events).values())
    assert most == 2
    gate.set()
    await eventually(lambda: parts.tool_threads._free == 2)


async def test_usage_is_counted_at_the_end_of_every_round() -> None:
    @tool
    async def look() -> str:
        """Look."""
        return "seen"

    house = core(calls("look"), tools=[look])
    events = await house.events(await house.send(tools=["look"]))
    rounds = [event for event in events if event.type == "round_end"]
    assert [event.finish_reason for event in rounds] == ["tool_calls", "stop"]  # type: ignore[union-attr]
    total = sum(event.usage["completion_tokens"] for event in rounds)  # type: ignore[union-attr]
    assert end_of(events).usage["completion_tokens"] == total
