"""JSON API of conversations: lists, titles, feedback, waiting tools, models."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any

from quart import Blueprint, Response, jsonify, request
from quart_schema import document_querystring, document_request, document_response, operation_id
from quart_schema import tag as tagged

from ..core.commands import check_values, validated
from ..core.messages import Thread, new_id, rfc3339
from ..core.tool_executor import ApprovalReply, CallReply, ClientResult
from ..errors import InvalidMessage, NotFound, NotRunning
from .http import body_of, for_user, guarded, json_of
from .message_pages import message_page
from .pages import INVALID_CURSOR, from_cursor, query_of, to_cursor
from .schemas import (
    ApprovalBody,
    Feedback,
    M,
    MessagePage,
    MessageQuery,
    ModelList,
    NewThread,
    StopDocument,
    ThreadChanges,
    ThreadPage,
    ThreadQuery,
    ThreadSchema,
    ToolResultBody,
    documents_errors,
)
from .state import ChatState

threads_blueprint = Blueprint("quart_chat_threads", __name__)
guarded(threads_blueprint)


async def _body(server: ChatState, model: type[M]) -> M:
    raw = await body_of(request, server.settings)
    data = await json_of(raw) if raw else {}
    if not isinstance(data, dict):
        raise InvalidMessage("The body must be one JSON object.")
    check_values(data)
    return validated(model, data)


def _thread(server: ChatState, user: str, thread: Thread) -> dict[str, Any]:
    return thread.to_dict(server.conversation.active_run_id(user, thread.id))


@threads_blueprint.get("/threads")
@operation_id("listThreads")
@tagged(["threads"])
@document_querystring(ThreadQuery)
@document_response(ThreadPage)
@documents_errors()
@for_user
async def list_threads(server: ChatState, user: str) -> Response:
    """List the user's threads, newest activity first."""
    query = query_of(request, ThreadQuery)
    check_values(query.q)
    place = from_cursor(query.cursor, str, str)
    after = None if place is None else (_moment(place[0]), place[1])
    threads = await server.conversation.storage.threads(
        user, query=query.q, after=after, limit=query.limit + 1
    )
    page = threads[: query.limit]
    more = len(threads) > query.limit
    return jsonify(
        threads=[_thread(server, user, thread) for thread in page],
        next=to_cursor([rfc3339(page[-1].updated_at), page[-1].id]) if more else None,
    )


def _moment(text: str) -> datetime:
    try:
        moment = datetime.fromisoformat(text)
        if moment.utcoffset() == timedelta(0):
            return moment
    except ValueError:
        pass
    raise InvalidMessage(INVALID_CURSOR)


@threads_blueprint.post("/threads")
@operation_id("createThread")
@tagged(["threads"])
@document_request(NewThread)
@document_response(ThreadSchema, 201)
@documents_errors(400, 409, 413)
@for_user
async def create_thread(server: ChatState, user: str) -> Response:
    """Create a thread."""
    body = await _body(server, NewThread)
    thread = Thread(id=body.id or new_id(), title=body.title, metadata=body.metadata or {})
    created = await server.conversation.storage.create_thread(user, thread)
    if (expiry := server.conversation.expiry) is not None:
        # No connection uses it yet: it expires like a thread whose connections have closed.
        expiry.arrive(user, created.id)
        expiry.leave(user, created.id)
    response: Response = jsonify(_thread(server, user, created))
    response.status_code = 201
    return response


@threads_blueprint.get("/threads/<chat_id:thread_id>")
@operation_id("getThread")
@tagged(["threads"])
@document_response(ThreadSchema)
@documents_errors(404)
@for_user
async def get_thread(server: ChatState, user: str, thread_id: str) -> Response:
    """Return one thread."""
    return jsonify(_thread(server, user, await server.conversation.storage.thread(user, thread_id)))


@threads_blueprint.patch("/threads/<chat_id:thread_id>")
@operation_id("updateThread")
@tagged(["threads"])
@document_request(ThreadChanges)
@document_response(ThreadSchema)
@documents_errors(400, 404, 413)
@for_user
async def change_thread(server: ChatState, user: str, thread_id: str) -> Response:
    """Change a thread's title or metadata."""
    body = await _body(server, ThreadChanges)
    changes: dict[str, Any] = body.model_dump(include=body.model_fields_set)
    if "metadata" in changes:
        changes["metadata"] = changes["metadata"] or {}
    thread = await server.conversation.storage.update_thread(user, thread_id, changes)
    return jsonify(_thread(server, user, thread))


