"""Recovery, directly, on a real SQLite file: crashes, versions, outages."""

from __future__ import annotations

import asyncio
import sqlite3
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import msgpack
import pytest
from core import (
    THREAD,
    USER,
    answers,
    calls,
    codes,
    core,
    end_of,
    eventually,
    says,
    sqlite,
    texts,
    waits,
)

from quart_chat import tool
from quart_chat.adapters import stores
from quart_chat.adapters.database.event_store import CRASH_GAP
from quart_chat.config import resolve
from quart_chat.core.events import ContentDelta, End, ToolCalled
from quart_chat.core.housekeeping import Housekeeping
from quart_chat.core.ports import RunRecord
from quart_chat.core.subscription import Subscription
from quart_chat.core.tool_executor import ApprovalReply
from quart_chat.errors import StorageUnavailable, UnreadableLog


def rows(folder: Path, sql: str, *values: Any) -> list[tuple[Any, ...]]:
    connection = sqlite3.connect(folder / "chat.sqlite3", isolation_level=None)
    try:
        return connection.execute(sql, values).fetchall()
    finally:
        connection.close()


async def interrupted(folder: Path, text: str = "so far") -> Subscription:
    """Leave a run as a process does that is killed."""
    async with sqlite(folder) as kept:
        house = core(waits(asyncio.Event(), text), stores=kept)
        sent = await house.send(id="m")
        await house.until(sent, ContentDelta)
        await kept.log.flush(sent.record.id)
        rows(folder, "CREATE TABLE kept AS SELECT * FROM chat_runs")
        rows(folder, "CREATE TABLE said AS SELECT * FROM chat_events")
        run = house.runs.get(USER, sent.record.id)
        assert run is not None
        run.abandon()
    for table, kept_as in (("chat_runs", "kept"), ("chat_events", "said")):
        rows(folder, f"DELETE FROM {table}")
        rows(folder, f"INSERT INTO {table} SELECT * FROM {kept_as}")
        rows(folder, f"DROP TABLE {kept_as}")
    rows(folder, "DELETE FROM chat_messages WHERE role = 'assistant'")
    return sent


async def test_a_killed_run_is_stored_and_told_to_be_interrupted(tmp_path: Path) -> None:
    sent = await interrupted(tmp_path)
    async with sqlite(tmp_path) as kept:
        house = core(stores=kept)
        assert await house.recovery.run() == 1
        assert answers(await house.messages()) == [("so far", "interrupted")]
        events = await house.events(sent)
        assert (codes(events), end_of(events).status) == (["interrupted"], "interrupted")
        assert await house.recovery.run() == 0


@pytest.mark.parametrize(
    "damage",
    [b"\xc1", msgpack.packb([99, []]), msgpack.packb([1, [["unknown", 2, {}]]])],
    ids=["garbage", "a newer version", "an unknown event"],
)
async def test_a_run_that_cannot_be_read_is_closed_and_others_are_recovered(
    tmp_path: Path, damage: bytes
) -> None:
    sent = await interrupted(tmp_path)
    run_id = sent.record.id
    rows(tmp_path, "UPDATE chat_events SET data = ? WHERE last_seq > 1", damage)
    rows(
        tmp_path,
        "INSERT INTO chat_runs (id, user_id, thread_id, user_message_id, message_id, owner, "
        "seen_at, last_seq, created_at, has_events) SELECT 'zz', user_id, thread_id, "
        "user_message_id, 'other', owner, seen_at, 0, created_at + 1, 1 FROM chat_runs",
    )
    async with sqlite(tmp_path) as kept:
        house = core(stores=kept)
        assert await house.recovery.run() == 2
        assert not rows(tmp_path, "SELECT id FROM chat_runs WHERE ended_at IS NULL")
        with pytest.raises(UnreadableLog):
            await house.events(Subscription(sent.record))
        found = await kept.log.find(USER, run_id=run_id)
        assert found is not None
        assert found.ended


async def test_fields_of_a_newer_version_are_ignored(tmp_path: Path) -> None:
    sent = await interrupted(tmp_path)
    ((data,),) = rows(tmp_path, "SELECT data FROM chat_events WHERE last_seq = 1")
    version, entries = msgpack.unpackb(data)
    entries[0][2]["invented_later"] = True
    rows(
        tmp_path,
        "UPDATE chat_events SET data = ? WHERE last_seq = 1",
        msgpack.packb([version, entries]),
    )
    async with sqlite(tmp_path) as kept:
        house = core(stores=kept)
        assert await house.recovery.run() == 1
        assert texts(await house.events(sent)) == "so far"


async def test_a_run_whose_rescue_fails_is_tried_again_in_the_same_process(tmp_path: Path) -> None:
    await interrupted(tmp_path)
    async with sqlite(tmp_path) as kept:
        house = core(stores=kept)
        add = kept.storage.add_messages

        async def away(*arguments: Any, **more: Any) -> Any:
            raise StorageUnavailable

        kept.storage.add_messages = away
        assert await house.recovery.run() == 0
        kept.storage.add_messages = add
        assert await house.recovery.run() == 1
        assert answers(await house.messages()) == [("so far", "interrupted")]


