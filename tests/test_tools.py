"""Tools: the model acts within bounds, people watch and agree; what goes up is always valid."""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import signal
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from conftest import (
    SECONDS,
    Serve,
    Server,
    Socket,
    answer,
    client,
    connect,
    post,
    providers,
    start,
    unique,
)
from endpoint import DONE, END, USAGE, Endpoint, Exchange, calls, chunk, text
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transcript import as_sent, check_messages, check_request

TESTS = str(Path(__file__).parent)
TOOLS = ("--tools", "tools_for_tests")
NOT_FINISHED = "The tool did not finish: the run ended before its result."
_numbers = itertools.count()

Event = dict[str, Any]
Round = bytes | Callable[[Exchange], Any]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the module's server runs, and its tools meet the tests."""
    return tmp_path_factory.mktemp("tools")


@pytest.fixture(scope="module")
async def server(folder: Path, shared_endpoint: Endpoint) -> AsyncIterator[Server]:
    started = await start(
        *TOOLS,
        providers=providers(shared_endpoint),
        protocol="both",
        tool_timeout=15,
        cwd=folder,
        environ={"PYTHONPATH": TESTS},
    )
    yield started
    assert await started.stop() == 0
    assert "failed; reference" not in started.log(), started.log()


@pytest.fixture(autouse=True)
async def _all_that_was_sent_up_is_valid(
    endpoint: Endpoint, shared_endpoint: Endpoint
) -> AsyncIterator[None]:
    before = len(shared_endpoint.requests)
    yield
    for body in [*endpoint.requests, *shared_endpoint.requests[before:]]:
        check_request(body)


def plan(endpoint: Endpoint, *rounds: Round, final: str = "done") -> str:
    """A question that the scripted model answers with these rounds, and then with a text."""
    name = f"plan{next(_numbers)}"

    async def script(exchange: Exchange) -> None:
        newest = list(
            itertools.takewhile(
                lambda message: message["role"] != "user", reversed(exchange.body["messages"])
            )
        )
        done = sum(1 for message in newest if message.get("tool_calls"))
        if done >= len(rounds):
            await exchange.send(text(final) + END)
        elif isinstance(step := rounds[done], bytes):
            await exchange.send(step)
        else:
            await step(exchange)

    endpoint.scripts[name] = script
    return f"script:{name}"


def raw(*deltas: list[dict[str, Any]], finish: str | None = "tool_calls") -> bytes:
    """A round of call fragments as a provider cuts them: one list of fragments a chunk."""
    body = b"".join(chunk({"tool_calls": fragments}) for fragments in deltas)
    return body + (chunk({}, finish) if finish else b"") + USAGE + DONE


def piece(
    arguments: str | None = None, *, name: str | None = None, **fields: Any
) -> dict[str, Any]:
    """One fragment of a call."""
    function = {"name": name, "arguments": arguments}
    function = {key: value for key, value in function.items() if value is not None}
    return {**fields, **({"function": function} if function else {})}


def of(events: Sequence[Event], kind: str) -> list[Event]:
    return [event for event in events if event["type"] == kind]


def results(events: Sequence[Event]) -> list[tuple[str, str, bool]]:
    """Every tool result, in the order of the calls: name, content, whether it is an error."""
    order = [event["tool_call_id"] for event in of(events, "tool_call")]
    returned = sorted(of(events, "tool_result"), key=lambda e: order.index(e["tool_call_id"]))
    return [(e["name"], e["content"], e["is_error"]) for e in returned]


def one_end(events: Sequence[Event], status: str = "completed") -> None:
    assert [event["status"] for event in of(events, "end")] == [status], events
    assert events[-1]["type"] == "end"
    numbers = [event["seq"] for event in events]
    assert numbers == sorted(set(numbers))
    called = [event["tool_call_id"] for event in of(events, "tool_call")]
    assert sorted(called) == sorted(e["tool_call_id"] for e in of(events, "tool_result"))


async def appears(path: Path) -> None:
    """Wait until a tool has left its trace."""
    async with asyncio.timeout(SECONDS):
        while not path.exists():
            await asyncio.sleep(0.005)


async def stored(server: Server, thread: str) -> list[dict[str, Any]]:
    """A thread's messages, once nothing runs in it."""
    async with client(server) as http:
        async with asyncio.timeout(SECONDS):
            while (await http.get(f"/chat/threads/{thread}")).json()["active_run_id"]:
                await asyncio.sleep(0.01)
        found: list[dict[str, Any]] = (await http.get(f"/chat/threads/{thread}/messages")).json()[
            "messages"
        ]
    check_messages(as_sent(found))
    return found


async def next_turn(server: Server, thread: str) -> list[Event]:
    """A later turn, whose request holds all that was before."""
    events = await post(server, {"content": "script:default again", "thread_id": thread})
    one_end(events)
    return events


# The loop


async def test_rounds_until_there_are_no_calls(server: Server, shared_endpoint: Endpoint) -> None:
    thread = unique()
    question = plan(
        shared_endpoint,
        text("Let me add. ") + calls(("c1", "add", {"a": 1, "b": 2})),
        calls(("c2", "add", {"a": 3, "b": 4})),
        final="Ten.",
    )
    async with connect(server) as socket:
        events = await socket.ask(question, thread_id=thread, tools=["add"])
    one_end(events)
    assert [event["type"] for event in events] == [
        "start",
        "content",
        *("tool_call", "tool_result", "message", "message") * 2,
        "content",
        "message",
        "end",
    ]
    assert events[2] | {"seq": 0} == {
        "type": "tool_call",
        "tool_call_id": "c1",
        "name": "add",
        "arguments": {"a": 1, "b": 2},
        "needs": None,
        "thread_id": thread,
        "run_id": events[0]["run_id"],
        "seq": 0,
    }
    assert results(events) == [("add", "3", False), ("add", "7", False)]
    assert answer(events) == "Let me add. Ten."
    assert events[-1]["usage"] == {
        "prompt_tokens": 33,
        "completion_tokens": 21,
        "total_tokens": 54,
        "estimated": False,
    }
    assert events[-1]["finish_reason"] == "stop"
    sent = [body["messages"] for body in shared_endpoint.requests[-3:]]
    assert [[message["role"] for message in messages] for messages in sent] == [
        ["user"],
        ["user", "assistant", "tool"],
        ["user", "assistant", "tool", "assistant", "tool"],
    ]
    assert sent[2][1]["content"] == "Let me add. "
    assert sent[2][3]["content"] is None
    assert [m["content"] for m in sent[2] if m["role"] == "tool"] == ["3", "7"]
    assert all(
        [tool["function"]["name"] for tool in body["tools"]] == ["add"]
        for body in shared_endpoint.requests[-3:]
    )


