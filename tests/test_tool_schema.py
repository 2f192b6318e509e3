"""``@tool``: a function becomes a schema, and what a model writes becomes its arguments."""

from __future__ import annotations

import asyncio
import functools
from typing import Annotated, Any, Literal

import jsonschema
import pytest
import tools_for_tests
from pydantic import Field

from quart_chat import Tool, ToolContext, ToolError, tool
from quart_chat.core.tools import ToolRegistry
from quart_chat.errors import UnknownTool

CONTEXT = ToolContext("ada", "thread", "run", "call", lambda text: None)


async def call(tool: Tool, **arguments: Any) -> Any:
    return await tool.invoke(CONTEXT, arguments)


async def complaint(tool: Tool, **arguments: Any) -> str:
    with pytest.raises(ToolError) as raised:
        await call(tool, **arguments)
    return str(raised.value)


def test_names_defaults_and_required_parameters() -> None:
    assert tools_for_tests.add.schema() == {
        "type": "function",
        "function": {
            "name": "add",
            "description": "Add two numbers.",
            "parameters": {
                "type": "object",
                "properties": {
                    "a": {"type": "integer"},
                    "b": {"type": "integer", "default": 0},
                },
                "required": ["a"],
                "additionalProperties": False,
            },
        },
    }


def test_no_parameters_are_an_empty_object() -> None:
    @tool
    def nothing() -> None:
        """Do nothing."""

    assert nothing.parameters["type"] == "object"
    assert nothing.parameters["properties"] == {}


def test_a_tool_is_still_a_function() -> None:
    assert tools_for_tests.add(2, b=3) == 5
    assert tools_for_tests.add.name == "add"


def test_google_docstrings_describe_the_parameters() -> None:
    deliver = tools_for_tests.deliver
    assert deliver.description == "Deliver things.\n\nThey come by bicycle."
    properties = deliver.parameters["properties"]
    assert properties["address"]["description"] == "Where they go."
    assert properties["speed"]["description"] == "How fast they\nhave to be there."
    assert properties["notes"]["description"] == "What the bell sounds like."
    assert properties["items"]["default"] == ["letter"]
    assert properties["speed"]["default"] == "slow"
    assert deliver.parameters["required"] == ["address"]


def test_rest_docstrings_describe_the_parameters() -> None:
    @tool
    def weigh(thing: str, unit: Literal["kg", "lb"] = "kg") -> float:
        """Weigh a thing.

        :param thing: What is weighed.
        :param unit: In which unit.
        :returns: The weight.
        """
        return 1.0

    assert weigh.description == "Weigh a thing."
    assert weigh.parameters["properties"] == {
        "thing": {"type": "string", "description": "What is weighed."},
        "unit": {
            "type": "string",
            "enum": ["kg", "lb"],
            "default": "kg",
            "description": "In which unit.",
        },
    }


