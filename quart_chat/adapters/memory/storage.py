"""Storage, archive and event log in dictionaries, bounded: the reference implementation."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any

from ...core.messages import Message, Thread, now, text_of, title_from
from ...core.ports import Window
from ...errors import IdConflict, NotFound

MAX_MESSAGES = 100_000
"""Messages of all users together; beyond it the threads that were quiet for longest go."""

ThreadKey = tuple[str, str]


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
        self._kept: OrderedDict[ThreadKey, _Kept] = OrderedDict()
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
                yield {"type": "thread", **kept.thread.to_dict(None)}
                for message in list(kept.messages.values()):
                    yield {"type": "message", **message.to_dict()}

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

    def _evict(self, newest: ThreadKey) -> None:
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
