"""Tool executor: runs the calls of one round side by side, some after a person's approval."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import StorageUnavailable
from .events import Event, ToolCalled, ToolProgress, ToolReturned, weight_of
from .parts import Parts
from .ports import RunRecord
from .toolbox import Toolbox
from .tools import ToolContext, ToolError, as_result

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


class ToolExecutor:
    """Runs the calls of one round and appends what happens, each result as soon as it is there.

    ``make_durable`` returns when all that was appended is on disk.
    """

    def __init__(
        self,
        record: RunRecord,
        toolbox: Toolbox,
        parts: Parts,
        append: Callable[[Sequence[Event]], None],
        make_durable: Callable[[], Awaitable[None]],
    ) -> None:
        self.chars = 0
        self._record = record
        self._toolbox = toolbox
        self._policy = parts.policy
        self._threads = parts.tool_threads
        self._append = append
        self._make_durable = make_durable
        self._awaited: dict[str, tuple[type[CallReply], asyncio.Future[CallReply]]] = {}
        self._unfinished: dict[str, str | None] = {}

    @property
    def waits_for_people(self) -> bool:
        """Whether only approvals are left to wait for."""
        return bool(self._unfinished) and set(self._unfinished.values()) == {"approval"}

    def answer(self, call_id: str, reply: CallReply) -> bool:
        """Hand in an approval or a client's result; False if none of that kind is awaited."""
        kind, future = self._awaited.get(call_id, (None, None))
        if future is None or future.done() or not isinstance(reply, kind or ()):
            return False
        future.set_result(reply)
        return True

    async def run(
        self, announced: Sequence[ToolCalled], argument_errors: Mapping[str, str]
    ) -> None:
        """Run every call, or have it answered, and return when all have results."""
        self._unfinished = {called.tool_call_id: called.needs for called in announced}
        loop = asyncio.get_running_loop()
        for called in announced:
            if called.needs is not None:
                kind = ClientResult if called.needs == "client" else ApprovalReply
                self._awaited[called.tool_call_id] = (kind, loop.create_future())
        async with asyncio.TaskGroup() as group:
            for called in announced:
                argument_error = argument_errors.get(called.tool_call_id)
                group.create_task(self._return_result(called, argument_error))

    async def _return_result(self, called: ToolCalled, argument_error: str | None) -> None:
        returned = await self._result(called, argument_error)
        self.chars += weight_of(returned) + weight_of(called)
        self._append([returned])

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
            reply = await self._reply(called, self._policy.tool_timeout)
        except TimeoutError:
            return f"The client gave no result in {self._policy.tool_timeout:g} s.", True
        assert isinstance(reply, ClientResult)
        return reply.content, reply.is_error

    async def _refused(self, called: ToolCalled) -> str | None:
        try:
            reply = await self._reply(called, self._policy.approval_timeout)
        except TimeoutError:
            return "Nobody approved the call in time; it was not made."
        finally:
            self._unfinished[called.tool_call_id] = None
        assert isinstance(reply, ApprovalReply)
        if reply.approved:
            return await self._record_approval(called)
        return "The user refused the call." + (f" Reason: {reply.reason}" if reply.reason else "")

    async def _record_approval(self, called: ToolCalled) -> str | None:
        """Write the approval down before the tool acts: a crash must not make it act twice."""
        self._append([ToolProgress(called.tool_call_id, called.name, APPROVED)])
        try:
            await self._make_durable()
        except StorageUnavailable:
            return "The approval could not be recorded, so the call was not made."
        return None

    async def _reply(self, called: ToolCalled, seconds: float) -> CallReply:
        _, future = self._awaited[called.tool_call_id]
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
            self._threads,
        )
