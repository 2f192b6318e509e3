"""Bring back known defects, one at a time, and count the schedules until one is noticed.

``python -m tests.simulation.defects`` works on a copy. A defect that is not found means that the
workload lacks something.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
SCHEDULES = 5000
FIRST_SEED = 1

Edit = tuple[str, str, str]

NO_GUARANTEE: Edit = (
    "core/run.py",
    "        self.task.add_done_callback(self._ensure_finished)\n",
    "",
)

DEFECTS: dict[str, tuple[str, list[Edit]]] = {
    "L1": (
        "a stop cancels the run's task, which may not have had its first step",
        [
            NO_GUARANTEE,
            (
                "core/run.py",
                "            self._end.set_result(outcome)\n",
                "            self._end.set_result(outcome)\n"
                "            if self._phase is RunPhase.STARTING and self.task:\n"
                "                self.task.cancel()\n",
            ),
        ],
    ),
    "L2, L29": (
        "a caller who goes away cuts the birth of a run in half",
        [("core/runs.py", "await asyncio.shield(task)", "await task")],
    ),
    "L3": (
        "one run that cannot be recovered prevents the start",
        [
            (
                "core/recovery.py",
                "            except StorageUnavailable:\n                return False\n"
                "            except Exception",
                "            except ZeroDivisionError",
            ),
            (
                "core/housekeeping.py",
                "        except Exception as error:",
                "        except ZeroDivisionError as error:",
            ),
        ],
    ),
    "L4": (
        "an approved tool acts before the approval is durable",
        [
            (
                "core/tool_executor.py",
                "            await self._make_durable()\n",
                "            pass\n",
            )
        ],
    ),
    "L6": (
        "a cancellation that nobody asked for ends the task, and nothing writes `end`",
        [
            NO_GUARANTEE,
            (
                "core/run.py",
                "        except (Exception, asyncio.CancelledError):",
                "        except Exception:",
            ),
        ],
    ),
    "L7": (
        "the gap after a crash is in memory only",
        [
            (
                "adapters/database/event_store.py",
                "                self._owner,\n                *moment,\n                last,\n",
                '                self._owner,\n                *moment,\n                row["last_seq"],\n',
            )
        ],
    ),
    "L8": (
        "a drain takes its list of runs once",
        [
            (
                "core/runs.py",
                "        while self._unfinished or self._operations:\n            meanwhile()\n",
                "        first = [*self._unfinished]\n"
                "        while any(not run.finished.is_set() for run in first):\n"
                "            meanwhile()\n",
            )
        ],
    ),
    "L19": (
        "a dropped message is answered all the same",
        [
            (
                "core/queues.py",
                "self._queues.pop((user, thread_id), ())",
                "self._queues.get((user, thread_id), ())",
            )
        ],
    ),
    "A13": (
        "a run gives up its text when the storage is away for too long",
        [
            (
                "core/run.py",
                '            status = "failed"\n            events = [Failed(**known.to_dict())]\n            self._parts.log.abandon(self.id)\n',
                '            status = "failed"\n            events = [Failed(**known.to_dict())]\n',
            )
        ],
    ),
    "S1": (
        "a write that failed, but was done, is done again",
        [
            (
                "adapters/database/event_store.py",
                "                if batch.uncertain:\n",
                "                if False:\n",
            )
        ],
    ),
    "S2": (
        "a retry begins a run in a thread that is busy",
        [
            (
                "core/conversation.py",
                "                    begin = functools.partial(self._answer_again, user, stored, command)\n",
                "                    return await self._answer_again(user, stored, command)\n",
            )
        ],
    ),
    "S3": (
        "recovery continues a run in a thread that has gone on",
        [
            (
                "core/recovery.py",
                "is not None:\n            return False  # the",
                "is ...:\n            return False  # the",
            )
        ],
    ),
    "S4": (
        "recovery writes on after the end",
        [
            (
                "core/run_writer.py",
                "            if state.end is None:\n                self",
                "            if True:\n                self",
            ),
            ("core/tail.py", "            if self.ended:\n", "            if False:\n"),
        ],
    ),
}
"""L and A: how the first version was; S: what the simulation itself found since."""


def schedules_until_found(edits: list[Edit]) -> int | None:
    """Return the number of schedules until one fails with these edits."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for part in ("quart_chat", "tests/simulation"):
            shutil.copytree(ROOT / part, copy / part)
        for name, before, after in edits:
            path = copy / "quart_chat" / name
            text = path.read_text()
            if before not in text:
                raise SystemExit(f"{name} has changed; this defect has to be described anew")
            path.write_text(text.replace(before, after))
        command = [sys.executable, "-W", "ignore", "-m", "tests.simulation", "--processes", "1"]
        command += ["--runs", str(SCHEDULES), "--seed", str(FIRST_SEED), "--shrink", "1"]
        environ = {**os.environ, "PYTHONHASHSEED": "0", "PYTHONPATH": str(copy)}
        done = subprocess.run(
            command, cwd=copy, env=environ, capture_output=True, text=True, check=False
        )
    found = re.search(r"first: seed (\d+)", done.stdout)
    if found is None and "none failed" not in done.stdout:
        raise SystemExit(done.stdout + done.stderr)
    return int(found[1]) - FIRST_SEED + 1 if found else None


if __name__ == "__main__":
    print("| defect | what it is | schedules until it was found |\n| --- | --- | --- |")
    for name, (what, edits) in DEFECTS.items():
        count = schedules_until_found(edits)
        print(f"| {name} | {what} | {count or f'not in {SCHEDULES}'} |", flush=True)
