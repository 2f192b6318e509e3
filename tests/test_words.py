"""The words of the project: known bad patterns in documents, docstrings and messages."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
SOURCES = [*(ROOT / "quart_chat").rglob("*.py"), *(ROOT / "examples").glob("*.py")]
LATER = {"docs/discussion/data-flow.md", "quart_chat/core"}
"""Still to be rewritten."""

BAD = {
    r"\bcan not\b": "cannot",
    r"\bfor ever\b": "forever",
    r"\bwho is asking\b": "the user, or authentication",
    r"\b(is|are) ready[- ]made\b": "built in",
    r"\bwithout an end\b": "forever",
    r"\bno cursor of ours\b": "cursor is invalid",
    r"\bmakes no sense\b": "could not be understood",
}
NO_VERB = re.compile(r"(Gives?|What|Whether|Who|Which|Where|How|Something|Somebody|Nothing)\b")


def checked(paths: list[Path]) -> list[Path]:
    return [path for path in paths if not any(path.is_relative_to(ROOT / each) for each in LATER)]


def mistakes(text: str) -> Iterator[str]:
    """Yield what to write instead of each bad pattern; lines may break anywhere."""
    words = " ".join(text.split())
    for pattern, better in BAD.items():
        for match in re.finditer(pattern, words, re.IGNORECASE):
            yield f"{match[0]!r}: write {better!r}"


def in_page(path: Path) -> Iterator[str]:
    """Yield the mistakes of a page, paragraph by paragraph, without its code."""
    text = re.sub(
        r"^```.*?^```$",
        lambda code: "\n" * code[0].count("\n"),
        path.read_text(),
        flags=re.MULTILINE | re.DOTALL,
    )
    line = 1
    for part in re.split(r"(\n\s*\n)", text):
        for mistake in mistakes(part):
            yield f"{path.relative_to(ROOT)}:{line}: {mistake}"
        line += part.count("\n")


def is_property(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    names = {getattr(each, "id", getattr(each, "attr", "")) for each in function.decorator_list}
    return not names.isdisjoint({"property", "cached_property"})


def in_source(path: Path) -> Iterator[str]:
    """Yield the mistakes in a file's docstrings and other strings."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            for mistake in mistakes(node.value):
                yield f"{path.relative_to(ROOT)}:{node.lineno}: {mistake}"
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not is_property(node):
            first = NO_VERB.match(ast.get_docstring(node) or "")
            if first:
                yield (
                    f"{path.relative_to(ROOT)}:{node.lineno}: {node.name}: begin the docstring "
                    f"with a verb ('Return …'), not with {first[0]!r}"
                )


def test_pages() -> None:
    assert [mistake for path in checked(PAGES) for mistake in in_page(path)] == []


def test_docstrings_and_messages() -> None:
    assert [mistake for path in checked(SOURCES) for mistake in in_source(path)] == []


def test_bad_words_are_found() -> None:
    assert list(mistakes("It can\nnot wait for ever.")) == [
        "'can not': write 'cannot'",
        "'for ever': write 'forever'",
    ]