async def test_calls_and_results_are_stored_and_in_later_turns(
    server: Server, shared_endpoint: Endpoint
) -> None:
    thread = unique()
    question = plan(
        shared_endpoint,
        text("Wait. ") + calls(("c1", "add", {"a": 1}), ("c2", "failing", {})),
        final="Sorry.",
    )
    async with connect(server) as socket:
        events = await socket.ask(question, thread_id=thread, tools=["add", "failing"])
    messages = await stored(server, thread)
    assert [message["role"] for message in messages] == [
        *("user", "assistant", "tool", "tool", "assistant")
    ]
    assert [event["message"] for event in of(events, "message")] == messages[1:]
    assert {message["run_id"] for message in messages} == {events[0]["run_id"]}
    assert {message["status"] for message in messages} == {"completed"}
    assert [message["parent_id"] for message in messages[1:]] == [m["id"] for m in messages[:-1]]
    question_, calling, first, second, last = messages
    assert question_["id"] == events[0]["user_message_id"]
    assert last["id"] == events[0]["message_id"]
    assert calling["content"] == "Wait. "
    assert calling["tool_calls"] == [
        {"id": "c1", "name": "add", "arguments": {"a": 1}},
        {"id": "c2", "name": "failing", "arguments": {}},
    ]
    assert (first["tool_call_id"], first["name"], first["content"]) == ("c1", "add", "1")
    assert (second["tool_call_id"], second["name"]) == ("c2", "failing")
    assert last["content"] == "Sorry."
    assert "tool_calls" not in last
    await next_turn(server, thread)
    again = shared_endpoint.requests[-1]["messages"]
    assert [message["role"] for message in again] == [
        *("user", "assistant", "tool", "tool", "assistant", "user")
    ]
    assert json.loads(again[1]["tool_calls"][0]["function"]["arguments"]) == {"a": 1}
    assert "tools" not in shared_endpoint.requests[-1]


async def test_parallel_calls_run_at_once_and_are_answered_in_order(
    server: Server, shared_endpoint: Endpoint, folder: Path
) -> None:
    one, two, three = unique("a"), unique("b"), unique("c")
    question = plan(
        shared_endpoint,
        calls(
            ("c1", "slow", {"mark": one}),
            ("c2", "blocking", {"mark": two}),
            ("c3", "slow", {"mark": three}),
        ),
    )
    async with connect(server) as socket:
        await socket.send({"content": question, "tools": ["slow", "blocking"]})
        for mark in (one, two, three):
            await appears(folder / f"{mark}.started")
        for mark in (three, two, one):
            (folder / f"{mark}.go").touch()
        events = await socket.until("end")
    one_end(events)
    assert [e["type"] for e in events if e["type"].startswith("tool")] == [
        *["tool_call"] * 3,
        *["tool_result"] * 3,
    ]
    sent = [m for m in shared_endpoint.requests[-1]["messages"] if m["role"] == "tool"]
    assert [(m["tool_call_id"], m["content"]) for m in sent] == [
        ("c1", f"waited for {one}"),
        ("c2", f"blocked for {two}"),
        ("c3", f"waited for {three}"),
    ]


@pytest.mark.parametrize("transport", ["json", "msgpack", "sse"])
async def test_every_transport_carries_tools(
    server: Server, shared_endpoint: Endpoint, transport: str
) -> None:
    question = plan(shared_endpoint, calls(("c1", "add", {"a": 40, "b": 2})))
    if transport == "sse":
        events = await post(server, {"content": question, "tools": ["add"]})
    else:
        async with connect(server, binary=transport == "msgpack") as socket:
            events = await socket.ask(question, tools=["add"])
    one_end(events)
    assert results(events) == [("add", "42", False)]


@pytest.mark.parametrize(
    ("name", "how", "says"),
    [
        ("failing", "value", "The tool failed: ValueError."),
        ("failing", "sentence", "The shop is closed."),
        ("failing", "timeout", "TimeoutError"),
        ("failing", "cancelled", "The tool failed"),
        ("failing_in_thread", "value", "The tool failed: ValueError."),
    ],
)
async def test_a_failing_tool_is_the_models_to_know(
    server: Server, shared_endpoint: Endpoint, name: str, how: str, says: str
) -> None:
    question = plan(shared_endpoint, calls(("c1", name, {"how": how}), ("c2", "add", {"a": 1})))
    async with connect(server) as socket:
        async with asyncio.timeout(SECONDS):
            events = await socket.ask(question, tools=[name, "add"])
    one_end(events)
    first, second = results(events)
    assert says in first[1]
    assert first[2] is True
    assert second == ("add", "1", False)
    assert "hunter2" not in json.dumps(events)
    assert "hunter2" not in json.dumps(shared_endpoint.requests[-1])


@pytest.mark.parametrize("name", ["failing", "failing_in_thread"])
async def test_a_tool_that_exits_does_not_end_the_server(
    serve: Serve, endpoint: Endpoint, name: str
) -> None:
    server = await serve(*TOOLS, environ={"PYTHONPATH": TESTS}, drain_timeout=0)
    question = plan(endpoint, calls(("c1", name, {"how": "exit"})))
    async with connect(server) as socket:
        events = await socket.ask(question, tools=[name])
        one_end(events)
        assert results(events)[0][2] is True
        one_end(await socket.ask("hi"))


async def test_a_slow_tool_is_given_up(serve: Serve, endpoint: Endpoint, tmp_path: Path) -> None:
    server = await serve(*TOOLS, environ={"PYTHONPATH": TESTS}, tool_timeout=0.3, drain_timeout=0)
    question = plan(
        endpoint,
        calls(
            ("c1", "slow", {"mark": "a"}),
            ("c2", "blocking", {"mark": "b"}),
            ("c3", "add", {"a": 1}),
            ("c4", "lookup", {}),
        ),
    )
    lookup = {"name": "lookup", "description": "", "parameters": {"type": "object"}}
    async with connect(server) as socket:
        events = await socket.ask(
            question, tools=["slow", "blocking", "add"], client_tools=[lookup]
        )
        one_end(events)
    assert [(name, is_error) for name, _, is_error in results(events)] == [
        ("slow", True),
        ("blocking", True),
        ("add", False),
        ("lookup", True),
    ]
    assert all("0.3 s" in e["content"] for e in of(events, "tool_result") if e["is_error"])
    assert (tmp_path / "a.cancelled").exists()
    assert (tmp_path / "b.started").exists()


@pytest.mark.parametrize("selected", [["add"], []], ids=["another", "none"])
@pytest.mark.parametrize("name", ["no_such_tool", "count", "forbidden"])
async def test_a_tool_that_was_not_selected_is_not_run(
    server: Server, shared_endpoint: Endpoint, folder: Path, selected: list[str], name: str
) -> None:
    mark = unique("count")
    question = plan(shared_endpoint, calls(("c1", name, {"mark": mark})))
    async with connect(server) as socket:
        events = await socket.ask(question, tools=selected)
    one_end(events)
    assert [(n, is_error) for n, _, is_error in results(events)] == [(name, True)]
    assert answer(events) == "done"
    assert not (folder / f"{mark}.txt").exists()


