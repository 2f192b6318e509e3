"""One schedule: drawn clients, faults and policies; then everything is checked."""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from collections.abc import Iterator
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from typing import Any

from simloom import draw

from quart_chat.adapters.memory import MemoryStorage
from quart_chat.core.commands import Regenerate, parse
from quart_chat.core.conversation import Queued
from quart_chat.core.events import ContentDelta, End, Event, ToolCalled, ToolReturned
from quart_chat.core.policy import Policy
from quart_chat.core.subscription import Subscription
from quart_chat.core.tool_executor import ApprovalReply, ClientResult
from quart_chat.errors import ChatError

from .disk import Disk
from .process import Disconnected, Process
from .provider import simulated_tools

PATIENCE = 400.0
"""Seconds of virtual time after which a client has waited for what cannot come."""

DRAIN_SLACK = 4.0

CLIENT_TOOL = {"name": "page", "description": "", "parameters": {"type": "object"}}


@dataclass
class Observation:
    """What one client was sent of one run, after event ``after``."""

    run_id: str
    after: int
    events: list[tuple[int, Event]] = field(default_factory=list)
    complete: bool = False


@dataclass
class World:
    """All there is in one schedule."""

    policy: Policy
    disk: Disk | None
    memory: MemoryStorage = field(default_factory=MemoryStorage)
    paid: Counter[tuple[str, str]] = field(default_factory=Counter)
    observations: list[Observation] = field(default_factory=list)
    acknowledged: set[tuple[str, str, str]] = field(default_factory=set)
    sent: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    dropped: set[tuple[str, str, str]] = field(default_factory=set)
    deleted: set[tuple[str, str]] = field(default_factory=set)
    regenerated: set[tuple[str, str]] = field(default_factory=set)
    drains: list[tuple[float, float]] = field(default_factory=list)
    crashed: bool = False
    calm: bool = True
    violations: list[str] = field(default_factory=list)
    acting: asyncio.Event = field(default_factory=asyncio.Event)
    numbers: Iterator[int] = field(default_factory=lambda: itertools.count(1))
    process: Process = field(init=False)

    def new_process(self) -> Process:
        """Return a process that has not started."""
        tools = simulated_tools(self.paid, self.acting)
        return Process(self.disk, self.policy, tools, self.memory, self.numbers, self.violations)


async def main() -> None:
    """Play a schedule and check it."""
    world = _drawn_world()
    world.process = world.new_process()
    await world.process.start()
    clients = [
        asyncio.create_task(_client(world, f"u{number % 2}", number))
        for number in range(1 + draw("clients", 4))
    ]
    chaos = asyncio.create_task(_chaos(world))
    _, waiting = await asyncio.wait([*clients, chaos], timeout=PATIENCE * 4)
    assert not waiting, f"somebody waits for what cannot come: {waiting}"
    for task in [*clients, chaos]:
        task.result()
    await _come_to_rest(world)
    from .invariants import check

    await check(world)
    if world.disk is not None:
        world.disk.close()


def _drawn_world() -> World:
    policy = Policy(
        on_busy=("interrupt", "reject", "queue")[draw("on_busy", 3)],  # type: ignore[arg-type]
        on_disconnect=("continue", "stop")[draw("on_disconnect", 2)],  # type: ignore[arg-type]
        queue_limit=2,
        max_tool_rounds=2,
        run_timeout=30,
        tool_timeout=5,
        approval_timeout=60,
        provider_idle_timeout=10,
        storage_retry=3,
        max_runs_per_user=(None, 2)[draw("max_runs", 2)],
    )
    disk = Disk() if draw("store", 3) else None
    if disk is not None:
        disk.faults = bool(draw("faults", 2))
    return World(policy, disk, calm=disk is None or not disk.faults)


