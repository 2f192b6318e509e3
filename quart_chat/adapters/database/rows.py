"""Rows of the database as values, and back."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar

from ...core.messages import Message, MessageContent, Thread, ToolCall

R = TypeVar("R", bound=Mapping[str, Any])
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


MESSAGE_SIZE = (
    "coalesce(length(parts), length(text)) + coalesce(length(reasoning), 0) "
    "+ coalesce(length(tool_calls), 0)"
)
"""Characters of a message's text, as an expression over its row."""


def within(rows: Sequence[R], chars: int) -> Sequence[R]:
    """Return the first rows, up to and with the one with which their ``size`` passes ``chars``."""
    for number, row in enumerate(rows, 1):
        chars -= row["size"]
        if chars < 0:
            return rows[:number]
    return rows


def micros(moment: datetime) -> int:
    """Return microseconds since 1970."""
    return (moment - EPOCH) // timedelta(microseconds=1)


def moment(value: int) -> datetime:
    """Return the time so many microseconds after 1970."""
    return EPOCH + timedelta(microseconds=value)


def dump(value: Any) -> str:
    """Return compact JSON for a column."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _load(text: str | None) -> Any:
    if text is None or text == "{}":  # most columns of most messages
        return None if text is None else {}
    return json.loads(text)


def thread_of(row: Mapping[str, Any]) -> Thread:
    """Return the thread of a row of ``chat_threads``."""
    return Thread(
        id=row["id"],
        title=row["title"] if row["title"] is not None else row["preview"],
        metadata=_load(row["metadata"]),
        message_count=row["message_count"],
        created_at=moment(row["created_at"]),
        updated_at=moment(row["updated_at"]),
    )


def message_of(row: Mapping[str, Any]) -> Message:
    """Return the message of a row of ``chat_messages``."""
    calls = _load(row["tool_calls"]) or ()
    return Message(
        id=row["id"],
        thread_id=row["thread_id"],
        role=row["role"],
        content=_content(row),
        parent_id=row["parent_id"],
        run_id=row["run_id"],
        reasoning=row["reasoning"],
        tool_calls=tuple(ToolCall(**call) for call in calls),
        tool_call_id=row["tool_call_id"],
        name=row["name"],
        model=row["model"],
        provider=row["provider"],
        status=row["status"],
        usage=_load(row["token_usage"]),
        feedback=_load(row["feedback"]),
        metadata=_load(row["metadata"]),
        options=_load(row["options"]),
        created_at=moment(row["created_at"]),
        position=row["position"],
    )


def _content(row: Mapping[str, Any]) -> MessageContent:
    parts: list[dict[str, Any]] | None = _load(row["parts"])
    return str(row["text"]) if parts is None else parts
