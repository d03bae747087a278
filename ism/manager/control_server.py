# SPDX-License-Identifier: Apache-2.0
"""The manager's end of the control socket. Each connection: requests and replies, until it ends or is idle too long.

It knows lines, limits and errors; what a request means is the caller's handler. Whoever asks may send anything.
"""

from __future__ import annotations

import json
import logging
import socket
from collections.abc import Callable
from typing import Any

import trio

from ism.errors import RemoteProtocolError
from ism.manager.control import MAX_REQUEST_BYTES, decode_request, encode_line

logger = logging.getLogger("ism.manager")

MAX_CONNECTIONS = 32
IDLE_S = 30.0
SEND_S = 10.0

Handler = Callable[[dict[str, Any]], dict[str, Any]]
"""From a request to a reply without "ok"; raises RemoteProtocolError to refuse."""


async def serve_control(listener: socket.socket, handler: Handler) -> None:
    """Serve a listening UNIX socket for ever; at most `MAX_CONNECTIONS` at once, others are turned away.

    Args: `listener`: borrowed. Cancellation: ends all connections.
    """
    connections = 0

    async def serve_one(sock: socket.socket) -> None:
        nonlocal connections
        try:
            async with trio.SocketStream(trio.socket.from_stdlib_socket(sock)) as stream:
                await _converse(stream, handler)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass  # it left
        finally:
            connections -= 1

    async with trio.open_nursery() as nursery:
        while True:
            await trio.lowlevel.wait_readable(listener)
            try:
                sock, _ = listener.accept()
            except (BlockingIOError, ConnectionAbortedError):
                continue
            except OSError as error:
                logger.error("no control connection can be accepted: %s", error)
                await trio.sleep(0.1)
                continue
            if connections >= MAX_CONNECTIONS:
                sock.close()
                continue
            connections += 1
            nursery.start_soon(serve_one, sock)


async def _converse(stream: trio.SocketStream, handler: Handler) -> None:
    data = bytearray()
    while True:
        with trio.move_on_after(IDLE_S) as scope:
            while b"\n" not in data and len(data) <= MAX_REQUEST_BYTES:
                more = await stream.receive_some(MAX_REQUEST_BYTES + 1)
                if not more:
                    return
                data += more
        if scope.cancelled_caught:
            return
        line, newline, rest = bytes(data).partition(b"\n")
        too_long = not newline or len(line) > MAX_REQUEST_BYTES
        data[:] = rest
        try:
            if too_long:
                raise RemoteProtocolError(f"a request has at most {MAX_REQUEST_BYTES} bytes")
            reply = encode_line({"ok": True, **handler(decode_request(line))})
        except RemoteProtocolError as error:
            reply = encode_line({"ok": False, "error": str(error)})
        with trio.move_on_after(SEND_S) as scope:
            await stream.send_all(reply)
        if too_long or scope.cancelled_caught:
            return
        await trio.lowlevel.checkpoint()


def unknown_op(request: dict[str, Any], known: tuple[str, ...]) -> RemoteProtocolError:
    """The error for a request that nobody knows."""
    shown = json.dumps(request["op"])[:60]
    return RemoteProtocolError(f"unknown op {shown}; there are: {', '.join(known)}")
