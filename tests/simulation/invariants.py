"""What has to hold after every schedule."""

from __future__ import annotations

from typing import Any

from quart_chat.adapters.database.batches import decode
from quart_chat.core.events import End, Event, Start
from quart_chat.core.messages import text_of
from quart_chat.core.ports import Window

from .workload import DRAIN_SLACK, World, text_of_events

Numbered = tuple[int, Event]


async def check(world: World) -> None:
    """Raise AssertionError, in words, for the first thing that is wrong."""
    assert not world.violations, world.violations
    logs = _logs(world)
    for seconds, took in world.drains:
        assert took <= seconds + DRAIN_SLACK, f"a drain of {seconds} s took {took} s"
    for key, count in world.paid.items():
        assert count == 1, f"{key} was done {count} times after one approval"
    for run_id, events in logs.items():
        _check_log(run_id, events)
    _check_observations(world, logs)
    await _check_messages(world, logs)


def _logs(world: World) -> dict[str, list[Numbered]]:
    """Every run's events, none merged."""
    if world.disk is None:
        logs = world.process.log._logs
        return {run_id: log.tail.between(0, log.tail.last) for run_id, log in logs.items()}
    found: dict[str, list[Numbered]] = {}
    for (run_id,) in world.disk.rows("SELECT id FROM chat_runs"):
        rows = world.disk.rows(
            "SELECT data FROM chat_events WHERE run_id = ? ORDER BY last_seq", run_id
        )
        found[run_id] = [each for (data,) in rows for each in decode(data, 0)]
    open_runs = world.disk.rows("SELECT id FROM chat_runs WHERE ended_at IS NULL")
    assert not open_runs, f"runs are open forever: {open_runs}"
    return found


def _check_log(run_id: str, events: list[Numbered]) -> None:
    numbers = [seq for seq, _ in events]
    assert numbers == sorted(set(numbers)), f"{run_id}: numbers do not grow: {numbers}"
    assert isinstance(events[0][1], Start), f"{run_id} does not begin with start"
    ends = [seq for seq, event in events if isinstance(event, End)]
    assert ends == [numbers[-1]], f"{run_id} has the ends {ends}, its last event is {numbers[-1]}"


def _check_observations(world: World, logs: dict[str, list[Numbered]]) -> None:
    for seen in world.observations:
        numbers = [seq for seq, _ in seen.events]
        assert numbers == sorted(set(numbers)), f"{seen.run_id}: a client saw {numbers}"
        assert all(seq > seen.after for seq in numbers), f"{seen.run_id}: seen again after resume"
        log = logs.get(seen.run_id)
        if log is None or not seen.events:  # its thread was deleted, or it was played from storage
            continue
        upto = numbers[-1]
        expected = text_of_events([e for e in log if seen.after < e[0] <= upto])
        text = text_of_events(seen.events)
        exact = text == expected
        if not exact and world.crashed:  # a client may have seen more than was kept
            exact = text.startswith(expected)
        assert exact, f"{seen.run_id} after {seen.after}: a client saw {text!r}, not {expected!r}"


async def _check_messages(world: World, logs: dict[str, list[Numbered]]) -> None:
    storage: Any = world.process.parts.storage
    if world.disk is not None:
        storage._database.dead = False
    threads = {(user, thread) for user, thread, _ in world.acknowledged}
    for user, thread in sorted(threads - world.deleted):
        window = Window(limit=10_000, branch="all")
        messages = await storage.messages(user, thread, window)
        ids = [message.id for message in messages]
        assert len(ids) == len(set(ids)), f"messages are doubled: {ids}"
        sent = {m for u, t, m in world.acknowledged if (u, t) == (user, thread)}
        if world.calm:  # nothing failed: what is stored is answered, also if its client has gone
            sent |= {message.id for message in messages if message.role == "user"}
        assert sent <= set(ids), f"acknowledged messages are lost: {sent - set(ids)}"
        once = {key for key, count in world.sent.items() if count == 1}
        dropped = {m for u, t, m in world.dropped & once if (u, t) == (user, thread)}
        assert not dropped & set(ids), f"dropped from the queue and answered: {dropped & set(ids)}"
        answers = _answers(logs, sent)
        for message_id, run_ids in answers.items():
            assert run_ids, f"{message_id} was acknowledged and never answered"
            if (user, thread) not in world.regenerated:
                assert len(run_ids) == 1, f"{message_id} was answered {len(run_ids)} times"
        for run_id in {run_id for run_ids in answers.values() for run_id in run_ids}:
            stored = "".join(
                text_of(m.content) for m in messages if m.run_id == run_id and m.role == "assistant"
            )
            said = text_of_events(logs[run_id])
            assert stored == said, f"{run_id}: stored is {stored!r}, said was {said!r}"
            start = logs[run_id][0][1]
            assert isinstance(start, Start)
            assert start.message_id in ids, f"{run_id}: its answer is not stored"


def _answers(logs: dict[str, list[Numbered]], sent: set[str]) -> dict[str, list[str]]:
    answers: dict[str, list[str]] = {message_id: [] for message_id in sorted(sent)}
    for run_id, events in logs.items():
        start = events[0][1]
        if isinstance(start, Start) and start.user_message_id in answers:
            answers[start.user_message_id].append(run_id)
    return answers
