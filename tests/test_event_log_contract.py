"""One contract of the ``EventLog`` port, over memory, SQLite and PostgreSQL."""

from __future__ import annotations

import asyncio
import itertools
import json
import sqlite3
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from conftest import SECONDS, unique
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quart_chat.adapters import Stores, stores
from quart_chat.adapters.database.batches import decode, encode
from quart_chat.config import resolve
from quart_chat.core.events import (
    ContentDelta,
    End,
    Event,
    Failed,
    MessageStored,
    Numbered,
    Reasoning,
    Start,
    Stopped,
    ToolCalled,
    ToolProgress,
    ToolReturned,
    merge,
)
from quart_chat.core.ports import EventLog, RunRecord
from quart_chat.errors import NothingToResume

START = Start("answer", "question", None, "m", "p")
END = End("completed", "stop", {"prompt_tokens": 1, "completion_tokens": 2})
EVENTS: tuple[Event, ...] = (
    START,
    Reasoning("think "),
    Reasoning("hard ü😀"),
    ContentDelta("one "),
    ContentDelta("two 😀"),
    ContentDelta(""),
    ToolCalled("c1", "add", {"a": 1, "b": [None, 1.5, "ü"]}, "approval"),
    ToolProgress("c1", "add", "half"),
    ToolReturned("c1", "add", "3", True),
    MessageStored({"id": "x", "content": "one two", "metadata": {"1": {"2": None}}}),
    ContentDelta("three"),
    Failed("run_timeout", "late", True, 1.5, "ref"),
    Stopped("Generation stopped by user"),
    END,
)


@dataclass
class House:
    """How to open stores of one kind, again and again, on what is kept there."""

    config: dict[str, Any]

    @asynccontextmanager
    async def open(self, retention: float = 600) -> AsyncIterator[Stores]:
        config = {**self.config, "CHAT_EVENT_RETENTION": retention}
        async with AsyncExitStack() as stack:
            yield await stores(resolve(config, {}), stack)


