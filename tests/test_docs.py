"""The documents: their links, their tables, their commands and their code are true."""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
import shlex
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import click
import pytest
from conftest import SECONDS, Server
from endpoint import END, Endpoint, Exchange, text

from quart_chat.adapters.catalogue import CATALOGUE
from quart_chat.cli import main
from quart_chat.config import DEFAULTS, WELL_KNOWN, ProviderSettings
from quart_chat.core.commands import COMMANDS, IGNORED_FIELDS, SendMessage, parse
from quart_chat.core.events import EVENT_TYPES
from quart_chat.errors import RETRYABLE_CODES

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
ASSIGNMENT = re.compile(r"[A-Z_]+=\S*")


def page(name: str) -> str:
    return (ROOT / name).read_text()


def blocks(name: str, language: str) -> list[str]:
    """The code blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", page(name), re.DOTALL | re.MULTILINE)


def table(name: str, heading: str) -> list[list[str]]:
    """The rows of the first table after a heading, without its own first two."""
    after = page(name).split(f"{heading}\n", 1)[1]
    lines = re.search(r"(?:^\|.*\n)+", after, re.MULTILINE)
    assert lines
    rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in lines[0].splitlines()[2:]]
    return [[cell.strip() for cell in row] for row in rows]


def anchors(target: Path) -> set[str]:
    """The names by which a page's headings are linked to."""
    headings = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in headings}


def every(language: str) -> list[Any]:
    found = [(name, code) for name in NAMES for code in blocks(name, language)]
    return [pytest.param(*each, id=f"{each[0]}-{n}") for n, each in enumerate(found)]


@pytest.mark.parametrize("name", NAMES)
def test_every_link_leads_somewhere(name: str) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page(name)):
        parts = urlsplit(link)
        if parts.scheme:
            assert parts.scheme == "https", link
            continue
        target = (ROOT / name).parent / parts.path if parts.path else ROOT / name
        assert target.exists(), link
        if parts.fragment:
            assert parts.fragment in anchors(target), link


def test_every_page_can_be_reached() -> None:
    reached, waiting = set(), [ROOT / "README.md"]
    while waiting:
        each = waiting.pop().resolve()
        if each in reached or each.suffix != ".md":
            continue
        reached.add(each)
        links = [urlsplit(link) for link in re.findall(r"\]\(([^)\s]+)\)", each.read_text())]
        waiting += [each.parent / link.path for link in links if link.path and not link.scheme]
    assert {found.resolve() for found in PAGES} - reached == set()


def test_the_providers_are_those_of_the_catalogue() -> None:
    rows = table("docs/reference/providers.md", "## Built in")
    expected = [
        [
            f"`{name}`",
            ", ".join(f"`{variable}`" for variable in (entry.key, entry.url) if variable),
            f"`{entry.default_model}`" if entry.default_model else "–",
        ]
        for name, entry in CATALOGUE.items()
    ]
    assert rows == expected
    keys = [row[0].strip("`") for row in table("docs/reference/providers.md", "## Others")]
    assert keys == list(ProviderSettings.model_fields)


def test_the_protocol_names_every_command_field_and_event() -> None:
    name = "docs/reference/protocol.md"
    fields = [row[0].strip("`") for row in table(name, "### 2.1 `message`")]
    assert sorted(fields) == sorted(SendMessage.model_fields)
    commands = [row[0].strip("`") for row in table(name, "### 2.2 Other commands")]
    assert commands == [kind for kind in COMMANDS if kind != "message"]
    for (_, told, _), kind in zip(table(name, "### 2.2 Other commands"), commands, strict=True):
        known = set(COMMANDS[kind].model_fields) - {"type", "id"}
        assert set(re.findall(r"`(\w+)`", told)) == known, kind
    events = [row[0].strip("`") for row in table(name, "## 3. Server to client")]
    assert sorted([*events, "round_end"]) == sorted(EVENT_TYPES)
    assert all(f"`{field}`" in page(name) for field in IGNORED_FIELDS)


def test_the_protocol_names_every_error() -> None:
    rows = table("docs/reference/protocol.md", "## 5. Errors")
    codes = {row[0].strip("`") for row in rows}
    assert {row[0].strip("`") for row in rows if row[2] == "yes"} == RETRYABLE_CODES
    source = "".join(path.read_text() for path in (ROOT / "quart_chat").rglob("*.py"))
    assert all(f'"{code}"' in source for code in codes)
    assert set(re.findall(r"code(?:: \w+)? = \"(\w+)\"", source)) <= codes
    assert set(re.findall(r"\bcode=\"(\w+)\"", source)) <= codes


