"""The processes of a benchmark, and what the operating system says that they used."""

from __future__ import annotations

import os
import resource
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parent.parent
FILES = 20_000
READY_SECONDS = 60
HIDDEN = ("QUART", "SUPABASE", "OPENAI", "NODETOOL", "DATABASE_URL", "PORT", "WEB_CONCURRENCY")


def raise_file_limit() -> None:
    """Let this process and its children have many sockets."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = FILES if hard == resource.RLIM_INFINITY else min(FILES, hard)
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def environment(given: Mapping[str, str]) -> dict[str, str]:
    """This process's environment without anything that configures a server."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(HIDDEN)}
    return {**kept, "PYTHONPATH": str(ROOT), **given}


class Process:
    """A Python process of ours, ended with the ``with`` block."""

    def __init__(
        self, arguments: Sequence[str], *, cwd: Path, environ: Mapping[str, str] | None = None
    ) -> None:
        self._process = subprocess.Popen(
            [sys.executable, *arguments],
            cwd=cwd,
            env=environment(environ or {}),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=(cwd / "stderr.log").open("ab"),
            text=True,
        )
        self._message_fields = psutil.Process(self._process.pid)
        self.pid = self._process.pid

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *error: Any) -> None:
        if self._process.stdin:
            self._process.stdin.close()
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def line(self) -> str:
        """The next line that it prints. Raises RuntimeError where it has ended."""
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self._process.args} ended with {self._process.wait()}")
        return line

    def tell(self, line: str) -> None:
        """Write a line to its stdin."""
        assert self._process.stdin
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()

    def wait_for_port(self, port: int) -> None:
        """Wait until it listens. Raises RuntimeError where it does not."""
        until = time.monotonic() + READY_SECONDS
        while time.monotonic() < until and self._process.poll() is None:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    return
            time.sleep(0.02)
        raise RuntimeError(f"{self._process.args} does not listen")

    def cpu(self) -> float:
        """Seconds of CPU, user and system, of all its threads."""
        times = self._message_fields.cpu_times()
        return float(times.user + times.system)

    def rss(self) -> int:
        """Bytes of memory that it holds."""
        return int(self._message_fields.memory_info().rss)

    def settle(self, seconds: float = 30.0) -> None:
        """Wait until it has nothing to do, so that one measurement does not pay for another."""
        until = time.monotonic() + seconds
        before = self.cpu()
        while time.monotonic() < until:
            time.sleep(0.3)
            used, before = self.cpu() - before, self.cpu()
            if used <= 0.02:
                return


def cpu_of_command(arguments: Sequence[str], cwd: Path) -> float:
    """Seconds of CPU of a command that ends by itself."""
    process = subprocess.Popen(
        [sys.executable, *arguments],
        cwd=cwd,
        env=environment({}),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{arguments} ended with {process.returncode}")
    return usage.ru_utime + usage.ru_stime