async def _chaos(world: World) -> None:
    """Let the storage fail, or the process end in one way or another, once or twice."""
    if world.disk is None:
        return
    for _ in range(draw("chaos", 3)):
        world.calm = False
        await asyncio.sleep(draw("chaos.when", 40) / 4)
        match draw("chaos.kind", 4):
            case 0:
                world.disk.away = True
                await asyncio.sleep((1, 8, 30)[draw("outage", 3)])
                world.disk.away = False
            case 1:
                await _crash(world)
            case 3:  # in the moment in which an approved tool acts
                world.acting.clear()
                with suppress(TimeoutError):
                    await asyncio.wait_for(world.acting.wait(), 60)
                    for _ in range(draw("act.then", 4)):
                        await asyncio.sleep(0)
                    await _crash(world)
            case 2:
                old, seconds = world.process, float((0, 2, 20)[draw("drain", 3)])
                overlap = draw("overlap", 2)
                if overlap:
                    await _replace(world)
                world.drains.append((seconds, await old.shut_down(seconds)))
                # Without the database nobody can keep what was said last, as after a crash.
                world.crashed |= old.has_unwritten_events()
                await asyncio.sleep(1)  # for what came during the drain and is refused
                assert not old.left_behind(), f"after a drain: {old.left_behind()}"
                if not overlap:
                    await _replace(world)


async def _crash(world: World) -> None:
    world.crashed = True
    await world.process.crash()
    await _replace(world)


async def _replace(world: World) -> None:
    process = world.new_process()
    await process.start()
    world.process = process


async def _come_to_rest(world: World) -> None:
    """Heal everything, wait for what runs, and shut the process down."""
    if world.disk is not None:
        world.disk.away = world.disk.faults = False
    process = world.process
    for _ in range(3):  # a sweep may take over runs, which then wait for people
        await asyncio.sleep(65)
        for _ in range(int(PATIENCE)):
            if not (process.runs._unfinished or process.runs._operations):
                break
            await asyncio.sleep(1)
        assert not process.runs._unfinished, "a run never ends"
        assert not process.runs._operations, "an operation never ends"
    assert not process.left_behind(), process.left_behind()
    world.drains.append((5, await process.shut_down(5)))
    await asyncio.sleep(10)
    left = [t for t in asyncio.all_tasks() if t is not asyncio.current_task()]
    assert not left, f"tasks are left over: {left}"


async def _client(world: World, user: str, number: int) -> None:
    for action in range(1 + draw("actions", 4)):
        await asyncio.sleep((0, 0, 0.1, 3)[draw("client.pause", 4)])
        thread = f"t{draw('thread', 2)}"
        try:
            await _act(world, user, thread, f"m{number}.{action}")
        except (ChatError, Disconnected):
            pass


async def _act(world: World, user: str, thread: str, message_id: str) -> None:
    conversation, process = world.process.conversation, world.process
    match draw("action", 12):
        case 0 | 1 | 2:
            await _send(world, user, thread, message_id)
        case 3 | 4:
            await asyncio.gather(
                *(_send(world, user, thread, f"{message_id}.{n}") for n in range(3)),
                return_exceptions=True,
            )
        case 5 | 6:
            await asyncio.gather(
                *(_send(world, user, thread, message_id) for _ in range(2)),
                return_exceptions=True,
            )
            await _send(world, user, thread, message_id)
        case 7:
            sending = asyncio.create_task(_send(world, user, thread, message_id))
            await asyncio.gather(
                process.call(conversation.stop(user, thread_id=thread), PATIENCE),
                sending,
                return_exceptions=True,
            )
        case 8:
            run_id = conversation.active_run_id(user, thread)
            await process.call(conversation.stop(user, run_id=run_id or "none"), PATIENCE)
        case 9:
            after = (0, 1, 3, 5)[draw("resume.after", 4)]
            resumed = await process.call(
                conversation.resume(user, run_id=None, thread_id=thread, after=after), PATIENCE
            )
            await _follow(world, process, user, resumed)
        case 10:
            world.regenerated.add((user, thread))
            command = parse({"type": "regenerate", "thread_id": thread})
            assert isinstance(command, Regenerate)
            sent = await process.call(conversation.regenerate(user, command), _patience())
            await _follow(world, process, user, sent)
        case 11:
            if draw("delete", 3) == 2:
                world.deleted.add((user, thread))
                await process.call(conversation.delete_thread(user, thread), PATIENCE)


