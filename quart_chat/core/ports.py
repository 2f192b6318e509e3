"""What the core stands on: five protocols and the small values that they exchange."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal, Protocol

from .events import Event, Numbered
from .messages import Message, MessageContent, Thread, ToolCall, User

MAX_BRANCHES = 200
TOO_MANY_BRANCHES = "This path was edited too often. Send the message in a new thread."


@dataclass(frozen=True, slots=True)
class Window:
    """A part of a thread's messages.

    With ``branch`` ``"current"`` the path that leads to ``leaf`` (default: the newest message),
    with ``"all"`` every message. ``after`` is the position where the page before ended. A page
    ends with the message with which its text passes ``max_chars``; it has at least one.
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
    kept: bool = True
    """Whether its events are kept still."""
    orphaned: bool = False
    """Whether its opening failed here, so that it never began and may be opened again."""


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
        """Return threads after (activity, id), newest first.

        With ``query`` those that have each of its pieces, split at white space, in their title or
        in one of their messages, in any case. A message counts up to its first 64 K characters.
        """

    async def thread(self, user: str, thread_id: str) -> Thread:
        """One thread. Raises NotFound."""

    async def update_thread(
        self, user: str, thread_id: str, changes: Mapping[str, Any], *, only_untitled: bool = False
    ) -> Thread:
        """Set ``title`` or ``metadata``. Raises NotFound."""

    async def delete_thread(self, user: str, thread_id: str) -> None:
        """Delete a thread, its messages and its runs. Raises NotFound.

        It is out of sight at once, also if the call is cancelled.
        """

    async def add_messages(
        self, user: str, messages: Sequence[Message], *, create: bool = False
    ) -> Sequence[Message]:
        """Insert messages of one thread as one unit, and give them as stored.

        A message whose id the thread has already is not inserted again: the stored one is given.
        The first message without ``parent_id`` continues from the thread's newest message where its
        role is ``user``. With ``create`` the thread is created on first use. Raises NotFound for
        a thread or parent that does not exist, and InvalidMessage if the message's path would
        pass through more than 200 branches.
        """

    async def messages(self, user: str, thread_id: str, window: Window) -> Sequence[Message]:
        """A window of messages in its order. Raises NotFound, also for an unknown leaf."""

    async def set_feedback(
        self, user: str, thread_id: str, message_id: str, feedback: Mapping[str, Any] | None
    ) -> None:
        """Set or clear what the user thinks of a message. Raises NotFound."""


class UserData(Protocol):
    """Everything stored about one user, and the expiry of old threads."""

    def export(self, user: str) -> AsyncGenerator[dict[str, Any], None]:
        """Every thread, message and run of a user, a plain map each."""

    async def erase(self, user: str) -> int:
        """Delete everything of a user, and give the number of threads."""

    async def expire(self, before: datetime, limit: int) -> int:
        """Delete at most ``limit`` threads without activity since ``before``, and count them.

        A thread that becomes active meanwhile stays. Deletions that a crash cut short are finished
        first, and count. If fewer than ``limit`` come back, there is nothing left for now.
        """


class EventLog(Protocol):
    """The numbered events of runs, which outlive the connections that follow them.

    ``durable`` says whether they outlive the process too.
    """

    durable: bool

    async def open(self, run: RunRecord, first: Sequence[Event] = ()) -> None:
        """Begin a run's log with its first events; durable when it returns.

        Opening a run again that nobody drives begins its log anew. Raises StorageUnavailable, and
        then the run may be there or not.
        """

    def append(self, run_id: str, events: Sequence[Event]) -> int:
        """Number the events and return the newest number. Never waits.

        Events of a run whose log was deleted are dropped.
        """

    async def flush(self, run_id: str) -> None:
        """Wait until all that was appended is durable. Raises StorageUnavailable."""

    def follow(
        self, run_id: str, after: int, *, wait: bool = True
    ) -> AsyncGenerator[Sequence[Numbered], None]:
        """Yield pages of merged events after ``after``, as they come, until the ``end`` event.

        Without ``wait``, end when there is nothing more now.

        Raises:
            NothingToResume: The events asked for are not kept any more.
            UnreadableLog: Another version of the server wrote them.
        """

    async def find(
        self, user: str, *, run_id: str | None = None, thread_id: str | None = None
    ) -> RunRecord | None:
        """Return the user's run of that id, or the newest of that thread."""

    def abandon(self, run_id: str) -> None:
        """Say that nobody drives the run any more; the next claim returns it.

        Until it is settled its ``end`` is not final for the log.
        """

    def resume(self, run_id: str) -> None:
        """Say that the claimed run is driven again."""

    async def settle(self, run_id: str) -> None:
        """Say that the claimed run's messages are stored; its ``end`` is final now.

        Raises StorageUnavailable.
        """


class LogMaintenance(Protocol):
    """What recovery, retention and deletion ask of the event log."""

    async def claim_abandoned(self) -> Sequence[RunRecord]:
        """Claim runs that nobody drives, here or in a process that is gone.

        Whoever claims a run resumes it, settles it, or abandons it again.
        """

    async def forget(self, user: str, thread_id: str | None = None) -> None:
        """Delete the runs of a thread, or of all the user's threads, and their events."""

    async def expire(self) -> int:
        """Delete events beyond their retention, of a bounded number of runs, and count them."""


class RunLog(EventLog, LogMaintenance, Protocol):
    """The whole event log of an application.

    ``on_available`` is called when it can write again after it could not.
    """

    on_available: Callable[[], None]


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