@pytest.mark.parametrize("name", ["nothing", "forbidden", "add "])
async def test_an_unknown_tool_is_refused_before_anything_happens(
    server: Server, shared_endpoint: Endpoint, name: str
) -> None:
    thread, before = unique(), len(shared_endpoint.requests)
    command = {"content": "hi", "thread_id": thread, "id": "m", "tools": ["add", name]}
    async with connect(server) as socket, client(server) as http:
        await socket.send(command)
        refused = await socket.receive()
        assert (refused["type"], refused["code"]) == ("error", "unknown_tool")
        assert (refused["reply_to"], refused["retryable"]) == ("m", False)
        assert "seq" not in refused
        assert name in refused["message"]
        response = await http.post("/chat/sse", json=command)
        assert response.status_code == 422
        assert response.json()["error"]["code"] == "unknown_tool"
        assert (await http.get(f"/chat/threads/{thread}")).status_code == 404
    assert len(shared_endpoint.requests) == before


ARGUMENTS = '{"a": 20, "b": 22}'
HALVES = ARGUMENTS[:7], ARGUMENTS[7:]
CUTS: dict[str, list[list[dict[str, Any]]]] = {
    "OpenAI": [
        [piece("", index=0, id="c1", name="add", type="function")],
        *([piece(character, index=0)] for character in ARGUMENTS),
    ],
    "one piece": [[piece(ARGUMENTS, index=0, id="c1", name="add")]],
    "id repeated": [[piece(half, index=0, id="c1", name="add")] for half in HALVES],
    "empty id and name afterwards": [
        [piece(HALVES[0], index=0, id="c1", name="add")],
        [piece(HALVES[1], index=0, id="", name="")],
    ],
    "null id afterwards": [
        [piece(HALVES[0], index=0, id="c1", name="add")],
        [piece(HALVES[1], index=0, id=None)],
    ],
    "no index": [[piece(HALVES[0], id="c1", name="add")], [piece(HALVES[1])]],
    "no index, id repeated": [[piece(half, id="c1", name="add")] for half in HALVES],
    "null index": [[piece(ARGUMENTS, id="c1", name="add", index=None)]],
    "no id at all": [[piece(HALVES[0], index=0, name="add")], [piece(HALVES[1], index=0)]],
    "neither": [[piece(ARGUMENTS, name="add")]],
    "index from one": [
        [piece(HALVES[0], index=1, id="c1", name="add")],
        [piece(HALVES[1], index=1)],
    ],
    "name later": [[piece("", index=0, id="c1")], [piece(ARGUMENTS, index=0, name="add")]],
    "arguments null first": [
        [{"index": 0, "id": "c1", "function": {"name": "add", "arguments": None}}],
        [piece(ARGUMENTS, index=0)],
    ],
    "arguments decoded": [
        [{"index": 0, "id": "c1", "function": {"name": "add", "arguments": {"a": 20, "b": 22}}}]
    ],
    "a long id": [[piece(ARGUMENTS, index=0, id="call_" + "x" * 300, name="add")]],
}


@pytest.mark.parametrize("how", CUTS)
async def test_fragments_of_a_call_as_providers_cut_them(
    server: Server, shared_endpoint: Endpoint, how: str
) -> None:
    question = plan(shared_endpoint, raw(*CUTS[how]))
    events = await post(server, {"content": question, "tools": ["add"]})
    one_end(events)
    assert [event["arguments"] for event in of(events, "tool_call")] == [{"a": 20, "b": 22}]
    assert results(events) == [("add", "42", False)]
    given = next((p["id"] for fragments in CUTS[how] for p in fragments if p.get("id")), None)
    called = events[1]["tool_call_id"]
    assert called == given if given else called


A, B = '{"a": 1}', '{"a": 2}'
SEVERAL: dict[str, list[list[dict[str, Any]]]] = {
    "in one chunk": [
        [piece(A, index=0, id="x", name="add"), piece(B, index=1, id="y", name="add")]
    ],
    "one after the other": [
        [piece(A[:3], index=0, id="x", name="add")],
        [piece(A[3:], index=0)],
        [piece(B[:3], index=1, id="y", name="add")],
        [piece(B[3:], index=1)],
    ],
    "interleaved by index": [
        [piece("", index=0, id="x", name="add"), piece("", index=1, id="y", name="add")],
        [piece(A[:3], index=0), piece(B[:3], index=1)],
        [piece(B[3:], index=1), piece(A[3:], index=0)],
    ],
    "interleaved by id": [
        [piece(A[:3], id="x", name="add"), piece(B[:3], id="y", name="add")],
        [piece(A[3:], id="x"), piece(B[3:], id="y")],
    ],
    "always index 0": [
        [piece(A, index=0, id="x", name="add")],
        [piece(B, index=0, id="y", name="add")],
    ],
    "always index 0, interleaved": [
        [piece(A[:3], index=0, id="x", name="add"), piece(B[:3], index=0, id="y", name="add")],
        [piece(A[3:], index=0, id="x"), piece(B[3:], index=0, id="y")],
    ],
    "no index": [
        [piece(A[:3], id="x", name="add")],
        [piece(A[3:])],
        [piece(B[:3], id="y", name="add")],
        [piece(B[3:])],
    ],
    "neither index nor id": [[piece(A, name="add")], [piece(B, name="add")]],
    "one id for both": [
        [piece(A, index=0, id="x", name="add")],
        [piece(B, index=1, id="x", name="add")],
    ],
    "indices with a gap": [
        [piece(A, index=0, id="x", name="add")],
        [piece(B, index=5, id="y", name="add")],
    ],
}


@pytest.mark.parametrize("how", SEVERAL)
async def test_fragments_of_several_calls(
    server: Server, shared_endpoint: Endpoint, how: str
) -> None:
    question = plan(shared_endpoint, raw(*SEVERAL[how]))
    events = await post(server, {"content": question, "tools": ["add"]})
    one_end(events)
    assert [event["arguments"] for event in of(events, "tool_call")] == [{"a": 1}, {"a": 2}]
    assert results(events) == [("add", "1", False), ("add", "2", False)]
    assert len({event["tool_call_id"] for event in of(events, "tool_call")}) == 2


async def test_empty_arguments_are_no_arguments(server: Server, shared_endpoint: Endpoint) -> None:
    fragments = [
        [piece("", index=0, id="c1", name="progress")],
        [piece(index=1, id="c2", name="progress")],
        [piece("{}", index=2, id="c3", name="progress")],
        [piece(" \n", index=3, id="c4", name="progress")],
    ]
    question = plan(shared_endpoint, raw(*fragments))
    events = await post(server, {"content": question, "tools": ["progress"]})
    one_end(events)
    assert [is_error for _, _, is_error in results(events)] == [False] * 4


async def test_a_round_ends_whatever_the_finish_reason(
    server: Server, shared_endpoint: Endpoint
) -> None:
    for finish in ("stop", "length", "function_call"):
        question = plan(shared_endpoint, raw(*CUTS["one piece"], finish=finish))
        events = await post(server, {"content": question, "tools": ["add"]})
        one_end(events)
        assert results(events) == [("add", "42", False)]