@pytest.fixture(scope="module", params=["memory", "sqlite", "postgres"])
def house(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> House:
    if request.param == "memory":
        return House({"CHAT_STORAGE": "memory"})
    if request.param == "sqlite":
        file = tmp_path_factory.mktemp("sqlite") / "chat.sqlite3"
        return House({"CHAT_DATABASE_URL": f"sqlite://{file}"})
    return House({"CHAT_DATABASE_URL": request.getfixturevalue("postgres")()})


@pytest.fixture(scope="module")
async def log(house: House) -> AsyncIterator[EventLog]:
    async with house.open() as kept:
        yield kept.log


@pytest.fixture
def durable(house: House) -> House:
    if "CHAT_STORAGE" in house.config:
        pytest.skip("memory is gone with its process")
    return house


async def opened(log: EventLog, user: str = "u", thread: str | None = None) -> RunRecord:
    record = RunRecord(unique("run"), user, thread or unique(), "question", "answer")
    await log.open(record)
    return record


async def read(log: EventLog, run_id: str, after: int = 0, *, wait: bool = True) -> list[Numbered]:
    """All pages together."""
    found: list[Numbered] = []
    async with asyncio.timeout(SECONDS):
        async for page in log.follow(run_id, after, wait=wait):
            assert page
            found += page
    return found


def split(numbered: Iterable[Numbered]) -> tuple[str, str, list[Numbered]]:
    """What merging does not change: both texts, and all that is no delta with its number."""
    content = reasoning = ""
    rest: list[Numbered] = []
    for seq, event in numbered:
        if isinstance(event, ContentDelta):
            content += event.content
        elif isinstance(event, Reasoning):
            reasoning += event.content
        else:
            rest.append((seq, event))
    return content, reasoning, rest


def check_order(numbered: Sequence[Numbered], after: int) -> None:
    numbers = [after, *(seq for seq, _ in numbered)]
    assert numbers == sorted(set(numbers))


def numbered(events: Sequence[Event] = EVENTS) -> list[Numbered]:
    return list(enumerate(events, 1))


async def test_events_are_numbered_from_one_without_gaps(log: EventLog) -> None:
    run = await opened(log)
    assert log.append(run.id, [START]) == 1
    assert log.append(run.id, [ContentDelta("a"), ContentDelta("b")]) == 3
    found = await read(log, run.id, wait=False)
    assert found == [(1, START), (3, ContentDelta("ab"))]
    assert log.append(run.id, [END]) == 4
    assert await read(log, run.id) == [(1, START), (3, ContentDelta("ab")), (4, END)]


async def test_runs_do_not_mix(log: EventLog) -> None:
    runs = [await opened(log) for _ in range(5)]
    for n in range(50):
        for index, run in enumerate(runs):
            assert log.append(run.id, [ContentDelta(f"{index}.{n} ")]) == n + 1
    for run in runs:
        log.append(run.id, [END])
    for index, run in enumerate(runs):
        text, _, rest = split(await read(log, run.id))
        assert text == "".join(f"{index}.{n} " for n in range(50))
        assert rest == [(51, END)]


async def test_follow_from_every_position_in_memory_and_in_the_database(log: EventLog) -> None:
    run = await opened(log)
    for event in EVENTS:
        log.append(run.id, [event])
    for after in range(len(EVENTS) + 1):
        found = await read(log, run.id, after)
        assert found == merge(numbered()[after:]), after
    await log.flush(run.id)
    for after in range(len(EVENTS) + 1):
        found = await read(log, run.id, after)
        assert found == merge(numbered()[after:]), after


async def test_follow_from_every_position_in_another_process(durable: House) -> None:
    async with durable.open() as first, durable.open() as second:
        run = await opened(first.log)
        for event in EVENTS[:7]:
            first.log.append(run.id, [event])
        await first.log.flush(run.id)
        for event in EVENTS[7:]:
            first.log.append(run.id, [event])
        await first.log.flush(run.id)
        for after in range(len(EVENTS) + 1):
            found = await read(second.log, run.id, after)
            assert split(found) == split(numbered()[after:]), after
            check_order(found, after)


async def test_a_follower_in_another_process_sees_events_as_they_come(durable: House) -> None:
    async with durable.open() as first, durable.open() as second:
        run = await opened(first.log)
        pages = second.log.follow(run.id, 0)
        async with aclosing(pages), asyncio.timeout(SECONDS):
            first.log.append(run.id, [START])
            assert await anext(pages) == [(1, START)]
            first.log.append(run.id, [ContentDelta("a")])
            assert await anext(pages) == [(2, ContentDelta("a"))]
            first.log.append(run.id, [END])
            assert await anext(pages) == [(3, END)]
            with pytest.raises(StopAsyncIteration):
                await anext(pages)


async def test_followers_that_wait_are_woken_and_end(log: EventLog) -> None:
    run = await opened(log)
    log.append(run.id, [START])
    positions = [0, 0, 1, 2, 3]
    followers = [asyncio.create_task(read(log, run.id, after)) for after in positions]
    for event in (ContentDelta("a"), ContentDelta("b"), END):
        await asyncio.sleep(0)
        log.append(run.id, [event])
    whole = [(1, START), (2, ContentDelta("a")), (3, ContentDelta("b")), (4, END)]
    for after, follower in zip(positions, followers, strict=True):
        found = await follower
        assert split(found) == split(whole[after:])
        check_order(found, after)


async def test_a_cancelled_follower_disturbs_nobody(log: EventLog) -> None:
    run = await opened(log)
    log.append(run.id, [START])
    leaving = asyncio.create_task(read(log, run.id, 1))
    staying = asyncio.create_task(read(log, run.id, 1))
    await asyncio.sleep(0)
    leaving.cancel()
    await asyncio.gather(leaving, return_exceptions=True)
    log.append(run.id, [ContentDelta("a"), END])
    assert await staying == [(2, ContentDelta("a")), (3, END)]


async def test_a_slow_follower_holds_up_neither_the_run_nor_others(log: EventLog) -> None:
    """Far more than is kept in memory; the slow one reads on after all the rest."""
    run = await opened(log)
    log.append(run.id, [START])
    slow = log.follow(run.id, 0)
    async with aclosing(slow), asyncio.timeout(SECONDS * 3):
        found = list(await anext(slow))
        quick = asyncio.create_task(read(log, run.id))
        pieces = [f"{n}:" + "x" * 500 for n in range(5000)]
        for first in range(0, len(pieces), 50):
            log.append(run.id, [ContentDelta(piece) for piece in pieces[first : first + 50]])
            if first % 500 == 0:
                await log.flush(run.id)
        log.append(run.id, [END])
        assert split(await quick) == ("".join(pieces), "", [(1, START), (5002, END)])
        async for page in slow:
            found += page
            assert sum(len(e.content) for _, e in page if isinstance(e, ContentDelta)) < 1_000_000
    assert split(found) == ("".join(pieces), "", [(1, START), (5002, END)])
    check_order(found, 0)


async def test_resume_in_the_middle_of_a_long_answer_is_exact(log: EventLog) -> None:
    run = await opened(log)
    pieces = [f"{n}," for n in range(3000)]
    for piece in pieces:
        log.append(run.id, [ContentDelta(piece)])
        if piece == "1500,":
            await log.flush(run.id)
    log.append(run.id, [END])
    await log.flush(run.id)
    for after in (0, 1, 2, 199, 1499, 1500, 1501, 1502, 2998, 2999, 3000, 3001):
        found = await read(log, run.id, after)
        assert split(found)[0] == "".join(pieces[after:]), after
        check_order(found, after)
        assert not found or found[-1] == (3001, END)


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=5,
)
maps = st.dictionaries(texts, values, max_size=3)
events = st.lists(
    st.one_of(
        st.builds(ContentDelta, texts),
        st.builds(ContentDelta, texts),
        st.builds(Reasoning, texts),
        st.builds(ToolCalled, texts, texts, maps, st.sampled_from([None, "approval", "client"])),
        st.builds(ToolProgress, texts, texts, texts),
        st.builds(ToolReturned, texts, texts, texts, st.booleans()),
        st.builds(MessageStored, maps),
        st.builds(Failed, texts, texts, st.booleans(), st.none() | st.floats(0, 9), st.none()),
        st.builds(Stopped, texts),
    ),
    max_size=25,
)


