"""What the core stands on: five protocols and the small values that they exchange."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal, Protocol

from .events import Event, Numbered
from .messages import Message, MessageContent, Thread, ToolCall, User


@dataclass(frozen=True, slots=True)
class Window:
    """A part of a thread's messages.

    With ``branch`` ``"current"`` the path that leads to ``leaf`` (default: the newest message),
    with ``"all"`` every message. ``after`` is the position where the page before ended.
    """

    limit: int
    order: Literal["asc", "desc"] = "asc"
    branch: Literal["current", "all"] = "current"
    leaf: str | None = None
    after: int | None = None
    max_chars: int | None = None


@dataclass(frozen=True, slots=True)
class RunRecord:
    """What is known of a run besides its events."""

    id: str
    user: str
    thread_id: str
    user_message_id: str
    message_id: str
    ended: bool = False
    last_seq: int = 0


class Storage(Protocol):
    """Threads and messages. Every method takes the user; there is no way to ask without one.

    Raises, all of them:
        StorageUnavailable: The database does not answer, or has no room.
    """

    async def create_thread(self, user: str, thread: Thread) -> Thread:
        """Insert a thread. Raises IdConflict where the user has that id."""

    async def threads(
        self, user: str, *, query: str | None, after: tuple[datetime, str] | None, limit: int
    ) -> Sequence[Thread]:
        """Threads after (activity, id), newest first; ``query`` searches titles and text."""

    async def thread(self, user: str, thread_id: str) -> Thread:
        """One thread. Raises NotFound."""

    async def update_thread(
        self, user: str, thread_id: str, changes: Mapping[str, Any], *, only_untitled: bool = False
    ) -> Thread:
        """Set ``title`` or ``metadata``. Raises NotFound."""

    async def delete_thread(self, user: str, thread_id: str) -> None:
        """Delete a thread, its messages and its runs. Raises NotFound."""

    async def add_messages(
        self, user: str, messages: Sequence[Message], *, create: bool = False
    ) -> Sequence[Message]:
        """Insert messages of one thread as one unit, and give them as stored.

        A message whose id the thread has already is not inserted again: the stored one is given.
        The first message without ``parent_id`` continues from the thread's newest message where its
        role is ``user``. With ``create`` the thread is created on first use. Raises NotFound for
        a thread or parent that is not there.
        """

    async def messages(self, user: str, thread_id: str, window: Window) -> Sequence[Message]:
        """A window of messages in its order. Raises NotFound, also for an unknown leaf."""

    async def set_feedback(
        self, user: str, thread_id: str, message_id: str, feedback: Mapping[str, Any] | None
    ) -> None:
        """Set or clear what the user thinks of a message. Raises NotFound."""


class UserData(Protocol):
    """All that is kept of one user, and the end of what is kept for long enough."""

    def export(self, user: str) -> AsyncGenerator[dict[str, Any], None]:
        """Every thread, message and run of a user, a plain map each."""

    async def erase(self, user: str) -> int:
        """Delete everything of a user, and give the number of threads."""

    async def expire(self, before: datetime, limit: int) -> int:
        """Delete at most ``limit`` threads without activity since ``before``, and count them."""


class EventLog(Protocol):
    """The numbered events of runs, which outlive the connections that follow them.

    ``durable`` says whether they outlive the process too.
    """

    durable: bool

    async def open(self, run: RunRecord, first: Sequence[Event] = ()) -> None:
        """Begin a run's log with its first events; durable when it returns."""

    def append(self, run_id: str, events: Sequence[Event]) -> int:
        """Number the events and give the newest number. Never waits, for nobody."""

    async def flush(self, run_id: str) -> None:
        """Wait until all that was appended is durable. Raises StorageUnavailable."""

    def follow(
        self, run_id: str, after: int, *, wait: bool = True
    ) -> AsyncGenerator[Sequence[Numbered], None]:
        """Pages of merged events after ``after``, as they come; ends after the ``end`` event.

        Without ``wait`` it ends where there is nothing more now.

        Raises NothingToResume where the events asked for are not kept any more.
        """

    async def find(
        self, user: str, *, run_id: str | None = None, thread_id: str | None = None
    ) -> RunRecord | None:
        """The user's run of that id, or the newest of that thread."""

    async def claim_abandoned(self) -> Sequence[RunRecord]:
        """Claim the runs that a dead or drained process left open, at most a hundred."""

    async def forget(self, user: str, thread_id: str) -> None:
        """Delete the runs of a thread and their events."""

    async def expire(self) -> int:
        """Delete events beyond their retention, a bounded number at a time, and count the runs."""


Finish = Literal["stop", "length", "tool_calls", "content_filter"] | str


@dataclass(frozen=True, slots=True)
class TextDelta:
    """Text or reasoning that a provider sent."""

    text: str
    reasoning: bool = False


@dataclass(frozen=True, slots=True)
class CallDelta:
    """A fragment of a tool call: the first one of an index has id and name."""

    index: int | None
    id: str | None
    name: str | None
    arguments: str


@dataclass(frozen=True, slots=True)
class UsageDelta:
    """The provider's own count of tokens."""

    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True, slots=True)
class FinishDelta:
    """Why the provider ended."""

    reason: Finish


Delta = TextDelta | CallDelta | UsageDelta | FinishDelta


@dataclass(frozen=True, slots=True)
class ProviderRequest:
    """One request to a model. ``tools`` are OpenAI function schemas."""

    model: str
    messages: Sequence[ProviderMessage]
    tools: Sequence[Mapping[str, Any]] = ()
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ProviderMessage:
    """A message as a model reads it."""

    role: str
    content: MessageContent
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None
    name: str | None = None


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """A model that clients may choose."""

    id: str
    provider: str
    default: bool


class Provider(Protocol):
    """Somebody who answers."""

    def stream(self, request: ProviderRequest) -> AsyncGenerator[Sequence[Delta], None]:
        """What one read brought, as it comes. Closing the iterator closes the connection.

        Raises:
            ProviderError: With the code of the protocol that fits.
        """


class Authenticator(Protocol):
    """Somebody who knows users by their tokens."""

    async def authenticate(self, token: str) -> User:
        """The token's user. Raises NotAuthenticated."""
