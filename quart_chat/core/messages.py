"""The values of a conversation: a message, a thread, a tool call, a user."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal
from uuid import UUID

MessageContent = str | list[dict[str, Any]]
"""The content of a message: a text, or parts in OpenAI's form."""

Role = Literal["system", "user", "assistant", "tool"]
Status = Literal["completed", "stopped", "failed", "interrupted"]


def new_id() -> str:
    """A UUIDv7 (RFC 9562, section 5.7): unique, and sorting by the time it was made."""
    milliseconds = time.time_ns() // 1_000_000
    value = (milliseconds & (1 << 48) - 1) << 80 | int.from_bytes(os.urandom(10))
    value = value & ~(0xF << 76) | 0x7 << 76
    value = value & ~(0x3 << 62) | 0x2 << 62
    return str(UUID(int=value))


def derived_id(*parts: str) -> str:
    """The same id for the same parts: what a retry has to find again."""
    digest = bytearray(hashlib.sha256("\0".join(parts).encode()).digest()[:16])
    digest[6] = digest[6] & 0x0F | 0x80
    digest[8] = digest[8] & 0x3F | 0x80
    return str(UUID(bytes=bytes(digest)))


def now() -> datetime:
    """The present moment, in UTC."""
    return datetime.now(UTC)


def rfc3339(moment: datetime) -> str:
    """A moment as RFC 3339 writes it, in UTC, to the microsecond."""
    return moment.astimezone(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


def text_of(content: MessageContent | None) -> str:
    """The words of a content: the text itself, or its text parts, a line each."""
    if content is None or isinstance(content, str):
        return content or ""
    return "\n".join(part["text"] for part in content if part.get("type") == "text")


@dataclass(frozen=True, slots=True)
class User:
    """Who is asking. ``expires_at`` is when that stops being known, in seconds since 1970."""

    id: str
    expires_at: float | None = None


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call that the model makes; ``arguments`` is what it wrote, decoded."""

    id: str
    name: str
    arguments: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        return {"id": self.id, "name": self.name, "arguments": self.arguments}


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens as the provider counts them, or ``estimated`` at four characters a token."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    estimated: bool = False

    def __add__(self, other: Usage) -> Usage:
        return Usage(
            self.prompt_tokens + other.prompt_tokens,
            self.completion_tokens + other.completion_tokens,
            self.estimated or other.estimated,
        )

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Usage:
        """Build usage from what ``to_dict`` returned; an empty map counts nothing."""
        return cls(
            fields.get("prompt_tokens", 0),
            fields.get("completion_tokens", 0),
            fields.get("estimated", False),
        )

    def to_dict(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "estimated": self.estimated,
        }


@dataclass(frozen=True, slots=True)
class Message:
    """One stored message. ``position`` is its place in the thread, from 1.

    ``options`` is what its sender asked for besides the content (tools, sampling); it is kept to
    answer again and to tell a retry from a conflict, and is not part of the JSON.
    """

    id: str
    thread_id: str
    role: Role
    content: MessageContent
    parent_id: str | None = None
    run_id: str | None = None
    reasoning: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None
    name: str | None = None
    model: str | None = None
    provider: str | None = None
    status: Status = "completed"
    usage: dict[str, Any] | None = None
    feedback: dict[str, Any] | None = None
    metadata: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    created_at: datetime = field(default_factory=now)
    position: int = 0

    def to_dict(self) -> dict[str, Any]:
        """The message as the JSON API and the ``message`` event show it."""
        body: dict[str, Any] = {
            "id": self.id,
            "thread_id": self.thread_id,
            "parent_id": self.parent_id,
            "run_id": self.run_id,
            "role": self.role,
            "content": self.content,
        }
        if self.reasoning:
            body["reasoning"] = self.reasoning
        if self.tool_calls:
            body["tool_calls"] = [call.to_dict() for call in self.tool_calls]
        for name in ("tool_call_id", "name"):
            if (value := getattr(self, name)) is not None:
                body[name] = value
        body |= {"model": self.model, "provider": self.provider, "status": self.status}
        for name in ("usage", "feedback"):
            if (value := getattr(self, name)) is not None:
                body[name] = value
        body |= {"metadata": self.metadata, "created_at": rfc3339(self.created_at)}
        return body


@dataclass(frozen=True, slots=True)
class Thread:
    """A conversation of one user."""

    id: str
    title: str | None = None
    metadata: dict[str, Any] = field(default_factory=dict)
    message_count: int = 0
    created_at: datetime = field(default_factory=now)
    updated_at: datetime = field(default_factory=now)

    def to_dict(self, active_run_id: str | None) -> dict[str, Any]:
        """The thread as the JSON API shows it."""
        return {
            "id": self.id,
            "title": self.title,
            "created_at": rfc3339(self.created_at),
            "updated_at": rfc3339(self.updated_at),
            "message_count": self.message_count,
            "active_run_id": active_run_id,
            "metadata": self.metadata,
        }


TITLE_CHARS = 80
TITLE_SOURCE = 1024


def title_from(content: MessageContent) -> str | None:
    """Return a title from the beginning of a first message: one line, at most 80 characters."""
    words = " ".join(text_of(content).lstrip()[:TITLE_SOURCE].split())
    if len(words) <= TITLE_CHARS:
        return words or None
    return words[: TITLE_CHARS - 1].rsplit(" ", 1)[0] + "…"


NOT_FINISHED = "The tool did not finish: the run ended before its result."


def history_for_provider(messages: Sequence[Message], max_chars: int | None) -> list[Message]:
    """The newest messages that fit, oldest first, never cut between a call and its result.

    A call whose result is missing gets one that says so, and a result whose call is not there is
    left out: providers refuse both.
    """
    units = _units(messages)
    kept: list[list[Message]] = []
    chars = 0
    for unit in reversed(units):
        chars += sum(_weight(message) for message in unit)
        if kept and max_chars is not None and chars > max_chars:
            break
        kept.append(unit)
    return [message for unit in reversed(kept) for message in unit]


def _units(messages: Sequence[Message]) -> list[list[Message]]:
    units: list[list[Message]] = []
    open_calls: dict[str, ToolCall] = {}
    for message in messages:
        if message.role == "tool":
            if open_calls.pop(message.tool_call_id or "", None) is not None:
                units[-1].append(message)
            continue
        _close(units, open_calls)
        if message.role == "assistant" and not message.tool_calls and not message.content:
            continue
        units.append([message])
        open_calls = {call.id: call for call in message.tool_calls}
    _close(units, open_calls)
    return units


def _close(units: list[list[Message]], open_calls: dict[str, ToolCall]) -> None:
    for call in open_calls.values():
        units[-1].append(tool_message(call, NOT_FINISHED, units[-1][0].thread_id, new_id()))
    open_calls.clear()


def tool_message(
    call: ToolCall, content: str, thread_id: str, message_id: str, **more: Any
) -> Message:
    """The message that answers a call."""
    return Message(
        id=message_id,
        thread_id=thread_id,
        role="tool",
        content=content,
        tool_call_id=call.id,
        name=call.name,
        **more,
    )


def _weight(message: Message) -> int:
    calls = sum(len(call.name) + len(str(call.arguments)) for call in message.tool_calls)
    return len(text_of(message.content)) + calls


def without_empty(values: Mapping[str, Any]) -> dict[str, Any]:
    """The entries that say something: neither null nor an empty list, text or map."""
    return {key: value for key, value in values.items() if value not in (None, [], "", {})}
