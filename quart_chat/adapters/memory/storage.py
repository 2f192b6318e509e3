"""Storage and user data in dictionaries, bounded: the reference implementation."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any

from ...core.messages import Message, Thread, now, text_of, title_from
from ...core.ports import MAX_BRANCHES, TOO_MANY_BRANCHES, Window
from ...core.search import contains, pieces
from ...errors import IdConflict, InvalidMessage, NotFound, StorageUnavailable

MAX_CHARS = 64 * 1024 * 1024
"""Text of all users together. Beyond it the quiet threads of those with the most text go."""

OVERHEAD = 500
"""What a thread or message weighs besides its text."""

NO_ROOM = "The server's memory for conversations is full. Start a new thread."


@dataclass
class _Kept:
    thread: Thread
    titled: bool
    messages: dict[str, Message] = field(default_factory=dict)
    branches: dict[str, tuple[int, int]] = field(default_factory=dict)
    tips: dict[int, str] = field(default_factory=dict)
    size: int = OVERHEAD


@dataclass
class _User:
    threads: OrderedDict[str, _Kept] = field(default_factory=OrderedDict)
    size: int = 0


class MemoryStorage:
    """Threads and messages of this process; also their user data."""

    def __init__(self, max_chars: int = MAX_CHARS) -> None:
        self._users: dict[str, _User] = {}
        self._max_chars = max_chars
        self._size = 0

    async def create_thread(self, user: str, thread: Thread) -> Thread:
        kept = self._find(user, thread.id)
        if kept is not None:
            raise IdConflict(f"There is a thread {thread.id!r} already.")
        kept = _Kept(thread, thread.title is not None)
        size = OVERHEAD + len(thread.title or "") + len(str(thread.metadata))
        self._make_room(user, thread.id, size)
        kept.size = 0
        self._keep(user, kept)
        self._grow(user, kept, size)
        return thread

    async def threads(
        self, user: str, *, query: str | None, after: tuple[datetime, str] | None, limit: int
    ) -> Sequence[Thread]:
        wanted = pieces(query or "")
        if query and not wanted:
            return []
        threads = [kept.thread for kept in self._threads(user) if _matches(wanted, kept)]
        threads.sort(key=lambda thread: (thread.updated_at, thread.id), reverse=True)
        return [t for t in threads if after is None or (t.updated_at, t.id) < after][:limit]

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
        before = kept.thread
        kept.thread = replace(kept.thread, **changes)
        self._grow(user, kept, _thread_size(kept.thread) - _thread_size(before))
        if not kept.titled:
            kept.thread = replace(kept.thread, title=_first_title(kept))
        return kept.thread

    async def delete_thread(self, user: str, thread_id: str) -> None:
        self._get(user, thread_id)
        self._drop(user, thread_id)

    async def add_messages(
        self, user: str, messages: Sequence[Message], *, create: bool = False
    ) -> Sequence[Message]:
        thread_id = messages[0].thread_id
        kept = self._find(user, thread_id)
        known = {*kept.messages} if kept is not None else set()
        for message in messages:
            if message.parent_id is not None and message.parent_id not in known:
                raise NotFound(f"There is no message {message.parent_id!r} in this thread.")
            known.add(message.id)
        if kept is None and not create:
            raise NotFound("There is no such thread.")
        new = [m for m in messages if kept is None or m.id not in kept.messages]
        self._make_room(user, thread_id, OVERHEAD + sum(map(_size, new)))
        if kept is None:
            kept = _Kept(Thread(id=thread_id), titled=False, size=0)
            new_size = OVERHEAD
        else:
            new_size = 0
        stored = _add_all(kept, messages)
        self._keep(user, kept)
        self._grow(user, kept, new_size + sum(map(_size, new)))
        return stored

    async def messages(self, user: str, thread_id: str, window: Window) -> Sequence[Message]:
        kept = self._get(user, thread_id)
        if window.leaf is not None and window.leaf not in kept.messages:
            raise NotFound("There is no such message in this thread.")
        messages = [*kept.messages.values()] if window.branch == "all" else _path(kept, window.leaf)
        if window.order == "desc":
            messages.reverse()
        if window.after is not None:
            beyond, after = window.order == "asc", window.after
            messages = [
                m for m in messages if m.position != after and (m.position > after) == beyond
            ]
        return _within(messages[: window.limit], window.max_chars)

    async def set_feedback(
        self, user: str, thread_id: str, message_id: str, feedback: Mapping[str, Any] | None
    ) -> None:
        kept = self._get(user, thread_id)
        if (message := kept.messages.get(message_id)) is None:
            raise NotFound("There is no such message in this thread.")
        new = dict(feedback) if feedback is not None else None
        kept.messages[message_id] = replace(message, feedback=new)

    async def export(self, user: str) -> AsyncGenerator[dict[str, Any], None]:
        for kept in self._threads(user):
            yield {"type": "thread", **kept.thread.to_dict(None)}
            for message in list(kept.messages.values()):
                yield {"type": "message", **message.to_dict()}

    async def erase(self, user: str) -> int:
        threads = self._threads(user)
        for kept in threads:
            self._drop(user, kept.thread.id)
        return len(threads)

    async def expire(self, before: datetime, limit: int) -> int:
        old = [
            (user, kept.thread.id)
            for user in self._users
            for kept in self._threads(user)
            if kept.thread.updated_at < before
        ][:limit]
        for key in old:
            self._drop(*key)
        return len(old)

    def _threads(self, user: str) -> list[_Kept]:
        conversations = self._users.get(user)
        return [] if conversations is None else [*conversations.threads.values()]

    def _find(self, user: str, thread_id: str) -> _Kept | None:
        conversations = self._users.get(user)
        return None if conversations is None else conversations.threads.get(thread_id)

    def _get(self, user: str, thread_id: str) -> _Kept:
        if (kept := self._find(user, thread_id)) is None:
            raise NotFound("There is no such thread.")
        return kept

    def _keep(self, user: str, kept: _Kept) -> None:
        threads = self._users.setdefault(user, _User()).threads
        threads[kept.thread.id] = kept
        threads.move_to_end(kept.thread.id)

    def _grow(self, user: str, kept: _Kept, size: int) -> None:
        kept.size += size
        self._users[user].size += size
        self._size += size

    def _drop(self, user: str, thread_id: str) -> None:
        owner = self._users[user]
        size = owner.threads.pop(thread_id).size
        owner.size -= size
        self._size -= size
        if not owner.threads:
            del self._users[user]

    def _make_room(self, user: str, thread_id: str, size: int) -> None:
        """Drop quiet threads of whoever is over a fair share; never another's for one who is."""
        while self._size + size > self._max_chars:
            loser = self._over_share(user, size)
            threads = self._users[loser].threads if loser in self._users else {}
            oldest = next((each for each in threads if (loser, each) != (user, thread_id)), None)
            if oldest is None:
                raise StorageUnavailable(NO_ROOM)
            self._drop(loser, oldest)

    def _over_share(self, user: str, size: int) -> str:
        own = self._users.get(user, _User()).size + size
        if own > self._max_chars // max(1, len({*self._users, user})):
            return user
        return max(self._users, key=lambda each: self._users[each].size)