@given(events=events, first=st.integers(1, 10**9), cuts=st.sets(st.integers(0, 25)))
def test_any_events_are_read_as_they_were_written(
    events: list[Event], first: int, cuts: set[int]
) -> None:
    """Batches wherever the writer cut them; read after every number, merged and not."""
    given = list(enumerate(events, first))
    places = sorted({0, len(given), *(cut for cut in cuts if cut < len(given))})
    rows = [row for begin, end in itertools.pairwise(places) for row in encode(given[begin:end])]
    lasts = [last for last, _ in rows]
    assert lasts == sorted(set(lasts))
    for after in range(first - 1, first + len(given)):
        wanted = [each for each in given if each[0] > after]
        found = [each for last, data in rows if last > after for each in decode(data, after)]
        assert found == wanted
        merged = merge(found)
        assert split(merged) == split(wanted)
        check_order(merged, first - 1)
        for seq, _ in merged:
            rest = merge(each for each in given if each[0] > seq)
            assert (
                split([e for e in merged if e[0] <= seq])[0] + split(rest)[0] == (split(wanted)[0])
            )


def test_long_texts_are_cut_into_rows() -> None:
    given = [(n, ContentDelta("ü" * 1000)) for n in range(1, 1001)]
    rows = encode(given)
    assert 30 <= len(rows) <= 40
    assert rows[-1][0] == 1000
    assert [each for _, data in rows for each in decode(data, 0)] == given
    assert encode([]) == []


