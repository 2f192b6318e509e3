"""``@tool``: a function's name, docstring and annotations become what a model is told of it."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, get_args, get_type_hints, overload

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model
from pydantic_core import to_json

from ..errors import UnknownTool
from .tool_threads import ToolThreads

MAX_RESULT_CHARS = 32_768
"""A longer result is cut, and says so."""

NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")
"""What OpenAI takes for the name of a function."""

ApprovalRule = bool | Callable[[dict[str, Any]], bool]


class ToolError(Exception):
    """Raised by a tool: the model reads the sentence as the call's result."""


@dataclass(frozen=True, slots=True)
class ToolContext:
    """Where a call happens. A parameter annotated with this type is not part of the schema."""

    user: str
    thread_id: str
    run_id: str
    tool_call_id: str
    _report: Callable[[str], None]
    _threads: ToolThreads = field(default_factory=ToolThreads, repr=False)

    def progress(self, text: str) -> None:
        """Tell who watches how far the tool is; callable from any thread."""
        self._report(text)


@dataclass(frozen=True)
class Tool:
    """Something a model may call.

    ``parameters`` is a JSON schema of an object; ``invoke`` gets the context and the decoded
    arguments and gives what the model will read. ``users`` says who may use it (default: all).
    """

    name: str
    description: str
    parameters: dict[str, Any]
    invoke: Callable[[ToolContext, dict[str, Any]], Awaitable[Any]]
    needs_approval: ApprovalRule = False
    users: Callable[[str], bool] | None = None
    convert: Callable[[dict[str, Any]], dict[str, Any]] | None = field(default=None, compare=False)
    function: Callable[..., Any] | None = field(default=None, compare=False)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function itself, as if it had not been decorated."""
        if self.function is None:
            raise TypeError(f"The tool {self.name} is not a function of this process.")
        return self.function(*args, **kwargs)

    def schema(self) -> dict[str, Any]:
        """The tool in OpenAI's form."""
        return function_schema(self.name, self.description, self.parameters)

    def asks_first(self, arguments: dict[str, Any]) -> bool:
        """Whether a person has to approve a call with these arguments."""
        if not callable(self.needs_approval):
            return self.needs_approval
        try:
            values = self.convert(arguments) if self.convert else arguments
        except ToolError:
            return False  # the call will not be made
        return bool(self.needs_approval(values))


