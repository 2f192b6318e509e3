"""Bodies of the JSON API as types: validated here, shown in OpenAPI."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, field_validator
from quart_schema import document_response

from ..core.commands import Id, Name, checked_metadata

F = TypeVar("F", bound=Callable[..., Any])
M = TypeVar("M", bound=BaseModel)


class _Document(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ErrorDetail(_Document):
    code: str
    message: str
    retryable: bool
    reference: str | None = None


class ErrorBody(_Document):
    """Body of a refused request."""

    error: ErrorDetail


class NewThread(_Document):
    """A thread to create; without an id the server makes one."""

    id: Id | None = None
    title: Annotated[str, StringConstraints(max_length=500)] | None = None
    metadata: dict[str, Any] | None = None

    _metadata = field_validator("metadata")(checked_metadata)


class ThreadChanges(_Document):
    """Changes to a thread; a title of null restores the automatic one."""

    title: Annotated[str, StringConstraints(max_length=500)] | None = None
    metadata: dict[str, Any] | None = None

    _metadata = field_validator("metadata")(checked_metadata)


class Feedback(_Document):
    model_config = ConfigDict(extra="forbid", strict=True)

    score: Annotated[int, Field(ge=-1, le=1)]
    comment: Annotated[str, StringConstraints(max_length=4000)] | None = None


class ApprovalBody(_Document):
    """The answer to a call that needs approval."""

    model_config = ConfigDict(extra="forbid", strict=True)

    run_id: Id
    tool_call_id: Name
    approved: bool
    reason: Annotated[str, StringConstraints(max_length=2000)] | None = None


class ToolResultBody(_Document):
    """The result of a tool that ran at the client."""

    model_config = ConfigDict(extra="forbid", strict=True)

    run_id: Id
    tool_call_id: Name
    content: str
    is_error: bool = False


class ThreadSchema(_Document):
    id: str
    title: str | None
    created_at: str
    updated_at: str
    message_count: int
    active_run_id: str | None
    metadata: dict[str, Any]


class ThreadPage(_Document):
    threads: list[ThreadSchema]
    next: str | None


class CallDocument(_Document):
    id: str
    name: str
    arguments: dict[str, Any]


class UsageDocument(_Document):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    estimated: bool


class MessageSchema(_Document):
    id: str
    thread_id: str
    parent_id: str | None
    run_id: str | None
    role: Literal["system", "user", "assistant", "tool"]
    content: str | list[dict[str, Any]]
    reasoning: str | None = None
    tool_calls: list[CallDocument] | None = None
    tool_call_id: str | None = None
    name: str | None = None
    model: str | None
    provider: str | None
    status: Literal["completed", "stopped", "failed", "interrupted"]
    usage: UsageDocument | None = None
    feedback: dict[str, Any] | None = None
    metadata: dict[str, Any]
    created_at: str


class MessagePage(_Document):
    messages: list[MessageSchema]
    next: str | None


class StopDocument(_Document):
    stopped: bool
    run_id: str | None = None


class HealthDocument(_Document):
    status: Literal["healthy"]
    protocol: Literal["websocket", "sse", "both"]


class ReadyDocument(_Document):
    status: Literal["ready"]


class ModelDocument(_Document):
    id: str
    provider: str
    default: bool


class ModelList(_Document):
    models: list[ModelDocument]


class PageQuery(BaseModel):
    limit: Annotated[int, Field(ge=1, le=200)] = 50
    cursor: str | None = None


class ThreadQuery(PageQuery):
    q: Annotated[str, StringConstraints(max_length=500)] | None = None


class MessageQuery(PageQuery):
    order: Literal["asc", "desc"] = "asc"
    branch: Literal["current", "all"] = "current"


class FollowQuery(BaseModel):
    thread_id: str | None = None
    run_id: str | None = None
    last_event_id: str | None = None
    token: str | None = None


def documents_errors(*statuses: int) -> Callable[[F], F]:
    """Document the statuses with which a route may refuse."""

    def decorate(function: F) -> F:
        for status in (401, 403, 422, 429, 500, 503, *statuses):
            function = document_response(ErrorBody, status)(function)
        return function

    return decorate


class EventStream(BaseModel):
    """The events of a run as server-sent events: the data of each is one object with a type."""

    type: str
    thread_id: str
    run_id: str
    seq: int


def documents_stream(function: F) -> F:
    """Document an answer that is a stream of events."""
    return documents_errors(400, 404, 409, 413)(document_response(EventStream, 200)(function))
