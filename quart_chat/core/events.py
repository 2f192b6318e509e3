"""What a run says of itself: frozen values, numbered 1, 2, 3 … by the event log.

A field's name is its name on the wire. ``merge`` joins neighbouring deltas, which is what keeps a
fast provider and a slow client from costing a frame a token.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal

from .messages import Message, Status

MAX_MESSAGE_TEXT = 64 * 1024
"""Bytes of content and reasoning beyond which a ``message`` event leaves them out."""

EVENT_WEIGHT = 100
"""What an event counts for besides its text."""

MERGED_CHARS = 16_384
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
class RoundEnded:
    """The end of one request to the model (the AI SDK calls it a step): why, and what it cost.

    For the log, and for dialects that show it; the native protocol does not send it.
    """

    type: ClassVar[str] = "round_end"
    finish_reason: str | None
    usage: dict[str, Any]


@dataclass(frozen=True, slots=True)
class MessageStored:
    """A message that the run stored, as the JSON API returns it."""

    type: ClassVar[str] = "message"
    message: dict[str, Any]

    @classmethod
    def from_message(cls, message: Message) -> MessageStored:
        """Return the event; a long text is left out, since its deltas were sent already."""
        fields = message.to_dict()
        text = message.content if isinstance(message.content, str) else ""
        if _utf8_size(text) + _utf8_size(message.reasoning or "") > MAX_MESSAGE_TEXT:
            fields |= {"content": None, "truncated": True}
            fields.pop("reasoning", None)
        return cls(fields)


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
    | RoundEnded
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
        RoundEnded,
        MessageStored,
        Failed,
        Stopped,
        End,
    )
}
_FIELDS = {kind: tuple(f.name for f in fields(kind)) for kind in EVENT_TYPES.values()}
_LEFT_OUT_WHEN_NONE = frozenset({"retry_after", "reference"})


def event_fields(event: Event) -> dict[str, Any]:
    """Return the event's own fields, as on the wire."""
    return {
        name: value
        for name in _FIELDS[type(event)]
        if (value := getattr(event, name)) is not None or name not in _LEFT_OUT_WHEN_NONE
    }


def event_from_fields(kind: str, fields: Mapping[str, Any]) -> Event:
    """Build an event; fields that this version does not know are ignored.

    Raises:
        LookupError: This version does not know that kind of event.
        TypeError: A field is missing.
    """
    event_type: Any = EVENT_TYPES[kind]
    known = _FIELDS[event_type]
    event: Event = event_type(**{name: fields[name] for name in known if name in fields})
    return event


def weight_of(event: Event) -> int:
    """Return about how many bytes an event takes, so that many small ones are bounded too."""
    if type(event) is ContentDelta:
        return EVENT_WEIGHT + len(event.content)
    if isinstance(event, (Reasoning, ToolReturned, ToolProgress)):
        return EVENT_WEIGHT + len(event.content)
    if isinstance(event, ToolCalled):
        return EVENT_WEIGHT + _size_of(event.arguments)
    if isinstance(event, MessageStored):
        return EVENT_WEIGHT + _size_of(event.message)
    return EVENT_WEIGHT


def _size_of(value: Any) -> int:
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return sum(len(key) + _size_of(inner) for key, inner in value.items())
    if isinstance(value, list):
        return sum(map(_size_of, value))
    return 8


def _utf8_size(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode())


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
