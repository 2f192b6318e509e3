"""The workloads: each step measures one server, spoken to in one way, once."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from .history import filled_thread
from .load import Job
from .processes import Process, cpu_of_command
from .servers import CHAT, FASTAPI, KINDS, MESSAGE, RELAY, Kind, Server, Way, running

AFTERWARDS = 0.4
"""Seconds in which a server may still write its log; that is counted too."""

CPU = "CPU µs a token"
TOKENS = 1000
RATE = 50
PACED = (("b200", 200, 5.0, 10), ("b1000", 1000, 10.0, 15))
"""Streams, the seconds over which they begin, and the seconds that each lasts."""

RESUMED = 4000
LONG_THREAD = 10_000
PATIENCE = 5.0
"""Seconds more than the provider needs; what has not come by then is counted as not delivered."""

HELP = (
    ("quart_chat --help", ["-m", "quart_chat", "--help"]),
    ("quart_chat chat-server --help", ["-m", "quart_chat", "chat-server", "--help"]),
    ("for comparison: quart --help", ["-m", "quart", "--help"]),
    ("for comparison: uvicorn --help", ["-m", "uvicorn", "--help"]),
)


@dataclass(frozen=True)
class Result:
    """One measurement; ``numbers`` are those of the workload's table."""

    workload: str
    server: str
    way: str
    numbers: dict[str, float]


@dataclass(frozen=True)
class Bench:
    """What the workloads need."""

    endpoint: str
    folder: Path
    servers: list[Server]
    quick: bool


def load(server: Server, job: Job, folder: Path) -> tuple[dict[str, Any], float]:
    """Let the load generator do a job; gives what it saw and the server's CPU seconds."""
    server.process.settle()
    with Process(["-m", "benchmarks.load"], cwd=folder) as clients:
        clients.tell(json.dumps(asdict(job)))
        assert clients.line() == "ready\n"
        before = server.process.cpu()
        clients.tell("go")
        assert clients.line() == "done\n"
        seen = json.loads(clients.line())
        time.sleep(AFTERWARDS)
        used = server.process.cpu() - before
    server.process.settle()
    if seen["wrong"]:
        raise AssertionError(f"{server.kind.name} delivered a wrong text: {seen['complaint']}")
    return seen, used


def ask(way: Way, port: int, model: str, tokens: int, **more: Any) -> Job:
    """A job that sends messages."""
    message = {"content": MESSAGE, "model": model, **more.pop("message", {})}
    return Job(port, way.path, way.encoding, tokens=tokens, message=message, **more)


def ways(bench: Bench) -> Iterator[tuple[Server, Way]]:
    """Everything that can be measured, one after the other."""
    for server in bench.servers:
        for way in server.kind.ways if server.kind.full else server.kind.ways[:1]:
            yield server, way


def warm_up(bench: Bench) -> None:
    """Let every server import what it imports late, and fill its pools."""
    for server, way in ways(bench):
        load(server, ask(way, server.port, "fast-200", 200, streams=20), bench.folder)


def saturated(bench: Bench) -> Iterator[Result]:
    """(a) Streams of 1,000 tokens as fast as they come."""
    for name, streams, turns in (("a1", 1, 20), ("a50", 50, 1)):
        turns = min(turns, 10) if bench.quick else turns
        for server, way in ways(bench):
            job = ask(way, server.port, f"fast-{TOKENS}", TOKENS, streams=streams, turns=turns)
            seen, used = load(server, job, bench.folder)
            yield streamed(name, server, way, seen, used)


def paced(bench: Bench) -> Iterator[Result]:
    """(b) Streams of 50 tokens a second; they begin one after the other."""
    for name, streams, ramp, seconds in PACED:
        if bench.quick:
            ramp, seconds = ramp / 2, seconds // 2
        tokens = RATE * seconds
        for server, way in ways(bench):
            if streams == 1000 and not server.kind.full:
                continue
            deadline = ramp + seconds + PATIENCE
            job = ask(way, server.port, f"paced-{RATE}-{tokens}", tokens, streams=streams)
            seen, used = load(server, replace(job, ramp=ramp, deadline=deadline), bench.folder)
            yield streamed(name, server, way, seen, used)


