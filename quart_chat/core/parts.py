"""The core's parts, chosen once when the application starts."""

from __future__ import annotations

from dataclasses import dataclass, field

from .models import ModelRegistry
from .policy import Policy
from .ports import RunLog, Storage
from .tool_threads import ToolThreads
from .tools import ToolRegistry


@dataclass(frozen=True)
class Parts:
    """What the services of the core share."""

    storage: Storage
    log: RunLog
    models: ModelRegistry = field(default_factory=lambda: ModelRegistry(()))
    tools: ToolRegistry = field(default_factory=ToolRegistry)
    policy: Policy = field(default_factory=Policy)
    tool_threads: ToolThreads = field(default_factory=ToolThreads)