MALFORMED = {
    "cut": '{"a": 1',
    "no JSON": "a=1",
    "a list": "[1]",
    "null": "null",
    "a text": '"{}"',
    "NaN": '{"a": NaN}',
    "infinity": '{"a": 1e999}',
    "half a pair": '{"a": "\\ud800"}',
    "nul": '{"a": "\\u0000"}',
    "nul in a key": '{"\\u0000": 1}',
    "half a pair in a key": '{"\\ud800": 1}',
    "wide": '{"a": 1' + "0" * 30 + "}",
    "very wide": '{"a": 1' + "0" * 5000 + "}",
    "deep": '{"a": ' + "[" * 1000 + "]" * 1000 + "}",
    "far too deep": '{"a": ' + "[" * 100_000,
    "wrong type": '{"a": "one"}',
    "missing": "{}",
    "extra": '{"a": 1, "c": 3}',
}


@pytest.mark.parametrize("how", MALFORMED)
async def test_malformed_arguments_are_the_models_to_mend(
    server: Server, shared_endpoint: Endpoint, how: str
) -> None:
    thread = unique()
    wrong = raw([piece(MALFORMED[how], index=0, id="c1", name="add")])
    question = plan(shared_endpoint, wrong, calls(("c2", "add", {"a": 1})))
    async with connect(server) as text_, connect(server, binary=True) as binary:
        events = await text_.ask(question, thread_id=thread, tools=["add"])
        await binary.send({"type": "resume", "run_id": events[0]["run_id"]})
        assert of(await binary.until("end"), "tool_result") == of(events, "tool_result")
    one_end(events)
    assert [is_error for _, _, is_error in results(events)] == [True, False]
    assert "not " in results(events)[0][1] or "valid" in results(events)[0][1]
    await stored(server, thread)
    await next_turn(server, thread)


async def test_a_call_without_a_name_is_answered(server: Server, shared_endpoint: Endpoint) -> None:
    names = ["", None, "two words", "größe", "x" * 100, "dot.ted"]
    fragments = [
        [{"index": i, "id": f"c{i}", "function": {"name": name, "arguments": "{}"}}]
        for i, name in enumerate(names)
    ]
    thread = unique()
    question = plan(shared_endpoint, raw(*fragments))
    events = await post(server, {"content": question, "thread_id": thread, "tools": ["add"]})
    one_end(events)
    assert [is_error for _, _, is_error in results(events)] == [True] * len(names)
    await next_turn(server, thread)


async def test_the_same_ids_in_every_round(server: Server, shared_endpoint: Endpoint) -> None:
    thread = unique()
    question = plan(
        shared_endpoint,
        *(calls(("call_0", "add", {"a": n}), ("call_1", "failing", {})) for n in range(3)),
    )
    command = {"content": question, "thread_id": thread, "tools": ["add", "failing"]}
    for _ in range(2):
        events = await post(server, command)
        one_end(events)
        numbers = [content for name, content, _ in results(events) if name == "add"]
        assert numbers == ["0", "1", "2"]
    messages = await stored(server, thread)
    assert len(messages) == 2 * (1 + 3 * 3 + 1)
    assert len({message["id"] for message in messages}) == len(messages)


async def test_endless_calls_come_to_an_end(serve: Serve, endpoint: Endpoint) -> None:
    server = await serve(*TOOLS, environ={"PYTHONPATH": TESTS}, max_tool_rounds=3)

    async def insist(exchange: Exchange) -> None:
        if "tools" in exchange.body:
            number = len(endpoint.requests)
            await exchange.send(calls((f"c{number}", "add", {"a": number})))
        else:
            await exchange.send(text("I had to stop.") + END)

    endpoint.scripts["insist"] = insist
    command = {"content": "script:insist", "thread_id": "t", "tools": ["add"]}
    async with connect(server) as socket:
        events = await socket.ask(**command, tool_choice="required")
        one_end(events, "failed")
        assert [(e["code"], e["retryable"]) for e in of(events, "error")] == [
            ("tool_rounds_exceeded", False)
        ]
        assert ["tools" in body for body in endpoint.requests] == [True] * 4 + [False]
        assert answer(events) == "I had to stop."
        messages = await stored(server, "t")
        assert [m["role"] for m in messages] == ["user", *["assistant", "tool"] * 3, "assistant"]
        assert (messages[-1]["content"], messages[-1]["status"]) == ("I had to stop.", "failed")
        await next_turn(server, "t")


async def test_calls_in_the_last_answer_are_not_made(
    serve: Serve, endpoint: Endpoint, tmp_path: Path
) -> None:
    server = await serve(*TOOLS, environ={"PYTHONPATH": TESTS}, max_tool_rounds=1)
    rounds = [calls((f"c{n}", "count", {"mark": "n"})) for n in range(3)]
    events = await post(server, {"content": plan(endpoint, *rounds), "tools": ["count"]})
    one_end(events, "failed")
    assert len(of(events, "tool_call")) == 1
    assert (tmp_path / "n.txt").read_text() == "ran\n"


async def test_a_long_result_is_cut_and_says_so(server: Server, shared_endpoint: Endpoint) -> None:
    question = plan(
        shared_endpoint,
        calls(("c1", "big", {"chars": 32_768}), ("c2", "big", {"chars": 100_000})),
    )
    events = await post(server, {"content": question, "tools": ["big"]})
    one_end(events)
    whole, cut = (content for _, content, _ in results(events))
    assert whole == "x" * 32_768
    assert cut.startswith("x" * 30_000)
    assert len(cut) < 34_000
    assert "cut" in cut[-60:]
    assert str(100_000 - cut.count("x")) in cut
    sent = [m["content"] for m in shared_endpoint.requests[-1]["messages"] if m["role"] == "tool"]
    assert sent == [whole, cut]


@pytest.mark.parametrize(
    "kind", ["circle", "bytes", "half", "nul", "object", "nan", "none", "set", "model"]
)
async def test_whatever_a_tool_returns_becomes_text(
    server: Server, shared_endpoint: Endpoint, kind: str
) -> None:
    thread = unique()
    question = plan(
        shared_endpoint, calls(("c1", "strange", {"kind": kind}), ("c2", "add", {"a": 1}))
    )
    events = await post(
        server, {"content": question, "thread_id": thread, "tools": ["strange", "add"]}
    )
    one_end(events)
    assert results(events)[1] == ("add", "1", False)
    assert isinstance(results(events)[0][1], str)
    if kind == "model":
        assert json.loads(results(events)[0][1]) == {"street": "Main", "city": "Bonn"}
    await next_turn(server, thread)


async def test_progress_is_seen_between_call_and_result(
    server: Server, shared_endpoint: Endpoint
) -> None:
    thread = unique()
    question = plan(
        shared_endpoint,
        calls(("c1", "progress", {"steps": 3})),
        calls(("c2", "progress_in_thread", {})),
    )
    async with connect(server) as socket:
        events = await socket.ask(
            question, thread_id=thread, tools=["progress", "progress_in_thread"]
        )
    one_end(events)
    told = [(e["tool_call_id"], e["name"], e["content"]) for e in of(events, "tool_progress")]
    assert told[-2:] == [("c2", "progress_in_thread", "one"), ("c2", "progress_in_thread", "two")]
    assert told[:-2] == [("c1", "progress", f"{n} of 3") for n in (1, 2, 3)]
    order = [e["type"] for e in events if e.get("tool_call_id") == "c2"]
    assert order == ["tool_call", "tool_progress", "tool_progress", "tool_result"]
    assert results(events)[0][1] == f"3 steps for 1 in {thread}"
    assert results(events)[1][1] == events[0]["run_id"]
    assert "1 of 3" not in json.dumps(shared_endpoint.requests[-1])


