"""Which process lives a run, and whether that process is still there.

On one machine this is certain at once: a process is its id and the moment it began. Of other
machines only silence tells.
"""

from __future__ import annotations

import os
import platform
import uuid
from pathlib import Path

SILENCE_SECONDS = 30
"""A process of another machine that gave no sign for so long is taken for dead."""

HEARTBEAT_SECONDS = 5
"""How often a process that has runs gives a sign."""

_living: set[str] = set()


def claim_name() -> str:
    """A new owner's name in this process; ``release_name`` ends it."""
    name = f"{_process(os.getpid())}/{uuid.uuid4().hex}"
    _living.add(name)
    return name


def release_name(name: str) -> None:
    """The owner is gone, the process may stay."""
    _living.discard(name)


def is_dead(name: str, seen_seconds_ago: float) -> bool:
    """Whether an owner will never come back. An empty name is one that left its runs on purpose."""
    if not name:
        return True
    machine, _, rest = name.partition("/")
    if machine != _machine():
        return seen_seconds_ago > SILENCE_SECONDS
    process, _, _ = rest.rpartition("/")
    pid = int(process.partition("-")[0])
    if pid == os.getpid():
        return name not in _living
    return f"{machine}/{process}" != _process(pid)


def _machine() -> str:
    """This machine, this boot of it, and this namespace of process ids."""
    boot = _read("/proc/sys/kernel/random/boot_id")[:8]
    try:
        namespace = os.readlink("/proc/self/ns/pid").strip("pid:[]")
    except OSError:
        namespace = ""
    return f"{platform.node()[:80]}.{boot}.{namespace}".replace("/", "_")


def _process(pid: int) -> str:
    began = _read(f"/proc/{pid}/stat").rpartition(")")[2].split()
    if began:
        state, started = began[0], began[19]
        return f"{_machine()}/{pid}-{started if state not in 'ZX' else 'dead'}"
    try:
        os.kill(pid, 0)
    except OSError:
        return f"{_machine()}/{pid}-dead"
    return f"{_machine()}/{pid}-"


def _read(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""
