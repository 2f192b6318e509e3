"""Two thousand schedules, a fresh seed each time; a failure names the command that repeats it."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
SCHEDULES = 2000
PARTS = 4
"""The schedules are run in so many tests, side by side on the test run's processes."""

SECONDS = 900


@pytest.mark.timeout(SECONDS)
@pytest.mark.parametrize("part", range(PARTS))
def test_schedules(part: int) -> None:
    """Half of them in random order, half with a few late changes of priority (PCT)."""
    scheduler = "random" if part % 2 else f"pct:d=3,k={(400, 800, 1600)[part % 3]}"
    seed = secrets.randbelow(2**31 - SCHEDULES)
    command = [
        *(sys.executable, "-W", "ignore", "-m", "tests.simulation"),
        *("--runs", str(SCHEDULES // PARTS), "--processes", "1"),
        *("--seed", str(seed), "--scheduler", scheduler),
    ]
    environ = {**os.environ, "PYTHONHASHSEED": "0"}
    done = subprocess.run(
        command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=SECONDS, check=False
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert f"{SCHEDULES // PARTS} universes explored, none failed" in done.stdout
