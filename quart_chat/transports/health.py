"""``GET /health``: whether the process serves."""

from __future__ import annotations

from quart import Blueprint, Response, jsonify

from .server import current_server, guarded

health_blueprint = Blueprint("quart_chat_health", __name__)
guarded(health_blueprint)


@health_blueprint.get("/health")
async def health() -> Response:
    """Whether the process serves, and over which protocol."""
    return jsonify(status="healthy", protocol=current_server().settings.protocol)