async def test_numbers_are_not_given_twice_by_the_process_after_the_next(tmp_path: Path) -> None:
    sent = await interrupted(tmp_path)
    async with sqlite(tmp_path) as kept:
        assert await kept.log.claim_abandoned()  # it ends before it has recovered anything
    async with sqlite(tmp_path) as kept:
        house = core(stores=kept)
        assert await house.recovery.run() == 1
        found = await kept.log.find(USER, run_id=sent.record.id)
        assert found is not None
        assert found.last_seq > CRASH_GAP


async def test_a_run_whose_row_was_written_and_whose_birth_failed_is_begun_by_the_retry(
    tmp_path: Path,
) -> None:
    async with sqlite(tmp_path) as kept:
        house = core(says("Hello"), stores=kept)
        begin = kept.log._store.begin

        async def unknown(*arguments: Any) -> None:
            await begin(*arguments)
            raise StorageUnavailable

        kept.log._store.begin = unknown
        with pytest.raises(StorageUnavailable):
            await house.send(id="m")
        kept.log._store.begin = begin
        events = await house.events(await house.send(id="m"))
        assert (texts(events), end_of(events).status) == ("Hello", "completed")
        await eventually(lambda: not house.runs._unfinished)
        assert len(rows(tmp_path, "SELECT id FROM chat_runs")) == 1


async def test_an_approval_is_on_disk_before_the_tool_acts(tmp_path: Path) -> None:
    said: list[Any] = []

    @tool(needs_approval=True)
    async def pay() -> str:
        """Pay."""
        found = rows(tmp_path, "SELECT data FROM chat_events ORDER BY last_seq")
        said.extend(entry for (data,) in found for entry in msgpack.unpackb(data)[1])
        return "paid"

    async with sqlite(tmp_path) as kept:
        house = core(calls("pay"), tools=[pay], stores=kept)
        sent = await house.send(tools=["pay"])
        await house.until(sent, ToolCalled)
        house.conversation.answer_call(USER, sent.record.id, "c0", ApprovalReply(True))
        assert end_of(await house.events(sent)).status == "completed"
    assert [entry[2]["content"] for entry in said if entry[0] == "tool_progress"] == ["Approved."]


async def test_a_handed_over_approval_is_answered_in_the_next_process(tmp_path: Path) -> None:
    paid = []

    @tool(needs_approval=True)
    async def pay() -> str:
        """Pay."""
        paid.append(1)
        return "paid"

    async with sqlite(tmp_path) as kept:
        house = core(calls("pay"), tools=[pay], stores=kept)
        sent = await house.send(tools=["pay"])
        await house.until(sent, ToolCalled)
        assert await house.runs.drain(0, durable=True) == {sent.record.id}
    async with sqlite(tmp_path) as kept:
        house = core(calls("pay"), tools=[pay], stores=kept)
        assert await house.recovery.run() == 1
        assert house.conversation.active_run_id(USER, THREAD) == sent.record.id
        await eventually(lambda: bool(house.runs._runs[sent.record.id]._loop.executor))
        house.conversation.answer_call(USER, sent.record.id, "c0", ApprovalReply(True))
        assert end_of(await house.events(sent)).status == "completed"
    assert paid == [1]


async def test_a_write_that_failed_but_was_done_is_not_done_twice(tmp_path: Path) -> None:
    async with sqlite(tmp_path) as kept:
        house = core(waits(asyncio.Event(), "so far"), stores=kept)
        write, failed = kept.log._store.write, asyncio.Event()

        async def unknown(batches: Any) -> None:
            await write(batches)
            if batches and not failed.is_set():
                failed.set()
                raise StorageUnavailable

        kept.log._store.write = unknown
        sent = await house.send()
        await house.until(sent, ContentDelta)
        await failed.wait()
        await house.conversation.stop(USER, thread_id=THREAD)
        events = await house.events(sent)
        assert texts(events) == "so far"
        assert answers(await house.messages()) == [("so far", "stopped")]


async def test_a_sweep_goes_on_until_nothing_is_left_that_is_too_old(tmp_path: Path) -> None:
    config = {
        "CHAT_DATABASE_URL": f"sqlite://{tmp_path / 'chat.sqlite3'}",
        "CHAT_EVENT_RETENTION": 0,
    }
    async with AsyncExitStack() as stack:
        kept: Any = await stores(resolve(config, {}), stack)
        house = core(stores=kept)
        for number in range(250):
            record = RunRecord(f"r{number}", USER, f"t{number}", "q", "a")
            await kept.log.open(record)
            kept.log.append(record.id, [End("completed", "stop", {})])
        await kept.log.flush("r249")
        housekeeping = Housekeeping(
            kept.log, kept.user_data, house.recovery, event_retention=0, retention_days=None
        )
        await housekeeping.start()
        housekeeping.wake()
        await eventually(
            lambda: not rows(tmp_path, "SELECT id FROM chat_runs WHERE has_events = 1")
        )
        await housekeeping.close()
    assert not rows(tmp_path, "SELECT run_id FROM chat_events")
