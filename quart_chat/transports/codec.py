"""Codec: bytes to commands, and events to JSON text, MessagePack bytes or SSE frames."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from json.encoder import encode_basestring
from typing import Any, NoReturn

import msgpack

from ..core.events import ContentDelta, Event, Numbered, RoundEnded, event_fields
from ..core.ports import RunRecord
from ..errors import ChatError, InvalidMessage, TooLarge

Frame = str | bytes

CLOSE_FACTOR = 4
"""A frame over this many times the allowed size closes the socket."""

LARGE_BYTES = 64 * 1024
"""What is larger is decoded outside the event loop."""

SSE_NAMED = frozenset({"error", "end", "generation_stopped"})


def size_of_frame(frame: Frame) -> int:
    """Return the bytes of a frame."""
    return len(frame) if isinstance(frame, bytes) or frame.isascii() else len(frame.encode())


def decode(frame: Frame, max_bytes: int) -> Any:
    """Return a frame as plain values: text is JSON, bytes are MessagePack.

    Raises:
        TooLarge: It has more than ``max_bytes``.
        InvalidMessage: It is not JSON, or not MessagePack.
    """
    if size_of_frame(frame) > max_bytes:
        raise TooLarge(f"The message is too large. It may have at most {max_bytes} bytes.")
    if isinstance(frame, bytes):
        return _decode_msgpack(frame, max_bytes)
    return decode_json(frame)


def decode_json(text: str | bytes) -> Any:
    """Decode JSON as RFC 8259 defines it: no NaN, no infinities. Raises InvalidMessage (400)."""
    try:
        return json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        raise InvalidMessage("The message is not valid JSON.", status=400) from None


def _no_constant(name: str) -> NoReturn:
    raise ValueError(name)


def _decode_msgpack(frame: bytes, max_bytes: int) -> Any:
    try:
        return msgpack.unpackb(
            frame,
            raw=False,
            strict_map_key=False,
            max_str_len=max_bytes,
            max_bin_len=max_bytes,
            max_ext_len=0,
            max_array_len=max_bytes // 8,
            max_map_len=max_bytes // 16,
        )
    except Exception:
        raise InvalidMessage("The message is not valid MessagePack.", status=400) from None


def error_event(error: ChatError, **more: Any) -> dict[str, Any]:
    """Return an error that belongs to no run."""
    return {"type": "error", **{k: v for k, v in more.items() if v is not None}, **error.to_dict()}


def event_of(record: RunRecord, seq: int, event: Event) -> dict[str, Any]:
    """Return an event of a run, as on the wire."""
    return {
        "type": event.type,
        "thread_id": record.thread_id,
        "run_id": record.id,
        "seq": seq,
        **event_fields(event),
    }


def to_json(value: Mapping[str, Any]) -> str:
    """Return compact JSON text."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def to_msgpack(value: Mapping[str, Any]) -> bytes:
    """Return MessagePack bytes."""
    packed: bytes = msgpack.packb(value)
    return packed


def json_events(record: RunRecord) -> Callable[[Numbered], str]:
    """Return a JSON encoder for one run; deltas, nearly all there is, take a short way."""
    names = f'"thread_id":{encode_basestring(record.thread_id)},"run_id":"{record.id}"'
    head = f'{{"type":"content",{names},"seq":'

    def encode(numbered: Numbered) -> str:
        seq, event = numbered
        if type(event) is ContentDelta:
            return f'{head}{seq},"content":{encode_basestring(event.content)}}}'
        if type(event) is RoundEnded:
            return ""
        return to_json(event_of(record, seq, event))

    return encode


def msgpack_events(record: RunRecord) -> Callable[[Numbered], bytes]:
    """Return a MessagePack encoder for one run."""
    pack: Callable[[Any], bytes] = msgpack.Packer().pack
    thread_id, run_id = record.thread_id, record.id

    def encode(numbered: Numbered) -> bytes:
        seq, event = numbered
        if type(event) is ContentDelta:
            return pack(
                {
                    "type": "content",
                    "thread_id": thread_id,
                    "run_id": run_id,
                    "seq": seq,
                    "content": event.content,
                }
            )
        if type(event) is RoundEnded:
            return b""
        return pack(event_of(record, seq, event))

    return encode


def sse_events(record: RunRecord) -> Callable[[Numbered], str]:
    """Return an SSE encoder for one run, with LF alone."""
    encode_json = json_events(record)

    def encode(numbered: Numbered) -> str:
        seq, event = numbered
        data = encode_json(numbered)
        if not data:
            return ""
        if event.type in SSE_NAMED:
            return f"id: {record.id}:{seq}\nevent: {event.type}\ndata: {data}\n\n"
        return f"id: {record.id}:{seq}\ndata: {data}\n\n"

    return encode


def sse_frame(value: Mapping[str, Any]) -> str:
    """Return an SSE frame that belongs to no run, and so has no id."""
    name = f"event: {value['type']}\n" if value["type"] in SSE_NAMED else ""
    return f"{name}data: {to_json(value)}\n\n"
