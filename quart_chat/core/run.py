"""Run: one answer being made, from its first event to its last.

A run is a task of its own, owned by the process and not by a connection. It appends what happens
to the event log and keeps no text: the messages stored are made from the log (``run_writer.py``).

An end is requested (``request_end``) and observed by the run, which then cancels its work and
stores what there is. Nothing depends on a task having had its first step, and whatever happens to
the task, ``_ensure_finished`` ends the run and leaves the rest to recovery.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from ..errors import ChatError, InternalError, NotFound, RunError, StorageUnavailable
from .agent_loop import AgentLoop, RunInput
from .events import End, Event, Failed, Numbered, Stopped
from .messages import Status
from .parts import Parts
from .run_clock import RunClock
from .run_state import RunState
from .run_writer import RunWriter
from .tool_executor import CallReply

logger = logging.getLogger("quart_chat.run")

DRAINED = "The server was restarted before the answer was complete."

STUBBORN_SECONDS = 2.0
"""How long a cancelled provider or tool may go on before the run ends without it."""


class RunPhase(StrEnum):
    """Where a run is in its life."""

    STARTING = "starting"
    STREAMING = "streaming"
    CALLING_TOOLS = "calling_tools"
    AWAITING_APPROVAL = "awaiting_approval"
    ENDING = "ending"
    ENDED = "ended"
    HANDED_OVER = "handed_over"


OVER = (RunPhase.ENDING, RunPhase.ENDED, RunPhase.HANDED_OVER)


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a run ends, and the events that say so before ``end``."""

    status: Status
    finish_reason: str | None = None
    events: tuple[Event, ...] = ()

    @classmethod
    def failure(cls, error: ChatError, status: Status = "failed") -> Outcome:
        """Return the end of a run that an error cuts off."""
        return cls(status, None, (Failed(**error.to_dict()),))


INTERRUPTED = Outcome.failure(RunError(DRAINED, code="interrupted"), "interrupted")


