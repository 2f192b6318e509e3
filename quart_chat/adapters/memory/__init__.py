"""Everything in dictionaries, bounded: storage, user data and event log of one process."""

from .event_log import MemoryEventLog
from .storage import MemoryStorage

__all__ = ["MemoryEventLog", "MemoryStorage"]
