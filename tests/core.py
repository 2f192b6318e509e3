"""The core on memory or on a real SQLite file, with a provider that a test scripts."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quart_chat.adapters import stores
from quart_chat.adapters.memory import MemoryEventLog, MemoryStorage
from quart_chat.config import resolve
from quart_chat.core.commands import parse
from quart_chat.core.conversation import Conversation
from quart_chat.core.events import ContentDelta, End, Event, Failed, Stopped
from quart_chat.core.messages import Message, text_of
from quart_chat.core.models import ConfiguredProvider, ModelRegistry
from quart_chat.core.parts import Parts
from quart_chat.core.policy import Policy
from quart_chat.core.ports import CallDelta, Delta, FinishDelta, ProviderRequest, TextDelta, Window
from quart_chat.core.recovery import Recovery
from quart_chat.core.runs import Runs
from quart_chat.core.subscription import Subscription
from quart_chat.core.tools import Tool, ToolRegistry

SECONDS = 20
USER, THREAD = "u", "t"

Script = Callable[[ProviderRequest], AsyncGenerator[Sequence[Delta], None]]


def says(*pieces: str) -> Script:
    """A provider that says these pieces and ends."""

    async def script(request: ProviderRequest) -> AsyncGenerator[Sequence[Delta], None]:
        for piece in pieces:
            yield [TextDelta(piece)]
        yield [FinishDelta("stop")]

    return script


def waits(gate: asyncio.Event, before: str = "") -> Script:
    """A provider that says something, and the rest when the gate opens."""

    async def script(request: ProviderRequest) -> AsyncGenerator[Sequence[Delta], None]:
        if before:
            yield [TextDelta(before)]
        await gate.wait()
        yield [TextDelta("late"), FinishDelta("stop")]

    return script


def calls(*names: str) -> Script:
    """A provider that calls tools without arguments, and says "done" to their results."""

    async def script(request: ProviderRequest) -> AsyncGenerator[Sequence[Delta], None]:
        if request.messages[-1].role == "tool":
            yield [TextDelta("done"), FinishDelta("stop")]
            return
        yield [CallDelta(n, f"c{n}", name, "{}") for n, name in enumerate(names)]
        yield [FinishDelta("tool_calls")]

    return script


@dataclass
class ScriptedProvider:
    """Answers with one script after the other; the last one stays."""

    scripts: list[Script]
    requests: list[ProviderRequest] = field(default_factory=list)

    async def stream(self, request: ProviderRequest) -> AsyncGenerator[Sequence[Delta], None]:
        self.requests.append(request)
        script = self.scripts.pop(0) if len(self.scripts) > 1 else self.scripts[0]
        async with aclosing(script(request)) as deltas:
            async for each in deltas:
                yield each


@dataclass
class Core:
    """The services of one process."""

    parts: Parts
    runs: Runs
    conversation: Conversation
    recovery: Recovery
    provider: ScriptedProvider

    async def send(self, content: str = "hi", **more: Any) -> Subscription:
        """Send a message; fails if it is queued."""
        command: Any = parse({"content": content, "thread_id": THREAD, **more})
        sent = await self.conversation.send(USER, command)
        assert isinstance(sent, Subscription)
        return sent

    async def events(self, subscription: Subscription) -> list[Event]:
        """Follow a run to its end."""
        async with asyncio.timeout(SECONDS), aclosing(self.conversation.follow(subscription)) as p:
            return [event async for page in p for _, event in page]

    async def until(self, subscription: Subscription, kind: type[Event]) -> None:
        """Follow a run until it has said something of a kind."""
        async with asyncio.timeout(SECONDS), aclosing(self.conversation.follow(subscription)) as p:
            async for page in p:
                if any(isinstance(event, kind) for _, event in page):
                    return
        raise AssertionError(f"the run ended without {kind.__name__}")

    async def messages(self) -> list[Message]:
        """All messages of the thread."""
        window = Window(limit=1000, branch="all")
        return list(await self.parts.storage.messages(USER, THREAD, window))


def core(*scripts: Script, tools: Sequence[Tool] = (), stores: Any = None, **policy: Any) -> Core:
    """Build the services; in memory unless there are stores."""
    provider = ScriptedProvider(list(scripts) or [says("Hello")])
    storage = stores.storage if stores is not None else MemoryStorage()
    log = stores.log if stores is not None else MemoryEventLog(600)
    models = ModelRegistry([ConfiguredProvider("p", provider, "model")])
    parts = Parts(storage, log, models, ToolRegistry(tools), Policy(**policy))
    runs = Runs(parts)
    conversation = Conversation(parts, runs)
    return Core(parts, runs, conversation, Recovery(conversation, runs, parts), provider)


@asynccontextmanager
async def sqlite(folder: Path) -> AsyncIterator[Any]:
    """Open the stores of a SQLite file, as a process does."""
    settings = resolve({"CHAT_DATABASE_URL": f"sqlite://{folder / 'chat.sqlite3'}"}, {})
    async with AsyncExitStack() as stack:
        yield await stores(settings, stack)


def texts(events: Sequence[Event]) -> str:
    return "".join(event.content for event in events if isinstance(event, ContentDelta))


def end_of(events: Sequence[Event]) -> End:
    """The one end of a run, which is last."""
    ends = [event for event in events if isinstance(event, End)]
    assert len(ends) == 1
    assert events[-1] is ends[0]
    return ends[0]


def codes(events: Sequence[Event]) -> list[str]:
    return [event.code for event in events if isinstance(event, Failed)]


def stops(events: Sequence[Event]) -> list[str]:
    return [event.message for event in events if isinstance(event, Stopped)]


def answers(messages: Sequence[Message]) -> list[tuple[str, str]]:
    """The stored answers: their text and status."""
    return [(text_of(m.content), m.status) for m in messages if m.role == "assistant"]


async def eventually(condition: Callable[[], bool | Awaitable[bool]]) -> None:
    """Give the loop its turns until something holds."""
    async with asyncio.timeout(SECONDS):
        while True:
            found = condition()
            if await found if isinstance(found, Awaitable) else found:
                return
            await asyncio.sleep(0)
