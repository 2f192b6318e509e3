"""Version windows of libraries, and the warning when a library is not as expected."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

logger = logging.getLogger("quart_chat.compat")

_warned: set[str] = set()


@dataclass(frozen=True, slots=True)
class Checked:
    """Versions of a library that a hook was checked against: from ``first``, below ``below``."""

    library: str
    first: str
    below: str

    def __str__(self) -> str:
        return f"{self.library} >={self.first},<{self.below}"

    def installed(self) -> str:
        """Return the installed version, or ``unknown``."""
        try:
            return version(self.library)
        except PackageNotFoundError:
            return "unknown"

    def problem(self, differences: Iterable[str]) -> str | None:
        """Return a sentence if the library differs from what the hook needs, else None."""
        reasons = list(differences)
        if not reasons:
            return None
        return (
            f"{self.library} {self.installed()} differs from the versions that quart_chat was "
            f"checked against ({self}): {'; '.join(reasons)}."
        )


def warn_once(problem: str, consequence: str) -> None:
    """Log what differs and what is done without it, once for each problem."""
    if problem not in _warned:
        _warned.add(problem)
        logger.warning("%s %s", problem, consequence)


def missing_names(owner: Any, names: Iterable[str]) -> list[str]:
    """Return a clause for each attribute that an object lacks."""
    label = getattr(owner, "__qualname__", None) or getattr(owner, "__name__", repr(owner))
    return [f"{label} has no {name}" for name in names if not hasattr(owner, name)]


def parameters(function: Callable[..., Any]) -> tuple[str, ...]:
    """Return the names of a function's parameters, without ``self``."""
    return tuple(name for name in inspect.signature(function).parameters if name != "self")


def other_parameters(owner: type, name: str, *expected: tuple[str, ...]) -> list[str]:
    """Return a clause if a method is missing, or takes none of the expected parameter lists."""
    function = getattr(owner, name, None)
    if function is None:
        return [f"{owner.__qualname__} has no {name}"]
    actual = parameters(function)
    if actual in expected:
        return []
    return [f"{owner.__qualname__}.{name} takes ({', '.join(actual)})"]