def _matches(wanted: Sequence[str], kept: _Kept) -> bool:
    texts = (text_of(message.content) for message in kept.messages.values())
    title = kept.thread.title or ""
    return not wanted or any(contains(text, wanted) for text in (title, *texts))


def _add_all(kept: _Kept, messages: Sequence[Message]) -> list[Message]:
    """Add messages, all or none."""
    thread, known = kept.thread, len(kept.messages)
    try:
        return [_add(kept, message) for message in messages]
    except InvalidMessage:
        kept.thread = thread
        for message_id in [*kept.messages][known:]:
            del kept.messages[message_id], kept.branches[message_id]
        kept.tips = {branch: each for each, (branch, _) in kept.branches.items()}
        raise


def _add(kept: _Kept, message: Message) -> Message:
    if (known := kept.messages.get(message.id)) is not None:
        return known
    parent_id = message.parent_id
    if parent_id is None and message.role == "user" and kept.messages:
        parent_id = next(reversed(kept.messages))
    position = kept.thread.message_count + 1
    stored = replace(message, parent_id=parent_id, position=position)
    branch, depth = _branch(kept, parent_id, position)
    if depth > MAX_BRANCHES:
        raise InvalidMessage(TOO_MANY_BRANCHES)
    kept.branches[stored.id], kept.tips[branch] = (branch, depth), stored.id
    kept.messages[stored.id] = stored
    kept.thread = replace(kept.thread, message_count=position, updated_at=now())
    if not kept.titled and kept.thread.title is None:
        kept.thread = replace(kept.thread, title=_first_title(kept))
    return stored


def _branch(kept: _Kept, parent_id: str | None, position: int) -> tuple[int, int]:
    """Return a message's branch, and how many branches its path passes before."""
    if parent_id is None:
        return position, 0
    branch, depth = kept.branches[parent_id]
    return (branch, depth) if kept.tips[branch] == parent_id else (position, depth + 1)


def _chars(message: Message) -> int:
    content = message.content
    size = len(content if isinstance(content, str) else _dump(content))
    calls = [call.to_dict() for call in message.tool_calls]
    return size + len(message.reasoning or "") + (len(_dump(calls)) if calls else 0)


def _size(message: Message) -> int:
    return OVERHEAD + _chars(message) + len(str(message.metadata)) + len(str(message.options))


def _thread_size(thread: Thread) -> int:
    return len(thread.title or "") + len(str(thread.metadata))


def _within(messages: Sequence[Message], max_chars: int | None) -> Sequence[Message]:
    chars = 0
    for number, message in enumerate(messages, 1):
        chars += _chars(message)
        if max_chars is not None and chars > max_chars:
            return messages[:number]
    return messages


def _dump(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


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
