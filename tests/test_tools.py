"""Tools: the model acts within bounds, people watch, agree and stop; what goes up is always valid."""

from __future__ import annotations

import asyncio
import itertools
import json
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
    unexpected = [line for line in started.stderr if " ERROR " in line]
    assert not unexpected, started.log()


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
    """Every tool result: name, content, whether it is an error."""
    return [(e["name"], e["content"], e["is_error"]) for e in of(events, "tool_result")]


def one_end(events: Sequence[Event], status: str = "completed") -> None:
    assert [event["status"] for event in of(events, "end")] == [status], events
    assert events[-1]["type"] == "end"
    numbers = [event["seq"] for event in events]
    assert numbers == sorted(set(numbers))
    assert [e["tool_call_id"] for e in of(events, "tool_call")] == [
        e["tool_call_id"] for e in of(events, "tool_result")
    ]


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
    assert [e["tool_call_id"] for e in of(events, "tool_result")] == ["c1", "c2", "c3"]
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
    "index from one": [[piece(HALVES[0], index=1, id="c1", name="add")], [piece(HALVES[1], index=1)]],
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
    events = await post(
        server, {"content": question, "thread_id": thread, "tools": ["add"]}
    )
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
        assert len(endpoint.requests) == 4
        assert ["tools" in body for body in endpoint.requests] == [True, True, True, False]
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
        assert [m["role"] for m in messages] == [*("user", "assistant", "tool", "tool"), "assistant"]
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
