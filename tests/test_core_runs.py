"""The life of runs, directly: birth, ends, drains, and what is left behind."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence

import pytest
from core import (
    SECONDS,
    THREAD,
    USER,
    answers,
    codes,
    core,
    end_of,
    eventually,
    says,
    stops,
    texts,
    waits,
)

from quart_chat.core.commands import parse
from quart_chat.core.conversation import Queued
from quart_chat.core.events import ContentDelta, Start
from quart_chat.core.ports import Delta, ProviderRequest, RunRecord, TextDelta
from quart_chat.core.run import RunPhase
from quart_chat.core.subscription import Subscription
from quart_chat.errors import InvalidMessage, NotRunning, ServerDraining, StorageUnavailable


async def test_an_answer_from_start_to_end() -> None:
    house = core(says("Hel", "lo"))
    events = await house.events(await house.send())
    assert isinstance(events[0], Start)
    assert (texts(events), end_of(events).status) == ("Hello", "completed")
    assert answers(await house.messages()) == [("Hello", "completed")]
    await eventually(lambda: not house.runs._unfinished)
    assert not house.runs._runs
    assert not house.runs._locks


async def test_a_stop_in_the_same_turn_of_the_loop_as_the_message() -> None:
    house = core(waits(asyncio.Event()))
    command = parse({"content": "hi", "thread_id": THREAD})
    send = asyncio.create_task(house.conversation.send(USER, command))  # type: ignore[arg-type]
    stop = asyncio.create_task(house.conversation.stop(USER, thread_id=THREAD))
    async with asyncio.timeout(SECONDS):
        await asyncio.wait({send, stop})
    if stop.exception() is not None:  # the stop came first, and there is nothing to stop
        await house.conversation.stop(USER, thread_id=THREAD)
    sent = send.result()
    assert isinstance(sent, Subscription)
    events = await house.events(sent)
    assert (end_of(events).status, stops(events)) == ("stopped", ["Generation stopped by user"])


async def test_a_run_that_is_stopped_before_its_first_step_ends() -> None:
    house = core(says("Hello"), waits(asyncio.Event()))
    await house.events(await house.send())
    (question, *_) = await house.messages()
    record = RunRecord("r", USER, THREAD, question.id, "a")
    run = await house.runs.begin(await house.conversation.prepare(record, question))
    assert run.phase is RunPhase.STARTING
    run.stop("Stopped.")
    async with asyncio.timeout(SECONDS):
        await run.finished.wait()
    assert end_of(await house.events(Subscription(record))).status == "stopped"


@pytest.mark.parametrize("on_busy", ["interrupt", "queue"])
async def test_three_messages_at_once_in_one_thread(on_busy: str) -> None:
    house = core(says("one"), says("two"), says("three"), on_busy=on_busy)

    async def ask(number: int) -> str:
        command = parse({"content": str(number), "thread_id": THREAD})
        sent = await house.conversation.send(USER, command)  # type: ignore[arg-type]
        started = await sent.started() if isinstance(sent, Queued) else sent
        assert started is not None
        return end_of(await house.events(started)).status

    async with asyncio.timeout(SECONDS):
        statuses = await asyncio.gather(*map(ask, range(3)))
    assert set(statuses) <= {"completed", "stopped"}
    assert statuses[-1] == "completed"


async def test_a_cancellation_that_nobody_asked_for_is_a_failure() -> None:
    async def cancelled(request: ProviderRequest) -> AsyncGenerator[Sequence[Delta], None]:
        yield [TextDelta("so far")]
        raise asyncio.CancelledError

    house = core(cancelled)
    events = await house.events(await house.send())
    assert (codes(events), end_of(events).status) == (["internal_error"], "failed")
    assert answers(await house.messages()) == [("so far", "failed")]


async def test_a_run_whose_task_is_lost_ends_and_is_stored_by_recovery() -> None:
    house = core(waits(asyncio.Event(), "so far"))
    sent = await house.send()
    await house.until(sent, ContentDelta)
    run = house.runs.get(USER, sent.record.id)
    assert run is not None
    assert run.task is not None
    run.task.cancel()
    events = await house.events(sent)
    assert (codes(events), end_of(events).status) == (["interrupted"], "interrupted")
    assert not house.runs._runs
    assert await house.recovery.run() == 1
    assert answers(await house.messages()) == [("so far", "interrupted")]
    assert await house.recovery.run() == 0


async def test_a_provider_that_ignores_its_cancellation_does_not_hold_the_end() -> None:
    ended = asyncio.Event()

    async def stubborn(request: ProviderRequest) -> AsyncGenerator[Sequence[Delta], None]:
        yield [TextDelta("so far")]
        while not ended.is_set():
            try:
                await ended.wait()
            except asyncio.CancelledError:
                yield [TextDelta("never heard")]

    house = core(stubborn)
    sent = await house.send()
    await house.until(sent, ContentDelta)
    async with asyncio.timeout(SECONDS):
        await house.conversation.stop(USER, thread_id=THREAD)
    assert end_of(await house.events(sent)).status == "stopped"
    ended.set()
    await eventually(lambda: not house.runs._leftovers)
    assert texts(await house.events(sent)).startswith("so far")


async def test_a_caller_who_goes_away_does_not_cut_the_birth_in_half() -> None:
    house = core(says("Hello"))
    open_log, opening, go = house.parts.log.open, asyncio.Event(), asyncio.Event()

    async def slow_open(*arguments: object) -> None:
        opening.set()
        await go.wait()
        await open_log(*arguments)  # type: ignore[arg-type]

    house.parts.log.open = slow_open  # type: ignore[method-assign, assignment]
    caller = asyncio.create_task(house.send(id="m"))
    await opening.wait()
    caller.cancel()
    await asyncio.wait({caller})
    go.set()
    await eventually(lambda: not house.runs._operations)
    events = await house.events(await house.send(id="m"))
    assert (texts(events), len(house.provider.requests)) == ("Hello", 1)


async def test_a_client_that_sends_and_leaves_at_once_stops_its_run_if_that_is_policy() -> None:
    house = core(waits(asyncio.Event()), on_disconnect="stop")
    caller = asyncio.create_task(house.send())
    await eventually(lambda: bool(house.runs._operations))
    caller.cancel()
    await asyncio.wait({caller})
    await eventually(lambda: not house.runs._operations and not house.runs._unfinished)
    assert answers(await house.messages()) == [("", "stopped")]


async def test_a_drain_waits_for_what_begins_meanwhile() -> None:
    gate = asyncio.Event()
    house = core(waits(gate))
    add, adding, go = house.parts.storage.add_messages, asyncio.Event(), asyncio.Event()

    async def slow_add(*arguments: object, **more: object) -> object:
        adding.set()
        await go.wait()
        return await add(*arguments, **more)  # type: ignore[arg-type]

    house.parts.storage.add_messages = slow_add  # type: ignore[method-assign, assignment]
    sending = asyncio.create_task(house.send())
    await adding.wait()
    draining = asyncio.create_task(house.runs.drain(SECONDS, durable=False))
    await eventually(lambda: house.runs.draining)
    go.set()
    sent = await sending
    gate.set()
    async with asyncio.timeout(SECONDS):
        await draining
    assert end_of(await house.events(sent)).status == "completed"
    with pytest.raises(ServerDraining):
        await house.send()


async def test_a_drain_ends_whatever_a_run_does() -> None:
    async def deaf(request: ProviderRequest) -> AsyncGenerator[Sequence[Delta], None]:
        yield [TextDelta("so far")]
        while True:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                if house.runs._unfinished:
                    continue
                raise

    house = core(deaf)
    sent = await house.send()
    await house.until(sent, ContentDelta)
    async with asyncio.timeout(SECONDS):
        await house.runs.drain(0, durable=False)
    await eventually(lambda: not house.runs._unfinished)
    assert end_of(await house.events(sent)).status == "interrupted"


async def test_what_could_not_be_stored_is_stored_when_the_storage_is_back() -> None:
    house = core(says("kept"), storage_retry=0)
    add, away = house.parts.storage.add_messages, True

    async def add_messages(user: str, messages: object, **more: object) -> object:
        if away and messages[0].role == "assistant":  # type: ignore[index]
            raise StorageUnavailable
        return await add(user, messages, **more)  # type: ignore[arg-type]

    house.parts.storage.add_messages = add_messages  # type: ignore[method-assign, assignment]
    events = await house.events(await house.send(id="m"))
    assert (codes(events), end_of(events).status) == (["storage_unavailable"], "failed")
    assert await house.recovery.run() == 0
    away = False
    assert await house.recovery.run() == 1
    assert answers(await house.messages()) == [("kept", "failed")]
    assert texts(await house.events(await house.send(id="m"))) == "kept"
    assert len(house.provider.requests) == 1


async def test_a_message_that_was_dropped_from_the_queue_is_not_answered() -> None:
    gate = asyncio.Event()
    house = core(waits(gate), on_busy="queue")
    running = await house.send()
    command = parse({"content": "next", "thread_id": THREAD})
    queued = await house.conversation.send(USER, command)  # type: ignore[arg-type]
    assert isinstance(queued, Queued)
    await house.conversation.stop(USER, thread_id=THREAD)
    assert await queued.started() is None
    await house.events(running)
    await eventually(lambda: not house.runs._operations)
    assert [m.content for m in await house.messages() if m.role == "user"] == ["hi"]


async def test_an_answer_has_a_greatest_length() -> None:
    house = core(says("x" * 60, "y" * 60, "z" * 60), max_answer_chars=100)
    events = await house.events(await house.send())
    assert (codes(events), end_of(events).status) == (["answer_too_long"], "failed")
    assert answers(await house.messages()) == [("x" * 60 + "y" * 40, "failed")]


async def test_a_run_takes_no_longer_than_its_time() -> None:
    house = core(waits(asyncio.Event(), "so far"), run_timeout=0.05)
    events = await house.events(await house.send())
    assert (codes(events), end_of(events).status) == (["run_timeout"], "failed")
    assert answers(await house.messages()) == [("so far", "failed")]


async def test_nothing_to_stop_is_said_so() -> None:
    house = core(says("Hello"))
    await house.events(await house.send())
    await eventually(lambda: not house.runs._unfinished)
    with pytest.raises(NotRunning):
        await house.conversation.stop(USER, thread_id=THREAD)


async def test_a_retry_begins_no_run_beside_the_thread_s() -> None:
    """A stored message whose run was never begun waits for its turn as a new one does."""
    gate = asyncio.Event()
    house = core(waits(gate), on_busy="reject")
    open_log = house.parts.log.open

    async def fail(*arguments: object) -> None:
        raise StorageUnavailable

    house.parts.log.open = fail  # type: ignore[method-assign, assignment]
    with pytest.raises(StorageUnavailable):
        await house.send("first", id="m")
    house.parts.log.open = open_log  # type: ignore[method-assign]
    running = await house.send("second")
    with pytest.raises(Exception, match="answering another message"):
        await house.send("first", id="m")
    gate.set()
    await house.events(running)
    await eventually(lambda: not house.runs._unfinished)
    assert end_of(await house.events(await house.send("first", id="m"))).status == "completed"


async def test_pictures_by_url_can_be_refused() -> None:
    house = core(says("Hello"), image_urls="data")
    part = {"type": "image_url", "image_url": {"url": "http://169.254.169.254/"}}
    with pytest.raises(InvalidMessage, match="only data: URLs"):
        await house.send([part])  # type: ignore[arg-type]
    part = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}
    await house.events(await house.send([part]))  # type: ignore[arg-type]
