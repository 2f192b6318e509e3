"""``python -m benchmarks``: measures everything and writes ``docs/reference/benchmarks.md``."""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from .processes import ROOT, raise_file_limit
from .report import write
from .servers import all_running, scripted_endpoint
from .workloads import WORKLOADS, Bench, Result, warm_up

REPORT = ROOT / "docs" / "reference" / "benchmarks.md"
REPETITIONS = 3


def main() -> None:
    """Measure what the options ask for."""
    options = _options()
    raise_file_limit()
    begun = time.monotonic()

    def say(text: str) -> None:
        print(f"[{time.monotonic() - begun:5.0f} s] {text}", flush=True)

    wanted = options.only or list(WORKLOADS)
    with tempfile.TemporaryDirectory(prefix="benchmarks") as name:
        results = _measure(wanted, options.repetitions, options.quick, Path(name), say)
    if options.output is not None:
        write(options.output, results, _command(options), options.repetitions)
        say(f"written: {options.output}")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "--only", action="append", choices=list(WORKLOADS), help="a workload; may be repeated"
    )
    parser.add_argument("--repetitions", type=int, help="default 3, with --quick 1")
    parser.add_argument("--quick", action="store_true", help="shorter; to see that it works")
    parser.add_argument("--output", type=Path, help="where to write; default docs/reference")
    options = parser.parse_args()
    options.repetitions = options.repetitions or (1 if options.quick else REPETITIONS)
    complete = options.only is None and not options.quick
    options.output = options.output or (REPORT if complete else None)
    return options


def _command(options: argparse.Namespace) -> str:
    chosen = [f"--only {name}" for name in options.only or ()]
    quick = ["--quick"] if options.quick else []
    return " ".join(["python -m benchmarks", *chosen, *quick])


def _measure(
    wanted: list[str], repetitions: int, quick: bool, folder: Path, say: Callable[[str], None]
) -> list[Result]:
    results: list[Result] = []
    with scripted_endpoint(folder) as endpoint, all_running(endpoint, folder) as servers:
        bench = Bench(endpoint, folder, servers, quick)
        say("all servers run; warming up")
        warm_up(bench)
        for repetition in range(1, repetitions + 1):
            for name in wanted:
                for result in WORKLOADS[name](bench):
                    results.append(result)
                    say(f"{repetition}/{repetitions} {_line(result)}")
    return results


def _line(result: Result) -> str:
    numbers = ", ".join(f"{name} {value:.4g}" for name, value in result.numbers.items())
    return f"({result.workload}) {result.server} {result.way}: {numbers}"


if __name__ == "__main__":
    main()