async def test_nested_arguments_arrive_as_annotated(
    server: Server, shared_endpoint: Endpoint
) -> None:
    arguments = {"address": {"street": "Main", "city": "Bonn"}, "speed": "fast", "items": ["a"]}
    question = plan(shared_endpoint, calls(("c1", "deliver", arguments)))
    events = await post(server, {"content": question, "tools": ["deliver"]})
    one_end(events)
    assert results(events) == [("deliver", "a to Main, Bonn, fast, None", False)]


# Stop


@pytest.mark.parametrize("name", ["slow", "blocking"])
async def test_a_stop_does_not_wait_for_a_tool(
    server: Server, shared_endpoint: Endpoint, folder: Path, name: str
) -> None:
    thread, mark = unique(), unique("stop")
    question = plan(
        shared_endpoint,
        text("So far. ") + calls(("c1", "add", {"a": 1}), ("c2", name, {"mark": mark})),
    )
    before = len(shared_endpoint.requests)
    async with connect(server) as socket:
        await socket.send({"content": question, "thread_id": thread, "tools": [name, "add"]})
        seen = await socket.until("tool_result")
        await appears(folder / f"{mark}.started")
        await socket.send({"type": "stop", "thread_id": thread})
        events = seen + await socket.until("end")
        one_end(events, "stopped")
        if name == "slow":
            await appears(folder / f"{mark}.cancelled")
        assert [e["message"] for e in of(events, "generation_stopped")] == [
            "Generation stopped by user"
        ]
        assert results(events) == [("add", "1", False), (name, NOT_FINISHED, True)]
        messages = await stored(server, thread)
        assert [m["role"] for m in messages] == [
            *("user", "assistant", "tool", "tool"),
            "assistant",
        ]
        assert messages[1]["content"] == "So far. "
        assert messages[-1]["status"] == "stopped"
        (folder / f"{mark}.go").touch()
        await next_turn(server, thread)
    assert len(shared_endpoint.requests) == before + 2


async def test_a_new_message_interrupts_a_tool(
    server: Server, shared_endpoint: Endpoint, folder: Path
) -> None:
    thread, mark = unique(), unique("interrupt")
    question = plan(shared_endpoint, calls(("c1", "slow", {"mark": mark})))
    async with connect(server) as socket:
        await socket.send({"content": question, "thread_id": thread, "tools": ["slow"]})
        seen = await socket.until("tool_call")
        await appears(folder / f"{mark}.started")
        await socket.send({"content": "script:default", "thread_id": thread})
        one_end(seen + await socket.until("end"), "stopped")
        one_end(await socket.until("end"))
    assert (folder / f"{mark}.cancelled").exists()
    roles = [message["role"] for message in shared_endpoint.requests[-1]["messages"]]
    assert roles == ["user", "assistant", "tool", "user"]


async def test_a_blocking_tool_does_not_hold_the_server_at_its_end(
    serve: Serve, endpoint: Endpoint, tmp_path: Path
) -> None:
    server = await serve(*TOOLS, environ={"PYTHONPATH": TESTS}, drain_timeout=0)
    question = plan(endpoint, calls(("c1", "blocking", {"mark": "b"})))
    async with connect(server) as socket:
        await socket.send({"content": question, "thread_id": "t", "tools": ["blocking"]})
        await appears(tmp_path / "b.started")
        async with asyncio.timeout(SECONDS):
            assert await server.stop() == 0
    server = await serve(*TOOLS, environ={"PYTHONPATH": TESTS})
    messages = await stored(server, "t")
    assert [m["role"] for m in messages] == ["user", "assistant", "tool", "assistant"]
    assert messages[2]["content"] == NOT_FINISHED
    assert messages[-1]["status"] == "interrupted"
    await next_turn(server, "t")


async def test_a_killed_server_leaves_a_valid_transcript(
    serve: Serve, endpoint: Endpoint, tmp_path: Path
) -> None:
    settings = {"environ": {"PYTHONPATH": TESTS}}
    server = await serve(*TOOLS, **settings)
    question = plan(
        endpoint,
        calls(("c0", "add", {"a": 5})),
        text("Half. ") + calls(("c1", "add", {"a": 1}), ("c2", "slow", {"mark": "k"})),
    )
    async with connect(server) as socket:
        await socket.send({"content": question, "thread_id": "t", "tools": ["add", "slow"]})
        seen = await socket.until("tool_result", tool_call_id="c1")
        await appears(tmp_path / "k.started")
        await durable(server)
    await server.kill()
    server = await serve(*TOOLS, **settings)
    async with connect(server) as socket:
        run_id, last = seen[0]["run_id"], seen[-1]["seq"]
        await socket.send({"type": "resume", "run_id": run_id, "last_seq": last})
        events = seen + await socket.until("end")
    one_end(events, "interrupted")
    assert [event["code"] for event in of(events, "error")] == ["interrupted"]
    messages = await stored(server, "t")
    assert [m["role"] for m in messages] == [
        *("user", "assistant", "tool", "assistant", "tool", "tool", "assistant")
    ]
    assert [m["content"] for m in messages if m["role"] == "tool"] == ["5", "1", NOT_FINISHED]
    assert messages[-1]["id"] == events[0]["message_id"]
    await next_turn(server, "t")
    sent = endpoint.requests[-1]["messages"]
    assert [m["content"] for m in sent if m["role"] == "tool"] == ["5", "1", NOT_FINISHED]


async def durable(server: Server) -> None:
    """Turns that end after something have had it written before their own messages."""
    for _ in range(2):
        await post(server, {"content": "script:default"})


# Approval


async def until_needed(
    socket: Socket, question: str, needs: str = "approval", **fields: Any
) -> list[Event]:
    """Send a message, and return the events up to the call that waits for somebody."""
    await socket.send({"content": question, **fields})
    return await socket.until("tool_call", needs=needs)


def approval(events: Sequence[Event], approved: bool = True, **fields: Any) -> dict[str, Any]:
    """The answer to the newest call."""
    call_ = of(events, "tool_call")[-1]
    return {
        "type": "approve",
        "run_id": call_["run_id"],
        "tool_call_id": call_["tool_call_id"],
        "approved": approved,
        **fields,
    }


async def test_an_approved_call_is_made_with_the_arguments_that_were_shown(
    server: Server, shared_endpoint: Endpoint, folder: Path
) -> None:
    thread, mark = unique(), unique("paid")
    question = plan(shared_endpoint, calls(("c1", "pay", {"amount": 7, "mark": mark})))
    async with connect(server) as socket:
        seen = await until_needed(socket, question, thread_id=thread, tools=["pay"])
        assert seen[-1]["arguments"] == {"amount": 7, "mark": mark}
        assert seen[-1]["needs"] == "approval"
        await socket.send({"type": "ping"})
        assert (await socket.receive())["type"] == "pong"
        assert not (folder / f"{mark}.txt").exists()
        await socket.send(approval(seen))
        events = seen + await socket.until("end")
    one_end(events)
    assert results(events) == [("pay", "paid 7", False)]
    assert (folder / f"{mark}.txt").read_text() == "7\n"


