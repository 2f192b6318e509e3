"""How events stand in a row of the log."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import msgpack

from ...core.events import EVENT_TYPES, ContentDelta, Numbered, Reasoning, event_fields

BATCH_CHARS = 256 * 1024


def encode(numbered: Iterable[Numbered]) -> list[tuple[int, bytes]]:
    """Events as rows of at most about 256 K characters, each with its last number.

    Deltas that stand side by side become one text and the lengths of its pieces, so that a client
    can go on after any of them.
    """
    rows: list[tuple[int, bytes]] = []
    entries: list[Any] = []
    chars = last = 0
    for seq, event in numbered:
        if chars >= BATCH_CHARS:
            rows.append((last, msgpack.packb(_joined(entries))))
            entries, chars = [], 0
        last = seq
        if isinstance(event, ContentDelta | Reasoning):
            chars += len(event.content)
            newest = entries[-1] if entries else None
            if newest is not None and newest[0] == event.type and newest[1] == seq - len(newest[2]):
                newest[2].append(event.content)
            else:
                entries.append([event.type, seq, [event.content]])
        else:
            entries.append([event.type, seq, event_fields(event, for_log=True)])
    if entries:
        rows.append((last, msgpack.packb(_joined(entries))))
    return rows


def _joined(entries: list[Any]) -> list[Any]:
    return [
        [kind, first, "".join(what), [len(piece) for piece in what]]
        if isinstance(what, list)
        else [kind, first, what]
        for kind, first, what in entries
    ]


def decode(data: bytes, after: int) -> Iterable[Numbered]:
    """The events of a row that come after number ``after``."""
    for kind, first, what, *lengths in msgpack.unpackb(data, strict_map_key=False):
        event_type: Any = EVENT_TYPES[kind]
        if not lengths:
            if first > after:
                yield first, event_type(**what)
            continue
        start = 0
        for seq, length in enumerate(lengths[0], first):
            if seq > after:
                yield seq, event_type(what[start : start + length])
            start += length