@settings(
    max_examples=10,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(events=events, flushed=st.sets(st.integers(0, 24)))
async def test_any_run_can_be_resumed_after_every_number(
    log: EventLog, events: list[Event], flushed: set[int]
) -> None:
    run = await opened(log)
    for index, event in enumerate([*events, END]):
        log.append(run.id, [event])
        if index in flushed and index % 4 == 0:
            await log.flush(run.id)
    given = numbered([*events, END])
    for _ in range(2):
        for after in range(len(given) + 1):
            found = await read(log, run.id, after)
            assert split(found) == split(given[after:])
            check_order(found, after)
        await log.flush(run.id)


async def test_a_run_is_found_by_its_user_alone(log: EventLog) -> None:
    mine, other = unique("user"), unique("user")
    first = await opened(log, mine, "t")
    second = await opened(log, mine, "t")
    theirs = await opened(log, other, "t")
    log.append(second.id, [START, ContentDelta("a")])
    assert await log.find(mine, run_id=second.id) == replace(second, last_seq=2)
    newest = await log.find(mine, thread_id="t")
    assert newest is not None
    assert newest.id == second.id
    assert await log.find(other, run_id=first.id) is None
    assert await log.find(mine, run_id=theirs.id) is None
    assert await log.find(mine, run_id=second.id, thread_id="elsewhere") is None
    assert await log.find(mine, thread_id="elsewhere") is None
    assert await log.find(mine, run_id="nowhere") is None
    log.append(second.id, [END])
    assert await log.find(mine, run_id=second.id) == replace(second, ended=True, last_seq=3)
    await log.flush(second.id)
    assert await log.find(mine, run_id=second.id) == replace(second, ended=True, last_seq=3)


async def test_an_unknown_run_is_nothing_to_resume(log: EventLog) -> None:
    for wait in (True, False):
        with pytest.raises(NothingToResume):
            await read(log, "nowhere", wait=wait)


async def eventually(holds: Callable[[], Any], seconds: float = SECONDS) -> None:
    async with asyncio.timeout(seconds):
        while not await holds():
            await asyncio.sleep(0.01)


async def test_ended_runs_expire_and_running_ones_do_not(house: House) -> None:
    async with house.open(retention=0) as kept:
        log, user = kept.log, unique("user")
        running, ended = await opened(log, user), await opened(log, user)
        log.append(running.id, [START])
        log.append(ended.id, [START, END])
        await log.flush(ended.id)
        await eventually(log.expire)
        await eventually(lambda: gone(log, ended.id))
        for after in (0, 1):
            with pytest.raises(NothingToResume):
                await read(log, ended.id, after)
        assert await log.find(user, run_id=ended.id) == replace(
            ended, ended=True, last_seq=2, kept=False
        )
        assert await read(log, running.id, wait=False) == [(1, START)]
        assert await log.expire() == 0
        log.append(running.id, [END])
        assert await read(log, running.id) == [(1, START), (2, END)]


async def gone(log: EventLog, run_id: str) -> bool:
    try:
        await read(log, run_id, wait=False)
    except NothingToResume:
        return True
    return False


async def test_runs_are_kept_for_the_time_of_retention(house: House) -> None:
    async with house.open(retention=600) as kept:
        run = await opened(kept.log)
        kept.log.append(run.id, [START, END])
        await kept.log.flush(run.id)
        assert await kept.log.expire() == 0
        assert await read(kept.log, run.id) == [(1, START), (2, END)]


async def test_a_deleted_threads_runs_are_forgotten(house: House) -> None:
    """As a thread is deleted: first from the storage, then from the log."""
    from test_storage_contract import said

    async with house.open() as kept:
        user, log = unique("user"), kept.log
        await kept.storage.add_messages(user, [said("q")], create=True)
        ended, running = await opened(log, user, "t"), await opened(log, user, "t")
        elsewhere = await opened(log, user, "other")
        others = await opened(log, unique("user"), "t")
        for run in (ended, elsewhere, others):
            log.append(run.id, [START, END])
            await log.flush(run.id)
        log.append(running.id, [START])
        follower = asyncio.create_task(read(log, running.id))
        await asyncio.sleep(0)
        await kept.storage.delete_thread(user, "t")
        await log.forget(user, "t")
        try:
            assert await follower in ([(1, START)], [])
        except NothingToResume:
            pass
        for run in (ended, running):
            assert await log.find(user, run_id=run.id) is None
            with pytest.raises(NothingToResume):
                await read(log, run.id, wait=False)
        assert await log.find(user, thread_id="t") is None
        for run in (elsewhere, others):
            assert await read(log, run.id) == [(1, START), (2, END)]
        await log.forget(user, "t")


async def test_forget_by_itself_deletes_runs_and_events(house: House) -> None:
    async with house.open() as kept:
        run = await opened(kept.log, "u", "forgotten")
        kept.log.append(run.id, [START, END])
        await kept.log.flush(run.id)
        await kept.log.forget("u", "forgotten")
        assert await kept.log.find("u", run_id=run.id) is None
        with pytest.raises(NothingToResume):
            await read(kept.log, run.id)


async def test_nothing_is_abandoned_while_its_process_lives(house: House) -> None:
    async with house.open() as first, house.open() as second:
        run = await opened(first.log)
        first.log.append(run.id, [START])
        await first.log.flush(run.id)
        assert await first.log.claim_abandoned() == []
        assert run.id not in {each.id for each in await second.log.claim_abandoned()}
        first.log.append(run.id, [END])
        await first.log.flush(run.id)


async def test_runs_left_open_are_claimed_once_and_continued(durable: House) -> None:
    async with durable.open() as first:
        left, ended = await opened(first.log), await opened(first.log)
        first.log.append(left.id, [START, ContentDelta("a"), ContentDelta("b")])
        first.log.append(ended.id, [START, END])
    async with durable.open() as second, durable.open() as third:
        claims = await asyncio.gather(second.log.claim_abandoned(), third.log.claim_abandoned())
        owners = [
            kept
            for kept, claimed in zip((second, third), claims, strict=True)
            if left.id in {each.id for each in claimed}
        ]
        assert len(owners) == 1
        assert ended.id not in {each.id for claimed in claims for each in claimed}
        log = owners[0].log
        seq = log.append(left.id, [ContentDelta("c"), END])
        await log.flush(left.id)
        assert seq == 5, "it was left on purpose: no gap"
        for kept in (second, third):
            for after in range(6):
                found = await read(kept.log, left.id, after)
                assert split(found)[0] == "abc"[max(after - 1, 0) : 3]
        assert await second.log.claim_abandoned() == []


async def test_a_crashed_process_leaves_a_gap_before_the_closing_events(durable: House) -> None:
    """A process that is killed; what follows has numbers above any that it can have sent."""
    import sys

    code = (
        "import asyncio, json, os, signal, sys\n"
        "from contextlib import AsyncExitStack\n"
        "from quart_chat.adapters import stores\n"
        "from quart_chat.config import resolve\n"
        "from quart_chat.core.events import ContentDelta\n"
        "from quart_chat.core.ports import RunRecord\n"
        "async def main():\n"
        "    kept = await stores(resolve(json.loads(sys.argv[1]), {}), AsyncExitStack())\n"
        "    await kept.log.open(RunRecord(sys.argv[2], 'u', 't', 'q', 'a'))\n"
        "    kept.log.append(sys.argv[2], [ContentDelta('a'), ContentDelta('b')])\n"
        "    await kept.log.flush(sys.argv[2])\n"
        "    kept.log.append(sys.argv[2], [ContentDelta('lost')])\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "asyncio.run(main())\n"
    )
    run_id = unique("run")
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", code, json.dumps(durable.config), run_id
    )
    assert await asyncio.wait_for(process.wait(), SECONDS) == -9
    async with durable.open() as kept:
        assert run_id in {each.id for each in await kept.log.claim_abandoned()}
        assert split(await read(kept.log, run_id, wait=False))[0] == "ab"
        seq = kept.log.append(run_id, [Failed("interrupted", "gone", True), END])
        await kept.log.flush(run_id)
        assert seq > 1000
        for after in (2, 3, 100):
            found = await read(kept.log, run_id, after)
            assert [number for number, _ in found] == [seq - 1, seq]
        assert split(await read(kept.log, run_id, 1))[0] == "b"
        record = await kept.log.find("u", run_id=run_id)
        assert record is not None
        assert (record.ended, record.last_seq) == (True, seq)


