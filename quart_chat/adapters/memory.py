"""Storage, archive and event log in dictionaries, bounded: the reference implementation."""

from __future__ import annotations

import re
import time
from collections import OrderedDict
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any

from ..core.events import Event, Numbered
from ..core.messages import Message, Thread, now, text_of, title_from
from ..core.ports import RunRecord, Window
from ..core.tail import Tail
from ..errors import IdConflict, NotFound, NothingToResume

MAX_MESSAGES = 100_000
"""Messages of all users together; beyond it the threads that were quiet for longest go."""

MAX_LOG_CHARS = 64 * 1024 * 1024
"""Text of all event logs together; beyond it the logs that ended first go."""

MAX_EXPIRED = 100_000
"""Runs that are still known after their events have gone."""

Key = tuple[str, str]


def search_words(query: str) -> list[str]:
    """The words of a search: each has to begin a word of the text."""
    return re.findall(r"\w+", query.lower())


def _matches(words: Sequence[str], text: str | None) -> bool:
    found = search_words(text or "")
    return all(any(each.startswith(word) for each in found) for word in words)


@dataclass
class _Kept:
    thread: Thread
    titled: bool
    messages: dict[str, Message] = field(default_factory=dict)


class MemoryStorage:
    """Threads and messages of this process; also their archive."""

    def __init__(self, max_messages: int = MAX_MESSAGES) -> None:
        self._kept: OrderedDict[Key, _Kept] = OrderedDict()
        self._max_messages = max_messages
        self._count = 0

    async def create_thread(self, user: str, thread: Thread) -> Thread:
        key = (user, thread.id)
        if key in self._kept:
            raise IdConflict(f"There is a thread {thread.id!r} already.")
        self._kept[key] = _Kept(thread, thread.title is not None)
        self._evict(key)
        return thread

    async def threads(
        self, user: str, *, query: str | None, after: tuple[datetime, str] | None, limit: int
    ) -> Sequence[Thread]:
        words = search_words(query or "")
        if query and not words:
            return []
        found = [
            kept.thread
            for (owner, _), kept in self._kept.items()
            if owner == user and self._found(words, kept)
        ]
        found.sort(key=lambda thread: (thread.updated_at, thread.id), reverse=True)
        return [t for t in found if after is None or (t.updated_at, t.id) < after][:limit]

    def _found(self, words: Sequence[str], kept: _Kept) -> bool:
        texts = (text_of(message.content) for message in kept.messages.values())
        return not words or any(_matches(words, text) for text in (kept.thread.title, *texts))

    async def thread(self, user: str, thread_id: str) -> Thread:
        return self._get(user, thread_id).thread

    async def update_thread(
        self, user: str, thread_id: str, changes: Mapping[str, Any], *, only_untitled: bool = False
    ) -> Thread:
        kept = self._get(user, thread_id)
        if only_untitled and kept.titled:
            return kept.thread
        if "title" in changes:
            kept.titled = changes["title"] is not None
        kept.thread = replace(kept.thread, **changes)
        if not kept.titled:
            kept.thread = replace(kept.thread, title=_first_title(kept))
        return kept.thread

    async def delete_thread(self, user: str, thread_id: str) -> None:
        self._count -= len(self._get(user, thread_id).messages)
        del self._kept[user, thread_id]

    async def add_messages(
        self, user: str, messages: Sequence[Message], *, create: bool = False
    ) -> Sequence[Message]:
        key = (user, messages[0].thread_id)
        kept = self._kept.get(key)
        known = {*kept.messages} if kept is not None else set()
        for message in messages:
            if message.parent_id is not None and message.parent_id not in known:
                raise NotFound(f"There is no message {message.parent_id!r} in this thread.")
            known.add(message.id)
        if kept is None:
            if not create:
                raise NotFound("There is no such thread.")
            kept = self._kept[key] = _Kept(Thread(id=key[1]), titled=False)
        stored = [self._add(kept, message) for message in messages]
        self._evict(key)
        return stored

    def _add(self, kept: _Kept, message: Message) -> Message:
        if (known := kept.messages.get(message.id)) is not None:
            return known
        parent_id = message.parent_id
        if parent_id is None and message.role == "user" and kept.messages:
            parent_id = next(reversed(kept.messages))
        position = kept.thread.message_count + 1
        stored = replace(message, parent_id=parent_id, position=position)
        kept.messages[stored.id] = stored
        kept.thread = replace(kept.thread, message_count=position, updated_at=now())
        if not kept.titled and kept.thread.title is None:
            kept.thread = replace(kept.thread, title=_first_title(kept))
        self._count += 1
        return stored

    async def messages(self, user: str, thread_id: str, window: Window) -> Sequence[Message]:
        kept = self._get(user, thread_id)
        if window.leaf is not None and window.leaf not in kept.messages:
            raise NotFound("There is no such message in this thread.")
        found = [*kept.messages.values()] if window.branch == "all" else _path(kept, window.leaf)
        if window.order == "desc":
            found.reverse()
        if window.after is not None:
            beyond, after = window.order == "asc", window.after
            found = [m for m in found if m.position != after and (m.position > after) == beyond]
        return found[: window.limit]

    async def set_feedback(
        self, user: str, thread_id: str, message_id: str, feedback: Mapping[str, Any] | None
    ) -> None:
        kept = self._get(user, thread_id)
        if (message := kept.messages.get(message_id)) is None:
            raise NotFound("There is no such message in this thread.")
        new = dict(feedback) if feedback is not None else None
        kept.messages[message_id] = replace(message, feedback=new)

    async def export(self, user: str) -> AsyncGenerator[dict[str, Any], None]:
        for (owner, _), kept in list(self._kept.items()):
            if owner == user:
                yield {"type": "thread", **kept.thread.as_json(None)}
                for message in list(kept.messages.values()):
                    yield {"type": "message", **message.as_json()}

    async def erase(self, user: str) -> int:
        mine = [key for key in self._kept if key[0] == user]
        for key in mine:
            await self.delete_thread(*key)
        return len(mine)

    async def expire(self, before: datetime, limit: int) -> int:
        old = [key for key, kept in self._kept.items() if kept.thread.updated_at < before][:limit]
        for key in old:
            await self.delete_thread(*key)
        return len(old)

    def _get(self, user: str, thread_id: str) -> _Kept:
        if (kept := self._kept.get((user, thread_id))) is None:
            raise NotFound("There is no such thread.")
        return kept

    def _evict(self, newest: Key) -> None:
        self._kept.move_to_end(newest)
        while self._count + len(self._kept) > self._max_messages and len(self._kept) > 1:
            _, gone = self._kept.popitem(last=False)
            self._count -= len(gone.messages)


