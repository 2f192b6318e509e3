"""How schedules are explored, and how a failure is told."""

from __future__ import annotations

import gc
import logging
import traceback
from typing import Any

import simloom

from .workload import main

SETTINGS: dict[str, Any] = {
    "virtual_time": True,
    "seed_randomness": True,
    "world": False,
    "gc_interval": 1_000_000,
}


def explored(
    runs: int, seed: int, scheduler: str, processes: int = 1, *, stop: bool = True
) -> simloom.Exploration:
    """Run schedules from a seed on."""
    logging.getLogger("quart_chat").setLevel(logging.CRITICAL)
    gc.collect()
    gc.freeze()  # every schedule ends with a collection
    return simloom.explore(
        main,
        runs=runs,
        start_seed=seed,
        scheduler=scheduler,
        processes=processes,
        stop_on_failure=stop,
        **SETTINGS,
    )


def describe(failure: simloom.RunResult, scheduler: str, tries: int) -> str:
    """Tell what went wrong, the shrunk schedule, and how to see it again."""
    assert failure.error is not None
    lines = traceback.format_exception(failure.error)
    shrunk = simloom.shrink(main, failure, max_runs=tries, **SETTINGS)
    command = (
        f"python -m tests.simulation --runs 1 --processes 1 --seed {failure.seed} "
        f"--scheduler {scheduler}"
    )
    return f"{''.join(lines)}\n{shrunk.describe()}\n\nReplay: {command}"
