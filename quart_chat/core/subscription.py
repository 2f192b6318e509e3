"""Subscription: a run that is followed, from an event on."""

from __future__ import annotations

from dataclasses import dataclass

from .events import Numbered
from .ports import RunRecord


@dataclass(frozen=True)
class Subscription:
    """A run and the event after which it is followed; ``stored`` if only its answer is kept."""

    record: RunRecord
    after: int = 0
    stored: tuple[Numbered, ...] | None = None
