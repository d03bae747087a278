# SPDX-License-Identifier: Apache-2.0
"""An ASGI application as any other: it knows nothing of sockets, and nothing of shared memory.

GET /            a greeting
POST /digest     how many bytes the body has, and its SHA-256
GET /count?N     N bytes
"""

import hashlib

PIECE = bytes(1 << 16)


async def app(scope, receive, send):
    """Answer one request (ASGI 3, HTTP); say yes to the server's start and end."""
    if scope["type"] == "lifespan":
        while (message := await receive())["type"] == "lifespan.startup":
            await send({"type": "lifespan.startup.complete"})
        await send({"type": message["type"] + ".complete"})
    elif scope["type"] == "http":
        await ROUTES.get((scope["method"], scope["path"]), missing)(scope, receive, send)


async def greet(scope, receive, send):
    """Say hello."""
    await answer(send, b"hello from ASGI\n")


async def digest(scope, receive, send):
    """Read the whole body, piece by piece."""
    size, total, more = 0, hashlib.sha256(), True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return
        body, more = message.get("body", b""), message.get("more_body", False)
        size += len(body)
        total.update(body)
    await answer(send, f"{size} {total.hexdigest()}\n".encode())


async def count(scope, receive, send):
    """Send as many bytes as asked for, piece by piece."""
    left = int(scope["query_string"] or 0)
    await start(send)
    while left > 0:
        await send({"type": "http.response.body", "body": PIECE[:left], "more_body": True})
        left -= len(PIECE)
    await send({"type": "http.response.body"})


async def missing(scope, receive, send):
    """Say that there is no such page."""
    await answer(send, b"not found\n", status=404)


async def answer(send, body, status=200):
    """Send a short answer."""
    await start(send, status)
    await send({"type": "http.response.body", "body": body})


async def start(send, status=200):
    """Send the head of an answer."""
    await send({"type": "http.response.start", "status": status, "headers": [(b"content-type", b"text/plain")]})


ROUTES = {("GET", "/"): greet, ("POST", "/digest"): digest, ("GET", "/count"): count}
