"""What a run says of itself: frozen values, numbered 1, 2, 3 … by the event log.

A field's name is its name on the wire. ``merge`` joins neighbouring deltas, which is what keeps a
fast provider and a slow client from costing a frame a token.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal

from .messages import Message, Status

MERGED_CHARS = 65_536
"""A merged delta grows to about this many characters before the next one begins."""


@dataclass(frozen=True, slots=True)
class Start:
    """The first event of every run; the user's message is durably stored by then."""

    type: ClassVar[str] = "start"
    message_id: str
    user_message_id: str
    parent_id: str | None
    model: str
    provider: str


@dataclass(frozen=True, slots=True)
class ContentDelta:
    """Text to append to the answer."""

    type: ClassVar[str] = "content"
    content: str


@dataclass(frozen=True, slots=True)
class Reasoning:
    """Text to append to the model's reasoning."""

    type: ClassVar[str] = "reasoning"
    content: str


@dataclass(frozen=True, slots=True)
class ToolCalled:
    """The model calls a tool; sent before the tool runs."""

    type: ClassVar[str] = "tool_call"
    tool_call_id: str
    name: str
    arguments: dict[str, Any]
    needs: Literal["approval", "client"] | None = None
    usage: dict[str, Any] | None = None
    """For the log alone: what the round has cost that made the call."""


@dataclass(frozen=True, slots=True)
class ToolProgress:
    """What a running tool says of itself."""

    type: ClassVar[str] = "tool_progress"
    tool_call_id: str
    name: str
    content: str


@dataclass(frozen=True, slots=True)
class ToolReturned:
    """The result of a tool, as the model will read it."""

    type: ClassVar[str] = "tool_result"
    tool_call_id: str
    name: str
    content: str
    is_error: bool = False


@dataclass(frozen=True, slots=True)
class MessageStored:
    """A message that the run stored, as the JSON API returns it."""

    type: ClassVar[str] = "message"
    message: dict[str, Any]

    @classmethod
    def of(cls, message: Message) -> MessageStored:
        return cls(message.to_dict())


@dataclass(frozen=True, slots=True)
class Failed:
    """Why the run fails; ``end`` follows."""

    type: ClassVar[str] = "error"
    code: str
    message: str
    retryable: bool
    retry_after: float | None = None
    reference: str | None = None


@dataclass(frozen=True, slots=True)
class Stopped:
    """Somebody stopped the run; ``end`` follows."""

    type: ClassVar[str] = "generation_stopped"
    message: str


@dataclass(frozen=True, slots=True)
class End:
    """The last event of every run."""

    type: ClassVar[str] = "end"
    status: Status
    finish_reason: str | None
    usage: dict[str, Any]


Event = (
    Start
    | ContentDelta
    | Reasoning
    | ToolCalled
    | ToolProgress
    | ToolReturned
    | MessageStored
    | Failed
    | Stopped
    | End
)
Numbered = tuple[int, Event]
"""An event and its number; after merging, the number of the last delta in it."""

EVENT_TYPES: dict[str, type[Event]] = {
    kind.type: kind
    for kind in (
        Start,
        ContentDelta,
        Reasoning,
        ToolCalled,
        ToolProgress,
        ToolReturned,
        MessageStored,
        Failed,
        Stopped,
        End,
    )
}
_FIELDS = {kind: tuple(f.name for f in fields(kind)) for kind in EVENT_TYPES.values()}
_LEFT_OUT_WHEN_NONE = frozenset({"retry_after", "reference"})


def event_fields(event: Event, *, for_log: bool = False) -> dict[str, Any]:
    """The event's own fields, as on the wire, or with what only the log keeps."""
    return {
        name: value
        for name in _FIELDS[type(event)]
        if for_log or name != "usage" or not isinstance(event, ToolCalled)
        if (value := getattr(event, name)) is not None or name not in _LEFT_OUT_WHEN_NONE
    }


def merge(numbered: Iterable[Numbered]) -> list[Numbered]:
    """Join deltas of one kind that stand side by side, up to ``MERGED_CHARS`` characters each."""
    merged: list[Numbered] = []
    pieces: list[str] = []
    kind: type[ContentDelta] | type[Reasoning] | None = None
    chars = last = 0
    for seq, event in numbered:
        delta = event if isinstance(event, ContentDelta | Reasoning) else None
        if pieces and (delta is None or type(delta) is not kind or chars >= MERGED_CHARS):
            assert kind is not None
            merged.append((last, kind("".join(pieces))))
            pieces, chars = [], 0
        if delta is None:
            merged.append((seq, event))
            continue
        kind, last = type(delta), seq
        pieces.append(delta.content)
        chars += len(delta.content)
    if pieces and kind is not None:
        merged.append((last, kind("".join(pieces))))
    return merged