class Run:
    """Answers one question and stores the answer."""

    def __init__(self, run_input: RunInput, parts: Parts) -> None:
        self.record = run_input.record
        self.followers = 0
        self.finished = asyncio.Event()
        self.stopped: Numbered | None = None
        self.on_finished: Callable[[Run], None] = lambda run: None
        self.work: asyncio.Task[str] | None = None
        self._input = run_input
        self._parts = parts
        self._phase = RunPhase.STARTING
        self._end: asyncio.Future[Outcome | None] = asyncio.get_running_loop().create_future()
        self._clock = RunClock(parts.policy.run_timeout, self._time_is_over)
        self.task: asyncio.Task[None] | None = None
        self._began = asyncio.get_running_loop().time()
        self._status: Status | None = None

    @property
    def id(self) -> str:
        return self.record.id

    @property
    def phase(self) -> RunPhase:
        """Where the run is in its life."""
        if self._phase is RunPhase.STREAMING and (executor := self._loop.executor) is not None:
            waits = executor.waits_for_people
            return RunPhase.AWAITING_APPROVAL if waits else RunPhase.CALLING_TOOLS
        return self._phase

    def start(self, resumed: RunState | None = None) -> asyncio.Task[None]:
        """Begin; the log has the first event.

        Args:
            resumed: The state in which a process before this one left the run for an approval.
        """
        state = resumed or RunState(1, self._input.first_event())
        parts = self._parts
        self._writer = RunWriter(
            self.record, state, parts.log, parts.storage, parts.policy.storage_retry
        )
        self._loop = AgentLoop(self._input, parts, self._writer, self._append_work, self._clock)
        self.task = asyncio.create_task(self._live(resumed), name=f"quart_chat run {self.id}")
        self.task.add_done_callback(self._ensure_finished)
        return self.task

    def stop(self, message: str) -> None:
        """Request the end because somebody asked for it; the text so far is kept."""
        self.request_end(Outcome("stopped", None, (Stopped(message),)))

    def interrupt(self) -> None:
        """Request the end because the process ends; the text so far is kept."""
        self.request_end(INTERRUPTED)

    def hand_over(self) -> None:
        """Leave the run, which waits for an approval, to the next process."""
        self.request_end(None)

    def request_end(self, outcome: Outcome | None) -> None:
        """Ask the run to end so, unless it is ending already; None hands it over."""
        if not self._end.done() and self._phase not in OVER:
            self._end.set_result(outcome)

    def abandon(self) -> None:
        """End at once, without waiting for anything; recovery stores what the log has."""
        if not self.finished.is_set():
            self._give_up(INTERRUPTED)
            for task in (self.task, self.work):
                if task is not None:
                    task.cancel()

    def answer(self, call_id: str, reply: CallReply) -> None:
        """Hand in an approval or a client's result.

        Raises:
            NotFound: The run does not wait for it.
        """
        executor = self._loop.executor if self._phase is RunPhase.STREAMING else None
        if executor is None or not executor.answer(call_id, reply):
            raise NotFound("The run does not wait for an answer to that tool call.")

    async def _live(self, resumed: RunState | None) -> None:
        outcome = await self._outcome(resumed)
        if outcome is None:
            self._phase = RunPhase.HANDED_OVER
            self._release()
        else:
            await self._finish(outcome)

    async def _outcome(self, resumed: RunState | None) -> Outcome | None:
        """Do the work until it is done or an end is requested."""
        if not self._end.done():
            self._phase = RunPhase.STREAMING
        work = self.work = asyncio.create_task(self._loop.answer(resumed))
        work.add_done_callback(_retrieve)
        self._clock.resume()
        try:
            await asyncio.wait((work, self._end), return_when=asyncio.FIRST_COMPLETED)
            done_by_itself = work.done()
            await self._cancel(work)
        finally:
            self._clock.stop()
            self._phase = RunPhase.ENDING
            work.cancel()
        if self._end.done() and (work.cancelled() or not done_by_itself):
            return self._end.result()
        return self._outcome_of(work)

    async def _cancel(self, work: asyncio.Task[str]) -> None:
        if work.done():
            return
        work.cancel()
        await asyncio.wait((work,), timeout=STUBBORN_SECONDS)
        if not work.done():
            logger.warning("run %s: a provider or tool ignores its cancellation", self.id)

    def _outcome_of(self, work: asyncio.Task[str]) -> Outcome:
        try:
            return Outcome("completed", work.result())
        except ChatError as error:
            return Outcome.failure(error)
        except (Exception, asyncio.CancelledError):  # cancelled, and nobody had asked for it
            return Outcome.failure(self._unexpected("failed"))

    def _unexpected(self, what: str) -> ChatError:
        error = InternalError()
        logger.exception("run %s %s; reference %s", self.id, what, error.reference)
        return error

    def _time_is_over(self) -> None:
        seconds = f"{self._parts.policy.run_timeout:g}"
        error = RunError(f"The answer took over {seconds} s and was ended.")
        self.request_end(Outcome.failure(error))

    async def _finish(self, outcome: Outcome) -> None:
        """Store the answer and write the end."""
        self._loop.end_round(self._append)
        for event in outcome.events:
            seq = self._append([event])
            if isinstance(event, Stopped):
                self.stopped = (seq, event)
        events: list[Event] = []
        status = outcome.status
        try:
            events = await self._writer.store_answer(status)
        except NotFound:  # the thread was deleted
            status = "stopped"
        except Exception as error:
            known = error if isinstance(error, ChatError) else self._unexpected("was not stored")
            status = "failed"
            events = [Failed(**known.to_dict())]
            self._parts.log.abandon(self.id)
        if not self.finished.is_set():
            self._status = status
            self.on_finished(self)
            self._append([*events, End(status, outcome.finish_reason, self._loop.usage.to_dict())])
            await self._flush()
            self._release()

    async def _flush(self) -> None:
        try:
            await self._parts.log.flush(self.id)
        except StorageUnavailable:
            pass  # the log goes on trying

    def _ensure_finished(self, task: asyncio.Task[None]) -> None:
        """Whatever became of the task, the run ends here."""
        if self.finished.is_set():
            return
        if task.cancelled():
            self._give_up(INTERRUPTED)
        else:
            error = InternalError()
            cause = task.exception()
            logger.error("run %s; reference %s", self.id, error.reference, exc_info=cause)
            self._give_up(Outcome.failure(error))

    def _give_up(self, outcome: Outcome) -> None:
        """Write the end without waiting; recovery stores the answer from the log."""
        self._parts.log.abandon(self.id)
        self._phase = RunPhase.ENDING
        self._status, usage = outcome.status, self._loop.usage.to_dict()
        self._append([*outcome.events, End(outcome.status, outcome.finish_reason, usage)])
        self._release()

    def _release(self) -> None:
        if self._phase is not RunPhase.HANDED_OVER:
            self._phase = RunPhase.ENDED
        if not self.finished.is_set():
            self._log_line()
        self.on_finished(self)
        self.finished.set()

    def _log_line(self) -> None:
        record, usage = self.record, self._loop.usage
        logger.info(
            "run %s: %s, user %s, thread %s, model %s, %d + %d tokens, %.1f s",
            record.id,
            self._status or self._phase,
            hashlib.sha256(record.user.encode()).hexdigest()[:8],
            record.thread_id,
            self._input.model,
            usage.prompt_tokens,
            usage.completion_tokens,
            asyncio.get_running_loop().time() - self._began,
        )

    def _append_work(self, events: Sequence[Event]) -> None:
        """Append for the work, which has no say any more once the run ends."""
        if self._phase is RunPhase.STREAMING and events:
            self._parts.log.append(self.id, events)

    def _append(self, events: Sequence[Event]) -> int:
        if self._phase is RunPhase.ENDED or not events:
            return 0
        return self._parts.log.append(self.id, events)


def _retrieve(task: asyncio.Task[str]) -> None:
    if not task.cancelled():
        task.exception()
