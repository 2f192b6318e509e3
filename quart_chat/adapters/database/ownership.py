"""Lease of a run: the process that owns it, and whether that process is alive.

On one machine this is known at once, because a process is its id and its start time. A process of
another machine is alive while it sends heartbeats.
"""

from __future__ import annotations

import os
import platform
import uuid
from pathlib import Path

SILENCE_SECONDS = 30
"""Seconds without a heartbeat after which a process of another machine counts as dead."""

HEARTBEAT_SECONDS = 5
"""Seconds between the heartbeats of a process that owns runs."""

_living: set[str] = set()


def claim_name() -> str:
    """Return a new owner's name in this process, valid until ``release_name``."""
    name = f"{_process(os.getpid())}/{uuid.uuid4().hex}"
    _living.add(name)
    return name


def release_name(name: str) -> None:
    """End an owner; its process may continue."""
    _living.discard(name)


def is_dead(name: str, seen_seconds_ago: float) -> bool:
    """Return whether an owner has ended. An empty name is one that left its runs on purpose."""
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
    """Return the name of this machine, boot and namespace of process ids."""
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
