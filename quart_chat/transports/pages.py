"""Query strings and opaque cursors of lists."""

from __future__ import annotations

import base64
import json
from typing import Any

from pydantic import ValidationError
from quart import Request

from ..core.commands import check_values
from ..errors import InvalidMessage
from .schemas import M

INVALID_CURSOR = "cursor is invalid. Omit it to start from the first page."


def query_of(connection: Request, model: type[M]) -> M:
    """Return the query string as a model. Raises InvalidMessage."""
    try:
        return model.model_validate(connection.args.to_dict())
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        reason = first["msg"]
        where = ".".join(map(str, first["loc"]))
        raise InvalidMessage(f"{where}: {reason[:1].lower()}{reason[1:]}.") from None


def to_cursor(values: list[Any]) -> str:
    """Return the cursor of a place in a list."""
    raw = json.dumps(values, separators=(",", ":")).encode()
    return base64.urlsafe_b64encode(raw).decode().rstrip("=")


def from_cursor(cursor: str | None, *types: type) -> list[Any] | None:
    """Return the place that a cursor names, or None for the first page. Raises InvalidMessage."""
    if not cursor:
        return None
    try:
        values = json.loads(base64.urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4)))
        check_values(values)
        if [type(value) for value in values] == list(types):
            return list(values)
    except (ValueError, TypeError, RecursionError, InvalidMessage):
        pass
    raise InvalidMessage(INVALID_CURSOR)
