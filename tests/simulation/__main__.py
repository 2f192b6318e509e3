"""Run schedules: ``python -m tests.simulation --runs 1000``; or one of them again, by its seed."""

from __future__ import annotations

import argparse
import os
import secrets
import sys
import time
from pathlib import Path

TESTS = Path(__file__).parent.parent


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description=__doc__)
    parser.add_argument("--runs", type=int, default=1000, help="how many schedules")
    parser.add_argument("--seed", type=int, help="the first seed; a random one by default")
    parser.add_argument("--scheduler", default="random", help="random, pct, or pct:d=3,k=400")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--keep-going", action="store_true", help="count all failures")
    parser.add_argument("--shrink", type=int, default=300, help="tries to shrink a failure")
    return parser.parse_args()


def run() -> int:
    from .disk import prepared

    options = parsed()
    seed = secrets.randbelow(2**31) if options.seed is None else options.seed
    print(f"{options.runs} schedules from seed {seed}, scheduler {options.scheduler}", flush=True)
    began = time.perf_counter()
    with prepared():
        return report(options, seed, began)


def report(options: argparse.Namespace, seed: int, began: float) -> int:
    from .schedules import describe, explored

    exploration = explored(
        options.runs, seed, options.scheduler, options.processes, stop=not options.keep_going
    )
    seconds = time.perf_counter() - began
    print(f"{exploration.summary()} in {seconds:.0f} s ({exploration.runs / seconds:.0f} a second)")
    if exploration.first_failure is None:
        return 0
    if options.keep_going:
        for failure in exploration.failures[:50]:
            print(f"  {failure.seed}: {failure.error}: {failure.message}")
    print(describe(exploration.first_failure, options.scheduler, options.shrink))
    return 1


if __name__ == "__main__":
    if os.environ.get("PYTHONHASHSEED") != "0":  # a seed means the same in every process
        os.environ["PYTHONHASHSEED"] = "0"
        os.execv(sys.executable, [sys.executable, "-m", "tests.simulation", *sys.argv[1:]])
    sys.exit(run())