@pytest.mark.parametrize("reason", ["Too expensive.", None])
async def test_a_refusal_is_the_models_to_know(
    server: Server, shared_endpoint: Endpoint, folder: Path, reason: str | None
) -> None:
    thread, mark = unique(), unique("paid")
    question = plan(shared_endpoint, calls(("c1", "pay", {"amount": 7, "mark": mark})))
    async with connect(server) as socket:
        seen = await until_needed(socket, question, thread_id=thread, tools=["pay"])
        await socket.send(approval(seen, False, reason=reason))
        events = seen + await socket.until("end")
    one_end(events)
    ((_, content, is_error),) = results(events)
    assert is_error
    assert "refused" in content
    assert (reason or "refused") in content
    assert not (folder / f"{mark}.txt").exists()
    assert answer(events) == "done"
    await next_turn(server, thread)


async def test_approval_by_a_predicate(server: Server, shared_endpoint: Endpoint) -> None:
    question = plan(
        shared_endpoint,
        calls(
            ("small", "tip", {"amount": 5}),
            ("large", "tip", {"amount": 500}),
            ("odd", "tip", {}),
        ),
    )
    async with connect(server) as socket:
        await socket.send({"content": question, "tools": ["tip"]})
        seen = await socket.until("tool_result")
        needs = {event["tool_call_id"]: event["needs"] for event in of(seen, "tool_call")}
        assert (needs["small"], needs["large"]) == (None, "approval")
        for call_id in ("large", "odd"):
            if needs[call_id] == "approval":
                await socket.send({**approval(seen), "tool_call_id": call_id})
        events = seen + await socket.until("end")
    one_end(events)
    assert results(events)[:2] == [("tip", "tipped 5", False), ("tip", "tipped 500", False)]
    assert results(events)[2][2] is True


async def test_an_approval_that_nobody_gives_expires(
    serve: Serve, endpoint: Endpoint, tmp_path: Path
) -> None:
    server = await serve(*TOOLS, environ={"PYTHONPATH": TESTS}, approval_timeout=0.3)
    question = plan(endpoint, calls(("c1", "pay", {"amount": 7})))
    async with connect(server) as socket:
        events = await socket.ask(question, tools=["pay"])
        one_end(events)
        ((_, content, is_error),) = results(events)
        assert is_error
        assert "in time" in content
        await socket.send(approval(events))
        late = await socket.receive()
        assert (late["type"], late["code"]) == ("error", "not_found")
    assert not (tmp_path / "paid.txt").exists()


async def test_waiting_for_people_is_not_counted_as_run_time(
    serve: Serve, endpoint: Endpoint, tmp_path: Path
) -> None:
    server = await serve(
        *TOOLS, environ={"PYTHONPATH": TESTS}, run_timeout=1.5, approval_timeout=2.5
    )
    question = plan(endpoint, calls(("c1", "pay", {"amount": 7})))
    async with connect(server) as socket:
        events = await socket.ask(question, tools=["pay"])
    one_end(events)
    assert "in time" in results(events)[0][1]


async def test_any_connection_of_the_user_may_approve(
    server: Server, shared_endpoint: Endpoint
) -> None:
    mark = unique("paid")
    question = plan(shared_endpoint, calls(("c1", "pay", {"amount": 7, "mark": mark})))
    async with connect(server, binary=True) as other:
        async with connect(server) as socket:
            seen = await until_needed(socket, question, tools=["pay"])
        await other.send({"type": "resume", "run_id": seen[0]["run_id"]})
        assert (await other.until("tool_call"))[-1] == seen[-1]
        await other.send(approval(seen))
        events = seen + await other.until("end")
    one_end(events)
    assert results(events) == [("pay", "paid 7", False)]


async def test_only_what_is_awaited_can_be_answered(
    server: Server, shared_endpoint: Endpoint
) -> None:
    mark = unique("paid")
    question = plan(shared_endpoint, calls(("c1", "pay", {"amount": 7, "mark": mark})))
    async with connect(server) as socket, connect(server) as other:
        seen = await until_needed(socket, question, tools=["pay"])
        good = approval(seen)
        for wrong in (
            good | {"tool_call_id": "c2"},
            good | {"run_id": unique()},
            {
                "type": "tool_result",
                "run_id": good["run_id"],
                "tool_call_id": "c1",
                "content": "paid 1000",
            },
        ):
            await other.send(wrong | {"id": "wrong"})
            refused = await other.receive()
            assert (refused["code"], refused["reply_to"]) == ("not_found", "wrong")
        await other.send(good)
        events = seen + await socket.until("end")
        await other.send(good)
        assert (await other.receive())["code"] == "not_found"
    one_end(events)
    assert results(events) == [("pay", "paid 7", False)]


async def test_a_stop_ends_the_waiting_for_approval(
    server: Server, shared_endpoint: Endpoint, folder: Path
) -> None:
    thread, mark = unique(), unique("paid")
    question = plan(shared_endpoint, calls(("c1", "pay", {"amount": 7, "mark": mark})))
    async with connect(server) as socket:
        seen = await until_needed(socket, question, thread_id=thread, tools=["pay"])
        await socket.send({"type": "stop"})
        events = seen + await socket.until("end")
        one_end(events, "stopped")
        await socket.send(approval(seen))
        assert (await socket.receive())["code"] == "not_found"
    assert not (folder / f"{mark}.txt").exists()
    await next_turn(server, thread)


