"""Hypercorn, with wsproto and h11: connections whose memory and time are bounded.

Checked against Hypercorn 0.18, wsproto 1.2 to 1.3 and h11 0.14 to 0.16.

Hook: ``hypercorn.asyncio.run.TCPServer``, the class that serves a TCP connection, is replaced by a
subclass. It replaces the connection's ``H11Protocol``, which replaces ``HTTPStream`` and
``WSStream``. Hypercorn has no settings for what they change: see ``tcp``, ``http`` and
``websocket``. If Hypercorn is not as expected, nothing is replaced.

A host that runs an application of its own under plain Hypercorn calls ``bound_connections()`` once,
in the module of the application.
"""

from __future__ import annotations

import importlib
from typing import Any

from ..version import Checked, missing_names, other_parameters, warn_once

HYPERCORN = Checked("hypercorn", "0.18", "0.19")
WSPROTO = Checked("wsproto", "1.2", "1.4")
H11 = Checked("h11", "0.14", "0.17")

PLAIN = "Hypercorn serves connections in its plain way: some limits of connections do not hold."


def hypercorn_problem() -> str | None:
    """Return a sentence if Hypercorn's inside is not as expected, else None."""
    try:
        run = importlib.import_module("hypercorn.asyncio.run")
        tcp = importlib.import_module("hypercorn.asyncio.tcp_server").TCPServer
        h11_protocol = importlib.import_module("hypercorn.protocol.h11")
        http = importlib.import_module("hypercorn.protocol.http_stream").HTTPStream
        websocket = importlib.import_module("hypercorn.protocol.ws_stream").WSStream
        h11_class = h11_protocol.H11Protocol
    except (ImportError, AttributeError) as error:
        return HYPERCORN.problem([str(error)])
    context = ("app", "config", "context", "task_group")
    peer = ("ssl", "client", "server", "send")
    connection = ("app", "loop", "config", "context", "state", "reader", "writer")
    return HYPERCORN.problem(
        [
            *([] if run.__dict__.get("TCPServer") else ["hypercorn.asyncio.run has no TCPServer"]),
            *other_parameters(tcp, "__init__", connection),
            *other_parameters(tcp, "protocol_send", ("event",)),
            *other_parameters(tcp, "_read_data", ()),
            *other_parameters(tcp, "_close", ()),
            *other_parameters(h11_class, "__init__", (*context, "connection_state", *peer)),
            *other_parameters(h11_class, "handle", ("event",)),
            *other_parameters(h11_class, "_check_protocol", ("event",)),
            *other_parameters(h11_class, "_create_stream", ("request",)),
            *other_parameters(h11_class, "_send_error_response", ("status_code",)),
            *missing_names(h11_class, ("stream_send", "_send_h11_event", "_close_stream")),
            *missing_names(h11_protocol, ("H11WSConnection", "STREAM_ID")),
            *other_parameters(http, "__init__", (*context, *peer, "stream_id")),
            *other_parameters(http, "app_send", ("message",)),
            *other_parameters(websocket, "__init__", (*context, *peer, "stream_id")),
            *other_parameters(websocket, "handle", ("event",)),
            *other_parameters(websocket, "app_send", ("message",)),
            *other_parameters(websocket, "_handle_events", ()),
            *other_parameters(websocket, "_send_wsproto_event", ("event",)),
            *missing_names(websocket, ("_send_pings", "_send_error_response")),
        ]
    )


def wsproto_problem() -> str | None:
    """Return a sentence if wsproto's connection is not as expected, else None."""
    connection = importlib.import_module("wsproto.connection")
    return WSPROTO.problem(
        [
            *missing_names(connection, ("Connection", "ConnectionState")),
            *missing_names(connection.Connection, ("state", "send", "receive_data", "events")),
            *missing_names(connection.ConnectionState, ("OPEN", "REMOTE_CLOSING", "CLOSED")),
        ]
    )


def h11_problem() -> str | None:
    """Return a sentence if h11's connection is not as expected, else None."""
    h11 = importlib.import_module("h11")
    return H11.problem(
        [
            *missing_names(h11, ("IDLE", "SEND_BODY", "SEND_RESPONSE", "Connection", "Request")),
            *missing_names(h11.Connection, ("their_state", "our_state", "trailing_data")),
        ]
    )


def bound_connections() -> bool:
    """Bound this process's Hypercorn connections; return whether that was possible."""
    problem = hypercorn_problem() or wsproto_problem() or h11_problem()
    if problem is not None:
        warn_once(problem, PLAIN)
        return False
    from .tcp import BoundedTCPServer

    run: Any = importlib.import_module("hypercorn.asyncio.run")
    run.TCPServer = BoundedTCPServer
    return True