def function_schema(name: str, description: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """A function tool as OpenAI's chat completions take it."""
    function = {"name": name, "description": description, "parameters": dict(parameters)}
    return {"type": "function", "function": function}


@overload
def tool(function: Callable[..., Any], /) -> Tool: ...


@overload
def tool(
    *,
    name: str | None = None,
    needs_approval: ApprovalRule = False,
    users: Callable[[str], bool] | None = None,
) -> Callable[[Callable[..., Any]], Tool]: ...


def tool(
    function: Callable[..., Any] | None = None,
    /,
    *,
    name: str | None = None,
    needs_approval: ApprovalRule = False,
    users: Callable[[str], bool] | None = None,
) -> Tool | Callable[[Callable[..., Any]], Tool]:
    """Make a tool of an async or plain function; plain ones run in a thread of their own.

    Args:
        function: The function; its docstring describes the tool and its parameters.
        name: What the model calls it (default: the function's name).
        needs_approval: Whether a person has to agree first, or a predicate on the arguments.
        users: A predicate on the user id: who may use the tool.

    Raises:
        TypeError: The function takes ``*args``, ``**kwargs`` or positional-only parameters, or one
            has no annotation.
        ValueError: The name is not one that providers take.
    """

    def make(function: Callable[..., Any]) -> Tool:
        summary, described = _docstring(function)
        signature = _signature(function, described)
        called = name or function.__name__
        if not NAME.fullmatch(called):
            raise ValueError(
                f"{called!r} is no name for a tool: letters, digits, _ and -, up to 64."
            )
        return Tool(
            name=called,
            description=summary,
            parameters=_schema(signature.model),
            invoke=functools.partial(_invoke, function, signature),
            convert=functools.partial(_converted, signature),
            needs_approval=needs_approval,
            users=users,
            function=function,
        )

    return make if function is None else make(function)


def _docstring(function: Callable[..., Any]) -> tuple[str, dict[str, str]]:
    from docstring_parser import parse

    parsed = parse(function.__doc__ or "")
    text = "\n\n".join(part for part in (parsed.short_description, parsed.long_description) if part)
    return text, {p.arg_name: p.description for p in parsed.params if p.description}


@dataclass(frozen=True)
class _Signature:
    """What a function takes: a model of its parameters, and the one that gets the context."""

    model: type[BaseModel]
    fields: dict[str, str]
    context: str | None


def _signature(function: Callable[..., Any], described: Mapping[str, str]) -> _Signature:
    hints = get_type_hints(function, include_extras=True)
    named = getattr(function, "__name__", "the tool")
    fields: dict[str, Any] = {}
    names: dict[str, str] = {}
    context = None
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise TypeError(f"{named}: a tool's parameters are named: no *args, **kwargs or /.")
        hint = hints.get(parameter.name)
        if hint is None:
            raise TypeError(f"{named}: annotate the parameter {parameter.name}.")
        if _is_context(hint):
            context = parameter.name
            continue
        told = {"alias": parameter.name}
        if description := described.get(parameter.name):
            told["description"] = description
        default = ... if parameter.default is parameter.empty else parameter.default
        # A name of ours, because pydantic does not take every parameter's name for a field.
        field_name = f"field_{len(fields)}"
        fields[field_name] = (hint, Field(default, **told))  # type: ignore[call-overload]
        names[field_name] = parameter.name
    model = create_model(named, __config__=ConfigDict(extra="forbid"), **fields)
    return _Signature(model, names, context)


def _is_context(hint: Any) -> bool:
    return hint is ToolContext or any(_is_context(each) for each in get_args(hint))


def _schema(model: type[BaseModel]) -> dict[str, Any]:
    schema = model.model_json_schema()
    schema.pop("title", None)
    for described in schema.get("properties", {}).values():
        described.pop("title", None)
    schema.setdefault("properties", {})
    return schema


def _converted(signature: _Signature, arguments: dict[str, Any]) -> dict[str, Any]:
    """The values that the function gets, defaults included. Raises ToolError."""
    try:
        values = signature.model.model_validate(arguments)
    except ValidationError as error:
        raise ToolError(_complaint(error)) from None
    return {name: getattr(values, field_name) for field_name, name in signature.fields.items()}


async def _invoke(
    function: Callable[..., Any],
    signature: _Signature,
    context: ToolContext,
    arguments: dict[str, Any],
) -> Any:
    given = _converted(signature, arguments)
    if signature.context is not None:
        given[signature.context] = context
    try:
        if inspect.iscoroutinefunction(function):
            return await function(**given)
        result = await context._threads.run(functools.partial(function, **given))
        return await result if inspect.isawaitable(result) else result
    except (SystemExit, KeyboardInterrupt) as error:
        raise ToolError("The tool tried to end the server.") from error


def _complaint(error: ValidationError) -> str:
    lines = [
        f"{'.'.join(str(step) for step in e['loc']) or 'arguments'}: {e['msg']}"
        for e in error.errors(include_url=False)[:10]
    ]
    return "The arguments are not valid. " + "; ".join(lines)


def as_result(value: Any) -> str:
    """What a tool returned as text for the model: cut where it is too long, saying so."""
    text = value if isinstance(value, str) else to_json(value, serialize_unknown=True).decode()
    text = text.replace("\0", "").encode(errors="replace").decode()
    if len(text) > MAX_RESULT_CHARS:
        cut = len(text) - MAX_RESULT_CHARS
        text = f"{text[:MAX_RESULT_CHARS]}\n[cut: {cut} more characters]"
    return text


class ToolRegistry:
    """The tools of a server, by name."""

    def __init__(self, tools: Iterable[Tool] = ()) -> None:
        self._tools: dict[str, Tool] = {}
        for each in tools:
            self.add(each)

    def add(self, each: Tool) -> None:
        """Register a tool.

        Raises:
            ValueError: Another tool has the name.
        """
        known = self._tools.setdefault(each.name, each)
        if known is not each:
            raise ValueError(f"There are two tools named {each.name!r}.")

    def replace(self, names: Iterable[str], tools: Iterable[Tool]) -> None:
        """Exchange the tools of a source that came back with others."""
        for name in names:
            self._tools.pop(name, None)
        for each in tools:
            self.add(each)

    def names(self) -> list[str]:
        """Every registered name."""
        return list(self._tools)

    def choose(self, user: str, names: Iterable[str]) -> list[Tool]:
        """The named tools that this user may use.

        Raises:
            UnknownTool: One of them is not there, for this user.
        """
        chosen: dict[str, Tool] = {}
        for name in names:
            found = self._tools.get(name)
            if found is None or (found.users is not None and not found.users(user)):
                raise UnknownTool(f"tools: there is no tool named {name!r} here.")
            chosen[name] = found
        return list(chosen.values())
