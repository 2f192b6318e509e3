"""Conversations as JSON: lists, messages, titles, feedback, models."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from quart import Blueprint, Response, jsonify, request
from quart_schema import document_querystring, document_request, document_response

from ..core.commands import check_values, validated
from ..core.messages import Message, Thread, new_id, rfc3339
from ..core.ports import Window
from ..errors import InvalidMessage, NotFound, NotRunning
from .codec import decode_json
from .schemas import (
    Feedback,
    MessagePage,
    MessageQuery,
    ModelList,
    NewThread,
    StopDocument,
    ThreadChanges,
    ThreadPage,
    ThreadQuery,
    ThreadSchema,
    documents_errors,
)
from .state import ChatState, body_of, current_state, guarded

threads_blueprint = Blueprint("quart_chat_threads", __name__)
guarded(threads_blueprint)

M = TypeVar("M", bound=BaseModel)

NO_CURSOR = "cursor: this is no cursor of ours; begin without one."


async def _asked() -> tuple[ChatState, str]:
    server = current_state()
    return server, (await server.guard.identify(request)).id


async def _body(model: type[M]) -> M:
    raw = await body_of(request, current_state().settings)
    data = decode_json(raw) if raw else {}
    if not isinstance(data, dict):
        raise InvalidMessage("The body is one JSON object.")
    check_values(data)
    return validated(model, data)


def _query(model: type[M]) -> M:
    try:
        return model.model_validate(request.args.to_dict())
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise InvalidMessage(f"{'.'.join(map(str, first['loc']))}: {first['msg']}.") from None


def _cursor(values: list[Any]) -> str:
    raw = json.dumps(values, separators=(",", ":")).encode()
    return base64.urlsafe_b64encode(raw).decode().rstrip("=")


def _from_cursor(cursor: str | None, *types: type) -> list[Any] | None:
    if not cursor:
        return None
    try:
        values = json.loads(base64.urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4)))
        check_values(values)
        if [type(value) for value in values] == list(types):
            return list(values)
    except (ValueError, TypeError, RecursionError, InvalidMessage):
        pass
    raise InvalidMessage(NO_CURSOR)


def _thread(server: ChatState, user: str, thread: Thread) -> dict[str, Any]:
    return thread.to_dict(server.conversation.active_run_id(user, thread.id))


@threads_blueprint.get("/threads")
@document_querystring(ThreadQuery)
@document_response(ThreadPage)
@documents_errors()
async def list_threads() -> Response:
    """The user's threads, newest activity first."""
    server, user = await _asked()
    query = _query(ThreadQuery)
    check_values(query.q)
    place = _from_cursor(query.cursor, str, str)
    after = None if place is None else (_moment(place[0]), place[1])
    threads = await server.conversation.storage.threads(
        user, query=query.q, after=after, limit=query.limit + 1
    )
    page = threads[: query.limit]
    more = len(threads) > query.limit
    return jsonify(
        threads=[_thread(server, user, thread) for thread in page],
        next=_cursor([rfc3339(page[-1].updated_at), page[-1].id]) if more else None,
    )


def _moment(text: str) -> datetime:
    try:
        moment = datetime.fromisoformat(text)
        if moment.utcoffset() == timedelta(0):
            return moment
    except ValueError:
        pass
    raise InvalidMessage(NO_CURSOR)


@threads_blueprint.post("/threads")
@document_request(NewThread)
@document_response(ThreadSchema, 201)
@documents_errors(400, 409, 413)
async def create_thread() -> Response:
    """Create a thread."""
    server, user = await _asked()
    body = await _body(NewThread)
    thread = Thread(id=body.id or new_id(), title=body.title, metadata=body.metadata or {})
    created = await server.conversation.storage.create_thread(user, thread)
    response: Response = jsonify(_thread(server, user, created))
    response.status_code = 201
    return response


@threads_blueprint.get("/threads/<chat_id:thread_id>")
@document_response(ThreadSchema)
@documents_errors(404)
async def get_thread(thread_id: str) -> Response:
    """One thread."""
    server, user = await _asked()
    return jsonify(_thread(server, user, await server.conversation.storage.thread(user, thread_id)))


