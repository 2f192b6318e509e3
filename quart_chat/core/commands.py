"""Commands of clients as frozen values, and ``parse``, which builds them from decoded input."""

from __future__ import annotations

import functools
import hashlib
import json
import math
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    StringConstraints,
    Tag,
    ValidationError,
    field_validator,
    model_validator,
)

from ..errors import InvalidMessage, UnsupportedField
from .messages import MessageContent, ToolCall, without_empty

M = TypeVar("M", bound=BaseModel)

MAX_DEPTH = 32
MAX_VALUES = 10_000
MAX_PARTS = 64
MAX_METADATA_BYTES = 16 * 1024
MAX_CLIENT_TOOLS = 32
MAX_CLIENT_TOOLS_BYTES = 32 * 1024

IGNORED_FIELDS = frozenset(
    {
        "workflow_id",
        "graph",
        "agent_mode",
        "help_mode",
        "workflow_assistant",
        "collections",
        "input_files",
        "output_files",
        "created_at",
        "error_type",
    }
)
"""Fields of the original protocol without a meaning here: refused when they ask for something."""

ID_PATTERN = r"^[^\x00-\x1f\x7f-\x9f]{1,128}$"
Id = Annotated[str, StringConstraints(min_length=1, max_length=128, pattern=ID_PATTERN)]
Name = Annotated[str, StringConstraints(min_length=1, max_length=256)]
NonEmpty = Annotated[str, StringConstraints(min_length=1)]