@pytest.mark.parametrize("database", ["sqlite", "postgres"])
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
async def test_an_approval_survives_a_restart(
    serve: Serve,
    endpoint: Endpoint,
    tmp_path: Path,
    postgres: Any,
    how: signal.Signals,
    database: str,
) -> None:
    options: dict[str, Any] = {"environ": {"PYTHONPATH": TESTS}}
    if database == "postgres":
        options["database_url"] = postgres()
    server = await serve(*TOOLS, **options)
    question = plan(
        endpoint,
        calls(
            ("c1", "pay", {"amount": 7}),
            ("c2", "count", {"mark": "once"}),
            ("c3", "pay", {"amount": 8}),
        ),
        final="Paid.",
    )
    async with connect(server) as socket:
        await socket.send({"content": question, "thread_id": "t", "tools": ["pay", "count"]})
        seen = await socket.until("tool_call", tool_call_id="c3")
        await appears(tmp_path / "once.txt")
        await durable(server)
    await server.stop(how)
    server = await serve(*TOOLS, **options)
    async with connect(server) as socket, client(server) as http:
        run_id = seen[0]["run_id"]
        assert (await http.get("/chat/threads/t")).json()["active_run_id"] == run_id
        await socket.send({"type": "resume", "run_id": run_id, "last_seq": seen[-1]["seq"]})
        await socket.send({**approval(seen), "tool_call_id": "c1"})
        await socket.send({**approval(seen, False), "tool_call_id": "c3"})
        events = seen + await socket.until("end")
    one_end(events)
    outcome = {e["tool_call_id"]: (e["content"], e["is_error"]) for e in of(events, "tool_result")}
    assert outcome["c1"] == ("paid 7", False)
    assert outcome["c3"][1] is True
    assert (tmp_path / "paid.txt").read_text() == "7\n"
    assert (tmp_path / "once.txt").read_text() == "ran\n", "a call is never made twice"
    if how == signal.SIGTERM:
        assert outcome["c2"] == ("counted", False)
    assert answer(events) == "Paid."
    usage = events[-1]["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (22, 14)
    messages = await stored(server, "t")
    assert [m["role"] for m in messages] == [*("user", "assistant"), *["tool"] * 3, "assistant"]
    assert messages[-1]["id"] == seen[0]["message_id"]
    await next_turn(server, "t")


async def test_an_approval_that_is_asked_for_during_the_drain_survives(
    serve: Serve, endpoint: Endpoint, tmp_path: Path
) -> None:
    async def gated(exchange: Exchange) -> None:
        await exchange.send(text("Wait. "))
        await endpoint.gate("call").wait()
        await exchange.send(calls(("c1", "pay", {"amount": 7})))

    settings = {"environ": {"PYTHONPATH": TESTS}, "drain_timeout": 3}
    server = await serve(*TOOLS, **settings)
    async with connect(server) as socket, client(server) as http:
        question = plan(endpoint, gated)
        await socket.send({"content": question, "thread_id": "t", "tools": ["pay"]})
        seen = await socket.until("content")
        server.process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(SECONDS):
            while await still_takes_messages(http):
                await asyncio.sleep(0.01)
        endpoint.gate("call").set()
        seen += await socket.until("tool_call")
        assert await server.stop() == 0
    server = await serve(*TOOLS, **settings)
    async with connect(server) as socket:
        last = seen[-1]["seq"]
        await socket.send({"type": "resume", "run_id": seen[0]["run_id"], "last_seq": last})
        await socket.send(approval(seen))
        events = seen + await socket.until("end")
    one_end(events)
    assert results(events) == [("pay", "paid 7", False)]


async def still_takes_messages(http: Any) -> bool:
    """False as soon as the server drains or does not listen any more."""
    import httpx

    try:
        return bool((await http.post("/chat/sse", json={"content": "x"})).status_code == 200)
    except httpx.TransportError:
        return False


async def test_without_a_database_an_approval_ends_with_the_process(
    serve: Serve, endpoint: Endpoint
) -> None:
    server = await serve(*TOOLS, "--no-database", environ={"PYTHONPATH": TESTS}, drain_timeout=0)
    question = plan(endpoint, calls(("c1", "pay", {"amount": 7})))
    async with connect(server) as socket:
        seen = await until_needed(socket, question, tools=["pay"])
        stopping = asyncio.ensure_future(server.stop())
        one_end(seen + await socket.until("end"), "interrupted")
        assert await stopping == 0


# Client tools

LOOKUP = {
    "name": "lookup",
    "description": "Look something up at the client.",
    "parameters": {"type": "object", "properties": {"word": {"type": "string"}}},
}


def result_of(events: Sequence[Event], content: str, **fields: Any) -> dict[str, Any]:
    """The client's result for the newest call."""
    call_ = of(events, "tool_call")[-1]
    ids = {"run_id": call_["run_id"], "tool_call_id": call_["tool_call_id"]}
    return {"type": "tool_result", **ids, "content": content, **fields}


@pytest.mark.parametrize("is_error", [False, True])
@pytest.mark.parametrize("elsewhere", [False, True])
async def test_a_tool_that_runs_at_the_client(
    server: Server, shared_endpoint: Endpoint, is_error: bool, elsewhere: bool
) -> None:
    thread = unique()
    question = plan(
        shared_endpoint, calls(("c1", "lookup", {"word": "moon"}), ("c2", "add", {"a": 1}))
    )
    command = {"thread_id": thread, "client_tools": [LOOKUP], "tools": ["add"]}
    async with connect(server) as socket, connect(server, binary=True) as other:
        await socket.send({"content": question, **command})
        seen = await socket.until("tool_call", tool_call_id="c2")
        called = of(seen, "tool_call")[0]
        assert (called["needs"], called["arguments"]) == ("client", {"word": "moon"})
        sender = other if elsewhere else socket
        await sender.send(approval(seen) | {"tool_call_id": "c1"})
        refused = await sender.until("error")
        assert refused.pop()["code"] == "not_found"
        seen += refused
        reply = result_of(seen, "a rock", is_error=is_error) | {"tool_call_id": "c1"}
        await sender.send(reply)
        events = seen + await socket.until("end")
        await sender.send(reply)
        assert (await sender.receive())["code"] == "not_found"
    one_end(events)
    assert results(events) == [("lookup", "a rock", is_error), ("add", "1", False)]
    offered = {t["function"]["name"]: t["function"] for t in shared_endpoint.requests[-1]["tools"]}
    assert offered["lookup"] == LOOKUP
    sent = [m for m in shared_endpoint.requests[-1]["messages"] if m["role"] == "tool"]
    assert sent[0]["content"] == "a rock"
    await next_turn(server, thread)


async def test_a_clients_long_result_is_cut_too(server: Server, shared_endpoint: Endpoint) -> None:
    question = plan(shared_endpoint, calls(("c1", "lookup", {})))
    async with connect(server) as socket:
        seen = await until_needed(socket, question, "client", client_tools=[LOOKUP])
        await socket.send(result_of(seen, "y" * 200_000))
        events = seen + await socket.until("end")
    one_end(events)
    assert len(results(events)[0][1]) < 34_000
    assert "cut" in results(events)[0][1][-60:]


@pytest.mark.parametrize(
    "client_tools",
    [
        [LOOKUP | {"name": "add"}],
        [LOOKUP, LOOKUP],
        [LOOKUP | {"name": "two words"}],
        [LOOKUP | {"name": f"t{n}"} for n in range(33)],
        [LOOKUP | {"description": "d" * 3000, "name": f"t{n}"} for n in range(12)],
    ],
    ids=["a server's name", "twice", "bad name", "too many", "too large"],
)
async def test_client_tools_are_bounded(server: Server, client_tools: list[Any]) -> None:
    async with connect(server) as socket:
        command = {"content": "hi", "id": "m", "tools": ["add"], "client_tools": client_tools}
        await socket.send(command)
        refused = await socket.receive()
    assert (refused["code"], refused["reply_to"]) == ("invalid_message", "m")
    assert "client_tools" in refused["message"]


# Anything, at any time

CALL = st.sampled_from(
    [
        ("add", {"a": 1}),
        ("failing", {}),
        ("no_such_tool", {}),
        ("add", "not JSON"),
        ("slow", {"mark": "never"}),
        ("slow", {"mark": "open"}),
        ("blocking", {"mark": "open"}),
        ("progress", {}),
        ("pay", {"amount": 1}),
        ("lookup", {"word": "moon"}),
    ]
)
ROUNDS = st.lists(
    st.tuples(st.booleans(), st.lists(CALL, min_size=1, max_size=3)), min_size=1, max_size=3
)
ACTION = st.sampled_from(["stop", "disconnect", "message", "delete after", "nothing"])


@pytest.mark.filterwarnings("ignore:Generating overly large repr")
@given(rounds=ROUNDS, action=ACTION, after=st.integers(1, 14), approves=st.booleans())
@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_whatever_happens_when_the_transcript_is_valid(
    server: Server,
    shared_endpoint: Endpoint,
    folder: Path,
    runner: Any,
    rounds: list[Any],
    action: str,
    after: int,
    approves: bool,
) -> None:
    (folder / "open.go").touch()
    before = len(shared_endpoint.requests)
    turn = a_turn(server, shared_endpoint, rounds, action, after, approves)
    runner.run_until_complete(turn)
    for body in shared_endpoint.requests[before:]:
        check_request(body)


def scripted(rounds: list[Any]) -> list[bytes]:
    """The rounds of a random script as a provider sends them."""
    found = []
    for says, wanted in rounds:
        fragments = [
            piece(
                arguments if isinstance(arguments, str) else json.dumps(arguments),
                index=index,
                id=f"call_{index}",
                name=name,
            )
            for index, (name, arguments) in enumerate(wanted)
        ]
        found.append((text("Let me see. ") if says else b"") + raw(fragments))
    return found


async def a_turn(
    server: Server,
    endpoint: Endpoint,
    rounds: list[Any],
    action: str,
    after: int,
    approves: bool,
) -> None:
    thread = unique()
    command = {
        "content": plan(endpoint, *scripted(rounds)),
        "thread_id": thread,
        "tools": ["add", "failing", "slow", "blocking", "progress", "pay"],
        "client_tools": [LOOKUP],
    }
    async with connect(server) as socket:
        await socket.send(command)
        run_id = await act(socket, action, after, approves)
        if action == "message":
            await socket.send({"content": "script:default", "thread_id": thread})
            await socket.until("end", status="completed")
    async with connect(server) as watcher:
        await watcher.send({"type": "stop", "run_id": run_id})
        await watcher.send({"type": "resume", "run_id": run_id})
        events = await watcher.until("end")
        await watcher.send({"type": "ping"})
        assert (await watcher.receive())["type"] == "pong"
    events = [event for event in events if "seq" in event]
    events = events[[event["type"] for event in events].index("start") :]
    one_end(events, events[-1]["status"])
    assert events[-1]["status"] in ("completed", "stopped")
    assert len(of(events, "generation_stopped")) == (events[-1]["status"] == "stopped")
    messages = await stored(server, thread)
    mine = [message for message in messages if message["run_id"] == run_id]
    assert [event["message"] for event in of(events, "message")] == mine[1:]
    assert mine[-1]["id"] == events[0]["message_id"]
    said = "".join(m["content"] for m in mine[1:] if m["role"] == "assistant")
    assert said == answer(events)
    await next_turn(server, thread)


async def act(socket: Socket, action: str, after: int, approves: bool) -> str:
    """Answer what asks for it, until the time for the action has come or nothing goes on."""
    run_id = ""
    for number in itertools.count(1):
        event = await socket.receive()
        run_id = event["run_id"]
        if event["type"] == "end":
            break
        if number >= after:
            if action == "stop":
                await socket.send({"type": "stop", "run_id": run_id})
            break
        if event.get("needs") == "approval":
            await socket.send(approval([event], approves))
        elif event.get("needs") == "client":
            await socket.send(result_of([event], "a rock"))
        elif event.get("arguments") == {"mark": "never"}:
            after = number + 1
            if action == "nothing":
                break
            if action == "stop":
                await socket.send({"type": "stop", "run_id": run_id})
                break
    return str(run_id)


async def test_killed_anywhere_the_transcript_is_valid(
    serve: Serve, endpoint: Endpoint, tmp_path: Path
) -> None:
    (tmp_path / "open.go").touch()
    wanted = [("add", {"a": 1}), ("slow", {"mark": "never"}), ("blocking", {"mark": "open"})]
    wanted += [("pay", {"amount": 1}), ("add", "not JSON"), ("no_such_tool", {})]
    ends = []
    server = await serve(*TOOLS, environ={"PYTHONPATH": TESTS})
    for seed in range(5):
        choose = random.Random(seed)
        rounds = [(True, choose.sample(wanted, choose.randint(1, 4))) for _ in range(2)]
        thread = f"thread {seed}"
        command = {
            "content": plan(endpoint, *scripted(rounds)),
            "thread_id": thread,
            "tools": ["add", "slow", "blocking", "pay"],
        }
        async with connect(server) as socket:
            await socket.send(command)
            run_id = await act(socket, "nothing", choose.randint(1, 10), True)
            if seed % 2:
                await durable(server)
        await server.kill()
        server = await serve(*TOOLS, environ={"PYTHONPATH": TESTS})
        async with connect(server) as socket:
            await socket.send({"type": "stop", "thread_id": thread})
            await socket.send({"type": "resume", "run_id": run_id})
            events = await socket.until("end", run_id=run_id)
        kinds = [event["type"] for event in events]
        assert "start" in kinds, f"start is the first of every run: {events}"
        events = events[kinds.index("start") :]
        one_end(events, events[-1]["status"])
        ends.append(events[-1]["status"])
        await stored(server, thread)
        await next_turn(server, thread)
    assert "interrupted" in ends


HISTORY = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "assistant", "tool", "system"])},
        optional={
            "content": st.sampled_from(["hi", "", None]),
            "tool_calls": st.lists(
                st.fixed_dictionaries({"id": st.sampled_from(["a", "b"]), "name": st.just("f")}),
                max_size=3,
            ),
            "tool_call_id": st.sampled_from(["a", "b", "c"]),
        },
    ),
    max_size=8,
)


@pytest.mark.filterwarnings("ignore:Generating overly large repr")
@given(history=HISTORY)
@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_a_clients_history_is_made_valid(
    forgetful: Server, shared_endpoint: Endpoint, runner: Any, history: list[dict[str, Any]]
) -> None:
    async def ask() -> int:
        async with client(forgetful) as http:
            command = {"content": "script:default", "history": history}
            return (await http.post("/chat/sse", json=command)).status_code

    before = len(shared_endpoint.requests)
    assert runner.run_until_complete(ask()) in (200, 422)
    for body in shared_endpoint.requests[before:]:
        check_request(body)


@pytest.fixture(scope="module")
async def forgetful(
    tmp_path_factory: pytest.TempPathFactory, shared_endpoint: Endpoint
) -> AsyncIterator[Server]:
    cwd = tmp_path_factory.mktemp("forgetful")
    started = await start(
        "--no-database", providers=providers(shared_endpoint), protocol="sse", cwd=cwd
    )
    yield started
    assert await started.stop() == 0
