"""The page: what was measured, on which machine, with which versions, beside the targets."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from statistics import median

import psutil

from .servers import RELAY, SOCKET
from .workloads import CPU, Result

PACKAGES = (
    "quart-chat", "quart", "hypercorn", "uvloop", "wsproto", "h11", "openai", "aiohttp",
    "tortoise-orm", "aiosqlite", "msgpack", "fastapi", "starlette", "uvicorn", "websockets",
    "httptools", "sqlalchemy",
)  # fmt: skip

PAGES = {
    "a1": ("(a) One saturated stream of 1,000 tokens", "≤ 12 µs of CPU a token"),
    "a50": (
        "(a) 50 saturated streams of 1,000 tokens",
        "≤ 6 µs of CPU a token, more than 20 times better than FastAPI + SDK",
    ),
    "b200": (
        "(b) 200 streams at 50 tokens a second",
        "all delivered, ≤ 65 µs of CPU a token, first token p99 ≤ 20 ms, gap p99 ≤ 30 ms",
    ),
    "b1000": (
        "(b) 1,000 streams at 50 tokens a second",
        "all delivered on one core, gap p99 ≤ 150 ms, no stream fails",
    ),
    "c": ("(c) 5,000 idle sockets", "≤ 25 kB a socket"),
    "d": ("(d) Resuming an answer of 4,000 tokens", "≤ 20 ms of CPU, ≤ 20 frames"),
    "e": ("(e) A turn in a thread of 10,000 messages", "≤ 1.2 × a new thread"),
    "f": ("(f) Start-up", "`--help` ≤ 0.3 s of CPU, server ready ≤ 1.2 s of CPU"),
}

NOTES = """\
## How it is measured

* The provider is `benchmarks/endpoint.py`, a scripted OpenAI-compatible endpoint in a process of
  its own. It sends one chunk of about 270 bytes a token. In (a) it writes one token a stream in
  turn, as fast as the server takes them; in (b) one ticker paces all streams in ten groups.
* The clients are `benchmarks/load.py`, also a process of its own, over raw sockets. **Every text is
  compared, byte for byte**, with what the endpoint said, and a wrong one ends the benchmark.
* CPU is the user and system time that the operating system accounts to the server's process, from
  the first message until 0.4 s after the last answer, so storing and the durable log are in it.
* All servers run at the same time; only one has work at a moment. Steps are interleaved, and every
  number is the median over the repetitions. Everything has been warmed up before, but in (f).
* quart_chat stores every message and every event of every run (SQLite rows: WAL mode).
  FastAPI stores both messages of a turn (SQLAlchemy, SQLite, WAL); it has no event log and so
  nothing to resume from. The relay stores nothing, checks nothing, and handles no error.

## What to keep in mind

* Endpoint, clients and server share the machine's cores; latencies hold the waiting of all three.
  CPU times do not.
* quart_chat merges text that has arrived by the time it writes, so a delivery holds several tokens
  when the server is busy. *Tokens a frame* shows how many. *Gap* is the time between two
  deliveries of text to one client; for a server that cannot keep up the gap of what did arrive
  means little, look at *delivered*.
* *Delivered* is the share of all tokens that had come 5 s after the provider had said the last one.
* Targets are absolute numbers from another machine, where the bare relay took 18 to 20 µs a token
  in (a) and 52 µs in (b). *× relay* is the CPU a token beside that of the relay over WebSocket with
  a frame a token, in the same run, and can be compared between machines.
* In (a) with one stream a turn's fixed costs (storing two messages, the request) are spread over
  1,000 tokens; 20 turns are measured, since the system counts CPU in steps of 10 ms.
* (b) begins its streams one by one: 200 streams of 10 s over 5 s, which is 40 new turns a second,
  and 1,000 streams of 15 s over 10 s, which is 100. What turns cost is in the CPU a token.
* Connections are opened before the first stream begins, up to 10 s before they are used. Hypercorn
  by default closes one that idles for 5 s, which is what the relay over SSE loses in (b) with 1,000
  streams.
* In (e) both kinds of thread send what `CHAT_HISTORY_MESSAGES` allows: a thread of 100 messages or
  more sends 100 of them to the provider, a new one sends one.
"""


def write(path: Path, results: Iterable[Result], command: str, repetitions: int) -> None:
    """Write the page."""
    found = list(results)
    parts = ["# Benchmarks\n", _circumstances(command, repetitions)]
    parts += [_table(name, [r for r in found if r.workload == name]) for name in PAGES]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(part for part in [*parts, NOTES] if part))


def _circumstances(command: str, repetitions: int) -> str:
    machine = f"{_processor()}, {psutil.cpu_count()} cores"
    memory = f"{psutil.virtual_memory().total / 2**30:.0f} GiB"
    versions = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    return f"""\
Made by `{command}` (`pip install 'quart-chat[bench]'`, in a checkout) on
{datetime.now(UTC):%d %B %Y}, {repetitions} repetition{"s" if repetitions > 1 else ""}, medians.

* Machine: {machine}, {memory} of memory, {platform.system()} {platform.release()}
* Python {platform.python_version()}, load average at the end {os.getloadavg()[0]:.1f}
* {versions}
"""


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _table(workload: str, results: list[Result]) -> str:
    if not results:
        return ""
    title, target = PAGES[workload]
    results = [_beside_relay(result, results) for result in results]
    columns = list(results[0].numbers)
    with_way = any(result.way for result in results)
    rows: dict[tuple[str, str], list[Result]] = {}
    for result in results:
        rows.setdefault((result.server, result.way), []).append(result)
    names = ["", *([""] if with_way else []), *columns]
    lines = [f"## {title}\n", f"Target: {target}.\n", _row(names), _row(["---"] * len(names))]
    for (server, way), several in rows.items():
        medians = [median(result.numbers[name] for result in several) for name in columns]
        lines.append(_row([server, *([way] if with_way else []), *map(_shown, medians)]))
    return "\n".join(lines) + "\n"


def _beside_relay(result: Result, results: list[Result]) -> Result:
    """With its CPU as a multiple of the bare relay's, which says what the machine can do."""
    if CPU not in result.numbers:
        return result
    relay = [r.numbers[CPU] for r in results if r.server == RELAY.name and r.way == SOCKET.name]
    if not relay:
        return result
    first, *others = result.numbers.items()
    numbers = dict([first, ("× relay", result.numbers[CPU] / median(relay)), *others])
    return replace(result, numbers=numbers)


def _row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _shown(value: float) -> str:
    if value >= 1000:
        return f"{value:,.0f}"
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
