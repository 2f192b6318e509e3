"""The bounds and policies that the core keeps to; ``config.py`` says what each one means."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Policy:
    """Times are in seconds. A value of None is no bound."""

    system_prompt: str | None = None
    history_messages: int = 100
    history_chars: int | None = 1_000_000
    max_tokens: int | None = None
    image_urls: Literal["all", "data"] = "all"
    max_tool_rounds: int = 10
    max_tool_calls: int = 32
    max_tool_threads: int = 64
    max_answer_chars: int = 4_000_000
    tool_timeout: float = 60
    approval_timeout: float = 3600
    run_timeout: float = 600
    provider_idle_timeout: float = 60
    storage_retry: float = 10
    on_busy: Literal["interrupt", "reject", "queue"] = "interrupt"
    queue_limit: int = 8
    on_disconnect: Literal["continue", "stop"] = "continue"
    resume_window: float = 60
    forget_after_window: bool = False
    max_runs_per_user: int | None = None
