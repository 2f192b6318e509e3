"""Health checks: ``GET /health`` for the process, ``GET /ready`` for messages."""

from __future__ import annotations

from quart import Blueprint, Response, jsonify
from quart_schema import document_response, operation_id, tag

from ..errors import ChatError
from .http import error_response, guarded
from .schemas import ErrorBody, HealthDocument, ReadyDocument
from .state import current_state

health_blueprint = Blueprint("quart_chat_health", __name__)
guarded(health_blueprint)


@health_blueprint.get("/health")
@operation_id("getHealth")
@tag(["server"])
@document_response(HealthDocument)
async def health() -> Response:
    """Return that the process serves, and over which protocol."""
    return jsonify(status="healthy", protocol=current_state().settings.protocol)


@health_blueprint.get("/ready")
@operation_id("getReady")
@tag(["server"])
@document_response(ReadyDocument)
@document_response(ErrorBody, 503)
async def ready() -> Response:
    """Return whether a message would be taken: 503 while draining or without the database."""
    try:
        await current_state().check_ready()
    except ChatError as error:
        response = error_response(error)
        response.status_code = 503
        return response
    return jsonify(status="ready")
