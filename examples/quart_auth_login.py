"""A chat inside an application that has its own users, signed in with quart-auth.

Run it with ``hypercorn quart_auth_login:app``. Sign in with a POST to ``/login``; from then on the
browser's session cookie identifies the user, over HTTP and over the WebSocket alike.
"""

from __future__ import annotations

import secrets

from quart import Quart, Request, Response, Websocket, request
from quart_auth import AuthUser, QuartAuth, current_user, login_user, logout_user

from quart_chat import QuartChat, sse_blueprint, threads_blueprint, websocket_blueprint

app = Quart(__name__)
app.secret_key = secrets.token_urlsafe(32)
app.config.from_prefixed_env()
QuartAuth(app)
chat = QuartChat(app)
app.register_blueprint(websocket_blueprint, url_prefix="/chat")
app.register_blueprint(sse_blueprint, url_prefix="/chat")
app.register_blueprint(threads_blueprint, url_prefix="/chat")

PASSWORDS = {"ada": "lovelace", "grace": "hopper"}


@chat.authenticate
async def signed_in(connection: Request | Websocket) -> str | None:
    """Return the user of the session, or None."""
    return current_user.auth_id


@app.post("/login")
async def login() -> Response:
    """Begin a session."""
    form = await request.form
    name = form.get("name", "")
    password = PASSWORDS.get(name)
    if password is None or not secrets.compare_digest(password, form.get("password", "")):
        return Response("Wrong name or password.", 403)
    login_user(AuthUser(name))
    return Response("", 204)


@app.post("/logout")
async def logout() -> Response:
    """End the session."""
    logout_user()
    return Response("", 204)