@threads_blueprint.delete("/threads/<chat_id:thread_id>")
@operation_id("deleteThread")
@tagged(["threads"])
@documents_errors(404)
@for_user
async def delete_thread(server: ChatState, user: str, thread_id: str) -> Response:
    """Stop a thread's run and delete the thread with its messages."""
    await server.conversation.delete_thread(user, thread_id)
    return Response("", 204)


@threads_blueprint.get("/threads/<chat_id:thread_id>/messages")
@operation_id("listMessages")
@tagged(["messages"])
@document_querystring(MessageQuery)
@document_response(MessagePage)
@documents_errors(404)
@for_user
async def list_messages(server: ChatState, user: str, thread_id: str) -> Response:
    """List a thread's messages in the order in which they were stored."""
    return await message_page(server, user, thread_id, query_of(request, MessageQuery))


@threads_blueprint.post("/threads/<chat_id:thread_id>/stop")
@operation_id("stopThread")
@tagged(["runs"])
@document_response(StopDocument)
@documents_errors(404)
@for_user
async def stop_thread(server: ChatState, user: str, thread_id: str) -> Response:
    """Stop the thread's run, wherever it was started."""
    try:
        record, _ = await server.conversation.stop(user, thread_id=thread_id)
    except NotRunning:
        return jsonify(stopped=False)
    return jsonify(stopped=True, run_id=record.id)


@threads_blueprint.post("/threads/<chat_id:thread_id>/approve")
@operation_id("approveToolCall")
@tagged(["runs"])
@document_request(ApprovalBody)
@documents_errors(400, 404, 413)
@for_user
async def approve_call(server: ChatState, user: str, thread_id: str) -> Response:
    """Approve or refuse a tool call that waits for a person."""
    body = await _body(server, ApprovalBody)
    reply = ApprovalReply(body.approved, body.reason)
    return _answer_call(server, user, thread_id, body, reply)


@threads_blueprint.post("/threads/<chat_id:thread_id>/tool_result")
@operation_id("sendToolResult")
@tagged(["runs"])
@document_request(ToolResultBody)
@documents_errors(400, 404, 413)
@for_user
async def send_tool_result(server: ChatState, user: str, thread_id: str) -> Response:
    """Hand in the result of a tool that ran at the client."""
    body = await _body(server, ToolResultBody)
    reply = ClientResult(body.content, body.is_error)
    return _answer_call(server, user, thread_id, body, reply)


def _answer_call(
    server: ChatState,
    user: str,
    thread_id: str,
    body: ApprovalBody | ToolResultBody,
    reply: CallReply,
) -> Response:
    run = server.conversation.runs.get(user, body.run_id)
    if run is None or run.record.thread_id != thread_id:
        raise NotFound("No run of this thread waits for this tool call.")
    server.conversation.answer_call(user, body.run_id, body.tool_call_id, reply)
    return Response("", 204)


@threads_blueprint.put("/threads/<chat_id:thread_id>/messages/<chat_id:message_id>/feedback")
@operation_id("setFeedback")
@tagged(["messages"])
@document_request(Feedback)
@documents_errors(400, 404, 413)
@for_user
async def give_feedback(server: ChatState, user: str, thread_id: str, message_id: str) -> Response:
    """Rate a message."""
    body = await _body(server, Feedback)
    feedback = body.model_dump(exclude_none=True)
    await server.conversation.storage.set_feedback(user, thread_id, message_id, feedback)
    return Response("", 204)


@threads_blueprint.get("/models")
@operation_id("listModels")
@tagged(["models"])
@document_response(ModelList)
@documents_errors()
@for_user
async def list_models(server: ChatState, user: str) -> Response:
    """List the models that a message may name."""
    models = server.conversation.models.list()
    return jsonify(
        models=[{"id": m.id, "provider": m.provider, "default": m.default} for m in models]
    )