def _patience() -> float | None:
    """Most clients wait; some vanish at once, some later."""
    return (PATIENCE, PATIENCE, PATIENCE, 0, 0.05, 2)[draw("patience", 6)]


async def _send(world: World, user: str, thread: str, message_id: str) -> None:
    process = world.process
    body: dict[str, Any] = {"id": message_id, "thread_id": thread, "content": message_id}
    if draw("tools", 2):
        body |= {"tools": ["look", "pay"], "client_tools": [CLIENT_TOOL]}
    body["tools"] = body.get("tools")
    world.sent[user, thread, message_id] += 1
    command: Any = parse(body)
    sent = await process.call(process.conversation.send(user, command), _patience())
    if isinstance(sent, Subscription):
        world.acknowledged.add((user, thread, message_id))
    await _follow(world, process, user, sent, message_id)


async def _follow(
    world: World,
    process: Process,
    user: str,
    sent: Subscription | Queued,
    message_id: str | None = None,
) -> None:
    """Follow a run to its end: vanishing, coming back, approving."""
    if isinstance(sent, Queued):
        started = await process.call(sent.started(), _patience())
        if started is None:
            if message_id is not None:
                world.dropped.add((user, sent.thread_id, message_id))
            return
        sent = started
    seen = sent.after
    asked: dict[str, ToolCalled] = {}
    for _ in range(8):
        observation = Observation(sent.record.id, seen)
        world.observations.append(observation)
        subscription = Subscription(sent.record, seen, sent.stored)
        try:
            await process.call(_read(process, user, subscription, observation, asked), _patience())
        except Disconnected:
            pass
        if observation.complete or sent.stored is not None:
            return
        if observation.events:
            seen = observation.events[-1][0]
        await asyncio.sleep((0, 0.2, 5)[draw("come.back", 3)])
        process = world.process
        resume = process.conversation.resume(
            user, run_id=sent.record.id, thread_id=None, after=seen
        )
        try:
            await process.call(resume, PATIENCE)
        except Disconnected:
            await asyncio.sleep(5)


async def _read(
    process: Process,
    user: str,
    subscription: Subscription,
    observation: Observation,
    asked: dict[str, ToolCalled],
) -> None:
    """Read, and answer what is asked; what was asked before the connection was lost, again."""
    conversation = process.conversation
    replies = []

    def reply(called: ToolCalled) -> None:
        work = _reply(process, user, observation, called)
        replies.append(asyncio.create_task(work))

    for called in asked.values():
        reply(called)
    try:
        with conversation.watching(subscription):
            async with aclosing(conversation.follow(subscription)) as pages:
                async for page in pages:
                    for seq, event in page:
                        observation.events.append((seq, event))
                        if isinstance(event, ToolCalled) and event.needs:
                            asked[event.tool_call_id] = event
                            reply(event)
                        elif isinstance(event, ToolReturned):
                            asked.pop(event.tool_call_id, None)
                        observation.complete = isinstance(event, End)
    finally:
        for task in replies:
            task.cancel()


async def _reply(process: Process, user: str, seen: Observation, called: ToolCalled) -> None:
    await asyncio.sleep((0, 0, 1, 90)[draw("reply.when", 4)])
    reply: Any = ClientResult("done")
    if called.needs == "approval":
        reply = ApprovalReply(bool(draw("approve", 3)))
    try:
        process.conversation.answer_call(user, seen.run_id, called.tool_call_id, reply)
    except ChatError:
        pass


def text_of_events(events: list[tuple[int, Event]]) -> str:
    """Return the concatenated text."""
    return "".join(event.content for _, event in events if isinstance(event, ContentDelta))