class _Value(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


def size_of(value: Any) -> int:
    """Return the bytes of a value as compact JSON."""
    return len(json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode())


def checked_metadata(value: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return metadata that is within its bound.

    Raises:
        ValueError: It is larger than 16 KiB as JSON.
    """
    if value is not None and size_of(value) > MAX_METADATA_BYTES:
        raise ValueError("is larger than 16 KiB")
    return value


class TextPart(_Value):
    """Words."""

    type: Literal["text"]
    text: NonEmpty


class ImageURL(_Value):
    url: Annotated[str, StringConstraints(pattern=r"^(https?://|data:image/)")]
    detail: Literal["auto", "low", "high"] | None = None


class ImagePart(_Value):
    """A picture, by URL or as a data URL; the provider fetches it, this server never does."""

    type: Literal["image_url"]
    image_url: ImageURL


class InputAudio(_Value):
    data: NonEmpty
    format: Name


class AudioPart(_Value):
    """Sound, in base64."""

    type: Literal["input_audio"]
    input_audio: InputAudio


class FileContent(_Value):
    file_data: NonEmpty | None = None
    file_id: Name | None = None
    filename: Name | None = None

    @model_validator(mode="after")
    def _has_a_source(self) -> FileContent:
        if self.file_data is None and self.file_id is None:
            raise ValueError("needs file_data or file_id")
        return self


class FilePart(_Value):
    """A file, in base64 or by the provider's id."""

    type: Literal["file"]
    file: FileContent


Part = Annotated[TextPart | ImagePart | AudioPart | FilePart, Field(discriminator="type")]
Text = Annotated[NonEmpty, Tag("text")]
Parts = Annotated[
    list[Part], Field(min_length=1, max_length=MAX_PARTS, fail_fast=True), Tag("parts")
]


def _text_or_parts(value: Any) -> str:
    return "parts" if isinstance(value, list) else "text"


ContentField = Annotated[Text | Parts, Discriminator(_text_or_parts)]


def plain_content(content: str | list[Any]) -> MessageContent:
    """Return validated content as the plain values that are stored and sent on."""
    if isinstance(content, str):
        return content
    return [part.model_dump(exclude_none=True) for part in content]


class ClientTool(_Value):
    """A tool that runs at the client."""

    name: Annotated[str, StringConstraints(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
    description: Annotated[str, StringConstraints(max_length=4096)] = ""
    parameters: dict[str, Any] = Field(
        default_factory=lambda: {"type": "object", "properties": {}},
        description="A JSON schema of an object",
    )


class PastToolCall(_Value):
    id: Name
    name: Name
    arguments: dict[str, Any] = Field(default_factory=dict)


class PastMessage(_Value):
    """An earlier turn, as a client without stored threads sends it along."""

    role: Literal["system", "user", "assistant", "tool"]
    content: ContentField | Literal[""] | None = ""
    tool_calls: Annotated[list[PastToolCall], Field(fail_fast=True)] | None = None
    tool_call_id: Name | None = None
    name: Name | None = None
    thread_id: Id | None = None

    @model_validator(mode="after")
    def _is_whole(self) -> PastMessage:
        if not self.content and not (self.role == "assistant" and self.tool_calls):
            raise ValueError("content is required; only an assistant with tool_calls has none")
        if self.tool_calls and self.role != "assistant":
            raise ValueError("tool_calls belong to role assistant")
        if (self.tool_call_id is not None) != (self.role == "tool"):
            raise ValueError("tool_call_id belongs to role tool, which needs it")
        ids = [call.id for call in self.tool_calls or ()]
        if len(set(ids)) != len(ids):
            raise ValueError("two tool_calls have one id")
        return self

    @property
    def calls(self) -> tuple[ToolCall, ...]:
        return tuple(ToolCall(c.id, c.name, c.arguments) for c in self.tool_calls or ())


class Command(_Value):
    """What every command may carry: an ``id``, which a refusal names as ``reply_to``."""

    id: Id | None = None


OPTION_FIELDS = (
    "temperature",
    "top_p",
    "max_tokens",
    "stop",
    "seed",
    "response_format",
    "reasoning_effort",
    "tool_choice",
)


class SendMessage(Command):
    """Send a message and have it answered."""

    type: Literal["message"] = "message"
    thread_id: Id | None = None
    role: Literal["user"] = "user"
    content: ContentField
    model: Name | None = None
    provider: Name | None = None
    tools: Annotated[list[Name], Field(max_length=128, fail_fast=True)] | None = None
    client_tools: (
        Annotated[list[ClientTool], Field(max_length=MAX_CLIENT_TOOLS, fail_fast=True)] | None
    ) = None
    parent_id: Id | None = None
    history: Annotated[list[PastMessage], Field(max_length=2000, fail_fast=True)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    stop: (
        NonEmpty
        | Annotated[list[NonEmpty], Field(min_length=1, max_length=4, fail_fast=True)]
        | None
    ) = None
    seed: int | None = None
    response_format: dict[str, Any] | None = None
    reasoning_effort: Annotated[str, StringConstraints(pattern=r"^[a-z]{1,16}$")] | None = None
    tool_choice: Name | dict[str, Any] | None = None
    metadata: dict[str, Any] | None = None

    _metadata = field_validator("metadata")(checked_metadata)

    @field_validator("client_tools")
    @classmethod
    def _bounded(cls, value: list[ClientTool] | None) -> list[ClientTool] | None:
        if value and size_of([tool.model_dump() for tool in value]) > MAX_CLIENT_TOOLS_BYTES:
            raise ValueError("are larger than 32 KiB")
        names = [tool.name for tool in value or ()]
        if len(set(names)) != len(names):
            raise ValueError("has two tools of one name")
        return value

    @property
    def plain(self) -> MessageContent:
        """Return the content as plain values."""
        return plain_content(self.content)

    def options(self) -> dict[str, Any]:
        """Return what is asked for besides the content, without what was left out."""
        values = {name: getattr(self, name) for name in OPTION_FIELDS}
        values["tools"] = self.tools
        values["client_tools"] = [tool.model_dump() for tool in self.client_tools or ()]
        return without_empty(values)

    @functools.cached_property
    def fingerprint(self) -> str:
        """Return a hash of content, model, provider, parent and tools, equal for a retry."""
        options = self.options()
        asked = [
            self.plain,
            self.model,
            self.provider,
            self.parent_id,
            options.get("tools"),
            options.get("client_tools"),
        ]
        return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()


class Stop(Command):
    """Stop a run; without an id, every run that this socket started or follows."""

    type: Literal["stop"]
    thread_id: Id | None = None
    run_id: Id | None = None


class Resume(Command):
    """Follow a run from the event after ``last_seq``."""

    type: Literal["resume"]
    thread_id: Id | None = None
    run_id: Id | None = None
    last_seq: Annotated[int, Field(ge=0, le=2**53)] = 0

    @model_validator(mode="after")
    def _names_a_run(self) -> Resume:
        if self.thread_id is None and self.run_id is None:
            raise ValueError("resume needs thread_id or run_id")
        return self


class Regenerate(Command):
    """Answer again; the old answer stays as a sibling branch."""

    type: Literal["regenerate"]
    thread_id: Id
    message_id: Id | None = None


class ToolResult(Command):
    """The result of a tool that ran at the client."""

    type: Literal["tool_result"]
    run_id: Id
    tool_call_id: Name
    content: str
    is_error: bool = False


class Approve(Command):
    """The answer to an approval request."""

    type: Literal["approve"]
    run_id: Id
    tool_call_id: Name
    approved: bool
    reason: Annotated[str, StringConstraints(max_length=2000)] | None = None


class Auth(Command):
    """A fresh token for this socket."""

    type: Literal["auth"]
    token: NonEmpty


class Ping(Command):
    """Answered by ``pong``."""

    type: Literal["ping"]


AnyCommand = SendMessage | Stop | Resume | Regenerate | ToolResult | Approve | Auth | Ping

COMMANDS: dict[str, type[AnyCommand]] = {
    "message": SendMessage,
    "stop": Stop,
    "resume": Resume,
    "regenerate": Regenerate,
    "tool_result": ToolResult,
    "approve": Approve,
    "auth": Auth,
    "ping": Ping,
}


def parse(data: Any) -> AnyCommand:
    """Build a command from decoded JSON or MessagePack.

    Raises:
        InvalidMessage: The protocol does not allow it; the sentence names the field.
        UnsupportedField: A field of the original protocol asks for something.
    """
    if not isinstance(data, dict):
        raise InvalidMessage("A command is one JSON object or MessagePack map.")
    check_values(data)
    kind = data.get("type") or "message"
    model = COMMANDS.get(kind) if isinstance(kind, str) else None
    if model is None:
        raise InvalidMessage(
            f"type: this command does not exist. Allowed are {', '.join(COMMANDS)}."
        )
    return validated(model, {"type": kind} | _present(data))


def validated(model: type[M], data: Mapping[str, Any]) -> M:
    """Build a model from plain values.

    Raises:
        InvalidMessage: Names the first unknown field, or else the first that does not fit.
    """
    for key in data:
        if key not in model.model_fields:
            raise InvalidMessage(_unknown_field(key, model))
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise InvalidMessage(_sentence(error)) from None


def _unknown_field(key: str, model: type[BaseModel]) -> str:
    return f"{key[:128]}: unknown field. Allowed are {', '.join(model.model_fields)}."


def _present(data: dict[str, Any]) -> dict[str, Any]:
    present = {key: value for key, value in data.items() if value is not None}
    for key in IGNORED_FIELDS & present.keys():
        if present.pop(key) not in (False, "", [], {}):
            raise UnsupportedField(f"{key}: this server does not support it. Leave the field out.")
    if isinstance(history := present.get("history"), list):
        present["history"] = [_present(m) if isinstance(m, dict) else m for m in history]
    return present


def _sentence(error: ValidationError) -> str:
    errors = error.errors(include_url=False, include_input=False)
    unknown = (each for each in errors if each["type"] == "extra_forbidden")
    first = next(unknown, errors[0])
    path = [str(step)[:128] for step in first["loc"] if step not in ("text", "parts")]
    where = ".".join(path) or "message"
    if first["type"] == "extra_forbidden":
        return f"{where}: unknown field. Leave it out."
    if first["type"] == "missing":
        return f"{where}: this field is required."
    reason = first["msg"].removeprefix("Value error, ")
    return f"{where}: {reason[:1].lower()}{reason[1:]}."


def is_id(text: str) -> bool:
    """Return whether a text can be an id."""
    return re.fullmatch(ID_PATTERN, text) is not None


def check_values(value: Any) -> None:
    """Refuse what no part of the server could keep: see the protocol, section 2.

    Raises:
        InvalidMessage: NaN or an infinity, a NUL character, half of a surrogate pair, a key that
            is not a string, an integer beyond 64 bits, bytes, nesting deeper than 32, or more than
            10,000 values.
    """
    _check(value, 0, MAX_VALUES)


def _check(value: Any, depth: int, left: int) -> int:
    """Check a value and what it holds, and return how many more there may be."""
    if isinstance(value, str):
        _check_text(value)
    elif isinstance(value, dict | list):
        return _check_inside(value, depth, left)
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise InvalidMessage("Numbers are finite: NaN and infinities are not allowed.")
    elif isinstance(value, int):
        if not -(2**63) <= value < 2**64:
            raise InvalidMessage("Integers have at most 64 bits.")
    elif value is not None:
        raise InvalidMessage(f"A value of type {type(value).__name__} is not allowed.")
    return left


def _check_inside(value: dict[Any, Any] | list[Any], depth: int, left: int) -> int:
    if depth >= MAX_DEPTH:
        raise InvalidMessage(f"The message is nested more than {MAX_DEPTH} levels deep.")
    left -= len(value)
    if left < 0:
        raise InvalidMessage(f"The message holds more than {MAX_VALUES:,} values.")
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str):
                raise InvalidMessage("The keys of a map are strings.")
            _check_text(key)
    for inner in value.values() if isinstance(value, dict) else value:
        left = _check(inner, depth + 1, left)
    return left


def _check_text(text: str) -> None:
    if "\0" in text:
        raise InvalidMessage("NUL characters are not allowed.")
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            raise InvalidMessage(
                "A text holds half of a surrogate pair. Send valid Unicode."
            ) from None
