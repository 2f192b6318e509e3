"""The tool calls of one round: run at once, answered in order, some after a person agreed."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from .events import Event, ToolCalled, ToolProgress, ToolReturned
from .messages import ToolCall
from .policy import Policy
from .ports import RunRecord
from .tools import Tool, ToolContext, ToolError, as_result, function_schema

logger = logging.getLogger("quart_chat.tools")


APPROVED = "Approved."


@dataclass(frozen=True, slots=True)
class ApprovalReply:
    """A person's answer to a call that needs one."""

    approved: bool
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class ClientResult:
    """What a client's tool gave."""

    content: str
    is_error: bool = False


CallReply = ApprovalReply | ClientResult


class Toolbox:
    """The tools that one message selected, on the server and at the client."""

    def __init__(
        self, tools: Iterable[Tool] = (), client: Iterable[Mapping[str, Any]] = ()
    ) -> None:
        self._server = {tool.name: tool for tool in tools}
        self._client = {spec["name"]: spec for spec in client}

    def schemas(self) -> list[dict[str, Any]]:
        """All of them in OpenAI's form."""
        return [tool.schema() for tool in self._server.values()] + [
            function_schema(spec["name"], spec["description"], spec["parameters"])
            for spec in self._client.values()
        ]

    def get(self, name: str) -> Tool | None:
        """A tool of the server, or None."""
        return self._server.get(name)

    def needs(self, call: ToolCall) -> Literal["approval", "client"] | None:
        """What a call waits for before its result can be there.

        Raises:
            Exception: Whatever the tool's own predicate raises.
        """
        if call.name in self._client:
            return "client"
        tool = self._server.get(call.name)
        return "approval" if tool is not None and tool.asks_first(call.arguments) else None


class ToolExecutor:
    """Runs the calls of one round and appends what happens."""

    def __init__(
        self,
        record: RunRecord,
        toolbox: Toolbox,
        policy: Policy,
        append: Callable[[Sequence[Event]], None],
    ) -> None:
        self._record = record
        self._toolbox = toolbox
        self._policy = policy
        self._append = append
        self._awaited: dict[str, tuple[type[CallReply], asyncio.Future[CallReply]]] = {}
        self._unfinished: dict[str, str | None] = {}

    @property
    def waits_for_people(self) -> bool:
        """Whether nothing but approvals is left to wait for."""
        return bool(self._unfinished) and set(self._unfinished.values()) == {"approval"}

    def answer(self, call_id: str, reply: CallReply) -> bool:
        """Hand in an approval or a client's result; False where none of that kind is awaited."""
        kind, future = self._awaited.get(call_id, (None, None))
        if future is None or future.done() or not isinstance(reply, kind or ()):
            return False
        future.set_result(reply)
        return True

    def announce(
        self, calls: Sequence[ToolCall], argument_errors: Mapping[str, str], usage: dict[str, Any]
    ) -> list[ToolCalled]:
        """Say what the model asked for, before any of it runs, and log what asking has cost."""
        announced: list[ToolCalled] = []
        for call in calls:
            needs = None
            if call.id not in argument_errors:
                try:
                    needs = self._toolbox.needs(call)
                except Exception:
                    logger.exception("the approval predicate of %s failed", call.name)
                    needs = "approval"
            cost = None if announced else usage
            announced.append(ToolCalled(call.id, call.name, call.arguments, needs, cost))
        self._append(announced)
        return announced

    async def run(
        self, announced: Sequence[ToolCalled], argument_errors: Mapping[str, str]
    ) -> None:
        """Have every call answered: at once where they can be, in their order."""
        self._unfinished = {called.tool_call_id: called.needs for called in announced}
        async with asyncio.TaskGroup() as group:
            tasks = [
                group.create_task(self._result(called, argument_errors.get(called.tool_call_id)))
                for called in announced
            ]
            for number, task in enumerate(tasks):
                try:
                    self._append([await task])
                except asyncio.CancelledError:
                    self._append([t.result() for t in tasks[number:] if _succeeded(t)])
                    raise

    async def _result(self, called: ToolCalled, argument_error: str | None) -> ToolReturned:
        try:
            value, is_error = await self._try(called, argument_error)
            content = as_result(value)
        except ToolError as error:
            content, is_error = as_result(str(error)), True
        except asyncio.CancelledError as error:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            content, is_error = f"The tool failed: {type(error).__name__}.", True
        except Exception as error:
            logger.warning("the tool %s failed", called.name, exc_info=True)
            content, is_error = f"The tool failed: {type(error).__name__}.", True
        finally:
            self._unfinished.pop(called.tool_call_id, None)
        return ToolReturned(called.tool_call_id, called.name, content, is_error)

    async def _try(self, called: ToolCalled, argument_error: str | None) -> tuple[Any, bool]:
        if argument_error is not None:
            return argument_error, True
        if called.needs == "client":
            return await self._at_client(called)
        tool = self._toolbox.get(called.name)
        if tool is None:
            return f"There is no tool named {called.name!r} to use here.", True
        if called.needs == "approval" and (refusal := await self._refused(called)) is not None:
            return refusal, True
        try:
            async with asyncio.timeout(self._policy.tool_timeout) as bound:
                return await tool.invoke(self._context(called), called.arguments), False
        except TimeoutError:
            if not bound.expired():
                raise
            return f"The tool took over {self._policy.tool_timeout:g} s and was stopped.", True

    async def _at_client(self, called: ToolCalled) -> tuple[str, bool]:
        try:
            reply = await self._reply(called, ClientResult, self._policy.tool_timeout)
        except TimeoutError:
            return f"The client gave no result in {self._policy.tool_timeout:g} s.", True
        assert isinstance(reply, ClientResult)
        return reply.content, reply.is_error

    async def _refused(self, called: ToolCalled) -> str | None:
        try:
            reply = await self._reply(called, ApprovalReply, self._policy.approval_timeout)
        except TimeoutError:
            return "Nobody approved the call in time; it was not made."
        finally:
            self._unfinished[called.tool_call_id] = None
        assert isinstance(reply, ApprovalReply)
        if reply.approved:
            # Told, so that after a crash nobody is asked again for what may have been done.
            self._append([ToolProgress(called.tool_call_id, called.name, APPROVED)])
            return None
        return "The user refused the call." + (f" Reason: {reply.reason}" if reply.reason else "")

    async def _reply(self, called: ToolCalled, kind: type[CallReply], seconds: float) -> CallReply:
        future: asyncio.Future[CallReply] = asyncio.get_running_loop().create_future()
        self._awaited[called.tool_call_id] = (kind, future)
        try:
            async with asyncio.timeout(seconds):
                return await future
        finally:
            del self._awaited[called.tool_call_id]

    def _context(self, called: ToolCalled) -> ToolContext:
        loop, thread = asyncio.get_running_loop(), threading.get_ident()

        def append(text: str) -> None:
            if called.tool_call_id in self._unfinished:
                self._append([ToolProgress(called.tool_call_id, called.name, as_result(text))])

        def report(text: str) -> None:
            if threading.get_ident() == thread:
                append(text)
            elif not loop.is_closed():
                loop.call_soon_threadsafe(append, text)

        return ToolContext(
            self._record.user,
            self._record.thread_id,
            self._record.id,
            called.tool_call_id,
            report,
        )


def _succeeded(task: asyncio.Task[ToolReturned]) -> bool:
    return task.done() and not task.cancelled() and task.exception() is None