@threads_blueprint.patch("/threads/<chat_id:thread_id>")
@document_request(ThreadChanges)
@document_response(ThreadSchema)
@documents_errors(400, 404, 413)
async def change_thread(thread_id: str) -> Response:
    """Change a thread's title or metadata."""
    server, user = await _asked()
    body = await _body(ThreadChanges)
    changes: dict[str, Any] = body.model_dump(include=body.model_fields_set)
    if "metadata" in changes:
        changes["metadata"] = changes["metadata"] or {}
    thread = await server.conversation.storage.update_thread(user, thread_id, changes)
    return jsonify(_thread(server, user, thread))


@threads_blueprint.delete("/threads/<chat_id:thread_id>")
@documents_errors(404)
async def delete_thread(thread_id: str) -> Response:
    """Delete a thread: its run is stopped, its messages are gone."""
    server, user = await _asked()
    await server.conversation.delete_thread(user, thread_id)
    return Response("", 204)


@threads_blueprint.get("/threads/<chat_id:thread_id>/messages")
@document_querystring(MessageQuery)
@document_response(MessagePage)
@documents_errors(404)
async def list_messages(thread_id: str) -> Response:
    """A thread's messages in the order in which they were stored."""
    server, user = await _asked()
    query = _query(MessageQuery)
    place = _from_cursor(query.cursor, int, str)
    window = Window(limit=query.limit + 1, order=query.order, branch=query.branch)
    if place is not None:
        if not 0 < place[0] < 2**31:
            raise InvalidMessage(NO_CURSOR)
        window = replace(window, after=place[0], leaf=place[1])
    try:
        messages = await server.conversation.storage.messages(user, thread_id, window)
    except NotFound:
        await server.conversation.storage.thread(user, thread_id)
        raise InvalidMessage(NO_CURSOR) from None
    return jsonify(await _message_page(server, user, thread_id, messages, query, window))


async def _message_page(
    server: ChatState,
    user: str,
    thread_id: str,
    messages: Any,
    query: MessageQuery,
    window: Window,
) -> Mapping[str, Any]:
    page: list[Message] = list(messages[: query.limit])
    following = None
    if len(messages) > query.limit:
        # The path was chosen by the first page: a branch that begins meanwhile does not cut it.
        leaf = window.leaf
        if leaf is None:
            newest = Window(limit=1, order="desc", branch=query.branch)
            leaf = (await server.conversation.storage.messages(user, thread_id, newest))[0].id
        following = _cursor([page[-1].position, leaf])
    return {"messages": [message.to_dict() for message in page], "next": following}


@threads_blueprint.post("/threads/<chat_id:thread_id>/stop")
@document_response(StopDocument)
@documents_errors(404)
async def stop_thread(thread_id: str) -> Response:
    """Stop the thread's run, wherever it was started."""
    server, user = await _asked()
    try:
        record, _ = await server.conversation.stop(user, thread_id=thread_id)
    except NotRunning:
        return jsonify(stopped=False)
    return jsonify(stopped=True, run_id=record.id)


@threads_blueprint.put("/threads/<chat_id:thread_id>/messages/<chat_id:message_id>/feedback")
@document_request(Feedback)
@documents_errors(400, 404, 413)
async def give_feedback(thread_id: str, message_id: str) -> Response:
    """Say what the user thinks of a message."""
    server, user = await _asked()
    body = await _body(Feedback)
    feedback = body.model_dump(exclude_none=True)
    await server.conversation.storage.set_feedback(user, thread_id, message_id, feedback)
    return Response("", 204)


@threads_blueprint.get("/models")
@document_response(ModelList)
@documents_errors()
async def list_models() -> Response:
    """The models that a message may name."""
    server, _ = await _asked()
    models = server.conversation.models.list()
    return jsonify(
        models=[{"id": m.id, "provider": m.provider, "default": m.default} for m in models]
    )
