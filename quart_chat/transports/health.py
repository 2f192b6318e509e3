"""``GET /health``: whether the process serves."""

from __future__ import annotations

from quart import Blueprint, Response, jsonify
from quart_schema import document_response

from .schemas import HealthDocument
from .state import current_state, guarded

health_blueprint = Blueprint("quart_chat_health", __name__)
guarded(health_blueprint)


@health_blueprint.get("/health")
@document_response(HealthDocument)
async def health() -> Response:
    """Whether the process serves, and over which protocol."""
    return jsonify(status="healthy", protocol=current_state().settings.protocol)
