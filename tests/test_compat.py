"""What we use of other libraries' inside; each test says which library changed, and what."""

from __future__ import annotations

import asyncio
import logging
import re
from pathlib import Path
from typing import Any

import pytest
from quart import Quart
from quart.asgi import ASGIHTTPConnection, ASGIWebsocketConnection
from werkzeug.routing import BaseConverter, Rule

from quart_chat.compat import hypercorn as hypercorn_compat
from quart_chat.compat import quart as quart_compat
from quart_chat.compat.version import Checked, other_parameters
from quart_chat.transports import asgi

ROOT = Path(__file__).parent.parent

PROBLEMS = {
    "hypercorn": hypercorn_compat.hypercorn_problem,
    "wsproto": hypercorn_compat.wsproto_problem,
    "h11": hypercorn_compat.h11_problem,
    "quart": quart_compat.quart_problem,
    "werkzeug": quart_compat.werkzeug_problem,
}
WINDOWS = [
    hypercorn_compat.HYPERCORN,
    hypercorn_compat.WSPROTO,
    hypercorn_compat.H11,
    quart_compat.QUART,
    quart_compat.WERKZEUG,
]


@pytest.mark.parametrize("library", PROBLEMS)
def test_a_library_is_as_the_hook_expects(library: str) -> None:
    problem = PROBLEMS[library]()
    assert problem is None, problem


@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_the_installed_version_was_checked(window: Checked) -> None:
    def parts(text: str) -> tuple[int, ...]:
        return tuple(int(part) for part in re.findall(r"\d+", text)[:2])

    installed = parts(window.installed())
    assert parts(window.first) <= installed < parts(window.below), (
        f"{window.library} {window.installed()} is outside of {window}: "
        "check the hooks in quart_chat/compat, then widen the window there and in pyproject.toml"
    )


@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_the_window_is_the_one_that_is_installed_by(window: Checked) -> None:
    bounds = re.search(rf'"{window.library}(>=[^"]+)"', (ROOT / "pyproject.toml").read_text())
    assert bounds, f"pyproject.toml has no bounds for {window.library}"
    assert bounds[1] == f">={window.first},<{window.below}"


def test_a_difference_is_said_in_words() -> None:
    class Connection:
        def handle(self, event: Any, stream: Any) -> None: ...

    differences = other_parameters(Connection, "handle", ("event",))
    differences += other_parameters(Connection, "close", ())
    problem = Checked("h11", "0.1", "0.2").problem(differences)
    assert problem is not None
    assert re.fullmatch(
        r"h11 [\d.]+ differs from the versions that quart_chat was checked against "
        r"\(h11 >=0.1,<0.2\): .*Connection.handle takes \(event, stream\); "
        r".*Connection has no close\.",
        problem,
    )


def test_an_unknown_hypercorn_serves_in_its_plain_way(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from hypercorn.asyncio import run
    from hypercorn.protocol.h11 import H11Protocol

    before = run.__dict__["TCPServer"]
    monkeypatch.delattr(H11Protocol, "_check_protocol")
    with caplog.at_level(logging.WARNING, "quart_chat.compat"):
        assert not hypercorn_compat.bound_connections()
        assert not hypercorn_compat.bound_connections()
    assert run.__dict__["TCPServer"] is before
    assert [record.message.partition(":")[0] for record in caplog.records] == [
        hypercorn_compat.HYPERCORN.problem(["x"]).partition(":")[0]  # type: ignore[union-attr]
    ]


def test_an_unknown_quart_keeps_its_own_sockets(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def handle_messages(self: Any, receive: Any, something: Any) -> None: ...

    monkeypatch.setattr(ASGIWebsocketConnection, "handle_messages", handle_messages)
    app = Quart(__name__)
    with caplog.at_level(logging.WARNING, "quart_chat.compat"):
        asgi.prepare(app)
    assert app.asgi_websocket_class is ASGIWebsocketConnection
    assert app.asgi_http_class is asgi.ChatHTTPConnection
    assert "handle_messages takes (receive, something)" in caplog.text


def test_a_host_s_own_connection_classes_stay() -> None:
    class Mine(ASGIHTTPConnection):
        pass

    app = Quart(__name__)
    app.asgi_http_class = Mine
    asgi.prepare(app)
    assert app.asgi_http_class is Mine


def test_a_converter_is_found_in_either_way() -> None:
    app = Quart(__name__)
    app.url_map.converters["thing"] = thing = type("Thing", (BaseConverter,), {})
    app.url_map.add(rule := Rule("/x/<thing:name>", endpoint="x"))
    app.url_map.add(other := Rule("/y/<name>", endpoint="y"))
    assert quart_compat.has_converter(rule, thing, "thing")
    assert not quart_compat.has_converter(other, thing, "thing")
    del rule._converters, other._converters
    assert quart_compat.has_converter(rule, thing, "thing")
    assert not quart_compat.has_converter(other, thing, "thing")


async def test_frames_that_wait_are_not_lost_with_who_puts_them() -> None:
    frames = quart_compat.WaitingFrames(1)
    await frames.put("first")
    putting = asyncio.ensure_future(frames.put("second"))
    await asyncio.sleep(0)
    putting.cancel()
    await asyncio.gather(putting, return_exceptions=True)
    assert frames.take_all() == ["first", "second"]
