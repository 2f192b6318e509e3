"""Rows of the event log: a version, and the events in it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import msgpack

from ...core.events import (
    EVENT_TYPES,
    ContentDelta,
    Numbered,
    Reasoning,
    event_fields,
    event_from_fields,
    weight_of,
)
from ...errors import UnreadableLog

VERSION = 1
"""Grows when a row is written in a way that older versions would misread."""

BATCH_BYTES = 32 * 1024


def encode(numbered: Iterable[Numbered]) -> list[tuple[int, bytes]]:
    """Return events as rows of at most about 32 KiB, each with its last number.

    Deltas that stand side by side become one text and the lengths of its pieces, so that a client
    can go on after any of them.
    """
    rows: list[tuple[int, bytes]] = []
    entries: list[Any] = []
    size = last = 0
    for seq, event in numbered:
        if size >= BATCH_BYTES:
            rows.append((last, _packed(entries)))
            entries, size = [], 0
        last = seq
        size += weight_of(event)
        if isinstance(event, ContentDelta | Reasoning):
            newest = entries[-1] if entries else None
            if newest is not None and newest[0] == event.type and newest[1] == seq - len(newest[2]):
                newest[2].append(event.content)
            else:
                entries.append([event.type, seq, [event.content]])
        else:
            entries.append([event.type, seq, event_fields(event)])
    if entries:
        rows.append((last, _packed(entries)))
    return rows


def _packed(entries: list[Any]) -> bytes:
    joined = [
        [kind, first, "".join(what), [len(piece) for piece in what]]
        if isinstance(what, list)
        else [kind, first, what]
        for kind, first, what in entries
    ]
    packed: bytes = msgpack.packb([VERSION, joined])
    return packed


def decode(data: bytes, after: int) -> list[Numbered]:
    """Return the events of a row that come after number ``after``.

    Raises:
        UnreadableLog: The row is damaged, or of a version that this one does not know.
    """
    try:
        return list(_decoded(data, after))
    except Exception as error:
        raise UnreadableLog from error


def _decoded(data: bytes, after: int) -> Iterable[Numbered]:
    entries = msgpack.unpackb(data, strict_map_key=False)
    if entries and isinstance(entries[0], int):  # the first rows had no version
        version, entries = entries
        if version > VERSION:
            raise ValueError(f"version {version}")
    for kind, first, what, *lengths in entries:
        if not lengths:
            if first > after:
                yield first, event_from_fields(kind, what)
            continue
        start = 0
        delta: Any = EVENT_TYPES[kind]
        for seq, length in enumerate(lengths[0], first):
            if seq > after:
                yield seq, delta(what[start : start + length])
            start += length