def streamed(workload: str, server: Server, way: Way, seen: dict[str, Any], used: float) -> Result:
    """The numbers of a workload that streams tokens."""
    numbers = {
        CPU: used / max(1, seen["tokens"]) * 1e6,
        "cores": used / (seen["seconds"] + AFTERWARDS),
        "delivered %": seen["delivered"] * 100,
        "complete %": seen["complete"] / seen["turns"] * 100,
        "first ms p50": seen["first"].get("p50", 0),
        "first ms p99": seen["first"].get("p99", 0),
        "gap ms p50": seen["gap"].get("p50", 0),
        "gap ms p99": seen["gap"].get("p99", 0),
        "tokens a frame": seen["tokens"] / max(1, seen["frames"]),
        "tokens a second": seen["tokens"] / seen["seconds"],
    }
    return Result(workload, server.kind.name, way.name, numbers)


def idle(bench: Bench) -> Iterator[Result]:
    """(c) Sockets that say nothing; every server is a fresh one."""
    sockets = 1000 if bench.quick else 5000
    for kind in (CHAT, FASTAPI, RELAY):
        with fresh(bench, kind) as server:
            way = kind.ways[0]
            load(server, ask(way, server.port, "fast-100", 100, streams=20), bench.folder)
            server.process.settle()
            before = server.process.rss()
            with Process(["-m", "benchmarks.load"], cwd=bench.folder) as clients:
                job = Job(server.port, way.path, way.encoding, streams=sockets)
                clients.tell(json.dumps(asdict(job)))
                assert clients.line() == "ready\n"
                server.process.settle()
                held = server.process.rss() - before
        yield Result("c", kind.name, way.name, {"kB a socket": held / sockets / 1000})


def fresh(bench: Bench, kind: Kind) -> Any:
    """A server that has served nobody yet."""
    return running(kind, bench.endpoint, bench.folder / f"fresh{time.monotonic_ns()}")


def resumed(bench: Bench) -> Iterator[Result]:
    """(d) An answer of 4,000 tokens that has ended, from the start."""
    times = 20
    server = bench.servers[0]
    way = server.kind.ways[0]
    job = ask(way, server.port, f"paced-1000-{RESUMED}", RESUMED)
    seen, _ = load(server, job, bench.folder)
    run_id = seen["run_id"]
    for way in server.kind.ways:
        job = Job(server.port, way.path, way.encoding, turns=times, tokens=RESUMED)
        if way.encoding == "sse":
            job = replace(job, encoding="get", path=f"{way.path}?run_id={run_id}")
        else:
            job = replace(job, message={"type": "resume", "run_id": run_id})
        seen, used = load(server, job, bench.folder)
        if seen["complete"] != times:
            raise AssertionError(f"{way.name}: not every resume was complete: {seen}")
        numbers = {"CPU ms": used / times * 1000, "frames": seen["frames"] / times}
        yield Result("d", server.kind.name, way.name, numbers)


def long_threads(bench: Bench) -> Iterator[Result]:
    """(e) Turns of ten tokens in a new thread each, and in one of 10,000 messages."""
    turns = 20 if bench.quick else 50
    server, way = bench.servers[0], bench.servers[0].kind.ways[0]
    for messages in (0, 100, LONG_THREAD):
        more = {"thread_id": filled_thread(server.folder, messages)} if messages else {}
        job = ask(way, server.port, "fast-10", 10, message=more)
        load(server, job, bench.folder)
        seen, used = load(server, replace(job, turns=turns), bench.folder)
        numbers = {
            "CPU ms a turn": used / turns * 1000,
            "first ms p50": seen["first"]["p50"],
            "first ms p99": seen["first"]["p99"],
        }
        name = f"thread of {messages:,} messages" if messages else "a new thread each"
        yield Result("e", name, way.name, numbers)


def started(bench: Bench) -> Iterator[Result]:
    """(f) What it costs to show the help, and until the server is ready."""
    for name, arguments in HELP:
        used = cpu_of_command(arguments, bench.folder)
        yield Result("f", name, "", {"CPU s": used})
    for kind in KINDS:
        with fresh(bench, kind) as server:
            used = server.process.cpu()
        yield Result("f", f"ready: {kind.name}", "", {"CPU s": used})


WORKLOADS = {
    "a": saturated,
    "b": paced,
    "c": idle,
    "d": resumed,
    "e": long_threads,
    "f": started,
}
