"""The house's rules, read from the source: which file may import what, and how large it may be."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import quart_chat
from quart_chat.core import ports

PACKAGE = Path(quart_chat.__file__).parent
FILES = sorted(p for p in PACKAGE.rglob("*.py") if "migrations" not in p.parts)
CORE_VALUES = {
    "commands",
    "events",
    "messages",
    "models",
    "policy",
    "search",
    "tail",
    "tool_threads",
    "tools",
}
DOORS = {"extension", "app", "cli", "serving", "__init__", "__main__"}


def imports(path: Path) -> set[str]:
    """Absolute names of all that a file imports, however deep in it."""
    module = ["quart_chat", *path.relative_to(PACKAGE).with_suffix("").parts]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = module[: -node.level] if node.level else []
            name = ".".join([*base, *([node.module] if node.module else [])])
            found |= {f"{name}.{alias.name}" for alias in node.names}
    return found


def ours(path: Path, part: str) -> set[str]:
    """The modules of one band that a file imports, by their name in it."""
    prefix = f"quart_chat.{part}."
    return {
        name.removeprefix(prefix).split(".")[0] for name in imports(path) if name.startswith(prefix)
    }


def band(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_run_one_way(path: Path) -> None:
    names = imports(path)
    outside = {name.split(".")[0] for name in names}
    match band(path):
        case "core":
            assert not outside & {
                "quart",
                "quart_schema",
                "hypercorn",
                "tortoise",
                "aiohttp",
                "httpx",
            }
            assert not ours(path, "transports")
            assert not ours(path, "adapters")
            assert not any(name.startswith("quart_chat.config") for name in names)
        case "adapters":
            assert not outside & {"quart", "quart_schema", "hypercorn"}
            assert not ours(path, "transports")
            assert ours(path, "core") <= CORE_VALUES | {"ports"}
            own = path.relative_to(PACKAGE / "adapters").parts[0]
            if path.name != "__init__.py" or len(path.relative_to(PACKAGE).parts) > 2:
                assert ours(path, "adapters") <= {own.removesuffix(".py")}
        case "transports":
            assert not ours(path, "adapters")
            assert not {n for n in names if n.split(".")[1:2] and n.split(".")[:2] in DOOR_NAMES}
        case "compat":
            assert not {name for name in names if name.split(".")[1:2] in (["core"], ["adapters"])}
            assert not ours(path, "transports")
        case "errors.py" | "config.py":
            assert not ours(path, "core")
            assert not ours(path, "transports")
            assert not ours(path, "adapters")
        case _:
            assert not any(name.startswith("quart_chat.adapters.") for name in names)


DOOR_NAMES = [["quart_chat", door] for door in DOORS]


def test_context_globals_stay_at_the_rim() -> None:
    for path in FILES:
        if band(path) in ("core", "adapters"):
            assert not imports(path) & {"quart.request", "quart.websocket", "quart.current_app"}


def test_a_port_has_at_most_eight_methods() -> None:
    for name in ("Storage", "UserData", "EventLog", "Provider", "Authenticator"):
        methods = inspect.getmembers(getattr(ports, name), inspect.isfunction)
        assert len([each for each, _ in methods if not each.startswith("_")]) <= 8, name


def test_functions_are_small() -> None:
    long = []
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or 0) - node.lineno + 1
                if lines > 60:
                    long.append(f"{path.name}:{node.name} has {lines} lines")
    assert not long


def test_nothing_heavy_is_imported_before_it_is_needed() -> None:
    code = (
        "import sys, quart_chat; "
        "heavy = {'openai', 'supabase', 'supabase_auth', 'tortoise', 'quart', 'pydantic'};"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_public_names_are_there() -> None:
    for name in quart_chat.__all__:
        assert getattr(quart_chat, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = quart_chat.nothing
