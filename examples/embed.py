"""The chat inside an application that has routes, users and a database of its own.

Run it with Hypercorn, then talk to ws://127.0.0.1:8000/support or http://127.0.0.1:8000/support/sse:

    hypercorn --bind 127.0.0.1:8000 examples/embed.py:app
"""

from __future__ import annotations

import os

from quart import Quart, Request, Websocket, jsonify, request
from tortoise import Tortoise, fields
from tortoise.models import Model

from quart_chat import (
    ChatSSERunner,
    QuartChat,
    sse_blueprint,
    threads_blueprint,
    websocket_blueprint,
)

app = Quart(__name__)
app.config["CHAT_DATABASE_URL"] = os.environ.get("CHAT_DB", "sqlite://support_chat.sqlite3")
app.config["CHAT_SYSTEM_PROMPT"] = "You are the friendly support of a bicycle shop."


class Order(Model):
    """Table of the application; the chat's tables are in a database of their own."""

    id = fields.IntField(primary_key=True)
    item = fields.CharField(max_length=100)

    class Meta:
        table = "orders"


@app.before_serving
async def open_the_shops_database() -> None:
    """Claim Tortoise's process-wide context, which the chat does not touch."""
    await Tortoise.init(
        db_url=os.environ.get("SHOP_DB", "sqlite://shop.sqlite3"),
        modules={"models": [__name__]},
        _enable_global_fallback=True,
    )
    await Tortoise.generate_schemas()


@app.after_serving
async def close_the_shops_database() -> None:
    await Tortoise.close_connections()


chat = QuartChat(app)
app.register_blueprint(websocket_blueprint, url_prefix="/support")
app.register_blueprint(sse_blueprint, url_prefix="/support")
app.register_blueprint(threads_blueprint, url_prefix="/support")


@chat.authenticate
def user_of(connection: Request | Websocket) -> str | None:
    """Return the user's id, here from a header that a trusted proxy sets."""
    return connection.headers.get("X-Customer") or connection.args.get("customer")


@chat.tool
async def orders_of_the_shop() -> list[str]:
    """Return the newest orders."""
    return [order.item async for order in Order.all().order_by("-id").limit(10)]


@app.post("/orders")
async def place_order():
    """Store an order in the application's own database."""
    data = await request.get_json()
    order = await Order.create(item=data["item"])
    return {"id": order.id, "item": order.item}, 201


@app.get("/orders")
async def list_orders():
    return jsonify([order.item for order in await Order.all()])


@app.post("/ask")
async def ask():
    """Serve the stream on a route of the application's own."""
    return await ChatSSERunner(chat).respond(request)


@app.errorhandler(404)
async def not_here(error):
    return "This page is not in our shop.", 404