async def test_a_closing_log_lets_its_followers_go(house: House) -> None:
    async with house.open() as kept:
        run = await opened(kept.log)
        kept.log.append(run.id, [START])
        follower = asyncio.create_task(read(kept.log, run.id))
        await asyncio.sleep(0)
        if not kept.log.durable:
            kept.log.append(run.id, [END])
    found = await follower
    assert found[0] == (1, START)


@pytest.mark.parametrize("events", [[START], [START, END]], ids=["running", "ended"])
async def test_a_flush_during_a_write_ends_with_that_write(
    postgres: Callable[[], str], events: list[Event]
) -> None:
    """A lock holds up the write, which has everything that the flush waits for."""
    import asyncpg

    url = postgres()
    async with House({"CHAT_DATABASE_URL": url}).open() as kept:
        run = await opened(kept.log)
        other = await asyncpg.connect(url)
        waiting = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
        async with other.transaction():
            await other.execute("SELECT id FROM chat_runs FOR UPDATE")
            kept.log.append(run.id, events)
            await eventually(lambda: other.fetchval(waiting))
            flush = asyncio.create_task(kept.log.flush(run.id))
            await asyncio.sleep(0)
        await other.close()
        try:
            async with asyncio.timeout(2):
                await flush
        finally:
            await kept.log.open(replace(run, id=unique("run")))
        assert await read(kept.log, run.id, wait=False) == numbered(events)


async def test_a_write_waits_for_the_lock_of_another_process(tmp_path: Path) -> None:
    """SQLite: a backup or a command line tool that writes is waited for, not an error."""
    file = tmp_path / "chat.sqlite3"
    async with House({"CHAT_DATABASE_URL": f"sqlite://{file}"}).open() as kept:
        run = await opened(kept.log)
        lock = sqlite3.connect(file, isolation_level=None)
        lock.execute("BEGIN IMMEDIATE")
        kept.log.append(run.id, [START])
        flush = asyncio.create_task(kept.log.flush(run.id))
        done, _ = await asyncio.wait({flush}, timeout=0.5)
        lock.execute("COMMIT")
        lock.close()
        assert not done
        await flush
        assert await read(kept.log, run.id, wait=False) == [(1, START)]
