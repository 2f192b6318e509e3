"""Tools for servers under test, loaded with ``--tools tools_for_tests``.

They meet the tests at files in the server's working directory: ``<mark>.started`` says that a call
runs, ``<mark>.go`` lets it go on.
"""

from __future__ import annotations

import asyncio
import sys
import time
from enum import Enum
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field

from quart_chat import ToolContext, ToolError, tool


@tool
def add(a: int, b: int = 0) -> int:
    """Add two numbers."""
    return a + b


@tool
async def failing(how: str = "value") -> str:
    """Fail in one of several ways."""
    match how:
        case "sentence":
            raise ToolError("The shop is closed.")
        case "exit":
            sys.exit(3)
        case "cancelled":
            raise asyncio.CancelledError
        case "timeout":
            raise TimeoutError("the database password is hunter2")
        case _:
            raise ValueError("the database password is hunter2")


@tool
def failing_in_thread(how: str = "value") -> str:
    """Fail in a thread."""
    if how == "exit":
        sys.exit(3)
    raise ValueError("the database password is hunter2")


@tool
async def slow(mark: str) -> str:
    """Wait until a file appears, and leave a trace where that is given up."""
    Path(f"{mark}.started").touch()
    try:
        while not Path(f"{mark}.go").exists():
            await asyncio.sleep(0.01)
    except asyncio.CancelledError:
        Path(f"{mark}.cancelled").touch()
        raise
    return f"waited for {mark}"


@tool
def blocking(mark: str) -> str:
    """Hold a thread until a file appears."""
    Path(f"{mark}.started").touch()
    while not Path(f"{mark}.go").exists():
        time.sleep(0.01)
    return f"blocked for {mark}"


@tool
async def progress(context: ToolContext, steps: int = 3) -> str:
    """Say how far it is, the last time just before the end."""
    for step in range(1, steps + 1):
        context.progress(f"{step} of {steps}")
    return f"{steps} steps for {context.user} in {context.thread_id}"


@tool
def progress_in_thread(context: ToolContext) -> str:
    """Say from a thread how far it is."""
    context.progress("one")
    context.progress("two")
    return context.run_id


@tool(needs_approval=True)
def pay(amount: int, mark: str = "paid") -> str:
    """Pay, once a person has agreed; a line in a file for every time it was done."""
    with Path(f"{mark}.txt").open("a") as file:
        file.write(f"{amount}\n")
    return f"paid {amount}"


@tool(needs_approval=lambda arguments: arguments["amount"] > 100)
def tip(amount: int) -> str:
    """Give a tip; more than 100 only with approval."""
    return f"tipped {amount}"


@tool
def count(mark: str) -> str:
    """Leave a line in a file for every time it ran."""
    with Path(f"{mark}.txt").open("a") as file:
        file.write("ran\n")
    return "counted"


@tool
def big(chars: int) -> str:
    """Say a lot."""
    return "x" * chars


@tool
def strange(kind: str) -> Any:
    """Return what is not easily made text of."""
    circle: list[Any] = []
    circle.append(circle)
    values: dict[str, Any] = {
        "circle": circle,
        "bytes": b"\xff\xfe",
        "half": {"text": "\ud800"},
        "nul": "a\0b",
        "object": object(),
        "nan": float("nan"),
        "none": None,
        "set": {1},
        "model": Address(street="Main", city="Bonn"),
    }
    return values[kind]


@tool(users=lambda user: user == "nobody")
def forbidden() -> str:
    """Be there for nobody."""
    return "never"


class Speed(Enum):
    """How fast."""

    slow = "slow"
    fast = "fast"


class Address(BaseModel):
    """Where somebody lives."""

    street: str
    city: str = Field(description="The town's name")


@tool
def deliver(
    address: Address,
    speed: Speed = Speed.slow,
    notes: str | None = None,
    items: list[str] = ["letter"],  # noqa: B006
) -> str:
    """Deliver things.

    They come by bicycle.

    Args:
        address: Where they go.
        speed: How fast they
            have to be there.
        notes: What the bell sounds like.
        items: What is delivered.

    Returns:
        A receipt.
    """
    assert isinstance(address, Address)
    assert isinstance(speed, Speed)
    return f"{'+'.join(items)} to {address.street}, {address.city}, {speed.value}, {notes}"