def test_nested_models_enums_and_optionals() -> None:
    schema = tools_for_tests.deliver.parameters
    jsonschema.Draft202012Validator.check_schema(schema)
    good = {"address": {"street": "Main", "city": "Bonn"}, "speed": "fast", "notes": None}
    jsonschema.validate(good, schema)
    for wrong in ({"speed": "warp"}, {"notes": 1}, {"address": {"street": "x"}}, {"other": 1}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(good | wrong, schema)
    assert schema["$defs"]["Address"]["properties"]["city"]["description"] == "The town's name"


def test_a_description_in_the_annotation_is_kept() -> None:
    @tool
    def dig(depth: Annotated[int, Field(ge=1, description="In metres")]) -> None:
        """Dig."""

    assert dig.parameters["properties"]["depth"] == {
        "type": "integer",
        "minimum": 1,
        "description": "In metres",
    }


def test_the_context_is_no_parameter() -> None:
    assert list(tools_for_tests.progress.parameters["properties"]) == ["steps"]

    @tool
    def perhaps(a: int, context: ToolContext | None = None) -> None:
        """Do it, with or without a context."""

    assert list(perhaps.parameters["properties"]) == ["a"]


async def test_the_context_says_who_asks_where() -> None:
    @tool
    def where(context: ToolContext) -> list[str]:
        """Say it."""
        return [context.user, context.thread_id, context.run_id, context.tool_call_id]

    assert await call(where) == ["ada", "thread", "run", "call"]


@pytest.mark.parametrize("name", ["schema", "json", "copy", "model_config", "model_name", "self"])
async def test_any_name_may_be_a_parameters_name(name: str) -> None:
    names: dict[str, Any] = {}
    exec(f"def named({name}: int) -> int:\n    return {name}", names)
    made = tool(names["named"])
    assert list(made.parameters["properties"]) == [name]
    assert await call(made, **{name: 4}) == 4


def test_open_ended_parameters_are_refused() -> None:
    def many(*numbers: int) -> None: ...

    def named(**numbers: int) -> None: ...

    for function in (many, named):
        with pytest.raises(TypeError, match=r"\*args, \*\*kwargs"):
            tool(function)


def test_a_parameter_without_annotation_is_refused() -> None:
    def vague(thing) -> None: ...  # type: ignore[no-untyped-def]

    with pytest.raises(TypeError, match="annotate the parameter thing"):
        tool(vague)


def test_what_providers_refuse_as_a_name_is_refused_at_once() -> None:
    for name in ("two words", "größe", "x" * 65, "dot.ted"):
        with pytest.raises(ValueError, match="name"):
            tool(name=name)(tools_for_tests.add.function or print)


async def test_positional_parameters_work_or_are_refused_at_once() -> None:
    def positional(a: int, /) -> int:
        return a

    try:
        made = tool(positional)
    except TypeError:
        return
    assert await call(made, a=1) == 1


async def test_arguments_are_validated_and_converted() -> None:
    text = await call(
        tools_for_tests.deliver, address={"street": "Main", "city": "Bonn"}, speed="fast"
    )
    assert text == "letter to Main, Bonn, fast, None"
    assert await call(tools_for_tests.add, a=1) == 1


async def test_complaints_name_each_parameter_and_what_is_allowed() -> None:
    said = await complaint(
        tools_for_tests.deliver, address={"street": "Main"}, speed="warp", colour="red"
    )
    assert said.startswith("The arguments are not valid. ")
    assert "address.city: Field required" in said
    assert "speed: Input should be 'slow' or 'fast'" in said
    assert "colour: Extra inputs are not permitted" in said
    assert "https://" not in said
    assert "warp" not in said
    assert "a: Field required" in await complaint(tools_for_tests.add)


async def test_defaults_are_not_shared_between_calls() -> None:
    @tool
    def gather(into: list[int] = []) -> int:  # noqa: B006
        """Gather."""
        into.append(1)
        return len(into)

    assert [await call(gather), await call(gather)] == [1, 1]


async def test_async_functions_that_do_not_look_it_are_awaited() -> None:
    async def double(number: int) -> int:
        """Double it."""
        await asyncio.sleep(0)
        return number * 2

    @functools.wraps(double)
    def wrapped(number: int) -> Any:
        return double(number)

    assert await call(tool(wrapped), number=4) == 8


async def test_a_plain_function_runs_in_a_thread_with_the_callers_context() -> None:
    import contextvars
    import threading

    who = contextvars.ContextVar("who", default="nobody")

    @tool
    def look() -> tuple[str, bool]:
        """Look around."""
        return who.get(), threading.current_thread() is threading.main_thread()

    who.set("ada")
    assert await call(look) == ("ada", False)


def test_tools_are_chosen_by_name_and_user() -> None:
    @tool(users=lambda user: user == "ada")
    def secret() -> None:
        """Be there for Ada."""

    tools = ToolRegistry([tools_for_tests.add, secret])
    assert tools.names() == ["add", "secret"]
    assert tools.choose("ada", ["secret", "add", "secret"]) == [secret, tools_for_tests.add]
    assert tools.choose("grace", ["add"]) == [tools_for_tests.add]
    for user, name in (("grace", "secret"), ("ada", "nothing")):
        with pytest.raises(UnknownTool, match=name):
            tools.choose(user, ["add", name])


def test_two_tools_of_one_name_are_refused() -> None:
    with pytest.raises(ValueError, match="two tools named 'add'"):
        ToolRegistry([tools_for_tests.add, tool(name="add")(lambda: None)])


def test_approval_may_depend_on_the_arguments() -> None:
    assert tools_for_tests.pay.asks_first({"amount": 1})
    assert tools_for_tests.tip.asks_first({"amount": 101})
    assert not tools_for_tests.tip.asks_first({"amount": 100})
    assert not tools_for_tests.add.asks_first({"a": 1})