def _first_title(kept: _Kept) -> str | None:
    titles = (title_from(m.content) for m in kept.messages.values() if m.role == "user")
    return next((title for title in titles if title), None)


def _path(kept: _Kept, leaf: str | None) -> list[Message]:
    message = kept.messages.get(leaf or next(reversed(kept.messages), ""))
    path = []
    while message is not None:
        path.append(message)
        message = kept.messages.get(message.parent_id or "")
    path.reverse()
    return path


@dataclass
class _Log:
    record: RunRecord
    tail: Tail = field(default_factory=Tail)
    ended_at: float = 0.0


class MemoryEventLog:
    """The events of runs of this process, kept for ``retention`` seconds after their end."""

    durable = False

    def __init__(self, retention: float, max_chars: int = MAX_LOG_CHARS) -> None:
        self._retention = retention
        self._max_chars = max_chars
        self._logs: dict[str, _Log] = {}
        self._expired: OrderedDict[str, RunRecord] = OrderedDict()
        self._ended: OrderedDict[str, _Log] = OrderedDict()
        self._chars = 0

    async def open(self, run: RunRecord, first: Sequence[Event] = ()) -> None:
        self._logs[run.id] = _Log(run)
        self.append(run.id, first)

    def append(self, run_id: str, events: Sequence[Event]) -> int:
        log = self._logs[run_id]
        before = log.tail.size
        seq = log.tail.append(events)
        self._chars += log.tail.size - before
        if log.tail.ended:
            log.ended_at = time.monotonic()
            self._ended[run_id] = log
        while self._chars > self._max_chars and self._ended:
            self._drop(next(iter(self._ended)))
        return seq

    async def flush(self, run_id: str) -> None:
        """Nothing in memory is durable."""

    async def follow(
        self, run_id: str, after: int, *, wait: bool = True
    ) -> AsyncGenerator[Sequence[Numbered], None]:
        if (log := self._logs.get(run_id)) is None:
            raise NothingToResume("The events of this run are not kept any more.")
        tail = log.tail
        while True:
            if after < tail.last:
                page = tail.after(after)
                after = page[-1][0]
                yield page
            elif tail.ended or not wait:
                return
            else:
                await tail.more(after)

    async def find(
        self, user: str, *, run_id: str | None = None, thread_id: str | None = None
    ) -> RunRecord | None:
        if run_id is not None:
            found = [self._record(run_id)]
        else:
            found = [self._record(each) for each in [*self._expired, *self._logs]]
        mine = [
            record
            for record in found
            if record is not None
            and record.user == user
            and (thread_id is None or record.thread_id == thread_id)
        ]
        return mine[-1] if mine else None

    def _record(self, run_id: str) -> RunRecord | None:
        if (log := self._logs.get(run_id)) is None:
            return self._expired.get(run_id)
        return replace(log.record, ended=log.tail.ended, last_seq=log.tail.last)

    async def abandoned(self) -> Sequence[RunRecord]:
        return []

    async def forget(self, user: str, thread_id: str) -> None:
        for run_id in [*self._expired, *self._logs]:
            record = self._record(run_id)
            if record is not None and (record.user, record.thread_id) == (user, thread_id):
                self._drop(run_id)
                self._expired.pop(run_id, None)

    async def expire(self) -> int:
        count, before = 0, time.monotonic() - self._retention
        while self._ended and next(iter(self._ended.values())).ended_at < before:
            self._drop(next(iter(self._ended)))
            count += 1
        return count

    def _drop(self, run_id: str) -> None:
        record = self._record(run_id)
        self._ended.pop(run_id, None)
        if (log := self._logs.pop(run_id, None)) is not None and record is not None:
            self._chars -= log.tail.size
            log.tail.close()
            self._expired[run_id] = record
            if len(self._expired) > MAX_EXPIRED:
                self._expired.popitem(last=False)