@pytest.mark.parametrize("name", NAMES)
def test_every_setting_that_is_named_exists(name: str) -> None:
    known = {*DEFAULTS, *(v.removeprefix("QUART_") for vs in WELL_KNOWN.values() for v in vs)}
    named = set(re.findall(r"\b(?:QUART_)?(CHAT_[A-Z_]*[A-Z])\b", page(name)))
    assert named - known == set()


@pytest.mark.parametrize("name", NAMES)
def test_every_command_has_these_options(name: str) -> None:
    lines = [line for code in blocks(name, "(?:bash)?") for line in code.splitlines()]
    lines += re.findall(r"`([^`\n]+)`", page(name))
    for line in lines:
        for part in line.removeprefix("web: ").split("&&"):
            check_command(part)


def check_command(line: str) -> None:
    """Let our own command line read a line that calls it, without running it."""
    try:
        words = shlex.split(line, comments=True)
    except ValueError:
        return
    while words and ASSIGNMENT.fullmatch(words[0]):
        words.pop(0)
    if words[:3] == ["python", "-m", "quart_chat"]:
        words = words[2:]
    if len(words) < 2 or words[0] != "quart_chat" or words[1].startswith("…"):
        return
    words = words[1 : words.index(">") if ">" in words else None]
    command = main.get_command(click.Context(main), words[0])
    assert command, line
    if len(words) > 1:
        command.make_context(words[0], words[1:])


def test_the_procfile_starts_the_server() -> None:
    line = (ROOT / "Procfile").read_text().strip()
    check_command(line.removeprefix("web: "))
    assert all(line in page(name) for name in ("README.md", "docs/how-to/deploy.md"))


def test_what_ci_runs_is_what_the_readme_says() -> None:
    tested = "python -m pip install '.[dev]' && python -m pytest"
    assert f"{tested}\n" in "".join(blocks("README.md", "bash"))
    assert tested.replace("&& ", "&& exec ") in (ROOT / ".ci" / "run").read_text()


@pytest.mark.parametrize(("name", "code"), every("python"))
def test_python_in_the_documents_runs(
    name: str, code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {"__name__": "documented"}
    exec(compile(code, name, "exec"), namespace)
    if (app := namespace.get("app")) is not None:
        assert app.extensions["quart_chat"].settings


@pytest.mark.parametrize(("name", "code"), every("json"))
def test_json_in_the_documents_is_what_the_protocol_takes(name: str, code: str) -> None:
    value = json.loads(code)
    if value.get("type", "message") in COMMANDS and "seq" not in value:
        parse(value)
    else:
        assert value["type"] in EVENT_TYPES


@asynccontextmanager
async def cut_at(server: Server, sizes: list[int]) -> AsyncIterator[str]:
    """A way to the server; its first connections break after so many bytes each."""
    pumps: set[asyncio.Task[None]] = set()

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, left: float) -> None:
        try:
            while left > 0 and (data := await reader.read(int(min(left, 4096)))):
                writer.write(data)
                await writer.drain()
                left -= len(data)
        except ConnectionError:
            pass

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        size = sizes.pop(0) if sizes else float("inf")
        there, back = await asyncio.open_connection(server.host, server.port)
        up = asyncio.ensure_future(pump(reader, back, float("inf")))
        down = asyncio.ensure_future(pump(there, writer, size))
        pumps.update((up, down))
        await asyncio.wait((up, down), return_when=asyncio.FIRST_COMPLETED)
        for each in (writer, back):
            each.transport.abort()
        await asyncio.wait((up, down))

    relay = await asyncio.start_server(accept, "127.0.0.1", 0)
    async with relay:
        yield f"ws://127.0.0.1:{relay.sockets[0].getsockname()[1]}/chat"


async def test_the_client_that_resumes_gets_all_of_the_answer(
    server: Server, shared_endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The how-to's client, on connections that break before the first event and in the text."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    # What does not compress, so that bytes on the wire are about as many as characters.
    words = [hashlib.sha256(str(number).encode()).hexdigest() for number in range(200)]

    async def talk(exchange: Exchange) -> None:
        for word in words:
            await exchange.send(text(word))
        await exchange.send(END)

    shared_endpoint.scripts["documented"] = talk
    namespace: dict[str, Any] = {"__name__": "documented"}
    exec(blocks("docs/how-to/resume.md", "python")[0], namespace)
    answer: Callable[[str, str], AsyncIterator[str]] = namespace["answer"]
    sizes = [300, 700, 3000, 9000]
    async with cut_at(server, sizes) as url, asyncio.timeout(SECONDS):
        pieces = [piece async for piece in answer(url, "script:documented")]
    assert "".join(pieces) == "".join(words)
    assert sizes == []
    assert sum("script:documented" in str(asked) for asked in shared_endpoint.requests) == 1
