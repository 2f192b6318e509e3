"""Tortoise ORM: a context that stays entered, and migrations run from code.

Tortoise keeps its state in a context variable with one process-wide fallback, which belongs to the
host application. A context of our own is entered once inside a ``contextvars.Context``; operations
run as tasks in copies of it.
"""

from __future__ import annotations

import contextvars
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

from tortoise.context import TortoiseContext
from tortoise.migrations.executor import MigrationExecutor, MigrationTarget
from tortoise.migrations.recorder import MigrationRecorder

from ..errors import ConfigurationError

CHECKED = ((1, 1, 9), (1, 2))
"""The versions that these hooks were checked against: from the first, below the second."""

LATEST = "__latest__"


def check(installed: str | None = None) -> None:
    """Check that the installed Tortoise is one that the hooks fit.

    Raises:
        ConfigurationError: The version is outside the window, or a hook is missing.
    """
    installed = installed or version("tortoise-orm")
    numbers = tuple(int(part) for part in installed.split(".")[:3] if part.isdigit())
    missing = [
        name
        for owner, name in (
            (TortoiseContext, "__enter__"),
            (MigrationExecutor, "plan"),
            (MigrationExecutor, "_schema_editor"),
            (MigrationRecorder, "ensure_schema"),
        )
        if not callable(getattr(owner, name, None))
    ]
    if not CHECKED[0] <= numbers < CHECKED[1] or missing:
        raise ConfigurationError(
            f"tortoise-orm {installed} is not supported. "
            "Run: pip install 'tortoise-orm>=1.1.9,<1.2'"
        )


class KeptContext:
    """A Tortoise context that stays entered between operations."""

    def __init__(self) -> None:
        check()
        self.tortoise = TortoiseContext()
        self._inside = contextvars.copy_context()

    def enter(self) -> None:
        """Enter the context; it stays so until ``leave``."""
        self._inside.run(self.tortoise.__enter__)

    def leave(self) -> None:
        """Leave the context."""
        self._inside.run(self.tortoise.__exit__, None, None, None)

    @property
    def inside(self) -> contextvars.Context:
        """The context in which ours is the current Tortoise."""
        return self._inside

    def client(self, connection: str) -> Any:
        """Return the client of a connection: the transaction's within a transaction."""
        return self.tortoise.connections.get(connection)


async def pending_migrations(
    client: Any, apps: Mapping[str, Mapping[str, Any]], app: str
) -> list[str]:
    """Return the names of the migrations that a database lacks."""
    steps = await _executor(client, apps).plan([MigrationTarget(app, LATEST)])
    return [step.migration.name for step in steps]


async def migrate(client: Any, apps: Mapping[str, Mapping[str, Any]], app: str) -> None:
    """Apply the migrations that a database lacks; within a transaction they are one unit.

    The table of applied migrations is made first: Tortoise tries to read it before, and on
    PostgreSQL that failure would abort the transaction.
    """
    executor = _executor(client, apps)
    await executor.recorder.ensure_schema(executor._schema_editor(atomic=False))
    await executor.migrate([MigrationTarget(app, LATEST)])


def _executor(client: Any, apps: Mapping[str, Mapping[str, Any]]) -> MigrationExecutor:
    return MigrationExecutor(client, {name: dict(app) for name, app in apps.items()})
