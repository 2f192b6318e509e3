"""A cheap load generator in a process of its own: ``python -m benchmarks.load``.

It reads a job from stdin, opens its connections and says so; at the next line it sends the
messages, and prints what it saw. Frames are kept as they come and checked when all is over.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from dataclasses import asdict, dataclass, field
from typing import Any

import msgpack
import uvloop

from .clients import Client, SocketClient, StreamClient
from .processes import raise_file_limit
from .script import answer

OPENED_TOGETHER = 100


@dataclass(frozen=True)
class Job:
    """What to do: ``streams`` connections, each ``turns`` messages, one after the other."""

    port: int
    path: str
    encoding: str
    """``json`` or ``msgpack`` over a WebSocket, ``sse`` over HTTP, ``get`` for a followed run."""
    streams: int = 1
    turns: int = 1
    tokens: int = 0
    message: dict[str, Any] | None = None
    ramp: float = 0.0
    """Seconds over which the streams begin."""
    deadline: float = 60.0


@dataclass
class Seen:
    """What all clients saw together; times in milliseconds."""

    turns: int = 0
    complete: int = 0
    wrong: int = 0
    tokens: float = 0.0
    delivered: float = 0.0
    frames: int = 0
    deliveries: int = 0
    seconds: float = 0.0
    first: dict[str, float] = field(default_factory=dict)
    gap: dict[str, float] = field(default_factory=dict)
    run_id: str | None = None
    complaint: str | None = None


def percentiles(values: list[float]) -> dict[str, float]:
    """The median, the 99th percentile and the largest, in milliseconds."""
    if not values:
        return {}
    ordered = sorted(values)
    at = {"p50": 0.5, "p99": 0.99, "max": 1.0}
    last = len(ordered) - 1
    return {name: ordered[round(last * share)] * 1000 for name, share in at.items()}


async def opened(job: Job) -> list[Client]:
    """All connections, ready to be used."""
    loop = asyncio.get_running_loop()

    async def one() -> Client:
        kind = StreamClient if job.encoding in ("sse", "get") else SocketClient
        _, client = await loop.create_connection(
            lambda: kind(job.path, job.encoding == "msgpack"), "127.0.0.1", job.port
        )
        await client.opened
        return client

    clients: list[Client] = []
    while len(clients) < job.streams:
        count = min(OPENED_TOGETHER, job.streams - len(clients))
        clients += await asyncio.gather(*(one() for _ in range(count)))
    return clients


def request(job: Job) -> bytes | None:
    """The message, in the job's encoding."""
    if job.message is None:
        return None
    if job.encoding == "msgpack":
        packed: bytes = msgpack.packb(job.message)
        return packed
    return json.dumps(job.message).encode()


async def talk(job: Job, clients: list[Client]) -> float:
    """Send, wait for the answers until the deadline, and give the seconds that it took."""
    body = request(job)

    async def one(client: Client, delay: float) -> None:
        await asyncio.sleep(delay)
        for _ in range(job.turns):
            await client.ask(body)

    begun = time.perf_counter()
    step = job.ramp / len(clients)
    tasks = [asyncio.create_task(one(client, i * step)) for i, client in enumerate(clients)]
    _, late = await asyncio.wait(tasks, timeout=job.deadline)
    took = time.perf_counter() - begun
    for task in late:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    return took


def check(job: Job, clients: list[Client], seconds: float) -> Seen:
    """Compare every text with what the endpoint said."""
    seen = Seen(turns=job.streams * job.turns, seconds=seconds)
    expected = answer(job.tokens)
    first: list[float] = []
    gaps: list[float] = []
    for client in clients:
        seen.complaint = seen.complaint or client.complaint
        for turn in client.turns:
            events = client.events(turn)
            text = "".join(event["content"] for event in events if event["type"] == "content")
            seen.complete += turn.ended and text == expected
            if not expected.startswith(text) or (turn.ended and text != expected):
                seen.wrong += 1
                seen.complaint = seen.complaint or str(events[-1:])[:500]
            seen.tokens += job.tokens * len(text) / max(1, len(expected))
            seen.frames += len(events)
            seen.deliveries += len(turn.times)
            seen.run_id = seen.run_id or (events[0].get("run_id") if events else None)
            if turn.times:
                first.append(turn.times[0] - turn.sent)
            gaps += [b - a for a, b in zip(turn.times, turn.times[1:], strict=False)]
    seen.delivered = seen.tokens / max(1, seen.turns * job.tokens)
    seen.first, seen.gap = percentiles(first), percentiles(gaps)
    return seen


async def main() -> None:
    """Do one job."""
    loop = asyncio.get_running_loop()
    job = Job(**json.loads(await loop.run_in_executor(None, sys.stdin.readline)))
    clients = await opened(job)
    print("ready", flush=True)
    await loop.run_in_executor(None, sys.stdin.readline)
    if job.message is not None or job.encoding == "get":
        seconds = await talk(job, clients)
        print("done", flush=True)
        print(json.dumps(asdict(check(job, clients, seconds))), flush=True)
    for client in clients:
        client.close()


if __name__ == "__main__":
    raise_file_limit()
    uvloop.run(main())
